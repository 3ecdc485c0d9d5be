"""What the assistant writes, found in templates that do not mark it."""

import json
import re

import pytest
from chats import CALL, CLOCK, CONVERSATIONS, assistant, chat, user
from foreign_templates import CHATML, MINIMIND3, QWEN3, TEMPLATES, foreign_tokenizer

from dataset.chat import stop_tokens, turns_end
from dataset.encoding import encode_chat
from dataset.lm_dataset import load_documents
from model.errors import UserError

LONG = [
    user("What is 12 + 7?"),
    assistant("19", reasoning_content="12 + 7\nis 19"),
    user("你好\n\n"),
    assistant("  我是 MiniMind，\n很高兴认识你！😀\n", reasoning_content="\n嗯\n"),
    user(" and?"),
    assistant(""),
    user("</think> model assistant <|im_end|>"),
    assistant("I wrote <|im_end|>\n<|im_start|>assistant\nand <|assistant|>\n[/INST] there."),
]
AGENT = [
    {"role": "system", "content": "Call.", "tools": [CLOCK]},
    user("time?"),
    assistant("", reasoning_content="I ask.", tool_calls=[CALL]),
    {"role": "tool", "content": "08:30"},
    {"role": "tool", "content": "09:30"},
    assistant("Again.", tool_calls=[CALL, CALL]),
    {"role": "tool", "content": "08:31"},
    assistant("half past", reasoning_content="So it is."),
    user("thanks"),
    assistant("Bye", reasoning_content="Polite."),
]
PLAIN = {
    **{f"turns of {n}": LONG[: 2 * n] for n in (1, 2, 3, 4)},
    "last answer thinks": [LONG[2], assistant("a"), LONG[0], LONG[1]],
    "same texts": [user("a"), assistant("a"), user("a"), assistant("a")],
    "thoughts in content": [user("q"), assistant("<think>\nhm\n</think>\n\n4")],
}
WITH_SYSTEM = {
    "system": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello.")],
    "two answers": [user("a"), assistant("b"), assistant("c", reasoning_content="d")],
}
WITH_TOOLS = {"agent": AGENT, "agent, no answer yet": AGENT[:6], "an answer": AGENT[:8]}
CASES = [
    (name, rows)
    for name in TEMPLATES
    for rows in [
        *PLAIN,
        *(WITH_SYSTEM if name not in ("gemma", "mistral", "llama-2") else ()),
        *(WITH_TOOLS if name in ("qwen3", "minimind-3") else ()),
    ]
]
ROWS = {**PLAIN, **WITH_SYSTEM, **WITH_TOOLS}


def trained(tokenizer, encoded) -> str:
    ids = [i for i, has_loss in zip(encoded.ids, encoded.loss_mask, strict=True) if has_loss]
    return tokenizer.decode(ids)


@pytest.mark.parametrize(("name", "rows"), CASES)
def test_spans_are_those_of_marks_put_by_hand(name, rows):
    template = TEMPLATES[name]
    plain, marked = foreign_tokenizer(template), foreign_tokenizer(template, marked=True)
    found, expected = (encode_chat(each, ROWS[rows]) for each in (plain, marked))
    assert any(expected.loss_mask)
    assert found.ids == expected.ids
    assert found.loss_mask == expected.loss_mask
    theirs = plain.apply_chat_template([user("a"), assistant("b")], tokenize=False)
    ours = plain.decode(encode_chat(plain, [user("a"), assistant("b")]).ids)
    assert ours == theirs


@pytest.mark.parametrize("messages", [*CONVERSATIONS.values(), LONG, AGENT])
def test_our_own_template_without_its_marks_gives_the_same_mask(tokenizer, messages):
    expected = encode_chat(tokenizer, messages)
    unmarked = foreign_tokenizer(
        re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", tokenizer.chat_template)
    )
    found = encode_chat(unmarked, messages)
    assert (found.ids, found.loss_mask) == (expected.ids, expected.loss_mask)


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in ("qwen3", "deepseek")])
def test_a_span_begins_where_a_prompt_ends(name):
    """Tokens of the prompt and of what the model writes after it are those of training."""
    tokenizer = foreign_tokenizer(TEMPLATES[name])
    for turn, thinks in ((1, True), (3, True), (5, False), (7, False)):
        whole = encode_chat(tokenizer, LONG[: turn + 1])
        prompt = encode_chat(
            tokenizer, LONG[:turn], add_generation_prompt=True, open_thinking=thinks
        )
        size = len(prompt.ids)
        assert whole.ids[:size] == prompt.ids
        assert whole.loss_mask[size] and not whole.loss_mask[size - 1]


def test_thoughts_are_trained_as_the_template_keeps_them():
    tokenizer = foreign_tokenizer(QWEN3, eos="<|im_end|>")
    rows = [LONG[0], LONG[1], user("b"), assistant("c", reasoning_content="d")]
    assert trained(tokenizer, encode_chat(tokenizer, rows)) == (
        "19<|im_end|><think>\nd\n</think>\n\nc<|im_end|>"
    )
    rows[-1] = assistant("c")
    assert trained(tokenizer, encode_chat(tokenizer, rows)) == (
        "19<|im_end|><think>\n\n</think>\n\nc<|im_end|>"
    )
    tokenizer = foreign_tokenizer(MINIMIND3, eos="<|im_end|>")
    assert trained(tokenizer, encode_chat(tokenizer, rows)) == (
        "12 + 7\nis 19\n</think>\n\n19<|im_end|>c<|im_end|>"
    )


def test_the_token_that_ends_a_turn_stops_a_reply():
    for name, end in (("llama-3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("zephyr", "</s>")):
        tokenizer = foreign_tokenizer(TEMPLATES[name])
        encoded = encode_chat(tokenizer, LONG[:2])
        assert trained(tokenizer, encoded) == f"19{end}"
        stops = tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer))
        assert stops == list(dict.fromkeys(["</s>", end]))


def test_the_turn_of_a_call_may_end_with_another_token():
    """Llama 3.1 ends it with <|eom_id|>, and writes no content beside a call."""
    template = """
{%- for m in messages -%}
  {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}
  {%- if m.tool_calls -%}
    {{- '{"name": "' + m.tool_calls[0].function.name + '"}<|eom_id|>' -}}
  {%- else -%}{{- m.content + '<|eot_id|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}"""
    tokenizer = foreign_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>"]})
    rows = [user("a"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "b"}]
    encoded = encode_chat(tokenizer, [*rows, assistant("c")])
    assert trained(tokenizer, encoded) == '{"name": "clock"}<|eom_id|>c<|eot_id|>'


def test_a_prompt_has_the_header_that_its_template_forgets():
    tokenizer = foreign_tokenizer(TEMPLATES["no prompt"])
    prompt = encode_chat(tokenizer, [user("a")], add_generation_prompt=True)
    assert tokenizer.decode(prompt.ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", ["qwen3", "minimind-3"])
@pytest.mark.parametrize("where", ["message", "option"])
@pytest.mark.parametrize("tool", [CLOCK, CLOCK["function"], {"function": CLOCK["function"]}])
def test_tools_reach_a_template_that_knows_only_the_variable(name, where, tool):
    tokenizer = foreign_tokenizer(TEMPLATES[name])
    system = {"role": "system", "content": "S", **({"tools": [tool]} if where == "message" else {})}
    options = {"tools": [tool]} if where == "option" else {}
    ids = encode_chat(tokenizer, [system, *AGENT[1:]], **options).ids
    tools = tokenizer.decode(ids).partition("<tools>\n")[2].partition("\n</tools>")[0]
    expected = tokenizer.apply_chat_template([user("q")], tools=[CLOCK], tokenize=False)
    assert tools == expected.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert '"type": "function", "function": {"name": "clock"' in tools


def test_our_own_template_gets_tools_once(tokenizer):
    text = tokenizer.decode(encode_chat(tokenizer, AGENT).ids)
    assert text.count("what time it is") == 1


def test_calls_and_tools_that_a_template_leaves_out_are_refused():
    tokenizer = foreign_tokenizer(CHATML)
    with pytest.raises(UserError, match="has tools, and .* leaves them out .clock"):
        encode_chat(tokenizer, AGENT)
    with pytest.raises(UserError, match="has tool calls, and .* leaves them out .clock"):
        encode_chat(tokenizer, [{"role": "system", "content": "S"}, *AGENT[1:]])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}", "line 1 .* is no Jinja"),
        ("{{ raise_exception('roles must\n alternate') }}", "is refused .*: roles must alternate"),
        ("{{ messages[0].nothing.more }}", "is refused .* has no attribute"),
        ("{{ messages[0]['content'] + 1 }}", "is refused by the tokenizer's chat template"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "omits answers"),
        (
            "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' }}"
            "{{ eos_token }}{% endfor %}",
            "is rendered without message 2",
        ),
        (
            "{% for m in messages[::-1] %}{{ m.content }}{{ eos_token }}{% endfor %}",
            "cannot be seen",
        ),
    ],
)
def test_a_template_that_fails_is_told_in_a_sentence(template, reason):
    rows = [user("a"), assistant("b"), user("c"), assistant("d")]
    with pytest.raises(UserError, match=reason):
        encode_chat(foreign_tokenizer(template), rows)


def test_a_mark_that_marks_nothing_is_an_error(tmp_path):
    tokenizer = foreign_tokenizer(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'nobody' %}"
        "{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    path = tmp_path / "rows.jsonl"
    path.write_bytes(chat(user("a"), assistant("b")))
    with pytest.raises(UserError, match="line 1 of .* has nothing to train on"):
        load_documents(path, "conversations", tokenizer, cache=tmp_path)
    sides = {side: [user("a"), assistant(side)] for side in ("chosen", "rejected")}
    path.write_text(json.dumps(sides))
    with pytest.raises(UserError, match="line 1 of .* has nothing to train on"):
        load_documents(path, "preferences", tokenizer, cache=tmp_path)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_preference_pair_has_loss_on_its_answers_alone(name, tmp_path):
    tokenizer = foreign_tokenizer(TEMPLATES[name])
    prompt = [user("a"), assistant("shared"), user("b")]
    row = {"chosen": [*prompt, assistant("yes")], "rejected": [*prompt, assistant("no, no")]}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    documents = load_documents(path, "preferences", tokenizer, cache=tmp_path)
    answers = [
        tokenizer.decode(document["input_ids"][document["loss_mask"]]) for document in documents
    ]
    assert [re.sub(r"<[^>]*>|\s", "", answer) for answer in answers] == ["yes", "no,no"]
    assert all(document["loss_mask"][-1] for document in documents)


def test_an_end_that_is_no_token_is_trained_and_told(tokenizer):
    plain = foreign_tokenizer(CHATML.replace("<|im_end|>", "<end>"))
    encoded = encode_chat(plain, [user("a"), assistant("b"), user("c"), assistant("d")])
    assert trained(plain, encoded) == "b<end>d<end>"
    assert turns_end(tokenizer) and not turns_end(plain)

"""The tokenizer in model/, its chat template, and scripts/train_tokenizer.py, which made them."""

import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from model.errors import UserError
from scripts import train_tokenizer as script

ROOT = Path(__file__).resolve().parents[2]
TAGS = [
    *("<think>", "</think>", "<answer>", "</answer>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
]


@pytest.fixture
def render(tokenizer):
    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    return render


# -- vocabulary ------------------------------------------------------------------------------------


def test_ids_of_the_control_tokens(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 6400
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token is None
    assert tokenizer.model_max_length == 32768
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2]
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)
    for tag in TAGS:
        assert len(tokenizer.encode(tag)) == 1


def test_tags_survive_skip_special_tokens(tokenizer):
    text = "".join(TAGS) + "<think>\n3 < 4\n</think>\n<answer>\n是\n</answer>"
    ids = tokenizer.encode("<|im_start|>" + text + "<|im_end|><|endoftext|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_byte_is_a_token(tokenizer):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256
    assert set(alphabet) <= set(tokenizer.get_vocab())


def test_every_token_can_be_reached(tokenizer):
    """Each merge makes a token of two others; none stands in the vocabulary without one."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    made = {left + right for left, right in model["merges"]}
    tokens = [token for token, number in model["vocab"].items() if number >= 16]
    assert {token for token in tokens if len(token) > 1} == made


TEXTS = [
    "",
    " ",
    "\n\n",
    "a\n\n\nb \t\r\n",
    "  two  spaces ,and ' quotes'  don't can't clean_up . ! ? n't",
    "你好，世界！Hello, 世界。これはテスト。한국어 العربية",
    "emoji 👩‍👩‍👧‍👦🇨🇳🏳️‍🌈 é e\u0301 ﬁ Å \u00a0\u3000\u200b\ufeff\ufffd\x00\x7f",
    "def f(x):\n    return {'a': [1, 2.50], \"b\": x ** 2}\n\n\n# 注释\n",
    "1234567890 ３４ ²½ Ⅳ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_noise(tokenizer):
    noise = random.Random(0)
    letters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for _ in range(200):
        for text in (
            noise.randbytes(noise.randrange(100)).decode("latin-1"),
            "".join(noise.choices(letters, k=noise.randrange(50))),
            "".join(
                noise.choices("ab 你好\n\r\t'，。1<|im_end|>\U0001f600", k=noise.randrange(50))
            ),
        ):
            assert tokenizer.decode(tokenizer.encode(text)) == text
            plain = tokenizer.encode(text, split_special_tokens=True)
            assert not {0, 1, 2} & set(plain) and tokenizer.decode(plain) == text


def test_digits_one_by_one(tokenizer):
    assert tokenizer.tokenize("20250131") == list("20250131")
    assert tokenizer.tokenize("3.14+2=5") == list("3.14+2=5")
    assert not [token for token in tokenizer.get_vocab() if re.search(r"[0-9].*[0-9]", token)]


def test_blank_line_and_roles_are_tokens(tokenizer):
    for text in ("\n\n", "system", "user", "assistant"):
        assert len(tokenizer.encode(text)) == 1


def test_pre_tokenizer_is_llama_cpps_qwen2(tokenizer):
    """llama.cpp names its pre-tokenizers; the GGUF says "qwen2", so it must be just that."""
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert pattern == getattr(qwen2, "PRETOKENIZE_REGEX", pattern)
    content = json.loads((ROOT / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    split, to_bytes = content["pre_tokenizer"]["pretokenizers"]
    assert split["type"] == "Split" and split["pattern"] == {"Regex": pattern}
    assert split["behavior"] == "Isolated" and split["invert"] is False
    assert to_bytes["type"] == "ByteLevel"
    assert to_bytes["add_prefix_space"] is False and to_bytes["use_regex"] is False
    assert content["normalizer"] is None and content["post_processor"] is None
    assert content["model"]["ignore_merges"] is False


def test_compression(tokenizer):
    """A guard against a bad retraining, on text that no file holds."""
    zh = "学习一门新的语言需要耐心。你可以每天读一点简单的文章，再试着和朋友聊天。"
    en = "Learning a new language takes patience. Read a little every day, and talk to people."
    assert len(zh) / len(tokenizer.encode(zh)) > 1.2
    assert len(en) / len(tokenizer.encode(en)) > 3.0


# -- chat template ---------------------------------------------------------------------------------

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
WEATHER = {"name": "weather", "parameters": {"city": {"type": "string", "description": '城市]}"'}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}
TOOLS_TURN = (
    "You can call these tools:\n<tools>\n"
    '{"name": "weather", "parameters": {"city": {"type": "string", "description": "城市]}\\""}}}\n'
    '{"type": "function", "function": {"name": "clock", "parameters": {}}}\n'
    "</tools>\nWrite a call like this, with JSON arguments:\n"
    '<tool_call>\n{"name": <tool>, "arguments": <arguments>}\n</tool_call><|im_end|>\n'
)


def test_chat(render):
    assert render(HI) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    )


def test_system_and_several_turns(render):
    messages = [{"role": "system", "content": " Be brief.\n"}, *HI, {"role": "user", "content": ""}]
    assert render(messages, add_generation_prompt=True) == (
        "<|im_start|>system\n Be brief.\n<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_generation_prompt(render):
    user = HI[:1]
    start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(user, add_generation_prompt=True) == start
    assert render(user, add_generation_prompt=True, open_thinking=False) == start
    assert render(user, add_generation_prompt=True, open_thinking=True) == start + "<think>\n"
    assert render(HI, open_thinking=True) == render(HI)


def test_reasoning(render):
    message = {"role": "assistant", "content": "<answer>\n4\n</answer>", "reasoning_content": "2+2"}
    assert render([message]) == (
        "<|im_start|>assistant\n<think>\n2+2\n</think>\n<answer>\n4\n</answer><|im_end|>\n"
    )
    message["reasoning_content"] = ""
    assert render([message]) == "<|im_start|>assistant\n<answer>\n4\n</answer><|im_end|>\n"


@pytest.mark.parametrize(
    "tools",
    [
        [WEATHER, CLOCK],
        [json.dumps(WEATHER, ensure_ascii=False), CLOCK],
        json.dumps([WEATHER, CLOCK], ensure_ascii=False),
    ],
    ids=["list", "list with JSON text", "JSON text"],
)
def test_tools_of_the_system_message(render, tools):
    system = {"role": "system", "content": "", "tools": tools}
    assert render([system, *HI]) == f"<|im_start|>system\n{TOOLS_TURN}{render(HI)}"
    system["content"] = "Be brief."
    assert render([system, *HI]) == f"<|im_start|>system\nBe brief.\n\n{TOOLS_TURN}{render(HI)}"


def test_tools_as_argument(render):
    assert render(HI, tools=[WEATHER, CLOCK]) == f"<|im_start|>system\n{TOOLS_TURN}{render(HI)}"
    system = {"role": "system", "content": "Be brief.", "tools": [{"name": "another"}]}
    assert render([system, *HI], tools=[WEATHER, CLOCK]) == (
        f"<|im_start|>system\nBe brief.\n\n{TOOLS_TURN}{render(HI)}"
    )


@pytest.mark.parametrize("tools", ["", "[]", " [ ] ", "null", [], None])
def test_no_tools(render, tools):
    system = {"role": "system", "content": "Be brief.", "tools": tools}
    assert render([system, *HI]) == "<|im_start|>system\nBe brief.<|im_end|>\n" + render(HI)
    system["content"] = ""
    assert render([system, *HI]) == render(HI)


ARGUMENTS = {"city": "北京", "days": [{"name": "Mon"}, {"name": '"Tue"'}]}
CALLS = [{"name": "weather", "arguments": ARGUMENTS}, {"name": "clock", "arguments": {}}]
CALLS_TEXT = (
    '<tool_call>\n{"name": "weather", "arguments": '
    '{"city": "北京", "days": [{"name": "Mon"}, {"name": "\\"Tue\\""}]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)


def openai_form(arguments, nothing):
    functions = [
        {"name": "weather", "arguments": arguments},
        {"name": "clock", "arguments": nothing},
    ]
    return [{"id": "1", "type": "function", "function": function} for function in functions]


@pytest.mark.parametrize(
    "calls",
    [
        CALLS,
        json.dumps(CALLS, ensure_ascii=False),
        [json.dumps(call, ensure_ascii=False) for call in CALLS],
        [
            {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
            for call in CALLS
        ],
        openai_form(ARGUMENTS, {}),
        openai_form(json.dumps(ARGUMENTS, ensure_ascii=False), ""),
    ],
    ids=["list", "JSON text", "JSON texts", "text arguments", "OpenAI", "OpenAI text arguments"],
)
def test_tool_calls(render, calls):
    call = {"role": "assistant", "content": None, "tool_calls": calls}
    assert render([call]) == f"<|im_start|>assistant\n{CALLS_TEXT}<|im_end|>\n"
    call["content"] = "Wait."
    assert render([call]) == f"<|im_start|>assistant\nWait.\n{CALLS_TEXT}<|im_end|>\n"
    call["reasoning_content"] = "Hm."
    thoughts = "<think>\nHm.\n</think>\n"
    assert render([call]) == f"<|im_start|>assistant\n{thoughts}Wait.\n{CALLS_TEXT}<|im_end|>\n"
    call["content"] = ""
    assert render([call]) == f"<|im_start|>assistant\n{thoughts}{CALLS_TEXT}<|im_end|>\n"


def test_no_tool_calls(render):
    for calls in ("", "[]", [], None):
        assert render([HI[0], {**HI[1], "tool_calls": calls}]) == render(HI)


def test_tool_results_share_a_turn(render):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "clock"}]}
    result = {"role": "tool", "content": "12:00"}
    other = {"role": "tool", "content": {"天气": "晴"}}
    turn = "<tool_response>\n12:00\n</tool_response>"
    rendered = render([call, result, other, call, result])
    assert rendered.split("<|im_start|>")[1:] == [
        (call_text := 'assistant\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>')
        + "<|im_end|>\n",
        f'user\n{turn}\n<tool_response>\n{{"天气": "晴"}}\n</tool_response><|im_end|>\n',
        f"{call_text}<|im_end|>\n",
        f"user\n{turn}<|im_end|>\n",
    ]


def test_content_in_parts(render):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert render([{"role": "user", "content": parts}, HI[1]]) == render(HI)


@pytest.mark.parametrize("broken", ["weather", '[{"name": "weather"', '[{"name": "weather}]'])
def test_broken_json_is_refused(render, broken):
    with pytest.raises(Exception, match="JSON array"):
        render([{"role": "system", "content": "", "tools": broken}])


def test_generation_mask(tokenizer):
    call = {"role": "assistant", "content": "", "reasoning_content": "嗯", "tool_calls": CALLS}
    messages = [
        {"role": "system", "content": "Be brief.", "tools": [WEATHER]},
        {"role": "user", "content": "天气怎么样？😀"},
        call,
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "晴天！\n\nSunny 😀"},
        *HI,
    ]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    spans, span = [], []
    for token, trained in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if trained:
            span.append(token)
        elif span:
            spans.append(span)
            span = []
    expected = [
        f"<think>\n嗯\n</think>\n{CALLS_TEXT}<|im_end|>",
        "晴天！\n\nSunny 😀<|im_end|>",
        "hello<|im_end|>",
    ]
    assert [tokenizer.decode(span) for span in spans] == expected
    assert [tokenizer.encode(text) for text in expected] == spans
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert encoded["input_ids"] == tokenizer.encode(rendered)


def test_template_needs_only_jinja(tokenizer, render):
    """Without its generation tags (llama.cpp's Python client knows none) it renders the same."""
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", tokenizer.chat_template)
    environment = jinja2.Environment()  # no trimming, unlike transformers
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    call = {"role": "assistant", "content": "a", "reasoning_content": "b", "tool_calls": CALLS}
    for messages in (HI, [{**HI[0], "content": "<&>"}, call, {"role": "tool", "content": "c"}]):
        options = {"tools": [WEATHER], "add_generation_prompt": True}
        ours = environment.from_string(plain).render(messages=messages, **options)
        assert ours == render(messages, **options)


def test_template_file_is_the_one_in_use(tokenizer):
    path = ROOT / "dataset" / "chat_template.jinja"
    assert tokenizer.chat_template == path.read_text(encoding="utf-8")


# -- scripts/train_tokenizer.py --------------------------------------------------------------------


def run_script(*flags):
    command = [sys.executable, str(ROOT / "scripts" / "train_tokenizer.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)


def write_lines(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_train_from_the_command_line(tmp_path):
    text = write_lines(
        tmp_path / "text.jsonl",
        *(
            json.dumps({"text": f"The cat number {n} sat\n\n猫坐在垫子上 {n}。"})
            for n in range(400)
        ),
    )
    chat = tmp_path / "chat.jsonl.gz"
    with gzip.open(chat, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"conversations": HI}) + "\n")
        file.write(json.dumps({"chosen": HI, "rejected": HI}) + "\n")
    plain = write_lines(tmp_path / "plain.txt", "A plain text.", "", "纯文本。")
    out = tmp_path / "made"
    result = run_script(
        *("--data_path", text, chat, plain, "--file_weight", 1, 2, 0.5, "--zh_weight", 1.5),
        *("--row_weight", "猫=2", "--vocab_size", 330, "--output_dir", out, "--eval_path", plain),
    )
    assert result.returncode == 0, result.stderr
    assert "330 tokens" in result.stdout and "plain.txt" in result.stdout

    made = AutoTokenizer.from_pretrained(out)
    assert len(made) == 330
    assert sorted(path.name for path in out.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for content in ("\n\n", " cat", "user"):
        assert len(made.encode(content)) == 1
    assert made.encode("<|im_start|>user\n")[0] == 1 and made.eos_token_id == 2
    assert made.decode(made.encode(TEXTS[5])) == TEXTS[5]
    assert made.apply_chat_template(HI, tokenize=False).startswith("<|im_start|>user\nhi<|im_end|>")
    flags = {t["content"]: t["special"] for t in made_tokens(out)}
    assert [name for name, special in flags.items() if special] == script.SPECIAL


def made_tokens(directory):
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    return content["added_tokens"]


@pytest.mark.parametrize(
    "flags",
    [["--data_path", "{folder}/missing.jsonl"], ["--data_path", "{folder}/broken.jsonl"]],
    ids=["missing file", "broken JSON"],
)
def test_mistakes_end_with_a_sentence(tmp_path, flags):
    write_lines(tmp_path / "broken.jsonl", '{"text": "fine"}', '{"text": "no end')
    flags = [flag.format(folder=tmp_path) for flag in flags]
    result = run_script(*flags, "--output_dir", tmp_path / "made")
    assert result.returncode == 2
    assert "error: " in result.stderr and "Traceback" not in result.stderr
    assert "missing.jsonl" in result.stderr or re.search(
        "line 2 of .*broken.jsonl is not JSON", result.stderr
    )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vocab_size": 271}, "too small"),
        ({"vocab_size": 6400}, "yields only"),
        ({"data_path": []}, "no text to train on"),
        ({"file_weight": [1, 2]}, "2 numbers for 1 files"),
        ({"row_weight": ["cat"]}, "REGEX=NUMBER"),
        ({"row_weight": ["(=1"]}, "REGEX=NUMBER"),
        ({"zh_weight": -1}, "below 0"),
        ({"line": "[1]"}, "line 2 of .*data.jsonl is no JSON object"),
        ({"line": '{"conversations": ["hi"]}'}, "line 2 of .*data.jsonl has no"),
        ({"line": "\udcff"}, "is not UTF-8"),
    ],
)
def test_mistakes_are_told(tmp_path, flags, message):
    line = flags.pop("line", '{"text": "dog"}')
    data = tmp_path / "data.jsonl"
    data.write_text(f'{{"text": "cat"}}\n{line}\n', encoding="utf-8", errors="surrogateescape")
    args = script.Args(
        **{"data_path": [str(data)], "output_dir": str(tmp_path / "made"), "vocab_size": 272}
        | flags
    )
    with pytest.raises(UserError, match=message):
        script.main(args)
    assert not (tmp_path / "made").exists()


def test_a_damaged_gzip_file_is_told(tmp_path):
    data = tmp_path / "data.jsonl.gz"
    data.write_bytes(gzip.compress(b'{"text": "cat"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="is damaged"):
        script.main(script.Args(data_path=[str(data)], output_dir=str(tmp_path), vocab_size=272))


def test_pieces_count_once_a_document_and_sentences_once(tmp_path):
    long = "a sentence that is long enough to count"
    data = write_lines(
        tmp_path / "data.jsonl",
        json.dumps({"text": f"dog dog dog. {long}.\n猫"}),
        json.dumps({"text": f"{long}. dog"}),
        json.dumps({"text": "bird " * 100}),
    )
    args = script.Args(data_path=[str(data)], zh_weight=3, row_weight=["bird=0.5"], max_bytes=60)
    counts, held_out = script.count_pretokens([data], args)
    assert counts["dog"] == 3 and counts[" dog"] == 3 + 1
    assert counts[" sentence"] == 3 and counts["猫"] == 3
    assert counts[" bird"] == counts["bird"] == 0.5
    assert counts["user"] == 3 + 1 + 0.5
    assert held_out == []


def test_language():
    assert script.language(["你好", "吗 AI"]) == "zh"
    assert script.language(["say 你好"]) == "mixed"
    assert script.language(["hello", "12"]) == "en"


def test_measure_counts_characters_per_token():
    tokenizer = Tokenizer.from_file(str(ROOT / "model" / "tokenizer.json"))
    measured = script.measure(tokenizer, [["123"], ["4", "567\ud800"], ["<|im_end|>"]])
    assert measured == {"en": 18 / 9}

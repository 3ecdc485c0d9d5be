"""The chat template in ollama's language: our own, and others, learnt from what they say. Go's own
template engine renders them in tests/engines/test_ollama.py."""

import pytest
from foreign_templates import GEMMA, LLAMA3, MINIMIND3, TEMPLATES, foreign_tokenizer

from model.config import MiniMindConfig
from model.errors import UserError
from model.formats.ollama_format import TEMPLATE, modelfile
from model.formats.ollama_templates import TOOLS, learn_template
from model.inference.thinking import close_thoughts
from model.weights import load_tokenizer

CALL = {"id": "call00000", "type": "function"}
CALL["function"] = {"name": "second", "arguments": {"x": 1}}
TURNS = [
    {"role": "user", "content": "What time is it? 几点了？"},
    {"role": "assistant", "content": "12"},
    {"role": "user", "content": "and {{ now }}?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
AGENT = [
    SYSTEM,
    *TURNS,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "13", "tool_call_id": "call00000"},
]
HAVE_TOOLS = ("qwen3", "minimind-3")
CASES = {
    name: [
        (TURNS[:1], None),
        (TURNS, None),
        *([] if name in ("gemma", "mistral", "llama-2") else [([SYSTEM, *TURNS], None)]),
        *([(AGENT, TOOLS), (TURNS, TOOLS[:1])] if name in HAVE_TOOLS else []),
    ]
    for name in TEMPLATES
}


def expected(tokenizer, messages, tools):
    return tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )


UNTRANSLATED = ("no prompt", "deepseek")


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in UNTRANSLATED])
def test_what_is_learnt_says_what_the_template_says(name):
    tokenizer = foreign_tokenizer(TEMPLATES[name])
    pieces = learn_template(tokenizer)
    assert pieces.has_tools == (name in HAVE_TOOLS)
    for messages, tools in CASES[name]:
        assert pieces.write(messages, tools) == expected(tokenizer, messages, tools)


@pytest.mark.parametrize(
    ("template", "stop"),
    [(LLAMA3, "<|eot_id|>"), (GEMMA, "<end_of_turn>"), (MINIMIND3, "<|im_end|>")],
)
def test_a_modelfile_has_the_tokenizers_own_template(template, stop, tmp_path):
    text = modelfile(tmp_path / "m.gguf", MiniMindConfig(), foreign_tokenizer(template))
    assert f'PARAMETER stop "{stop}"' in text.splitlines()
    assert "You can call these tools" not in text
    assert text.startswith("# The template is the tokenizer's own, without tools.\n") == (
        template != MINIMIND3
    )


@pytest.mark.parametrize("name", ["qwen3", "minimind-3"])
def test_thoughts_are_learnt(name):
    """minimind-3 writes those of earlier turns, qwen3 leaves them out."""
    tokenizer = foreign_tokenizer(TEMPLATES[name])
    pieces = learn_template(tokenizer)
    opened = tokenizer.apply_chat_template(
        TURNS[:1], add_generation_prompt=True, tokenize=False, enable_thinking=True, open_thinking=1
    )
    assert opened.endswith(pieces.open_prompt) and pieces.open_prompt != pieces.prompt
    thinking = [TURNS[0], {**TURNS[1], "reasoning_content": "Noon."}, TURNS[2]]
    assert pieces.write(thinking, None) == expected(tokenizer, thinking, None)
    assert bool(pieces.thought) == (name == "minimind-3")
    assert not learn_template(foreign_tokenizer(LLAMA3)).open_prompt


def test_a_template_that_cannot_be_translated_is_told(tmp_path):
    reversed_roles = "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}"
    numbered = "{% for m in messages %}{{ loop.index }}{{ m.content }}<s>{% endfor %}"
    for template in (reversed_roles, numbered):
        with pytest.raises(UserError, match="cannot be translated for ollama"):
            modelfile(tmp_path / "m.gguf", MiniMindConfig(), foreign_tokenizer(template))


def test_our_own_closes_a_thought_where_the_model_learnt_so(tmp_path):
    tokenizer = load_tokenizer()
    assert TEMPLATE in modelfile(tmp_path / "m.gguf", MiniMindConfig(), tokenizer)
    close_thoughts(tokenizer)
    text = modelfile(tmp_path / "m.gguf", MiniMindConfig(), tokenizer)
    end = "{{ if .Think }}<think>\n{{ else }}<think>\n\n</think>\n\n{{ end }}"
    assert f'<|im_start|>assistant\n{end}"""' in text

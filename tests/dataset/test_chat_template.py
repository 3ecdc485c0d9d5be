"""The chat template: turns, tools, calls, thoughts, and the marks of what is trained."""

import json
import re
from pathlib import Path

import jinja2
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def render(tokenizer):
    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    return render


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

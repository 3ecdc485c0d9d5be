"""ollama's chat templates, by the template engine that it has: Go's own. template.go also looks for
the tags of calls and thoughts as ollama's parsers do. ollama itself is not run."""

import json
from pathlib import Path

import pytest
from foreign_templates import TEMPLATES, foreign_tokenizer
from test_ollama_format import CASES, HAVE_TOOLS, SYSTEM, TURNS, UNTRANSLATED

from model.formats.ollama_format import TEMPLATE, THINK
from model.formats.ollama_templates import learn_template
from model.inference.thinking import close_thoughts
from model.weights import load_tokenizer

pytestmark = pytest.mark.slow
TAGS = {"Call": "<tool_call>", "Open": "<think>", "Close": "</think>"}


def compact(value) -> str:
    """JSON as Go writes it; MiniMind's template takes text as it stands."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


WEATHER = {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}
CLOCK = {"name": "clock", "description": "What time is it? 几点了？"}
CALLS = [{"name": "clock", "arguments": {}}, {"name": "weather", "arguments": {"city": "Paris"}}]
RESULTS = [{"role": "tool", "content": text} for text in ("12:00", "mild\n")]
END = [{"role": "assistant", "content": "Noon."}, {"role": "user", "content": "Thanks {{ . }}"}]


def assistant(content="", thought="", calls=()):
    message = {"role": "assistant", "content": content}
    message |= {"reasoning_content": thought} if thought else {}
    named = [{"function": {**call, "arguments": compact(call["arguments"])}} for call in calls]
    return message | ({"tool_calls": named} if calls else {})


OURS = {
    "question": TURNS[:1],
    "turns": TURNS,
    "system": [SYSTEM, *TURNS],
    "thought": [TURNS[0], assistant("12", "Noon, then."), TURNS[2]],
    "call": [TURNS[0], assistant(calls=CALLS[:1]), RESULTS[0]],
    "calls": [TURNS[0], assistant(calls=CALLS), *RESULTS, *END],
    "answer and calls": [SYSTEM, TURNS[0], assistant("Let me see.", calls=CALLS), *RESULTS],
    "thought and call": [TURNS[0], assistant(thought="Look.", calls=CALLS[1:]), RESULTS[1], *END],
    "all of it": [TURNS[0], assistant("So.", "Look.", CALLS), *RESULTS, *END],
    "thought alone": [TURNS[0], assistant(thought="Hm."), TURNS[2]],
}


def as_go(template: str, messages: list, tools: list, think: bool = False) -> dict:
    """A case of template.go."""
    written = []
    for message in messages:
        calls = [{**call["function"]} for call in message.get("tool_calls", [])]
        for call in calls:
            if isinstance(call["arguments"], str):
                call["arguments"] = json.loads(call["arguments"])
        thought = message.get("reasoning_content", "")
        calls = [{"Function": call} for call in calls]
        written.append({**message, "Thinking": thought, "ToolCalls": calls})
        written[-1].pop("tool_calls", None)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    case = dict(Template=template, System=system, Tools=tools, Messages=written, Think=think)
    return case


@pytest.fixture(scope="module")
def in_go(engine, tmp_path_factory):
    """A function that renders cases by Go's template engine."""
    place = tmp_path_factory.mktemp("go")
    go = ["go", "build", "-o", place / "render", Path(__file__).with_name("template.go")]
    engine.run(*go, cwd=place, timeout=600)
    return lambda cases: json.loads(engine.run(place / "render", input=json.dumps(cases)))


def with_tools(messages: list, tools: list) -> list:
    """In the first system message, which takes them as text, too."""
    system = messages[0] if messages[0]["role"] == "system" else {"role": "system", "content": ""}
    rest = messages[messages[0]["role"] == "system" :]
    return [system | {"tools": compact(tools)}, *rest] if tools else messages


@pytest.mark.parametrize("empty_think", [False, True])
def test_our_template_gives_the_same_tokens(in_go, empty_think):
    tokenizer = load_tokenizer()
    if empty_think:
        close_thoughts(tokenizer)
    template = TEMPLATE + (THINK if empty_think else "")
    cases, expected = [], []
    for messages in OURS.values():
        for tools in ([], [WEATHER], [CLOCK, WEATHER]):
            for think in (False, True) if empty_think else (False,):
                cases.append(as_go(template, messages, tools, think))
                expected.append(
                    tokenizer.apply_chat_template(
                        with_tools(messages, tools), add_generation_prompt=True, open_thinking=think
                    )["input_ids"]
                )
    for result, tokens in zip(in_go(cases), expected, strict=True):
        assert tokenizer.decode(tokens) == result["Text"]
        assert tokenizer(result["Text"])["input_ids"] == tokens
        assert TAGS.items() <= result.items()


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in UNTRANSLATED])
def test_others_templates_give_the_same_text(in_go, name):
    """Go writes JSON in order and without spaces, so lines of JSON are compared as such."""
    tokenizer = foreign_tokenizer(TEMPLATES[name])
    pieces = learn_template(tokenizer)
    cases, expected = [], []
    thinking = [TURNS[0], {**TURNS[1], "reasoning_content": "Noon."}, TURNS[2]]
    for think in (False, True) if pieces.open_prompt else (False,):
        more = [(thinking, None)] if pieces.open_prompt else []
        for messages, tools in [*CASES[name], *more]:
            cases.append(as_go(pieces.in_go(), messages, tools or [], think))
            settings = dict(tools=tools, enable_thinking=think, open_thinking=think)
            settings |= dict(add_generation_prompt=True, tokenize=False)
            expected.append(tokenizer.apply_chat_template(messages, **settings))
    for result, text in zip(in_go(cases), expected, strict=True):
        assert loose(result["Text"]) == loose(text)
        if name in HAVE_TOOLS:
            assert TAGS.items() <= result.items()


def loose(text: str) -> list:
    return [json.loads(line) if line.startswith("{") else line for line in text.split("\n")]

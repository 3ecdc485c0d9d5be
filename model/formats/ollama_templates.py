"""Chat templates of others in ollama's language, Go's text/template.

A template is learnt from conversations that it renders: what it writes between the messages, the
tools, the calls, the results and the thoughts. The translation is checked on further conversations,
and refused where it would say something else. Not translated are templates that write a message in
more than one way; of one that leaves out the thoughts of earlier turns, those since the last
question are left out too.
"""

import json
import os
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from model.errors import UserError

SYSTEM, USER, ANSWER, USER_2, ANSWER_2, USER_3, NAME, RESULT = map(chr, range(0xE000, 0xE008))
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {**FUNCTION, "name": name}} for name in ("first", "second")
]
ARGUMENTS = {"x": 1}


class Untranslatable(Exception):
    """A conversation is not rendered as the translation would."""


@dataclass
class Pieces:
    """What a template writes around the parts of a conversation, (before, after) each.

    `begin` and `begin_tools` are what stands before the first message: without a system message,
    and with one, in two parts. Those with tools are split at the list of tools once more.
    """

    begin: str
    begin_system: tuple[str, ...]  # (before, after) the system message; () if it is refused
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    stop: str
    open_prompt: str = ""  # the prompt of a model that is to think; "": the template knows no such
    thought: tuple[str, ...] = ()  # around a thought, all that stands before the answer
    begin_tools: tuple[str, ...] = ()  # (before, after) the tools, without a system message
    begin_tools_system: tuple[str, ...] = ()  # (before system, before tools, after)
    between_tools: str = ""
    before_call: str = ""  # after content, or another call
    call: tuple[str, ...] = field(default=())  # around name and arguments
    result: tuple[str, ...] = ()

    @property
    def has_tools(self) -> bool:
        return bool(self.result)

    def write(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        """What `in_go` renders, in Python."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        listed = self.between_tools.join(map(to_json, tools or []))
        if tools and system:
            before, middle, after = self.begin_tools_system
            text = before + system + middle + listed + after
        elif tools:
            text = listed.join(self.begin_tools)
        else:
            text = system.join(self.begin_system) if system else self.begin
        for message in messages:
            content, around = message["content"], getattr(self, message["role"], ())
            if message["role"] == "tool":
                around = self.result
            if message["role"] == "system":
                continue
            for call in message.get("tool_calls", ()):
                function = call["function"]
                first, second, last = self.call
                content += self.before_call if content else ""
                content += first + function["name"] + second + to_json(function["arguments"]) + last
            if self.thought and message.get("reasoning_content"):
                around = (message["reasoning_content"].join(self.thought), around[1])
            text += content.join(around)
        return text + self.prompt

    def in_go(self) -> str:
        begin = literal(self.begin)
        if self.begin_system:
            begin = f"{{{{ if .System }}}}{go('.System', self.begin_system)}{{{{ else }}}}{begin}"
            begin += "{{ end }}"
        user, answer = go(".Content", self.user), go(".Content", self.assistant)
        tool = ""
        if self.has_tools:
            before, middle, after = map(literal, self.begin_tools_system)
            first, last = map(literal, self.begin_tools)
            listed = "{{ range $n, $tool := .Tools }}{{ if $n }}" + literal(self.between_tools)
            listed += "{{ end }}{{ $tool }}{{ end }}"
            begin = (
                f"{{{{ if .Tools }}}}{{{{ if .System }}}}{before}{{{{ .System }}}}{middle}"
                f"{{{{ else }}}}{first}{{{{ end }}}}{listed}{{{{ if .System }}}}{after}"
                f"{{{{ else }}}}{last}{{{{ end }}}}{{{{ else }}}}{begin}{{{{ end }}}}"
            )
            one, two, three = map(literal, self.call)
            again = literal(self.before_call)
            calls = (
                f"{{{{ if and .Content $message.ToolCalls }}}}{again}{{{{ end }}}}"
                f"{{{{ if .ToolCalls }}}}{one}{{{{ range $n, $call := .ToolCalls }}}}"
                f"{{{{ if $n }}}}{again}{one}{{{{ end }}}}{{{{ .Function.Name }}}}{two}"
                f"{{{{ .Function.Arguments }}}}{three}{{{{ end }}}}{{{{ end }}}}"
            )
            before, after = map(literal, self.assistant)
            answer = f"{before}{{{{ .Content }}}}{calls}{after}"
            tool = '{{ else if eq .Role "tool" }}' + go(".Content", self.result)
        prompt = literal(self.prompt)
        if self.open_prompt:
            before = literal(self.assistant[0])
            answer = self.thoughts_in_go() + answer.removeprefix(before)
            prompt = f"{{{{ if .Think }}}}{literal(self.open_prompt)}{{{{ else }}}}{prompt}"
            prompt += "{{ end }}"
        return (
            begin
            + '{{ range $i, $message := .Messages }}{{ if eq .Role "user" }}'
            + f'{user}{{{{ else if eq .Role "assistant" }}}}{answer}{tool}'
            + "{{ end }}{{ end }}"
            + prompt
        )

    def thoughts_in_go(self) -> str:
        """What stands before an answer. ollama looks for the tags in a block of their own."""
        before = literal(self.assistant[0])
        if not self.thought:
            return f"{{{{ if false }}}}<think>{{{{ .Thinking }}}}</think>{{{{ end }}}}{before}"
        start, tag, rest = self.thought[0].partition("<think>")
        return (
            f"{literal(start)}{{{{ if .Thinking }}}}{tag}{literal(rest)}{{{{ .Thinking }}}}"
            f"{literal(self.thought[1])}{{{{ else }}}}{literal(self.assistant[0][len(start) :])}"
            "{{ end }}"
        )


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def literal(text: str) -> str:
    """A text in Go's template language. UserError if a Modelfile cannot hold it."""
    if '"""' in text:
        raise UserError('ollama cannot have the chat template, which writes """')
    return text.replace("{{", '{{ "{{" }}')


def go(variable: str, around: tuple[str, ...]) -> str:
    before, after = map(literal, around)
    return f"{before}{{{{ {variable} }}}}{after}"


def learn_template(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The pieces of a tokenizer's template, with tools if it has any that can be translated.
    UserError if the template cannot be translated."""
    try:
        pieces = learn_chat(tokenizer)
    except Untranslatable as error:
        raise UserError(
            "the chat template of this tokenizer cannot be translated for ollama: it writes "
            f"{error}; llama.cpp runs the GGUF file with the template as it is"
        ) from None
    for learn in (learn_thoughts, learn_tools):
        try:
            pieces = learn(tokenizer, pieces)
        except Untranslatable:
            pass
    return pieces


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    think: bool = False,
) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=True,
            open_thinking=think,
            enable_thinking=think,
        )
    except Exception as error:  # whatever the template's code does
        raise Untranslatable(f"no such conversation ({error})") from None


def say(*texts: str, system: str = "") -> list[dict[str, Any]]:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * bool(system) + turns


def split_at(text: str, *marks: str) -> list[str]:
    """The text before, between and after the marks."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found or mark in text:
            raise Untranslatable("a text twice, or not at all")
        parts.append(part)
    return [*parts, text]


def without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise Untranslatable("a message in more than one way")
    return text[: len(text) - len(end)]


def learn_chat(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    texts = (USER, ANSWER, USER_2, ANSWER_2, USER_3)
    begin, asked, answered, asked_again, answered_again, last = split_at(
        render(tokenizer, say(*texts)), *texts
    )
    if (asked, answered) != (asked_again, answered_again):
        raise Untranslatable("the turns of one role in more than one way")
    starts, system = [begin, answered], []
    try:
        system = split_at(render(tokenizer, say(USER, system=SYSTEM)), SYSTEM, USER)[:2]
        starts.append(system[1])
    except Untranslatable:  # a template may refuse system messages
        pass
    # what all users' turns begin with, and what turns of both roles end with
    before = os.path.commonprefix([start[::-1] for start in starts])[::-1]
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    for token in added:  # the ends of two names of tokens may be alike
        at = answered.rfind(token)
        if 0 <= at < len(answered) - len(before) < at + len(token):
            before = answered[at + len(token) :]
    end = without_end(answered, before)
    after = os.path.commonprefix([asked, last, end])
    stops = [token for token in added if token in end] or [end.strip()]
    pieces = Pieces(
        begin=without_end(begin, before),
        begin_system=(system[0], without_end(system[1], before)) if system else (),
        user=(before, after),
        assistant=(asked[len(after) :], end),
        prompt=last[len(after) :],
        stop=min(stops, key=end.find) or str(tokenizer.eos_token),
    )
    for conversation in (say("a"), say("a", "b", "c"), say("a", "a", "a", "b", "c")):
        check(tokenizer, pieces, conversation)
        if system:
            check(tokenizer, pieces, [{"role": "system", "content": "s"}, *conversation])
    return pieces


def learn_thoughts(tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> Pieces:
    """The same with the prompt of a model that is to think, and the thoughts of earlier turns;
    Untranslatable if the template knows no thoughts."""
    question = say(USER)
    start = without_end(render(tokenizer, question), pieces.prompt)
    opened = render(tokenizer, question, think=True)
    if not opened.startswith(start) or "<think>" not in opened + pieces.prompt:
        raise Untranslatable("no thoughts")
    pieces = replace(pieces, open_prompt=opened[len(start) :])
    thinking = say(USER, ANSWER, USER_2)
    thinking[1]["reasoning_content"] = RESULT
    if RESULT not in (text := render(tokenizer, thinking)):
        return pieces
    _, before, after, _ = split_at(text, USER, RESULT, ANSWER)
    before = before.removeprefix(pieces.user[1])
    with_thoughts = replace(pieces, thought=(before, after))
    if "<think>" not in before or with_thoughts.write(thinking, None) != text:
        raise Untranslatable("thoughts in more than one way")
    return with_thoughts


def learn_tools(tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> Pieces:
    """The same with tools, calls and results; Untranslatable if the template has none."""
    listed = list(map(to_json, TOOLS))
    user = pieces.user[0]
    first, between, last, _ = split_at(render(tokenizer, say(USER), TOOLS), *listed, USER)
    texts = (SYSTEM, *listed, USER)
    before, middle, _, after, _ = split_at(
        render(tokenizer, say(USER, system=SYSTEM), TOOLS), *texts
    )
    arguments = to_json(ARGUMENTS)
    asked = split_at(render(tokenizer, with_call("", NAME)), USER, NAME, arguments, RESULT)
    spoken = split_at(
        render(tokenizer, with_call(ANSWER, NAME)), USER, ANSWER, NAME, arguments, RESULT
    )
    turn = pieces.user[1] + pieces.assistant[0]  # from the question to the answer
    if not asked[1].startswith(turn):
        raise Untranslatable("a call otherwise than an answer")
    call = asked[1][len(turn) :]
    close, found, result = asked[3].partition(pieces.assistant[1])
    if not found:
        raise Untranslatable("a call otherwise than an answer")
    pieces = replace(
        pieces,
        begin_tools=(first, without_end(last, user)),
        begin_tools_system=(before, middle, without_end(after, user)),
        between_tools=between,
        before_call=without_end(spoken[2], call),
        call=(call, asked[2], close),
        result=(result, without_end(asked[4], pieces.prompt)),
    )
    for content in ("", "b"):
        conversation = with_call(content, "g")
        check(tokenizer, pieces, [*conversation, *say("x", "y")[::-1]], TOOLS)
        check(tokenizer, pieces, [{"role": "system", "content": "s"}, *conversation], TOOLS[:1])
    return pieces


def with_call(content: str, name: str) -> list[dict[str, Any]]:
    function = {"name": name, "arguments": ARGUMENTS}
    calls = [{"id": "call00000", "type": "function", "function": function}]
    return [
        {"role": "user", "content": USER},
        {"role": "assistant", "content": content, "tool_calls": calls},
        {"role": "tool", "content": RESULT, "tool_call_id": "call00000"},
    ]


def check(
    tokenizer: PreTrainedTokenizerBase,
    pieces: Pieces,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
) -> None:
    if pieces.write(messages, tools) != render(tokenizer, messages, tools):
        raise Untranslatable("a message in more than one way")

"""A Modelfile for ollama, whose chat template is in Go's text/template.

Our own template has a translation written by hand. Another's is learnt from conversations that it
renders: what it writes between the messages, the tools, the calls and the results. The translation
is checked on further conversations, and refused where it would say something else. Not translated
are the reasoning of earlier turns, and templates that write a message in more than one way.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from model.config import MiniMindConfig
from model.errors import UserError
from model.formats.gguf_format import yarn_flags
from model.inference.thinking import EMPTY_THOUGHT, can_close_thoughts, closes_thoughts

CONTEXT = 2048  # limit of ollama's num_ctx, whose KV cache is allocated at once
MODELFILE = """FROM ./{file}
TEMPLATE \"\"\"{template}\"\"\"
PARAMETER stop "{stop}"
PARAMETER num_ctx {context}
"""
# Our own template. It leaves out what is rare: reasoning of earlier turns, a second system message,
# and one turn for the results of several tools.
TEMPLATE = """{{- if or .System .Tools }}<|im_start|>system
{{ .System }}{{ if .Tools }}{{ if .System }}

{{ end }}You can call these tools:
<tools>
{{ range .Tools }}{{ . }}
{{ end }}</tools>
Write a call like this, with JSON arguments:
<tool_call>
{"name": <tool>, "arguments": <arguments>}
</tool_call>{{ end }}<|im_end|>
{{ end }}
{{- range $i, $message := .Messages }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}{{ range $n, $call := .ToolCalls }}{{ if or $n $message.Content }}
{{ end }}<tool_call>
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ end }}<|im_end|>
{{ else if eq .Role "tool" }}<|im_start|>user
<tool_response>
{{ .Content }}
</tool_response><|im_end|>
{{ end }}
{{- end }}<|im_start|>assistant
"""


def modelfile(gguf_file: Path, config: MiniMindConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Modelfile of a GGUF file in the same folder, for `ollama create NAME -f Modelfile`.
    UserError if ollama cannot run the model as it is."""
    if flags := yarn_flags(config):
        raise UserError(f"ollama has no such setting of YaRN ({flags}), but llama.cpp has")
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template, which --ollama translates")
    note = ""
    if can_close_thoughts(tokenizer):
        template, stop = TEMPLATE, "<|im_end|>"
        template += EMPTY_THOUGHT if closes_thoughts(tokenizer) else ""
    else:
        pieces = learn_template(tokenizer)
        template, stop = pieces.in_go(), pieces.stop
        if not pieces.has_tools:
            note = "# The template is the tokenizer's own, without tools.\n"
    context = min(config.max_position_embeddings, CONTEXT)
    settings = dict(file=gguf_file.name, template=template, stop=stop, context=context)
    return note + MODELFILE.format(**settings)


# -- templates of others ---------------------------------------------------------------------------

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
            calls = (
                "{{ range $n, $call := .ToolCalls }}{{ if or $n $message.Content }}"
                f"{literal(self.before_call)}{{{{ end }}}}{one}{{{{ .Function.Name }}}}{two}"
                f"{{{{ .Function.Arguments }}}}{three}{{{{ end }}}}"
            )
            before, after = map(literal, self.assistant)
            answer = f"{before}{{{{ .Content }}}}{calls}{after}"
            tool = '{{ else if eq .Role "tool" }}' + go(".Content", self.result)
        return (
            begin
            + '{{ range $i, $message := .Messages }}{{ if eq .Role "user" }}'
            + f'{user}{{{{ else if eq .Role "assistant" }}}}{answer}{tool}'
            + "{{ end }}{{ end }}"
            + literal(self.prompt)
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
    try:
        return learn_tools(tokenizer, pieces)
    except Untranslatable:
        return pieces


def render(tokenizer: PreTrainedTokenizerBase, messages: list, tools: list | None = None) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=True,
            open_thinking=False,
            enable_thinking=False,
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
    pieces = Pieces(
        **{
            **vars(pieces),
            "begin_tools": (first, without_end(last, user)),
            "begin_tools_system": (before, middle, without_end(after, user)),
            "between_tools": between,
            "before_call": without_end(spoken[2], call),
            "call": (call, asked[2], close),
            "result": (result, without_end(asked[4], pieces.prompt)),
        }
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

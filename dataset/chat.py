"""Messages → what the chat template renders, and which of it the assistant writes.

A template may mark what the assistant writes with {% generation %}, as our own does. Most templates
mark nothing. Their spans are found by rendering the conversation again with one answer replaced by
a character that occurs nowhere else: where the two texts differ is the answer, before it stands the
header that the template ends a prompt with, and after it the token that ends the turn.

So a span holds what a model has to write after a prompt: its thoughts as far as the template keeps
them, the answer, its tool calls, and the token that ends the turn; never the header. Where the
template leaves thoughts to the model (the prompt is the header alone, as in Qwen3), they are in the
span; where the prompt itself opens or closes them (minimind-3), what the prompt has is not.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from dataset.chat_template import ChatTemplate, Message, Span, parse_tool_fields
from model.errors import UserError

TAGS = ("<think>", "</think>", "<answer>", "</answer>") + (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
# A document in segments, each with its loss mask: control tokens as ids, all between them as text.
Segments = list[tuple[int | str, bool]]


# -- names of tokens in a person's text ------------------------------------------------------------


@dataclass
class AddedTokenPatterns:
    """Regular expressions that keep a person's text from being read as control tokens.

    `any_token` matches the empty place after the first character of every added token's name, and
    `control_token` does so for all of them but the tags: a text split there can no longer be read
    as one. `special` are the tokens that only the template writes.
    """

    control_token: re.Pattern
    any_token: re.Pattern
    special: dict[str, int]
    any_special: re.Pattern  # a group of all their names
    first_character: re.Pattern  # of any of their names

    def may_be_in(self, text: str) -> bool:
        """False for most texts, which saves them the slow search for names of tokens."""
        return self.first_character.search(text) is not None

    def split_control_tokens(self, segment: int | str) -> list[int | str]:
        if isinstance(segment, str) and self.may_be_in(segment):
            return self.control_token.split(segment)
        return [segment]

    def split_special(self, text: str) -> list[str]:
        """The text between special tokens, and their names."""
        if not self.special:
            return [text]
        return self.any_special.split(text)


@lru_cache(maxsize=8)
def added_token_patterns(tokenizer: PreTrainedTokenizerBase) -> AddedTokenPatterns:
    added = tokenizer.added_tokens_decoder
    names = [token.content for token in added.values()]

    def after_first_character(tokens: Iterable[str]) -> re.Pattern:
        places = [f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in tokens]
        return re.compile("|".join(places) or "(?!)")  # without tokens: nothing matches

    # a name may begin with another's: the longest first
    special = {
        token.content: number
        for number, token in sorted(added.items(), key=lambda item: -len(item[1].content))
        if token.special
    }
    return AddedTokenPatterns(
        control_token=after_first_character(name for name in names if name not in TAGS),
        any_token=after_first_character(names),
        special=special,
        any_special=re.compile("(" + "|".join(map(re.escape, special)) + ")"),
        first_character=re.compile("|".join({re.escape(name[0]) for name in names}) or "(?!)"),
    )


# -- messages to segments --------------------------------------------------------------------------


def chat_segments(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool,
    template_options: dict[str, Any],
) -> Segments:
    """The rendered conversation, split at the control tokens that the template wrote.

    Raises:
        UserError: the template refuses the conversation, or leaves out calls or tools that are to
            be learnt, or it cannot be seen what of its text the assistant writes.
    """
    patterns = added_token_patterns(tokenizer)
    separator, unused = unused_characters([messages, template_options])

    def escape(value: Any, pattern: re.Pattern) -> Any:
        """Put the separator inside every name of a token in the texts of a message, so that after
        rendering the template's own tokens can be told from those that a person wrote."""
        if isinstance(value, str):
            return pattern.sub(separator, value) if patterns.may_be_in(value) else value
        if isinstance(value, list):
            return [escape(item, pattern) for item in value]
        if isinstance(value, dict):
            return {escape(key, pattern): escape(item, pattern) for key, item in value.items()}
        return value

    parsed = [parse_tool_fields(message) for message in messages]
    thinking = not add_generation_prompt and any(m.get("reasoning_content") for m in parsed)
    template = ChatTemplate(tokenizer, parsed, {"open_thinking": thinking, **template_options})
    # The assistant may write tags such as <think>; nobody else can.
    escaped = [
        escape(
            message,
            patterns.control_token if message["role"] == "assistant" else patterns.any_token,
        )
        for message in template.messages
    ]
    template.options = escape(template.options, patterns.any_token)
    text, spans = template.render(escaped, add_generation_prompt)
    if not template.has_marks and add_generation_prompt:
        text += turn_shape(tokenizer, template.text).unwritten_header
    elif not template.has_marks:
        check_nothing_left_out(template, text.replace(separator, ""))
        spans = list(find_spans(template, escaped, text, unused))

    edges = [0, *(edge for span in spans for edge in span), len(text)]
    segments: Segments = []
    for number, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        has_loss = number % 2 == 1  # every second stretch of text is what the assistant writes
        for part in patterns.split_special(text[start:end]):
            if part in patterns.special:
                segments.append((patterns.special[part], has_loss))
            else:
                segments += [(plain, has_loss) for plain in part.split(separator) if plain]
    return segments


def unused_characters(content: Any) -> tuple[str, str]:
    """Two characters of Unicode's private use area that occur nowhere in `content`."""
    text = json.dumps(content, ensure_ascii=False, default=str)
    unused = (c for c in map(chr, range(0xE000, 0xF8FF)) if c not in text)
    return next(unused), next(unused)


def check_nothing_left_out(template: ChatTemplate, text: str) -> None:
    """UserError if a template without marks writes no tools or no tool calls: a model would learn
    to call what it was not offered, or to say nothing."""
    calls = [call for message in template.messages for call in message.get("tool_calls") or []]
    for what, functions in (("tools", template.tools), ("tool calls", calls)):
        names = [str((each.get("function") or each).get("name")) for each in functions]
        if missing := [name for name in names if name not in text]:
            raise UserError(
                f"has {what}, and the tokenizer's chat template leaves them out ({missing[0]})"
            )


# -- what the assistant writes, where the template does not mark it --------------------------------


@dataclass(frozen=True)
class TurnShape:
    """How a template begins and ends an assistant's turn.

    Attributes:
        prompts: what it ends a prompt with, the shortest first, without thinking and with.
        header: what they begin with, up to a <think>.
        unwritten_header: the header, if the template begins answers with it, but ends no prompt
            with it, as templates without `add_generation_prompt` do.
        end: the control token after an answer, or the text where there is none.
    """

    prompts: tuple[str, ...] = ()
    header: str = ""
    unwritten_header: str = ""
    end: str = ""


@lru_cache(maxsize=8)
def turn_shape(tokenizer: PreTrainedTokenizerBase, template_text: str) -> TurnShape:
    """Learnt from a question and an answer. UserError if the template refuses or omits them."""
    answer = chr(0xE000)
    question = [{"role": "user", "content": "?"}]
    template = ChatTemplate(tokenizer, question, {})
    template.text = template_text
    prompts = set()
    for thinking in (False, True):
        options = {"open_thinking": thinking, "enable_thinking": thinking}
        before, _ = template.render(question, **options)
        prompt, _ = template.render(question, add_generation_prompt=True, **options)
        if prompt.startswith(before) and prompt != before:
            prompts.add(prompt[len(before) :])
    before, _ = template.render(question)
    whole, _ = template.render([*question, {"role": "assistant", "content": answer}])
    beginning, found, ending = whole.partition(answer)
    if not found:
        raise UserError("cannot be rendered: the tokenizer's chat template omits answers")
    tokens = added_token_patterns(tokenizer).split_special(ending)
    end = tokens[1] if len(tokens) > 1 else ending.strip()
    header = os.path.commonprefix(sorted(prompts)).partition("<think>")[0]
    unwritten = ""
    if not prompts and beginning.startswith(before) and beginning[len(before) :].strip():
        header = unwritten = beginning[len(before) :].partition("<think>")[0]
    return TurnShape(tuple(sorted(prompts, key=len)), header, unwritten, end)


def find_spans(
    template: ChatTemplate, messages: list[Message], whole: str, unused: str
) -> Iterator[Span]:
    """The span of each assistant's turn in the rendered conversation `whole`.

    Args:
        unused: a character that does not occur in it.
    """
    if not any(message["role"] == "assistant" for message in messages):
        return
    shape = turn_shape(template.tokenizer, template.text)
    special = added_token_patterns(template.tokenizer).special
    at = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        first, last = find_difference(template, messages, number, whole, unused)
        start = find_start(template, messages, number, whole, shape, at, first)
        if start is None or not at <= start <= last:
            raise UserError(
                f"is rendered so that it cannot be seen what the assistant writes in message "
                f"{number + 1}; mark it in the tokenizer's chat template with {{% generation %}}"
            )
        places = [(place, -len(name)) for name in special if (place := whole.find(name, last)) >= 0]
        end, length = min(places, default=(last, 0))
        name = whole[end : end - length]
        # a turn that calls tools may end with another token (Llama 3.1: <|eom_id|>)
        if name == shape.end or (shape.end in special and message.get("tool_calls")):
            at = end + len(name)
        else:
            at = last + len(shape.end) * whole.startswith(shape.end, last)
        yield start, at


def find_difference(
    template: ChatTemplate, messages: list[Message], number: int, whole: str, unused: str
) -> Span:
    """Where `whole` differs from the conversation with another answer as message `number`."""
    message = messages[number]
    plain = {"role": message["role"], "content": unused}
    calls = [
        {**call, "function": {**(call.get("function") or call), "name": unused}}
        for call in message.get("tool_calls") or []
    ]
    # A template may refuse results of calls that were not made, or write no content beside calls.
    for other in (plain, {**plain, "tool_calls": calls}) if calls else (plain,):
        try:
            varied, _ = template.render([*messages[:number], other, *messages[number + 1 :]])
        except UserError:
            continue
        if unused not in varied:
            continue
        before, _, rest = varied.partition(unused)
        first = len(before)
        if not whole.startswith(before):  # the other answer was given without thoughts
            first = len(os.path.commonprefix([whole, before]))
        if whole.endswith(rest) and len(rest) <= len(whole) - first:
            return first, len(whole) - len(rest)
        rest = rest.rpartition(unused)[2]
        same = len(os.path.commonprefix([whole[first:][::-1], rest[::-1]]))
        last = len(whole) - same
        # The names of two tokens that end a turn may end alike.
        for name in added_token_patterns(template.tokenizer).special:
            begin = whole.rfind(name, max(0, last - len(name) + 1), last + len(name) - 1)
            if begin >= first and begin < last < begin + len(name):
                last = begin
        return first, last
    raise UserError(f"is rendered without message {number + 1} by the tokenizer's chat template")


def find_start(
    template: ChatTemplate,
    messages: list[Message],
    number: int,
    whole: str,
    shape: TurnShape,
    after: int,
    first: int,
) -> int | None:
    """Where message `number` begins behind its header, between `after` and `first`; None if that
    is not to be seen."""
    if shape.header:
        # a prompt may end with more line breaks than the header within a conversation
        at = max(whole.rfind(each, after, first) for each in (shape.header, shape.header.rstrip()))
        if at < 0:
            return None
        behind = at + len(os.path.commonprefix([shape.header, whole[at : at + len(shape.header)]]))
        if shape.header in shape.prompts or shape.unwritten_header:
            return behind  # whether to think is left to the model
        decided = [prompt for prompt in shape.prompts if whole.startswith(prompt, at)]
        return at + len(decided[-1]) if decided else behind
    if number == 0:
        return None
    try:
        prompt, _ = template.render(messages[:number], add_generation_prompt=True)
    except UserError:
        return None
    return len(prompt) if whole.startswith(prompt) and len(prompt) <= first else None


def turns_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template ends an answer with a control token, at which a reply can stop."""
    try:
        end = turn_shape(tokenizer, tokenizer.get_chat_template()).end
    except (UserError, ValueError):  # refused with a plain question alone
        return True
    return end in added_token_patterns(tokenizer).special


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a reply: EOS, and what the chat template ends an assistant's turn with."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        end = turn_shape(tokenizer, tokenizer.get_chat_template()).end
    except (UserError, ValueError):  # no template, or one that refuses a plain question
        return ids
    number = added_token_patterns(tokenizer).special.get(end)
    return ids if number is None or number in ids else [*ids, number]

"""Texts and messages → token ids and the loss mask, the same for every stage and for inference.

- text: <|im_start|> text <|im_end|>, with loss on all of it;
- conversations: what the chat template renders, with loss on its {% generation %} blocks alone:
  what the assistant writes, its <|im_end|> included;
- preferences: the chosen and the rejected conversation, with loss where they differ; the messages
  that both begin with are the prompt.

A control token that a person writes in a text or message, such as "<|im_end|>", stays text: it is
encoded as characters and never as the control token. Tags such as <think> are tokens in plain text
and in what the assistant writes, and characters in what anybody else writes.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dataset.forms.messages import answered_part
from dataset.forms.rows import as_conversation, as_pair, as_text
from dataset.jsonl import Row, parse_json
from model.errors import UserError

TAGS = ("<think>", "</think>", "<answer>", "</answer>") + (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
ROLES = ("system", "user", "assistant", "tool")
SIDES = ("chosen", "rejected")

Message = dict[str, Any]
# A document in segments, each with its loss mask: control tokens as ids, all between them as text.
Segments = list[tuple[int | str, bool]]


@dataclass
class Encoded:
    """The tokens of one document, and on which of them there is loss."""

    ids: list[int]
    loss_mask: list[bool]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """<|im_start|> text <|im_end|>, with loss on all of it (nothing predicts the first token)."""
    return encode_segments(tokenizer, [text_segments(tokenizer, {"text": text})])[0]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    **template_options: Any,
) -> Encoded:
    """A conversation as the chat template renders it.

    Args:
        messages: SPEC's messages: "role", "content", and perhaps "tools" (in a first system
            message), "tool_calls" and "reasoning_content".
        add_generation_prompt: end with the header of an assistant's turn, for it to answer.
        template_options: variables of the template, such as tools or open_thinking.
    """
    segments = chat_segments(tokenizer, messages, add_generation_prompt, template_options)
    return encode_segments(tokenizer, [segments])[0]


# -- segments to tokens ----------------------------------------------------------------------------


def encode_segments(tokenizer: PreTrainedTokenizerBase, documents: list[Segments]) -> list[Encoded]:
    """Encode the texts of many documents in one call, and put the control tokens between them."""
    patterns = added_token_patterns(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # an earlier call of the tokenizer may have left them on
    backend.no_truncation()
    # [document][segment] → its id, or its text split inside every name of a control token, so that
    # the tokenizer cannot recognise one
    split = patterns.split_control_tokens
    parts = [[split(segment) for segment, _ in segments] for segments in documents]
    texts = [
        part
        for document in parts
        for segment in document
        for part in segment
        if isinstance(part, str) and part
    ]
    encodings = iter(backend.encode_batch_fast(texts, add_special_tokens=False))

    encoded = []
    for segments, document in zip(documents, parts, strict=True):
        ids, loss_mask = [], []
        for (_, has_loss), segment in zip(segments, document, strict=True):
            for part in segment:
                if part == "":
                    continue
                new = [part] if isinstance(part, int) else next(encodings).ids
                ids += new
                loss_mask += [has_loss] * len(new)
        encoded.append(Encoded(ids, loss_mask))
    return encoded


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
    first_characters: set[str]

    def may_be_in(self, text: str) -> bool:
        """False for most texts, which saves them the slow search for names of tokens."""
        return any(character in text for character in self.first_characters)

    def split_control_tokens(self, segment: int | str) -> list[int | str]:
        if isinstance(segment, str) and self.may_be_in(segment):
            return self.control_token.split(segment)
        return [segment]


@lru_cache(maxsize=8)
def added_token_patterns(tokenizer: PreTrainedTokenizerBase) -> AddedTokenPatterns:
    added = tokenizer.added_tokens_decoder
    names = [token.content for token in added.values()]

    def after_first_character(tokens: Iterable[str]) -> re.Pattern:
        return re.compile(
            "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in tokens)
        )

    return AddedTokenPatterns(
        control_token=after_first_character(name for name in names if name not in TAGS),
        any_token=after_first_character(names),
        special={token.content: number for number, token in added.items() if token.special},
        first_characters={name[0] for name in names},
    )


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """[V] UTF-8 bytes that each token stands for; 0 for control tokens, which are no text.

    With it a loss in nats per token becomes one in bits per byte, comparable between tokenizers.
    """
    sizes = torch.zeros(len(tokenizer), dtype=torch.long)
    added = tokenizer.added_tokens_decoder
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            sizes[number] = 0 if added[number].special else len(token.encode())
        else:
            sizes[number] = len(token)  # byte-level BPE writes each byte as one character
    return sizes


# -- messages to segments --------------------------------------------------------------------------


def chat_segments(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool,
    template_options: dict[str, Any],
) -> Segments:
    """The rendered conversation, split at the control tokens that the template wrote."""
    patterns = added_token_patterns(tokenizer)
    separator = unused_character([messages, template_options])

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

    # The assistant may write tags such as <think>; nobody else can.
    escaped = [
        escape(
            message,
            patterns.control_token if message["role"] == "assistant" else patterns.any_token,
        )
        for message in map(parse_tool_fields, messages)
    ]
    rendered, spans = render_jinja_template(
        [escaped],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **{**tokenizer.special_tokens_map, **escape(template_options, patterns.any_token)},
    )
    text, spans = rendered[0], spans[0]

    split_special = re.compile("(" + "|".join(map(re.escape, patterns.special)) + ")")
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    segments: Segments = []
    for number, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        has_loss = number % 2 == 1  # every second stretch of text is a {% generation %} block
        for part in split_special.split(text[start:end]):
            if part in patterns.special:
                segments.append((patterns.special[part], has_loss))
            else:
                segments += [(plain, has_loss) for plain in part.split(separator) if plain]
    return segments


def unused_character(content: Any) -> str:
    """A character of Unicode's private use area that occurs nowhere in `content`."""
    text = json.dumps(content, ensure_ascii=False, default=str)
    return next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in text)


def check_messages(messages: Any, key: str = '"conversations"') -> list[Message]:
    """SPEC's list of messages, or a UserError that says what is wrong with it."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f'has no {key} (a list of messages {{"role": "user", "content": "…"}})')
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise UserError('has a message without a "role"')
        if message["role"] not in ROLES:
            raise UserError(f"has the unknown role {message['role']!r}; known: {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and (message.get("tool_calls") or message.get("tools")):
            message["content"] = ""
        elif not isinstance(content, str):
            raise UserError(f'has a {message["role"]} message whose "content" is no text')
        if not isinstance(message.get("reasoning_content") or "", str):
            raise UserError('has a "reasoning_content" that is no text')
    return messages


def parse_tool_fields(message: Message) -> Message:
    """The message with "tools" and "tool_calls" as lists; files may have them as JSON in a string,
    so that their columns are uniform. UserError if they are neither."""
    lists = {key: message[key] for key in ("tools", "tool_calls") if message.get(key)}
    for key, value in lists.items():
        if isinstance(value, str):
            try:
                value = parse_json(value)
            except UserError as error:
                raise UserError(f'has "{key}" whose text {error}') from None
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise UserError(f'has "{key}" that are no list of objects')
        lists[key] = value
    for call in lists.get("tool_calls", []):
        if not isinstance((call.get("function") or call).get("name"), str):
            raise UserError('has a tool call without a "name"')
    return {**message, **lists}


# -- rows of a data file to segments ---------------------------------------------------------------


def text_segments(tokenizer: PreTrainedTokenizerBase, row: Row) -> Segments:
    """Pretraining: {"text": "…"}. An empty text gives no segments."""
    text = as_text(row)
    if not text.strip():
        return []
    return [(tokenizer.bos_token_id, True), (text, True), (tokenizer.eos_token_id, True)]


def conversation_segments(tokenizer: PreTrainedTokenizerBase, row: Row) -> Segments:
    """SFT: {"conversations": [{"role": "user", "content": "…"}, …]}, or any form that
    `as_conversation` reads. A row whose only answer is empty gives no segments."""
    messages = check_messages(as_conversation(row)["conversations"])
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("has no assistant turn, so there is nothing to train on")
    answered = answered_part(messages)
    return chat_segments(tokenizer, answered, False, {}) if answered else []


def preference_segments(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[Segments, Segments]:
    """DPO and reward models: {"chosen": [messages], "rejected": [messages]}."""
    pair = as_pair(row)
    chosen, rejected = (check_messages(pair[side], f'"{side}"') for side in SIDES)
    shared = 0  # messages that both sides begin with
    while chosen[shared : shared + 1] == rejected[shared : shared + 1]:
        if shared == len(chosen):
            raise UserError("has the same messages as chosen and as rejected: there is no choice")
        shared += 1
    for name, messages in zip(SIDES, (chosen, rejected), strict=True):
        role = messages[shared]["role"] if shared < len(messages) else None
        if not any(message["role"] == "assistant" for message in messages[shared:]):
            raise UserError(f'has no assistant turn in "{name}" that the other side has not')
        if role != "assistant":
            raise UserError(
                f"has a {role} message where the two sides begin to differ: both must answer the "
                "same prompt"
            )
    return (
        completion_segments(tokenizer, chosen, chosen[:shared]),
        completion_segments(tokenizer, rejected, chosen[:shared]),
    )


def completion_segments(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: list[Message]
) -> Segments:
    """The conversation, with loss on what follows the prompt alone. What the template writes after
    the last token with loss (a line break) is dropped, so that it ends as a sampled answer does."""
    prompt_turns = sum(message["role"] == "assistant" for message in prompt)
    segments: Segments = []
    turns, before = 0, False  # assistant turns so far
    for segment, has_loss in chat_segments(tokenizer, messages, False, {}):
        turns += has_loss and not before
        before = has_loss
        segments.append((segment, has_loss and turns > prompt_turns))
    while not segments[-1][1]:
        segments.pop()
    return segments


SEGMENTERS: dict[str, Callable[[PreTrainedTokenizerBase, Row], Any]] = {
    "text": text_segments,
    "conversations": conversation_segments,
    "preferences": preference_segments,  # two documents a row
}

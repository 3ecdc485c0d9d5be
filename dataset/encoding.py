"""Texts and messages → token ids and the loss mask, the same for every stage and for inference.

- text: BOS text EOS, with loss on all of it (ours: <|im_start|> and <|im_end|>);
- conversations: what the chat template renders, with loss on what the assistant writes alone, the
  token that ends its turn included (chat.py);
- preferences: the chosen and the rejected conversation, with loss where they differ; the messages
  that both begin with are the prompt.

A control token that a person writes in a text or message, such as "<|im_end|>", stays text: it is
encoded as characters and never as the control token. Tags such as <think> are tokens in plain text
and in what the assistant writes, and characters in what anybody else writes.
"""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dataset.chat import Segments, added_token_patterns, chat_segments, stop_tokens
from dataset.chat_template import Message, parse_tool_fields
from dataset.forms.messages import answered_part
from dataset.forms.rows import as_conversation, as_pair, as_text
from dataset.jsonl import Row
from model.errors import UserError
from model.inference.tokens import decode_name

__all__ = ["Message", "Segments", "parse_tool_fields"]  # of the chat modules
ROLES = ("system", "user", "assistant", "tool")
SIDES = ("chosen", "rejected")


@dataclass
class Encoded:
    """The tokens of one document, and on which of them there is loss."""

    ids: list[int]
    loss_mask: list[bool]


def document_edges(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids before and after the text of a document: BOS, if the tokenizer has one (Qwen has
    none), and EOS. UserError without EOS: documents could not be told apart, nor end."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no eos_token, with which texts and answers end; name one of its "
            "tokens in its tokenizer_config.json"
        )
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos, [tokenizer.eos_token_id]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """BOS text EOS, with loss on all of it (nothing predicts the first token)."""
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
        template_options: variables of the template: tools, and open_thinking (default False), which
            templates that call it enable_thinking get by that name too.
    """
    segments = chat_segments(tokenizer, messages, add_generation_prompt, template_options)
    return encode_segments(tokenizer, [segments])[0]


def ends_in_thought(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> bool:
    """Whether a prompt ends within a thought, so that the reply begins there. With open_thinking
    some templates end so, and others leave it to the model to begin one."""
    return tokenizer.decode(prompt_ids[-16:]).rstrip().endswith("<think>")


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


# -- bytes -----------------------------------------------------------------------------------------

# What tokenizers may change: case, spaces, line breaks, composed, wide and rare characters.
SAMPLE = "The Ünïcode  tëxt, 12½\n\n\tＡｂ e\u0301 ﬁ 从零开始。 😀 İ\u200d\ufeff ▁ ##x"


@lru_cache(maxsize=4)
def token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """[V] UTF-8 bytes that each token stands for; 0 for control tokens, which are no text.

    With it a loss in nats per token becomes one in bits per byte, comparable between tokenizers.
    It is right for a tokenizer that loses nothing; for others `label_bytes` counts in the text.
    """
    sizes = torch.zeros(len(tokenizer), dtype=torch.long)
    added = tokenizer.added_tokens_decoder
    for token, number in tokenizer.get_vocab().items():
        if number not in added:
            sizes[number] = len(decode_name(tokenizer, token))
        elif not added[number].special:
            sizes[number] = len(token.encode())
        elif number == tokenizer.unk_token_id and number not in stop_tokens(tokenizer):
            sizes[number] = 1  # stands for text, of any length
    return sizes


@lru_cache(maxsize=4)
def has_exact_token_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the bytes of a text are the sum over its tokens, as in byte-level BPE. A normalizer,
    a space before each text or unknown characters make them differ."""
    sizes = token_bytes(tokenizer)
    texts = [SAMPLE, *SAMPLE.split(), "word", " word"]
    encoded = encode_segments(tokenizer, [[(text, True)] for text in texts])
    return all(
        int(sizes[each.ids].sum()) == len(text.encode())
        for text, each in zip(texts, encoded, strict=True)
    )


def label_bytes(tokenizer: PreTrainedTokenizerBase, segments: Segments) -> int:
    """UTF-8 bytes of the text of a document that is predicted and carries loss: all but that of
    its first token."""
    texts = [text for text, has_loss in segments if has_loss and isinstance(text, str)]
    size = sum(len(text.encode()) for text in texts)
    first = segments[0][0] if segments and segments[0][1] else None
    if isinstance(first, str):  # a tokenizer without BOS
        encoding = tokenizer.backend_tokenizer.encode(first[:1000], add_special_tokens=False)
        size -= len(first[: encoding.offsets[0][1]].encode()) if encoding.offsets else 0
    return size


# -- messages ------------------------------------------------------------------------------------


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
            raise UserError(f'has a message of the {message["role"]} whose "content" is no text')
        if not isinstance(message.get("reasoning_content") or "", str):
            raise UserError('has a "reasoning_content" that is no text')
    return messages


# -- rows of a data file to segments ---------------------------------------------------------------


def text_segments(tokenizer: PreTrainedTokenizerBase, row: Row) -> Segments:
    """Pretraining: {"text": "…"}. An empty text gives no segments."""
    text = as_text(row)
    if not text.strip():
        return []
    bos, eos = document_edges(tokenizer)
    parts: list[int | str] = [*bos, text, *eos]
    return [(part, True) for part in parts]


def conversation_segments(
    tokenizer: PreTrainedTokenizerBase, row: Row, empty_think_ratio: float = 0.0
) -> Segments:
    """SFT: {"conversations": [{"role": "user", "content": "…"}, …]}, or any form that
    `as_conversation` reads. A row whose only answer is empty gives no segments."""
    messages = check_messages(as_conversation(row)["conversations"])
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("has no assistant turn, so there is nothing to train on")
    if not (messages := answered_part(messages)):
        return []
    (messages,) = with_empty_thoughts(empty_think_ratio, messages)
    return check_trained(chat_segments(tokenizer, messages, False, {}))


def with_empty_thoughts(ratio: float, *conversations: list[Message]) -> list[list[Message]]:
    """Conversations of a row, whose answers get an empty thought in a share `ratio` of the rows. A
    row that has thoughts stays as it is.

    A model that learns from rows with thoughts and rows without cannot know which is wanted. After
    an empty thought in a prompt, it has never seen anything but an answer.
    """
    if not ratio:
        return list(conversations)
    everything = [message for messages in conversations for message in messages]
    thinks = any(
        m.get("reasoning_content") or re.match(r"\s*<think>.*</think>", m["content"], re.DOTALL)
        for m in everything
    )
    first = json.dumps(everything[:2], sort_keys=True, ensure_ascii=False)
    # a number from 0 to 1 that depends on the row alone, and not on processes or order
    if thinks or zlib.crc32(first.encode()) / 2**32 >= ratio:
        return list(conversations)
    return [
        [{**m, "empty_think": True} if m["role"] == "assistant" else m for m in messages]
        for messages in conversations
    ]


def check_trained(segments: Segments) -> Segments:
    """UserError if nothing of a document carries loss, as with a {% generation %} mark that the
    template does not reach."""
    if not any(has_loss for _, has_loss in segments):
        raise UserError("has nothing to train on: the tokenizer's chat template marks no answer")
    return segments


def preference_segments(
    tokenizer: PreTrainedTokenizerBase, row: Row, empty_think_ratio: float = 0.0
) -> tuple[Segments, Segments]:
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
    chosen, rejected = with_empty_thoughts(empty_think_ratio, chosen, rejected)
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
    check_trained(segments)
    while not segments[-1][1]:
        segments.pop()
    return segments


SEGMENTERS: dict[str, Callable[..., Any]] = {  # (tokenizer, row, options)
    "text": text_segments,
    "conversations": conversation_segments,
    "preferences": preference_segments,  # two documents a row
}

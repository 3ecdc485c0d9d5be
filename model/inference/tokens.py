"""The text of single tokens, for any kind of tokenizer."""

import json
import re
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of a byte that has no token of its own


def unicode_to_bytes() -> dict[str, int]:
    """The inverse of GPT-2's bytes_to_unicode: byte-level BPE writes a printable byte as the
    character of that number, and the others as characters from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF_CHARACTER = unicode_to_bytes()


@lru_cache(maxsize=8)
def decoders(tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, Any]]:
    """The steps that make text of tokens, by type: ByteLevel, ByteFallback, Metaspace, …"""
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return {}
    step = json.loads(decoder.__getstate__())
    return {each["type"]: each for each in step.get("decoders", [step])}


def decode_token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes of a token, often part of a character; of an added token, its name."""
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:  # an id without a token
        return b""
    if token in tokenizer.added_tokens_decoder:
        return name.encode()
    return decode_name(tokenizer, name)


def decode_name(tokenizer: PreTrainedTokenizerBase, name: str) -> bytes:
    """The bytes of a token of the vocabulary, by its name.

    A word begins with the space before it. Where normalizers, or WordPiece, lose what was written
    (case, spaces, rare characters), these bytes are only about those of the text.
    """
    steps = decoders(tokenizer)
    if "ByteLevel" in steps and all(c in BYTE_OF_CHARACTER for c in name):
        return bytes(BYTE_OF_CHARACTER[c] for c in name)
    if "ByteFallback" in steps and (byte := BYTE_NAME.fullmatch(name)):
        return bytes([int(byte[1], 16)])
    if "WordPiece" in steps:
        prefix = steps["WordPiece"].get("prefix", "##")
        return (name.removeprefix(prefix) if name.startswith(prefix) else f" {name}").encode()
    if "BPEDecoder" in steps:
        return name.replace(steps["BPEDecoder"].get("suffix", "</w>"), " ").encode()
    return name.replace("▁", " ").encode()  # Metaspace, or a step that replaces its sign

"""Words of a text in any language, and hashes of their n-grams, for deduplication."""

import re
from zlib import crc32

import numpy as np

from dataset.text import HAN

# A Chinese character is a word; so is an operator: 2 + 2 is not 2 - 2.
WORD = re.compile(rf"[{HAN}]|[^\W_{HAN}]+|[+\-*/=<>%^$#@&|~]")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # an odd number of high entropy


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def hash_words(words: list[str]) -> np.ndarray:
    """[words] uint64"""
    codes = (crc32(word.encode("utf-8", "surrogatepass")) for word in words)
    return np.fromiter(codes, np.uint64, len(words))


def hash_ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """[words, …] → [words - n + 1, …] uint64: a polynomial in the hashes of n words, mixed."""
    places = max(0, len(words) - n + 1)
    total = np.zeros((places, *words.shape[1:]), np.uint64)
    for place in range(n):
        total = total * MULTIPLIER + words[place : place + places] + np.uint64(1)
        total ^= total >> np.uint64(29)
    return total

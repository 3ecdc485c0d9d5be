"""Words of a text in any language, and hashes of their n-grams."""

import re
from zlib import crc32

import numpy as np

HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
# A Chinese character is a word of its own; a sign counts too: 2 + 2 is not 2 - 2.
WORD = re.compile(rf"[{HAN}]|[^\W_{HAN}]+|[+\-*/=<>%^$#@&|~]")
CHINESE = re.compile(f"[{HAN}]")
KANA = re.compile("[\u3040-\u30ff\u31f0-\u31ff]")
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
LETTER = re.compile(r"[^\W\d_]")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # an odd number of high entropy


def language_of(text: str) -> str:
    """zh, en, other or none, by the scripts of the letters.

    A text is zh if a fifth of its letters are Chinese characters and next to none are kana, and en
    if four fifths are Latin. So French or code are en too, and classical and modern, traditional
    and simplified Chinese are one: this rule is exact about scripts and knows nothing of words.
    A text with no letters at all is none.
    """
    letters = len(LETTER.findall(text))
    if not letters:
        return "none"
    chinese, kana = len(CHINESE.findall(text)), len(KANA.findall(text))
    if chinese >= letters / 5 and kana <= (chinese + kana) / 20:
        return "zh"
    return "en" if len(LATIN.findall(text)) >= letters * 4 / 5 else "other"


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

"""Which writing system a text uses: Chinese characters, Latin letters, or others."""

import re

# CJK ideographs of the basic plane, compatibility ideographs, and the extensions B to G.
HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
CHINESE = re.compile(f"[{HAN}]")
KANA = re.compile("[\u3040-\u30ff\u31f0-\u31ff]")
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
LANGUAGES = ("zh", "en", "other", "none")
LETTER = re.compile(r"[^\W\d_]")


def is_chinese(text: str) -> bool:
    """Whether the text holds a Chinese character."""
    return CHINESE.search(text) is not None


def count_chinese(text: str) -> int:
    """How many of its characters are Chinese."""
    return len(CHINESE.findall(text))


def language_of(text: str) -> str:
    """zh, en, other or none, by the writing system of the letters.

    A text is zh if a fifth of its letters are Chinese characters and next to none are kana, and en
    if four fifths are Latin. So French and code are en too, and classical and modern, traditional
    and simplified Chinese are all zh: the rule looks at characters and not at words. A text without
    letters is none.
    """
    letters = len(LETTER.findall(text))
    if not letters:
        return "none"
    chinese, kana = count_chinese(text), len(KANA.findall(text))
    if chinese >= letters / 5 and kana <= (chinese + kana) / 20:
        return "zh"
    return "en" if len(LATIN.findall(text)) >= letters * 4 / 5 else "other"

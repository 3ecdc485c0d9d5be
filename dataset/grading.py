"""Grading an answer against the truth."""


def normalize_text(text: str) -> str:
    """Strip, collapse whitespace, ignore case, and drop one final full stop."""
    text = " ".join(text.split()).casefold()
    return (text[:-1] if text.endswith((".", "。")) else text).strip()


def grade(answer: str, reply: str) -> bool:
    """Whether the reply equals the answer after `normalize_text`."""
    return normalize_text(answer) == normalize_text(reply)

"""Texts that match a regular expression: starting points for the search of a reply's end.

A search that looks one token ahead finds the end of `[a-z]{3}`, but not of `.*[.]pdf`, where any
character may follow any other. So each pattern of a schema gives one text that matches it.
"""

import sys
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:
    import sre_constants as sre
    import sre_parse


def patterns_in(schema: Any) -> set[str]:
    """All regular expressions in a JSON schema."""
    if isinstance(schema, list):
        return set().union(*map(patterns_in, schema))
    if not isinstance(schema, dict):
        return set()
    own = {schema["pattern"]} if isinstance(schema.get("pattern"), str) else set()
    named = schema.get("patternProperties")
    own |= set(named) if isinstance(named, dict) else set()
    return own.union(*map(patterns_in, schema.values()))


def matching_text(pattern: str) -> str | None:
    """A short text that matches; None where Python does not know the pattern, or it looks ahead."""
    try:
        return "".join(map(text_of, sre_parse.parse(pattern)))
    except (ValueError, OverflowError, RecursionError, sre.error):
        return None


def text_of(part: tuple[Any, Any]) -> str:
    """A text for a part of a parsed pattern. ValueError if there is none to be seen."""
    kind, value = part
    if kind is sre.LITERAL:
        return chr(value)
    if kind is sre.AT:  # ^ and $
        return ""
    if kind in (sre.ANY, sre.NOT_LITERAL):
        return "a" if value != ord("a") else "b"
    if kind is sre.IN:
        return member_of(value)
    if kind is sre.BRANCH:
        return min(("".join(map(text_of, branch)) for branch in value[1]), key=len)
    if kind is sre.SUBPATTERN:
        return "".join(map(text_of, value[-1]))
    if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        least, _, repeated = value
        return least * "".join(map(text_of, repeated)) if least <= 1000 else ""
    raise ValueError(f"unknown part {kind}")


def member_of(members: list[tuple[Any, Any]]) -> str:
    """A character of a set such as [a-z_] or [^"]."""
    (kind, value), *rest = members
    if kind is sre.NEGATE:
        excluded = [chr(code) for code in range(32, 127) if is_member(code, rest)]
        return next(chr(code) for code in range(97, 127) if chr(code) not in excluded)
    if kind is sre.RANGE:
        return chr(value[0])
    if kind is sre.CATEGORY:
        return {sre.CATEGORY_DIGIT: "0", sre.CATEGORY_SPACE: " "}.get(value, "a")
    return text_of(members[0])


def is_member(code: int, members: list[tuple[Any, Any]]) -> bool:
    character = chr(code)
    categories = {
        sre.CATEGORY_DIGIT: character.isdigit(),
        sre.CATEGORY_SPACE: character.isspace(),
        sre.CATEGORY_WORD: character.isalnum() or character == "_",
    }
    return any(
        (kind is sre.LITERAL and code == value)
        or (kind is sre.RANGE and value[0] <= code <= value[1])
        or (kind is sre.CATEGORY and categories.get(value, True))
        for kind, value in members
    )

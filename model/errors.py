"""Errors that a user can cause: one sentence instead of a traceback."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache


class UserError(Exception):
    """One sentence: what is wrong, where, and what to do about it."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2; all other errors pass through."""
    escape_what_cannot_be_shown()
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@cache
def tell_once(line: str) -> None:
    """A line on stderr, by one of torchrun's processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def escape_what_cannot_be_shown() -> None:
    """Let characters that the console or a redirected log cannot hold (gbk, cp1252, ascii) be
    written as escapes, instead of ending the command; and read what cannot be decoded as U+FFFD."""
    for stream, errors in (
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
        (sys.stdin, "replace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(io.UnsupportedOperation):  # stdin, once something has been read
                stream.reconfigure(errors=errors)

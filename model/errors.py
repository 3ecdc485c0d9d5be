"""Errors that a user can cause: one sentence instead of a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


class UserError(Exception):
    """One sentence: what is wrong, where, and what to do about it."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2; all other errors pass through."""
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

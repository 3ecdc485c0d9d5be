"""Errors that a user can cause: one sentence instead of a traceback."""

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any


class UserError(Exception):
    """One sentence: what is wrong, where, and what to do about it."""


show_tracebacks = False  # --debug 1 of every command


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2; all other errors pass through.
    With --debug 1 the traceback comes first, that of the error's cause included."""
    escape_what_cannot_be_shown()
    try:
        yield
    except UserError as error:
        if show_tracebacks:
            print_traceback(error)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def print_traceback(error: BaseException) -> None:
    cause: BaseException | None = error
    while cause:
        cause.__suppress_context__ = cause.__cause__ is not None  # `from None` hides what we want
        cause = cause.__cause__ or cause.__context__
    traceback.print_exception(error)


@contextmanager
def reading(what: Any, advice: str = "") -> Iterator[None]:
    """The guard of a place that reads a stranger's file: whatever goes wrong there, because of what
    the file holds, is a UserError. --debug 1 shows what it was.

    Args:
        what: the file, as the sentence names it; "" if an outer guard names it.
        advice: what to do; the end of the sentence.
    """
    try:
        yield
    except (UserError, OSError):  # a full disk, or no permission: its own handlers say so
        raise
    except BaseException as error:
        # panics of tokenizers and safetensors, which are written in Rust, are no Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        end = f"; {advice}" if advice else ""
        sentence = f"{what} cannot be used: {reason_of(error)}{end}".lstrip()
        raise UserError(sentence) from error


def reason_of(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError) or "not enough memory" in str(error):
        return "it needs more memory than there is"
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}" if said else type(error).__name__


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

"""Command lines out of dataclasses: a field is a flag, and what is wrong is told in a sentence."""

import argparse
from collections.abc import Sequence
from dataclasses import field
from typing import Any, TypeVar

from transformers import HfArgumentParser

from model.errors import UserError

Arguments = TypeVar("Arguments")


def option(default: Any, help: str) -> Any:
    """A field of an argument class, with the line that --help shows for it."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


class Parser(HfArgumentParser):
    """HfArgumentParser, its complaints as UserErrors."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the flags)")


def parse_arguments(
    kind: type[Arguments], about: str | None = None, arguments: Sequence[str] | None = None
) -> Arguments:
    """An instance of the dataclass `kind` from the command line.

    Args:
        about: the script's docstring, which --help shows.

    Raises:
        UserError: an unknown flag, a value that is missing or of the wrong kind.
    """
    parser = Parser(
        kind,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    args, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise UserError(f"unknown argument {unknown[0]} (--help lists the flags)")
    return args

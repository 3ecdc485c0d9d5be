"""Command lines out of dataclasses: a field is a flag, and a mistake is told in one sentence.

An option declares all that is known of it, once: default and help, its group in --help, which
values make sense, and whether a training may differ in it.
"""

import argparse
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import MISSING, Field, field, fields
from types import MappingProxyType
from typing import Any, TypeVar

from transformers import HfArgumentParser

from model.errors import UserError

Arguments = TypeVar("Arguments")


def option(default: Any, help: str, **rules: Any) -> Any:
    """A field of an argument class.

    Args:
        help: the line that --help shows.
        rules: a class that overrides the field keeps those that it does not give anew.
            group: heading in --help.
            above, at_least, below, at_most: the values that make sense.
            needs: a flag without which this one has no effect, or values of it: "flag=a|b".
            no_effect: why this class does not use the flag that it inherits.
            may_differ: a run may go on with another value after --resume.
            pinned: False where a recipe leaves the value to whoever follows it.
            path: a recipe has it relative to the project's folder.
            released: the stage of dataset/released.py whose file is the default.
    """
    metadata = {"help": help, "rules": rules}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def rules_of(args_class: type) -> dict[str, dict[str, Any]]:
    """The rules of every field, by its name."""
    rules: dict[str, dict[str, Any]] = {}
    for each in reversed(args_class.__mro__):
        for name, declared in each.__dict__.get("__dataclass_fields__", {}).items():
            rules[name] = {**rules.get(name, {}), **declared.metadata.get("rules", {})}
    return rules


def names_where(args_class: type, rule: str, value: Any) -> set[str]:
    """The fields that declare this value of a rule."""
    return {name for name, rules in rules_of(args_class).items() if rules.get(rule) == value}


def check_values(args: Any) -> None:
    """UserError for a value outside of what its option declares, and for a flag without effect."""
    defaults = {each.name: default_of(each) for each in fields(args)}
    for name, rules in rules_of(type(args)).items():
        value = getattr(args, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} must be a finite number, not {value}")
        if value is None:
            continue
        if complaint := out_of_range(value, **rules):
            raise UserError(f"--{name} must {complaint.format(value)}")
        flag, _, values = rules.get("needs", "").partition("=")
        if flag in defaults and value != defaults[name]:
            given = getattr(args, flag)
            if str(given) not in values.split("|") if values else not given:
                example = values.split("|")[0] or ("1" if given is False else flag.upper())
                raise UserError(f"--{name} has no effect without --{flag} {example}")
        if (reason := rules.get("no_effect")) and value != defaults[name]:
            raise UserError(f"--{name} has no effect here: {reason}")


def out_of_range(
    value: Any, above=None, at_least=None, below=None, at_most=None, **others: Any
) -> str:
    """What is wrong with a value, the value left open; "" if it is in its range."""
    inside = (
        (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )
    if inside:
        return ""
    if at_least == 0 and below is None and at_most is None:
        return "not be negative, as {} is"
    lower = f"more than {above}" if above is not None else f"at least {at_least}"
    if at_least is not None and at_most is not None:
        return f"be from {at_least} to {at_most}, not {{}}"
    upper = f" and less than {below}" if below is not None else ""
    return f"be {lower}{upper}, not {{}}"


def default_of(each: Field) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


class Parser(HfArgumentParser):
    """HfArgumentParser with groups, and its complaints as UserErrors."""

    def __init__(self, args_class: type, **settings: Any):
        self.rules, self.groups = rules_of(args_class), {}
        super().__init__(args_class, usage="%(prog)s [--flag value ...]", **settings)

    def _parse_dataclass_field(self, parser: Any, field: Field) -> None:
        plain, name = copy(field), self.rules[field.name].get("group")
        hidden = "no_effect" in self.rules[field.name]
        # argparse knows no rules
        about = argparse.SUPPRESS if hidden else field.metadata.get("help")
        plain.metadata = MappingProxyType({"help": about})
        if name:
            if name not in self.groups:
                self.groups[name] = self.add_argument_group(name)
            parser = self.groups[name]
        HfArgumentParser._parse_dataclass_field(parser, plain)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the flags)")


def parse_arguments(
    args_class: type[Arguments], about: str | None = None, argv: Sequence[str] | None = None
) -> Arguments:
    """An instance of the dataclass from the command line.

    Args:
        about: the script's docstring, which --help shows.
        argv: default: the program's own arguments.

    Raises:
        UserError: an unknown flag, a value that is missing or of the wrong kind.
    """
    parser = Parser(
        args_class,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    args, unknown = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise UserError(f"unknown argument {unknown[0]} (--help lists the flags)")
    return args

"""Command lines out of dataclasses: a field is a flag, and a mistake is told in one sentence.

An option declares all that is known of it, once: default and help, its group in --help, which
values make sense, and whether a training may differ in it.

A script declares its Args and reads its command line above its other imports:

    if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
        args = parse_command_line(Args, __doc__)

    import torch
    ...
    if __name__ == "__main__":
        with exit_on_user_error():
            main(args)

torch, transformers and datasets take ten seconds to import. So what stands above that line, this
module included, imports none of them.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from model import errors
from model.errors import UserError, exit_on_user_error, tell_once
from model.paths import check_name

Arguments = TypeVar("Arguments")


def option(default: Any, help: str, **rules: Any) -> Any:
    """A field of an argument class.

    Args:
        help: the line that --help shows.
        rules: a class that overrides the field keeps those that it does not give anew.
            group: heading in --help.
            above, at_least, below, at_most: the values that make sense.
            required: True if the command line must give it.
            needs: a flag without which this one has no effect, or values of it: "flag=a|b".
            unless: a flag beside which this one has no effect.
            habit: people's scripts give it where it has no effect, which is told and not refused.
            no_effect: why this class does not use the flag that it inherits.
            alias: names that the flag has in other versions of MiniMind.
            check: raises a UserError for a value that names no such file or folder.
            positional: given by its place on the command line, without a flag.
            may_differ: a run may go on with another value after --resume.
            recipe: True if a recipe may set it; `setting` declares it.
            path: a recipe has it relative to the project's folder.
            name: True if files are named so: it must not lead into another folder.
            released: the stage of dataset/released.py whose file is the default.
    """
    metadata = {"help": help, "rules": rules}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def setting(default: Any, help: str, **rules: Any) -> Any:
    """An option that a recipe may set too: it says what a training computes or what it reads, never
    where it writes, whom it asks or what code it runs."""
    return option(default, help, recipe=True, **rules)


class Ignored(NamedTuple):
    """A flag of other versions that is accepted and has no effect."""

    reason: str
    also: tuple[str, ...] = ()  # such flags that have no effect beside it either


class Refused(NamedTuple):
    """A flag of other versions that nothing here can replace."""

    reason: str


# What to do with a flag of other versions that is no mere alias: see `legacy_flags` of a class.
# Text is what replaces it, such as "--rollout_url {} --rollout_reload sglang".
Legacy = Ignored | Refused | str


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


def default_of(each: Field) -> Any:
    return each.default if each.default_factory is MISSING else each.default_factory()


# -- checks ----------------------------------------------------------------------------------------


def check_values(args_class: type, values: Mapping[str, Any]) -> None:
    """UserError for a value outside of what its option declares, and for a flag without effect."""
    declared = {each.name: each for each in fields(args_class)}
    defaults = {name: default_of(each) for name, each in declared.items()}
    for name, rules in rules_of(args_class).items():
        value = values[name]
        if rules.get("required") and not value:
            raise UserError(f"--{name} is required: {declared[name].metadata['help']}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} must be a finite number, not {value}")
        if value is None:
            continue
        if rules.get("name") and value:
            check_name(name, value)
        if complaint := out_of_range(value, **rules):
            raise UserError(f"--{name} must {complaint.format(value)}")
        flag, _, allowed = rules.get("needs", "").partition("=")
        if flag in defaults and value != defaults[name]:
            given = values[flag]
            if str(given) not in allowed.split("|") if allowed else not given:
                example = allowed.split("|")[0] or ("1" if given is False else flag.upper())
                complaint = f"--{name} has no effect without --{flag} {example}"
                if not rules.get("habit"):
                    raise UserError(complaint)
                tell(complaint)
        if values.get(rules.get("unless", "")) and value and value != defaults[name]:
            raise UserError(f"--{name} has no effect with --{rules['unless']}")
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
    upper += f" and at most {at_most}" if at_most is not None else ""
    return f"be {lower}{upper}, not {{}}"


def check_files(args: Any) -> None:
    """UserError for a file or folder that the arguments name and that is not there. A class may
    have a method of this name too, for what no single option knows."""
    for name, rules in rules_of(type(args)).items():
        if check := rules.get("check"):
            value = getattr(args, name)
            for each in value if isinstance(value, list) else [value]:
                if each:
                    check(each)
    if hasattr(args, "check_files"):
        args.check_files()


# -- flags of other versions -----------------------------------------------------------------------


def translate(args_class: type, argv: Iterable[str]) -> list[str]:
    """A command line in today's flags: dashes within a name become underscores, and flags of other
    versions of MiniMind become ours, which is told."""
    rules, legacy = rules_of(args_class), legacy_flags(args_class)
    renamed = {alias: name for name in rules for alias in rules[name].get("alias", ())}
    words, ours, others = list(argv), [], {}
    while words:
        flag, equals, value = (word := words.pop(0)).partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name in rules or name.removeprefix("no_") in rules:
            word = f"--{name}{equals}{value}"
        elif name in renamed:
            tell(f"{flag} is --{renamed[name]} here")
            word = f"--{renamed[name]}{equals}{value}"
        elif name in legacy:
            if not equals:  # a flag alone is a switch
                value = words.pop(0) if words and not words[0].startswith("--") else "1"
            others[name] = value
            continue
        ours.append(word)
    actions = {name: action_of(name, value, legacy[name]) for name, value in others.items()}
    ignored = {also for act in actions.values() if isinstance(act, Ignored) for also in act.also}
    replaced: list[str] = []
    for name, action in actions.items():
        if isinstance(action, Refused):
            raise UserError(f"--{name} is not a flag here: {action.reason}")
        if isinstance(action, Ignored):
            tell(f"--{name} {others[name]} has no effect here: {action.reason}")
        elif name not in ignored:
            words = [word.format(others[name]) for word in action.split()]
            tell(f"--{name} {others[name]} is {' '.join(words)} here")
            replaced += words
    return replaced + ours  # in front, so that a flag of today overrides it


def legacy_flags(args_class: type) -> dict[str, Legacy | dict[str, Legacy]]:
    """The flags of other versions that a class declares, with those that it inherits."""
    flags: dict[str, Legacy | dict[str, Legacy]] = {}
    for each in reversed(args_class.__mro__):
        flags |= each.__dict__.get("legacy_flags", {})
    return flags


def action_of(name: str, value: str, entry: Legacy | dict[str, Legacy]) -> Legacy:
    """What a class declares for this value of a flag."""
    if not isinstance(entry, dict):
        return entry
    if value not in entry:
        raise UserError(f"--{name} {value} is unknown; known are {', '.join(entry)}")
    return entry[value]


def tell(line: str) -> None:
    tell_once(f"note: {line}")


# -- parsing ---------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """The flags of a dataclass in their groups; complaints are UserErrors."""

    def __init__(self, args_class: type, **settings: Any):
        rules, types = rules_of(args_class), get_type_hints(args_class)
        places = " ".join(name.upper() for name in rules if rules[name].get("positional"))
        super().__init__(
            usage=f"%(prog)s {places}{' ' * bool(places)}[--flag value ...]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )
        about = "show where an error was found, as a traceback"
        self.add_argument("--debug", type=to_bool, nargs="?", const=True, default=False, help=about)
        groups: dict[str, Any] = {"": self}
        for title in getattr(args_class, "groups", ()):  # the order in --help, if it matters
            groups[title] = self.add_argument_group(title)
        for each in fields(args_class):
            title = rules[each.name].get("group", "")
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            add_argument(groups[title], each, types[each.name], rules[each.name])

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def add_argument(group: Any, each: Field, kind: Any, rules: dict[str, Any]) -> None:
    """Add a field to a parser or to a group of one."""
    default, flag = default_of(each), f"--{each.name}"
    about = argparse.SUPPRESS if "no_effect" in rules else each.metadata.get("help")
    shared = dict(default=default, help=about)
    (kind,) = {*(get_args(kind) if NoneType in get_args(kind) else [kind])} - {NoneType}
    if rules.get("positional"):
        group.add_argument(each.name, type=kind, help=about)
    elif kind is bool:  # --flag, --flag 0, --flag 1, and --no_flag where it is on by default
        group.add_argument(flag, type=to_bool, nargs="?", const=True, **shared)
        if default is True:
            hidden = dict(dest=each.name, help=argparse.SUPPRESS)
            group.add_argument(f"--no_{each.name}", action="store_false", **hidden)
    elif get_origin(kind) is list:
        group.add_argument(flag, type=get_args(kind)[0], nargs="+", **shared)
    elif get_origin(kind) is Literal:
        choices = get_args(kind)
        shown = "{" + ",".join(map(str, choices)) + "}"
        group.add_argument(flag, type=one_of(choices), metavar=shown, **shared)
    else:
        group.add_argument(flag, type=kind, **shared)


def to_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "t", "y"):
        return True
    if text.lower() in ("0", "false", "no", "f", "n"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither 1 nor 0")


def one_of(choices: Sequence[Any]) -> Callable[[str], Any]:
    """A function that turns a word into the choice that it names."""
    by_name = {str(choice): choice for choice in choices}

    def choose(text: str) -> Any:
        if text not in by_name:
            shown = ", ".join(filter(None, by_name))
            raise argparse.ArgumentTypeError(
                f"invalid choice: '{text}' (choose from {shown}{nearest(text, by_name)})"
            )
        return by_name[text]

    return choose


def nearest(word: str, known: Iterable[str], dashes: str = "") -> str:
    """The known word that a mistyped one was meant to be, as the end of a sentence."""
    return "".join(f"; did you mean {dashes}{each}?" for each in get_close_matches(word, known, 1))


def parse_arguments(
    args_class: type[Arguments],
    about: str | None = None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> Arguments:
    """An instance of the dataclass from the command line.

    Args:
        about: the script's docstring, which --help shows.
        argv: default: the program's own arguments.
        prog: the program's name in --help; default: that of its file.

    Raises:
        UserError: an unknown flag, a value that is missing, of the wrong kind or out of range, or
            a flag without effect.
    """
    argv = translate(args_class, sys.argv[1:] if argv is None else argv)
    parser = Parser(args_class, description=about, prog=prog)
    parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        meant = nearest(flag[2:], rules_of(args_class), "--") if flag.startswith("--") else ""
        raise UserError(f"unknown argument {flag}{meant} (--help lists the flags)")
    values = vars(parsed)
    errors.show_tracebacks = values.pop("debug")
    check_values(args_class, values)
    return args_class(**values)


def parse_command_line(
    args_class: type[Arguments], about: str | None = None, argv: Sequence[str] | None = None
) -> Arguments:
    """The arguments of a script, with the files that they name there; a mistake ends the script
    with one sentence and exit code 2."""
    with exit_on_user_error():
        args = parse_arguments(args_class, about, argv)
        check_files(args)
        return args


def parse_command(
    commands: Mapping[str, type], about: str | None, argv: Sequence[str] | None = None
) -> tuple[str, Any]:
    """The command and its arguments, for a script of several commands: its first word names one.

    Args:
        commands: the argument class of each command. Its docstring is the command's help.

    Raises:
        UserError: as `parse_arguments`, or a file that is named is not there.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if name not in commands:
        list_commands(commands, about, name)
    args_class = commands[name]
    prog = f"{os.path.basename(sys.argv[0])} {name}"
    args = parse_arguments(args_class, args_class.__doc__, rest, prog)
    check_files(args)
    return name, args


def list_commands(commands: Mapping[str, type], about: str | None, name: str) -> NoReturn:
    """What --help shows before a command is chosen; UserError for an unknown one."""
    if name not in ("-h", "--help"):
        wrong = f"invalid choice: '{name}'" if name else "no command is given"
        raise UserError(f"{wrong} (choose from {', '.join(commands)}{nearest(name, commands)})")
    parser = argparse.ArgumentParser(
        usage="%(prog)s COMMAND [--flag value ...]",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listed = parser.add_subparsers(metavar="COMMAND", title="commands")
    for each, args_class in commands.items():
        listed.add_parser(each, help=args_class.__doc__)
    parser.print_help()
    sys.exit(0)

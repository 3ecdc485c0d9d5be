"""The form that starts a training: what it offers is what the trainers' options declare."""

import importlib
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import Field, fields
from functools import cache
from itertools import chain, count
from os.path import relpath
from pathlib import Path
from typing import Any

import streamlit as st

from dataset.released import DATASET
from model.command_line import Parser, default_of, rules_of
from model.errors import UserError
from model.paths import OUT, ROOT
from scripts.web.controls import persistent
from scripts.web.models import find_models
from scripts.web.processes import Process
from scripts.web.texts import Translator
from trainer.common.command import trainer_arguments
from trainer.report.run_state import RunState

# Flags with a field of their own, where a stage has them; "other flags" takes the rest.
FIELDS = """data_path from_weight hidden_size num_hidden_layers minutes max_steps learning_rate
    save_weight""".split()
WIDE = ("data_path", "from_weight")
DATA_FILE = re.compile(r"(?!.*_(val|test)\.jsonl).*\.jsonl(\.gz)?")  # held-out ones left out


# -- what can be started ---------------------------------------------------------------------------


@cache
def stages() -> dict[str, type]:
    """The argument class of each trainer, by the name of its stage, in the order in which one
    builds upon the other."""
    names = [path.stem for path in (ROOT / "trainer").glob("train_*.py")]
    found = {
        name.removeprefix("train_"): importlib.import_module(f"trainer.{name}").Args
        for name in names
    }

    def depth(stage: str) -> int:
        before = {each.name: default_of(each) for each in fields(found[stage])}["from_weight"]
        return 1 + depth(before) if before in found else 0

    return {stage: found[stage] for stage in sorted(found, key=lambda name: (depth(name), name))}


def script_of(stage: str) -> Path:
    return ROOT / "trainer" / f"train_{stage}.py"


def find_data(save_dir: str) -> list[str]:
    """Data files in dataset/, and in the folder `data` of a pipeline below save_dir."""
    folders = [DATASET, *Path(save_dir).rglob("data")]
    paths = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    return sorted(shown_path(path) for path in paths if DATA_FILE.fullmatch(path.name))


def shown_path(path: Path) -> str:
    """Relative where that is shorter: the page's processes run in its own folder."""
    return min(str(path), relpath(path), key=len)


# -- the form --------------------------------------------------------------------------------------


def training_form(args: Any, t: Translator, on_start: Callable[[Process], None]) -> None:
    """The form, the command line that it makes, and the button that runs it."""
    with st.spinner(t("loading_trainers")):
        known = stages()
    stage = st.selectbox(t("stage"), list(known), **persistent("form_stage"))
    about = (sys.modules[f"trainer.train_{stage}"].__doc__ or "").split("\n")[0]
    st.caption(about)
    declared = {each.name: each for each in fields(known[stage])}
    names = [name for name in FIELDS if name in declared]
    values: dict[str, list[str]] = {}
    for name in names:
        if name in WIDE:
            values[name] = wide_field(args, stage, known[stage], declared[name], t)
    columns = st.columns(3)
    narrow = [name for name in names if name not in WIDE]
    for number, name in enumerate(narrow):
        with columns[number % len(columns)]:
            values[name] = text_field(stage, declared[name], t)
    others = st.text_input(
        t("other_flags"),
        placeholder="--batch_size 8 --seed 1",
        **persistent(f"form_{stage}_others"),
    )
    with st.expander(t("all_flags")):
        parser = Parser(known[stage], prog=script_of(stage).name, add_help=False)
        st.code(parser.format_help(), language=None, height=360)
    try:
        flags = words_of(values, others, args.save_dir)
        argv = [shown_path(script_of(stage)), *flags]
        st.write(t("command"))
        st.code(f"python {shlex.join(argv)}", language="bash", wrap_lines=True)
        check(known[stage], flags)
        mistake = ""
    except UserError as error:
        mistake = str(error)
        st.error(mistake, icon=":material/error:")
    start = dict(icon=":material/play_arrow:", type="primary", disabled=bool(mistake))
    if st.button(t("start"), **start):
        try:
            on_start(Process(argv, output_of(args.save_dir, stage), Path.cwd()))
        except UserError as error:
            st.error(error)


def text_field(stage: str, each: Field, t: Translator) -> list[str]:
    """A flag as text, empty for its default; its words."""
    default = default_of(each)
    text = st.text_input(
        t(f"flag_{each.name}"),
        placeholder=t("default", value=default) if default not in (None, "", 0) else t("automatic"),
        help=f"--{each.name}: {each.metadata['help']}",
        **persistent(f"form_{stage}_{each.name}"),
    )
    return [text.strip()] if text and text.strip() else []


def wide_field(args: Any, stage: str, args_class: type, each: Field, t: Translator) -> list[str]:
    """Files to choose from, or to name; the flag's words."""
    if each.name == "data_path":
        released = rules_of(args_class)["data_path"].get("released")
        return st.multiselect(
            t("flag_data_path"),
            find_data(args.save_dir),
            accept_new_options=True,
            placeholder=t("default_data") if released else t("choose_or_type"),
            help=f"--data_path: {each.metadata['help']}",
            **persistent(f"form_{stage}_data_path"),
        )
    weights = [shown_path(model.path) for model in find_models(args)]
    chosen = st.selectbox(
        t("flag_from_weight"),
        ["none", *weights],
        index=None,
        accept_new_options=True,
        placeholder=t("default", value=default_of(each)),
        help=f"--from_weight: {each.metadata['help']}",
        **persistent(f"form_{stage}_from_weight"),
    )
    return [chosen] if chosen else []


# -- the command -----------------------------------------------------------------------------------


def words_of(values: dict[str, list[str]], others: str, save_dir: str) -> list[str]:
    """The flags of a command line. UserError if the text of other flags has an open quote."""
    try:
        more = shlex.split(others or "")
    except ValueError as error:
        raise UserError(f"the other flags cannot be split into words: {error}") from error
    words = []
    for name, given in values.items():
        words += [f"--{name}", *given] if given else []
    if Path(save_dir).resolve() != OUT and "--save_dir" not in more:
        # a run of the same name in out/ has its checkpoint in checkpoints/
        words += ["--save_dir", save_dir]
        if "--checkpoint_dir" not in more:
            words += ["--checkpoint_dir", str(Path(save_dir) / "checkpoints")]
    return words + more


def check(args_class: type, flags: list[str]) -> None:
    """UserError with the sentence that the trainer itself would answer."""
    try:
        trainer_arguments(args_class, list(flags))
    except SystemExit as end:
        raise UserError("--help does not train: leave it away") from end


def output_of(save_dir: str, stage: str) -> Path:
    """A new file for what a training prints."""
    name = f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = chain([name], (f"{name}-{number}" for number in count(2)))  # two in one second
    paths = (Path(save_dir) / "logs" / f"{each}.log" for each in names)
    return next(path for path in paths if not path.exists())


def resume_flags(state: RunState) -> tuple[Path, list[str]] | None:
    """The script of a run and the flags that continue it; None if no trainer of this folder began
    it as a command (but a pipeline, such as the demo), or torchrun did."""
    script, *flags = state.argv or [""]
    path = Path(state.folder, script).resolve()
    stage = path.stem.removeprefix("train_")
    if stage not in stages() or path != script_of(stage) or state.world_size > 1:
        return None
    go_on = ["--resume", "1"]
    return path, flags if flags[-2:] == go_on else [*flags, *go_on]


def continue_run(state: RunState, save_dir: str) -> Process:
    """UserError if it cannot begin."""
    found = resume_flags(state)
    if found is None:
        raise UserError("only a trainer that was started as a command can be continued here")
    script, flags = found
    stage = script.stem.removeprefix("train_")
    return Process([str(script), *flags], output_of(save_dir, stage), state.folder)

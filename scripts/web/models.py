"""The models that the web page finds, loaded; and the demo's training where there is none."""

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import streamlit as st

from model.errors import UserError
from model.inference.engine import Engine
from model.inference.engine_thread import EngineThread
from model.weights import ROOT, TOKENIZER
from scripts.serving.chat_model import ChatModel, ModelArgs, TalkArgs, load_chat_model

SLOTS = 8  # answers that are written at a time
NO_MODELS = {"lora", "trial"}  # folders of additions, and of what the demo tries first
BYTES_SHOWN = 4000  # of the training's log


# -- finding ---------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A model that can be chosen: own weights, or a folder of transformers."""

    label: str
    path: Path

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def changed(self) -> float:
        return (self.path / "config.json" if self.is_folder else self.path).stat().st_mtime


def find_models(args: ModelArgs) -> list[Found]:
    """Own weights and transformers folders: what --weight and --load_from name, and what is in
    save_dir; the newest first."""
    named = [path for path in (Path(args.weight),) if path.suffix == ".pth" and path.is_file()]
    if (Path(args.load_from) / "config.json").is_file():
        named.append(Path(args.load_from))
    root = Path(args.save_dir)
    inside = [path for path in root.rglob("*.pth") if not NO_MODELS & set(path.parts)]
    inside += [
        path.parent
        for path in root.rglob("config.json")
        if (path.parent / "tokenizer.json").is_file()
    ]
    found = {path.resolve(): Found(label(path, root), path) for path in (*named, *inside)}
    return sorted(found.values(), key=lambda each: each.changed, reverse=True)


def label(path: Path, root: Path) -> str:
    """The name of a model, with its folder where that is not save_dir itself."""
    try:
        inside = path.resolve().relative_to(root.resolve())
    except ValueError:
        return path.name
    return str(inside.with_suffix("") if path.suffix == ".pth" else inside)


def default_model(found: list[Found], args: ModelArgs) -> Found:
    """The one that the flags name, or the newest."""
    if (Path(args.load_from) / "config.json").is_file():
        wanted = [each for each in found if each.path == Path(args.load_from)]
    elif args.weight.endswith(".pth"):
        wanted = [each for each in found if each.path == Path(args.weight)]
    else:
        name = re.compile(rf"{re.escape(args.weight)}_{args.hidden_size or '[0-9]+'}(_moe)?.pth")
        wanted = [each for each in found if name.fullmatch(each.path.name)]
    return (wanted or found)[0]


def find_lora(model: Found) -> list[Path]:
    """The additions that lie beside own weights and have their size."""
    if model.is_folder:
        return []
    size = re.search(r"_[0-9]+(_moe)?$", model.path.stem)
    pattern = f"*{size[0]}.pth" if size else "*.pth"
    return sorted((model.path.parent / "lora").glob(pattern))


# -- loading ---------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """A model, and the thread that decodes for everybody who looks at the page."""

    key: tuple[str, str, float]  # which one it is, and of when
    chat: ChatModel
    thread: EngineThread
    continues: bool  # it was only pretrained, or has no chat template

    @property
    def room(self) -> int:
        return self.chat.model.config.max_position_embeddings


def load(args: TalkArgs, model: Found, lora: Path | None) -> Loaded:
    """UserError where it cannot be loaded."""
    source = dict(load_from=str(model.path)) if model.is_folder else {}
    if not model.is_folder:
        own = (Path(args.load_from) / "config.json").is_file()  # then it names another model
        source = dict(load_from=str(TOKENIZER)) if own else {}
    chosen = replace(
        args, weight=str(model.path), lora_weight=str(lora or ""), hidden_size=None, **source
    )
    return load_once((str(model.path), str(lora), model.changed), chosen)


@st.cache_resource(
    max_entries=2, show_spinner=False, on_release=lambda loaded: loaded.thread.stop(0)
)
def load_once(key: tuple[str, str, float], _args: TalkArgs) -> Loaded:
    """Everybody shares a model; one that was trained anew is loaded anew."""
    chat = load_chat_model(_args, _args.weight)
    thread = EngineThread(Engine(chat.model, slots=SLOTS, max_queue=64))
    return Loaded(key, chat, thread, chat.stage == "pretrain" or not chat.tokenizer.chat_template)


# -- the demo's training ---------------------------------------------------------------------------


class DemoTraining:
    """scripts/runs/demo.py as a process of its own, one for everybody who looks at the page."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def start(self, save_dir: str, minutes: int) -> None:
        """UserError where its log cannot be written."""
        output = Path(save_dir) / "demo"
        self.minutes, self.started = minutes, time.time()
        self.log = output / "web_demo.log"
        words = ["--minutes", str(minutes), "--output", str(output)]
        words += ["--report", str(Path(save_dir) / "demo_report.json")]
        try:
            output.mkdir(parents=True, exist_ok=True)
            with open(self.log, "wb") as log:
                self.process = subprocess.Popen(
                    [sys.executable, str(ROOT / "scripts" / "demo.py"), *words],
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        except OSError as error:
            raise UserError(f"cannot write {self.log}: {error.strerror}") from error

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def failed(self) -> bool:
        return self.process is not None and self.process.poll() not in (None, 0)

    def stop(self) -> None:
        """End it at once; files that it wrote are whole. There is nothing more to tell of it."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def last_lines(self, count: int = 8) -> str:
        """The end of its log. A progress bar writes over its line: only the last state counts."""
        text = self.log.read_bytes()[-BYTES_SHOWN:].decode(errors="replace")
        lines = [line.rstrip("\r").split("\r")[-1].rstrip() for line in text.split("\n")]
        return "\n".join([line for line in lines if line][-count:])


@st.cache_resource
def demo_training() -> DemoTraining:
    return DemoTraining()

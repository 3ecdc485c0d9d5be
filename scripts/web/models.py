"""The models that the web page offers, and the demo's training where there is none."""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import streamlit as st

from model.errors import UserError
from model.inference.engine import Engine
from model.inference.engine_thread import EngineThread
from model.paths import is_hf_folder
from model.weights import ROOT, TOKENIZER
from scripts.serving.arguments import ChatArgs, ModelArgs, find_model
from scripts.serving.loading import ChatModel, load_chat_model
from scripts.web.processes import Process

MAX_BATCH = 8  # replies generated at a time
MAX_QUEUE = 64
SKIPPED_FOLDERS = {"lora", "trial"}  # adapters, and the demo's measurement of speed


# -- finding ---------------------------------------------------------------------------------------


class FoundModel(NamedTuple):
    """A model to choose from: own weights, or a transformers folder."""

    label: str
    path: Path

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def modified(self) -> float:
        return (self.path / "config.json" if self.is_folder else self.path).stat().st_mtime


def find_models(args: ModelArgs) -> list[FoundModel]:
    """What --weight and --load_from name, and all models in save_dir; the newest first."""
    named = [path for path in (named_model(args),) if path and path.exists()]
    root = Path(args.save_dir)
    inside = [path for path in root.rglob("*.pth") if not is_skipped(path)]
    inside += [
        path.parent
        for path in root.rglob("config.json")
        if (path.parent / "tokenizer.json").is_file()
    ]
    found = {path.resolve(): FoundModel(make_label(path, root), path) for path in (*named, *inside)}
    return sorted(found.values(), key=lambda model: model.modified, reverse=True)


def named_model(args: ModelArgs) -> Path | None:
    """The model that the flags name, if there is one."""
    try:
        return find_model(args)
    except UserError:
        return None


def is_skipped(path: Path) -> bool:
    """Whether a .pth is no model, or not worth showing; earlier versions put lora_NAME_SIZE.pth
    beside the weights."""
    return bool(SKIPPED_FOLDERS & set(path.parts)) or path.name.startswith("lora_")


def make_label(path: Path, root: Path) -> str:
    """The name of a model, with its folder relative to save_dir."""
    try:
        relative = path.resolve().relative_to(root.resolve())
    except ValueError:
        return path.name
    return str(relative.with_suffix("") if path.suffix == ".pth" else relative)


def default_model(found: list[FoundModel], args: ModelArgs) -> FoundModel:
    """The model that the flags name, or the newest."""
    named = named_model(args)
    name = re.compile(rf"{re.escape(args.weight)}_{args.hidden_size or '[0-9]+'}(_moe)?.pth")
    matches = [model for model in found if model.path == named]  # else one in a folder of save_dir
    matches = matches or [model for model in found if name.fullmatch(model.path.name)]
    return (matches or found)[0]


def find_lora(model: FoundModel) -> list[Path]:
    """The LoRA adapters of the same hidden size, in lora/ next to own weights and beside them."""
    if model.is_folder:
        return []
    size = re.search(r"_[0-9]+(_moe)?$", model.path.stem)
    pattern = f"*{size[0]}.pth" if size else "*.pth"
    beside = sorted(model.path.parent.glob(f"lora_{pattern}"))
    return sorted((model.path.parent / "lora").glob(pattern)) + beside


# -- loading ---------------------------------------------------------------------------------------


class ServedModel(NamedTuple):
    """A loaded model, and the engine thread that all visitors of the page share."""

    key: tuple[str, str, float]  # weights, adapter, time of modification
    loaded: ChatModel
    thread: EngineThread


def serve_model(args: ChatArgs, model: FoundModel, lora: Path | None) -> ServedModel:
    """UserError if it cannot be loaded."""
    changes: dict[str, str] = {}
    if model.is_folder:
        changes = {"load_from": str(model.path)}
    elif is_hf_folder(args.load_from):  # the flag names another model: take our own tokenizer
        changes = {"load_from": str(TOKENIZER)}
    args = replace(
        args, weight=str(model.path), lora_weight=str(lora or ""), hidden_size=None, **changes
    )
    return serve_once((str(model.path), str(lora), model.modified), args)


@st.cache_resource(
    max_entries=2, show_spinner=False, on_release=lambda served: served.thread.stop(0)
)
def serve_once(key: tuple[str, str, float], _args: ChatArgs) -> ServedModel:
    """Cached by key, so that visitors share a model, and newly trained weights are loaded again."""
    loaded = load_chat_model(_args)
    engine = Engine(loaded.model, slots=MAX_BATCH, max_queue=MAX_QUEUE)
    return ServedModel(key, loaded, EngineThread(engine))


# -- the demo's training ---------------------------------------------------------------------------


class DemoTraining:
    """scripts/runs/demo.py; all visitors of the page share one."""

    def __init__(self) -> None:
        self.process: Process | None = None

    def start(self, save_dir: str, minutes: int) -> None:
        """UserError if its log cannot be written."""
        output = Path(save_dir) / "demo"
        argv = [str(ROOT / "scripts" / "runs" / "demo.py"), "--minutes", str(minutes)]
        argv += ["--output", str(output), "--report", str(Path(save_dir) / "demo_report.json")]
        self.minutes, self.process = minutes, Process(argv, output / "web_demo.log")

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.running

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process = None


@st.cache_resource
def demo_training() -> DemoTraining:
    return DemoTraining()

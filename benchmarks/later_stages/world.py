"""What the stages of real_stages.py share: where everything lies, and how a trainer is run."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from learning.trainings import run_trainer
from rich.console import Console

from later_stages.metrics import Policies, document_losses
from model.model_minimind import MiniMindForCausalLM
from model.paths import ROOT
from model.weights import load_model
from trainer.common.checkpoint import hash_of

# flags that change no weight
TECHNICAL = """--device cpu --num_workers 0 --val_share 0 --log_interval 2 --eval_interval 0
    --save_interval 25"""
ANSWER_TOKENS = 128  # of a sampled answer
REWARDS = {"": ["auto"], "_rule": ["answer", "similarity"]}  # by the ending of the stage's name


@dataclass
class World:
    """Where everything lies, and what all stages share."""

    base: Path  # the fine-tuned model that each stage starts from
    out: Path
    student: tuple[int, int] = (160, 4)  # width and depth
    held_out: int = 600
    scale: float = 1.0  # share of the steps
    most_steps: int = 0  # of a training, for a quick test; 0: no limit
    console: Console = field(default_factory=lambda: Console(highlight=False))

    @property
    def data(self) -> Path:
        return self.out / "data"

    @cached_property
    def start(self) -> MiniMindForCausalLM:
        return load_model(self.base)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base's weights."""
        return hash_of(*(each.half() for each in self.start.state_dict().values()))

    @cached_property
    def chat_losses(self) -> tuple[np.ndarray, np.ndarray]:
        return document_losses(self.start, self.data / "chats_held.jsonl", self.held_out)

    @cached_property
    def policies(self) -> dict[str, Policies]:
        """For each kind of reward, the base's answers to held-out prompts."""
        files = {"": "prompts", "_rule": "answers"}
        return {
            kind: Policies(
                self.start,
                dict(
                    data_path=[str(self.data / f"{files[kind]}_held.jsonl")],
                    reward=["answer", "similarity"] if kind else ["model"],
                    save_dir=str(self.policy_folder(kind)),
                    max_gen_len=ANSWER_TOKENS,
                ),
                judge_dir="" if kind else str(self.judge("b")),
            )
            for kind in REWARDS
        }

    def judge(self, half: str) -> Path:
        """The folder of the reward model that was trained on this half of the pairs."""
        return self.out / f"judge_{half}"

    def policy_folder(self, kind: str) -> Path:
        """Where policies are saved: beside the reward model, if it is the reward."""
        return self.out / "weights" if kind else self.judge("a")

    def weights(self, name: str, folder: Path | None = None, size: int = 0) -> Path:
        return (folder or self.out / "weights") / f"{name}_{size or self.size}.pth"

    @property
    def size(self) -> int:
        return self.start.config.hidden_size

    def steps(self, count: int) -> int:
        """Of a training that has `count` steps at full length."""
        steps = max(1, round(count * self.scale))
        return min(steps, self.most_steps) if self.most_steps else steps

    def train(
        self,
        trainer: str,
        flags: str,
        name: str,
        *,
        seed: int = 42,
        steps: int,
        folder: Path | None = None,
        resume: bool = True,
    ) -> dict[str, Any]:
        """Run trainer/train_NAME.py; returns what its main returns, and the command."""
        folder = folder or self.out / "weights"
        values = dict(base=self.base, data=self.data)
        argv = [word.format(**values) for word in f"{flags} {TECHNICAL}".split()]
        argv += f"--seed {seed} --max_steps {steps} --resume {int(resume)}".split()
        argv += ["--save_dir", str(folder), "--checkpoint_dir", str(folder / "checkpoints")]
        argv += ["--lora_name" if trainer == "lora" else "--save_weight", name]
        result = run_trainer(self.console, import_module(f"trainer.train_{trainer}"), argv, 0)
        return {**result, "command": f"trainer/train_{trainer}.py {' '.join(argv)}"}


@dataclass
class Job:
    """A training to make and measure."""

    stage: str
    part: int  # the fold, or the seed
    variant: str = ""  # flags beyond the defaults
    scale: float = 1.0
    most_steps: int = 0

    @property
    def name(self) -> str:
        """Of weights and results."""
        words = self.variant.replace("--", "").replace("/", "").split()
        name = "_".join([self.stage, *words, str(self.part)])
        name += f"_x{self.scale:g}" * (self.scale != 1)
        return name + f"_max{self.most_steps}" * bool(self.most_steps)


@dataclass(frozen=True)
class Stage:
    trainers: tuple[str, ...]  # whose defaults the result depends on
    run: Callable[[World, Job], tuple[dict[str, float], dict[str, Any]]]  # → metrics, training
    curve: str  # the metric of the log that is plotted
    targets: dict[str, tuple[str, float]]  # metric → (">=" or "<=", value)
    sweep: tuple[str, ...] = ()  # flags to try instead of the defaults
    folds: bool = False  # trained once a fold, else once a seed

    def defaults(self) -> dict[str, Any]:
        return defaults_of(*self.trainers)


def defaults_of(*trainers: str) -> dict[str, Any]:
    """TRAINER.FLAG → its default. Without those that name a folder of this checkout."""
    modules = {name: import_module(f"trainer.train_{name}") for name in trainers}
    return {
        f"{name}.{flag}": value
        for name, module in modules.items()
        for flag, value in vars(module.Args()).items()
        if not str(value).startswith(str(ROOT))
    }


def changed_defaults(then: dict[str, Any]) -> list[str]:
    """What is another default now than when a result was made; flags that came or went do not
    count."""
    now = defaults_of(*{name.split(".")[0] for name in then})
    return [
        f"{name} {value} -> {now[name]}"
        for name, value in then.items()
        if name in now and now[name] != value
    ]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

"""Toy trainings for the tests of trainers: a model of 0.2M parameters on some lines of data."""

import faulthandler
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer, save_weights
from trainer import (
    train_distill_reason,
    train_distillation,
    train_dpo,
    train_full_sft,
    train_lora,
    train_pretrain,
    train_reward,
)
from trainer.common.command import parse_trainer, run_trainer

TINY = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    device="cpu",
    num_workers=0,
    max_seq_len=32,
    packing=False,  # so that there are as many rows as documents
    batch_size=2,
    accumulation_steps=1,
    batch_ramp=0,
    learning_rate=1e-3,
    warmup_steps=2,
    val_share=0.0,
    log_interval=1,
    save_interval=0,
)
TEXTS = ["one two three " * (1 + n % 5) + str(n) for n in range(24)]
CHATS = [
    [{"role": "user", "content": f"{n} + 1 =" + " please" * (n % 3)}]
    + [{"role": "assistant", "content": f"{n + 1}" + " indeed" * (n % 4)}]
    for n in range(12)
]
PAIRS = [
    (chat[0]["content"], f"{n + 1}" + " indeed" * (1 + n % 4), f"{n}" + " no" * (1 + n % 3))
    for n, chat in enumerate(CHATS[:10])
]
THOUGHTS = [
    f"<think>\n{n}{' 1' * (n % 3)}\n</think>\n<answer>\n{n + 1}\n</answer>" for n in range(12)
]
REASONED = [
    [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": thought}]
    for n, thought in enumerate(THOUGHTS)
]


def text_file(path: Path, texts=TEXTS) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def chat_file(path: Path, chats=CHATS) -> str:
    path.write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats))
    return str(path)


def pair_file(path: Path, pairs=PAIRS) -> str:
    def chat(question: str, answer: str) -> list[dict]:
        turns = (("user", question), ("assistant", answer))
        return [{"role": role, "content": content} for role, content in turns]

    rows = ({"chosen": chat(q, good), "rejected": chat(q, bad)} for q, good, bad in pairs)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def saved_teacher(folder: Path, name: str = "teacher", seed: int = 1, **fields) -> str:
    """A tiny model for distillation; its file."""
    tiny = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(MiniMindConfig(**{**tiny, "initializer_range": 0.2, **fields}))
    path = folder / f"{name}.pth"
    save_weights(model, path, stage="full_sft", tokenizer=load_tokenizer(), origin={})
    return str(path)


# For trainers some of whose gradients are tiny, so that AdamW makes much of rounding.
SLOWLY = {"learning_rate": 1e-4}
KINDS = {text_file: "text", chat_file: "conversations", pair_file: "preferences"}

# Every trainer but those of RL (rl_toy.py), and with it in the tests of resuming, ranks and
# mistakes: how its data is written, examples of it, and the settings that it needs beyond TINY; a
# function makes one in the folder of the training.
STAGES = {
    train_pretrain: (text_file, TEXTS, {}),
    train_full_sft: (chat_file, CHATS, {"from_weight": "none"}),
    train_distill_reason: (chat_file, REASONED, {"from_weight": "none", "max_gen_len": 4}),
    train_lora: (chat_file, CHATS, {"from_weight": "none", "lora_r": 4}),
    train_dpo: (pair_file, PAIRS, {"from_weight": "none"}),
    train_distillation: (
        chat_file,
        CHATS,
        {"from_weight": "none", "teacher_weight": saved_teacher, "epochs": 1, **SLOWLY},
    ),
    train_reward: (pair_file, PAIRS, {"from_weight": "none", **SLOWLY}),
}


def run_stage(stage) -> None:
    """What a trainer does when it is started as a script."""
    run_trainer(stage.main, parse_trainer(stage.Args, ""))


def name_of(stage) -> str:
    return Path(stage.__file__).stem


class Trainer:
    """Trainings in a folder each: train("a", seed=1), then saved("a"), log("a")."""

    def __init__(self, folder: Path, stage=train_pretrain, kind: tuple | None = None):
        self.folder, self.stage = folder, stage
        self.write_data, self.examples, more = kind or STAGES[stage]
        self.more = {name: each(folder) if callable(each) else each for name, each in more.items()}
        self.data = self.write_data(folder / "data.jsonl", self.examples)

    def settings(self, name="a", **changes) -> dict:
        places = dict(
            data_path=[self.data],
            save_dir=str(self.folder / name / "out"),
            checkpoint_dir=str(self.folder / name / "checkpoints"),
        )
        # also where a test starts a command: the same numbers on CPUs with and without bfloat16
        return {**TINY, "dtype": "float32", **self.more, **places, **changes}

    def __call__(self, name="a", **changes) -> dict:
        return self.stage.main(self.stage.Args(**self.settings(name, **changes)))

    def checkpoint(self, name="a") -> Path:
        (path,) = (self.folder / name / "checkpoints").rglob("*.checkpoint.pt")
        return path

    def saved(self, name="a") -> dict:
        return torch.load(self.checkpoint(name), weights_only=True)

    def log(self, name="a", kind="loss") -> list[dict]:
        (path,) = (self.folder / name / "out").rglob("*.metrics.jsonl")
        records = map(json.loads, path.read_text().splitlines())
        return [record for record in records if kind in record]


def logged(metrics: dict) -> list[dict]:
    """The log of a run, without the line on what its weight file keeps."""
    return [record for record in metrics["history"] if "changed_fraction" not in record]


# -- comparing -------------------------------------------------------------------------------------

TIMES = ("seconds", "tokens_per_second", "mfu", "memory_gb")


def timeless(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def everything(train: Trainer, name="a") -> list:
    """All that must be the same after a run that was interrupted and one that was not."""
    saved = train.saved(name)
    return [
        *(saved[key] for key in ("model", "optimizer")),
        *(saved["progress"][key] for key in ("step", "samples_seen", "tokens", "evaluation")),
        timeless(saved["history"]),
        timeless(train.log(name, kind="step")),
    ]


def same(a, b) -> bool:
    """Whether nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_close(a, b, tolerance=1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# -- processes -------------------------------------------------------------------------------------


def fork(call: Callable[[], object], log: Path | None = None) -> int:
    """Start `call` in a forked process, which has everything imported already; returns its id.

    It ends with the exit code of `call`; what it prints goes to `log`.
    """
    process = os.fork()
    if process:
        return process
    code = 70
    # The lock of progress bars is one for all forked processes, and one that is killed keeps it.
    tqdm.set_lock(threading.RLock())
    try:
        if log is not None:
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            faulthandler.enable()  # where a process hangs that `ended` aborts goes to the log
        call()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(process: int, seconds: float = 300) -> int:
    """Wait for a forked process: its exit code, or minus the signal that ended it; -6 for one that
    has not ended by then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGABRT)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def alive(process: int) -> bool:
    """Whether a forked process has not ended: one that has is a zombie until it is waited for."""
    return psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def no_file_grows_beyond(size: int) -> None:
    """From now on, in this process: what a full disk does, made without one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # or the signal ends the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def flags(settings: dict) -> list[str]:
    words = []
    for name, value in settings.items():
        words.append(f"--{name}")
        words += [str(each) for each in (value if isinstance(value, list) else [value])]
    return words


def output(process) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def wait_for_steps(process, settings):
    log = Path(settings["save_dir"]) / "pretrain_32.metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, output(process)
        time.sleep(0.05)

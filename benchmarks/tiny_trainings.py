"""Trainings of seconds that together reach what the trainers can do, for same_numbers.py.

`cases` lists them: every trainer dense, as a mixture of experts, with LoRA and in two processes, as
far as it supports these, some branches that only one trainer has, and runs that are resumed. All
are command lines, whose flags are fixed; so they fit every version.

A `Training` is a case in one version of the source. It runs in a fork of this program, which has
torch and transformers in memory already: importing them takes several times as long as training.
"""

import hashlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  this and the others: so that trainings need not import them
import matplotlib.pyplot
import openai  # noqa: F401
import torch
import torch._dynamo
import torch.nn.parallel
from tqdm import tqdm
from transformers import (  # noqa: F401  only what is named is imported
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

PACKAGES = ("model", "dataset", "trainer", "scripts", "eval_llm")

ERRORS = "malformed unknown_tool bad_arguments failed unfinished endless too_long".split()
UNCHANGED = ["reward", "success", *(f"error_{kind}" for kind in ERRORS)]
REWARDS = "answer number similarity format language length repetition name arguments".split()
# Keys of metrics.jsonl that have another name after the change, or one of several; "": gone.
RENAMED = {
    "lr": "learning_rate",
    "tokens": "num_tokens",
    "changed_share": "changed_fraction",
    "val_loss": "eval_loss",
    "val_bpb": "eval_bpb",
    "val_kl": "eval_kl",
    "val_format": "eval_format",
    "val_answer": "eval_answer",
    "accuracy": "rewards/accuracies accuracy",  # DPO's, and the reward model's
    "margin": "rewards/margins margin",
    "chosen_reward": "rewards/chosen chosen_reward",
    "rejected_reward": "rewards/rejected rejected_reward",
    "val_accuracy": "eval_rewards/accuracies eval_accuracy",
    "val_margin": "eval_rewards/margins eval_margin",
    "flat_groups": "frac_reward_zero_std",
    "length": "completions/mean_length",
    "empty": "completions/empty_ratio",
    "finished": "",  # 1 − completions/clipped_ratio
    "moved": "approx_kl",
    "clipped": "clip_fraction",
    "value": "",  # of ranks of unequal size: a mean over their tokens now
    "calls": "tools/call_frequency",
    "reward_failed": "",  # a count, and a share now
    **{f"reward_{name}": f"rewards/{name}/mean" for name in REWARDS},
}
RENAMED |= {
    f"val_{old}": " ".join(f"eval_{new}" for new in names.split())
    for old, names in (RENAMED | {name: name for name in UNCHANGED}).items()
    if not old.startswith("val_")
}


# -- data ------------------------------------------------------------------------------------------

WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
EXPRESSION = {"type": "object", "properties": {"expression": {"type": "string"}}}
CALCULATOR = {"name": "calculator", "description": "Work out a sum", "parameters": EXPRESSION}
THOUGHT = "<think>\n{0} comes after {1}\n</think>\n<answer>\n{0}\n</answer>"


def chat(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def tool_chat(n: int) -> list[dict[str, Any]]:
    call = [{"name": "calculator", "arguments": {"expression": f"{n} + 1"}}]
    question, answer = chat(f"Work out {n} + 1", f"{n + 1}")
    return [
        {"role": "system", "content": "", "tools": [{"type": "function", "function": CALCULATOR}]},
        question,
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "tool", "content": json.dumps({"result": n + 1})},
        answer,
    ]


def data() -> dict[str, list[dict[str, Any]]]:
    """The rows of each file, by the file's name: twelve sums in every format."""
    files: dict[str, list[dict[str, Any]]] = {
        name: [] for name in "texts chats pairs prompts thoughts tools".split()
    }
    for n, (word, answer) in enumerate(zip(WORDS, WORDS[1:], strict=False)):
        question = f"{word} + one" + " please" * (n % 3)
        right = chat(question, answer)
        wrong = chat(question, f"{word} no" * (1 + n % 2))
        files["texts"] += [{"text": f"{question} = {answer}. " * (1 + n % k)} for k in (2, 4)]
        files["chats"] += [{"conversations": right}]
        files["pairs"] += [{"chosen": right, "rejected": wrong}]
        files["prompts"] += [{"conversations": right, "answer": answer}]
        files["thoughts"] += [{"conversations": chat(question, THOUGHT.format(answer, word))}]
        files["tools"] += [{"conversations": tool_chat(n)}]
    return files


# -- cases -----------------------------------------------------------------------------------------

COMMON = """--device cpu --dtype float32 --num_workers 0 --epochs 99 --max_steps 4 --warmup_steps 1
    --batch_size 2 --learning_rate 2e-3 --val_share 0.3 --log_interval 1 --eval_interval 2
    --save_interval 0"""
SIZES = "--num_hidden_layers 2 --num_attention_heads 4 --num_key_value_heads 2 --hidden_size"
PACKED = "--max_seq_len 64 --accumulation_steps 2"
TUNED = f"--from_weight {{weights}} {PACKED}"
# a slower rate and a high temperature, so that the answers to a prompt go on to differ
ROLLOUT = "--from_weight {weights} --learning_rate 5e-4 --temperature 2 --update_batch_size 3"
RL = f"{ROLLOUT} --max_gen_len 8 --reward similarity:1 language:0.5 length:0.3"
AGENT = f"{ROLLOUT} --temperature 1.3 --max_gen_len 48 --max_turns 2"

# Of each trainer its data and its flags; {names} stand for files.
TRAINERS = {
    "pretrain": ("texts", f"{PACKED} --batch_ramp 4 {SIZES} 32"),
    "full_sft": ("chats", TUNED),
    "lora": ("chats", f"{TUNED} --lora_r 4"),
    "dpo": ("pairs", TUNED),
    "reward": ("pairs", TUNED),
    "ppo": ("prompts", f"{RL} --num_generations 2 --critic_learning_rate 1e-3"),
    "grpo": ("prompts", f"{RL} --num_generations 4 --update_epochs 2"),
    "spo": ("prompts", f"{RL} --accumulation_steps 2"),
    "agent": ("tools", f"{AGENT} --num_generations 4 --update_epochs 2"),
    "distill_reason": ("thoughts", f"{TUNED} --max_gen_len 8"),
    "distillation": ("chats", f"{TUNED} --teacher_weight {{teacher}}"),
}
ROLLOUTS = ("ppo", "grpo", "spo", "agent")
# Branches that no other case reaches.
BRANCHES = {
    "pretrain": {
        "adamw": "--optimizer adamw --dropout 0.1 --lr_schedule cosine",
        "sigmoid": "--use_moe 1 --scoring_func sigmoid --gradient_checkpointing 1",
    },
    "dpo": {"ipo": "--loss_type ipo --sft_weight 0.2 --packing 0"},
    "ppo": {"minibatches": "--num_minibatches 2 --optimizer muon"},
    "grpo": {"dapo": "--loss_type dapo --beta 0", "reasoning": "--reasoning 1"},
    "spo": {"clip": "--loss_type clip --update_epochs 2"},
    "distillation": {"on policy": "--on_policy 0.5 --divergence jsd --max_gen_len 8"},
}
LONG = 40  # steps of a run that is interrupted
RESUMED = ("pretrain", "ppo", "spo", "distillation")  # between them, all that a checkpoint holds


@dataclass(frozen=True)
class Case:
    """A command line, the same in every version."""

    trainer: str
    variant: str
    data: str
    flags: str

    @property
    def name(self) -> str:
        return f"{self.trainer}, {self.variant}"

    @property
    def ranks(self) -> int:
        return 2 if self.variant == "2 ranks" else 1


def cases(trainers: list[str]) -> list[Case]:
    listed = []
    for trainer in trainers:
        rollouts = trainer in ROLLOUTS
        # pretraining has no weights to start from that could be a mixture
        variants = {"dense": "", "mixture": "--use_moe 1" if trainer == "pretrain" else ""}
        if trainer == "dpo" or rollouts:
            variants["LoRA"] = "--use_lora 1 --lora_r 4"
        variants["2 ranks"] = "" if rollouts else "--packing 0"  # rollouts are never packed
        variants |= BRANCHES.get(trainer, {})
        if trainer in RESUMED:
            variants["resumed"] = f"--max_steps {LONG} --eval_interval {LONG // 2}"
        data, flags = TRAINERS[trainer]
        for variant, more in variants.items():
            listed.append(Case(trainer, variant, data, f"{COMMON} {flags} {more}"))
    return listed


def starting_weights() -> list[Case]:
    """Makes what the cases start from: models that answer some of their questions, so that
    rewards differ and tools are called."""
    flags = f"""{COMMON} --from_weight none --max_seq_len 256 --batch_size 8 --max_steps 150
        --learning_rate 5e-3 --eval_interval 0 {SIZES}"""
    sizes = {"weights": "32", "mixture": "32 --use_moe 1", "teacher": "48 --seed 7"}
    asked = "chats thoughts tools"
    return [Case("full_sft", name, asked, f"{flags} {size}") for name, size in sizes.items()]


# -- running ---------------------------------------------------------------------------------------


@dataclass
class Training:
    """A case in the version at `root`; what it leaves is in `folder`."""

    case: Case
    root: Path
    folder: Path
    files: dict[str, str]  # by the names that flags have for them
    resume: bool = False
    stop_after: int = 0  # steps; 0: not before its end
    processes: list[Any] = field(default_factory=list)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        start = "mixture" if self.case.variant == "mixture" else "weights"
        files = {**self.files, "weights": self.files.get(start, "")}
        flags = [word.format(**files) for word in self.case.flags.split()]
        flags += ["--data_path", *(files[name] for name in self.case.data.split())]
        flags += ["--save_dir", f"{self.folder}/out"]
        flags += ["--checkpoint_dir", f"{self.folder}/checkpoints", "--resume", f"{self.resume:d}"]
        script = self.root / "trainer" / f"train_{self.case.trainer}.py"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for rank in range(self.case.ranks):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.case.ranks}  # as torchrun
            env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            call = (script, flags, self.folder / "log.txt", env if self.case.ranks > 1 else {})
            process = multiprocessing.get_context("fork").Process(target=run_script, args=call)
            process.start()
            self.processes.append(process)

    def ended(self) -> bool:
        if self.stop_after and self.metrics().count("\n") >= self.stop_after:
            self.processes[0].terminate()  # it ends its step and saves
            self.stop_after = 0
        return not any(process.is_alive() for process in self.processes)

    def metrics(self) -> str:
        return "".join(
            file.read_text(encoding="utf-8") for file in self.folder.rglob("*.metrics.jsonl")
        )

    def failure(self) -> str:
        """How it failed, with the end of its log; "" if it did not."""
        codes = [process.exitcode for process in self.processes if process.exitcode]
        lines = (self.folder / "log.txt").read_text(errors="replace").splitlines()[-20:]
        return "\n    ".join([f"exit code {codes[0]}; its last lines:", *lines]) if codes else ""

    def result(self) -> dict[str, Any]:
        """What is to be the same in every version."""
        if failure := self.failure():
            return {"failure": failure}
        weights = {
            f"{path.relative_to(self.folder)}: {name}": hash_of(tensor)
            for path in sorted(self.folder.glob("out/**/*.pth"))
            for name, tensor in torch.load(path, weights_only=True).items()
        }
        (path,) = self.folder.glob("checkpoints/**/*.checkpoint.pt")
        checkpoint = torch.load(path, weights_only=True)
        model, optimizer = (checkpoint[name] for name in ("model", "optimizer"))
        return {
            "records": [json.loads(line) for line in self.metrics().splitlines()],
            "weights": weights,
            "float32 weights": {name: hash_of(tensor) for name, tensor in model.items()},
            "optimizer's state": sorted(map(hash_of, tensors_in(optimizer))),
        }


def run_script(script: Path, flags: list[str], log: Path, env: dict[str, Any]) -> None:
    """What `python script flags` does, in this process, with this program's libraries."""
    root = script.parent.parent
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (
        open(1, "w", encoding="utf-8", closefd=False),
        open(2, "w", encoding="utf-8", closefd=False),
    )
    os.environ.update({name: str(value) for name, value in env.items()})
    os.chdir(root)
    torch.set_num_threads(1)
    # drawing curves takes longer than these trainings
    matplotlib.figure.Figure.draw = lambda figure, renderer: None
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]  # of the version that this program runs in
    sys.path[:0] = [str(script.parent), str(root)]
    sys.argv = [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None)
        if name.split(".")[0] in PACKAGES and file and not Path(file).is_relative_to(root):
            raise ImportError(f"{name} was imported from {file}, not from {root}")


def run_all(trainings: list[Training], jobs: int, title: str) -> None:
    """Run them to their ends, `jobs` at a time."""
    waiting, running = list(trainings), []
    with tqdm(total=len(trainings), desc=title) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(0.02)
            for training in [each for each in running if each.ended()]:
                running.remove(training)
                bar.update()


def tensors_in(state: Any) -> list[torch.Tensor]:
    """All tensors of a nested state, whatever their names."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state
    nested = isinstance(state, dict | list | tuple)
    return [tensor for part in parts for tensor in tensors_in(part)] if nested else []


def hash_of(tensor: torch.Tensor) -> str:
    values = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + values).hexdigest()

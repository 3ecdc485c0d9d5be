"""Does each algorithm learn? Every stage on a small model that was left unfinished, several seeds.

    python benchmarks/learning/stages.py [--stage dpo grpo] [--seeds 42 43 44]    (make stages)

The model is the demo's (3.0M parameters, data of `python -m dataset.demo`), whose fine-tuning was
stopped before its learning rate had come down, so that it answers about half of the held-out
questions of the skills. It is trained once and kept in --output; so is everything that follows.
Then each stage is trained for some minutes with each seed, one training a core, by the commands in
the logs beside the weights, and measured on what is in no training file:

    skill_accuracy       greedy answers to held-out problems of 13 skills that are exactly right
    rule_reward          how far they agree with the truth, from 0 to 1
    preference_accuracy  held-out pairs whose better answer has the higher implicit reward,
                         log π/π_ref: DPO's own measure
    pair_accuracy        of the reward model: held-out pairs whose better answer scores higher
    kl                   nats that an answer (sampled at temperature 1) departs from the start
    length               tokens of an answer

with standard errors. Distillation, reasoning and tools have their own ways to measure, which
stage_distillation.py, stage_reason.py and stage_tools.py tell. The report has a row for each metric
that has a target: {stage, seed, metric, before, after, target, met}, the other figures beside it;
curves of each stage are drawn.
"""

import math
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import date
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import stage_distillation
import stage_reason
import stage_tools
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from trainings import run_trainer

from dataset.demo.files import load_tests, write_demo_data
from dataset.grading import grade
from dataset.lm_dataset import encode_chat, load_documents
from dataset.pairs import Pairs, collate_pairs
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.inference.generation import generate, prepare_to_decode
from model.inference.sampling import Sampling
from model.model_minimind import MiniMindForCausalLM
from model.weights import OUT, load_model, load_tokenizer, write_json
from scripts.runs.demo import COMMON, HIDDEN_SIZE, PRETRAIN, SFT
from trainer import (
    train_dpo,
    train_full_sft,
    train_grpo,
    train_ppo,
    train_pretrain,
    train_reward,
    train_spo,
)
from trainer.common.hardware import describe_machine
from trainer.rl.reference import completion_log_probs
from trainer.rl.rewards import similarity

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

BASE_STEPS = {"pretrain": 480, "full_sft": 750}  # of about 1,340, which the demo makes
FROM = "--from_weight {base}/full_sft_{size}.pth"
# Many different prompts in an update and few answers to each: prompts average the noise out.
RL = f"""{FROM} --data_path {{data}}/rlaif-mini.jsonl --val_share 0 --epochs 9
    --reward answer:0.5 similarity:0.5 --max_gen_len 48 --update_batch_size 64
    --rollout_batch_size 128 --num_workers 0 --learning_rate 2e-4"""
PAIRS = f"""{FROM} --data_path {{data}}/dpo.jsonl --val_path {{data}}/dpo_val.jsonl
    --val_documents 1000 --max_seq_len 256 --num_workers 0"""


@dataclass
class Stage:
    trainer: Any
    flags: str
    targets: dict[str, tuple[str, float]]  # metric → "at least" or "before and", and how much
    curve: str  # what of the log is drawn


UP_15 = {"skill_accuracy": ("gain", 0.15)}
STAGES = {
    "reward": Stage(
        train_reward,
        f"{PAIRS} --batch_size 8 --learning_rate 4e-4",
        {"pair_accuracy": ("level", 0.85)},
        "accuracy",
    ),
    "dpo": Stage(
        train_dpo,
        f"{PAIRS} --batch_size 16 --learning_rate 1e-5",
        {"preference_accuracy": ("level", 0.85), "skill_accuracy": ("gain", -0.03)},
        "accuracy",
    ),
    "ppo": Stage(
        train_ppo,
        f"{RL} --batch_size 128 --critic_learning_rate 2e-4 --kl_coef 0 --update_epochs 1 "
        "--max_steps 90",
        UP_15,
        "reward",
    ),
    "grpo": Stage(
        train_grpo,
        f"{RL} --batch_size 32 --num_generations 4 --loss_type dr_grpo --beta 0 --max_steps 110",
        UP_15,
        "reward",
    ),
    "spo": Stage(
        train_spo,
        f"{RL} --batch_size 128 --accumulation_steps 1 --beta 0.1 --max_steps 100",
        UP_15,
        "reward",
    ),
}


ELSEWHERE = {  # a function of a seed, which returns rows of the report
    "distillation": stage_distillation.distillation,
    "reason": stage_reason.reason,
    "toolcall": stage_tools.toolcall,
    "agent": stage_tools.agent,
}
KNOWN = [*STAGES, *ELSEWHERE]


@dataclass
class Args:
    stage: list[str] = option(KNOWN, "which stages")
    seeds: list[int] = option([42, 43, 44], "each stage is trained with each of them")
    questions: int = option(120, "held-out questions of each of the 13 skills at most")
    jobs: int = option(os.cpu_count() or 1, "trainings side by side, on a core each")
    output: str = option(str(OUT / "stages"), "folder of data, weights, logs and curves")
    json: str = option(str(OUT / "stages_report.json"), "the report")
    max_steps: int = option(0, "updates of each training at most, for a quick look; 0: all")


def main(args: Args) -> dict[str, Any]:
    unknown = set(args.stage) - set(KNOWN)
    if unknown:
        raise UserError(f"--stage: {min(unknown)} is unknown; there are {', '.join(KNOWN)}")
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {args.jobs}")
    started, console, out = time.time(), Console(highlight=False), Path(args.output)
    base = unfinished_model(console, out, args)
    measure = Measure(out / "data", base, args.questions)
    before = measure.policy(measure.base)
    told = ", ".join(f"{name} {value:.3f}" for name, value in before.items())
    console.print(f"unfinished model: {told}")
    for name, stage in (("distillation", stage_distillation), ("agent", stage_tools)):
        if name in args.stage:  # what its seeds have in common
            stage.prepare(base.parent, out / "data", out, args.max_steps, console)
    rows, curves = [], {name: {} for name in args.stage if name in STAGES}
    tasks = [(name, seed, args, before) for name in args.stage for seed in args.seeds]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), begin, (threads,)) as pool:
        futures = {pool.submit(train_and_measure, *task): task for task in tasks}
        for future in tqdm(as_completed(futures), total=len(futures), desc="trainings"):
            name, seed, *_ = futures[future]
            found, records = future.result()
            rows += found
            if name in STAGES:
                curves[name][seed] = records
            rows.sort(key=lambda row: (args.stage.index(row["stage"]), row["seed"]))
            report = {
                "date": str(date.today()),
                "machine": describe_machine(torch.device("cpu")),
                "jobs": args.jobs,
                "seconds": round(time.time() - started, 1),
                "unfinished": before,
                "questions": measure.count,
                "rows": rows,
            }
            if distilled := [row for row in rows if row["stage"] == "distillation"]:
                report["distillation"] = stage_distillation.verdict(distilled)
            write_json(args.json, report)  # after each: hours of others' time are not lost
    show(console, report)
    console.print(f"figures: {args.json}")
    if curves:
        draw(curves, out / "stages.png")
        console.print(f"curves:  {out / 'stages.png'}")
    return report


def unfinished_model(console: Console, out: Path, args: Args) -> Path:
    """Data and base model; made once, and gone on with where that was broken off."""
    base = out / "base"
    write_demo_data(out / "data", seed=42)
    kinds = ((train_pretrain, PRETRAIN, ""), (train_full_sft, SFT, "--lr_schedule constant"))
    for stage, flags, more in kinds:
        name = Path(stage.__file__).stem.removeprefix("train_")
        text = f"{flags} {COMMON} {more} --max_steps {BASE_STEPS[name]} --num_workers 0 --resume 1"
        words = [w.format(data=out / "data", out=base, device="cpu") for w in text.split()]
        run_trainer(console, stage, words, args.max_steps)
    return base / f"full_sft_{HIDDEN_SIZE}.pth"


def begin(threads: int) -> None:
    torch.set_num_threads(threads)


def train_and_measure(
    name: str, seed: int, args: Args, before: dict[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a report and the log of a training, which is all in a process of its own."""
    out = Path(args.output)
    with (
        open(out / f"{name}_{seed}.log", "w", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        console = Console(file=log, highlight=False)
        if name in ELSEWHERE:
            places = out / "base", out / "data", out
            return ELSEWHERE[name](seed, *places, args.max_steps, console), []
        result = train(console, name, seed, out, args)
        base = out / "base" / f"full_sft_{HIDDEN_SIZE}.pth"
        measure = measure_of(out / "data", base, args.questions)
        trained = out / f"{name}_{seed}_{HIDDEN_SIZE}.pth"
        after = measure.scorer(result) if name == "reward" else measure.policy(load_model(trained))
    after["seconds"] = round(result["seconds"], 1)
    return judged(name, seed, before, after), result["records"]


def train(console: Console, name: str, seed: int, out: Path, args: Args) -> dict[str, Any]:
    stage = STAGES[name]
    places = dict(base=out / "base", data=out / "data", size=HIDDEN_SIZE)
    words = [word.format(**places) for word in stage.flags.split()]
    words += f"--seed {seed} --save_weight {name}_{seed} --device cpu --log_interval 2".split()
    words += "--save_interval 0 --eval_interval 0".split()
    words += ["--save_dir", str(out), "--checkpoint_dir", str(out / "checkpoints")]
    return run_trainer(console, stage.trainer, words, args.max_steps)


# -- measuring -------------------------------------------------------------------------------------


class Measure:
    """The same held-out questions and pairs for every model."""

    def __init__(self, data: Path, base: Path, questions: int):
        self.base, self.tokenizer = load_model(base), load_tokenizer()
        self.questions = []
        counts: dict[str, int] = {}
        for row in load_tests(data)["skills"]:
            counts[row["skill"]] = counts.get(row["skill"], 0) + 1
            if counts[row["skill"]] <= questions:
                self.questions.append(row)
        self.prompts = [
            encode_chat(
                self.tokenizer,
                [{"role": "user", "content": row["prompt"]}],
                add_generation_prompt=True,
            ).ids
            for row in self.questions
        ]
        documents = load_documents(data / "dpo_val.jsonl", "preferences", self.tokenizer)
        self.pairs = Pairs(documents, 256)
        self.reference = self.pair_log_probs(self.base)

    @property
    def count(self) -> dict[str, int]:
        return {"questions": len(self.questions), "pairs": len(self.pairs)}

    def policy(self, model: MiniMindForCausalLM) -> dict[str, float]:
        """The figures of a language model."""
        sampling = Sampling(max_new_tokens=64, temperature=0)
        decoder = prepare_to_decode(load_copy(model))
        tokens = [
            reply
            for at in range(0, len(self.prompts), 128)
            for reply in generate(decoder, self.prompts[at : at + 128], sampling)
        ]
        replies = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        pairs = list(zip(self.questions, replies, strict=True))
        right = [grade(row["answer"], reply) for row, reply in pairs]
        log_ratios = self.pair_log_probs(model) - self.reference
        preferred = (log_ratios[:, 0] > log_ratios[:, 1]).float()
        return {
            "skill_accuracy": sum(right) / len(right),
            "skill_accuracy_error": standard_error(sum(right) / len(right), len(right)),
            "rule_reward": sum(similarity(r, row["answer"]) for row, r in pairs) / len(pairs),
            "preference_accuracy": preferred.mean().item(),
            "preference_accuracy_error": standard_error(preferred.mean().item(), len(preferred)),
            "kl": self.distance(model, decoder),
            "length": sum(map(len, tokens)) / len(tokens),
        }

    @torch.no_grad()
    def pair_log_probs(self, model: MiniMindForCausalLM) -> torch.Tensor:
        """[pairs, 2]"""
        found = []
        for at in range(0, len(self.pairs), 32):
            some = [self.pairs[n] for n in range(at, min(at + 32, len(self.pairs)))]
            found.append(completion_log_probs(model, collate_pairs(some)))
        return torch.cat(found)

    @torch.no_grad()
    def distance(self, model: MiniMindForCausalLM, decoder: MiniMindForCausalLM) -> float:
        """KL(model ‖ base) of an answer, estimated from 256 sampled ones."""
        prompts = self.prompts[:: max(1, len(self.prompts) // 256)]
        replies = generate(decoder, prompts, Sampling(64, seed=0))
        total = 0.0
        for prompt, reply in zip(prompts, replies, strict=True):
            ids = torch.tensor([prompt + reply])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            both = (m(ids, labels=labels, return_log_probs=True) for m in (model, self.base))
            own, theirs = (each.log_probs.sum().item() for each in both)
            total += own - theirs
        return total / len(prompts)

    def scorer(self, result: dict[str, Any]) -> dict[str, float]:
        """The figures of a reward model, by its own evaluation at its end."""
        accuracy = result["val_accuracy"]
        return {
            "pair_accuracy": accuracy,
            "pair_accuracy_error": standard_error(accuracy, len(self.pairs)),
        }


measure_of = cache(Measure)  # a process measures several models


def load_copy(model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """`prepare_to_decode` makes a model unfit for anything else."""
    same = MiniMindForCausalLM(model.config)
    same.load_state_dict(model.state_dict())
    return same.eval()


def standard_error(share: float, count: int) -> float:
    return math.sqrt(share * (1 - share) / count)


def judged(stage: str, seed: int, before: dict, after: dict) -> list[dict[str, Any]]:
    """A row for each metric that has a target."""
    rows = []
    for metric, (kind, amount) in STAGES[stage].targets.items():
        start = before.get(metric, 0.5)  # a reward model scores everything alike at first
        target = start + amount if kind == "gain" else amount
        beside = {name: value for name, value in after.items() if name != metric}
        rows.append(
            dict(stage=stage, seed=seed, metric=metric, before=start, after=after[metric])
            | dict(target=target, met=after[metric] >= target, beside=beside)
        )
    return rows


def draw(curves: dict[str, dict[int, list[dict]]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(curves), figsize=(3.4 * len(curves), 3), squeeze=False)
    for axis, (name, seeds) in zip(axes[0], curves.items(), strict=True):
        what = STAGES[name].curve
        for seed, records in seeds.items():
            points = [(r["step"], r[what]) for r in records if r.get(what) is not None]
            axis.plot(*zip(*points, strict=True), linewidth=1, label=f"seed {seed}")
        axis.set(title=name, xlabel="update", ylabel=f"{what} while training")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def show(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="held out, before and after (± standard error)", title_justify="left")
    for name in ("stage", "seed", "metric", "before", "after", "target", "", "KL", "length", "s"):
        table.add_column(name, justify="left" if name in ("stage", "metric", "") else "right")
    for row in report["rows"]:
        each = SimpleNamespace(**row)
        form = "{:.3f}" if each.metric.endswith("loss") else "{:.1%}"
        error = each.beside.get(f"{each.metric}_error")
        table.add_row(
            each.stage,
            str(each.seed),
            each.metric,
            form.format(each.before),
            form.format(each.after) + (f" ± {form.format(error)}" if error else ""),
            form.format(each.target),
            "[green]met[/green]" if each.met else "[red]missed[/red]",
            f"{each.beside['kl']:.2f}" if "kl" in each.beside else "",
            f"{each.beside['length']:.1f}" if "length" in each.beside else "",
            f"{each.beside['seconds']:.0f}",
        )
    console.print(table)
    for mean in report.get("distillation", []):
        gain, error = mean["gain"], mean["error"]
        said = "more" if mean["met"] else "not more"
        metric = f"distillation, mean of the seeds: {mean['metric']} better by {gain:.4f}"
        console.print(f"{metric} ± {error:.4f}, {said} than two standard errors")
    console.print(f"{report['machine']}, {report['date']}, {report['seconds'] / 60:.0f} min in all")


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))

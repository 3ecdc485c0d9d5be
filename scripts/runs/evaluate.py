"""How good each stage of a run is, on data that none of them was trained on.

    python scripts/runs/evaluate.py --save_dir out/minimind --data_dir DIR

Bits per byte of the held-out pretraining text by language, as scripts/eval_ppl.py measures them;
how often the chosen answer of a held-out preference pair is likelier, per token, than the rejected
one; and, where the run has a reward model, its scores of greedy answers to held-out prompts. If RL
was trained against that very model, its scores rise even where answers get no better: then read the
answers. Each with its standard error, in results.json. What a stage has is not measured again,
unless its weights have changed. The held-out rows are those that the trainers hold out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.command_line import option, parse_arguments, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT
from scripts.runs.stages import (
    STAGES,
    check_finished,
    data_dir_of,
    finished_stages,
    read_json,
    read_plan,
    stopped_quietly,
    weights_of,
)


@dataclass
class Args:
    save_dir: str = option(str(OUT / "minimind"), "folder of the weights")
    data_dir: str = option("", "folder of the data files; default: as in the run's plan")
    stages: list[str] = option([], "stages to evaluate; default: those that are finished")
    documents: int = option(300, "most held-out texts, and pairs", at_least=1)
    prompts: int = option(64, "most held-out prompts", at_least=1)
    device: str = option("auto", "auto, cuda, cuda:1, mps or cpu")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import math
import shlex
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from dataset.released import resolve_data_path
from dataset.text import language_of
from model.weights import load_tokenizer, write_json
from scripts.eval_ppl import CHARACTERS, document_bits, encode, summarize, summarize_by
from scripts.runs.questions import fingerprint, load_stage
from scripts.serving.loading import ChatModel
from trainer import train_dpo, train_grpo, train_pretrain
from trainer.common import hardware
from trainer.common.context import Context
from trainer.common.evaluation import completion_log_probs, map_pairs
from trainer.common.setup import load_pairs, load_split
from trainer.rl.prompts import read_prompts
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import generate_greedy

REWARD_TOKENS = 128  # most of an answer that the reward model scores
Measure = Callable[[ChatModel], dict[str, Any]]


def main(args: Args) -> dict[str, Any]:
    """{stage: {"weights", "fingerprint", "text", "preferences", "reward"}}"""
    folder, output = Path(args.save_dir), Path(args.save_dir) / "results.json"
    results = read_json(output)
    if not args.stages:
        check_finished(STAGES, read_plan(folder), folder)
    stages = [name for name in args.stages or finished_stages(folder) if name != "reward"]
    if not stages:
        raise UserError(f"{folder} has no finished stage to evaluate; --stages names others")
    measures: dict[str, Measure | None] = {}
    for stage in stages:
        weights = weights_of(stage, folder)
        if weights is None:
            raise UserError(f"{folder} has no weights of {stage}")
        now, known = fingerprint(weights), results.get(stage, {})
        if known.get("fingerprint") != now:
            known = {"weights": weights.name, "fingerprint": now}
        todo = [name for name in MEASURES if name not in known]
        if stage == "pretrain":  # it knows no conversations
            todo = [name for name in todo if name == "text"]
        for name in set(todo) - measures.keys():
            measures[name] = MEASURES[name](args)
        if todo := [name for name in todo if measures[name]]:
            print(f"evaluating {STAGES[stage].title}: {weights.name}")
            loaded = load_stage(stage, folder, args.device, decode_only=False)
            known |= {name: measures[name](loaded) for name in todo}
        results[stage] = known
        write_json(output, results)
    results = {name: results[name] for name in STAGES if name in results}
    write_json(output, results)
    show(results)
    print(f"written: {output}")
    return results


# -- what is measured ------------------------------------------------------------------------------
# Each function loads held-out data once, and returns what measures a model on them; None if the
# run has no such data.


def texts(args: Args) -> Measure | None:
    """Bits per byte of the first 500 characters of each text."""
    ctx = context(train_pretrain, args)
    if ctx is None:
        return None
    tokenizer = load_tokenizer(ctx.args.tokenizer_path)
    _, _, documents, indices = load_split(ctx, tokenizer, "text")
    rows = (documents[int(index)]["input_ids"] for index in indices)
    held_out = [tokenizer.decode(row, skip_special_tokens=True)[:CHARACTERS] for row in rows]
    held_out = [text for text in held_out if text]
    if not held_out:
        return None

    def measure(loaded: ChatModel) -> dict[str, Any]:
        bits = document_bits(loaded.model, encode(loaded.tokenizer, held_out))
        return summarize(held_out, bits) | {"languages": summarize_by(language_of, held_out, bits)}

    return measure


def preferences(args: Args) -> Measure | None:
    """How often the chosen answer has the higher mean log-probability of its tokens."""
    ctx = context(train_dpo, args)
    if ctx is None:
        return None
    _, pairs = load_pairs(ctx, load_tokenizer(ctx.args.tokenizer_path))
    if pairs is None:
        return None

    def measure(loaded: ChatModel) -> dict[str, Any]:
        log_probs = map_pairs(ctx, loaded.model, loaded.tokenizer, pairs, completion_log_probs)
        means = log_probs.cpu() / torch.as_tensor(pairs.completion_lengths)
        right = (means[:, 0] > means[:, 1]).float()
        return mean_and_error(right) | {"pairs": len(right)}

    return measure


def rewards(args: Args) -> Measure | None:
    """The run's reward model on greedy answers to held-out prompts."""
    ctx = context(train_grpo, args, val_documents=args.prompts, max_gen_len=REWARD_TOKENS)
    scorer = weights_of("reward", args.save_dir)
    if ctx is None or scorer is None:
        return None
    ctx = replace(ctx, args=replace(ctx.args, reward=["model"]))
    tokenizer = load_tokenizer(ctx.args.tokenizer_path)
    score = Rewards(ctx, tokenizer, int(scorer.stem.split("_")[1]))
    _, held_out = read_prompts(ctx, tokenizer, score.can_score)
    if held_out is None:
        return None

    def measure(loaded: ChatModel) -> dict[str, Any]:
        answers = generate_greedy(ctx, loaded.model, loaded.tokenizer, held_out.prompts)
        values, _ = score(answers)
        lengths = torch.tensor([len(each.tokens) for each in answers])
        ended = sum(each.terminated for each in answers) / len(answers)
        about = {"prompts": len(answers), "tokens": lengths.float().mean().item(), "ended": ended}
        return mean_and_error(values) | about

    return measure


MEASURES: dict[str, Callable[[Args], Measure | None]] = {
    "text": texts,
    "preferences": preferences,
    "reward": rewards,
}


def context(trainer: Any, args: Args, **settings: Any) -> Context | None:
    """The arguments of a trainer as in the run, and the device; None if it has no data."""
    plan = read_plan(args.save_dir)
    places = [
        "--data_dir",
        args.data_dir or data_dir_of(args.save_dir),
        "--save_dir",
        args.save_dir,
    ]
    argv = [*places, *shlex.split(plan.get("flags", "")), "--device", args.device]
    settings = {"val_documents": args.documents} | settings
    arguments = replace(parse_arguments(trainer.Args, argv=argv), **settings)
    try:
        resolve_data_path(arguments)
    except UserError:
        return None
    device = hardware.resolve_device(args.device)
    return Context(arguments, device, hardware.resolve_dtype(arguments.dtype, device), False)


def mean_and_error(values: torch.Tensor) -> dict[str, float]:
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": round(values.mean().item(), 4), "standard_error": error and round(error, 4)}


def show(results: dict[str, Any]) -> None:
    table = Table(title="held-out data, ± standard error", title_justify="left")
    for name in ("stage", "bits/byte", "English", "Chinese", "pairs right", "reward"):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for stage, found in results.items():
        text = found.get("text", {})
        bits = [text, *(text.get("languages", {}).get(name) for name in ("en", "zh"))]
        cells = [with_error(each, "bits_per_byte") for each in bits]
        others = [with_error(found.get(name), "mean") for name in ("preferences", "reward")]
        table.add_row(stage, *cells, *others)
    Console(highlight=False).print(table)


def with_error(found: dict[str, Any] | None, name: str) -> str:
    """0.612 ±0.021"""
    if not found:
        return ""
    error = found["standard_error"]
    return f"{found[name]:.3f}" + (f" ±{error:.3f}" if error is not None else "")


if __name__ == "__main__":
    with exit_on_user_error(), stopped_quietly():
        main(args)

"""The trainers' memory forecast against measured memory, and a table of batch sizes that fit.

    python benchmarks/speed/memory.py [--case sft dpo] [--json FILE]

Each case trains a model with random weights for two steps on the CPU, on rows of full length, in a
process of its own. Measured is its peak memory minus that before the model was made. Estimated is
what the trainer prints before its first step (hardware.py, training_memory):

    bytes = weights · 4 · (1 + 1 gradient + 1 moment with Muon or 2 with AdamW) + reference · 4
            + rows · tokens · (size · layers · (12 · hidden + 4 · intermediate) + logits)

where size is 4 and logits 1 · vocabulary in float32, 3 and 14 · vocabulary under autocast. PPO's
critic doubles all but the reference.

Then, by the same formula, for a GPU with bfloat16 autocast and a tenth of its memory free: the
number of rows of 512 and of 1,024 tokens per forward pass (--batch_size; in RL
--update_batch_size; a pair of DPO is two rows).
"""

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm

from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindForScoring
from model.weights import count_parameters, load_tokenizer, save_weights, write_json
from trainer import train_dpo, train_full_sft, train_grpo, train_ppo
from trainer.common.hardware import describe_machine, training_memory
from trainer.train_ppo import ActorCritic

SIZES = {"26M": (512, 8), "104M": (768, 16)}
USABLE = 0.9  # share of a GPU's memory that may be used


class Case(NamedTuple):
    trainer: Any
    rows_per_sample: int  # rows per sample of the batch
    reference: bool  # whether there is a frozen reference model
    flags: str = ""


RL = "--reward length --max_seq_len {half} --max_gen_len {half} --batch_size 2 --max_steps 2"
CASES = {
    "sft": Case(train_full_sft, 1, False, "--max_seq_len {tokens} --batch_size {rows}"),
    "dpo": Case(train_dpo, 2, False, "--max_seq_len {tokens} --batch_size {rows}"),
    "grpo": Case(train_grpo, 1, True, RL + " --update_batch_size {rows} --num_generations 4"),
    "ppo": Case(train_ppo, 1, True, RL + " --update_batch_size {rows} --num_generations 4"),
}


@dataclass
class Args:
    case: list[str] = option(list(CASES), "cases to measure")
    tokens: int = option(512, "length of a row, in tokens; in RL half of it is generated")
    rows: int = option(8, "rows (DPO: pairs) per forward pass")
    hidden_size: int = option(512, "hidden size of the measured model")
    num_hidden_layers: int = option(8, "number of layers of the measured model")
    measure: str = option("", "internal: measure this case in this process")
    json: str = option("", "also write the results to this file")


def main(args: Args) -> dict[str, Any]:
    unknown = set(args.case) - set(CASES)
    if unknown:
        raise UserError(f"--case: {min(unknown)} is unknown; known are {', '.join(CASES)}")
    if args.measure:
        print(json.dumps(measure(args)))
        return {}
    names = ("tokens", "rows", "hidden_size", "num_hidden_layers")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    measured = {}
    for case in tqdm(args.case, desc="measured"):
        command = [sys.executable, __file__, f"--measure={case}", *flags]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"{case} failed: {result.stderr.strip().splitlines()[-1]}")
        measured[case] = json.loads(result.stdout.splitlines()[-1])
    report = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "arguments": vars(args),
        "measured": measured,
        "fitting": fitting(),
    }
    show(report)
    if args.json:
        write_json(args.json, report)
    return report


def measure(args: Args) -> dict[str, float]:
    """Estimated and measured GB of two steps."""
    case, tokenizer = CASES[args.measure], load_tokenizer()
    model = random_model(args.hidden_size, args.num_hidden_layers)
    fixed, per_token = estimate_bytes(args.measure, model, torch.float32, "muon")
    rows = args.rows * case.rows_per_sample
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_weights(model, folder / "start.pth", stage="start", tokenizer=tokenizer, origin={})
        write_rows(args, tokenizer, folder / "rows.jsonl")
        sizes = dict(tokens=args.tokens, half=args.tokens // 2, rows=args.rows)
        flags = f"""{case.flags} --data_path {folder}/rows.jsonl --from_weight {folder}/start.pth
            --save_dir {folder}/out --checkpoint_dir {folder}/out --val_share 0 --save_interval 0
            --max_steps 2 --num_workers 0 --device cpu --dtype float32""".format(**sizes)
        del model
        before = peak_gb()
        case.trainer.main(parse_arguments(case.trainer.Args, argv=flags.split()))
    return {
        "estimated_gb": (fixed + per_token * rows * args.tokens) / 1e9,
        "measured_gb": peak_gb() - before,
    }


def random_model(hidden_size: int, num_hidden_layers: int) -> MiniMindForCausalLM:
    sizes = dict(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers)
    return MiniMindForCausalLM(MiniMindConfig(**sizes))


def estimate_bytes(
    case: str, model: MiniMindForCausalLM, dtype: torch.dtype, optimizer: str
) -> tuple[float, float]:
    """Fixed bytes, with the reference model, and bytes per token."""
    trained: nn.Module = model
    if case == "ppo":
        trained = ActorCritic(model, MiniMindForScoring(model.config))
    device = torch.device("cpu" if dtype == torch.float32 else "cuda")
    fixed, per_token = training_memory(model.config, trained, device, dtype, optimizer, False)
    return fixed + 4 * count_parameters(model) * CASES[case].reference, per_token


def write_rows(args: Args, tokenizer, path: Path) -> None:
    """Write rows of full length, more than are used: one word per token."""
    words = " one two three four five six seven eight nine ten" * args.tokens
    ids = tokenizer(words).input_ids

    def text(count: int) -> str:
        return tokenizer.decode(ids[:count])

    question = {"role": "user", "content": text(args.tokens // 2 - 16)}
    answers = [text(args.tokens // 2 - 8), text(args.tokens // 2 - 9)]
    turns = [[question, {"role": "assistant", "content": answer}] for answer in answers]
    row = {"conversations": turns[0], "chosen": turns[0], "rejected": turns[1]}
    path.write_text((json.dumps(row) + "\n") * 64, encoding="utf-8")


def peak_gb() -> float:
    """Peak memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def fitting() -> list[dict[str, Any]]:
    """Batch sizes that fit on GPUs of 8 and 24 GB."""
    rows = []
    for size, (width, depth) in SIZES.items():
        with torch.device("meta"):  # shapes without memory
            model = random_model(width, depth)
        for case, about in CASES.items():
            fixed, per_token = estimate_bytes(case, model, torch.bfloat16, "muon")
            row: dict[str, Any] = {"model": size, "stage": case}
            for gb in (8, 24):
                for tokens in (512, 1024):
                    unit = per_token * tokens * about.rows_per_sample
                    row[f"{gb} GB, {tokens}"] = int((USABLE * gb * 1e9 - fixed) / unit)
            rows.append(row)
    return rows


def show(report: dict[str, Any]) -> None:
    args, console = report["arguments"], Console()
    about = f"{args['hidden_size']}x{args['num_hidden_layers']}, {args['rows']} of {args['tokens']}"
    table = Table("stage", title=f"GB on the CPU in float32, {about} tokens", title_justify="left")
    for column in ("estimated", "measured", "estimated/measured"):
        table.add_column(column, justify="right")
    for case, row in report["measured"].items():
        estimated, measured = row["estimated_gb"], row["measured_gb"]
        table.add_row(case, f"{estimated:.2f}", f"{measured:.2f}", f"{estimated / measured:.2f}")
    console.print(table)
    first, *_ = report["fitting"]
    table = Table(title="rows (pairs) at once in bfloat16, by the estimate", title_justify="left")
    for column in first:
        table.add_column(column, justify="right" if "GB" in column else "left")
    for row in report["fitting"]:
        table.add_row(*map(str, row.values()))
    console.print(table)
    print(f"{report['machine']}, {report['date']}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))

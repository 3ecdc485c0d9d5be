"""What a CPU gains by bfloat16: a matrix product, a training step by model size, its parts.

    python benchmarks/speed/dtype_speed.py [--sizes 256x8 512x8] [--rows 8]

Float32 and bfloat16 take turns in one process, and the median of each is compared. `forward and
backward` is a batch of --rows random sequences of 512 tokens with its loss, under autocast in
bfloat16; `optimizer` is Muon's step, whose orthogonalisation is in bfloat16 too. Whether a model
learns as much is another question: benchmarks/learning/scaling_law.py --recipe "--dtype float32"
trains the same runs in float32.
"""

from dataclasses import dataclass
from pathlib import Path

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error


@dataclass
class Args:
    sizes: list[str] = option(["128x4", "256x8", "512x8"], "models, width x depth")
    rows: int = option(8, "sequences of 512 tokens in a batch", at_least=1)
    rounds: int = option(5, "steps of each type that are timed, after one that is not", at_least=1)
    threads: int = option(0, "threads; 0: as many as there are cores", at_least=0)
    json: str = option("", "file for the figures")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import re
import time
from datetime import date
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import count_parameters, write_json
from trainer.common import hardware
from trainer.common.optimizers import make_optimizer

LENGTH = 512
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)


def main(args: Args) -> dict[str, Any]:
    if wrong := [each for each in args.sizes if not re.fullmatch(r"\d+x\d+", each)]:
        raise UserError(f"--sizes are width x depth, such as 256x8, not {wrong[0]}")
    if args.threads:
        torch.set_num_threads(args.threads)
    result = {
        "date": str(date.today()),
        "machine": hardware.describe_machine(CPU),
        "threads": torch.get_num_threads(),
        "product_gain": round(hardware.bfloat16_gain(), 2),
        "sizes": [measure(size, args.rows, args.rounds) for size in args.sizes],
    }
    show(result, args.rows)
    if args.json:
        write_json(Path(args.json), result)
    return result


def measure(size: str, rows: int, rounds: int) -> dict[str, Any]:
    """Seconds of each part in each type, the median of all rounds."""
    width, depth = map(int, size.split("x"))
    ids = torch.randint(3, 6400, (rows, LENGTH))
    models, optimizers = {}, {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        config = MiniMindConfig(hidden_size=width, num_hidden_layers=depth)
        models[dtype] = MiniMindForCausalLM(config).train()
        optimizers[dtype] = make_optimizer(models[dtype], "muon", 5e-4, 0.1, dtype)
    seconds: dict[torch.dtype, list[tuple[float, float]]] = {dtype: [] for dtype in DTYPES}
    for number in tqdm(range(rounds + 1), desc=size, leave=False):
        for dtype in DTYPES:
            start = time.perf_counter()
            with hardware.autocast(CPU, dtype):
                loss = models[dtype](ids, labels=ids, return_logits=False).loss
            loss.backward()
            middle = time.perf_counter()
            optimizers[dtype].step()
            optimizers[dtype].zero_grad()
            if number:
                seconds[dtype].append((middle - start, time.perf_counter() - middle))
    found: dict[str, Any] = {"size": size, "parameters": count_parameters(models[torch.float32])}
    for dtype, each in seconds.items():
        step, optimizer = (median(part) for part in zip(*each, strict=True))
        name = str(dtype).removeprefix("torch.")
        found[name] = {"forward_backward": round(step, 4), "optimizer": round(optimizer, 4)}
    return found


def show(result: dict[str, Any], rows: int) -> None:
    console = Console(highlight=False)
    console.print(
        f"{result['machine']}, {result['threads']} threads: bfloat16 products are "
        f"{result['product_gain']:.1f} times as fast as float32's"
    )
    table = Table(title=f"batches of {rows} x {LENGTH} tokens", title_justify="left")
    for name in ("model", "parameters", "", "float32", "bfloat16", "ratio"):
        table.add_column(name, justify="left" if name in ("model", "") else "right")
    for each in result["sizes"]:
        first = [each["size"], f"{each['parameters'] / 1e6:.1f}M"]
        for part, title in (
            ("forward_backward", "forward and backward, tokens/s"),
            ("optimizer", "optimizer, ms"),
        ):
            times = [each[name][part] for name in ("float32", "bfloat16")]
            shown = [
                f"{rows * LENGTH / value:,.0f}"
                if part == "forward_backward"
                else f"{1e3 * value:.0f}"
                for value in times
            ]
            table.add_row(*first, title, *shown, f"{times[0] / times[1]:.2f}")
            first = ["", ""]
    console.print(table)


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

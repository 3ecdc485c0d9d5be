"""What checking a file's checksum adds to reading it.

    python benchmarks/speed/checksum_cost.py [--size 512x8] [--tokens 200000000]

The files are those that a training reads: weights in float16, a checkpoint of the same model
(weights and Muon's moments in float32), and a token cache. Each is read with and without the check
in turn, and the medians are compared: once from memory, where the system keeps files that it has
just read, and once from the disk (cold), for which the system is asked to forget them (Linux).
Weights are copied, as into a model. A cache is mapped, and a training reads each token once.
"""

import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error


@dataclass
class Args:
    size: str = option("512x8", "width x depth of the model")
    tokens: int = option(200_000_000, "tokens of the cache", at_least=1)
    rounds: int = option(5, "readings of each kind", at_least=1)
    folder: str = option("", "folder on the disk to measure; default: the system's for such files")
    json: str = option("", "file for the figures")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+x\d+", self.size):
            raise UserError(f"--size is width x depth, such as 256x8, not {self.size}")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from model.formats.files import add_checksum, verify
from model.formats.minimind_format import load_tensors, save_tensors
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import write_json
from trainer.common.hardware import describe_machine


def main(args: Args) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        files = write_files(args, Path(folder))
        rows = []
        for name, (path, read) in tqdm(files.items(), desc="reading", leave=False):
            times = measure(path, read, args.rounds)
            rows.append({"file": name, "megabytes": path.stat().st_size / 1e6, **times})
    result = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "files": rows,
    }
    show(result)
    if args.json:
        write_json(args.json, result)
    return result


def write_files(args: Args, folder: Path) -> dict[str, tuple[Path, Callable[[Path], None]]]:
    """A file of each kind, and how it is read without a check."""
    width, depth = map(int, args.size.split("x"))
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=width, num_hidden_layers=depth))
    state = model.state_dict()
    weights, checkpoint, cache = folder / "weights.pth", folder / "run.pt", folder / "cache.arrow"
    save_tensors(weights, {name: tensor.half() for name, tensor in state.items()})
    moments = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    save_tensors(checkpoint, {"model": state, "optimizer": moments})
    ids = np.random.default_rng(0).integers(6400, size=args.tokens, dtype=np.uint16)
    batch = pa.record_batch([pa.array(ids)], names=["input_ids"])
    with open(cache, "w+b") as file:
        with pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
        add_checksum(file)
    return {
        "weights": (weights, read_tensors),
        "checkpoint": (checkpoint, read_tensors),
        "token cache": (cache, read_tokens),
    }


def read_tensors(path: Path) -> None:
    content = load_tensors(path, "", check=False)
    for part in content.values():
        for tensor in part.values() if isinstance(part, dict) else [part]:
            tensor.clone()


def read_tokens(path: Path) -> None:
    with pa.memory_map(str(path)) as file:
        for column in pa.ipc.open_stream(file).read_all().columns:
            column.to_numpy().astype(np.int64).sum()


def measure(path: Path, read: Callable[[Path], None], rounds: int) -> dict[str, float]:
    """Median seconds of reading, and of checking before, from memory and from the disk."""
    times: dict[str, list[float]] = {}
    for cold in (False, True):
        for _ in range(rounds):
            for check in (False, True):
                if cold:
                    forget(path)
                started = time.perf_counter()
                if check:
                    verify(path, "")
                read(path)
                name = f"{'cold' if cold else 'warm'}{'_checked' if check else ''}"
                times.setdefault(name, []).append(time.perf_counter() - started)
    return {name: median(each) for name, each in times.items()}


def forget(path: Path) -> None:
    """Have the system read the file from its disk the next time."""
    if not hasattr(os, "posix_fadvise"):
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(result: dict[str, Any]) -> None:
    table = Table(title=result["machine"], title_justify="left")
    table.add_column("file", no_wrap=True)
    for name in ("MB", "read, ms", "checked", "more", "from disk, ms", "checked", "more"):
        table.add_column(name, justify="right")
    for each in result["files"]:
        cells = [each["file"], f"{each['megabytes']:,.0f}"]
        for kind in ("warm", "cold"):
            plain, checked = each[kind], each[f"{kind}_checked"]
            cells += [f"{1e3 * plain:,.0f}", f"{1e3 * checked:,.0f}", f"{checked / plain - 1:+.0%}"]
        table.add_row(*cells)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

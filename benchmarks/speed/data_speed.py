"""Speed and memory of data loading: from JSONL files to packed rows.

    python benchmarks/speed/data_speed.py [--data_path FILE] [--gigabytes 5] [--json FILE]

Two measurements on the rows of --data_path (default: the project's demo data), which are repeated
in a JSONL file until it has the size that is needed:

1. --megabytes, in this process: `load_documents` with an empty cache (read, tokenise on all cores,
   write the Arrow file), then `PackedDataset` (packing). In turn with it, medians of --rounds: the
   `tokenizers` library alone on the same texts, which are in memory, with a thread a core; and for
   conversations `load_documents` with the chat template rendered by Jinja.
2. --gigabytes (0: skip), as a user would: the trainer of this format, started by its command line
   with a tiny model for two steps. Measured are the time from the start of the process until its
   log has the first step, and the peak memory. The goal: less than 2 GB for any size.

MB and GB are 10^6 and 10^9 bytes; speeds are in bytes of uncompressed JSONL. The trainer's
token cache is in the temporary folder and is deleted with it. --work_dir needs about twice
--gigabytes of free space.

Memory is that of the process and all its children, sampled ten times per second, as proportional
set size (PSS, on Linux): a page that several processes share (libraries, inherited pages of forked
workers, the memory-mapped token file) is divided among them. The sum of resident sizes would count
such a page several times; the sum of unique set sizes (USS, used where there is no PSS) would omit
it.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Literal

from dataset.jsonl import check_file, read_lines, read_rows
from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import ROOT


@dataclass
class Args:
    data_path: str = option("", "rows to repeat, .jsonl or .jsonl.gz; default: the demo data")
    kind: Literal["", "text", "conversations"] = option(
        "", "format of the data; default: that of the first row"
    )
    megabytes: float = option(100.0, "size of the file to tokenise and pack in this process")
    rounds: int = option(3, "times that each is measured, in turn", at_least=1)
    gigabytes: float = option(5.0, "size of the file to start a training on; 0: skip")
    max_seq_len: int = option(512, "length of a row, in tokens")
    work_dir: str = option("", "parent of the temporary folder; default: the system's")
    json: str = option("", "also write the results to this file")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import psutil
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from dataset.chat_template import ChatTemplate
from dataset.demo.files import write_demo_data
from dataset.encoding import SEGMENTERS
from dataset.lm_dataset import LINES_PER_CHUNK, load_documents
from dataset.packing import PackedDataset
from model.weights import load_tokenizer, write_json
from trainer.common.hardware import describe_machine

DEMO_FILES = {"text": "pretrain_hq.jsonl", "conversations": "sft_mini_512.jsonl"}
STAGES = {"text": "pretrain", "conversations": "full_sft"}
SAMPLE_SECONDS = 0.1
HIDDEN_SIZE = 64  # of the model in the second measurement


def main(args: Args) -> dict[str, Any]:
    if args.megabytes <= 0 or args.gigabytes < 0:
        raise UserError("--megabytes must be above 0, and --gigabytes at least 0")
    with temporary_folder(args.work_dir) as folder:
        if args.data_path:
            source = check_file(args.data_path)
            kind = args.kind or detect_kind(source)
        else:
            kind = args.kind or "text"
            write_demo_data(folder / "demo")
            source = folder / "demo" / DEMO_FILES[kind]
        report: dict[str, Any] = {
            "date": str(date.today()),
            "machine": describe_machine(torch.device("cpu")),
            "data": source.name,
            "kind": kind,
        }
        report |= tokenise_and_pack(source, kind, args, folder)
        if args.gigabytes:
            report["training"] = start_training(source, kind, args, folder)
    print_report(report)
    if args.json:
        write_json(args.json, report)
    return report


# -- data ------------------------------------------------------------------------------------------


@contextmanager
def temporary_folder(directory: str) -> Iterator[Path]:
    """A folder that is deleted at the end; UserError if it cannot be made in `directory`."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="minimind_", dir=directory or None)
    except OSError as error:
        raise UserError(f"--work_dir {directory}: {error.strerror}") from None
    with folder as name:
        yield Path(name)


def detect_kind(path: Path) -> str:
    """The format of a file by its first row: "text" or "conversations"."""
    _, row = next(read_rows(path), (0, {}))
    for kind in STAGES:
        if kind in row:
            return kind
    raise UserError(f'the first row of {path} has neither "text" nor "conversations"')


def write_repeated(source: Path, target: Path, size: float) -> int:
    """Repeat the lines of `source` in `target` until it has `size` bytes. Returns its actual size:
    the last line is not cut."""
    written = 0
    bar = tqdm(total=int(size), unit="B", unit_scale=True, desc="writing", leave=False)
    with open(target, "wb") as out, bar:
        while written < size:
            before = written
            for _, line in read_lines(source):
                new = out.write(line if line.endswith(b"\n") else line + b"\n")
                written += new
                bar.update(new)
                if written >= size:
                    break
            if written == before:
                raise UserError(f"{source} is empty")
    return written


# -- memory ----------------------------------------------------------------------------------------


class PeakMemory:
    """Peak memory of a process and its children while `watching`."""

    def __init__(self, pid: int):
        self.process = psutil.Process(pid)
        self.bytes = 0

    @contextmanager
    def watching(self) -> Iterator["PeakMemory"]:
        done = threading.Event()

        def sample() -> None:
            over = False
            while not over:
                over = done.wait(SAMPLE_SECONDS)
                self.bytes = max(self.bytes, self.now())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()

    def now(self) -> int:
        total = 0
        with suppress(psutil.Error):  # a process may end while it is measured
            for process in (self.process, *self.process.children(recursive=True)):
                with suppress(psutil.Error):
                    memory = process.memory_full_info()
                    total += getattr(memory, "pss", memory.uss)
        return total


# -- the two measurements --------------------------------------------------------------------------


def tokenise_and_pack(source: Path, kind: str, args: Args, folder: Path) -> dict[str, Any]:
    """Speed and memory of `load_documents`, the cache empty, and of `PackedDataset`."""
    tokenizer = load_tokenizer()
    data = folder / "sample.jsonl"
    size = write_repeated(source, data, args.megabytes * 1e6)

    seconds: dict[str, list[float]] = {"tokenise": [], "library": []}
    if kind == "conversations":
        seconds["with_jinja"] = []
    with PeakMemory(os.getpid()).watching() as tokenising:  # not timed: watching takes time itself
        load_documents(data, kind, tokenizer, cache=folder / "cache_watched")
    texts = rendered_texts(data, kind)
    for number in range(args.rounds):
        for name, times in seconds.items():
            ChatTemplate.without_jinja = name != "with_jinja"
            # load_documents has processes instead of threads, and switches threads off
            os.environ["TOKENIZERS_PARALLELISM"] = "true" if name == "library" else "false"
            start = time.perf_counter()
            if name == "library":
                for at in range(0, len(texts), LINES_PER_CHUNK):
                    chunk = texts[at : at + LINES_PER_CHUNK]
                    tokenizer.backend_tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
            else:
                cache = folder / f"cache_{name}_{number}"
                documents = load_documents(data, kind, tokenizer, cache=cache)
            times.append(time.perf_counter() - start)
    del texts
    start = time.perf_counter()
    rows = PackedDataset(documents, args.max_seq_len)
    packed = time.perf_counter() - start
    with PeakMemory(os.getpid()).watching() as packing:
        PackedDataset(documents, args.max_seq_len)

    def metrics(seconds: float, memory: PeakMemory) -> dict[str, float]:
        return {
            "seconds": round(seconds, 3),
            "megabytes_per_second": round(size / 1e6 / seconds, 2),
            "documents_per_second": round(len(documents) / seconds),
            "tokens_per_second": round(rows.num_tokens / seconds),
            "peak_gigabytes": round(memory.bytes / 1e9, 3),
        }

    return {
        "megabytes": round(size / 1e6, 1),
        "documents": len(documents),
        "tokens": rows.num_tokens,
        "fill": round(rows.packing_efficiency, 4),
        **{name: metrics(median(times), tokenising) for name, times in seconds.items()},
        "pack": metrics(packed, packing),
    }


def rendered_texts(data: Path, kind: str) -> list[str]:
    """What the tokenizer has to read: a text between control tokens each."""
    tokenizer = load_tokenizer()
    documents = (SEGMENTERS[kind](tokenizer, row) for _, row in read_rows(data))
    return [part for document in documents for part, _ in document if isinstance(part, str)]


def start_training(source: Path, kind: str, args: Args, folder: Path) -> dict[str, float]:
    """Time to the first step and peak memory of a trainer on a file of --gigabytes."""
    data = folder / "large.jsonl"
    size = write_repeated(source, data, args.gigabytes * 1e9)
    cache, out = folder / "training_cache", folder / "out"
    metrics = out / f"{STAGES[kind]}_{HIDDEN_SIZE}.metrics.jsonl"
    settings = {
        "data_path": data,
        "from_weight": "none",
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": 2,
        "max_seq_len": args.max_seq_len,
        "batch_size": 8,
        "accumulation_steps": 1,
        "max_steps": 2,
        "save_dir": out,
        "checkpoint_dir": out,
        "device": "cpu",
    }
    command = [sys.executable, str(ROOT / "trainer" / f"train_{STAGES[kind]}.py")]
    command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]

    seconds: dict[str, float] = {}
    start = time.perf_counter()
    env = os.environ | {"PYTHONPATH": str(ROOT), "MINIMIND_CACHE": str(cache)}
    process = subprocess.Popen(command, env=env)
    try:
        with PeakMemory(process.pid).watching() as memory:
            while process.poll() is None:
                time.sleep(SAMPLE_SECONDS)
                now = time.perf_counter() - start
                if any(cache.glob("*.arrow")):  # it is renamed to this when it is complete
                    seconds.setdefault("tokenised", now)
                if metrics.exists() and metrics.stat().st_size > 0:
                    seconds.setdefault("first_step", now)
    finally:
        process.kill()
        process.wait()
    if process.returncode or seconds.keys() != {"tokenised", "first_step"}:
        raise UserError(f"the training ended with exit code {process.returncode}; see above")
    return {
        "gigabytes": round(size / 1e9, 3),
        "cache_gigabytes": round(sum(path.stat().st_size for path in cache.iterdir()) / 1e9, 3),
        "seconds_until_tokenised": round(seconds["tokenised"], 1),
        "seconds_until_first_step": round(seconds["first_step"], 1),
        "peak_gigabytes": round(memory.bytes / 1e9, 3),
    }


def print_report(report: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        title=f"{report['megabytes']:,} MB of {report['data']}: {report['documents']:,} documents, "
        f"{report['tokens']:,} tokens; rows {report['fill']:.1%} full"
    )
    for column in ("", "seconds", "MB/s", "documents/s", "tokens/s", "peak GB"):
        table.add_column(column, justify="right" if column else "left")
    names = {
        "library": "tokenizers alone",
        "tokenise": "tokenise",
        "with_jinja": "with Jinja",
        "pack": "pack",
    }
    for step in filter(report.get, names):
        table.add_row(names[step], *(f"{value:,}" for value in report[step].values()))
    console.print(table)
    if training := report.get("training"):
        console.print(
            f"training on {training['gigabytes']} GB: tokenised after "
            f"{training['seconds_until_tokenised']} s (the cache takes "
            f"{training['cache_gigabytes']} GB), first step after "
            f"{training['seconds_until_first_step']} s, at most {training['peak_gigabytes']} GB of "
            "memory (goal: less than 2)"
        )
    console.print(f"{report['machine']}, {report['date']}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

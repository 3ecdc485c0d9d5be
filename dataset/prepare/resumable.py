"""Processing of many rows that may be stopped at any moment and resumed later.

A function turns each chunk of rows into bytes, in several processes, and the bytes are appended to
the outputs in the order of the chunks. Every few seconds the outputs are flushed to disk and a
progress file records how many chunks they hold and how long they are. A later run with the same
inputs and settings truncates the outputs to that length and continues with the next chunk, so that
a run that was killed and one that was not write the same bytes.
"""

import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dataset.lm_dataset import exit_with_parent
from model.errors import UserError
from model.formats.files import read_json, write_json

SAVE_SECONDS = 3.0
HASH_BLOCK = 2**20


@dataclass
class ChunkResult:
    """The bytes of a chunk for each output, its counts, and some examples."""

    outputs: list[bytes]
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class JobProgress:
    """How far the outputs are written, as the progress file says."""

    key: str
    chunks: int = 0
    sizes: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    finished: bool = False

    def add(self, result: ChunkResult, max_examples: int = 3) -> None:
        self.chunks += 1
        self.sizes = [
            size + len(more) for size, more in zip(self.sizes, result.outputs, strict=True)
        ]
        for name, count in result.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for name, some in result.examples.items():
            known = self.examples.setdefault(name, [])
            known += some[: max_examples - len(known)]


def process(
    chunks: Iterable[Any],
    work: Callable[[Any], ChunkResult],
    outputs: list[Path],
    progress_file: Path,
    key: Any,
    workers: int = 1,
) -> JobProgress:
    """Apply `work` to `chunks` and append its results to `outputs`, or continue a stopped run.

    Args:
        chunks: the same ones in the same order in every run.
        work: called in other processes if there are several workers, so it must be picklable.
        progress_file: stays after the end, and then says that all is finished.
        key: what the outputs depend on; with another key the work starts from the beginning.

    Raises:
        UserError: the outputs cannot be written, or a chunk is wrong.
    """
    digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:24]
    partial = [path.with_name(f".{path.name}.partial") for path in outputs]
    progress = read_progress(progress_file, digest, partial)
    if progress.finished and all(path.exists() for path in outputs):
        return progress
    try:
        progress_file.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "ab")) for path in partial]
            progress.sizes = progress.sizes or [0] * len(files)
            for file, size in zip(files, progress.sizes, strict=True):
                file.truncate(size)
            saved = time.monotonic()
            for result in map_chunks(islice(chunks, progress.chunks, None), work, workers):
                for file, content in zip(files, result.outputs, strict=True):
                    file.write(content)
                progress.add(result)
                if time.monotonic() - saved > SAVE_SECONDS:
                    flush(files)
                    write_json(progress_file, vars(progress), checksum=True)
                    saved = time.monotonic()
            flush(files)
        progress.finished = True
        write_json(progress_file, vars(progress), checksum=True)
        for path, written in zip(outputs, partial, strict=True):
            os.replace(written, path)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write {outputs[0]}: {why}; the same command goes on") from error
    return progress


def read_progress(progress_file: Path, key: str, partial: list[Path]) -> JobProgress:
    """The recorded progress, if it is of the same work and the files are as long as it says."""
    with suppress(OSError, ValueError, TypeError, UserError):
        progress = JobProgress(**read_json(progress_file, "the work begins anew"))
        whole = progress.finished or all(
            path.stat().st_size >= size for path, size in zip(partial, progress.sizes, strict=True)
        )
        if progress.key == key and whole:
            return rename_finished(progress, partial)
    for path in partial:
        path.unlink(missing_ok=True)
    return JobProgress(key)


def rename_finished(progress: JobProgress, partial: list[Path]) -> JobProgress:
    """A run that was killed while it renamed has some outputs in place and others not."""
    for path in partial:
        if progress.finished and path.exists():
            os.replace(path, path.with_name(path.name[1 : -len(".partial")]))
    return progress


def flush(files: list[Any]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def map_chunks(
    chunks: Iterable[Any], work: Callable[[Any], ChunkResult], workers: int
) -> Iterator[ChunkResult]:
    """work(chunk) for each chunk in order, with a few chunks at a time in memory."""
    if workers <= 1:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(
        workers, initializer=start_worker, initargs=(work, os.getpid())
    ) as pool:
        waiting: deque[Future] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(run_in_worker, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a worker was killed, perhaps for memory; try --workers 1") from error
        finally:
            pool.shutdown(cancel_futures=True)


worker_function: Callable[[Any], ChunkResult]  # of a worker process; start_worker sets it


def start_worker(work: Callable[[Any], ChunkResult], parent: int) -> None:
    global worker_function  # sent once to each process, not with every chunk
    worker_function = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()


def run_in_worker(chunk: Any) -> ChunkResult:
    return worker_function(chunk)


# -- chunks and hashes -----------------------------------------------------------------------------


def in_chunks(rows: Iterable[Any], size_of: Callable[[Any], int], most_rows: int, most_bytes: int):
    """Lists of at most `most_rows` rows, fewer where they are long."""
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += size_of(row)
        if len(chunk) == most_rows or size >= most_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def stamps_of(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file, by which a changed file is recognised."""
    return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()

"""Work over many rows that may be stopped at any moment and goes on from there later.

Rows come in chunks; a function turns each chunk into bytes, in several processes; the bytes are
appended to the outputs in the chunks' order. Every few seconds the outputs are flushed to disk and
a small file beside them notes how many chunks they hold, and how long they are. A later run with
the same inputs and settings cuts off what was written after that and goes on with the next chunk,
so that a run that was killed and one that was not leave the same bytes.
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
from model.weights import write_json

SAVE_SECONDS = 3.0
HASH_BLOCK = 2**20


@dataclass
class Done:
    """What came of a chunk: the bytes for each output, what was counted, and some examples."""

    outputs: list[bytes]
    counts: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Progress:
    """How far the outputs are, as the file beside them says."""

    key: str
    chunks: int = 0
    sizes: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    finished: bool = False

    def add(self, done: Done, most_examples: int = 3) -> None:
        self.chunks += 1
        self.sizes = [size + len(more) for size, more in zip(self.sizes, done.outputs, strict=True)]
        for name, count in done.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        for name, some in done.examples.items():
            known = self.examples.setdefault(name, [])
            known += some[: most_examples - len(known)]


def process(
    chunks: Iterable[Any],
    work: Callable[[Any], Done],
    outputs: list[Path],
    note: Path,
    key: Any,
    workers: int = 1,
) -> Progress:
    """Run `work` over `chunks` and append what it gives to `outputs`, or go on doing so.

    Args:
        chunks: the same ones in the same order in every run.
        work: called in other processes if there are several workers, so it must be picklable.
        note: the file that remembers how far it is. It stays, and says when all is finished.
        key: what the outputs depend on; with another key the work begins from its start.

    Raises:
        UserError: the outputs cannot be written, or a chunk is wrong.
    """
    digest = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:24]
    partial = [path.with_name(f".{path.name}.partial") for path in outputs]
    progress = read_progress(note, digest, partial)
    if progress.finished and all(path.exists() for path in outputs):
        return progress
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, "ab")) for path in partial]
            progress.sizes = progress.sizes or [0] * len(files)
            for file, size in zip(files, progress.sizes, strict=True):
                file.truncate(size)
            saved = time.monotonic()
            for done in map_chunks(islice(chunks, progress.chunks, None), work, workers):
                for file, content in zip(files, done.outputs, strict=True):
                    file.write(content)
                progress.add(done)
                if time.monotonic() - saved > SAVE_SECONDS:
                    flush(files)
                    write_json(note, vars(progress))
                    saved = time.monotonic()
            flush(files)
        progress.finished = True
        write_json(note, vars(progress))
        for path, written in zip(outputs, partial, strict=True):
            os.replace(written, path)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write {outputs[0]}: {why}; the same command goes on") from error
    return progress


def read_progress(note: Path, key: str, partial: list[Path]) -> Progress:
    """What the note says, if it is of the same work and the files hold what it says."""
    with suppress(OSError, ValueError, TypeError):
        progress = Progress(**json.loads(note.read_text(encoding="utf-8")))
        whole = progress.finished or all(
            path.stat().st_size >= size for path, size in zip(partial, progress.sizes, strict=True)
        )
        if progress.key == key and whole:
            return rename_finished(progress, partial)
    for path in partial:
        path.unlink(missing_ok=True)
    return Progress(key)


def rename_finished(progress: Progress, partial: list[Path]) -> Progress:
    """A run that was killed while it renamed has some outputs in place and others not."""
    for path in partial:
        if progress.finished and path.exists():
            os.replace(path, path.with_name(path.name[1 : -len(".partial")]))
    return progress


def flush(files: list[Any]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def map_chunks(chunks: Iterable[Any], work: Callable[[Any], Done], workers: int) -> Iterator[Done]:
    """work(chunk) for each chunk in order; some chunks at a time stand in memory."""
    if workers <= 1:
        yield from map(work, chunks)
        return
    with ProcessPoolExecutor(workers, initializer=start, initargs=(work, os.getpid())) as pool:
        waiting: deque[Future] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(run, chunk))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a worker was killed, perhaps for memory; try --workers 1") from error
        finally:
            pool.shutdown(cancel_futures=True)


def start(work: Callable[[Any], Done], parent: int) -> None:
    global worker_runs  # sent once to each process, not with every chunk
    worker_runs = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()


def run(chunk: Any) -> Done:
    return worker_runs(chunk)


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


def seen(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What tells that a file is still the same: its name, size and time of change."""
    return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()

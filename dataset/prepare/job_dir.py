"""The files of one preparation job: what it reads and writes, its working folder and its manifest.

A job that was stopped leaves its working folder, from which the same command goes on; a finished
one leaves its outputs and, beside the first of them, OUTPUT.manifest.json.
"""

import gzip
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from filelock import FileLock, Timeout

from dataset.prepare.resumable import ChunkResult, in_chunks, process, sha256_of, stamps_of
from dataset.prepare.sources import RawRow, check_input
from model.errors import UserError
from model.weights import write_json

CHUNK_ROWS, CHUNK_SIZE = 500, 2_000_000
JOB_VERSION = 2  # raise it whenever the same settings give other rows
JSONL = (".jsonl", ".jsonl.gz")
JSON = (*JSONL, ".ndjson", ".json", ".json.gz")


@dataclass
class JobDir:
    """The inputs and outputs of a job, and the folder with its intermediate files and progress.

    Args:
        settings: a dataclass, the command's arguments; its `force` allows overwriting.
    """

    command: str
    settings: Any
    inputs: list[Path]
    outputs: list[Path]
    started: float = field(default_factory=time.monotonic)
    IRRELEVANT: ClassVar[tuple[str, ...]] = ("workers", "force")  # change no byte of the output

    def __post_init__(self) -> None:
        first = self.outputs[0]
        self.folder = first.with_name(f".{first.name}.work")
        self.manifest = first.with_name(f"{first.name}.manifest.json")
        relevant = {k: v for k, v in asdict(self.settings).items() if k not in self.IRRELEVANT}
        key = [JOB_VERSION, self.command, relevant, stamps_of(self.inputs)]
        self.key = json.loads(json.dumps(key))  # as it is read from the manifest

    def progress_file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def is_done(self) -> bool:
        """Whether the same command has finished before.

        Raises:
            UserError: something else is where the output is to go.
        """
        for path in self.outputs:
            if path.resolve() in {each.resolve() for each in self.inputs}:
                raise UserError(f"{path} is read and so cannot be written; choose another --output")
            if path.is_dir():
                raise UserError(f"{path} is a folder; --output names a file")
        existing = [path for path in self.outputs if path.exists()]
        if not existing or self.settings.force or self.folder.exists():
            return False
        try:
            done = json.loads(self.manifest.read_text(encoding="utf-8"))["key"] == self.key
        except (OSError, ValueError, KeyError, TypeError):
            done = False
        if done and existing == self.outputs:
            return True
        raise UserError(f"{existing[0]} exists already; --force writes over it")

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hold the working folder alone; it is removed when all is done, or nothing was done."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "lock", timeout=0):
                yield
        except Timeout:
            raise UserError(f"another run is writing {self.outputs[0]} right now") from None
        except UserError:
            if not any(self.folder.glob("*.json")):  # no progress to go on from
                shutil.rmtree(self.folder)
                for path in self.outputs:
                    path.with_name(f".{path.name}.partial").unlink(missing_ok=True)
            raise
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"cannot write to {self.folder.parent}: {why}") from error
        shutil.rmtree(self.folder)

    def run(
        self,
        name: str,
        rows: Iterator[Any],
        work: Callable[[Any], ChunkResult],
        outputs: list[Path],
        workers: int = 1,
        size_of: Callable[[Any], int] = RawRow.size,
    ):
        """Apply `work` to the rows, in chunks, and append the results to the outputs; a run that
        was stopped continues. Returns its JobProgress."""
        chunks = in_chunks(rows, size_of, CHUNK_ROWS, CHUNK_SIZE)
        if any(path.suffix == ".gz" for path in outputs):
            work = Compressed(work, outputs)
        return process(chunks, work, outputs, self.progress_file(name), self.key, workers)

    def write_manifest(self, results: dict[str, Any]) -> dict[str, Any]:
        manifest = {
            "command": self.command,
            "arguments": asdict(self.settings),
            "inputs": [describe_file(path) for path in self.inputs],
            "outputs": [describe_file(path) for path in self.outputs],
            **results,
            "seconds": round(time.monotonic() - self.started, 1),
            "peak_memory_mb": peak_memory(),
            "key": self.key,
        }
        write_json(self.manifest, manifest)
        return manifest


def open_job(
    command: str,
    settings: Any,
    *more_outputs: str,
    reads: tuple[str, ...] = JSON,
    writes: tuple[str, ...] = JSONL,
) -> JobDir:
    """The job of a command, its inputs and outputs checked. UserError if they are not what the
    command needs.

    Args:
        settings: its `input` and `output` name the files.
        reads, writes: the endings that files must have.
    """
    inputs = check_input(settings.input)
    for path in inputs:
        if not path.name.endswith(reads):
            raise UserError(f"{path} is no {' or '.join(reads)} file; clean makes one of it")
    if not settings.output:
        raise UserError("--output names the file to write")
    outputs = [Path(name) for name in (settings.output, *more_outputs) if name]
    for path in outputs:
        if not path.name.endswith(writes):
            raise UserError(f"{path} should be a {' or '.join(writes)} file")
    if len(set(outputs)) < len(outputs):
        raise UserError(f"{outputs[0]} is named as two outputs")
    return JobDir(command, settings, inputs, outputs)


@dataclass
class Compressed:
    """`work`, its outputs compressed where their file is .gz: one gzip member per chunk."""

    work: Callable[[Any], ChunkResult]
    outputs: list[Path]

    def __call__(self, chunk: Any) -> ChunkResult:
        result = self.work(chunk)
        result.outputs = [
            gzip.compress(content, mtime=0) if path.suffix == ".gz" and content else content
            for content, path in zip(result.outputs, self.outputs, strict=True)
        ]
        return result


def describe_file(path: Path) -> dict[str, Any]:
    return {"file": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def peak_memory() -> dict[str, int]:
    """Peak memory of this process, and of the largest of its workers, in MB; {} on Windows."""
    try:
        import resource
    except ImportError:
        return {}
    unit = 1e6 if sys.platform == "darwin" else 1e3
    who = {"main": resource.RUSAGE_SELF, "worker": resource.RUSAGE_CHILDREN}
    return {name: round(resource.getrusage(each).ru_maxrss / unit) for name, each in who.items()}

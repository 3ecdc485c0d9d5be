"""The work of scripts/prepare_data.py's commands: each runs a job to its end and writes its
manifest. All of them continue where a stopped run of the same job was."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dataset.prepare import hub, mixing, statistics
from dataset.prepare.cleaning import Cleaner, Filters
from dataset.prepare.deduplication import (
    Questions,
    Selector,
    Signatures,
    Signer,
    checked_row,
    read_questions,
)
from dataset.prepare.job_dir import JobDir, describe_file
from dataset.prepare.resumable import Progress
from dataset.prepare.sources import kind_of, read_raw, to_row, whole_text
from model.errors import UserError
from model.weights import write_json


def clean(
    job: JobDir, filters: Filters, kind: str, text_field: str, dropped: bool, **reading: str
) -> dict[str, Any]:
    """Rows of any format → rows of MiniMind's, filtered.

    Args:
        kind: of the rows to make; "auto": as the first row is.
        dropped: the second output is for the rows that are dropped.
        reading: encoding and per_document of `read_raw`.
    """
    if kind == "auto":
        kind = first_kind(job.inputs, text_field, **reading)
    cleaner = Cleaner(filters, kind, text_field, with_dropped=dropped)
    with job.working():
        rows = read_raw(job.inputs, about="cleaning", **reading)
        progress = job.run("clean", rows, cleaner, job.outputs, job.settings.workers)
        return job.write_manifest(counts_of(progress) | {"kind": kind})


def first_kind(files: list[Path], text_field: str, **reading: str) -> str:
    """The kind of the first row that can be read."""
    reason = "there are no rows"
    for raw in islice(read_raw(files, about="looking", **reading), 1000):
        try:
            return kind_of(to_row(raw, text_field))
        except UserError as error:
            reason = f"line {raw.number} of {raw.path} {error}"
    raise UserError(f"none of the first rows can be read: {reason}")


def deduplicate(
    job: JobDir,
    against: list[Path],
    *,
    overlap: int,
    threshold: float,
    num_perm: int,
    near: bool,
    dropped: bool,
) -> dict[str, Any]:
    """Drop exact duplicates, near ones if `near`, and rows with a text of the files `against`."""
    questions = read_questions(against, overlap) if against else Questions()
    signer = Signer(threshold, num_perm, questions)
    signatures = Signatures(job.folder, threshold, num_perm, signer.bands)
    with job.working():
        rows = read_raw(job.inputs, about="signatures")
        job.run("signatures", rows, signer, signatures.files(), job.settings.workers)
        decisions = signatures.decide(near)
        rows = zip(read_raw(job.inputs, about="writing"), decisions.tolist(), strict=True)
        progress = job.run(
            "writing", rows, Selector(dropped), job.outputs, size_of=lambda pair: pair[0].size()
        )
        files = [describe_file(path) for path in against]
        return job.write_manifest(counts_of(progress) | {"against": files})


def mix(
    job: JobDir,
    *,
    weights: list[float],
    size: float,
    max_repeat: float,
    val_share: float,
    stages: int,
    order: str,
    seed: int,
) -> dict[str, Any]:
    """Mix the inputs into the first `stages` outputs; one more output is for held-out rows."""
    with job.working():
        index = mixing.index_rows(mixing.decompressed(job.inputs, job.folder), job.inputs)
        repeats = mixing.repeats_of_rows(index, weights, size, max_repeat)
        plan = mixing.plan(index, repeats, val_share, stages, order, seed)
        counts: dict[str, Any] = {}
        parts = plan.parts + [plan.val] * (len(job.outputs) > stages)
        for number, (path, rows) in enumerate(zip(job.outputs, parts, strict=True)):
            progress = job.run(
                f"writing {number}",
                mixing.positions(index, rows),
                mixing.LineReader(index.files, index.names),
                [path],
                job.settings.workers,
                size_of=lambda position: position[2],
            )
            counts[path.name] = progress.counts
        return job.write_manifest({"counts": counts})


def measure(
    job: JobDir,
    tokenizer: PreTrainedTokenizerBase,
    top: int,
    plot: Callable[[np.ndarray, Path], None],
) -> dict[str, Any]:
    """Statistics of all rows into the manifest, and a plot of the lengths.

    Args:
        top: how many of the most frequent texts to keep.
        plot: draws the records of the rows into the job's output.
    """
    with job.working():
        records_file = job.folder / "records"
        progress = job.run(
            "measuring",
            read_raw(job.inputs, about="measuring"),
            statistics.RowMeasurer(tokenizer),
            [records_file],
            job.settings.workers,
        )
        records = statistics.read_records(records_file)
        if not len(records):
            raise UserError(f"{', '.join(map(str, job.inputs))} hold no rows")
        figures = statistics.summary(records, progress.counts)
        often = statistics.top_duplicates(records, top)
        figures["most_frequent"] = [
            {"times": often[number], "text": whole_text(checked_row(raw))[:200]}
            for number, raw in enumerate(read_raw(job.inputs, about="duplicates"))
            if number in often
        ]
        figures["most_frequent"].sort(key=lambda each: -each["times"])
        plot(records, job.outputs[0])
        return job.write_manifest({"figures": figures})


def download(
    repo_name: str,
    repo_type: str,
    names: list[str],
    folder: Path,
    hub_name: str,
    revision: str,
    endpoint: str,
) -> dict[str, Any]:
    """Files of a repository into a folder, with download.manifest.json beside them.

    Args:
        repo_type: "dataset" or "model".
        names: files or patterns; none: all.
    """
    repo = hub.open_repo(hub_name, repo_name, repo_type, revision, endpoint)
    files, remotes = [], repo.find(names)
    hub.check_space(remotes, folder.resolve())
    size = sum(remote.size or 0 for remote in remotes)
    print(f"{len(remotes)} files, {size:,} bytes, of {repo_name} at {repo.revision}", flush=True)
    for remote in remotes:
        path, fetched = hub.download(repo, remote, folder)
        state = "fetched" if fetched else "was there"
        how = remote.checked_by()
        print(f"{path}: {path.stat().st_size:,} bytes, {state}, checked by {how}")
        files.append({**describe_file(path), "checked_by": how})
    found = {"hub": repo.where, "revision": repo.revision, "files": files}
    write_json(folder / "download.manifest.json", {"command": "download", **found})
    return found


def counts_of(progress: Progress) -> dict[str, Any]:
    return {"counts": dict(sorted(progress.counts.items())), "examples": progress.examples}

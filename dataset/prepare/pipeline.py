"""The work of scripts/prepare_data.py's commands: each runs a job to its end and writes its
manifest. All of them continue where a stopped run of the same job was."""

from collections.abc import Callable
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dataset.jsonl import BadRows, error_at
from dataset.prepare import hub, mixing, statistics
from dataset.prepare.cleaning import Cleaner, Filters
from dataset.prepare.deduplication import (
    BAD,
    Questions,
    Selector,
    Signatures,
    Signer,
    checked_row,
    read_questions,
)
from dataset.prepare.job_dir import JobDir, describe_file
from dataset.prepare.resumable import JobProgress
from dataset.prepare.sources import kind_of, read_raw, to_row, whole_text
from model.errors import UserError
from model.weights import write_json


def clean(
    job: JobDir,
    filters: Filters,
    kind: str,
    text_field: str,
    dropped: bool,
    drop_keys: tuple[str, ...] = (),
    **reading: str,
) -> dict[str, Any]:
    """Rows of any format → rows of MiniMind's, filtered.

    Args:
        kind: of the rows to make; "auto": as the first row is. Conversations whose last answers
            are empty are prompts.
        dropped: the second output is for the rows that are dropped.
        drop_keys: of rows and messages, which are left out.
        reading: encoding and per_document of `read_raw`.
    """
    if kind in ("auto", "conversations"):
        first = first_kind(job.inputs, text_field, drop_keys, **reading)
        kind = first if kind == "auto" or first == "prompts" else kind
    cleaner = Cleaner(filters, kind, text_field, with_dropped=dropped, drop_keys=drop_keys)
    with job.working():
        rows = read_raw(job.inputs, about="cleaning", **reading)
        progress = job.run("clean", rows, cleaner, job.outputs, job.settings.workers)
        return job.write_manifest(counts_of(progress) | {"kind": kind})


def first_kind(
    files: list[Path], text_field: str, drop_keys: tuple[str, ...], **reading: str
) -> str:
    """The kind of the first row that can be read; of conversations, of most of the first rows."""
    bad_rows, kinds = BadRows(), []
    for raw in islice(read_raw(files, about="looking", **reading), 1000):
        with error_at(raw.path, raw.number, bad_rows):
            try:
                kinds.append(kind_of(to_row(raw, text_field, drop_keys=drop_keys)))
            except UserError:  # a question without an answer is a prompt
                kinds.append(kind_of(to_row(raw, text_field, "prompts", drop_keys)))
        if len(kinds) == 100:
            break
    if not kinds:
        reason = bad_rows.examples[0] if bad_rows.count else "there are no rows"
        raise UserError(f"none of the first rows can be read: {reason}")
    if set(kinds) == {"conversations", "prompts"}:
        return max(("conversations", "prompts"), key=kinds.count)
    return kinds[0]


def deduplicate(
    job: JobDir,
    against: list[Path],
    *,
    overlap: int,
    threshold: float,
    num_perm: int,
    near: bool,
    dropped: bool,
    skip_bad_rows: bool = False,
) -> dict[str, Any]:
    """Drop exact duplicates, near ones if `near`, and rows with a text of the files `against`."""
    questions = read_questions(against, overlap) if against else Questions()
    signer = Signer(threshold, num_perm, questions, skip_bad_rows)
    signatures = Signatures(job.folder, threshold, num_perm, signer.bands)
    with job.working():
        rows = read_raw(job.inputs, about="signatures")
        job.run("signatures", rows, signer, signatures.files(), job.settings.workers)
        decisions = signatures.decide(near)
        if len(decisions) and (decisions == BAD).all():
            raise UserError(f"all {len(decisions):,} rows are bad; {first_error(job.inputs)}")
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
    skip_bad_rows: bool = False,
) -> dict[str, Any]:
    """Mix the inputs into the first `stages` outputs; one more output is for held-out rows."""
    with job.working():
        bad_rows = BadRows() if skip_bad_rows else None
        plain = mixing.plain_files(job.inputs, job.folder)
        index = mixing.index_rows(plain, job.inputs, bad_rows)
        repeats = mixing.repeats_of_rows(index, weights, size, max_repeat)
        mixture = mixing.draw_mixture(index, repeats, val_share, stages, order, seed)
        counts: dict[str, Any] = {}
        parts = mixture.parts + [mixture.val] * (len(job.outputs) > stages)
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
        return job.write_manifest({"counts": counts, "bad_rows": vars(bad_rows or BadRows())})


def measure(
    job: JobDir,
    tokenizer: PreTrainedTokenizerBase,
    top: int,
    plot: Callable[[np.ndarray, Path], None],
    skip_bad_rows: bool = False,
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
            statistics.RowMeasurer(tokenizer, skip_bad_rows),
            [records_file],
            job.settings.workers,
        )
        every_record = statistics.read_records(records_file)
        if not len(every_record):
            raise UserError(f"{', '.join(map(str, job.inputs))} hold no rows")
        is_good = every_record["language"] != statistics.BAD
        if not is_good.any():
            raise UserError(f"all {len(is_good):,} rows are bad; {first_error(job.inputs)}")
        records = every_record[is_good]
        summary = statistics.summary(records, progress.counts)
        often = statistics.top_duplicates(records, top)
        rows = compress(read_raw(job.inputs, about="duplicates"), is_good)
        summary["most_frequent"] = [
            {"times": often[number], "text": whole_text(checked_row(raw))[:200]}
            for number, raw in enumerate(rows)
            if number in often
        ]
        summary["most_frequent"].sort(key=lambda each: -each["times"])
        plot(records, job.outputs[0])
        bad_rows = BadRows(progress.counts["bad rows"], progress.examples.get("bad rows", []))
        return job.write_manifest({"statistics": summary, "bad_rows": vars(bad_rows)})


def first_error(files: list[Path]) -> str:
    """What is wrong with the first row."""
    for raw in read_raw(files):
        try:
            checked_row(raw)
        except UserError as error:
            return str(error)
    return ""


def download(
    repo_name: str,
    repo_type: str,
    names: list[str],
    folder: Path,
    hub_name: str,
    revision: str,
    endpoint: str,
    code: bool = False,
) -> dict[str, Any]:
    """Files of a repository into a folder, with download.manifest.json beside them.

    Args:
        repo_type: "dataset" or "model".
        names: files or patterns; none: all.
        code: whether to take Python files too.
    """
    repo = hub.open_repo(hub_name, repo_name, repo_type, revision, endpoint)
    remotes = hub.only_data(repo.find(names), repo_type, repo_name, bool(names), folder, code)
    files: list[dict[str, Any]] = []
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


def counts_of(progress: JobProgress) -> dict[str, Any]:
    return {"counts": dict(sorted(progress.counts.items())), "examples": progress.examples}

"""Data files → tokenised documents: the entrance to this folder.

    documents = load_documents("pretrain_hq.jsonl", "text", tokenizer)
    documents[0]["input_ids"], documents[0]["loss_mask"]

The kinds of rows, such as "text", and how a row becomes tokens and a loss mask are in encoding.py;
how documents become batches is in packing.py and pairs.py.

Files are tokenised once, by all cores, into an Arrow file that later runs map into memory; at no
time is a whole file in RAM.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset.chat_template import ChatTemplate
from dataset.encoding import (
    SEGMENTERS,
    Encoded,
    Message,
    check_messages,
    encode_chat,
    encode_segments,
    encode_text,
    has_exact_token_bytes,
    label_bytes,
    token_bytes,
)
from dataset.forms.messages import THOUGHTS
from dataset.jsonl import (
    BadRows,
    LineChunk,
    check_file,
    error_at,
    parse_row,
    read_chunks,
    read_lines,
)
from model.errors import UserError, reading
from model.formats.files import add_checksum, read_json, verify, write_json
from model.weights import ROOT, tokenizer_hash

__all__ = [
    "CACHE",
    "CACHE_VERSION",
    "Encoded",
    "Message",
    "check_messages",
    "encode_chat",
    "encode_text",
    "load_documents",
    "token_bytes",
]

# Tokenised data. The variable is for a project on a disk that is small or may not be written.
CACHE = Path(os.environ.get("MINIMIND_CACHE") or ROOT / "dataset" / ".cache")
CACHE_VERSION = 4  # part of the cache's name: raise it whenever the encoding changes
LINES_PER_CHUNK = 500
SAMPLE_LINES = 100  # rendered with Jinja and without, at the start
CHUNKS_PER_BATCH = 20  # few record batches: the header of each costs a mapped file 64 kB or more
MIN_BYTES_FOR_WORKERS = 1_000_000  # for less, starting processes takes longer than the work


ChunkEncoder = Callable[[PreTrainedTokenizerBase, LineChunk], "EncodedChunk"]


def load_documents(
    paths: str | Path | Sequence[str | Path],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    empty_think_ratio: float = 0.0,
    workers: int | None = None,
    cache: Path | str = CACHE,
    skip_bad_rows: bool = False,
    report: Callable[[str], None] = print,
) -> Dataset:
    """The documents of one or several `.jsonl` / `.jsonl.gz` files, tokenised.

    Args:
        kind: of the rows, a key of SEGMENTERS. Documents 2i and 2i + 1 of "preferences" are the
            chosen and the rejected side of pair i.
        empty_think_ratio: of the rows of messages without thoughts, the share that gets empty ones.
        workers: processes to tokenise with; default: one a core.
        skip_bad_rows: leave out rows that are not what they must be, instead of raising.
        report: is told how many were left out, and which.

    Returns:
        A memory-mapped dataset with columns input_ids (uint16 or int32) and loss_mask (bool), and
        where tokens do not tell the bytes of their text, label_bytes (int32); its
        `info.description` is a fingerprint of the tokens, the same for the same data anywhere.

    Raises:
        UserError: a file is missing or unreadable, a line of it is not what it must be, or no
            token of it carries loss.
    """
    files = [check_file(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    stamps = [stamp_of(path) for path in files]
    key = [CACHE_VERSION, kind, tokenizer_hash(tokenizer), tokenizer.chat_template, stamps]
    if not has_exact_token_bytes(tokenizer):
        key.append("label_bytes")
    options = {"empty_think_ratio": empty_think_ratio} if empty_think_ratio else {}
    key += options.items()
    key += ["skip_bad_rows"] * skip_bad_rows
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    arrow = Path(cache) / f"{name}.arrow"
    try:
        arrow.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(arrow.with_suffix(".lock")):  # several ranks, or runs, tokenise it once
            if not is_complete(arrow, report):
                workers = workers or os.cpu_count() or 1
                encode = partial(encode_chunk, kind, options, skip_bad_rows)
                if kind != "text" and ChatTemplate.without_jinja:
                    if not all(agrees_with_jinja(path, tokenizer, encode) for path in files):
                        report("the chat template is rendered by Jinja: without it, rows differ")
                tokenise_files(files, kind, tokenizer, arrow, workers, encode)
    except OSError as error:  # a full disk too
        why = error.strerror or error
        raise UserError(
            f"cannot write to the cache folder {arrow.parent}: {why}; "
            "set MINIMIND_CACHE to a folder elsewhere"
        ) from error
    documents = Dataset.from_file(str(arrow)).with_format("numpy")
    summary = read_json(arrow.with_suffix(".json"), "remove it, and the data are tokenised again")
    documents.info.description = summary["fingerprint"]
    for line in summary["left_out"]:
        report(line)
    return documents


def stamp_of(path: Path) -> tuple[str, int, int, int]:
    """By which a changed data file is recognised. Who changes a file can set its time back, but not
    the time at which its entry changed (ctime; on Windows that is when it was made)."""
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns, about.st_ctime_ns


def is_complete(arrow: Path, report: Callable[[str], None]) -> bool:
    """Whether the cache files are there and undamaged; a damaged one is reported, to be written
    again."""
    summary = arrow.with_suffix(".json")
    if not (arrow.exists() and summary.exists()):
        return False
    again = "the data are tokenised again"
    try:
        read_json(summary, again)
        if verify(arrow, again):
            with pa.memory_map(str(arrow)) as file:
                pa.ipc.open_stream(file).read_all()  # maps it, without reading the tokens
            return True
        report(f"{arrow} has no checksum; {again}")
    except UserError as error:
        report(str(error))
    except (OSError, pa.ArrowInvalid):
        report(f"{arrow} is damaged; {again}")
    return False


def agrees_with_jinja(path: Path, tokenizer: PreTrainedTokenizerBase, encode: ChunkEncoder) -> bool:
    """Whether the first rows of a file become the same tokens without Jinja (shipped_template.py)
    as with it. If not, this process uses Jinja from now on."""
    for sample in read_chunks(path, SAMPLE_LINES):
        fast = encode(tokenizer, sample)
        ChatTemplate.without_jinja = False
        slow = encode(tokenizer, sample)
        names = ("ids", "loss_mask", "lengths")
        ChatTemplate.without_jinja = all(
            np.array_equal(getattr(fast, name), getattr(slow, name)) for name in names
        )
        break
    return ChatTemplate.without_jinja


def tokenise_files(
    files: list[Path],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    arrow: Path,
    workers: int,
    encode: ChunkEncoder,
) -> None:
    """Write the tokens of all documents to `arrow`, which appears only when it is complete, and
    beside it a .json: their fingerprint, and what was left out."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    schema = pa.schema(
        {"input_ids": pa.list_(pa.from_numpy_dtype(dtype)), "loss_mask": pa.list_(pa.bool_())}
    )
    count_bytes = not has_exact_token_bytes(tokenizer)
    if count_bytes:
        schema = schema.append(pa.field("label_bytes", pa.int32()))
    ids_hash, lengths_hash = hashlib.sha256(), hashlib.sha256()
    sums = {path: FileSums() for path in files}
    partial = arrow.with_name(f".{arrow.name}.partial")
    size = sum(path.stat().st_size for path in files)
    if size < MIN_BYTES_FOR_WORKERS:
        workers = 1
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", leave=False)
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            chunks = encode_chunks(files, tokenizer, workers, encode)
            while batch := list(islice(chunks, CHUNKS_PER_BATCH)):
                for chunk in batch:
                    sums[chunk.path].add(chunk)
                ids, loss_mask, lengths, sizes = (
                    np.concatenate([getattr(chunk, name) for chunk in batch])
                    for name in ("ids", "loss_mask", "lengths", "label_bytes")
                )
                ids_hash.update(ids.astype("<i4").tobytes())
                lengths_hash.update(lengths.astype("<i8").tobytes())
                offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
                lists = [
                    pa.ListArray.from_arrays(offsets, pa.array(values))
                    for values in (ids.astype(dtype), loss_mask)
                ] + [pa.array(sizes, pa.int32())] * count_bytes
                writer.write_batch(pa.RecordBatch.from_arrays(lists, schema=schema))
                bar.update(sum(chunk.bytes_read for chunk in batch))
        with open(partial, "r+b") as file:
            add_checksum(file)
            file.flush()
            os.fsync(file.fileno())
        left_out = [line for path, each in sums.items() for line in each.check(path, kind)]
        both = hashlib.sha256(ids_hash.digest() + lengths_hash.digest()).hexdigest()
        summary = {"fingerprint": both[:16], "left_out": left_out}
        write_json(arrow.with_suffix(".json"), summary, checksum=True)
        os.replace(partial, arrow)
    finally:
        bar.close()
        partial.unlink(missing_ok=True)


# -- chunks of lines, in several processes ---------------------------------------------------------


@dataclass
class EncodedChunk:
    path: Path
    bytes_read: int  # of the file
    ids: np.ndarray  # of all documents
    loss_mask: np.ndarray
    lengths: np.ndarray  # of the documents
    label_bytes: np.ndarray  # of the documents, if needed
    num_empty: int  # rows that gave no document
    bad_rows: BadRows


@dataclass
class FileSums:
    """What the chunks of a file add up to."""

    documents: int = 0
    label_tokens: int = 0
    empty: int = 0
    bad_rows: BadRows = field(default_factory=BadRows)

    def add(self, chunk: EncodedChunk) -> None:
        self.documents += len(chunk.lengths)
        first_tokens = np.cumsum(chunk.lengths) - chunk.lengths  # they have no prediction
        first_tokens = first_tokens[chunk.lengths > 0]
        self.label_tokens += int(chunk.loss_mask.sum() - chunk.loss_mask[first_tokens].sum())
        self.empty += chunk.num_empty
        self.bad_rows.merge(chunk.bad_rows)

    def check(self, path: Path, kind: str) -> list[str]:
        """Sentences about what was left out. UserError if there is nothing to train on."""
        self.bad_rows.refuse_if_all(self.documents)
        if not self.documents and self.empty and kind == "conversations":
            raise UserError(
                f"{path} has no answer to train on: all {self.empty:,} are empty, as in prompts "
                "for reinforcement learning (train_grpo.py, train_ppo.py, train_agent.py)"
            )
        if not self.documents:
            raise UserError(f"{path} holds no documents")
        if not self.label_tokens:
            raise UserError(
                f"{path} has {self.documents:,} documents and no token that carries loss, so "
                "nothing would be trained; scripts/show_batch.py shows them"
            )
        empty = f"{path}: rows left out because their text or answer is empty: {self.empty:,}"
        return [empty] * (self.empty > 0) + [str(self.bad_rows)] * (self.bad_rows.count > 0)


def encode_chunk(
    kind: str,
    options: dict[str, Any],
    skip_bad_rows: bool,
    tokenizer: PreTrainedTokenizerBase,
    chunk: LineChunk,
) -> EncodedChunk:
    """Parse and encode a chunk of lines; empty lines and empty texts give no document."""
    documents, num_empty, bad_rows = [], 0, BadRows()
    for number, line in enumerate(chunk.lines, start=chunk.first):
        if not line.strip():
            continue
        with error_at(chunk.path, number, bad_rows if skip_bad_rows else None):
            segments = SEGMENTERS[kind](tokenizer, parse_row(line), **options)
            num_empty += not segments
            if segments:
                documents += segments if kind == "preferences" else [segments]
    last = chunk.first + len(chunk.lines) - 1
    with reading(f"lines {chunk.first} to {last} of {chunk.path}"):  # a text breaks the tokenizer
        encoded = encode_segments(tokenizer, documents)
    counted = [] if has_exact_token_bytes(tokenizer) else documents
    return EncodedChunk(
        chunk.path,
        chunk.bytes_read,
        np.array(list(chain.from_iterable(each.ids for each in encoded)), np.int32),
        np.array(list(chain.from_iterable(each.loss_mask for each in encoded)), bool),
        np.fromiter((len(each.ids) for each in encoded), np.int64),
        np.fromiter((label_bytes(tokenizer, each) for each in counted), np.int64),
        num_empty,
        bad_rows,
    )


def encode_chunks(
    files: list[Path],
    tokenizer: PreTrainedTokenizerBase,
    workers: int,
    encode: ChunkEncoder,
) -> Iterator[EncodedChunk]:
    """All chunks of all files, in the files' order."""
    chunks = (chunk for path in files for chunk in read_chunks(path, LINES_PER_CHUNK))
    if workers == 1:
        for chunk in chunks:
            yield encode(tokenizer, chunk)
        return
    # Rows are spread over processes, so the tokenizer's own threads would only get in the way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ProcessPoolExecutor(
        workers,
        initializer=start_worker,
        initargs=(tokenizer, os.getpid(), ChatTemplate.without_jinja),
    ) as pool:
        waiting: deque[Future] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(encode_chunk_in_worker, encode, chunk))
                if len(waiting) > 2 * workers:  # bounds what is in memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


worker_tokenizer: PreTrainedTokenizerBase  # of a worker process; start_worker sets it


def start_worker(tokenizer: PreTrainedTokenizerBase, parent: int, without_jinja: bool) -> None:
    global worker_tokenizer  # sent once to each process, not with every chunk
    worker_tokenizer = tokenizer
    ChatTemplate.without_jinja = without_jinja
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()


def exit_with_parent(parent: int) -> None:
    """A worker whose parent was killed would wait for its next chunk for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def encode_chunk_in_worker(encode: ChunkEncoder, chunk: LineChunk) -> EncodedChunk:
    return encode(worker_tokenizer, chunk)


# -- thoughts --------------------------------------------------------------------------------------

# by any of its names, or in the content
# A text may also speak of the tag: a thought stands first, and is closed.
THOUGHT = re.compile(
    rf'"(?:{"|".join(THOUGHTS)})"\s*:\s*"(?!null"|")|:\s*"(?:\s|\\n)*<think>.*</think>'.encode()
)


def has_thoughts(paths: Sequence[str | Path]) -> bool:
    """Whether any row of the files has a thought."""
    lines = (line for path in paths for _, line in read_lines(check_file(path)))
    return any(THOUGHT.search(line) for line in lines)

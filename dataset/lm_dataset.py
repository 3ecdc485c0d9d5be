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
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

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
from dataset.jsonl import LineChunk, check_file, error_at, parse_row, read_chunks, read_lines
from model.errors import UserError
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
CACHE_VERSION = 3  # part of the cache's name: raise it whenever the encoding changes
LINES_PER_CHUNK = 500
CHUNKS_PER_BATCH = 20  # few record batches: the header of each costs a mapped file 64 kB or more
MIN_BYTES_FOR_WORKERS = 1_000_000  # for less, starting processes takes longer than the work


def load_documents(
    paths: str | Path | Sequence[str | Path],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    empty_think_ratio: float = 0.0,
    workers: int | None = None,
    cache: Path | str = CACHE,
) -> Dataset:
    """The documents of one or several `.jsonl` / `.jsonl.gz` files, tokenised.

    Args:
        kind: of the rows, a key of SEGMENTERS. Documents 2i and 2i + 1 of "preferences" are the
            chosen and the rejected side of pair i.
        empty_think_ratio: of the rows of messages without thoughts, the share that gets empty ones.
        workers: processes to tokenise with; default: one a core.

    Returns:
        A memory-mapped dataset with columns input_ids (uint16 or int32) and loss_mask (bool), and
        where tokens do not tell the bytes of their text, label_bytes (int32); its
        `info.description` is a fingerprint of the tokens, the same for the same data anywhere.

    Raises:
        UserError: a file is missing or unreadable, or a line of it is not what it must be.
    """
    files = [check_file(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = [CACHE_VERSION, kind, tokenizer_hash(tokenizer), tokenizer.chat_template, stamps]
    if not has_exact_token_bytes(tokenizer):
        key.append("label_bytes")
    options = {"empty_think_ratio": empty_think_ratio} if empty_think_ratio else {}
    key += options.items()
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    arrow = Path(cache) / f"{name}.arrow"
    try:
        arrow.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(arrow.with_suffix(".lock")):  # several ranks, or runs, tokenise it once
            if not is_complete(arrow):
                workers = workers or os.cpu_count() or 1
                tokenise_files(files, kind, tokenizer, arrow, workers, options)
    except OSError as error:  # a full disk too
        why = error.strerror or error
        raise UserError(
            f"cannot write to the cache folder {arrow.parent}: {why}; "
            "set MINIMIND_CACHE to a folder elsewhere"
        ) from error
    documents = Dataset.from_file(str(arrow)).with_format("numpy")
    documents.info.description = arrow.with_suffix(".sha256").read_text(encoding="utf-8")
    if len(documents) == 0:
        raise UserError(f"{', '.join(map(str, files))} holds no documents")
    return documents


def is_complete(arrow: Path) -> bool:
    """Whether a cache file is there and undamaged, as after a power cut it may not be."""
    try:
        with pa.memory_map(str(arrow)) as file:
            pa.ipc.open_stream(file).read_all()  # maps it, without reading the tokens
        return arrow.with_suffix(".sha256").exists()
    except (OSError, pa.ArrowInvalid):
        return False


def tokenise_files(
    files: list[Path],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    arrow: Path,
    workers: int,
    options: dict[str, Any],
) -> None:
    """Write the tokens of all documents to `arrow`, which appears only when it is complete.

    Args:
        options: of the function in SEGMENTERS.
    """
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.int32
    schema = pa.schema(
        {"input_ids": pa.list_(pa.from_numpy_dtype(dtype)), "loss_mask": pa.list_(pa.bool_())}
    )
    count_bytes = not has_exact_token_bytes(tokenizer)
    if count_bytes:
        schema = schema.append(pa.field("label_bytes", pa.int32()))
    ids_hash, lengths_hash = hashlib.sha256(), hashlib.sha256()
    partial = arrow.with_name(f".{arrow.name}.partial")
    size = sum(path.stat().st_size for path in files)
    if size < MIN_BYTES_FOR_WORKERS:
        workers = 1
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", leave=False)
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            chunks = encode_chunks(files, kind, tokenizer, workers, options)
            while batch := list(islice(chunks, CHUNKS_PER_BATCH)):
                *columns, bytes_read = zip(*batch, strict=True)
                ids, loss_mask, lengths, sizes = map(np.concatenate, columns)
                ids_hash.update(ids.astype("<i4").tobytes())
                lengths_hash.update(lengths.astype("<i8").tobytes())
                offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
                lists = [
                    pa.ListArray.from_arrays(offsets, pa.array(values))
                    for values in (ids.astype(dtype), loss_mask)
                ] + [pa.array(sizes, pa.int32())] * count_bytes
                writer.write_batch(pa.RecordBatch.from_arrays(lists, schema=schema))
                bar.update(sum(bytes_read))
        flush_to_disk(partial)
        both = hashlib.sha256(ids_hash.digest() + lengths_hash.digest()).hexdigest()
        arrow.with_suffix(".sha256").write_text(both[:16], encoding="utf-8")
        os.replace(partial, arrow)
    finally:
        bar.close()
        partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


# -- chunks of lines, in several processes ---------------------------------------------------------

# (ids, loss mask, lengths of the documents, their label_bytes if needed, bytes read of the file)
EncodedChunk = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]


def encode_chunk(
    tokenizer: PreTrainedTokenizerBase, kind: str, options: dict[str, Any], chunk: LineChunk
) -> EncodedChunk:
    """Parse and encode a chunk of lines; empty lines and empty texts give no document."""
    documents = []
    for number, line in enumerate(chunk.lines, start=chunk.first):
        if not line.strip():
            continue
        with error_at(chunk.path, number):
            segments = SEGMENTERS[kind](tokenizer, parse_row(line), **options)
        if segments:
            documents += segments if kind == "preferences" else [segments]
    encoded = encode_segments(tokenizer, documents)
    counted = [] if has_exact_token_bytes(tokenizer) else documents
    return (
        np.array(list(chain.from_iterable(each.ids for each in encoded)), np.int32),
        np.array(list(chain.from_iterable(each.loss_mask for each in encoded)), bool),
        np.fromiter((len(each.ids) for each in encoded), np.int64),
        np.fromiter((label_bytes(tokenizer, each) for each in counted), np.int64),
        chunk.bytes_read,
    )


def encode_chunks(
    files: list[Path],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    workers: int,
    options: dict[str, Any],
) -> Iterator[EncodedChunk]:
    """All chunks of all files, in the files' order."""
    chunks = (chunk for path in files for chunk in read_chunks(path, LINES_PER_CHUNK))
    if workers == 1:
        for chunk in chunks:
            yield encode_chunk(tokenizer, kind, options, chunk)
        return
    # Rows are spread over processes, so the tokenizer's own threads would only get in the way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ProcessPoolExecutor(
        workers, initializer=start_worker, initargs=(tokenizer, os.getpid())
    ) as pool:
        waiting: deque[Future] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(encode_chunk_in_worker, kind, options, chunk))
                if len(waiting) > 2 * workers:  # bounds what is in memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


worker_tokenizer: PreTrainedTokenizerBase  # of a worker process; start_worker sets it


def start_worker(tokenizer: PreTrainedTokenizerBase, parent: int) -> None:
    global worker_tokenizer  # sent once to each process, not with every chunk
    worker_tokenizer = tokenizer
    threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()


def exit_with_parent(parent: int) -> None:
    """A worker whose parent was killed would wait for its next chunk for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def encode_chunk_in_worker(kind: str, options: dict[str, Any], chunk: LineChunk) -> EncodedChunk:
    return encode_chunk(worker_tokenizer, kind, options, chunk)


# -- thoughts --------------------------------------------------------------------------------------

THOUGHT = re.compile(rb'"reasoning_content"\s*:\s*"[^"]|<think>')


def has_thoughts(paths: Sequence[str | Path]) -> bool:
    """Whether any row of the files has a thought."""
    lines = (line for path in paths for _, line in read_lines(check_file(path)))
    return any(THOUGHT.search(line) for line in lines)

"""The data files of MiniMind → token ids and the mask of what is trained.

One encoder and one mask for every stage:
- text ({"text": …}): <|im_start|> text <|im_end|>, all of it trained;
- conversations ({"conversations": [messages]}): the chat template's text, trained exactly where
  its {% generation %} blocks say: what the assistant writes, its <|im_end|> included;
- preferences ({"chosen": [messages], "rejected": [messages]}): two documents for each row, encoded
  so, trained where they differ: the messages that both begin with are the prompt.

A control token that a person writes in a text or message, such as "<|im_end|>", stays text: it is
encoded as characters and never as the control token. Tags such as <think> are tokens in plain text
and in what the assistant writes, and characters in what anybody else does.

Files are tokenised once, by all cores, into an Arrow file that later runs map into memory; at no
time is a whole file in RAM.
"""

import gzip
import hashlib
import json
import os
import re
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from model.errors import UserError
from model.weights import ROOT, tokenizer_hash

CACHE = ROOT / "dataset" / ".cache"
CACHE_VERSION = 3  # part of the cache's name: raise it whenever the encoding changes
LINES_PER_TASK = 500
TASKS_PER_BATCH = 20  # few batches: the head of each costs a mapped file 64 kB of memory or more
FEW_BYTES = 1_000_000
TAGS = ("<think>", "</think>", "<answer>", "</answer>") + (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
ROLES = ("system", "user", "assistant", "tool")
SIDES = ("chosen", "rejected")

Message = dict[str, Any]


# -- text and messages to tokens -------------------------------------------------------------------


@dataclass
class Encoded:
    """Tokens of one document, and which of them are predicted with loss."""

    ids: list[int]
    loss_mask: list[bool]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """<|im_start|> text <|im_end|>, all trained (there is nothing to predict the first from)."""
    return encode_segments(tokenizer, [text_segments(tokenizer, {"text": text})])[0]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
    **template_options: Any,
) -> Encoded:
    """A conversation as the chat template writes it.

    Args:
        messages: SPEC's messages: "role", "content", and perhaps "tools" (in a first system
            message), "tool_calls" and "reasoning_content".
        add_generation_prompt: end with the header of an assistant's turn, for it to answer.
        template_options: variables of the template, such as tools or open_thinking.
    """
    segments = chat_segments(tokenizer, messages, add_generation_prompt, template_options)
    return encode_segments(tokenizer, [segments])[0]


# A document in segments: control tokens as ids, everything between them as text; with "loss_mask".
Segments = list[tuple[int | str, bool]]


def encode_segments(tokenizer: PreTrainedTokenizerBase, documents: list[Segments]) -> list[Encoded]:
    """Encode the texts of many documents in one call, and put the control tokens between them."""
    escape = added_token_patterns(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # an earlier call of the tokenizer may have left them on
    backend.no_truncation()
    parts = [  # [document][segment] → ids or texts that hold no control token
        [
            escape.control.split(piece) if escape.may_be_in(piece) else [piece]
            for piece, _ in segments
        ]
        for segments in documents
    ]
    texts = [part for document in parts for piece in document for part in piece if part != ""]
    texts = [text for text in texts if isinstance(text, str)]
    encodings = iter(backend.encode_batch_fast(texts, add_special_tokens=False))

    encoded = []
    for segments, document in zip(documents, parts, strict=True):
        ids, trained = [], []
        for (_, is_trained), piece in zip(segments, document, strict=True):
            for part in piece:
                if part == "":
                    continue
                new = [part] if isinstance(part, int) else next(encodings).ids
                ids += new
                trained += [is_trained] * len(new)
        encoded.append(Encoded(ids, trained))
    return encoded


@dataclass
class AddedTokenPatterns:
    """What keeps a person's text from being read as control tokens.

    `any_token` matches the empty place behind the first character of a token that has a name, and
    `control` does so for all of them but the tags: a text cut there can no longer be read as one.
    `special` are the tokens that only the template writes.
    """

    control: re.Pattern
    any_token: re.Pattern
    special: dict[str, int]
    first_characters: set[str]

    def may_be_in(self, piece: int | str) -> bool:
        """False for most texts, which saves them the slow search for tokens."""
        return isinstance(piece, str) and any(c in piece for c in self.first_characters)


@lru_cache(maxsize=8)
def added_token_patterns(tokenizer: PreTrainedTokenizerBase) -> AddedTokenPatterns:
    added = tokenizer.added_tokens_decoder
    special = {token.content: number for number, token in added.items() if token.special}
    names = [token.content for token in added.values()]

    def behind_first_character(tokens: Iterable[str]) -> re.Pattern:
        return re.compile(
            "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in tokens)
        )

    control = [name for name in names if name not in TAGS]
    return AddedTokenPatterns(
        behind_first_character(control),
        behind_first_character(names),
        special,
        {name[0] for name in names},
    )


def chat_segments(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool,
    template_options: dict[str, Any],
) -> Segments:
    """The rendered conversation, cut at the control tokens that the template wrote."""
    escape = added_token_patterns(tokenizer)
    cut = unused_character([messages, template_options])

    def mark(value: Any, pattern: re.Pattern) -> Any:
        """Put `cut` inside every control token that stands in a text of a message."""
        if isinstance(value, str):
            return pattern.sub(cut, value) if escape.may_be_in(value) else value
        if isinstance(value, list):
            return [mark(item, pattern) for item in value]
        if isinstance(value, dict):
            return {mark(key, pattern): mark(item, pattern) for key, item in value.items()}
        return value

    # The assistant may write tags such as <think>; nobody else can.
    marked = [
        mark(message, escape.control if message["role"] == "assistant" else escape.any_token)
        for message in map(with_lists, messages)
    ]
    rendered, spans = render_jinja_template(
        [marked],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **{**tokenizer.special_tokens_map, **mark(template_options, escape.any_token)},
    )
    text, spans = rendered[0], spans[0]

    split_special = re.compile("(" + "|".join(map(re.escape, escape.special)) + ")")
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    segments: Segments = []
    for number, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        trained = number % 2 == 1  # the spans are every second stretch of text
        for part in split_special.split(text[start:end]):
            if part in escape.special:
                segments.append((escape.special[part], trained))
            else:
                segments += [(plain, trained) for plain in part.split(cut) if plain]
    return segments


def unused_character(content: Any) -> str:
    """A character of Unicode's private use area that occurs nowhere in `content`."""
    text = json.dumps(content, ensure_ascii=False, default=str)
    return next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in text)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """[V] UTF-8 bytes that each token stands for; 0 for control tokens, which are no text.

    With it a loss in nats per token becomes one in bits per byte, comparable between tokenizers.
    """
    sizes = torch.zeros(len(tokenizer), dtype=torch.long)
    added = tokenizer.added_tokens_decoder
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            sizes[number] = 0 if added[number].special else len(token.encode())
        else:
            sizes[number] = len(token)  # byte-level BPE writes each byte as one character
    return sizes


# -- rows of a data file ---------------------------------------------------------------------------


def text_segments(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> Segments:
    """Pretraining: {"text": "…"}. An empty text gives no segments."""
    text = row.get("text")
    if not isinstance(text, str):
        raise UserError('has no "text" (pretraining rows are {"text": "…"})')
    if not text.strip():
        return []
    return [(tokenizer.bos_token_id, True), (text, True), (tokenizer.eos_token_id, True)]


def conversation_segments(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> Segments:
    """SFT: {"conversations": [{"role": "user", "content": "…"}, …]}."""
    messages = check_messages(row.get("conversations"))
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("has no assistant turn, so there is nothing to train on")
    return chat_segments(tokenizer, messages, False, {})


def preference_segments(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]
) -> tuple[Segments, Segments]:
    """DPO and reward models: {"chosen": [messages], "rejected": [messages]}."""
    if not (row.get("chosen") and row.get("rejected")):
        lacking = " and ".join(f'"{side}"' for side in SIDES if not row.get(side))
        raise UserError(f'has no {lacking} (rows are {{"chosen": [messages], "rejected": …}})')
    chosen, rejected = (check_messages(row[side], f'"{side}"') for side in SIDES)
    shared = 0
    while chosen[shared : shared + 1] == rejected[shared : shared + 1]:
        if shared == len(chosen):
            raise UserError("has the same messages as chosen and as rejected: there is no choice")
        shared += 1
    for name, messages in zip(SIDES, (chosen, rejected), strict=True):
        role = messages[shared]["role"] if shared < len(messages) else None
        if not any(message["role"] == "assistant" for message in messages[shared:]):
            raise UserError(f'has no assistant turn in "{name}" that the other side has not')
        if role != "assistant":
            raise UserError(
                f"has a {role} message where the two sides begin to differ: both must answer the "
                "same prompt"
            )
    return (
        completion(tokenizer, chosen, chosen[:shared]),
        completion(tokenizer, rejected, chosen[:shared]),
    )


def completion(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: list[Message]
) -> Segments:
    """The conversation, trained only behind the prompt that it begins with; what stands behind its
    last trained token (a line break) is left away, so that it ends as a sampled answer does."""
    answered = sum(message["role"] == "assistant" for message in prompt)
    segments: Segments = []
    turns, before = 0, False  # assistant turns so far
    for piece, trained in chat_segments(tokenizer, messages, False, {}):
        turns += trained and not before
        before = trained
        segments.append((piece, trained and turns > answered))
    while not segments[-1][1]:
        segments.pop()
    return segments


def check_messages(messages: Any, key: str = '"conversations"') -> list[Message]:
    """SPEC's list of messages, or a UserError that says what is wrong with it."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f'has no {key} (a list of messages {{"role": "user", "content": "…"}})')
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            raise UserError('has a message without a "role"')
        if message["role"] not in ROLES:
            raise UserError(f"has the unknown role {message['role']!r}; known: {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and (message.get("tool_calls") or message.get("tools")):
            message["content"] = ""
        elif not isinstance(content, str):
            raise UserError(f'has a {message["role"]} message whose "content" is no text')
        if not isinstance(message.get("reasoning_content") or "", str):
            raise UserError('has a "reasoning_content" that is no text')
    return messages


def with_lists(message: Message) -> Message:
    """The message with "tools" and "tool_calls" as lists; files may have them as JSON in a string,
    so that their columns are uniform. UserError if they are neither."""
    lists = {key: message[key] for key in ("tools", "tool_calls") if message.get(key)}
    for key, value in lists.items():
        if isinstance(value, str):
            try:
                value = parse_json(value)
            except UserError as error:
                raise UserError(f'has "{key}" whose text {error}') from None
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise UserError(f'has "{key}" that are no list of objects')
        lists[key] = value
    for call in lists.get("tool_calls", []):
        if not isinstance((call.get("function") or call).get("name"), str):
            raise UserError('has a tool call without a "name"')
    return {**message, **lists}


# -- files to a memory-mapped dataset --------------------------------------------------------------

ROWS: dict[str, Callable[[PreTrainedTokenizerBase, dict[str, Any]], Any]] = {
    "text": text_segments,
    "conversations": conversation_segments,
    "preferences": preference_segments,  # gives two documents
}


def load_documents(
    paths: str | Path | list[str | Path],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    workers: int | None = None,
    cache: Path | str = CACHE,
) -> Dataset:
    """The documents of one or several `.jsonl` / `.jsonl.gz` files, tokenised.

    Args:
        kind: "text", "conversations" or "preferences", whose documents 2i and 2i + 1 are the
            chosen and the rejected side of pair i.
        workers: processes to tokenise with; default: one a core.

    Returns:
        A memory-mapped dataset with columns input_ids (uint16 or int32) and loss_mask (bool); its
        `info.description` is a hash of the tokens, the same for the same data anywhere.

    Raises:
        UserError: a file is missing or unreadable, or a line of it is not what it must be.
    """
    files = [check_file(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = json.dumps(
        [CACHE_VERSION, kind, tokenizer_hash(tokenizer), tokenizer.chat_template, seen]
    )
    arrow = Path(cache) / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.arrow"
    try:
        arrow.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(arrow.with_suffix(".lock")):  # several ranks, or runs, tokenise it once
            if not is_whole(arrow):
                tokenise_files(files, kind, tokenizer, arrow, workers or os.cpu_count() or 1)
    except OSError as error:  # a full disk too
        why = error.strerror or error
        raise UserError(f"cannot write to the cache folder {arrow.parent}: {why}") from error
    documents = Dataset.from_file(str(arrow)).with_format("numpy")
    documents.info.description = arrow.with_suffix(".sha256").read_text()
    if len(documents) == 0:
        raise UserError(f"{', '.join(map(str, files))} holds no documents")
    return documents


def is_whole(arrow: Path) -> bool:
    """Whether a cache is there and undamaged, as after a power cut it may not be."""
    try:
        with pa.memory_map(str(arrow)) as file:
            pa.ipc.open_stream(file).read_all()  # maps it, without reading the tokens
        return arrow.with_suffix(".sha256").exists()
    except (OSError, pa.ArrowInvalid):
        return False


def check_file(path: str | Path) -> Path:
    path = Path(path).resolve()
    if not path.exists():
        raise UserError(f"the data file {path} does not exist; --data_path names another")
    if not path.is_file():
        raise UserError(f"the data file {path} is a folder; name the .jsonl file in it")
    if not os.access(path, os.R_OK):
        raise UserError(f"the data file {path} may not be read by this user")
    return path


def tokenise_files(
    files: list[Path],
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    arrow: Path,
    workers: int,
) -> None:
    """Write the tokens of all documents to `arrow`, which appears only when it is complete."""
    small = len(tokenizer) <= 2**16
    number = np.uint16 if small else np.int32
    schema = pa.schema(
        {"input_ids": pa.list_(pa.from_numpy_dtype(number)), "loss_mask": pa.list_(pa.bool_())}
    )
    all_ids, all_lengths = hashlib.sha256(), hashlib.sha256()
    partial = arrow.with_name(f".{arrow.name}.partial")
    size = sum(path.stat().st_size for path in files)
    if size < FEW_BYTES:
        workers = 1  # starting processes would take longer than the work
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenising", leave=False)
    try:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            stretches = encode_lines(files, kind, tokenizer, workers)
            while some := list(islice(stretches, TASKS_PER_BATCH)):
                ids, trained, lengths = map(np.concatenate, list(zip(*some, strict=True))[:3])
                all_ids.update(ids.astype("<i4").tobytes())
                all_lengths.update(lengths.astype("<i8").tobytes())
                offsets = pa.array(np.concatenate(([0], np.cumsum(lengths))), pa.int32())
                columns = (
                    pa.ListArray.from_arrays(offsets, pa.array(values))
                    for values in (ids.astype(number), trained)
                )
                writer.write_batch(pa.RecordBatch.from_arrays(list(columns), schema=schema))
                bar.update(sum(consumed for *_, consumed in some))
        flush_to_disk(partial)
        both = hashlib.sha256(all_ids.digest() + all_lengths.digest()).hexdigest()
        arrow.with_suffix(".sha256").write_text(both[:16])
        os.replace(partial, arrow)
    finally:
        bar.close()
        partial.unlink(missing_ok=True)


@dataclass
class Lines:
    """A stretch of a data file, for one task of a worker."""

    path: Path
    first: int  # its first line's number, from 1
    lines: list[bytes]
    consumed: int  # bytes of the file on disk that it took


def encode_lines(
    files: list[Path], kind: str, tokenizer: PreTrainedTokenizerBase, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """(ids, trained, lengths, bytes consumed) of stretch after stretch, in the files' order."""
    tasks = (stretch for path in files for stretch in read_lines(path))
    if workers == 1:
        for task in tasks:
            yield encode_task(tokenizer, kind, task)
        return
    # Rows are spread over processes, so the tokenizer's own threads would only get in the way.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ProcessPoolExecutor(
        workers, initializer=worker_starts, initargs=(tokenizer, os.getpid())
    ) as pool:
        waiting: deque[Future] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(encode_task_in_worker, kind, task))
                if len(waiting) > 2 * workers:  # bounds what stands in memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def flush_to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def worker_starts(tokenizer: PreTrainedTokenizerBase, parent: int) -> None:
    global worker_tokenizer  # sent once to each process, not with every task
    worker_tokenizer = tokenizer
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: int) -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def encode_task_in_worker(kind: str, task: "Lines"):
    return encode_task(worker_tokenizer, kind, task)


def read_lines(path: Path) -> Iterator[Lines]:
    """A file in stretches of LINES_PER_TASK lines."""
    with open(path, "rb") as raw:
        file = gzip.open(raw) if path.suffix == ".gz" else raw
        lines, first, before = [], 1, 0
        try:
            for number, line in enumerate(file, start=1):
                lines.append(line)
                if len(lines) == LINES_PER_TASK:
                    at = raw.tell()
                    yield Lines(path, first, lines, at - before)
                    lines, first, before = [], number + 1, at
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged, or no gzip file: {error}") from error
        if lines:
            yield Lines(path, first, lines, raw.tell() - before)


def encode_task(
    tokenizer: PreTrainedTokenizerBase, kind: str, task: Lines
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Parse and encode a stretch of lines; empty lines and empty texts give no document."""
    documents = []
    for number, line in enumerate(task.lines, start=task.first):
        if not line.strip():
            continue
        try:
            segments = ROWS[kind](tokenizer, parse_row(line))
        except UserError as error:
            raise UserError(f"line {number} of {task.path} {error}") from None
        if segments:
            documents += segments if kind == "preferences" else [segments]
    encoded = encode_segments(tokenizer, documents)
    return (
        np.array(list(chain.from_iterable(d.ids for d in encoded)), np.int32),
        np.array(list(chain.from_iterable(d.loss_mask for d in encoded)), bool),
        np.fromiter((len(document.ids) for document in encoded), np.int64),
        task.consumed,
    )


def parse_row(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; UserError if it is anything else."""
    try:
        row = parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 ({error.reason} at byte {error.start})") from None
    if not isinstance(row, dict):
        raise UserError("is no JSON object")
    return row


def parse_json(text: str) -> Any:
    """json.loads, with everything that can be wrong as a UserError."""
    try:
        value = json.loads(text)
        if "\\u" in text:  # may spell half of a character
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("has half a character (a surrogate without its pair)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is no JSON that can be read: {error}") from None
    return value

"""Bits per byte of a model on text: comparable between models with different tokenizers.

    python scripts/eval_ppl.py --weight pretrain --data FILE [--json FILE]
    python scripts/eval_ppl.py --load_from ./MiniMind2 --data FILE        any transformers folder

Each document is evaluated alone: its first 500 characters, after <|im_start|> (or the tokenizer's
own BOS). The metric is the sum of −log2 p over all tokens after the first, divided by the UTF-8
bytes of the text. Without a model a byte costs 8 bits.

FILE is JSONL with a document per line: {"text": …}, or {"conversations": [messages]}, whose
contents are joined, or a .json list of them. In any other file each 500 characters are a document.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from scripts.serving.arguments import MACHINE, ModelArgs

CHARACTERS = 500
TEXT = "text"  # a group of --help


def check_text(path: str | Path) -> None:
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")


@dataclass
class Args(ModelArgs):
    weight: str = option("pretrain", "own weights: a stage, such as pretrain, or a .pth file")
    data: str = option(
        "",
        "the text to evaluate on: JSONL or a text file, also .gz",
        group=TEXT,
        required=True,
        check=check_text,
    )
    documents: int = option(
        0, "number of documents, from the first; 0: all", group=TEXT, at_least=0
    )
    characters: int = option(
        CHARACTERS,
        "number of characters of each document, from the first; 0: all",
        group=TEXT,
        at_least=0,
    )
    batch_size: int = option(16, "documents per forward pass", group=MACHINE, at_least=1)
    skip_bad_rows: bool = option(False, "leave bad rows out; 0: the first is an error", group=TEXT)
    json: str = option("", "also write the results to this file")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dataset.encoding import check_messages, encode_segments
from dataset.forms.files import open_text
from dataset.forms.rows import as_conversation
from dataset.jsonl import BadRows, Row, error_at, read_rows
from dataset.text import language_of
from model.losses import IGNORE_INDEX
from model.weights import write_json
from scripts.serving.loading import load_chat_model

MAX_LENGTH = 2048  # tokens per forward pass


# -- documents -------------------------------------------------------------------------------------


def read_texts(
    path: str | Path,
    documents: int = 0,
    characters: int = CHARACTERS,
    bad_rows: BadRows | None = None,
) -> list[str]:
    """The first characters of the first documents of a file; 0: all. `bad_rows` counts the rows
    that are none, which are then left out."""
    texts = filter(None, read_documents(path, characters, bad_rows))
    return [text[: characters or None] for text in islice(texts, documents or None)]


def read_documents(
    path: str | Path, characters: int = CHARACTERS, bad_rows: BadRows | None = None
) -> Iterator[str]:
    path = Path(path)
    check_text(path)
    if {".jsonl", ".json", ".ndjson"} & set(path.suffixes):
        for number, row in read_rows(path, bad_rows):
            with error_at(path, number, bad_rows):
                yield extract_text(row)
    else:
        text = read_text(path)
        step = characters or len(text)
        yield from (text[at : at + step] for at in range(0, len(text), step))


def extract_text(row: Row) -> str:
    if isinstance(row.get("text"), str):
        return row["text"]
    try:
        messages = check_messages(as_conversation(row)["conversations"])
    except UserError as error:
        raise UserError(f'is no {{"text": …}} and {error}') from None
    return "\n".join(message["content"] for message in messages)


def read_text(path: Path) -> str:
    with open_text(path) as (_, lines):
        return "".join(lines)


def length(text: str) -> str:
    """The interval of its number of characters between powers of two, such as 64-127."""
    power = 2 ** (len(text).bit_length() - 1)
    return f"{power}-{2 * power - 1}"


# -- bits ------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A part of a document that fits the context, and the first token in it that counts."""

    document: int
    ids: list[int]
    start: int


def sliding_windows(ids: list[int], document: int, max_length: int) -> Iterator[Window]:
    """A document in windows that overlap by half, which is context only: every token but the first
    counts once."""
    yield Window(document, ids[:max_length], 1)
    half = max_length // 2
    for at in range(half, len(ids) - max_length + half, half):
        yield Window(document, ids[at : at + max_length], max_length - half)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """BOS and the tokens of each text."""
    bos = tokenizer.bos_token_id
    bos = tokenizer.eos_token_id if bos is None else bos  # Qwen has only EOS
    if bos is None:
        raise UserError("the tokenizer has neither BOS nor EOS")
    encoded = encode_segments(tokenizer, [[(bos, False), (text, True)] for text in texts])
    return [document.ids for document in encoded]


@torch.inference_mode()
def document_bits(
    model: PreTrainedModel,
    documents: list[list[int]],
    batch_size: int = 16,
) -> list[float]:
    """Total −log2 p of each document's tokens after the first. Windows of about the same length
    share a batch."""
    max_length = min(
        MAX_LENGTH, getattr(model.config, "max_position_embeddings", None) or MAX_LENGTH
    )
    windows = [w for n, ids in enumerate(documents) for w in sliding_windows(ids, n, max_length)]
    windows.sort(key=lambda window: len(window.ids))
    bits = [0.0] * len(documents)
    for at in tqdm(range(0, len(windows), batch_size), desc="bits per byte", leave=False):
        batch = windows[at : at + batch_size]
        # padding on the right: with causal attention no token sees it
        ids = torch.zeros(len(batch), len(batch[-1].ids), dtype=torch.long)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for row, window in enumerate(batch):
            ids[row, : len(window.ids)] = torch.tensor(window.ids)
            labels[row, window.start : len(window.ids)] = torch.tensor(window.ids[window.start :])
        logits = model(ids.to(model.device), use_cache=False).logits[:, :-1]  # [B, T−1, V]
        labels = labels[:, 1:].to(model.device)
        mask = labels != IGNORE_INDEX
        nats = F.cross_entropy(logits[mask].float(), labels[mask], reduction="none")
        window_losses = nats.double().split(mask.sum(1).tolist())
        for window, losses in zip(batch, window_losses, strict=True):
            bits[window.document] += losses.sum().item() / math.log(2)
    return bits


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    batch_size: int = 16,
) -> float:
    """Bits per byte, as described above."""
    bits = document_bits(model, encode(tokenizer, texts), batch_size)
    return sum(bits) / sum(len(text.encode()) for text in texts)


# -- the report ------------------------------------------------------------------------------------


def summarize(texts: list[str], bits: list[float]) -> dict[str, float]:
    """Bits per byte of some documents, with the standard error of a ratio of two sums over
    independent documents; None for a single one."""
    sizes = [len(text.encode()) for text in texts]
    ratio, n = sum(bits) / sum(sizes), len(texts)
    spread = sum((b - ratio * size) ** 2 for b, size in zip(bits, sizes, strict=True))
    error = math.sqrt(spread * n / (n - 1)) / sum(sizes) if n > 1 else None
    return {
        "documents": n,
        "bytes": sum(sizes),
        "bits_per_byte": round(ratio, 5),
        "standard_error": None if error is None else round(error, 5),
    }


def summarize_by(
    group_of: Callable[[str], str], texts: list[str], bits: list[float]
) -> dict[str, dict]:
    """Bits per byte of each group of documents, the groups in their natural order."""
    groups: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        groups.setdefault(group_of(text), []).append(number)
    order = sorted(groups, key=lambda group: int(group.split("-")[0]) if "-" in group else 0)
    return {
        group: summarize([texts[n] for n in groups[group]], [bits[n] for n in groups[group]])
        for group in order
    }


def main(args: Args) -> dict[str, float]:
    bad_rows = BadRows() if args.skip_bad_rows else None
    texts = read_texts(args.data, args.documents, args.characters, bad_rows)
    if bad_rows and bad_rows.count:
        bad_rows.refuse_if_all(len(texts))
        print(bad_rows)
    if not texts:
        raise UserError(f"{args.data} contains no text")
    loaded = load_chat_model(args, decode_only=False)
    documents = encode(loaded.tokenizer, texts)
    bits = document_bits(loaded.model, documents, args.batch_size)
    tokens = sum(map(len, documents)) - len(documents)
    result = {
        "model": loaded.name,
        "parameters": loaded.num_parameters,
        "data": args.data,
        "characters": args.characters,
        **summarize(texts, bits),
        "perplexity": round(2 ** (sum(bits) / tokens), 3),
        "bytes_per_token": round(sum(len(text.encode()) for text in texts) / tokens, 3),
        "languages": summarize_by(language_of, texts, bits),
        "lengths": summarize_by(length, texts, bits),
    }
    show(result)
    if args.json:
        write_json(args.json, result)
    return result


def show(result: dict) -> None:
    table = Table(
        title=f"{result['model']} ({result['parameters'] / 1e6:.2f}M) on {result['data']}",
        title_justify="left",
    )
    for name in ("documents", "", "bytes", "bits per byte", "± s.e."):
        table.add_column(name, justify="left" if name == "documents" else "right")
    groups = [("language", result["languages"]), ("characters", result["lengths"])]
    for kind, members in [*groups, ("", {"all": result})]:
        for name, row in members.items():
            error = row["standard_error"]
            table.add_row(
                f"{kind} {name}".strip(),
                f"{row['documents']:,}",
                f"{row['bytes']:,}",
                f"{row['bits_per_byte']:.4f}",
                "" if error is None else f"{error:.4f}",
            )
        table.add_section()
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(
        f"perplexity {result['perplexity']:.2f} per token of {result['bytes_per_token']:.2f} bytes "
        "on average, comparable only between models with the same tokenizer"
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

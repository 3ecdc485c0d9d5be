"""Show a batch token by token: what the model reads, and what it is trained to write.

    python scripts/show_batch.py --data_path dataset/sft_mini_512.jsonl
    python scripts/show_batch.py --data_path dataset/pretrain_hq.jsonl --kind text
    python scripts/show_batch.py --data_path dataset/dpo.jsonl --kind preferences --packing 0

A green token is trained: the model learns to predict it from what stands before it in its
document. A grey one is only read. A bar begins a new document of the row, and nothing sees across.
"""

from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dataset.lm_dataset import load_documents
from dataset.packing import IGNORE_INDEX, PackedDataset, collate
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.weights import ROOT, load_tokenizer


@dataclass
class Args:
    data_path: list[str] = option(
        [str(ROOT / "dataset" / "sft_mini_512.jsonl")], "JSONL file(s), .jsonl or .jsonl.gz"
    )
    kind: Literal["conversations", "text", "preferences"] = option(
        "conversations", "data of SFT, of pretraining, or of DPO: chosen and rejected in turn"
    )
    rows: int = option(1, "how many rows to show")
    first: int = option(0, "the first row to show")
    max_seq_len: int = option(128, "tokens in a row")
    packing: bool = option(True, "several documents a row; 0: one, padded")
    table: bool = option(False, "a line a token: position, id, text, label")
    tokenizer_path: str = option("", "folder of the tokenizer; default: model/")

    def __post_init__(self) -> None:
        if self.max_seq_len < 2:
            raise UserError("--max_seq_len must be at least 2: a token and the one it predicts")
        if self.rows < 1 or self.first < 0:
            raise UserError("--rows must be at least 1 and --first at least 0")


def main(args: Args) -> None:
    tokenizer = load_tokenizer(args.tokenizer_path)
    documents = load_documents(args.data_path, args.kind, tokenizer)
    rows = PackedDataset(documents, args.max_seq_len, packing=args.packing)
    chosen = range(args.first, min(args.first + args.rows, len(rows)))
    if not chosen:
        raise UserError(f"there is no row {args.first}; the data makes {len(rows)} rows")
    batch = collate([rows[row] for row in chosen], tokenizer.pad_token_id)
    console = Console()
    for row, *columns in zip(
        chosen,
        batch.input_ids.tolist(),
        batch.labels.tolist(),
        batch.position_ids.tolist(),
        strict=True,
    ):
        trained = sum(label != IGNORE_INDEX for label in columns[1])
        console.rule(f"row {row}: {len(columns[0])} tokens, {trained} trained")
        tokens = list(zip(*columns, strict=True))
        console.print(as_table(tokenizer, tokens) if args.table else as_text(tokenizer, tokens))
    console.print(
        f"{len(rows):,} rows of {args.max_seq_len}, {rows.packing_efficiency:.1%} full, from "
        f"{len(documents):,} documents"
    )


def as_text(tokenizer, tokens: list[tuple[int, int, int]]) -> Text:
    """Each token between thin lines, coloured by whether it is trained."""
    text = Text()
    for token, label, position in tokens:
        if position == 0 and text:
            text.append("\n┃ ", style="bold magenta")
        shown = readable(tokenizer, token)
        text.append(shown, style="green" if label != IGNORE_INDEX else "bright_black")
        text.append("\n" if shown.endswith("⏎") else "·", style="dim")
    return text


def as_table(tokenizer, tokens: list[tuple[int, int, int]]) -> Table:
    table = Table("place", "position", "id", "token", "trained to predict it")
    for place, (token, label, position) in enumerate(tokens):
        trained = "yes" if label != IGNORE_INDEX else ""
        style = "green" if trained else "bright_black"
        table.add_row(
            str(place),
            str(position),
            str(token),
            Text(readable(tokenizer, token)),
            trained,
            style=style,
        )
    return table


def readable(tokenizer, token: int) -> str:
    """A token as a person can see it: line breaks marked, parts of characters as their bytes."""
    text = tokenizer.decode([token])
    if "\ufffd" in text:
        characters = tokenizer.convert_ids_to_tokens(token)
        return f"‹{len(characters)} byte{'s' * (len(characters) > 1)}›"
    return text.replace("\n", "⏎").replace("\t", "⇥")


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))

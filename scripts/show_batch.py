"""Show a batch token by token: the inputs, and which of them have a label.

    python scripts/show_batch.py --data_path dataset/sft_t2t_mini.jsonl
    python scripts/show_batch.py --data_path dataset/pretrain_t2t_mini.jsonl --kind text
    python scripts/show_batch.py --data_path dataset/dpo.jsonl --kind preferences --packing 0

The loss counts green tokens: the model learns to predict them from the tokens before them in their
document. Grey tokens are context only. A bar starts the next document of a packed sequence;
attention does not cross it.
"""

from dataclasses import dataclass
from typing import Literal

from dataset.jsonl import check_file
from dataset.released import default_data
from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import check_tokenizer_folder

STAGE_OF = {"text": "pretrain", "conversations": "full_sft", "preferences": "preferences"}


@dataclass
class Args:
    data_path: list[str] = option(
        [],
        "JSONL file(s), .jsonl, .jsonl.gz or .json; default: as for pretraining, SFT or DPO",
        check=check_file,
    )
    kind: Literal["text", "conversations", "preferences"] = option(
        "conversations", "of the rows; preferences: chosen and rejected in turn"
    )
    data_dir: str = option("", "folder of the default data file; default: dataset/")
    skip_bad_rows: bool = option(False, "leave bad rows out; 0: the first is an error")
    rows: int = option(1, "number of sequences to show", at_least=1)
    first: int = option(0, "index of the first sequence to show", at_least=0)
    max_seq_len: int = option(128, "length of a sequence, in tokens", at_least=2)
    packing: bool = option(True, "several documents per sequence; 0: one, padded")
    table: bool = option(False, "one line per token: position, id, text, label")
    tokenizer_path: str = option(
        "", "folder of the tokenizer; default: model/", check=check_tokenizer_folder
    )

    def __post_init__(self) -> None:
        self.data_path = self.data_path or [default_data(STAGE_OF[self.kind], self.data_dir)]


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


from rich.console import Console
from rich.table import Table
from rich.text import Text

from dataset.lm_dataset import load_documents
from dataset.packing import IGNORE_INDEX, PackedDataset, collate
from model.inference.tokens import decode_token_bytes
from model.weights import load_tokenizer


def main(args: Args) -> None:
    tokenizer = load_tokenizer(args.tokenizer_path)
    documents = load_documents(
        args.data_path, args.kind, tokenizer, skip_bad_rows=args.skip_bad_rows
    )
    sequences = PackedDataset(documents, args.max_seq_len, packing=args.packing)
    indices = range(args.first, min(args.first + args.rows, len(sequences)))
    if not indices:
        raise UserError(f"there is no sequence {args.first}; the data has {len(sequences)}")
    batch = collate([sequences[index] for index in indices], tokenizer.pad_token_id)
    console = Console()
    for index, *columns in zip(
        indices,
        batch.input_ids.tolist(),
        batch.labels.tolist(),
        batch.position_ids.tolist(),
        strict=True,
    ):
        num_trained = sum(label != IGNORE_INDEX for label in columns[1])
        console.rule(f"sequence {index}: {len(columns[0])} tokens, {num_trained} trained")
        tokens = list(zip(*columns, strict=True))
        console.print(as_table(tokenizer, tokens) if args.table else as_text(tokenizer, tokens))
    console.print(
        f"{len(sequences):,} sequences of {args.max_seq_len}, "
        f"{sequences.packing_efficiency:.1%} full, from "
        f"{len(documents):,} documents"
    )


def as_text(tokenizer, tokens: list[tuple[int, int, int]]) -> Text:
    """The tokens with dots between them, green where they have a label."""
    text = Text()
    for token, label, position in tokens:
        if position == 0 and text:
            text.append("\n┃ ", style="bold magenta")
        shown = readable(tokenizer, token)
        text.append(shown, style="green" if label != IGNORE_INDEX else "bright_black")
        text.append("\n" if shown.endswith("⏎") else "·", style="dim")
    return text


def as_table(tokenizer, tokens: list[tuple[int, int, int]]) -> Table:
    table = Table("place", "position", "id", "token", "in the loss")
    for place, (token, label, position) in enumerate(tokens):
        in_loss = "yes" if label != IGNORE_INDEX else ""
        style = "green" if in_loss else "bright_black"
        table.add_row(
            str(place),
            str(position),
            str(token),
            Text(readable(tokenizer, token)),
            in_loss,
            style=style,
        )
    return table


def readable(tokenizer, token: int) -> str:
    """A token as visible text: line breaks as signs, incomplete characters as a byte count."""
    part = decode_token_bytes(tokenizer, token)
    try:
        text = part.decode()
    except UnicodeDecodeError:
        return f"‹{len(part)} byte{'s' * (len(part) > 1)}›"
    return text.replace("\n", "⏎").replace("\t", "⇥")


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

"""The effect of deduplication on a model: held-out bits per byte after the same number of tokens.

    python benchmarks/learning/dedup_effect.py --data_path pretrain.jsonl.gz --val_path val.jsonl.gz

Three pretrainings of one small model that differ only in their data: the documents as they are; the
documents after `prepare_data.py dedup`; and the documents with some of them repeated many times, as
in a crawl. The deduplicated third set is checked to equal the second, so that the second training
stands for both.
"""

import json
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path

from dataset.jsonl import read_lines
from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT, weight_path


@dataclass
class Args:
    data_path: str = option("", 'JSONL of {"text": …}, .jsonl or .jsonl.gz')
    val_path: str = option("", "held-out documents, in the same format")
    documents: int = option(20_000, "number of documents of data_path, from the first")
    repeated_share: float = option(0.01, "share of documents that are repeated")
    copies: int = option(100, "number of copies of each of them")
    max_steps: int = option(120, "optimizer steps of each training, of 4,096 tokens")
    hidden_size: int = option(192, "hidden size")
    num_hidden_layers: int = option(4, "number of layers")
    seed: int = option(42, "random seed of the training and of the choice of repeated documents")
    only: str = option("", "train on this data only: as it is, deduplicated or repeated")
    output: str = option(str(OUT / "dedup_effect"), "folder of data, weights and logs")
    json: str = option("", "also write the results to this file")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import numpy as np
from rich.console import Console
from rich.table import Table

from dataset.prepare.resumable import sha256_of
from model.weights import count_parameters, load_model, load_tokenizer, write_json
from scripts import prepare_data
from scripts.eval_ppl import bits_per_byte, read_texts
from trainer import train_pretrain
from trainer.common.hardware import describe_machine


def make_data(args: Args) -> dict[str, Path]:
    """Write the three data sets; returns their files."""
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    lines = [line for _, line in islice(read_lines(args.data_path), args.documents)]
    rng = np.random.default_rng(args.seed)
    repeated = rng.choice(len(lines), int(args.repeated_share * len(lines)), replace=False)
    copies = [line for number in repeated for line in [lines[number]] * (args.copies - 1)]
    datasets = {"as it is": lines, "repeated": lines + copies}
    files = {}
    for name, rows in datasets.items():
        files[name] = out / f"{name.replace(' ', '_')}.jsonl"
        files[name].write_bytes(b"".join(rows))
    deduplicated = {name: out / f"{path.stem}_dedup.jsonl" for name, path in files.items()}
    for name, path in files.items():
        prepare_data.dedup(
            prepare_data.Dedup(input=[str(path)], output=str(deduplicated[name]), force=True)
        )
    if sha256_of(deduplicated["as it is"]) != sha256_of(deduplicated["repeated"]):
        raise UserError("deduplicating the repeated documents gives another result")
    return {
        "as it is": files["as it is"],
        "deduplicated": deduplicated["as it is"],
        "repeated": files["repeated"],
    }


def train(args: Args, name: str, data: Path) -> dict:
    """Train on `data` and evaluate."""
    out = Path(args.output) / name.replace(" ", "_")
    run = train_pretrain.main(
        train_pretrain.Args(
            data_path=[str(data)],
            val_path=[args.val_path],
            save_dir=str(out),
            checkpoint_dir=str(out),
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_hidden_layers,
            batch_size=8,
            accumulation_steps=1,
            batch_ramp=0,
            epochs=100,
            max_steps=args.max_steps,
            eval_interval=0,
            save_interval=0,
            seed=args.seed,
        )
    )
    tokenizer = load_tokenizer()
    model = load_model(weight_path("pretrain", args.hidden_size, out), tokenizer=tokenizer)
    texts = read_texts(args.val_path, 300)
    return {
        "documents": sum(1 for _ in read_lines(data)),
        "parameters": count_parameters(model),
        "machine": describe_machine(model.device),
        **{key: run[key] for key in ("num_tokens", "seconds", "eval_bpb")},
        "by_the_rule": bits_per_byte(model, tokenizer, texts),
    }


def main(args: Args) -> dict:
    files = make_data(args)
    if args.only and args.only not in files:
        raise UserError(f"--only knows {', '.join(files)}, not {args.only}")
    names = [args.only] if args.only else list(files)
    report = {"date": str(date.today()), **{name: train(args, name, files[name]) for name in names}}
    table = Table("data", "documents", "tokens trained", "bits per byte", "by the rule")
    for name in names:
        run = report[name]
        counts = (run["documents"], run["num_tokens"])
        bits = (run["eval_bpb"], run["by_the_rule"])
        table.add_row(name, *(f"{n:,}" for n in counts), *(f"{b:.4f}" for b in bits))
    Console().print(table)
    print(json.dumps(report[names[-1]]["machine"]))
    if args.json:
        write_json(args.json, report)
    return report


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

"""Does open_thinking 0 mean an answer at once? A model trained with and without empty thoughts.

    python benchmarks/learning/empty_thoughts.py

The data has questions of three kinds, a third of each: sums, which are always thought about, and
two that never are. A model of half a million parameters learns them from nothing, with each
--empty_think_ratio, and is asked held-out questions, greedily. Reported for sums and for the rest:
the share of replies with a thought, and the share of right answers. "closed" asks a model that was
trained without empty thoughts with one, as if it had seen some.
"""

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from dataset.jsonl import write_rows
from model.command_line import option, parse_command_line
from model.errors import exit_on_user_error
from model.paths import OUT, weight_path


@dataclass
class Args:
    ratios: list[float] = option([0.0, 0.2, 1.0], "each --empty_think_ratio to train with")
    rows: int = option(3000, "rows of data")
    questions: int = option(300, "held-out questions")
    epochs: int = option(5, "passes through the data")
    hidden_size: int = option(64, "width of the model")
    seed: int = option(42, "of data and weights")
    output: str = option(str(OUT / "empty_thoughts"), "folder of data, weights and logs")
    json: str = option("", "also write the results to this file")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dataset.chat_template import Message
from dataset.encoding import encode_chat, ends_in_thought
from dataset.reply_parser import parse_reply
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.inference.thinking import close_thoughts, closes_thoughts
from model.weights import load_model, load_tokenizer, write_json
from trainer import train_full_sft
from trainer.common.hardware import describe_machine

WORDS = "red blue green black white pink brown grey gold silver".split()


def make_row(number: int, rng: np.random.Generator) -> list[Message]:
    """A question and its answer; every third is a sum."""
    if number % 3 == 0:
        a, b, c = rng.integers(1, 10, 3).tolist()
        thought = f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}"
        question, answer = f"{a} + {b} + {c}?", {"content": str(a + b + c)}
        return [
            {"role": "user", "content": question},
            {"role": "assistant", **answer, "reasoning_content": thought},
        ]
    words = rng.choice(WORDS, 3, replace=False).tolist()
    place = "first" if number % 3 == 1 else "last"
    question, answer = f"{place}: {' '.join(words)}", words[0 if place == "first" else -1]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def train(args: Args, ratio: float, data: Path) -> Path:
    out = Path(args.output) / f"ratio_{ratio:g}"
    train_full_sft.main(
        train_full_sft.Args(
            data_path=[str(data)],
            val_share=0.0,
            from_weight="none",
            empty_think_ratio=ratio,
            save_dir=str(out),
            checkpoint_dir=str(out),
            hidden_size=args.hidden_size,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_seq_len=256,
            batch_size=8,
            learning_rate=2e-3,
            epochs=args.epochs,
            save_interval=0,
            num_workers=0,
            seed=args.seed,
            device="cpu",
        )
    )
    return weight_path("full_sft", args.hidden_size, out)


def ask(path: Path, rows: list[list[Message]], open_thinking: bool, close: bool) -> dict[str, Any]:
    """Shares of replies that think, and that are right, of sums and of the rest."""
    tokenizer = load_tokenizer()
    model = load_model(path, tokenizer=tokenizer)
    if close:
        close_thoughts(tokenizer)
    options = dict(add_generation_prompt=True, open_thinking=open_thinking)
    prompts = [encode_chat(tokenizer, row[:1], **options).ids for row in rows]
    thinking = ends_in_thought(tokenizer, prompts[0])
    replies = generate(model, prompts, SamplingParams(64, temperature=0))
    texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
    parsed = [parse_reply(text, thinking) for text in texts]
    thinks = np.array([bool(reply.reasoning) for reply in parsed])
    right = np.array(
        [r.content.strip() == row[1]["content"] for r, row in zip(parsed, rows, strict=True)]
    )
    sums = np.arange(len(rows)) % 3 == 0
    result: dict[str, Any] = {"closes": closes_thoughts(tokenizer) and not open_thinking}
    for name, kind in (("sums", sums), ("rest", ~sums)):
        result |= {f"{name}_think": thinks[kind].mean(), f"{name}_right": right[kind].mean()}
    return result


def main(args: Args) -> dict[str, Any]:
    out, rng = Path(args.output), np.random.default_rng(args.seed)
    out.mkdir(parents=True, exist_ok=True)
    rows = [make_row(number, rng) for number in range(args.rows)]
    held_out = [make_row(number, rng) for number in range(args.questions)]
    write_rows(out / "rows.jsonl", [{"conversations": row} for row in rows])
    results = {}
    for ratio in args.ratios:
        path = train(args, ratio, out / "rows.jsonl")
        for name, thinks, close in (("0", False, False), ("1", True, False), ("0", False, True)):
            asked = f"open_thinking {name}" + ", closed" * close
            if not (close and ratio):  # closed already
                results[f"ratio {ratio:g}, {asked}"] = ask(path, held_out, thinks, close)
    table = Table("trained and asked", "sums: think", "right", "rest: think", "right")
    for name, result in results.items():
        table.add_row(name, *(f"{value:.0%}" for key, value in result.items() if "_" in key))
    Console().print(table)
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        **results,
    }
    if args.json:
        write_json(args.json, report)
    return report


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

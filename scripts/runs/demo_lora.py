"""A persona in a minute or two: LoRA on the model that `make demo` trained, and what it costs.

    python scripts/runs/demo_lora.py

Trains the persona of dataset/demo (a ship's captain) with trainer/train_lora.py. Then evaluates,
without the adapter and with it: questions to the persona in held-out phrasings, and the held-out
problems of each skill, on which accuracy should not drop. A model trained on the persona alone
would answer everything as the captain (catastrophic forgetting), so SFT conversations are mixed in
(replay): thousands, each seen once, because a few hundred seen often are memorised and the rest
forgotten. Metrics: out/demo/lora_report.json.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from dataset.jsonl import load_rows, write_rows
from model.command_line import option, parse_arguments, parse_command_line
from model.errors import exit_on_user_error
from model.paths import OUT, weight_path
from scripts.serving.arguments import ModelArgs


@dataclass
class Args:
    output: str = option(str(OUT / "demo"), "folder of the demo's data and weights")
    device: str = option("auto", "auto, cuda, mps or cpu")
    max_steps: int = option(0, "most optimizer steps, for a quick test; 0: all")
    questions: int = option(0, "maximum number of held-out questions of each kind; 0: all")
    seed: int = option(42, "random seed: replayed chats, initial adapter weights, order")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


from rich.console import Console
from rich.table import Table

from dataset.demo.files import write_demo_data
from dataset.demo.material import phrasing_key
from model.weights import write_json
from scripts.evaluation.exact_match import exact_match, greedy_answers
from scripts.runs.demo import HIDDEN_SIZE, held_out_tests
from scripts.serving.loading import ChatModel, load_chat_model
from trainer import train_lora
from trainer.common.hardware import describe_machine, resolve_device

REPLAYED_CHATS = 8500  # SFT conversations
PERSONA_EPOCHS = 6  # passes over the persona meanwhile
LORA = """--data_path {out}/persona_and_replay.jsonl
    --val_path {data}/lora_identity_val.jsonl --lora_name lora_identity
    --save_dir {out} --checkpoint_dir {out} --device {device} --hidden_size {width} --force 1
    --lora_targets q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
    --lora_r 64 --lora_alpha 128 --learning_rate 5e-4 --epochs 1 --batch_size 8 --max_seq_len 160
    --eval_interval 0 --log_interval 20 --save_interval 0 --compile 0"""
TITLES = {
    "persona": "persona, held-out phrasings",
    "persona_trained": "persona, phrasings trained on",
    "skills_mean": "skills, held-out problems",
    "textbook": "textbook, held-out phrasings",
}
QUESTIONS = ["Who are you?", "你是谁？", "I am tired today.", "What is 37 + 45?"]


def main(args: Args) -> dict[str, Any]:
    console, out = Console(highlight=False), Path(args.output)
    data, width = out / "data", HIDDEN_SIZE
    weights = str(weight_path("full_sft", width, out))
    adapter = str(weight_path("lora/lora_identity", width, out))
    load_chat_model(ModelArgs(weight=weights, device=args.device))  # errors show before the work
    write_demo_data(data, seed=42)

    persona, sft = (load_rows(data / f"{name}.jsonl") for name in ("lora_identity", "sft_mini_512"))
    rng = Random(args.seed)
    replay = rng.sample(without_conflicts(sft, persona), REPLAYED_CHATS)
    rows = persona * PERSONA_EPOCHS + replay
    rng.shuffle(rows)  # packing puts neighbours into one row: every batch should have both kinds
    write_rows(out / "persona_and_replay.jsonl", rows)

    console.rule("1. LoRA")
    values = dict(data=data, out=out, device=args.device, width=width)
    argv = [word.format(**values) for word in LORA.split()]
    argv += ["--seed", str(args.seed)]
    argv += ["--max_steps", str(args.max_steps)] if args.max_steps else []
    console.print(f"$ python trainer/train_lora.py {shlex.join(argv)}\n", soft_wrap=True)
    trained = train_lora.main(parse_arguments(train_lora.Args, argv=argv))

    console.rule("2. before and after")
    report: dict[str, Any] = {
        "training_seconds": round(trained["seconds"], 1),
        "eval_loss": trained["eval_loss"],
        "machine": describe_machine(resolve_device(args.device)),
    }
    for name, lora_weight in (("without", ""), ("with", adapter)):
        model_args = ModelArgs(
            weight=weights, lora_weight=lora_weight, device=args.device, dtype="float32"
        )
        loaded = load_chat_model(model_args)
        report[name] = evaluate(loaded, data, args.questions)
        console.print(f"[bold]{name} the adapter[/bold]")
        replies = greedy_answers(loaded.model, loaded.tokenizer, QUESTIONS)
        for question, reply in zip(QUESTIONS, replies, strict=True):
            console.print(f"  {question}\n      {reply}", soft_wrap=True)
    write_json(out / "lora_report.json", report)
    show(console, report)
    return report


def exchanges(row: dict) -> list[tuple[str, str]]:
    """(question, answer) of each exchange of a conversation."""
    contents = [message["content"] for message in row["conversations"]]
    return list(zip(contents[::2], contents[1::2], strict=True))


def without_conflicts(rows: list[dict], persona: list[dict]) -> list[dict]:
    """The conversations without the earlier answers to the persona's questions, wherever they are
    given: replaying them would train against the persona."""
    questions = {phrasing_key(question) for row in persona for question, _ in exchanges(row)}
    pairs = [pair for row in rows for pair in exchanges(row)]
    conflicts = {answer for question, answer in pairs if phrasing_key(question) in questions}
    return [row for row in rows if all(answer not in conflicts for _, answer in exchanges(row))]


def evaluate(loaded: ChatModel, data: Path, limit: int) -> dict[str, float]:
    """Exact-match accuracy on the persona, in phrasings that were trained on and in held-out ones,
    on skills and on the textbook."""
    model, tokenizer = loaded.model, loaded.tokenizer
    tests = held_out_tests(data, limit)
    textbook = exact_match(model, tokenizer, "textbook", tests.pop("textbook"))
    skills = [exact_match(model, tokenizer, name, rows) for name, rows in tests.items()]
    accuracies = {}
    for name, file in (("persona", "lora_identity_val"), ("persona_trained", "lora_identity")):
        pairs = [pair for row in load_rows(data / f"{file}.jsonl") for pair in exchanges(row)]
        rows = [{"prompt": question, "answer": answer} for question, answer in pairs]
        accuracies[name] = exact_match(model, tokenizer, name, rows[: limit or None])
    return accuracies | {"skills_mean": sum(skills) / len(skills), "textbook": textbook}


def show(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="questions, exactly right", title_justify="left")
    table.add_column("")
    table.add_column("without", justify="right")
    table.add_column("with", justify="right")
    for name, before in report["without"].items():
        table.add_row(TITLES[name], f"{before:.1%}", f"{report['with'][name]:.1%}")
    console.print(table)
    console.print(f"{report['training_seconds']:.0f} s of training ({report['machine']})")


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

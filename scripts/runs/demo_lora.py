"""A persona in a minute or two: LoRA on the model that `make demo` made, and what it costs.

    python scripts/runs/demo_lora.py

Trains the persona of dataset/demo (a ship's captain) with trainer/train_lora.py, and then grades,
without the addition and with it: questions to the persona in phrasings that were held out, and the
held-out problems of each skill, which should not suffer. Conversations of the fine-tuning before
are mixed in ("replay"), for a model that sees the persona alone answers everything as the captain:
thousands, each seen once, for a few hundred seen often are learnt by heart and the rest forgotten.
Figures: out/demo/lora_report.json.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from dataset.demo.files import write_demo_data
from dataset.demo.material import phrasing_key
from dataset.jsonl import load_rows, write_rows
from model.command_line import option, parse_arguments
from model.errors import exit_on_user_error
from model.inference.generation import prepare_to_decode
from model.model_lora import load_lora, merged_for_good
from model.model_minimind import MiniMindForCausalLM
from model.weights import OUT, load_model, load_tokenizer, weight_path, write_json
from scripts.runs.demo import HIDDEN_SIZE, answers, held_out_tests, score
from trainer import train_lora
from trainer.common.hardware import describe_machine, resolve_device

REPLAYED = 8500  # conversations of the fine-tuning before
REPEATED = 6  # times that the persona is seen meanwhile
LORA = """--data_path {out}/persona_and_replay.jsonl
    --val_path {data}/lora_identity_val.jsonl --lora_name lora_identity
    --save_dir {out} --checkpoint_dir {out} --device {device} --hidden_size {width}
    --lora_targets q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
    --lora_r 64 --lora_alpha 128 --learning_rate 5e-4 --epochs 1 --batch_size 8 --max_seq_len 160
    --eval_interval 0 --log_interval 20 --save_interval 0 --compile 0"""
ROWS = {
    "persona": "persona, held-out phrasings",
    "persona_trained": "persona, phrasings trained on",
    "skills_mean": "skills, held-out problems",
    "textbook": "textbook, held-out phrasings",
}
QUESTIONS = ["Who are you?", "你是谁？", "I am tired today.", "What is 37 + 45?"]


@dataclass
class Args:
    output: str = option(str(OUT / "demo"), "folder of the demo's data and weights")
    device: str = option("auto", "auto, cuda, mps or cpu")
    max_steps: int = option(0, "updates at most, for a quick look; 0: all")
    questions: int = option(0, "held-out questions of each kind at most; 0: all")
    seed: int = option(42, "of what is replayed, of the addition's first weights and of the order")


def main(args: Args) -> dict[str, Any]:
    console, out = Console(highlight=False), Path(args.output)
    data, weights = out / "data", weight_path("full_sft", HIDDEN_SIZE, out)
    tokenizer, device = load_tokenizer(), resolve_device(args.device)
    load_model(weights, tokenizer=tokenizer)  # a mistake shows before the work begins
    write_demo_data(data, seed=42)

    persona, before = (load_rows(data / f"{n}.jsonl") for n in ("lora_identity", "sft_mini_512"))
    rng = Random(args.seed)
    rows = persona * REPEATED + rng.sample(without_rivals(before, persona), REPLAYED)
    rng.shuffle(rows)  # neighbours share a row of tokens, and a batch should have some of both
    write_rows(out / "persona_and_replay.jsonl", rows)

    console.rule("1. LoRA")
    places = dict(data=data, out=out, device=args.device, width=HIDDEN_SIZE)
    words = [word.format(**places) for word in LORA.split()]
    words += ["--seed", str(args.seed)]
    words += ["--max_steps", str(args.max_steps)] if args.max_steps else []
    console.print(f"$ python trainer/train_lora.py {shlex.join(words)}\n", soft_wrap=True)
    trained = train_lora.main(parse_arguments(train_lora.Args, arguments=words))

    console.rule("2. before and after")
    report: dict[str, Any] = {
        "training_seconds": round(trained["seconds"], 1),
        "val_loss": trained["val_loss"],
        "machine": describe_machine(device),
    }
    for name in ("without", "with"):
        model = load_model(weights, tokenizer=tokenizer, device=device)
        if name == "with":
            load_lora(model, weight_path("lora/lora_identity", HIDDEN_SIZE, out))
            model = merged_for_good(model)
        report[name] = grades(prepare_to_decode(model), tokenizer, data, args.questions)
        console.print(f"[bold]{name} the addition[/bold]")
        for question, reply in zip(QUESTIONS, answers(model, tokenizer, QUESTIONS), strict=True):
            console.print(f"  {question}\n      {reply}", soft_wrap=True)
    write_json(out / "lora_report.json", report)
    show(console, report)
    return report


def exchanges(row: dict) -> list[tuple[str, str]]:
    """Each question of a conversation, with its answer."""
    turns = [message["content"] for message in row["conversations"]]
    return list(zip(turns[::2], turns[1::2], strict=True))


def without_rivals(rows: list[dict], persona: list[dict]) -> list[dict]:
    """The conversations without an answer that some question to the persona had so far: they would
    pull back what the persona pulls away."""
    asked = {phrasing_key(question) for row in persona for question, _ in exchanges(row)}
    pairs = [pair for row in rows for pair in exchanges(row)]
    rivals = {answer for question, answer in pairs if phrasing_key(question) in asked}
    return [row for row in rows if all(answer not in rivals for _, answer in exchanges(row))]


def grades(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase, data: Path, most: int
) -> dict[str, float]:
    """The shares of questions answered exactly right: to the persona, in the phrasings that are
    trained on and in others, and of skills and textbook."""
    tests = held_out_tests(data, most)
    textbook = score(model, tokenizer, "textbook", tests.pop("textbook"))
    skills = [score(model, tokenizer, name, rows) for name, rows in tests.items()]
    shares = {}
    for name, file in (("persona", "lora_identity_val"), ("persona_trained", "lora_identity")):
        pairs = [pair for row in load_rows(data / f"{file}.jsonl") for pair in exchanges(row)]
        rows = [{"prompt": asked, "answer": reply} for asked, reply in pairs[: most or None]]
        shares[name] = score(model, tokenizer, name, rows)
    return shares | {"skills_mean": sum(skills) / len(skills), "textbook": textbook}


def show(console: Console, report: dict[str, Any]) -> None:
    table = Table(title="questions, exactly right", title_justify="left")
    table.add_column("")
    table.add_column("without", justify="right")
    table.add_column("with", justify="right")
    for name, before in report["without"].items():
        table.add_row(ROWS[name], f"{before:.1%}", f"{report['with'][name]:.1%}")
    console.print(table)
    console.print(f"{report['training_seconds']:.0f} s of training ({report['machine']})")


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))

"""From nothing to a conversation in minutes: what `make demo` runs.

    python scripts/runs/demo.py

Makes the embedded data, pretrains a small model on it, fine-tunes it to answer, asks it questions
in English and Chinese, and grades it on what it has never seen: other problems of each skill, and
every fact of the textbook in a phrasing that was held out. The two trainings are ordinary
commands, which it prints. Everything lands in out/demo; the figures in out/demo_report.json.
"""

import shlex
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset.demo.files import load_tests, write_demo_data
from dataset.grading import grade
from dataset.lm_dataset import encode_chat
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.inference.generation import generate_text, prepare_to_decode
from model.inference.sampling import Sampling
from model.model_minimind import MiniMindForCausalLM
from model.weights import OUT, count_parameters, load_model, load_tokenizer, weight_path, write_json
from trainer import train_full_sft, train_pretrain
from trainer.common.hardware import describe_machine, resolve_device
from trainer.report.forecast import duration, seconds_of_an_update
from trainer.report.plots import plot_losses

HIDDEN_SIZE = 192
TRIAL_STEPS = 20
PRETRAIN_SHARE = 0.3  # of the time that is left for training; fine-tuning has the rest
GRADING_SECONDS = 30  # left for what comes after training
# Small batches and many updates, for there is little data and little time. Four heads of 48 see
# positions better than eight of 24; normalised queries and keys bear the high learning rate.
SIZES = f"""--hidden_size {HIDDEN_SIZE} --num_hidden_layers 4 --num_attention_heads 4
    --num_key_value_heads 4 --qk_norm 1"""
PRETRAIN = f"""--data_path {{data}}/pretrain_hq.jsonl --val_path {{data}}/pretrain_hq_val.jsonl
    {SIZES} --learning_rate 1e-3 --epochs 1 --max_seq_len 256 --batch_size 8"""
SFT = f"""--data_path {{data}}/sft_mini_512.jsonl --val_path {{data}}/sft_mini_512_val.jsonl
    --hidden_size {HIDDEN_SIZE} --learning_rate 8e-4 --epochs 3 --max_seq_len 160 --batch_size 12"""
COMMON = """--save_dir {out} --checkpoint_dir {out} --device {device}
    --accumulation_steps 1 --batch_ramp 0 --compile 0 --eval_interval 600 --log_interval 20
    --save_interval 0"""
QUESTIONS = [
    "Who are you?",
    "你是谁？",
    "What is 37 + 45?",
    "把 37、5、82、14 从小到大排序。",
    "In a nutshell, what is RoPE?",
    "什么是 KV cache？",
    "Will it rain tomorrow?",
    "你真棒！",
]


@dataclass
class Args:
    output: str = option(str(OUT / "demo"), "folder for data, weights, logs and plots")
    report: str = option(str(OUT / "demo_report.json"), "the figures, as JSON")
    started: float = option(0.0, "when the demo began, in seconds of the epoch (make says it)")
    device: str = option("auto", "auto, cuda, mps or cpu")
    minutes: float = option(
        12.0, "time for everything; a slow machine makes fewer updates; 0: no limit"
    )
    max_steps: int = option(0, "updates of each training at most, for a quick look; 0: all")
    questions: int = option(0, "held-out questions of each kind at most; 0: all")


def main(args: Args) -> dict:
    started = args.started or time.time()
    console, out = Console(highlight=False), Path(args.output)
    data = out / "data"

    console.rule("1. data, made from dataset/demo/files.py and dataset/demo/")
    write_demo_data(data, seed=42)
    until = started + args.minutes * 60 - GRADING_SECONDS if args.minutes else None
    share = PRETRAIN_SHARE
    pretrained = train(console, "2. pretraining", train_pretrain, PRETRAIN, until, share, args)
    tuned = train(console, "3. fine-tuning", train_full_sft, SFT, until, 1.0, args)

    console.rule("4. a first conversation")
    tokenizer = load_tokenizer()
    weights = weight_path("full_sft", HIDDEN_SIZE, out)
    model = load_model(weights, tokenizer=tokenizer, device=resolve_device(args.device))
    parameters = count_parameters(model)
    model = prepare_to_decode(model)
    for question, reply in zip(QUESTIONS, answers(model, tokenizer, QUESTIONS), strict=True):
        console.print(f"[bold]{question}[/bold]\n    {reply}", soft_wrap=True)

    console.rule("5. held-out questions")
    tests = held_out_tests(data, args.questions)
    scores = {name: score(model, tokenizer, name, rows) for name, rows in tests.items()}
    textbook = scores.pop("textbook")
    report = {
        "seconds": round(time.time() - started, 1),
        "parameters": parameters,
        "val_bpb": pretrained["val_bpb"],
        "sft_val_bpb": tuned["val_bpb"],
        "skills": scores,
        "skills_mean": sum(scores.values()) / len(scores),
        "textbook_accuracy": textbook,
        "training_seconds": round(pretrained["seconds"] + tuned["seconds"], 1),
        "machine": describe_machine(model.device),
    }
    write_json(args.report, report)
    curves = {run["name"]: run["records"] for run in (pretrained, tuned)}
    plot_losses(curves, out / "demo_losses.png")
    show(console, report, {name: len(rows) for name, rows in tests.items()}, out, args)
    return report


def train(
    console: Console,
    title: str,
    stage,
    flags: str,
    until: float | None,
    share: float,
    args: Args,
) -> dict[str, Any]:
    """Run a trainer with these flags, for at most that share of the time until then, and show the
    command that would do the same."""
    console.rule(title)
    # filled in word by word: a path may have spaces
    places = dict(data=Path(args.output) / "data", out=args.output, device=args.device)
    words = [word.format(**places) for word in f"{flags} {COMMON}".split()]
    steps = args.max_steps
    if until and not steps:
        console.print(f"how fast is this machine? {TRIAL_STEPS} updates to find out")
        each = trial(stage, words, Path(args.output) / "trial")
        steps = max(1, round(share * (until - time.time()) / each))
    words += ["--max_steps", str(steps)] if steps else []
    script = Path(stage.__file__).name
    console.print(f"$ python trainer/{script} {shlex.join(words)}\n", soft_wrap=True)
    result = stage.main(parse_arguments(stage.Args, arguments=words))
    if result["stopped"]:
        raise UserError("the demo was stopped")
    return result


def trial(stage, words: list[str], folder: Path) -> float:
    """How long an update of a trainer with these flags takes, judged by some first ones."""
    few = f"--max_steps {TRIAL_STEPS} --val_documents 4 --log_interval 5 --save_interval 0".split()
    places = ["--save_dir", str(folder), "--checkpoint_dir", str(folder)]
    from_weight = [] if stage is train_pretrain else ["--from_weight", "none", *SIZES.split()]
    args = parse_arguments(stage.Args, arguments=[*words, *few, *places, *from_weight])
    return seconds_of_an_update(stage.main(args)["records"])


def held_out_tests(data: Path, most: int = 0) -> dict[str, list[dict]]:
    """The rows of each skill, by its name, and those of the "textbook"."""
    tests = load_tests(data)
    by_name = defaultdict(list)
    for row in tests["skills"]:
        by_name[row["skill"]].append(row)
    by_name["textbook"] = tests["textbook"]
    return {name: rows[: most or None] for name, rows in by_name.items()}


def answers(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: list[str]
) -> list[str]:
    """What the model says to each question, each time its likeliest words."""
    sampling = Sampling(max_new_tokens=64, temperature=0)
    prompts = prompts_of(tokenizer, questions)
    return list(generate_text(model, tokenizer, prompts, sampling, batch_size=128))


def prompts_of(tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> list[list[int]]:
    """Each question as the tokens of a conversation that the assistant is to go on with."""
    turns = ([{"role": "user", "content": question}] for question in questions)
    return [encode_chat(tokenizer, turn, add_generation_prompt=True).ids for turn in turns]


def score(
    model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, rows: list[dict]
) -> float:
    """The share of a test's prompts that are answered exactly right."""
    bar = tqdm(rows, desc=f"{name:20}", unit="question", leave=False)
    right = 0
    for at in range(0, len(rows), 128):
        some = rows[at : at + 128]
        replies = answers(model, tokenizer, [row["prompt"] for row in some])
        right += sum(grade(row["answer"], r) for row, r in zip(some, replies, strict=True))
        bar.update(len(some))
    bar.close()
    return right / len(rows)


def show(console: Console, report: dict, counts: dict[str, int], out: Path, args: Args) -> None:
    table = Table(title="held-out questions, exactly right", title_justify="left")
    table.add_column("what")
    table.add_column("questions", justify="right")
    table.add_column("right", justify="right")
    table.add_column("")
    for name, accuracy in [*report["skills"].items(), ("textbook", report["textbook_accuracy"])]:
        bar = "█" * round(20 * accuracy)
        table.add_row(name, str(counts[name]), f"{accuracy:.0%}", f"[green]{bar}[/green]")
    table.add_section()
    table.add_row("mean of the skills", "", f"{report['skills_mean']:.1%}")
    table.add_row("textbook", "", f"{report['textbook_accuracy']:.1%}")
    console.print(table)
    console.print(
        f"{report['parameters'] / 1e6:.2f}M parameters, {report['val_bpb']:.2f} bits per byte on "
        f"held-out text, {duration(report['seconds'])} in all, of which "
        f"{duration(report['training_seconds'])} training ({report['machine']})\n"
        f"figures: {args.report}\ncurves:  {out / 'demo_losses.png'}\n"
        f"talk:    python eval_llm.py --save_dir {args.output} --weight full_sft",
        soft_wrap=True,
    )


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))

"""Pretraining and fine-tuning on real data in a given time, with metrics and sample answers.

    python benchmarks/learning/real_data.py --data_dir DIR --minutes 20 [--json FILE]

DIR holds pretrain, pretrain_val, sft and sft_val (.jsonl.gz). Each stage first measures its speed
and then trains as many steps as fit the time, with a schedule of that length. Bits per byte are
measured as in scripts/eval_ppl.py; answers are decoded greedily.
"""

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType

from model.command_line import option, parse_command_line
from model.errors import exit_on_user_error
from model.paths import OUT, weight_path


@dataclass
class Args:
    data_dir: str = option("", "folder of the data files")
    minutes: float = option(20.0, "training time of each stage")
    hidden_size: int = option(256, "hidden size")
    num_hidden_layers: int = option(6, "number of layers")
    output: str = option(str(OUT / "real_data"), "folder of weights, logs and plots")
    json: str = option("", "also write the results to this file")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


from model.inference.generation import generate_text
from model.inference.sampling import SamplingParams
from model.weights import count_parameters, load_model, load_tokenizer, write_json
from scripts.eval_ppl import bits_per_byte, read_texts
from scripts.evaluation.exact_match import encode_questions
from trainer import train_full_sft, train_pretrain
from trainer.common.hardware import describe_machine
from trainer.report.forecast import seconds_per_step
from trainer.report.plots import plot_losses

QUESTIONS = [
    "Give three tips for staying healthy.",
    "What is the capital of France?",
    "Write a short story about a cat.",
    "Explain what a computer is.",
    "请介绍一下北京。",
    "写一首关于春天的诗。",
    "如何学好英语？",
    "头痛应该怎么办？",
]
CALIBRATION_STEPS = 20


def main(args: Args) -> dict:
    data, out = Path(args.data_dir), Path(args.output)
    pretrained = train_for(args, train_pretrain, "pretrain", learning_rate=5e-4)
    tuned = train_for(
        args,
        train_full_sft,
        "sft",
        learning_rate=2e-4,
        from_weight=str(weight_path("pretrain", args.hidden_size, out)),
    )
    tokenizer = load_tokenizer()
    texts = read_texts(data / "pretrain_val.jsonl.gz", 300)
    base = load_model(weight_path("pretrain", args.hidden_size, out), tokenizer=tokenizer)
    chat = load_model(weight_path("full_sft", args.hidden_size, out), tokenizer=tokenizer)
    sampling = SamplingParams(max_new_tokens=100, temperature=0, repetition_penalty=1.1)
    replies = generate_text(chat, tokenizer, encode_questions(tokenizer, QUESTIONS), sampling)
    report = {
        "date": str(date.today()),
        "machine": describe_machine(chat.device),
        "parameters": count_parameters(chat),
        "pretrain": summary(pretrained)
        | {"bits_per_byte_by_the_rule": round(bits_per_byte(base, tokenizer, texts), 4)},
        "full_sft": summary(tuned),
        "answers": dict(zip(QUESTIONS, replies, strict=True)),
    }
    plot_losses({run["name"]: run["history"] for run in (pretrained, tuned)}, out / "losses.png")
    for question, reply in report["answers"].items():
        print(f"{question}\n    {reply}\n")
    if args.json:
        write_json(args.json, report)
    return report


def train_for(args: Args, trainer: ModuleType, name: str, **settings) -> dict:
    """Train for about args.minutes on the data of this name."""
    data, out = Path(args.data_dir), Path(args.output)

    def run(directory: Path, **overrides) -> dict:
        return trainer.main(
            trainer.Args(
                data_path=[str(data / f"{name}.jsonl.gz")],
                val_path=[str(data / f"{name}_val.jsonl.gz")],
                save_dir=str(directory),
                checkpoint_dir=str(directory),
                hidden_size=args.hidden_size,
                num_hidden_layers=args.num_hidden_layers,
                batch_size=8,
                accumulation_steps=1,
                epochs=50,
                batch_ramp=0,
                save_interval=0,
                **{"log_interval": 20, **settings, **overrides},
            )
        )

    trial = run(out / "trial", max_steps=CALIBRATION_STEPS, val_documents=8, log_interval=5)
    steps = int(args.minutes * 60 / seconds_per_step(trial["history"]))
    return run(out, max_steps=steps, eval_interval=max(1, steps // 8))


def summary(run: dict) -> dict:
    return {name: run[name] for name in ("step", "num_tokens", "seconds", "eval_loss", "eval_bpb")}


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

"""Does a chain of thought help? The stage `reason` of stages.py.

The undertrained demo model learns the same word problems of two and three sums in three ways, and
is then evaluated on problems of four and five sums, with greedy decoding:

    direct      train_full_sft.py on the answers without the reasoning
    distilled   train_distill_reason.py on reasoning and answers
    rewarded    train_grpo.py --reasoning 1 from the distilled model, on the same problems

A reply of the latter two counts only in the exact format <think>…</think><answer>…</answer>.
"""

import time
from pathlib import Path
from typing import Any

from held_out import evaluate_reasoning
from rich.console import Console
from trainings import run_trainer

from dataset.jsonl import load_rows, write_rows
from dataset.reply_parser import tagged_answer
from scripts.runs.demo import HIDDEN_SIZE
from trainer import train_distill_reason, train_full_sft, train_grpo

MIN_GAIN = 0.20  # of distilled over direct
MAX_LOSS = 0.03  # of rewarded below distilled
ROWS = "--max_seq_len 512 --batch_size 2 --learning_rate 8e-4 --epochs 2 --val_share 0"
TRAININGS = {
    "direct": (train_full_sft, f"--data_path {{direct}} {ROWS}"),
    "distilled": (train_distill_reason, f"--data_path {{reasoning}} {ROWS}"),
    "rewarded": (
        train_grpo,
        "--data_path {reasoning} --reasoning 1 --reward answer:1 similarity:0.5 format:0.5 "
        "--loss_type dr_grpo --beta 0 --batch_size 16 --num_generations 4 --max_gen_len 160 "
        "--update_batch_size 32 --rollout_batch_size 64 --learning_rate 3e-5 --max_steps 12 "
        "--val_share 0",
    ),
}


def reason(
    seed: int, base: Path, data: Path, out: Path, max_steps: int, console: Console
) -> list[dict[str, Any]]:
    """Train in the three ways with this seed; returns rows of the report.

    Args:
        base: folder with full_sft_192.pth, the base model.
        data: folder of the demo's data.
        out: folder for weights and logs.
        max_steps: most optimizer steps of each training, for a quick test; 0: all.
    """
    out.mkdir(parents=True, exist_ok=True)
    reasoning, direct = data / "r1_mix_1024.jsonl", out / "r1_direct.jsonl"
    write_rows(direct, [without_reasoning(row) for row in load_rows(reasoning)])
    questions = load_rows(data / "r1_mix_1024_val.jsonl")
    values = dict(direct=direct, reasoning=reasoning)
    start = base / f"full_sft_{HIDDEN_SIZE}.pth"
    results = {}
    for name, (trainer, flags) in TRAININGS.items():
        argv = ["--from_weight", str(start), *(w.format(**values) for w in flags.split())]
        argv += f"--seed {seed} --save_weight reason_{name}_{seed} --device cpu".split()
        argv += "--num_workers 0 --log_interval 10 --save_interval 0 --eval_interval 0".split()
        argv += ["--save_dir", str(out), "--checkpoint_dir", str(out / "checkpoints")]
        start_time = time.time()
        run_trainer(console, trainer, argv, max_steps)
        seconds = round(time.time() - start_time, 1)
        path = out / f"reason_{name}_{seed}_{HIDDEN_SIZE}.pth"
        results[name] = {
            **evaluate_reasoning(path, questions, name == "direct"),
            "seconds": seconds,
        }
        console.print(f"{name}: {results[name]}")
        if name == "distilled":
            start = path
    return [
        target_row(seed, "distilled", results["direct"], results["distilled"], MIN_GAIN),
        target_row(seed, "rewarded", results["distilled"], results["rewarded"], -MAX_LOSS),
    ]


def without_reasoning(row: dict[str, Any]) -> dict[str, Any]:
    *turns, last = row["conversations"]
    return {"conversations": [*turns, {**last, "content": tagged_answer(last["content"])}]}


def target_row(seed: int, name: str, before: dict, after: dict, gain: float) -> dict[str, Any]:
    metric, target = f"{name}_accuracy", before["accuracy"] + gain
    error = {f"{metric}_error": after["accuracy_error"], "before_error": before["accuracy_error"]}
    return dict(
        stage="reason",
        seed=seed,
        metric=metric,
        before=before["accuracy"],
        after=after["accuracy"],
        target=target,
        met=after["accuracy"] >= target,
        details={**error, **{name: after[name] for name in ("format", "length", "seconds")}},
    )

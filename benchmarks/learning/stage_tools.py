"""Does a model learn to use tools? Two stages of benchmarks/learning/stages.py.

    toolcall   SFT on the demo's tools.jsonl; held-out tasks with scripts/eval_toolcall.py: accuracy
               of tool names, arguments and final answers, and of the same questions without tools
    agent      an undertrained tool model (under half of that training, with a constant learning
               rate; made once and kept), then train_agent.py from there, on the first questions of
               the same conversations that need calculator, clock or units: the gain in accuracy
               of final answers

Both start from the demo's undertrained base model, which never saw a tool. The data has 600
held-out tasks, 523 of which need one of four tools: other sums, amounts, words and days than in
training, in other phrasings. Metrics that end with `_error` are standard errors.
"""

from pathlib import Path
from typing import Any

from rich.console import Console
from trainings import run_trainer

from dataset.jsonl import load_rows, write_rows
from model.command_line import parse_arguments
from scripts import eval_toolcall
from trainer import train_agent, train_full_sft

SIZE = 192
TARGET, GAIN = 0.9, 0.15
QUICK_TASKS = 40  # held-out tasks in a quick test; otherwise all
COMMON = """--seed {seed} --save_dir {out} --checkpoint_dir {out}/checkpoints --device cpu
    --num_workers 0 --save_interval 0 --eval_interval 0 --val_share 0"""
SFT = """--data_path {data}/tools.jsonl --from_weight {base}/full_sft_{size}.pth
    --max_seq_len 960 --batch_size 4 --learning_rate 8e-4 --log_interval 10"""
FULL_SFT = f"{SFT} --save_weight toolcall_{{seed}} --max_steps 440"
PARTIAL_SFT = f"{SFT} --save_weight agent_start --max_steps 190 --lr_schedule constant"
# Many different questions per step and few episodes of each: that averages out the noise best.
AGENT = """--data_path {out}/first_questions.jsonl --from_weight {out}/agent_start_{size}.pth
    --save_weight agent_{seed} --batch_size 24 --num_generations 4 --loss_type dr_grpo --beta 0
    --learning_rate 3e-4 --max_seq_len 300 --max_gen_len 64 --max_turns 3 --update_batch_size 16
    --epochs 9 --max_steps 64 --reward answer:0.5 similarity:0.2 arguments:0.2 name:0.1
    --log_interval 2"""


def toolcall(
    seed: int, base: Path, data: Path, out: Path, max_steps: int, console: Console
) -> list[dict[str, Any]]:
    """Train with this seed; returns rows of the report."""
    values = dict(seed=seed, base=base, data=data, out=out, size=SIZE)
    tasks = QUICK_TASKS if max_steps else 0
    before = evaluate(base / f"full_sft_{SIZE}.pth", data, tasks, console)
    result = train(train_full_sft, FULL_SFT, values, max_steps, console)
    after = evaluate(out / f"toolcall_{seed}_{SIZE}.pth", data, tasks, console)
    return [
        row("toolcall", seed, name, before, after, TARGET, result["seconds"])
        for name in ("name", "arguments", "answer")
    ]


def agent(
    seed: int, base: Path, data: Path, out: Path, max_steps: int, console: Console
) -> list[dict[str, Any]]:
    """Train with this seed; returns rows of the report."""
    values = dict(seed=seed, base=base, data=data, out=out, size=SIZE)
    tasks = QUICK_TASKS if max_steps else 0
    before = evaluate(
        prepare(base, data, out, max_steps, console), data, tasks, console, compare=False
    )
    result = train(train_agent, AGENT, values, max_steps, console)
    after = evaluate(out / f"agent_{seed}_{SIZE}.pth", data, tasks, console, compare=False)
    target = before["kinds"]["tools"]["answer"] + GAIN
    return [row("agent", seed, "answer", before, after, target, result["seconds"])]


def prepare(base: Path, data: Path, out: Path, max_steps: int, console: Console) -> Path:
    """Make the undertrained tool model, once, and the questions for RL; returns its weights."""
    start = out / f"agent_start_{SIZE}.pth"
    questions = map(first_exchange, load_rows(data / "tools.jsonl"))
    write_rows(out / "first_questions.jsonl", filter(is_learnable, questions))
    if not start.exists():
        values = dict(seed=42, base=base, data=data, out=out, size=SIZE)
        train(train_full_sft, PARTIAL_SFT, values, max_steps, console)
    return start


def first_exchange(row: dict[str, Any]) -> dict[str, Any]:
    """A conversation up to the answer to its first question."""
    messages = row["conversations"]
    questions = [n for n, message in enumerate(messages) if message["role"] == "user"]
    return {"conversations": messages[: [*questions, None][1]]}


def is_learnable(row: dict[str, Any]) -> bool:
    """Whether the model sometimes succeeds, which RL needs: it never copies a dictionary word."""
    calls = [m["tool_calls"] for m in row["conversations"] if "tool_calls" in m]
    return bool(calls) and '"dictionary"' not in calls[0]


def train(
    trainer: Any, flags: str, values: dict[str, Any], max_steps: int, console: Console
) -> dict[str, Any]:
    argv = [word.format(**values) for word in f"{flags} {COMMON}".split()]
    return run_trainer(console, trainer, argv, max_steps)


def evaluate(
    path: Path, data: Path, tasks: int, console: Console, compare: bool = True
) -> dict[str, Any]:
    flags = f"--weight {path} --data_path {data}/tools_val.jsonl --device cpu --examples 0"
    argv = f"{flags} --max_new_tokens 64 --tasks {tasks} --compare {int(compare)}".split()
    console.print(f"$ python scripts/eval_toolcall.py {' '.join(argv)}\n", soft_wrap=True)
    return eval_toolcall.main(parse_arguments(eval_toolcall.Args, argv=argv))


def row(
    stage: str, seed: int, metric: str, before: dict, after: dict, target: float, seconds: float
) -> dict[str, Any]:
    start, end = (each["kinds"]["tools"] for each in (before, after))
    details = {name: value for name, value in end.items() if name != metric}
    details |= {f"before_{metric}_error": start[f"{metric}_error"]}
    if "answer_without_tools" in start:
        names = ("answer_without_tools", "answer_without_tools_error")
        details |= {f"before_{name}": start[name] for name in names}
    no_call = after["kinds"]["no call"]
    details |= {"no_call_needed_and_none_made": no_call["name"], "no_call_tasks": no_call["tasks"]}
    details |= {"calls": after["calls"], "errors": after["errors"], "seconds": round(seconds, 1)}
    return {
        "stage": stage,
        "seed": seed,
        "metric": metric,
        "before": start[metric],
        "after": end[metric],
        "target": target,
        "met": end[metric] >= target,
        "details": details,
    }

"""Does thinking help? The stage `reason` of stages.py.

One unfinished demo model learns the same stories of two and three sums three ways, and is then
asked stories of four and five sums, greedily:

    direct      train_full_sft.py on the answers alone, the thoughts left out
    distilled   train_distill_reason.py on thoughts and answers
    rewarded    train_grpo.py --reasoning 1 on top of that, with the same stories

A reply of the latter two counts only in exactly the form <think>…</think><answer>…</answer>.
"""

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from trainings import run_trainer

from dataset.demo.files import read_jsonl, write_jsonl
from dataset.grading import grade
from dataset.lm_dataset import encode_chat
from dataset.reply_parser import parse_reasoning, tagged_answer
from model.inference.generation import generate, prepare_to_decode
from model.inference.sampling import Sampling
from model.weights import load_model, load_tokenizer
from scripts.runs.demo import HIDDEN_SIZE
from trainer import train_distill_reason, train_full_sft, train_grpo

GAIN, LOSS = 0.20, 0.03  # at least so much better than direct; rewarded at most so much worse
ROWS = "--max_seq_len 512 --batch_size 2 --learning_rate 8e-4 --epochs 2 --val_share 0"
TRAININGS = {
    "direct": (train_full_sft, f"--data_path {{direct}} {ROWS}"),
    "distilled": (train_distill_reason, f"--data_path {{thoughts}} {ROWS}"),
    "rewarded": (
        train_grpo,
        "--data_path {thoughts} --reasoning 1 --reward answer:1 similarity:0.5 format:0.5 "
        "--loss_type dr_grpo --beta 0 --batch_size 16 --num_generations 4 --max_gen_len 160 "
        "--update_batch_size 32 --rollout_batch_size 64 --learning_rate 3e-5 --max_steps 12 "
        "--val_share 0",
    ),
}


def reason(
    seed: int, base: Path, data: Path, out: Path, max_steps: int, console: Console
) -> list[dict[str, Any]]:
    """Train the three with this seed; rows of the report.

    Args:
        base: folder with full_sft_192.pth, the unfinished model.
        data: folder of the demo's data.
        out: folder for weights and logs.
        max_steps: updates of each training at most, for a quick look; 0: all.
    """
    out.mkdir(parents=True, exist_ok=True)
    thoughts, direct = data / "r1_mix_1024.jsonl", out / "r1_direct.jsonl"
    write_jsonl(direct, [without_thoughts(row) for row in read_jsonl(thoughts)])
    questions = read_jsonl(data / "r1_mix_1024_val.jsonl")
    places = dict(direct=direct, thoughts=thoughts)
    start = base / f"full_sft_{HIDDEN_SIZE}.pth"
    found = {}
    for name, (stage, flags) in TRAININGS.items():
        words = ["--from_weight", str(start), *(w.format(**places) for w in flags.split())]
        words += f"--seed {seed} --save_weight reason_{name}_{seed} --device cpu".split()
        words += "--num_workers 0 --log_interval 10 --save_interval 0 --eval_interval 0".split()
        words += ["--save_dir", str(out), "--checkpoint_dir", str(out / "checkpoints")]
        began = time.time()
        run_trainer(console, stage, words, max_steps)
        seconds = round(time.time() - began, 1)
        path = out / f"reason_{name}_{seed}_{HIDDEN_SIZE}.pth"
        found[name] = {**measured(path, questions, name == "direct"), "seconds": seconds}
        console.print(f"{name}: {found[name]}")
        if name == "distilled":
            start = path
    return [
        judged(seed, "distilled", found["direct"], found["distilled"], GAIN),
        judged(seed, "rewarded", found["distilled"], found["rewarded"], -LOSS),
    ]


def without_thoughts(row: dict[str, Any]) -> dict[str, Any]:
    *turns, last = row["conversations"]
    return {"conversations": [*turns, {**last, "content": tagged_answer(last["content"])}]}


def measured(path: Path, questions: list[dict[str, Any]], direct: bool) -> dict[str, float]:
    """The share of held-out questions that a model answers right, and that it answers in the form
    it was taught, with standard errors."""
    tokenizer = load_tokenizer()
    model = prepare_to_decode(load_model(path, tokenizer=tokenizer))
    prompts, answers = [], []
    for row in questions:
        *asked, last = row["conversations"]
        prompts.append(encode_chat(tokenizer, asked, add_generation_prompt=True).ids)
        answers.append(tagged_answer(last["content"]))
    replies = []
    for at in range(0, len(prompts), 100):
        replies += generate(model, prompts[at : at + 100], Sampling(192, temperature=0))
    formed = right = 0
    for reply, answer in zip(replies, answers, strict=True):
        text = tokenizer.decode(reply, skip_special_tokens=True)
        reasoned = (("", text) if direct else parse_reasoning(text)) or ("", None)
        ended = reply[-1] == tokenizer.eos_token_id and reasoned[1] is not None
        formed += ended
        right += ended and grade(reasoned[1], answer)
    share = right / len(questions)
    return {
        "accuracy": share,
        "accuracy_error": math.sqrt(share * (1 - share) / len(questions)),
        "format": formed / len(questions),
        "length": sum(map(len, replies)) / len(replies),
    }


def judged(seed: int, name: str, before: dict, after: dict, gain: float) -> dict[str, Any]:
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
        beside={**error, **{name: after[name] for name in ("format", "length", "seconds")}},
    )

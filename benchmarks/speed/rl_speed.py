"""Speed and memory of DPO and GRPO: this project against trl.

    pip install trl
    python benchmarks/speed/rl_speed.py --part dpo [--data_path dpo.jsonl] [--rounds 3]
    python benchmarks/speed/rl_speed.py --part grpo --batch_size 8 --max_gen_len 64 [--weight FILE]

All train a model of the same size from the same weights (random without --weight), on the same
pairs of at most --max_seq_len tokens, --batch_size pairs per step, in float32 on the CPU with the
same number of threads, fused AdamW and gradients clipped to norm 1.

- minimind: trainer/train_dpo.py, called as by its command line. "with reference" includes
  precomputing the reference's log-probabilities, once per pair: the time of an epoch without cache.
- minimind_padded: the same, with each answer in a row of its own, padded to --max_seq_len.
- trl: DPOTrainer with LlamaForCausalLM, which runs the reference model in each step.
- trl_precomputed: the same with precompute_ref_log_probs, without the time of precomputing.

With --part grpo a step is --batch_size prompts with 8 completions each of at most --max_gen_len
tokens: rollout, a trivial reward, update, with a reference model. Random weights never end a
completion, so that all have the same length; those of a trained model (--weight) have not.

- minimind: trainer/train_grpo.py.
- trl: GRPOTrainer, which generates with transformers' generate.

Each measurement is a process of its own, for its peak memory, and the contestants take turns.
Timed are whole steps: batch, forward, backward, clipping, optimizer.
"""

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from dataset.jsonl import load_rows, read_lines
from model.command_line import option, parse_arguments, parse_command_line
from model.errors import UserError, exit_on_user_error


@dataclass
class Args:
    part: Literal["dpo", "grpo"] = option("dpo", "algorithm to measure")
    data_path: str = option("", "preference pairs or prompts; default: the demo's")
    weight: str = option("", "initial weights, of any size; default: random")
    hidden_size: int = option(512, "hidden size of random weights")
    num_hidden_layers: int = option(8, "number of layers of random weights")
    max_seq_len: int = option(1024, "maximum length of prompt and answer, in tokens")
    max_gen_len: int = option(64, "grpo: maximum length of a completion, in tokens")
    batch_size: int = option(4, "pairs or prompts per step")
    updates: int = option(8, "steps of each measurement")
    rounds: int = option(3, "number of rounds")
    contestants: list[str] = option([], "contestants to measure; default: all of the part")
    measure: str = option("", "internal: measure this contestant in this process")
    folder: str = option("", "internal: folder of its data and weights")
    json: str = option("", "also write the results to this file")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback

from dataset.demo.files import write_demo_data
from dataset.lm_dataset import encode_chat, load_documents
from dataset.pairs import PreferenceDataset
from model.formats.hf_format import load_transformers, save_hf_folder
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model, load_tokenizer, save_weights, write_json
from trainer import train_dpo, train_grpo
from trainer.common.hardware import describe_machine
from trainer.rl import reference


def main(args: Args) -> dict[str, Any]:
    if min(args.rounds, args.batch_size, args.updates) < 1:
        raise UserError("--rounds, --batch_size and --updates must be at least 1")
    known = CONTESTANTS[args.part]
    unknown = set(args.contestants) - set(known)
    if unknown:
        raise UserError(f"--contestants: {min(unknown)} is unknown; known are {', '.join(known)}")
    args.contestants = args.contestants or list(known)
    if args.measure:
        print(json.dumps(measure(args)))
        return {}
    with tempfile.TemporaryDirectory() as folder:
        lengths = PREPARE[args.part](args, Path(folder))
        rounds = race(args, folder)
    report = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "tokens": lengths,
        "arguments": vars(args),
        "contestants": {name: medians(rounds[name]) for name in args.contestants},
        "rounds": rounds,
    }
    show(report)
    if args.json:
        write_json(args.json, report)
    return report


def prepare_pairs(args: Args, folder: Path) -> dict[str, float]:
    """Write weights, and pairs for all steps; returns statistics of the answers' lengths."""
    source = Path(args.data_path)
    if not args.data_path:
        write_demo_data(folder / "demo")
        source = folder / "demo" / "dpo.jsonl"
    tokenizer = load_tokenizer()
    cache = dict(cache=folder / "cache")
    documents = load_documents(source, "preferences", tokenizer, **cache)
    pairs = PreferenceDataset(documents, args.max_seq_len)
    wanted = args.updates * args.batch_size
    if len(pairs) < wanted:
        raise UserError(
            f"{source} has {len(pairs)} pairs that are short enough, and {wanted} are needed"
        )
    chosen = random.Random(0).sample(range(len(pairs)), wanted)
    lines = [line for _, line in read_lines(source) if line.strip()]
    kept = b"".join(lines[pairs.indices[pair]].rstrip() + b"\n" for pair in chosen)
    (folder / "dpo.jsonl").write_bytes(kept)
    save_initial_weights(args, folder, tokenizer)
    sides = pairs.lengths[chosen]
    return {"mean": float(sides.mean()), "median": float(np.median(sides)), "max": int(sides.max())}


def prepare_prompts(args: Args, folder: Path) -> dict[str, float]:
    """Write weights, and prompts for all steps; returns statistics of their lengths."""
    source = Path(args.data_path)
    if not args.data_path:
        write_demo_data(folder / "demo")
        source = folder / "demo" / "rlaif-mini.jsonl"
    tokenizer, wanted = load_tokenizer(), args.updates * args.batch_size
    rows = load_rows(source)
    if len(rows) < wanted:
        raise UserError(f"{source} has {len(rows)} prompts, and {wanted} are needed")
    rows = random.Random(0).sample(rows, wanted)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    save_initial_weights(args, folder, tokenizer)
    asked = (row["conversations"][:-1] for row in rows)
    lengths = [len(encode_chat(tokenizer, m, add_generation_prompt=True).ids) for m in asked]
    return {
        "mean": statistics.mean(lengths),
        "median": statistics.median(lengths),
        "max": max(lengths),
    }


def save_initial_weights(args: Args, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    if args.weight:
        model = load_model(args.weight, tokenizer=tokenizer)
    else:
        torch.manual_seed(0)
        sizes = dict(hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers)
        model = MiniMindForCausalLM(MiniMindConfig(vocab_size=len(tokenizer), **sizes))
    save_weights(model, folder / "start.pth", stage="start", tokenizer=tokenizer, origin={})


PREPARE = {"dpo": prepare_pairs, "grpo": prepare_prompts}


def race(args: Args, folder: str) -> dict[str, list[dict[str, float]]]:
    """Measure all contestants in turn, --rounds times."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in args.contestants}
    names = ("part", "max_seq_len", "max_gen_len", "batch_size", "updates")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    for _ in tqdm(range(args.rounds), desc="rounds", leave=False):
        for name in args.contestants:
            command = [sys.executable, __file__, f"--measure={name}", f"--folder={folder}", *flags]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise UserError(f"{name} failed: {result.stderr.strip().splitlines()[-1]}")
            rounds[name].append(json.loads(result.stdout.splitlines()[-1]))
    return rounds


def measure(args: Args) -> dict[str, float]:
    """Pairs or completions per second, and the peak memory of this process in GB."""
    found = CONTESTANTS[args.part][args.measure](args)
    pairs = args.updates * args.batch_size * (GENERATIONS if args.part == "grpo" else 1)
    return {
        **{f"per_second{what}": pairs / seconds for what, seconds in found.items()},
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def minimind(args: Args) -> dict[str, float]:
    """Seconds of all steps, without and with the reference's log-probabilities."""
    cache = Path(args.folder) / "cache"  # tokens stay cached, the reference's log-probs do not
    load_documents.__kwdefaults__["cache"] = cache
    for file in cache.glob("*.reference.npy"):
        file.unlink()
    map_pairs, spent = reference.map_pairs, []

    def timed(*words, **more):
        start = time.perf_counter()
        found = map_pairs(*words, **more)
        spent.append(time.perf_counter() - start)
        return found

    reference.map_pairs = timed
    flags = f"""--data_path {args.folder}/dpo.jsonl --from_weight {args.folder}/start.pth
        --save_dir {args.folder}/out --checkpoint_dir {args.folder}/out --optimizer adamw
        --batch_size {args.batch_size} --max_seq_len {args.max_seq_len} --val_share 0
        --save_interval 0 --num_workers 0 --device cpu --dtype float32"""
    result = train_dpo.main(parse_arguments(train_dpo.Args, argv=flags.split()))
    return {"": result["seconds"], "_with_reference": result["seconds"] + sum(spent)}


def minimind_padded(args: Args) -> dict[str, float]:
    """Each answer in a row of max_seq_len."""
    collate_pairs = train_dpo.collate_pairs

    def padded(pairs, pad_id, packing):
        batch = collate_pairs(pairs, pad_id, packing=False)
        rows, longest = batch.input_ids.shape
        more = args.max_seq_len - longest
        fill = dict(input_ids=pad_id, labels=-100, document_ids=2 * batch.num_samples)
        for name, value in fill.items():
            tensor = torch.nn.functional.pad(getattr(batch, name), (0, more), value=value)
            setattr(batch, name, tensor)
        places = torch.arange(more).expand(rows, -1)
        batch.position_ids = torch.cat([batch.position_ids, places], dim=1)
        return batch

    train_dpo.collate_pairs = padded
    return {"": minimind(args)[""]}


class Clock(TrainerCallback):
    """Measures the seconds of a training by transformers' Trainer."""

    def on_train_begin(self, *_, **more) -> None:
        self.seconds = -time.perf_counter()

    def on_train_end(self, *_, **more) -> None:
        self.seconds += time.perf_counter()


def trl(args: Args, **settings) -> dict[str, float]:
    """Steps of DPOTrainer."""
    import trl
    from datasets import load_dataset

    tokenizer = load_tokenizer()
    own = load_model(Path(args.folder) / "start.pth", tokenizer=tokenizer)
    same = Path(args.folder) / "transformers"  # trl loads its reference from there
    save_hf_folder(own, tokenizer, same)
    clock = Clock()
    trainer = trl.DPOTrainer(
        model=load_transformers(same, torch.float32).train(),
        args=trl.DPOConfig(
            output_dir=f"{args.folder}/trl",
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1,
            max_length=args.max_seq_len,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            **settings,
        ),
        train_dataset=load_dataset(
            "json", data_files=f"{args.folder}/dpo.jsonl", cache_dir=args.folder, split="train"
        ).select_columns(["chosen", "rejected"]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    del own
    trainer.train()
    return {"": clock.seconds}


def trl_precomputed(args: Args) -> dict[str, float]:
    return trl(args, precompute_ref_log_probs=True)


def minimind_grpo(args: Args) -> dict[str, float]:
    """Steps of train_grpo.py."""
    flags = f"""--data_path {args.folder}/prompts.jsonl --from_weight {args.folder}/start.pth
        --save_dir {args.folder}/out --checkpoint_dir {args.folder}/out --optimizer adamw
        --batch_size {args.batch_size} --num_generations {GENERATIONS} --reward length
        --max_gen_len {args.max_gen_len} --max_seq_len {args.max_seq_len} --val_share 0
        --update_batch_size 32 --save_interval 0 --num_workers 0 --device cpu --dtype float32"""
    result = train_grpo.main(parse_arguments(train_grpo.Args, argv=flags.split()))
    return {"": result["seconds"]}


def trl_grpo(args: Args) -> dict[str, float]:
    """Steps of GRPOTrainer."""
    import trl
    from datasets import Dataset

    tokenizer = load_tokenizer()
    own = load_model(Path(args.folder) / "start.pth", tokenizer=tokenizer)
    save_hf_folder(own, tokenizer, Path(args.folder) / "peer")
    lines = Path(args.folder, "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [{"prompt": json.loads(line)["conversations"][:-1]} for line in lines]
    clock = Clock()
    trainer = trl.GRPOTrainer(
        f"{args.folder}/peer",
        lambda completions, **more: [float(len(each[0]["content"])) for each in completions],
        args=trl.GRPOConfig(
            output_dir=f"{args.folder}/trl",
            per_device_train_batch_size=32,
            gradient_accumulation_steps=max(1, args.batch_size * GENERATIONS // 32),
            num_generations=GENERATIONS,
            max_completion_length=args.max_gen_len,
            max_steps=args.updates,
            beta=0.02,
            loss_type="grpo",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return {"": clock.seconds}


GENERATIONS = 8
CONTESTANTS = {
    "dpo": {f.__name__: f for f in (minimind, minimind_padded, trl, trl_precomputed)},
    "grpo": {"minimind": minimind_grpo, "trl": trl_grpo},
}


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def show(report: dict[str, Any]) -> None:
    rows = report["contestants"]
    lengths, part = report["tokens"], report["arguments"]["part"]
    what, unit = ("sides", "pairs/s") if part == "dpo" else ("prompts", "answers/s")
    table = Table(title=f"{part}, {what} of {lengths['mean']:.0f} tokens, {lengths['max']} at most")
    for column in ("", unit, "with reference", "peak GB", "minimind is faster by"):
        table.add_column(column, justify="right" if column else "left")
    ours = rows.get("minimind", {})
    for name, row in rows.items():
        # trl's steps include the reference, unless it is precomputed
        like = "per_second" + "_with_reference" * (name == "trl" and part == "dpo")
        faster = f"{ours[like] / row['per_second']:.2f}×" if ours else ""
        both = row.get("per_second_with_reference")
        table.add_row(
            name,
            f"{row['per_second']:.2f}",
            f"{both:.2f}" if both else "",
            f"{row['peak_gb']:.2f}",
            "" if name == "minimind" else faster,
        )
    Console().print(table)
    print(f"{report['machine']}, {report['date']}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

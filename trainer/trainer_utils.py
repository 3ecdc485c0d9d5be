"""What all trainers share: model and data to begin with, and `Run`, the verbs of a training loop.

A trainer reads, in every stage:

    for window in run.steps(loader):              # one window of micro-batches = one update
        for batch in window:
            with run.forward(model, sync=batch is window[-1]):
                loss = …                          # the stage's equation, and nothing else
            run.backward(loss)
        run.update(model, optimizer)
        run.log()
        run.save_every(model, optimizer)

`Run` never calls the model, computes no loss and does not own the loop.
"""

import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import load_documents
from dataset.packing import (
    Batch,
    Rows,
    WindowCollator,
    WindowSampler,
    collate,
    document_lengths,
)
from dataset.pairs import PairBatch, Pairs
from model.errors import UserError
from model.feed_forward import mixtures, nudge_bias
from model.model_minimind import (
    CausalLMOutput,
    MiniMindBlock,
    MiniMindConfig,
    MiniMindForCausalLM,
)
from model.weights import (
    atomic_write,
    count_parameters,
    find_weights,
    load_model,
    save_weights,
    weight_name,
)
from trainer.common import hardware
from trainer.common.arguments import EXPERTS, TrainArgs
from trainer.common.checkpoint import (
    changed_share,
    identity_of,
    random_state,
    read_checkpoint,
    restore_random_state,
    seed_everything,
    stored_values,
    trained_state,
)
from trainer.common.command import out_of_memory
from trainer.common.optimizers import Together, learning_rate_factor
from trainer.common.trackers import start_tracker
from trainer.report.forecast import duration, forecast
from trainer.report.pages import data_manifest, write_report
from trainer.report.plots import plot_losses
from trainer.report.recipes import Reference

# What is known since the last line of the log, when nothing is.
NOTHING = dict(steps=0, tokens=0, seconds=0.0, loss=0.0, figures={}, expert_load=None)
COMPILING = 10  # updates for whose shapes blocks are compiled; later ones use what there is
SIZES = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads qk_norm use_moe"
FIRST_WINDOW = 1024  # tokens of the first update, with --batch_ramp
BAD_STEPS = 5  # as many non-finite updates in a row end a run
SHOWN = ("reward", "accuracy", "margin")  # of what a stage logs beside the loss, in the bar
SMALL_CHANGE = 0.5  # a training that changes a smaller share of the stored values is warned of


# -- model and data --------------------------------------------------------------------------------


def starting_model(args: TrainArgs, tokenizer: PreTrainedTokenizerBase) -> MiniMindForCausalLM:
    """The weights of `from_weight`, or new ones; on the CPU, in float32."""
    torch.manual_seed(args.seed)
    sizes = {name: getattr(args, name) for name in [*SIZES.split(), *EXPERTS]}
    sizes = {name: size for name, size in sizes.items() if size is not None}
    if not args.use_moe:  # weights know it themselves
        del sizes["use_moe"]
    if args.from_weight == "none":
        try:
            config = MiniMindConfig(vocab_size=len(tokenizer), dropout=args.dropout, **sizes)
        except ValueError as error:
            raise UserError(f"these sizes do not make a model: {error}") from error
        model = MiniMindForCausalLM(config)
    else:
        path = Path(args.from_weight)
        if path.suffix != ".pth":
            kind = dict(newest=False, use_moe=args.use_moe)
            path = find_weights(args.from_weight, args.hidden_size, args.save_dir, **kind)
        model = load_model(path, tokenizer=tokenizer, dropout=args.dropout, **sizes)
    if args.gradient_checkpointing:  # transformers 5.23 gave the method its new name
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)()
    return model.train()


def read_rows(run: "Run", kind: str) -> tuple[Rows, Rows | None]:
    """Rows to train on and held-out rows (None if none are asked for)."""
    args = run.args
    documents, chosen, separate, held_out = read_documents(run, kind)
    shortest = document_lengths(documents)[chosen].min()
    if kind != "text" and shortest > args.max_seq_len:
        raise UserError(
            f"every conversation is longer than --max_seq_len {args.max_seq_len} (the shortest has "
            f"{shortest} tokens), which would cut each answer from its question; raise it"
        )
    rows = Rows(documents, args.max_seq_len, chosen, args.packing)
    if len(rows) == 0:
        raise UserError("no document of the data has two tokens, so there is nothing to predict")
    if len(held_out) == 0:
        return rows, None
    return rows, Rows(separate, args.max_seq_len, held_out, args.packing)


def read_pairs(run: "Run") -> tuple[Pairs, Pairs | None]:
    """Pairs to train on and held-out pairs (None if none are asked for)."""
    args = run.args
    documents, chosen, separate, held_out = read_documents(run, "preferences")
    pairs = Pairs(documents, args.max_seq_len, chosen)
    if len(pairs) == 0:
        raise UserError(
            f"every pair has a side longer than --max_seq_len {args.max_seq_len} (of the shortest "
            f"pair it has {pairs.longer_side.min()} tokens); raise it"
        )
    asked = Pairs(separate, args.max_seq_len, held_out) if len(held_out) else ()
    return pairs, asked if len(asked) else None


def read_documents(run: "Run", kind: str) -> tuple[Dataset, np.ndarray, Dataset, np.ndarray]:
    """Documents and which of them are trained, documents and which of them are held out; a pair
    counts as one document.

    Held-out documents come from --val_path, or are a share of --data_path that the order and
    number of its documents determine, so that later runs hold out the same ones.
    """
    args = run.args
    lacking = "pad_token" if run.tokenizer.pad_token_id is None else ""
    if kind != "text" and not run.tokenizer.chat_template:
        lacking = "chat_template"
    if lacking:
        raise UserError(
            f"the tokenizer in {args.tokenizer_path} has no {lacking}; add it to its "
            "tokenizer_config.json, or leave --tokenizer_path away"
        )
    documents = load_documents(args.data_path, kind, run.tokenizer)
    separate = load_documents(args.val_path, kind, run.tokenizer) if args.val_path else None
    each = 2 if kind == "preferences" else 1
    order = np.random.default_rng(0).permutation(len(documents) // each)
    count = 0 if separate is not None else math.ceil(len(order) * args.val_share)
    if count >= len(order):
        raise UserError("the data is one document only; hold nothing out with --val_share 0")
    chosen, held_out = np.sort(order[count:]), order[:count]
    if separate is not None:
        held_out = np.random.default_rng(0).permutation(len(separate) // each)
    held_out = np.sort(held_out[: args.val_documents])
    return documents, chosen, documents if separate is None else separate, held_out


def unwrapped(model: nn.Module) -> MiniMindForCausalLM:
    """The model inside DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model


# -- the run ---------------------------------------------------------------------------------------


def first_window(
    args: TrainArgs, device: torch.device, ranks: int = 1, tokens_of_a_row: float = 0.0
) -> int:
    """Rows of the first update with --batch_ramp: 1,024 tokens; on a GPU a full batch, which it
    takes in the same time as a few rows."""
    if device.type == "cuda":
        return args.batch_size * ranks
    return max(1, round(FIRST_WINDOW / (tokens_of_a_row or args.max_seq_len)))


class Window(list[Batch | PairBatch]):
    """The micro-batches of one update on this rank, and what all ranks hold together."""

    labelled: int  # tokens that carry loss: what the summed loss is divided by
    tokens: int  # tokens that are not padding
    rows: int  # that have a token; or pairs

    def balance_loss(self, batch: Batch | PairBatch, outputs: CausalLMOutput) -> Tensor | float:
        """The micro-batch's share of the balance loss of experts, a mean over the window's rows."""
        return 0.0 if outputs.aux_loss is None else outputs.aux_loss * batch.rows / self.rows


class Run:
    """Device, ranks, precision, accumulation, schedule, log and checkpoints of one training."""

    def __init__(
        self,
        args: TrainArgs,
        stage: str,
        config: MiniMindConfig,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.args, self.stage, self.config, self.tokenizer = args, stage, config, tokenizer
        self.name = weight_name(args.save_weight or stage, config.hidden_size, config.use_moe)
        self.device = hardware.resolve_device(args.device)
        self.dtype = hardware.resolve_dtype(args.dtype, self.device)
        self.rank = int(os.environ.get("RANK", 0))
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        if self.ranks > 1:
            self.join_ranks()
        self.compiled = hardware.compiles(self.device) if args.compile is None else args.compile
        half = self.dtype == torch.float16  # its small gradients would vanish without scaling
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.flops = hardware.peak_flops(self.device, self.dtype)

        self.step, self.steps_in_all = 0, 0  # updates made, and to be made
        self.begun = 0  # updates made before this process
        self.rows_seen, self.rows_in_all = 0, 0  # place in the data, all epochs counted
        self.done = 0.0  # share of the rows of this run trained before this update
        self.tokens = 0  # trained so far, padding not counted
        self.seconds = 0.0  # spent training so far; evaluation and saving are not counted
        self.skipped = self.skipped_in_a_row = 0  # updates that were not finite
        self.stop_asked = False  # a signal reached this rank
        self.stopping = False  # all ranks know of it: this update is the last
        self.window_loss = torch.zeros((), device=self.device)
        self.pending: dict[str, Any] = dict(NOTHING)  # since the last log
        self.records: list[dict[str, Any]] = []  # the lines of metrics.jsonl
        self.evaluation: dict[str, Any] = {}  # the newest one
        self.origin: dict[str, Any] = {}  # what the weights' .json says of how they were made
        self.reference: Reference | None = None  # the run of --recipe
        self.identity: dict[str, Any] = {}  # what makes a checkpoint one of this run
        self.smaller_batch = ""  # what to try if memory runs out
        self.stored_at_start: dict[str, Tensor] = {}  # the weights, as a file holds them
        self.changed: float | None = None  # the share of them that training has changed
        self.tracker: Any = None
        self.tracker_id: str | None = None
        seed_everything(args.seed + self.rank)

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    def print(self, *lines: str) -> None:
        if self.is_main:
            tqdm.write("\n".join(lines))

    def file(self, suffix: str) -> Path:
        """out/{name}{suffix}"""
        return Path(self.args.save_dir) / f"{self.name}{suffix}"

    # -- ranks

    def join_ranks(self) -> None:
        """The process group that torchrun made room for: NCCL for GPUs, gloo for CPUs."""
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=timedelta(minutes=30))
            except (RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"the {self.ranks} processes cannot find each other ({reason}); start them "
                    "with torchrun --nproc_per_node N"
                ) from error
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, hardware.physical_cores() // hardware.ranks_here()))

    def sum_over_ranks(self, *numbers: float) -> list[float]:
        """Each number, added up over all ranks."""
        if self.ranks == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def distribute(self, model: MiniMindForCausalLM) -> nn.Module:
        """The model on this rank's device, its gradients averaged over the ranks."""
        model = model.to(self.device)
        if self.compiled:  # block by block, which they share: one compilation for all
            for module in model.modules():
                if isinstance(module, MiniMindBlock):
                    module.compile()
        if self.ranks == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        # each rank counts its own experts' loads in a buffer
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    # -- the loop's verbs, in their order

    def loader(self, rows: Rows | Pairs, make_batch: Callable = collate) -> DataLoader:
        """Windows of micro-batches, in an order that depends on seed and epoch alone; `make_batch`
        makes one of rows and the id of padding."""
        args = self.args
        sampler = WindowSampler(
            len(rows),
            batch_size=args.batch_size,
            accumulation_steps=args.accumulation_steps,
            epochs=args.epochs,
            seed=args.seed,
            rank=self.rank,
            ranks=self.ranks,
            batch_ramp=args.batch_ramp,
            first_window=first_window(args, self.device, self.ranks, rows.tokens / len(rows)),
        )
        self.sampler = sampler
        self.plan_steps()
        return DataLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=WindowCollator(args.batch_size, self.tokenizer.pad_token_id, make_batch),
            num_workers=args.num_workers,
            worker_init_fn=leave_signals_to_the_run,
            generator=torch.Generator(),  # not the global one, whose state a resumed run restores
            prefetch_factor=4 if args.num_workers else None,
            pin_memory=self.device.type == "cuda",
        )

    def plan_steps(self) -> None:
        """The windows that are left, from where the run stands; after a resume with another number
        of ranks they are of another size than those before."""
        self.sampler.start = self.rows_seen
        limit = max(0, self.args.max_steps - self.step) if self.args.max_steps else None
        ends = [after for _, after in islice(self.sampler.windows(), limit)]
        self.steps_in_all = self.step + len(ends)
        self.rows_in_all = ends[-1] if ends else self.rows_seen

    def steps(self, loader: DataLoader) -> Iterator[Window]:
        """The windows from where the run stands to its end, or until a signal stops it."""
        self.plan_steps()
        self.begun = self.step
        self.bar = tqdm(
            total=self.steps_in_all,
            initial=self.step,
            desc=self.name,
            unit="step",
            disable=not self.is_main,
            mininterval=1,
        )
        with signals_set(self), self.bar:
            batches = iter(loader) if self.step < self.steps_in_all else iter(())
            self.clock = time.perf_counter()  # waiting for data counts
            places = self.sampler.windows()
            for micro_batches, (before, after) in zip(batches, places, strict=False):
                window = self.count(Window(batch.to(self.device) for batch in micro_batches))
                self.step += 1
                self.done, self.rows_seen = before / self.rows_in_all, after
                self.pending["tokens"] += window.tokens
                yield window
                self.bar.update()
                if self.stopping or self.step == self.steps_in_all:
                    return
                self.clock = time.perf_counter()

    def count(self, window: Window) -> Window:
        """The window, knowing what all ranks' batches hold together."""
        totals = (
            sum(getattr(batch, what) for batch in window) for what in ("labelled", "tokens", "rows")
        )
        labelled, tokens, rows = map(int, self.sum_over_ranks(*totals))
        window.labelled, window.tokens, window.rows = max(1, labelled), tokens, rows
        return window

    @contextmanager
    def forward(self, model: nn.Module, sync: bool) -> Iterator[None]:
        """A forward pass: autocast, and gradients exchanged between ranks only if `sync`, that is
        with the last micro-batch of a window."""
        alone = isinstance(model, DistributedDataParallel) and not sync
        early = self.step - self.begun <= COMPILING
        with (
            self.memory_watched(),
            self.compiler("default" if early else "eager_on_recompile"),
            model.no_sync() if alone else nullcontext(),
            hardware.autocast(self.device, self.dtype),
        ):
            yield

    def compiler(self, stance: str) -> AbstractContextManager:
        """What compiled blocks do here, in the words of torch.compiler.set_stance."""
        return torch.compiler.set_stance(stance) if self.compiled else nullcontext()

    def backward(self, loss: Tensor, beside: Tensor | float = 0.0) -> None:
        """Add the gradients of a micro-batch. `loss` is its share of the whole window's loss: a sum
        over its tokens, divided by the window's tokens over all ranks. What is to be small
        `beside` it is not logged as loss."""
        self.window_loss += loss.detach()
        with self.memory_watched():
            self.scaler.scale((loss + beside) * self.ranks).backward()  # ranks are averaged

    @contextmanager
    def memory_watched(self) -> Iterator[None]:
        """Running out of memory ends the run with what would fit."""
        try:
            yield
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            flag = self.args.rows_flag
            raise UserError(
                f"out of memory with --{flag} {getattr(self.args, flag)}; {self.smaller_batch}"
            ) from error

    def update(self, model: nn.Module, optimizer: Together) -> None:
        """One step of the optimizer with what backward has added up. Gradients that are not finite
        change nothing; several times in a row they end the run with a UserError."""
        args = self.args
        self.lr_factor = learning_rate_factor(
            args.lr_schedule, self.step - 1, self.done, args.warmup_steps
        )
        for each in optimizer.optimizers:
            for group in each.param_groups:
                group["lr"] = group["peak_lr"] * self.lr_factor
            self.scaler.unscale_(each)
        limit = args.grad_clip or math.inf
        self.grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit).item()
        if math.isfinite(self.grad_norm):
            self.skipped_in_a_row = 0
            for each in optimizer.optimizers:
                self.scaler.step(each)
        else:
            self.skip_update()
        self.scaler.update()
        optimizer.zero_grad()
        self.balance_experts(unwrapped(model))
        self.loss, stop = self.sum_over_ranks(self.window_loss.item(), self.stop_asked)
        self.stopping = bool(stop)
        self.window_loss.zero_()
        if math.isfinite(self.loss):
            self.pending["steps"] += 1
            self.pending["loss"] += self.loss
        now = time.perf_counter()
        self.pending["seconds"] += now - self.clock
        self.clock = now  # a window may have several updates

    def balance_experts(self, model: MiniMindForCausalLM) -> None:
        """Count the tokens that each expert had in this update; with biases, nudge them."""
        layers = mixtures(model)
        if not layers:
            return
        load = torch.stack([layer.load for layer in layers])  # [layers, experts]
        if self.ranks > 1:
            dist.all_reduce(load)
        for layer, of_layer in zip(layers, load, strict=True):
            nudge_bias(layer, of_layer)
            layer.load.zero_()
        so_far = self.pending["expert_load"]
        self.pending["expert_load"] = load.cpu() if so_far is None else so_far + load.cpu()

    def skip_update(self) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        # float16 finds its scale by overflowing: from 2^16 down, a factor of 2 each time
        allowed = BAD_STEPS + 16 * self.scaler.is_enabled()
        if not self.scaler.is_enabled():
            self.print(f"step {self.step}: the gradient is not finite; this update is skipped")
        if self.skipped_in_a_row == allowed:
            raise UserError(
                f"{allowed} updates in a row were not finite, the last at step {self.step}; try "
                "a lower --learning_rate, more --warmup_steps, or --dtype float32"
            )

    def due(self, interval: int) -> bool:
        """Whether something done every `interval` updates is to be done now; always at the end."""
        return self.step == self.steps_in_all or (interval > 0 and self.step % interval == 0)

    def log(self, **figures: Tensor) -> None:
        """The bar now, and every log_interval updates a line of metrics.jsonl and the tracker.

        Args:
            figures: of this update, this rank's part of each: added up over the ranks, and
                averaged over the updates of a line.
        """
        pending = self.pending
        if figures:
            values = self.sum_over_ranks(*map(float, figures.values()))
            figures = dict(zip(figures, values, strict=True))
            kept = pending["figures"]
            pending["figures"] = kept | {n: [*kept.get(n, []), v] for n, v in figures.items()}
        speed = pending["tokens"] / max(1e-9, pending["seconds"])
        shown = {
            "loss": f"{self.loss:.3f}",
            **{name: f"{figure:.3f}" for name, figure in figures.items() if name in SHOWN},
            "lr": f"{self.args.learning_rate * self.lr_factor:.1e}",
            "tok/s": f"{speed:,.0f}",
            "GB": f"{hardware.memory_in_use(self.device) / 1e9:.1f}",
        }
        mfu = None
        if self.flops:
            work = hardware.flops_per_token(self.config, self.args.max_seq_len)
            mfu = work * speed / (self.flops * self.ranks)
            shown["mfu"] = f"{mfu:.0%}"
        self.bar.set_postfix(shown, refresh=False)
        if not self.due(self.args.log_interval) and self.step > 1:
            return
        self.tokens += pending["tokens"]
        self.seconds += pending["seconds"]
        self.record(
            tokens=self.tokens,
            seconds=round(self.seconds, 2),
            loss=finite(pending["loss"] / max(1, pending["steps"])) if pending["steps"] else None,
            lr=self.args.learning_rate * self.lr_factor,
            grad_norm=finite(self.grad_norm),
            tokens_per_second=round(speed, 1),
            mfu=mfu and round(mfu, 4),
            memory_gb=round(hardware.memory_in_use(self.device) / 1e9, 2),
            skipped=self.skipped,
            **{name: finite(fmean(values)) for name, values in pending["figures"].items()},
            **self.expert_figures(),
        )
        self.pending = dict(NOTHING)

    def expert_figures(self) -> dict[str, list[float]]:
        """Of each layer, what its busiest expert had since the last log, as a multiple of the mean
        (1: balanced)."""
        load = self.pending["expert_load"]  # [layers, experts]
        if load is None:
            return {}
        busiest = load.amax(1) / load.mean(1).clamp(min=1e-9)
        return {"expert_load": [round(figure, 3) for figure in busiest.tolist()]}

    def log_evaluation(self, sample: str = "", **figures: float) -> None:
        """Figures on held-out data, and a sample of the model's text; with --recipe, whether the
        run is on track."""
        self.evaluation = {name: round(figure, 4) for name, figure in figures.items()}
        line = "  ".join(f"{name} {figure:.4f}" for name, figure in figures.items())
        self.print(
            f"step {self.step}: {line}",
            *(["    " + sample.replace("\n", "\n    ")] if sample else []),
        )
        record = {
            "tokens": self.tokens + self.pending["tokens"],
            "seconds": round(self.seconds + self.pending["seconds"], 2),
            **self.evaluation,
            **({"sample": sample} if sample else {}),
        }
        beside = self.reference.beside(record) if self.reference else {}
        self.record(**record, **beside)
        if beside:
            self.print(f"    {self.reference.verdict(self.records)}")

    def record(self, **values: Any) -> None:
        """One line of metrics.jsonl, the same to the tracker."""
        record = {"step": self.step, **values}
        self.records.append(record)
        if self.is_main:
            path = self.file(".metrics.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            if self.tracker:
                loads = {f"expert_load_{n}": v for n, v in enumerate(values.get("expert_load", []))}
                numbers = {k: v for k, v in values.items() if isinstance(v, int | float)} | loads
                self.tracker.log(numbers, step=self.step)

    # -- checkpoints

    @property
    def checkpoint_path(self) -> Path:
        return Path(self.args.checkpoint_dir) / f"{self.name}.checkpoint.pt"

    def save_every(
        self,
        model: nn.Module,
        optimizer: Together,
        save: Callable | None = None,
        beside: Any = None,
    ) -> None:
        """Every save_interval updates, at the end and when a signal stops the run: the weights
        (float16, out/; written by `save`, default: save_weights) and the checkpoint for --resume
        (float32, checkpoints/), with the state_dict of what is to be kept `beside` them."""
        if not (self.due(self.args.save_interval) or self.stopping):
            return
        random_states = [random_state(self.device)]
        if self.ranks > 1:
            random_states = [None] * self.ranks
            dist.all_gather_object(random_states, random_state(self.device))
        if not self.is_main:
            return
        model = unwrapped(model)
        self.changed = changed_share(self.stored_at_start, stored_values(model))
        figures = {
            **dict(steps=self.step, tokens=self.tokens, seconds=round(self.seconds)),
            **self.evaluation,
            "changed_share": round(self.changed, 4),
        }
        origin = {**self.origin, **figures, "args": asdict(self.args)}
        path = self.file(".pth")
        (save or save_weights)(
            model, path, stage=self.stage, tokenizer=self.tokenizer, origin=origin
        )
        checkpoint = {
            "model": trained_state(model),
            "optimizer": optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states,
            "progress": {name: getattr(self, name) for name in PROGRESS},
            "pending": self.pending,
            "records": self.records,
            "identity": self.identity,
            "rows_per_update": self.sampler.window,
            "beside": beside and beside.state_dict(),
        }
        with atomic_write(self.checkpoint_path) as file:  # last: a finished run has its weights
            torch.save(checkpoint, file)

    def resume(self, model: nn.Module, optimizer: Together, beside: Any = None) -> None:
        """With --resume, go back to where the checkpoint was saved; else begin a new log. Comes
        after `announce`, which finds out what run this is."""
        path = self.checkpoint_path
        if self.is_main:
            for directory in (self.args.save_dir, self.args.checkpoint_dir):
                check_writable(directory)
            self.stored_at_start = stored_values(unwrapped(model))
        if self.args.resume and path.exists():
            checkpoint = read_checkpoint(path, self.identity)
            bare = unwrapped(model)
            frozen = bare.state_dict().keys() - trained_state(bare).keys()
            kept = {name: bare.state_dict()[name] for name in frozen}
            bare.load_state_dict({**kept, **checkpoint["model"]})
            optimizer.load_state_dict(checkpoint["optimizer"])
            if beside:
                beside.load_state_dict(checkpoint["beside"])
            if self.scaler.is_enabled() and checkpoint["scaler"]:  # empty where it was not needed
                self.scaler.load_state_dict(checkpoint["scaler"])
            for name, value in checkpoint["progress"].items():
                setattr(self, name, value)
            self.pending, self.records = NOTHING | checkpoint["pending"], checkpoint["records"]
            if len(checkpoint["random"]) == self.ranks:
                restore_random_state(checkpoint["random"][self.rank], self.device)
            self.plan_steps()
            at = f"step {self.step} of {self.steps_in_all}"
            done = "the run is finished already" if self.step >= self.steps_in_all else "going on"
            self.print(f"resuming {path.name} at {at}: {done}")
            before, now = checkpoint["rows_per_update"], self.sampler.window
            if before != now:
                self.print(f"warning: a full update has {now} rows from here on, and had {before}")
        elif self.args.resume:
            self.print(f"no checkpoint {path} to resume: starting from the beginning")
        if self.is_main:
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.records)
            with atomic_write(self.file(".metrics.jsonl")) as file:
                file.write(lines.encode())
            if self.args.use_wandb:
                self.tracker, self.tracker_id = start_tracker(self.args, self.name, self.tracker_id)

    # -- beginning and end

    def announce(self, model: nn.Module, rows: Rows | Pairs, held_out: Rows | Pairs | None) -> None:
        """What is about to happen and what to expect of it, before the first step."""
        self.origin = {
            "data": rows.description,
            "row_fill": round(rows.fill, 4),
            "from_weight": self.args.from_weight,
            "machine": hardware.describe_machine(self.device),
            "parameters": count_parameters(unwrapped(model)),
            "manifest": data_manifest(self.args, rows, held_out),
        }
        if self.args.recipe:
            self.reference = Reference(self, rows, held_out)
        self.identity = identity_of(self.args, self.stage, unwrapped(model), self.tokenizer, rows)
        lines, self.smaller_batch = forecast(self, model, rows, held_out)
        self.print(*lines, *(self.reference.lines() if self.reference else []))

    def finish(self) -> dict[str, Any]:
        """Close the log and draw the curves. Returns the last figures and the whole log."""
        metrics = {
            "name": self.name,
            "stopped": self.stopping,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "records": self.records,
            **self.evaluation,
        }
        if not self.is_main:
            return metrics
        if self.changed is not None and not self.stopping:
            self.tell_what_rounding_left()
        if self.tracker:
            self.tracker.finish()
        plot_losses({self.name: self.records}, self.file(".loss.png"))
        write_report(self, self.file(".report.html"))
        if self.stopping:
            self.print(f"stopped at step {self.step}; --resume goes on from there")
        elif self.file(".pth").exists():
            self.print(
                f"{duration(self.seconds)} of training; weights {self.file('.pth')}, "
                f"report {self.file('.report.html').name}, log {self.file('.metrics.jsonl').name}"
            )
        return metrics

    def tell_what_rounding_left(self) -> None:
        self.record(changed_share=round(self.changed, 4))
        self.print(f"{self.changed:.1%} of the values stored in float16 differ from the start's")
        if self.changed < SMALL_CHANGE:
            self.print(
                "warning: most updates were too small for float16 and are lost in the saved "
                "weights; raise --learning_rate, or train longer"
            )


# What of a Run a checkpoint keeps.
PROGRESS = (
    "step rows_seen tokens seconds skipped skipped_in_a_row evaluation changed tracker_id".split()
)


# -- small helpers ---------------------------------------------------------------------------------


def check_writable(directory: str) -> None:
    """UserError now, rather than after hours of training."""
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error


@contextmanager
def signals_set(run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM let the update in progress end, save it and leave; a second one is
    immediate."""

    def stop(number: int, frame: Any) -> None:
        run.stop_asked = True
        for each in before:
            signal.signal(each, before[each])

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def finite(number: float) -> float | None:
    """Rounded for the log; None, which JSON knows, for NaN and infinity, which it does not."""
    return round(number, 4) if math.isfinite(number) else None


def leave_signals_to_the_run(worker: int) -> None:
    """A signal to the whole process group must not end the workers before the run has saved."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)

"""`Run`: the verbs of a training loop, which all trainers share.

A trainer reads, in every stage:

    for global_batch in run.steps():               # the micro-batches of one optimizer step
        for batch in global_batch:
            with run.forward(model, sync=batch is global_batch[-1]):
                loss = …                           # the stage's equation, and nothing else
            run.backward(loss)
        run.update(model, optimizer)
        run.log()
        run.save_every(model, optimizer)

`Run` never calls the model, computes no loss and does not own the loop.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dataset.packing import TrainingData
from dataset.packing import collate as collate_packed
from model.config import MiniMindConfig
from model.weights import save_weights, weight_name
from trainer.common import hardware
from trainer.common.checkpoint import (
    Progress,
    check_same_on_ranks,
    check_writable,
    fingerprint_of,
    keep_unfinished,
    resume_from,
    save_checkpoint,
)
from trainer.common.context import ArgsT, Context, unwrap, without_sync
from trainer.common.loop import (
    BatchT,
    GlobalBatch,
    Plan,
    StopSignal,
    fit_minutes,
    make_loader,
    make_sampler,
    update_router_biases,
)
from trainer.common.metrics import Accumulator, Metric, MetricLog
from trainer.common.optimizers import MultiOptimizer, learning_rate_factor, set_learning_rates
from trainer.report.forecast import duration, forecast
from trainer.report.fp16 import changed_fraction, fp16_report, trainable_fp16, warn_early
from trainer.report.pages import run_metadata, write_report
from trainer.report.plots import plot_losses
from trainer.report.recipe_comparison import RecipeComparison
from trainer.report.run_state import RunState

COMPILE_STEPS = 10  # new shapes are compiled in the first steps only, and run eagerly later


class Run(Generic[ArgsT, BatchT]):
    """One training: gradient accumulation, schedule, log and checkpoints."""

    def __init__(
        self,
        ctx: Context[ArgsT],
        stage: str,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        train_data: TrainingData,
        val_data: TrainingData | None = None,
        *,
        collate: Callable[[list, int], BatchT] | None = None,
        fingerprint: dict[str, str] | None = None,
    ):
        """Plan the run and print the plan. UserError if it cannot fit the machine.

        Args:
            model: before its first step.
            collate: samples and the padding's id → a micro-batch; default: packed sequences.
            fingerprint: what else tells runs apart, besides arguments, first weights and data.
        """
        args = ctx.args
        config = cast(MiniMindConfig, model.config)  # which nn.Module does not declare
        self.ctx, self.stage, self.config, self.tokenizer = ctx, stage, config, tokenizer
        self.name = weight_name(args.save_weight or stage, config.hidden_size, config.use_moe)
        # float16 gradients underflow without loss scaling
        self.scaler = torch.amp.GradScaler(ctx.device.type, enabled=ctx.dtype == torch.float16)
        self.metrics = MetricLog(ctx, self.file(".metrics.jsonl"), config)
        self.progress = Progress()
        self.start_step = 0  # of this process
        self.fraction_done = 0.0  # of the samples of all epochs, before this step
        self.stop = StopSignal()
        self.sampler = make_sampler(ctx, train_data)
        pad_id, collate_fn = tokenizer.pad_token_id, collate or collate_packed
        self.loader = make_loader(ctx, train_data, self.sampler, pad_id, collate_fn)
        self.plan = self.plan_steps()
        keep_unfinished(ctx, self.checkpoint_path, self.metrics.path, self.plan.total_steps)
        self.recipe = None
        if args.recipe:
            self.recipe = RecipeComparison(ctx, stage, tokenizer, train_data, val_data)
        self.fingerprint = fingerprint_of(args, stage, model, tokenizer, train_data)
        self.fingerprint |= fingerprint or {}
        check_same_on_ranks(ctx, self.fingerprint)
        self.metadata = run_metadata(ctx, model, train_data, val_data)  # goes into the .json
        lines, self.oom_hint = forecast(
            ctx, self.plan, self.metrics.peak_flops, model, config, train_data, val_data
        )
        ctx.print(*lines, *(self.recipe.lines() if self.recipe else []))
        self.initial_weights: dict[str, Tensor] = {}  # as float16, to see what training changed
        if ctx.is_main:
            check_writable(args.save_dir, args.checkpoint_dir)
        hardware.seed_everything(args.seed + ctx.rank)

    def file(self, suffix: str) -> Path:
        """out/{name}{suffix}"""
        return Path(self.ctx.args.save_dir) / f"{self.name}{suffix}"

    @property
    def step(self) -> int:
        """Optimizer steps made, the current one included."""
        return self.progress.step

    def plan_steps(self) -> Plan:
        self.sampler.start = self.progress.samples_seen
        return Plan.of(self.name, self.sampler, self.progress, self.ctx.args.max_steps)

    # -- the loop's verbs, in their order

    def resume(self, model: nn.Module, optimizer: MultiOptimizer, extra_state: Any = None) -> None:
        """With --resume, go back to the checkpoint; else begin a new log."""
        ctx, path = self.ctx, self.checkpoint_path
        if ctx.is_main:
            self.initial_weights = trainable_fp16(unwrap(model))
        states: dict[str, Any] = dict(model=unwrap(model), optimizer=optimizer)
        states |= dict(scaler=self.scaler, metrics=self.metrics, extra_state=extra_state)
        if ctx.args.resume and (resumed := resume_from(ctx, path, self.fingerprint, **states)):
            self.progress, before = resumed
            self.plan = self.plan_steps()
            finished = self.step >= self.plan.total_steps
            state = "the run is finished already" if finished else "going on"
            at = f"step {self.step} of {self.plan.total_steps}"
            ctx.print(f"resuming {path.name} at {at}: {state}")
            now = self.sampler.global_batch_size
            if before != now:
                ctx.print(f"warning: a full step has {now} samples now, and had {before}")
        elif ctx.args.resume:
            ctx.print(f"no checkpoint {path} to resume: starting from the beginning")
        self.progress.tracker_id = self.metrics.open(self.name, self.progress.tracker_id)
        self.state = RunState(self.file(".state.json"), self.stage)
        self.state.begin(ctx, self.progress, self.plan)

    def steps(self) -> Iterator[GlobalBatch[BatchT]]:
        """The global batches from the current position to the end, or until a signal."""
        done, self.start_step = self.progress, self.progress.step
        bar = self.metrics.bar = tqdm(
            total=self.plan.total_steps,
            initial=done.step,
            desc=self.name,
            unit="step",
            disable=not self.ctx.is_main,
            mininterval=1,
        )
        with self.stop.catch(), bar:
            loader: Iterator[list] = iter(self.loader if done.step < self.plan.total_steps else ())
            self.metrics.start_clock()  # waiting for data counts
            bounds = self.sampler.bounds()
            for micro_batches, (before, after) in zip(loader, bounds, strict=False):
                micro_batches = (batch.to(self.ctx.device) for batch in micro_batches)
                global_batch = GlobalBatch.of(self.ctx, micro_batches)
                done.step += 1
                done.samples_seen = after
                self.fraction_done = before / self.plan.total_samples
                self.metrics.accumulator.tokens += global_batch.num_tokens
                yield global_batch
                self.plan = fit_minutes(self.ctx, self.plan, self.sampler, done, self.metrics)
                bar.update()
                if self.stop.agreed or done.step == self.plan.total_steps:
                    return
                self.metrics.start_clock()

    @contextmanager
    def forward(self, model: nn.Module, sync: bool) -> Iterator[None]:
        """A forward pass under autocast. Ranks exchange gradients only if `sync`, that is with the
        last micro-batch of a step."""
        early = self.step - self.start_step <= COMPILE_STEPS
        with (
            hardware.oom_guard(self.ctx.args, self.oom_hint),
            self.ctx.compiler_stance("default" if early else "eager_on_recompile"),
            nullcontext() if sync else without_sync(model),
            self.ctx.autocast(),
        ):
            yield

    def backward(self, loss: Tensor, aux_loss: Tensor | float = 0.0) -> None:
        """Add the gradients of a micro-batch.

        Args:
            loss: the micro-batch's share of the step's loss: a sum over its tokens, divided by the
                global batch's number of tokens.
            aux_loss: is optimised too, but kept out of the logged loss.
        """
        self.metrics.step_loss += loss.detach()
        with hardware.oom_guard(self.ctx.args, self.oom_hint):
            # DistributedDataParallel averages over the ranks, and the loss is a sum over them
            self.scaler.scale((loss + aux_loss) * self.ctx.world_size).backward()

    def update(self, model: nn.Module, optimizer: MultiOptimizer) -> None:
        """One optimizer step with the accumulated gradients. Gradients that are not finite change
        nothing; several times in a row they end the run with a UserError."""
        args, done, metrics = self.ctx.args, self.progress, self.metrics
        factor = learning_rate_factor(
            args.lr_schedule, done.step - 1, self.fraction_done, args.warmup_steps
        )
        set_learning_rates(optimizer, factor)
        metrics.learning_rate = args.learning_rate * factor
        for each in optimizer.optimizers:
            self.scaler.unscale_(each)  # before clipping, which needs the true norm
        limit = args.grad_clip or math.inf
        metrics.grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit).item()
        if math.isfinite(metrics.grad_norm):
            done.skipped_in_a_row = 0
            for each in optimizer.optimizers:
                self.scaler.step(each)
        else:
            done.skip_step(scaled=self.scaler.is_enabled(), print=self.ctx.print)
        self.scaler.update()
        optimizer.zero_grad()
        self.metrics.add_expert_load(update_router_biases(self.ctx, unwrap(model)))
        loss, stop = self.ctx.all_reduce_sum(metrics.step_loss.item(), self.stop.requested)
        self.stop.agreed = bool(stop)
        metrics.end_step(loss)

    def is_due(self, interval: int) -> bool:
        """Whether this step ends an interval of steps; the last step always does."""
        last = self.step == self.plan.total_steps
        return last or (interval > 0 and self.step % interval == 0)

    def log(self, **metrics: Metric) -> None:
        """Update the bar, and every log_interval steps write a line of metrics.jsonl.

        Args:
            metrics: this rank's (sum, count) of each. Both are added up over the ranks and the
                steps of a line, and divided once.
        """
        self.state.update(self.ctx, self.progress, self.plan)
        values = self.metrics.add(metrics)
        self.metrics.bar.set_postfix(self.metrics.in_bar(values), refresh=False)
        if not self.is_due(self.ctx.args.log_interval) and self.step > 1:
            return
        self.progress.add(self.metrics.accumulator)
        means = self.metrics.means() | {"skipped": self.progress.skipped}
        self.metrics.accumulator = Accumulator()
        self.metrics.write(self.progress.position() | means)

    def log_evaluation(self, sample: str = "", **metrics: float) -> None:
        """Log metrics on held-out data and a sample of the model's text; with --recipe, whether the
        run is on track."""
        evaluation = {name: round(value, 4) for name, value in metrics.items()}
        self.progress.evaluation = evaluation
        line = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        indented = ["    " + sample.replace("\n", "\n    ")] if sample else []
        self.ctx.print(f"step {self.step}: {line}", *indented)
        now = replace(self.progress)
        now.add(self.metrics.accumulator)  # what the next log line will add
        record = now.position() | evaluation | ({"sample": sample} if sample else {})
        expected = self.recipe.expected_metrics(record) if self.recipe else {}
        self.metrics.write(record | expected)
        if self.recipe and expected:
            self.ctx.print(f"    {self.recipe.status(self.metrics.history)}")

    # -- saving and ending

    @property
    def checkpoint_path(self) -> Path:
        return Path(self.ctx.args.checkpoint_dir) / f"{self.name}.checkpoint.pt"

    def save_every(
        self,
        model: nn.Module,
        optimizer: MultiOptimizer,
        save: Callable | None = None,
        extra_state: Any = None,
    ) -> None:
        """Every save_interval steps, at the end and when a signal stops the run: the weights
        (float16, out/) and the checkpoint for --resume (float32, checkpoints/).

        Args:
            save: writes the weights; default: save_weights.
            extra_state: has a state_dict that the checkpoint keeps.
        """
        steps = self.step, self.plan.total_steps
        warn_early(self.ctx, self.initial_weights, unwrap(model), *steps)
        if not (self.is_due(self.ctx.args.save_interval) or self.stop.agreed):
            return
        rng_states = self.ctx.all_gather(hardware.rng_state(self.ctx.device))
        if not self.ctx.is_main:
            return
        model, done = unwrap(model), self.progress
        done.changed_fraction = changed_fraction(self.initial_weights, trainable_fp16(model))
        origin = self.metadata | {
            **dict(steps=self.step, tokens=done.tokens, seconds=round(done.seconds)),
            **done.evaluation,
            "changed_fraction": round(done.changed_fraction, 4),
            "args": asdict(self.ctx.args),
        }
        write: Callable = save or save_weights
        write(model, self.file(".pth"), stage=self.stage, tokenizer=self.tokenizer, origin=origin)
        save_checkpoint(  # last: a finished run has its weights
            self.checkpoint_path,
            model=model,
            optimizer=optimizer,
            scaler=self.scaler,
            progress=done,
            extra_state=extra_state,
            rng_states=rng_states,
            metrics=self.metrics,
            fingerprint=self.fingerprint,
            global_batch_size=self.sampler.global_batch_size,
            total_steps=self.plan.total_steps,
        )

    def finish(self) -> dict[str, Any]:
        """Close the log, draw curves, write the report. Returns the last metrics and the log."""
        done, stopped, history = self.progress, self.stop.agreed, self.metrics.history
        result: dict[str, Any] = dict(name=self.name, stopped=stopped, step=self.step)
        result |= dict(num_tokens=done.tokens, seconds=done.seconds, history=history)
        result |= done.evaluation
        if not self.ctx.is_main:
            return result
        if (changed := done.changed_fraction) is not None and not stopped:
            self.metrics.write({"step": self.step, "changed_fraction": round(changed, 4)})
            self.ctx.print(*fp16_report(changed))
        if self.metrics.tracker:
            self.metrics.tracker.finish()
        plot_losses({self.name: history}, self.file(".loss.png"))
        page = self.file(".report.html")
        state = f"stopped at step {self.step} of {self.plan.total_steps}" if stopped else "finished"
        about: dict[str, Any] = dict(name=self.name, stage=self.stage, state=state, history=history)
        write_report(page, self.ctx, metadata=self.metadata, recipe=self.recipe, **about)
        self.state.end(self.ctx, "stopped" if stopped else "finished")
        if stopped:
            self.ctx.print(f"stopped at step {self.step}; --resume goes on from there")
        elif self.file(".pth").exists():
            self.ctx.print(
                f"{duration(done.seconds)} of training; weights {self.file('.pth')}, "
                f"report {page.name}, log {self.metrics.path.name}"
            )
        return result

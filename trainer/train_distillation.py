"""Distillation: a small student learns the token probabilities of a larger teacher.

White-box distillation (Hinton et al. 2015, arXiv 1503.02531): at every token of an answer the
student learns not only which token came, but how probable the teacher finds each token of the
vocabulary.

    p_T, p_S = softmax(z_T / τ), softmax(z_S / τ)        z: logits of teacher and student
    L = α · CE + (1 − α) · τ² · D(p_T ‖ p_S)             means over the answers' tokens

    α: --alpha   τ: --temperature, which gives improbable tokens more weight; the gradient of D
    shrinks with 1/τ², hence the factor τ² (section 2 of the paper)

--divergence D, of each token, summed over the vocabulary, with M = β·p_T + (1 − β)·p_S:

    forward  Σ p_T · log(p_T / p_S)        mode-covering: p_S must be large wherever p_T is
    reverse  Σ p_S · log(p_S / p_T)        mode-seeking: p_S must be small wherever p_T is
    jsd      β · KL(p_T ‖ M) + (1 − β) · KL(p_S ‖ M)      in between; GKD, arXiv 2306.13649, eq. 1
    skew     KL(p_T ‖ M)                   forward, but bounded; DistiLLM, arXiv 2402.03898

    β: --mixture

--on_policy λ (GKD, Algorithm 1): a share λ of the steps, evenly spread, trains on the student's own
answers to the same questions instead of the data's. The teacher's probabilities at each of their
tokens teach the student in the states that it really reaches. There is no CE then, and L = τ² · D.
No gradient goes through the sampling.

Departures from the papers:
1. Hinton's soft targets are of classes; here they are of each token.
2. GKD draws on-policy steps at random; here they are evenly spread.
3. A conversation of several turns gets a new answer at its last turn only.

    python trainer/train_distillation.py --from_weight full_sft --teacher_weight full_sft
"""

import math
import zlib
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from dataset.released import data_option
from model.command_line import option, setting
from model.errors import UserError
from model.paths import check_weights, is_stage, resolve_weights, tokenizer_beside
from trainer.common.arguments import (
    LEARNING_RATE_HELP,
    MODEL,
    ROLLOUT,
    STAGE,
    WEIGHTS,
    SampleArgs,
)
from trainer.common.command import parse_trainer, run_trainer
from trainer.rl.arguments import RolloutServerArgs

# hidden sizes of student and teacher where a stage is named without one
STUDENT_SIZE, TEACHER_SIZE = 512, 768


@dataclass
class Args(SampleArgs, RolloutServerArgs):
    data_path: list[str] = data_option("full_sft", 'JSONL of {"conversations": [messages]}')
    from_weight: str = option(
        "full_sft",
        "stage to initialise the student from; none: random",
        alias=("from_student_weight",),
    )
    teacher_weight: str = setting(
        "full_sft",
        "the teacher: a stage, .pth or transformers folder",
        group=WEIGHTS,
        alias=("from_teacher_weight",),
    )
    epochs: int = option(6, "passes through the data")
    learning_rate: float = option(5e-4, LEARNING_RATE_HELP)
    alpha: float = setting(
        0.5,
        "weight of the cross-entropy; the teacher has the rest",
        group=STAGE,
        at_least=0,
        at_most=1,
    )
    temperature: float = setting(1.5, "softens both distributions", group=STAGE, above=0)
    divergence: Literal["forward", "reverse", "jsd", "skew"] = setting(
        "forward", "between teacher and student; see above", group=STAGE
    )
    mixture: float = setting(
        0.5,
        "the teacher's share of the mixture M",
        group=STAGE,
        needs="divergence=jsd|skew",
        above=0,
        below=1,
    )

    student_hidden_size: int | None = setting(
        None, "as --hidden_size; default for a stage: 512", group=MODEL
    )
    student_num_hidden_layers: int | None = setting(
        None, "as --num_hidden_layers", group=MODEL, alias=("student_num_layers",)
    )
    student_use_moe: bool | None = setting(None, "as --use_moe", group=MODEL)
    teacher_hidden_size: int | None = setting(None, "width; default for a stage: 768", group=MODEL)
    teacher_num_hidden_layers: int | None = setting(
        None, "depth; default: that of its weights", group=MODEL, alias=("teacher_num_layers",)
    )
    teacher_use_moe: bool = setting(False, "the teacher of that stage is a mixture", group=MODEL)

    on_policy: float = setting(
        0.0, "share of steps on the student's own answers", group=ROLLOUT, at_least=0, at_most=1
    )
    max_gen_len: int = setting(
        256, "most tokens of an answer", group=ROLLOUT, needs="on_policy", at_least=1
    )
    rollout_batch_size: int = setting(
        64, "answers decoded at once", group=ROLLOUT, needs="on_policy", at_least=1, may_differ=True
    )
    update_batch_size: int = setting(
        32,
        "answers in a forward pass",
        group=ROLLOUT,
        needs="on_policy",
        at_least=1,
        may_differ=True,
    )
    rollout_url: str = option(
        "",
        "generate on a server: base URL, such as http://localhost:8000/v1",
        group=ROLLOUT,
        needs="on_policy",
        may_differ=True,
    )

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "use_moe"):
            given = getattr(self, f"student_{name}")
            if given is not None:
                setattr(self, name, given)
        if self.hidden_size is None and is_stage(self.from_weight) and not self.preset:
            self.hidden_size = STUDENT_SIZE
        if not self.tokenizer_path and self.from_weight == "none":  # the two must have the same
            self.tokenizer_path = tokenizer_beside(self.teacher_weight, self.save_dir)
        super().__post_init__()

    def check_files(self) -> None:
        super().check_files()
        self.teacher_path()

    def teacher_path(self) -> Path:
        """The teacher's .pth or folder. UserError if there is none."""
        if self.teacher_use_moe and not is_stage(self.teacher_weight):
            raise UserError(
                "--teacher_use_moe has no effect: --teacher_weight names the file or folder itself"
            )
        kind = dict(newest=False, use_moe=self.teacher_use_moe)
        width = self.teacher_hidden_size or TEACHER_SIZE
        found = resolve_weights(self.teacher_weight, width, self.save_dir, **kind)
        return check_weights(found)


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_trainer(Args, __doc__)


import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.packing import IGNORE_INDEX, Batch, PackedDataset, collate
from model.losses import divergence_sum
from model.model_minimind import CausalLMOutput, MiniMindConfig, MiniMindForCausalLM
from model.weights import count_parameters, load_tokenizer, to_fp16_cpu
from trainer.common.checkpoint import hash_of
from trainer.common.context import Context, unwrap
from trainer.common.evaluation import eager, evaluate_loss, sample_answer
from trainer.common.loop import GlobalBatch
from trainer.common.metrics import Metric
from trainer.common.optimizers import make_optimizer
from trainer.common.setup import init_model, load_for_training, load_packed, prepare_model
from trainer.rl.batches import micro_batches
from trainer.rl.prompts import Prompt
from trainer.rl.rollout import completion_stats, generate_completions
from trainer.trainer_utils import Run


def divergence(teacher: Tensor, student: Tensor, kind: str, mixture: float) -> Tensor:
    """D(p_T ‖ p_S), summed over positions; both are log-probabilities, [N, V]."""
    if kind == "forward":
        return kl(teacher, student)
    if kind == "reverse":
        return kl(student, teacher)
    mixed = torch.logaddexp(teacher + math.log(mixture), student + math.log(1 - mixture))
    if kind == "skew":
        return kl(teacher, mixed)
    return mixture * kl(teacher, mixed) + (1 - mixture) * kl(student, mixed)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p · (log p − log q) over all of them, from log-probabilities."""
    return F.kl_div(q, p, reduction="sum", log_target=True)


# -- the teacher -----------------------------------------------------------------------------------


def load_teacher(
    args: Args, tokenizer: PreTrainedTokenizerBase, student: MiniMindConfig
) -> MiniMindForCausalLM:
    """The teacher, frozen. UserError if there is none, or its vocabulary is not the student's."""
    path = args.teacher_path()
    teacher = load_for_training(path, args, tokenizer)
    if teacher.config.vocab_size != student.vocab_size:
        raise UserError(
            f"the teacher {path} knows {teacher.config.vocab_size} tokens and the student "
            f"{student.vocab_size}: distillation compares them token by token, so both must have "
            "the same tokenizer"
        )
    for name in ("hidden_size", "num_hidden_layers"):
        asked, has = getattr(args, f"teacher_{name}"), getattr(teacher.config, name)
        if asked not in (None, has):
            raise UserError(f"the teacher {path} has {name} {has}, and not {asked}")
    return teacher.requires_grad_(False)


def distillation_loss(
    model: MiniMindForCausalLM,
    outputs: CausalLMOutput,
    teacher: MiniMindForCausalLM,
    batch: Batch,
    **settings: Any,
) -> Tensor:
    """D(p_T ‖ p_S), summed over the label tokens of a batch.

    Args:
        settings: temperature and divergence.
    """
    with torch.no_grad():
        states = teacher.model(**batch.inputs, use_cache=False).last_hidden_state
    return divergence_sum(
        outputs.hidden_states[-1][:, :-1],  # the state at t predicts token t + 1
        unwrap(model).lm_head.weight,
        states[:, :-1],
        teacher.lm_head.weight,
        batch.labels[:, 1:],
        **settings,
    )


@eager
@torch.no_grad()
def evaluate_kl(
    ctx: Context,
    model: MiniMindForCausalLM,
    teacher: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    data: PackedDataset,
) -> float:
    """KL(p_T ‖ p_S) per held-out label token in nats, at temperature 1 whatever is trained."""
    model = unwrap(model).eval()
    total = num_label_tokens = 0.0
    settings = dict(temperature=1.0, divergence=kl)
    local = range(ctx.rank, len(data), ctx.world_size)
    for at in range(0, len(local), ctx.args.batch_size):
        sequences = [data[index] for index in local[at : at + ctx.args.batch_size]]
        batch = collate(sequences, tokenizer.pad_token_id).to(ctx.device)
        with ctx.autocast():
            outputs = model(**batch.inputs, output_hidden_states=True, return_logits=False)
            total += distillation_loss(model, outputs, teacher, batch, **settings)
        num_label_tokens += batch.num_label_tokens
    model.train()
    total, num_label_tokens = ctx.all_reduce_sum(float(total), num_label_tokens)
    return total / max(1, num_label_tokens)


# -- on-policy -------------------------------------------------------------------------------------


def is_on_policy_step(step: int, share: float) -> bool:
    """Whether this step trains on the student's own answers: evenly spread, so that of any n steps
    in a row about n · share do."""
    return math.floor(step * share) > math.floor((step - 1) * share)


def extract_prompts(batch: Batch) -> list[Prompt]:
    """Each document of a batch, up to where its last answer begins."""
    found = []
    tensors = (batch.input_ids, batch.labels, batch.position_ids)
    for ids, labels, positions in zip(*(each.cpu().numpy() for each in tensors), strict=True):
        is_label = labels != IGNORE_INDEX
        edges = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
        for start, end in pairwise(edges):
            places = np.flatnonzero(is_label[start:end])
            if len(places) == 0:
                continue
            breaks = np.flatnonzero(np.diff(places) > 1)
            begins = places[breaks[-1] + 1] if len(breaks) else places[0]
            prompt = ids[start : start + begins]
            found.append(Prompt(zlib.crc32(prompt.tobytes()), [], prompt.tolist(), None))
    return found


def generate_on_policy(
    run: Run[Args], model: MiniMindForCausalLM, global_batch: GlobalBatch
) -> tuple[GlobalBatch, dict[str, Metric]]:
    """The questions of a global batch with the student's own answers, and metrics of these."""
    ctx, tokenizer = run.ctx, run.tokenizer
    prompts = [prompt for batch in global_batch for prompt in extract_prompts(batch)]
    completions = generate_completions(
        ctx, model, tokenizer, prompts, step=run.step, temperature=1.0
    )
    run.metrics.add_tokens(sum(each.num_sampled for each in completions))
    size = ctx.args.update_batch_size
    batches = micro_batches(completions, size, tokenizer.pad_token_id, ctx.device)
    return GlobalBatch.of(ctx, batches), completion_stats(completions)


# -- training --------------------------------------------------------------------------------------


def main(args: Args) -> dict[str, Any]:
    # Setup.
    ctx = Context.create(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = init_model(args, tokenizer)
    teacher = load_teacher(args, tokenizer, model.config)
    train_data, val_data = load_packed(ctx, tokenizer, "conversations")
    weights = hash_of(*to_fp16_cpu(teacher.state_dict()).values())
    fingerprint = {"teacher": weights}  # a run with another teacher is another run
    run = Run(ctx, "full_dist", model, tokenizer, train_data, val_data, fingerprint=fingerprint)
    parameters = count_parameters(teacher) / 1e6
    ctx.print(f"teacher: {parameters:.2f}M parameters, not counted in memory and time above")

    model, teacher = prepare_model(ctx, model), teacher.to(ctx.device)
    optimizer = make_optimizer(
        model, args.optimizer, args.learning_rate, args.weight_decay, ctx.dtype
    )
    run.resume(model, optimizer)
    settings: dict[str, Any] = dict(temperature=args.temperature)
    settings["divergence"] = partial(divergence, kind=args.divergence, mixture=args.mixture)

    for global_batch in run.steps():
        # On-policy steps: the student's own answers in place of the data's. They are no ground
        # truth, so there is no cross-entropy on them.
        alpha, metrics = args.alpha, {}
        if is_on_policy_step(run.step, args.on_policy):
            alpha = 0.0
            global_batch, metrics = generate_on_policy(run, model, global_batch)

        # Forward and backward.
        num_label_tokens = global_batch.num_label_tokens  # of all ranks
        ce_sum = soft_sum = 0.0  # over this rank's tokens, for the log
        for batch in global_batch:
            loss = torch.zeros((), device=ctx.device)
            with run.forward(model, sync=batch is global_batch[-1]):
                outputs = model(
                    **batch.inputs,
                    labels=batch.labels if alpha else None,
                    num_items_in_batch=num_label_tokens,
                    return_logits=False,  # neither model's [B, T, V] is ever whole in memory
                    output_hidden_states=True,
                )
                if alpha > 0:
                    loss = alpha * outputs.loss
                    ce_sum += outputs.loss.detach() * num_label_tokens
                if alpha < 1:
                    soft = distillation_loss(model, outputs, teacher, batch, **settings)
                    soft_sum += soft.detach()
                    # without τ² the balance of both terms would depend on the temperature
                    loss = loss + (1 - alpha) * args.temperature**2 * (soft / num_label_tokens)
            run.backward(loss, global_batch.aux_loss(batch, outputs))
        run.update(model, optimizer)

        # Evaluate, log, save.
        if val_data and run.is_due(args.eval_interval):
            val_metrics = evaluate_loss(ctx, model, tokenizer, val_data)
            val_metrics["eval_kl"] = evaluate_kl(ctx, model, teacher, tokenizer, val_data)
            sample = sample_answer(ctx, model, tokenizer, args.sample_prompt)
            run.log_evaluation(sample, **val_metrics)
        local_labels = sum(batch.num_label_tokens for batch in global_batch)
        if alpha > 0:
            metrics["ce"] = (ce_sum, local_labels)
        if alpha < 1:
            metrics["divergence"] = (soft_sum, local_labels)
        run.log(**metrics)
        run.save_every(model, optimizer)
    return run.finish()


if __name__ == "__main__":
    run_trainer(main, args)

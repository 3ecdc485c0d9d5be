"""Distillation: a small model learns from a large one what the data alone do not say.

White box (Hinton 2015, arXiv 1503.02531): the student is told at every token of an answer not only
which one came, but how likely the teacher finds each of the vocabulary.

    p_T, p_S = softmax(z_T / τ), softmax(z_S / τ)        z: logits of teacher and student
    L = α · CE + (1 − α) · τ² · D(p_T ‖ p_S)             means over the answers' tokens

    α: --alpha   τ: --temperature, which brings out what the teacher finds unlikely; the gradient
    of D shrinks with 1/τ², hence the factor (section 2 of the paper)

--divergence D, of each token, summed over the vocabulary, with M = β·p_T + (1 − β)·p_S:

    forward  Σ p_T · log(p_T / p_S)        the student must cover all that the teacher says
    reverse  Σ p_S · log(p_S / p_T)        it may keep to a part, but say nothing else
    jsd      β · KL(p_T ‖ M) + (1 − β) · KL(p_S ‖ M)      between both; GKD, arXiv 2306.13649 eq. 1
    skew     KL(p_T ‖ M)                   forward, but never infinite; DistiLLM, arXiv 2402.03898

    β: --mixture

--on_policy λ (GKD, Algorithm 1): a share λ of the updates, evenly spread, learns not from the
data's answers but from the student's own to the same questions. The teacher judges each of their
tokens, so that the student is taught in the very situations that it gets itself into; there is no
CE then, and L = τ² · D. No gradient goes through the sampling.

Departures: Hinton's soft targets are of classes, here of each token; GKD tosses a coin for each
update, here they take turns. A conversation of several turns is answered anew at its last one.

    python trainer/train_distillation.py --from_weight full_sft --teacher_weight full_sft
"""

import math
import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dataset.packing import IGNORED, Batch, Rows, collate
from model.command_line import option
from model.errors import UserError
from model.formats.hf_format import load_folder
from model.losses import divergence_sum
from model.model_minimind import CausalLMOutput, MiniMindConfig, MiniMindForCausalLM
from model.weights import (
    count_parameters,
    find_weights,
    halves,
    load_model,
    load_tokenizer,
    tokenizer_hash,
)
from trainer.common.arguments import DATASET, LEARNING_RATE_HELP, TrainArgs
from trainer.common.checkpoint import hash_of
from trainer.common.command import run_stage
from trainer.common.evaluation import answer, held_out_loss, uncompiled
from trainer.common.hardware import autocast
from trainer.common.optimizers import make_optimizer
from trainer.rl.batches import micro_batches
from trainer.rl.prompts import Prompt
from trainer.rl.rollout import completion_stats, generate_completions, rank_shares
from trainer.trainer_utils import Run, Window, read_rows, starting_model, unwrapped

STUDENT, TEACHER = 512, 768  # widths, where a stage is named and no width


@dataclass
class Args(TrainArgs):
    data_path: list[str] = option(
        [str(DATASET / "sft_mini_512.jsonl")], 'JSONL of {"conversations": [messages]}'
    )
    from_weight: str = option("full_sft", "stage that the student starts from; none: from nothing")
    teacher_weight: str = option("full_sft", "the teacher: a stage, .pth or transformers folder")
    epochs: int = option(6, "times to go through the data")
    learning_rate: float = option(5e-4, LEARNING_RATE_HELP)
    alpha: float = option(0.5, "weight of the data's own loss; the teacher has the rest")
    temperature: float = option(1.5, "that softens both distributions")
    divergence: Literal["forward", "reverse", "jsd", "skew"] = option(
        "forward", "how the two are compared; see above"
    )
    mixture: float = option(0.5, "jsd and skew: the teacher's share of what is compared with")

    student_hidden_size: int | None = option(None, "as --hidden_size; default for a stage: 512")
    student_num_hidden_layers: int | None = option(None, "as --num_hidden_layers")
    student_use_moe: bool | None = option(None, "as --use_moe")
    teacher_hidden_size: int | None = option(None, "width; default for a stage: 768")
    teacher_num_hidden_layers: int | None = option(None, "depth; default: as its weights have it")
    teacher_use_moe: bool = option(False, "whether the teacher of that stage is the mixture")

    on_policy: float = option(0.0, "share of updates that learn from the student's own answers")
    max_gen_len: int = option(256, "on_policy: tokens of an answer at most")
    rollout_batch_size: int = option(64, "on_policy: answers decoded side by side")
    update_batch_size: int = option(32, "on_policy: answers in a forward pass of the update")
    rollout_url: str = option("", "decode on a server: base URL, such as http://localhost:8000/v1")
    rollout_folder: str = option("", "folder for the weights handed over to it")
    rollout_reload: Literal["vllm", "sglang"] = option("vllm", "how it is told to read them anew")
    sample_prompt: str = option("Who are you?", "asked at every evaluation")

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "use_moe"):
            given = getattr(self, f"student_{name}")
            if given is not None:
                setattr(self, name, given)
        if self.hidden_size is None and not self.from_weight.endswith(".pth"):
            self.hidden_size = STUDENT
        super().__post_init__()
        for name in ("temperature", "max_gen_len", "rollout_batch_size", "update_batch_size"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} must be more than 0, not {getattr(self, name)}")
        for name in ("alpha", "on_policy"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} must be from 0 to 1, not {getattr(self, name)}")
        if not 0 < self.mixture < 1:
            raise UserError(f"--mixture must be more than 0 and less than 1, not {self.mixture}")
        if self.rollout_url and not self.rollout_folder:
            raise UserError("--rollout_url needs --rollout_folder, where the server reads weights")


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
    path = Path(args.teacher_weight)
    if (path / "config.json").exists():
        theirs = load_tokenizer(path)
        if tokenizer_hash(theirs) != tokenizer_hash(tokenizer):
            raise UserError(
                f"the teacher {path} has another tokenizer ({len(theirs)} tokens) than the student "
                f"({len(tokenizer)}), so that their distributions cannot be compared token by token"
            )
        teacher = load_folder(path)
    else:
        if path.suffix != ".pth":
            width = args.teacher_hidden_size or TEACHER
            kind = dict(newest=False, use_moe=args.teacher_use_moe)
            path = find_weights(args.teacher_weight, width, args.save_dir, **kind)
        teacher = load_model(path, tokenizer=tokenizer)
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


def from_teacher(
    model: nn.Module, outputs: CausalLMOutput, teacher: nn.Module, batch: Batch, **how: Any
) -> Tensor:
    """D(p_T ‖ p_S), summed over a batch's trained tokens; `how`: temperature and divergence."""
    with torch.no_grad():
        states = teacher.model(**batch.inputs, use_cache=False).last_hidden_state
    return divergence_sum(
        outputs.hidden_states[-1][:, :-1],
        unwrapped(model).lm_head.weight,
        states[:, :-1],
        teacher.lm_head.weight,
        batch.labels[:, 1:],
        **how,
    )


@uncompiled
@torch.no_grad()
def held_out_kl(run: Run, model: nn.Module, teacher: nn.Module, rows: Rows) -> float:
    """KL(p_T ‖ p_S) of a held-out token at temperature 1, whatever is trained, in nats."""
    model = unwrapped(model).eval()
    total = labelled = 0.0
    mine = range(run.rank, len(rows), run.ranks)
    for at in range(0, len(mine), run.args.batch_size):
        chunk = [rows[row] for row in mine[at : at + run.args.batch_size]]
        batch = collate(chunk, run.tokenizer.pad_token_id).to(run.device)
        with autocast(run.device, run.dtype):
            outputs = model(**batch.inputs, output_hidden_states=True, return_logits=False)
            total += from_teacher(model, outputs, teacher, batch, temperature=1.0, divergence=kl)
        labelled += batch.labelled
    model.train()
    total, labelled = run.sum_over_ranks(float(total), labelled)
    return total / max(1, labelled)


# -- on-policy -------------------------------------------------------------------------------------


def own_turn(step: int, share: float) -> bool:
    """Whether this update is one of the student's own answers: of any n in a row, n · share are."""
    return math.floor(step * share) > math.floor((step - 1) * share)


def questions(batch: Batch) -> list[Prompt]:
    """Each document of a batch up to where its last answer begins."""
    found = []
    tensors = (batch.input_ids, batch.labels, batch.position_ids)
    for ids, labels, positions in zip(*(each.cpu().numpy() for each in tensors), strict=True):
        trained = labels != IGNORED
        edges = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
        for start, end in pairwise(edges):
            places = np.flatnonzero(trained[start:end])
            if len(places) == 0:
                continue
            breaks = np.flatnonzero(np.diff(places) > 1)
            begins = places[breaks[-1] + 1] if len(breaks) else places[0]
            asked = ids[start : start + begins]
            found.append(Prompt(zlib.crc32(asked.tobytes()), [], asked.tolist(), None))
    return found


def own_answers(run: Run, model: nn.Module, window: Window) -> tuple[Window, dict[str, float]]:
    """The questions of a window with answers of the student's, and figures for the log."""
    prompts = [prompt for batch in window for prompt in questions(batch)]
    completions = generate_completions(run, model, prompts, temperature=1.0)
    size, pad_id = run.args.update_batch_size, run.tokenizer.pad_token_id
    answered = run.count(Window(micro_batches(completions, size, pad_id, run.device)))
    return answered, rank_shares(run, completion_stats(completions))


# -- training --------------------------------------------------------------------------------------


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = starting_model(args, tokenizer)
    teacher = load_teacher(args, tokenizer, model.config)
    run = Run(args, "full_dist", model.config, tokenizer)
    rows, held_out = read_rows(run, "conversations")
    loader = run.loader(rows)
    run.announce(model, rows, held_out)
    run.identity["teacher"] = hash_of(*halves(teacher.state_dict()).values())
    parameters = count_parameters(teacher) / 1e6
    run.print(f"teacher: {parameters:.2f}M parameters, not counted in memory and time above")

    model, teacher = run.distribute(model), teacher.to(run.device)
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    run.resume(model, optimizer)
    how = dict(temperature=args.temperature)
    how["divergence"] = partial(divergence, kind=args.divergence, mixture=args.mixture)

    for window in run.steps(loader):
        alpha, figures = args.alpha, defaultdict(float)
        if own_turn(run.step, args.on_policy):
            alpha = 0.0
            window, about = own_answers(run, model, window)
            figures.update(about)
        for batch in window:
            loss = 0.0
            with run.forward(model, sync=batch is window[-1]):
                outputs = model(
                    **batch.inputs,
                    labels=batch.labels if alpha else None,
                    num_items_in_batch=window.labelled,
                    return_logits=False,
                    output_hidden_states=True,
                )
                if alpha > 0:
                    loss = alpha * outputs.loss
                    figures["ce"] += outputs.loss.detach()
                if alpha < 1:
                    soft = from_teacher(model, outputs, teacher, batch, **how) / window.labelled
                    loss = loss + (1 - alpha) * args.temperature**2 * soft
                    figures["divergence"] += soft.detach()
            run.backward(loss, window.balance_loss(batch, outputs))
        run.update(model, optimizer)
        if held_out and run.due(args.eval_interval):
            val_figures = held_out_loss(run, model, held_out)
            val_figures["val_kl"] = held_out_kl(run, model, teacher, held_out)
            run.log_evaluation(answer(run, model, args.sample_prompt), **val_figures)
        run.log(**figures)
        run.save_every(model, optimizer)
    return run.finish()


if __name__ == "__main__":
    run_stage(main, Args, __doc__)

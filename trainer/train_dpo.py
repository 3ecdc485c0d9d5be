"""DPO: raise the probability of the chosen answer over the rejected one, relative to a reference.

Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290):

    L = −log σ( β · [ log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) ] )         (eq. 7)

x is the prompt, y_w the chosen and y_l the rejected answer, π the policy that is trained, π_ref
the reference (the model it starts from), and log π(y|x) the sum over the answer's tokens.
β·log π/π_ref is the implicit reward: `rewards/accuracies` is how often the chosen answer has the
higher one, `rewards/margins` by how much. At first π is π_ref, every margin is 0 and the loss is
ln 2 = 0.693.

--label_smoothing ε assumes that a share ε of the pairs has its labels swapped (cDPO):

    L = −(1 − ε)·log σ(β·h) − ε·log σ(−β·h)                h: the brackets above

--loss_type ipo pulls the margin to a fixed size (arXiv 2310.12036, eq. 17, τ = β), with log-ratios
as means over each answer's tokens, as its authors advise and trl has it:

    L = (h − 1/(2β))²

--sft_weight α adds −α/|y_w| · log π(y_w|x), so that the chosen answer does not lose probability
together with the rejected one (RPO, arXiv 2404.19733, eq. 1).

Departures from the paper:
1. π_ref's log-probabilities are computed once, before training, and kept on disk (reference.py).
2. Pairs with a side longer than --max_seq_len are left out, not truncated.
3. With --use_lora 1 only an adapter is trained (model_lora.py), and π_ref is the model without it.

    python trainer/train_dpo.py --data_path dataset/dpo.jsonl
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from dataset.released import data_option
from model.command_line import option, setting
from trainer.common.arguments import (
    LEARNING_RATE_HELP,
    STAGE,
    ConversationArgs,
    OptionalLoraArgs,
)
from trainer.common.command import parse_trainer, run_trainer


@dataclass
class Args(ConversationArgs, OptionalLoraArgs):
    data_path: list[str] = data_option(
        "preferences", 'JSONL of {"chosen": [messages], "rejected": [messages]}'
    )
    from_weight: str = option("full_sft", "stage to initialise from; also the reference")
    batch_size: int = option(4, "pairs in a forward pass of a device")
    learning_rate: float = option(1e-5, LEARNING_RATE_HELP)
    max_seq_len: int = option(1024, "tokens of a side; pairs with a longer one are left out")
    packing: bool = option(True, "short sides share a sequence; 0: each padded to the longest")
    beta: float = setting(
        0.1,
        "the higher, the closer to the reference; ipo: target margin 1/(2β)",
        group=STAGE,
        above=0,
    )
    loss_type: Literal["sigmoid", "ipo"] = setting("sigmoid", "sigmoid: DPO; ipo: IPO", group=STAGE)
    label_smoothing: float = setting(
        0.0,
        "assumed share of pairs with swapped labels (cDPO)",
        group=STAGE,
        needs="loss_type=sigmoid",
        at_least=0,
        below=0.5,
    )
    sft_weight: float = setting(
        0.0, "weight of the chosen answer's own loss (RPO)", group=STAGE, at_least=0
    )
    use_lora: bool = option(False, "train an adapter only, saved as lora/dpo")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_trainer(Args, __doc__)


import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.pairs import PreferenceDataset, collate_pairs
from model.model_minimind import MiniMindForCausalLM
from model.weights import load_tokenizer
from trainer.common.context import Context
from trainer.common.evaluation import (
    completion_log_probs,
    map_pairs,
    precompute_ref_log_probs,
    sample_answer,
)
from trainer.common.metrics import mean_of, pair_metrics
from trainer.common.optimizers import make_optimizer
from trainer.common.setup import (
    add_lora_if_asked,
    init_model,
    load_pairs,
    make_save_fn,
    prepare_model,
)
from trainer.trainer_utils import Run


def dpo_loss(
    policy: Tensor,
    reference: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> Tensor:
    """The loss of each pair, [N].

    Args:
        policy: [N, 2] log π(y|x) of the chosen and the rejected answer.
        reference: [N, 2] log π_ref(y|x).
        lengths: [N, 2] tokens of each answer.
    """
    log_ratios = policy - reference  # [N, 2]; sums over tokens: log π(y|x) is the whole answer's
    if loss_type == "ipo":
        log_ratios = log_ratios / lengths  # IPO's target margin is one size for all lengths
    chosen, rejected = log_ratios.unbind(1)
    h = chosen - rejected  # [N]; the prompt's partition function Z(x) cancels here
    if loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2  # a margin beyond the target costs too
    else:
        # logsigmoid(−z) is log(1 − σ(z)), computed without the rounding of 1 − σ(z)
        as_labelled, swapped = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
        losses = -(1 - label_smoothing) * as_labelled - label_smoothing * swapped
    if sft_weight:
        losses = losses - sft_weight * policy[:, 0] / lengths[:, 0]
    return losses


def main(args: Args) -> dict[str, Any]:
    # Setup.
    ctx = Context.create(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = add_lora_if_asked(args, init_model(args, tokenizer))
    train_data, val_data = load_pairs(ctx, tokenizer)
    collate = partial(collate_pairs, packing=args.packing)
    stage = args.stage("dpo")
    run = Run(ctx, stage, model, tokenizer, train_data, val_data, collate=collate)

    model = prepare_model(ctx, model)
    optimizer = make_optimizer(
        model, args.optimizer, args.learning_rate, args.weight_decay, ctx.dtype
    )
    # The reference is the model as it is now: before --resume loads trained weights into it.
    for data in (train_data, val_data) if val_data else (train_data,):
        precompute_ref_log_probs(ctx, model, tokenizer, data, run.oom_hint)
    run.resume(model, optimizer)
    loss_function = partial(
        dpo_loss,
        beta=args.beta,
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        sft_weight=args.sft_weight,
    )
    zeros = torch.zeros(1, 2)
    initial_loss = loss_function(zeros, zeros, zeros + 1).item()
    ctx.print(f"loss: {initial_loss:.3f} at the start, when policy and reference are equal")

    for global_batch in run.steps():
        # Forward and backward.
        rewards = []
        for batch in global_batch:
            with run.forward(model, sync=batch is global_batch[-1]):
                # Both sides of a pair in one forward pass. The prompt's tokens have no label, so
                # that only the answer's log-probs are summed.
                outputs = model(**batch.inputs, labels=batch.labels, return_log_probs=True)
                policy = batch.sum_log_probs(outputs.log_probs)  # [N, 2]
                losses = loss_function(policy, batch.ref_log_probs, batch.completion_lengths)
            # a mean over the pairs of all ranks, whatever their number in this micro-batch
            aux_loss = global_batch.aux_loss(batch, outputs)
            run.backward(losses.sum() / global_batch.num_samples, aux_loss)
            # detached: the implicit reward is only logged
            rewards.append(args.beta * (policy.detach() - batch.ref_log_probs))
        run.update(model, optimizer)

        # Evaluate, log, save.
        if val_data and run.is_due(args.eval_interval):
            metrics = evaluate_pairs(ctx, model, tokenizer, val_data, loss_function)
            run.log_evaluation(sample_answer(ctx, model, tokenizer, args.sample_prompt), **metrics)
        run.log(**pair_metrics(torch.cat(rewards), "rewards/"))
        run.save_every(model, optimizer, save=make_save_fn(args))
    return run.finish()


def evaluate_pairs(
    ctx: Context[Args],
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pairs: PreferenceDataset,
    loss_function: Callable,
) -> dict[str, float]:
    """Loss, accuracy and margin on held-out pairs."""
    policy = map_pairs(ctx, model, tokenizer, pairs, completion_log_probs)
    reference, lengths = (
        torch.as_tensor(each, device=ctx.device)
        for each in (pairs.ref_log_probs, pairs.completion_lengths)
    )
    metrics = pair_metrics(ctx.args.beta * (policy - reference), "rewards/")
    return {
        "eval_loss": loss_function(policy, reference, lengths).mean().item(),
        "eval_rewards/accuracies": mean_of(metrics["rewards/accuracies"]),
        "eval_rewards/margins": mean_of(metrics["rewards/margins"]),
    }


if __name__ == "__main__":
    run_trainer(main, args)

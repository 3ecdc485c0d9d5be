"""DPO: make the chosen answer likelier than the rejected one (Rafailov 2023, arXiv 2305.18290).

    L = −log σ( β · [ log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x) ] )         (eq. 7)

x is the prompt, y_w the chosen and y_l the rejected answer, π the model that is trained, π_ref the
one it starts from, and log π(y|x) the sum over the answer's tokens. β·log π/π_ref is the reward
that the model implies: `accuracy` is how often the chosen answer has more of it, `margin` by how
much. At first π is π_ref, every margin 0 and the loss ln 2 = 0.693.

--label_smoothing ε says that a share ε of the pairs is labelled the wrong way round (cDPO):

    L = −(1 − ε)·log σ(β·h) − ε·log σ(−β·h)                h: the brackets above

--loss_type ipo pulls the margin to a fixed size (arXiv 2310.12036, eq. 17, τ = β), with log-ratios
as means over each answer's tokens, as its authors advise and trl has it:

    L = (h − 1/(2β))²

--sft_weight α adds −α/|y_w| · log π(y_w|x), so that the chosen answer does not lose probability
together with the rejected one (RPO, arXiv 2404.19733, eq. 1).

Departures: π_ref's log-probabilities are computed once and kept on disk (reference.py). Pairs with
a side longer than --max_seq_len are left out. With --use_lora 1 only an addition is trained
(model_lora.py), and π_ref is the model without it.

    python trainer/train_dpo.py --data_path dataset/dpo.jsonl
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.pairs import Pairs, collate_pairs
from model.command_line import option
from model.errors import UserError
from model.model_lora import add_lora, save_lora
from model.weights import load_tokenizer
from trainer.common.arguments import DATASET, LEARNING_RATE_HELP, LoraArgs
from trainer.common.command import run_stage
from trainer.common.evaluation import answer, over_pairs, pair_figures
from trainer.common.optimizers import make_optimizer
from trainer.rl.reference import completion_log_probs, precompute_ref_log_probs
from trainer.trainer_utils import Run, read_pairs, starting_model


@dataclass
class Args(LoraArgs):
    data_path: list[str] = option(
        [str(DATASET / "dpo.jsonl")], 'JSONL of {"chosen": [messages], "rejected": [messages]}'
    )
    from_weight: str = option("full_sft", "stage to start from; also the reference")
    batch_size: int = option(4, "pairs a device takes at once")
    learning_rate: float = option(1e-5, LEARNING_RATE_HELP)
    max_seq_len: int = option(1024, "tokens of a side; pairs with a longer one are left out")
    packing: bool = option(True, "short sides share a row; 0: each has one, padded to the longest")
    beta: float = option(0.1, "how closely to stay to the reference; ipo: 1/(2β) is the margin")
    loss_type: Literal["sigmoid", "ipo"] = option("sigmoid", "sigmoid: DPO; ipo: IPO")
    label_smoothing: float = option(0.0, "share of pairs thought to be the wrong way round (cDPO)")
    sft_weight: float = option(0.0, "weight of the chosen answer's own loss (RPO)")
    use_lora: bool = option(False, "train an addition only; saved as lora/dpo")
    sample_prompt: str = option("Who are you?", "asked at every evaluation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise UserError(f"--beta must be more than 0, not {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"--label_smoothing must be at least 0 and less than 0.5, not "
                f"{self.label_smoothing}"
            )
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise UserError("--label_smoothing is for --loss_type sigmoid")
        if self.sft_weight < 0:
            raise UserError(f"--sft_weight must not be negative, as {self.sft_weight} is")


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
    log_ratios = policy - reference  # [N, 2]
    if loss_type == "ipo":
        log_ratios = log_ratios / lengths
    chosen, rejected = log_ratios.unbind(1)
    h = chosen - rejected  # [N]
    if loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    if sft_weight:
        losses = losses - sft_weight * policy[:, 0] / lengths[:, 0]
    return losses


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = starting_model(args, tokenizer)
    if args.use_lora:
        add_lora(model, args.settings())
    run = Run(args, "lora/dpo" if args.use_lora else "dpo", model.config, tokenizer)
    pairs, held_out = read_pairs(run)
    loader = run.loader(pairs, partial(collate_pairs, packing=args.packing))
    run.announce(model, pairs, held_out)

    model = run.distribute(model)
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    for some in (pairs, held_out) if held_out else (pairs,):
        precompute_ref_log_probs(run, model, some)
    run.resume(model, optimizer)
    loss_of = partial(
        dpo_loss,
        beta=args.beta,
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        sft_weight=args.sft_weight,
    )
    no_margin = torch.zeros(1, 2)
    first = loss_of(no_margin, no_margin, no_margin + 1).item()
    run.print(f"loss: {first:.3f} at the start, when the policy is the reference; then it falls")
    save = partial(save_lora, settings=args.settings()) if args.use_lora else None

    for window in run.steps(loader):
        rewards = []
        for batch in window:
            with run.forward(model, sync=batch is window[-1]):
                outputs = model(**batch.inputs, labels=batch.labels, return_log_probs=True)
                policy = batch.sums(outputs.log_probs)  # [N, 2]
                losses = loss_of(policy, batch.reference, batch.completion)
            run.backward(losses.sum() / window.rows, window.balance_loss(batch, outputs))
            rewards.append(args.beta * (policy.detach() - batch.reference))
        run.update(model, optimizer)
        if held_out and run.due(args.eval_interval):
            figures = held_out_loss(run, model, held_out, loss_of)
            run.log_evaluation(answer(run, model, args.sample_prompt), **figures)
        run.log(**pair_figures(torch.cat(rewards), window.rows))
        run.save_every(model, optimizer, save=save)
    return run.finish()


def held_out_loss(run: Run, model: nn.Module, pairs: Pairs, loss_of) -> dict[str, float]:
    """Loss, accuracy and margin on held-out pairs."""
    policy = over_pairs(run, model, pairs, completion_log_probs)
    reference, lengths = (
        torch.as_tensor(each, device=run.device) for each in (pairs.reference, pairs.completion)
    )
    figures = pair_figures(run.args.beta * (policy - reference), len(pairs))
    return {
        "val_loss": loss_of(policy, reference, lengths).mean().item(),
        "val_accuracy": figures["accuracy"].item(),
        "val_margin": figures["margin"].item(),
    }


if __name__ == "__main__":
    run_stage(main, Args, __doc__)

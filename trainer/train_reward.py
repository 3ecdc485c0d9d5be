"""A reward model: one number that says how good an answer is, learnt from preferences.

    L = −log σ( r(x, y_w) − r(x, y_l) )            (Bradley and Terry 1952; arXiv 2203.02155, eq. 1)

x is the prompt, y_w the chosen and y_l the rejected answer. r is the language model with a scalar
head instead of the language-model head, read at the last token of the answer, its <|im_end|>. The
loss depends on differences only, so the zero point of r has no meaning. The head starts at 0, and
the loss at ln 2 = 0.693.

Saved as out/reward_{hidden_size}.pth, which `load_scoring_model` (model/weights.py) reads. The
.json beside it holds mean and standard deviation of the scores of held-out answers.

    python trainer/train_reward.py --data_path dataset/dpo.jsonl
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from dataset.released import data_option
from model.command_line import option
from trainer.common.arguments import LEARNING_RATE_HELP, TrainArgs
from trainer.common.command import parse_trainer, run_trainer


@dataclass
class Args(TrainArgs):
    data_path: list[str] = data_option(
        "preferences", 'JSONL of {"chosen": [messages], "rejected": [messages]}'
    )
    from_weight: str = option("full_sft", "language model to initialise from")
    batch_size: int = option(8, "pairs in a forward pass of a device")
    learning_rate: float = option(3e-4, LEARNING_RATE_HELP)
    max_seq_len: int = option(1024, "tokens of a side; pairs with a longer one are left out")
    packing: bool = option(True, "short sides share a sequence; 0: each padded to the longest")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_trainer(Args, __doc__)


import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.pairs import PreferenceBatch, PreferenceDataset, collate_pairs
from model.model_minimind import MiniMindForScoring
from model.weights import load_tokenizer
from trainer.common.context import Context
from trainer.common.evaluation import map_pairs
from trainer.common.metrics import mean_of, pair_metrics
from trainer.common.optimizers import make_optimizer
from trainer.common.setup import init_model, load_pairs, prepare_model
from trainer.trainer_utils import Run


def bradley_terry_loss(scores: Tensor) -> Tensor:
    """[N, 2] scores of the chosen and the rejected side → the loss of each pair, [N]."""
    chosen, rejected = scores.unbind(1)
    return -F.logsigmoid(chosen - rejected)


def main(args: Args) -> dict[str, Any]:
    # Setup.
    ctx = Context.create(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = MiniMindForScoring.from_language_model(init_model(args, tokenizer))
    train_data, val_data = load_pairs(ctx, tokenizer)
    collate = partial(collate_pairs, packing=args.packing)
    run = Run(ctx, "reward", model, tokenizer, train_data, val_data, collate=collate)

    model = prepare_model(ctx, model)
    optimizer = make_optimizer(
        model, args.optimizer, args.learning_rate, args.weight_decay, ctx.dtype
    )
    run.resume(model, optimizer)

    for global_batch in run.steps():
        # Forward and backward.
        scores = []
        for batch in global_batch:
            with run.forward(model, sync=batch is global_batch[-1]):
                outputs = model(**batch.inputs)
                # Only the last token has seen the whole answer. The scores of earlier tokens, in a
                # causal model, would judge a part of it.
                scores.append(batch.gather_last(outputs.scores))  # [N, 2]
                losses = bradley_terry_loss(scores[-1])
            # a mean over the pairs of all ranks
            aux_loss = global_batch.aux_loss(batch, outputs)
            run.backward(losses.sum() / global_batch.num_samples, aux_loss)
        run.update(model, optimizer)

        # Evaluate, log, save.
        if val_data and run.is_due(args.eval_interval):
            run.log_evaluation("", **evaluate_pairs(ctx, model, tokenizer, val_data))
        run.log(**pair_metrics(torch.cat(scores).detach()))
        run.save_every(model, optimizer)
    return run.finish()


def end_scores(model: MiniMindForScoring, batch: PreferenceBatch) -> Tensor:
    """[N, 2] scores of both sides of each pair."""
    return batch.gather_last(model(**batch.inputs).scores)


def evaluate_pairs(
    ctx: Context,
    model: MiniMindForScoring,
    tokenizer: PreTrainedTokenizerBase,
    pairs: PreferenceDataset,
) -> dict[str, float]:
    """Loss, accuracy and margin on held-out pairs, with mean and standard deviation of the scores,
    by which a user of the model can normalise them."""
    scores = map_pairs(ctx, model, tokenizer, pairs, end_scores)
    metrics = pair_metrics(scores)
    return {
        "eval_loss": bradley_terry_loss(scores).mean().item(),
        "eval_accuracy": mean_of(metrics["accuracy"]),
        "eval_margin": mean_of(metrics["margin"]),
        "score_mean": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
    }


if __name__ == "__main__":
    run_trainer(main, args)

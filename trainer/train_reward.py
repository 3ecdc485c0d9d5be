"""A reward model: one number that says how good an answer is, learnt from preferences.

    L = −log σ( r(x, y_w) − r(x, y_l) )            (Bradley and Terry 1952; arXiv 2203.02155, eq. 1)

x is the prompt, y_w the chosen and y_l the rejected answer. r is the language model with a head of
one output in place of the vocabulary's, read at the last token of the answer, the <|im_end|> that
ends it. Only differences are learnt: where r is 0 means nothing. At first r is 0 everywhere and the
loss ln 2 = 0.693.

Saved as out/reward_{hidden_size}.pth; `load_scoring_model` (model/weights.py) reads it. Among the
figures in its .json are the mean and the standard deviation of the scores of held-out answers, by
which they can be brought to one scale.

    python trainer/train_reward.py --data_path dataset/dpo.jsonl
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.pairs import PairBatch, Pairs, collate_pairs
from model.command_line import option
from model.model_minimind import MiniMindForScoring
from model.weights import load_tokenizer
from trainer.common.arguments import DATASET, LEARNING_RATE_HELP, TrainArgs
from trainer.common.command import run_stage
from trainer.common.evaluation import over_pairs, pair_figures
from trainer.common.optimizers import make_optimizer
from trainer.trainer_utils import Run, read_pairs, starting_model


@dataclass
class Args(TrainArgs):
    data_path: list[str] = option(
        [str(DATASET / "dpo.jsonl")], 'JSONL of {"chosen": [messages], "rejected": [messages]}'
    )
    from_weight: str = option("full_sft", "language model to start from")
    batch_size: int = option(8, "pairs a device takes at once")
    learning_rate: float = option(3e-4, LEARNING_RATE_HELP)
    max_seq_len: int = option(1024, "tokens of a side; pairs with a longer one are left out")
    packing: bool = option(True, "short sides share a row; 0: each has one, padded to the longest")


def bradley_terry_loss(scores: Tensor) -> Tensor:
    """[N, 2] scores of the chosen and the rejected side → the loss of each pair, [N]."""
    chosen, rejected = scores.unbind(1)
    return -F.logsigmoid(chosen - rejected)


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = MiniMindForScoring.on(starting_model(args, tokenizer))
    run = Run(args, "reward", model.config, tokenizer)
    pairs, held_out = read_pairs(run)
    loader = run.loader(pairs, partial(collate_pairs, packing=args.packing))
    run.announce(model, pairs, held_out)

    model = run.distribute(model)
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    run.resume(model, optimizer)

    for window in run.steps(loader):
        scores = []
        for batch in window:
            with run.forward(model, sync=batch is window[-1]):
                outputs = model(**batch.inputs)
                scores.append(batch.at_the_ends(outputs.scores))  # [N, 2]
                losses = bradley_terry_loss(scores[-1])
            run.backward(losses.sum() / window.rows, window.balance_loss(batch, outputs))
        run.update(model, optimizer)
        if held_out and run.due(args.eval_interval):
            run.log_evaluation(**held_out_loss(run, model, held_out))
        run.log(**pair_figures(torch.cat(scores).detach(), window.rows))
        run.save_every(model, optimizer)
    return run.finish()


def end_scores(model: nn.Module, batch: PairBatch) -> Tensor:
    """[N, 2] of both sides of each pair."""
    return batch.at_the_ends(model(**batch.inputs).scores)


def held_out_loss(run: Run, model: nn.Module, pairs: Pairs) -> dict[str, float]:
    """Loss, accuracy and margin on held-out pairs, and how their scores are spread."""
    scores = over_pairs(run, model, pairs, end_scores)
    figures = pair_figures(scores, len(pairs))
    return {
        "val_loss": bradley_terry_loss(scores).mean().item(),
        "val_accuracy": figures["accuracy"].item(),
        "val_margin": figures["margin"].item(),
        "score_mean": scores.mean().item(),
        "score_std": scores.std(correction=0).item(),
    }


if __name__ == "__main__":
    run_stage(main, Args, __doc__)

"""Pretraining: learn to predict the next token of text.

    L = −1/N · Σ log p(x_t | x_1 … x_{t−1})

over the N tokens of a window (all micro-batches of one update, on all ranks), where p is the
softmax of the model's logits; `model(labels=…)` computes it. Documents share a row but do not see
each other, and padding and the first token of a document carry no loss.

    python trainer/train_pretrain.py --data_path dataset/pretrain_hq.jsonl
    torchrun --nproc_per_node 2 trainer/train_pretrain.py
"""

from dataclasses import dataclass
from typing import Any

from model.command_line import option
from model.weights import load_tokenizer
from trainer.common.arguments import BATCH_RAMP_HELP, DATASET, TrainArgs
from trainer.common.command import run_stage
from trainer.common.evaluation import continuation, held_out_loss
from trainer.common.optimizers import make_optimizer
from trainer.trainer_utils import Run, read_rows, starting_model


@dataclass
class Args(TrainArgs):
    data_path: list[str] = option([str(DATASET / "pretrain_hq.jsonl")], 'JSONL of {"text": …}')
    accumulation_steps: int = option(8, "batches added up for one update")
    batch_ramp: int = option(200, BATCH_RAMP_HELP)


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = starting_model(args, tokenizer)
    run = Run(args, "pretrain", model.config, tokenizer)
    rows, held_out = read_rows(run, "text")
    loader = run.loader(rows)
    run.announce(model, rows, held_out)

    model = run.distribute(model)
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    run.resume(model, optimizer)

    for window in run.steps(loader):
        for batch in window:
            with run.forward(model, sync=batch is window[-1]):
                outputs = model(
                    **batch.inputs,
                    labels=batch.labels,
                    num_items_in_batch=window.labelled,
                    return_logits=False,
                )
            run.backward(outputs.loss, window.balance_loss(batch, outputs))
        run.update(model, optimizer)
        if held_out and run.due(args.eval_interval):
            figures = held_out_loss(run, model, held_out)
            run.log_evaluation(continuation(run, model, held_out), **figures)
        run.log()
        run.save_every(model, optimizer)
    return run.finish()


if __name__ == "__main__":
    run_stage(main, Args, __doc__)

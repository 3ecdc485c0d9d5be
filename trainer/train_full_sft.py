"""Supervised fine-tuning: learn to answer, from conversations.

    L = −1/N · Σ m_t · log p(x_t | x_1 … x_{t−1})

the loss of pretraining, but m_t is 1 only for the tokens that the assistant writes, the <|im_end|>
that ends its turn included, and N counts those alone: the model learns to answer and to stop, not
to ask. The mask comes from the chat template; `python scripts/show_batch.py` shows it.

    python trainer/train_full_sft.py --from_weight pretrain --data_path dataset/sft_mini_512.jsonl
"""

from dataclasses import dataclass
from typing import Any

from model.command_line import option
from model.weights import load_tokenizer
from trainer.common.arguments import DATASET, TrainArgs
from trainer.common.command import run_stage
from trainer.common.evaluation import answer, held_out_loss
from trainer.common.optimizers import make_optimizer
from trainer.trainer_utils import Run, read_rows, starting_model


@dataclass
class Args(TrainArgs):
    data_path: list[str] = option(
        [str(DATASET / "sft_mini_512.jsonl")], 'JSONL of {"conversations": [messages]}'
    )
    from_weight: str = option("pretrain", "stage to start from; none: from nothing")
    batch_size: int = option(16, "rows a device takes at once")
    epochs: int = option(2, "times to go through the data")
    sample_prompt: str = option("Who are you?", "asked at every evaluation")


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = starting_model(args, tokenizer)
    run = Run(args, "full_sft", model.config, tokenizer)
    rows, held_out = read_rows(run, "conversations")
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
            run.log_evaluation(answer(run, model, args.sample_prompt), **figures)
        run.log()
        run.save_every(model, optimizer)
    return run.finish()


if __name__ == "__main__":
    run_stage(main, Args, __doc__)

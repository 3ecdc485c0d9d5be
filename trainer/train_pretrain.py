"""Pretraining: learn to predict the next token of text.

    L = −1/N · Σ log p(x_t | x_1 … x_{t−1})

over the N label tokens of a global batch (all micro-batches of one optimizer step, on all ranks);
p is the softmax of the model's logits, and `model(labels=…)` computes the sum. Documents packed
into one sequence do not attend to each other. Padding and the first token of a document carry no
loss.

    python trainer/train_pretrain.py --data_path dataset/pretrain_t2t_mini.jsonl
    torchrun --nproc_per_node 2 trainer/train_pretrain.py
"""

from dataclasses import dataclass
from typing import Any

from dataset.released import data_option
from model.command_line import option
from trainer.common.arguments import BATCH_RAMP_HELP, TrainArgs
from trainer.common.command import parse_trainer, run_trainer


@dataclass
class Args(TrainArgs):
    data_path: list[str] = data_option("pretrain", 'JSONL of {"text": …}')
    accumulation_steps: int = option(8, "forward passes of an optimizer step")
    batch_ramp: int = option(200, BATCH_RAMP_HELP)


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_trainer(Args, __doc__)


from model.weights import load_tokenizer
from trainer.common.compute_optimal import choose_size
from trainer.common.context import Context
from trainer.common.evaluation import evaluate_loss, sample_continuation
from trainer.common.optimizers import make_optimizer
from trainer.common.setup import init_model, load_packed, prepare_model
from trainer.trainer_utils import Run


def main(args: Args) -> dict[str, Any]:
    # Setup. Every rank does the same: the data's order depends on the seed alone.
    ctx = Context.create(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    train_data, val_data = load_packed(ctx, tokenizer, "text")
    choose_size(ctx, tokenizer, train_data)  # with --minutes
    model = init_model(args, tokenizer)
    run = Run(ctx, "pretrain", model, tokenizer, train_data, val_data)

    model = prepare_model(ctx, model)
    optimizer = make_optimizer(
        model, args.optimizer, args.learning_rate, args.weight_decay, ctx.dtype
    )
    run.resume(model, optimizer)

    for global_batch in run.steps():
        # Forward and backward: gradients of the micro-batches add up to one step's gradient.
        for batch in global_batch:
            # ranks exchange gradients once a step, with the last micro-batch
            with run.forward(model, sync=batch is global_batch[-1]):
                outputs = model(
                    **batch.inputs,
                    labels=batch.labels,  # unshifted: the model compares logit t with label t + 1
                    # Each micro-batch's loss is a sum over its tokens, divided by the number of
                    # label tokens in the whole global batch. A mean per micro-batch would give a
                    # token more weight in a micro-batch that has few of them.
                    num_items_in_batch=global_batch.num_label_tokens,
                    return_logits=False,  # [B, T, V] would be the largest tensor of the step
                )
            run.backward(outputs.loss, global_batch.aux_loss(batch, outputs))
        # Optimizer step: clip the gradient, set the learning rate, change the weights.
        run.update(model, optimizer)

        # Evaluate, log, save.
        if val_data and run.is_due(args.eval_interval):
            sample = sample_continuation(ctx, model, tokenizer, val_data)
            run.log_evaluation(sample, **evaluate_loss(ctx, model, tokenizer, val_data))
        run.log()
        run.save_every(model, optimizer)
    return run.finish()


if __name__ == "__main__":
    run_trainer(main, args)

"""Supervised fine-tuning: learn to answer, from conversations.

    L = −1/N · Σ m_t · log p(x_t | x_1 … x_{t−1})

The loss of pretraining with a loss mask m: m_t is 1 for the tokens that the assistant writes, with
the <|im_end|> that ends its turn, and 0 for all others; N = Σ m_t. The model learns to answer and
to stop, not to ask. The mask comes from the chat template; `python scripts/show_batch.py` shows it.

    python trainer/train_full_sft.py --from_weight pretrain --data_path dataset/sft_t2t_mini.jsonl
"""

from dataclasses import dataclass
from typing import Any

from dataset.released import data_option
from model.command_line import option
from trainer.common.arguments import ConversationArgs
from trainer.common.command import parse_trainer, run_trainer


@dataclass
class Args(ConversationArgs):
    data_path: list[str] = data_option("full_sft", 'JSONL of {"conversations": [messages]}')
    from_weight: str = option("pretrain", "stage to initialise from; none: random weights")
    batch_size: int = option(16, "sequences in a forward pass of a device")
    epochs: int = option(2, "passes through the data")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_trainer(Args, __doc__)


from model.weights import load_tokenizer
from trainer.common.context import Context
from trainer.common.evaluation import evaluate_loss, sample_answer
from trainer.common.optimizers import make_optimizer
from trainer.common.setup import init_model, load_packed, prepare_model
from trainer.trainer_utils import Run


def main(args: Args) -> dict[str, Any]:
    # Setup. Every rank does the same: the data's order depends on the seed alone.
    ctx = Context.create(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = init_model(args, tokenizer)
    train_data, val_data = load_packed(ctx, tokenizer, "conversations")
    run = Run(ctx, "full_sft", model, tokenizer, train_data, val_data)

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
                    # unshifted: the model compares logit t with label t + 1; -100, without loss,
                    # where the token is not the assistant's
                    labels=batch.labels,
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
            sample = sample_answer(ctx, model, tokenizer, args.sample_prompt)
            run.log_evaluation(sample, **evaluate_loss(ctx, model, tokenizer, val_data))
        run.log()
        run.save_every(model, optimizer)
    return run.finish()


if __name__ == "__main__":
    run_trainer(main, args)

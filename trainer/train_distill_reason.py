"""Reasoning by distillation: fine-tune on thoughts and answers that a larger model wrote
(DeepSeek-R1, arXiv 2501.12948, section 2.4).

    L = −1/N · Σ w_t · m_t · log p(x_t | x_1 … x_{t−1})            N = Σ w_t · m_t

The loss of train_full_sft.py with a weight: w_t is --tag_weight where x_t is one of the four tags
of <think>…</think><answer>…</answer>, which are rare and decide the format, and 1 elsewhere. N is
the sum over the global batch, all ranks together.

At every evaluation the model answers held-out questions greedily: eval_format is the share of
replies that have exactly this format and end by themselves, eval_answer the share of replies that
are right too.

Departure from the paper: it has no tag weight; --tag_weight 1 is its loss.

    python trainer/train_distill_reason.py --from_weight full_sft --data_path FILE
"""

from dataclasses import dataclass
from typing import Any

from dataset.released import data_option
from model.command_line import option, setting
from model.errors import UserError
from trainer.common.arguments import LEARNING_RATE_HELP, STAGE, TrainArgs
from trainer.common.command import parse_trainer, run_trainer


@dataclass
class Args(TrainArgs):
    data_path: list[str] = data_option(
        "reason", 'JSONL of {"conversations": [messages]}, answers with thoughts'
    )
    from_weight: str = option("dpo", "stage to initialise from")
    batch_size: int = option(8, "sequences in a forward pass of a device")
    learning_rate: float = option(5e-4, LEARNING_RATE_HELP)
    max_seq_len: int = option(1024, "tokens of a packed sequence")
    tag_weight: float = setting(
        10.0, "weight of each of the four tags in the loss; others: 1", group=STAGE, above=0
    )
    max_gen_len: int = setting(
        512, "most tokens of an answer to a held-out question", group=STAGE, at_least=1
    )


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_trainer(Args, __doc__)


import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.chat import stop_tokens
from dataset.grading import grade
from dataset.packing import PackedDataset
from dataset.reply_parser import REASONING_TAGS, parse_reasoning
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.losses import sum_label_weights
from model.model_minimind import MiniMindForCausalLM
from model.weights import load_tokenizer
from trainer.common.context import Context, unwrap
from trainer.common.evaluation import eager, evaluate_loss
from trainer.common.loop import GlobalBatch
from trainer.common.optimizers import make_optimizer
from trainer.common.setup import init_model, load_packed, prepare_model
from trainer.trainer_utils import Run

EVAL_BATCH_SIZE = 64  # held-out questions answered at once


def make_label_weights(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, tag_weight: float
) -> Tensor:
    """[V]: tag_weight for the four tags, 1 for every other token."""
    weights = torch.ones(vocab_size)
    tags = tokenizer.convert_tokens_to_ids(list(REASONING_TAGS))
    for tag, token in zip(REASONING_TAGS, tags, strict=True):
        if token is None or token == tokenizer.unk_token_id:
            raise UserError(f"the tokenizer has no token {tag}, which this stage trains")
        weights[token] = tag_weight
    return weights


def total_label_weight(ctx: Context, global_batch: GlobalBatch, label_weights: Tensor) -> float:
    """Σ w_t · m_t over a global batch, all ranks together."""
    local = sum(sum_label_weights(batch.labels, label_weights) for batch in global_batch)
    return max(1.0, *ctx.all_reduce_sum(float(local)))


def main(args: Args) -> dict[str, Any]:
    # Setup.
    ctx = Context.create(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = init_model(args, tokenizer)
    train_data, val_data = load_packed(ctx, tokenizer, "conversations")
    questions = held_out_questions(tokenizer, val_data) if val_data else []
    run = Run(ctx, "reason", model, tokenizer, train_data, val_data)

    model = prepare_model(ctx, model)
    optimizer = make_optimizer(
        model, args.optimizer, args.learning_rate, args.weight_decay, ctx.dtype
    )
    run.resume(model, optimizer)
    label_weights = make_label_weights(tokenizer, run.config.vocab_size, args.tag_weight)  # [V]
    label_weights = label_weights.to(ctx.device)

    for global_batch in run.steps():
        # Forward and backward. The loss is divided by the sum of the weights and not by the number
        # of labels: otherwise heavier tags would act like a higher learning rate.
        total_weight = total_label_weight(ctx, global_batch, label_weights)
        for batch in global_batch:
            with run.forward(model, sync=batch is global_batch[-1]):
                outputs = model(
                    **batch.inputs,
                    labels=batch.labels,  # the assistant's tokens, thoughts included
                    label_weights=label_weights,
                    num_items_in_batch=total_weight,
                    return_logits=False,
                )
            run.backward(outputs.loss, global_batch.aux_loss(batch, outputs))
        run.update(model, optimizer)

        # Evaluate, log, save. A low loss does not tell whether the tags come in the right order, so
        # the model writes whole answers.
        if val_data and run.is_due(args.eval_interval):
            sample, metrics = answer_questions(ctx, model, tokenizer, questions)
            metrics = evaluate_loss(ctx, model, tokenizer, val_data) | metrics
            run.log_evaluation(sample, **metrics)
        run.log()
        run.save_every(model, optimizer)
    return run.finish()


# -- held-out questions ----------------------------------------------------------------------------

Question = tuple[list[int], str]  # token ids up to where the answer begins; the right answer


def held_out_questions(
    tokenizer: PreTrainedTokenizerBase, val_data: PackedDataset
) -> list[Question]:
    """The last question of each held-out conversation whose answer has the format."""
    found = []
    for index in val_data.indices.tolist():
        document = val_data.documents[index]
        ids, loss_mask = document["input_ids"], document["loss_mask"]
        starts = np.flatnonzero(np.diff(loss_mask.astype(np.int8), prepend=0) == 1)
        if len(starts) == 0:
            continue
        prompt, reply = np.split(ids, starts[-1:])
        reasoned = parse_reasoning(tokenizer.decode(reply, skip_special_tokens=True).strip())
        if reasoned:
            found.append((prompt.tolist(), reasoned[1]))
    return found


@eager
def answer_questions(
    ctx: Context[Args],
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
) -> tuple[str, dict[str, float]]:
    """The first question with the model's reply, and the shares of replies that have the format,
    and that are right too. Each rank answers a part of the questions."""
    local = questions[ctx.rank :: ctx.world_size]
    settings = SamplingParams(ctx.args.max_gen_len, temperature=0)
    replies = []
    for at in range(0, len(local), EVAL_BATCH_SIZE):
        prompts = [prompt for prompt, _ in local[at : at + EVAL_BATCH_SIZE]]
        replies += generate(unwrap(model), prompts, settings)
    texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
    formatted = correct = 0
    for reply, text, (_, answer) in zip(replies, texts, local, strict=True):
        # a reply that was cut off at --max_gen_len has not learnt to end
        reasoned = parse_reasoning(text) if reply[-1] in stop_tokens(tokenizer) else None
        formatted += reasoned is not None
        correct += reasoned is not None and grade(reasoned[1], answer)
    count, formatted, correct = ctx.all_reduce_sum(len(local), formatted, correct)
    if not count:
        return "", {}
    sample = f"{tokenizer.decode(local[0][0])}{texts[0]}" if local else ""
    return sample, {"eval_format": formatted / count, "eval_answer": correct / count}


if __name__ == "__main__":
    run_trainer(main, args)

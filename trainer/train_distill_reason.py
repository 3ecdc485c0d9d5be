"""Reasoning by distillation: learn to think before answering, from thoughts written by a larger
model (DeepSeek-R1, arXiv 2501.12948, section 2.4).

    L = −1/N · Σ w_t · m_t · log p(x_t | x_1 … x_{t−1})            N = Σ w_t · m_t

the loss of train_full_sft.py, with a weight: w_t is --tag_weight where x_t is one of the four tags
of <think>…</think><answer>…</answer>, which are few and decide the form, and 1 elsewhere. N is the
sum over the whole update, all ranks together. (The paper has no such weight: 1 is its loss.)

At every evaluation the model answers held-out questions, greedily: val_format is the share of
replies in exactly that form that end by themselves, val_answer the share that are in it and right.

    python trainer/train_distill_reason.py --from_weight full_sft --data_path FILE
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dataset.grading import grade
from dataset.packing import Rows
from dataset.reply_parser import REASONING_TAGS, parse_reasoning
from model.command_line import option
from model.errors import UserError
from model.inference.generation import generate
from model.inference.sampling import Sampling
from model.losses import sum_of_weights
from model.weights import load_tokenizer
from trainer.common.arguments import DATASET, LEARNING_RATE_HELP, TrainArgs
from trainer.common.command import run_stage
from trainer.common.evaluation import held_out_loss, uncompiled
from trainer.common.optimizers import make_optimizer
from trainer.trainer_utils import Run, Window, read_rows, starting_model, unwrapped

SIDE_BY_SIDE = 64  # answers to held-out questions decoded at once


@dataclass
class Args(TrainArgs):
    data_path: list[str] = option(
        [str(DATASET / "r1_mix_1024.jsonl")],
        'JSONL of {"conversations": [messages]}, answers as <think>…</think><answer>…</answer>',
    )
    from_weight: str = option("dpo", "stage to start from")
    batch_size: int = option(8, "rows a device takes at once")
    learning_rate: float = option(5e-4, LEARNING_RATE_HELP)
    max_seq_len: int = option(1024, "tokens in a row")
    tag_weight: float = option(10.0, "how much each of the four tags counts in the loss; others: 1")
    max_gen_len: int = option(512, "tokens of an answer to a held-out question at most")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tag_weight <= 0:
            raise UserError(f"--tag_weight must be more than 0, not {self.tag_weight}")
        if self.max_gen_len < 1:
            raise UserError(f"--max_gen_len must be at least 1, not {self.max_gen_len}")


def weights_of_labels(
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


def total_weight(run: Run, window: Window, label_weights: Tensor) -> float:
    """What the labels of an update weigh, all ranks together."""
    own = sum(sum_of_weights(batch.labels, label_weights) for batch in window)
    return max(1.0, *run.sum_over_ranks(float(own)))


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = starting_model(args, tokenizer)
    run = Run(args, "reason", model.config, tokenizer)
    rows, held_out = read_rows(run, "conversations")
    questions = read_questions(run, held_out) if held_out else []
    loader = run.loader(rows)
    run.announce(model, rows, held_out)

    model = run.distribute(model)
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    run.resume(model, optimizer)
    label_weights = weights_of_labels(tokenizer, run.config.vocab_size, args.tag_weight).to(
        run.device
    )

    for window in run.steps(loader):
        total = total_weight(run, window, label_weights)
        for batch in window:
            with run.forward(model, sync=batch is window[-1]):
                outputs = model(
                    **batch.inputs,
                    labels=batch.labels,
                    label_weights=label_weights,
                    num_items_in_batch=total,
                    return_logits=False,
                )
            run.backward(outputs.loss, window.balance_loss(batch, outputs))
        run.update(model, optimizer)
        if held_out and run.due(args.eval_interval):
            sample, figures = ask(run, model, questions)
            run.log_evaluation(sample, **held_out_loss(run, model, held_out), **figures)
        run.log()
        run.save_every(model, optimizer)
    return run.finish()


# -- held-out questions ----------------------------------------------------------------------------

Question = tuple[list[int], str]  # token ids up to where the answer begins; the right answer


def read_questions(run: Run, held_out: Rows) -> list[Question]:
    """The last question of each held-out conversation whose answer has the form."""
    found = []
    for number in held_out.chosen.tolist():
        document = held_out.documents[number]
        ids, loss_mask = document["input_ids"], document["loss_mask"]
        starts = np.flatnonzero(np.diff(loss_mask.astype(np.int8), prepend=0) == 1)
        if len(starts) == 0:
            continue
        prompt, reply = np.split(ids, starts[-1:])
        reasoned = parse_reasoning(run.tokenizer.decode(reply, skip_special_tokens=True).strip())
        if reasoned:
            found.append((prompt.tolist(), reasoned[1]))
    return found


@uncompiled
def ask(run: Run, model: nn.Module, questions: list[Question]) -> tuple[str, dict[str, float]]:
    """The first question with the model's reply, and the shares of replies that have the form and
    that are right besides; the ranks share the questions out between them."""
    mine = questions[run.rank :: run.ranks]
    settings = Sampling(run.args.max_gen_len, temperature=0)
    replies = []
    for at in range(0, len(mine), SIDE_BY_SIDE):
        prompts = [prompt for prompt, _ in mine[at : at + SIDE_BY_SIDE]]
        replies += generate(unwrapped(model), prompts, settings)
    texts = run.tokenizer.batch_decode(replies, skip_special_tokens=True)
    formed = right = 0
    for reply, text, (_, answer) in zip(replies, texts, mine, strict=True):
        reasoned = parse_reasoning(text) if reply[-1] == run.tokenizer.eos_token_id else None
        formed += reasoned is not None
        right += reasoned is not None and grade(reasoned[1], answer)
    asked, formed, right = run.sum_over_ranks(len(mine), formed, right)
    if not asked:
        return "", {}
    sample = f"{run.tokenizer.decode(mine[0][0])}{texts[0]}" if mine else ""
    return sample, {"val_format": formed / asked, "val_answer": right / asked}


if __name__ == "__main__":
    run_stage(main, Args, __doc__)

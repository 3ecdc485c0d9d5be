"""The prompts of reinforcement learning: JSON lines → `Prompt` → `PromptDataset` → `PromptBatch`.

A row is a conversation. Its last answer is left out, because the policy writes its own; the row's
"answer", if it has one, is the truth that rules compare with (rewards.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dataset.forms.rows import as_prompt
from dataset.jsonl import BadRows, check_file, error_at, read_rows
from dataset.lm_dataset import Message, check_messages, encode_chat
from dataset.reply_parser import tagged_answer
from dataset.tools.loop import Task
from model.errors import UserError
from trainer.common.checkpoint import hash_of
from trainer.common.context import Context
from trainer.common.setup import split_held_out
from trainer.rl.arguments import RolloutArgs


@dataclass
class Prompt:
    index: int  # its place in the data; part of the seed of its completions
    messages: list[Message]
    ids: list[int]  # the chat template's tokens, up to where the answer begins
    answer: str | None  # the truth, for rules
    task: Task | None = None  # train_agent.py: tools and expected calls

    @property
    def truth(self) -> str:
        """All that rewards compare with, as text."""
        # recorded_results was called known when the first checkpoints were written
        task = str(self.task or "").replace(", recorded_results={", ", known={")
        return f"{self.answer}{task}"


class GenerationRequest(NamedTuple):
    """One completion to generate."""

    ids: list[int]  # tokens to continue
    seed: int  # the same for all completions of a prompt
    sample: int  # which of them it is: with the seed it determines the random numbers


class PromptDataset(torch.utils.data.Dataset):
    """Prompts as `TrainingData`. Their completions are not known yet, so sizes are upper bounds."""

    document_unit = sample_unit = "prompts"
    packing_efficiency = 1.0

    def __init__(self, prompts: list[Prompt], max_sample_tokens: int):
        """max_sample_tokens: of a prompt with its completion."""
        self.prompts, self.max_sample_tokens = prompts, max_sample_tokens
        self.indices = np.array([prompt.index for prompt in prompts])

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int | None) -> Prompt | None:
        """None stands for no prompt: a rank that has none left stays in step with the others."""
        return None if index is None else self.prompts[index]

    @property
    def num_tokens(self) -> int:
        return len(self) * self.max_sample_tokens

    @property
    def fingerprint(self) -> str:
        """A hash of prompts and truths."""
        ids = [np.array(prompt.ids) for prompt in self.prompts]
        truths = [np.frombuffer(prompt.truth.encode(), np.uint8) for prompt in self.prompts]
        return hash_of(*ids, *truths)

    @property
    def summary(self) -> str:
        lengths = [len(prompt.ids) for prompt in self.prompts]
        answered = sum(prompt.answer is not None for prompt in self.prompts)
        return (
            f"{len(self):,} prompts of {min(lengths)} to {max(lengths)} tokens, "
            f"{answered:,} of them with the right answer"
        )


@dataclass
class PromptBatch:
    """The prompts of a micro-batch. What carries loss is known only once they are completed."""

    prompts: list[Prompt]
    num_label_tokens = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def num_samples(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device) -> "PromptBatch":
        return self


def collate_prompts(prompts: list[Prompt | None], pad_id: int) -> PromptBatch:
    """`collate` of prompts; they are padded only with their completions (batches.py)."""
    return PromptBatch([prompt for prompt in prompts if prompt is not None])


def sample_prompts(data: PromptDataset, count: int, *seed: int) -> list[Prompt]:
    """Prompts at random, with replacement."""
    indices = np.random.default_rng(seed).integers(len(data), size=count)
    return [data.prompts[index] for index in indices.tolist()]


# -- reading ---------------------------------------------------------------------------------------


def read_prompts(
    ctx: Context[RolloutArgs],
    tokenizer: PreTrainedTokenizerBase,
    parse_row: Callable | None = None,
) -> tuple[PromptDataset, PromptDataset | None]:
    """Prompts to train on, and held-out ones (None if none are asked for).

    Args:
        parse_row: row → (messages, answer) or (messages, answer, task); default:
            `parse_prompt_row`.

    Raises:
        UserError: a line is not what it must be, or every prompt is too long.
    """
    args = ctx.args
    prompts = load_prompts(ctx, tokenizer, args.data_path, parse_row)
    val_prompts = load_prompts(ctx, tokenizer, args.val_path, parse_row) if args.val_path else None
    val_count = None if val_prompts is None else len(val_prompts)
    train_indices, val_indices = split_held_out(args, len(prompts), val_count, "prompts")
    max_tokens = args.max_seq_len + args.max_gen_len
    train_data = PromptDataset([prompts[n] for n in train_indices], max_tokens)
    if len(val_indices) == 0:
        return train_data, None
    return train_data, PromptDataset([(val_prompts or prompts)[n] for n in val_indices], max_tokens)


def load_prompts(
    ctx: Context[RolloutArgs],
    tokenizer: PreTrainedTokenizerBase,
    paths: list[str],
    parse: Callable | None = None,
) -> list[Prompt]:
    max_seq_len = ctx.args.max_seq_len
    template_args = {"open_thinking": True} if ctx.args.reasoning else {}
    prompts, too_long = [], 0
    bad_rows = BadRows() if ctx.args.skip_bad_rows else None
    for path in paths:
        for number, row in read_rows(check_file(path), bad_rows):
            with error_at(path, number, bad_rows):
                messages, *truth = (parse or parse_prompt_row)(row)
                encoded = encode_chat(
                    tokenizer, messages, add_generation_prompt=True, **template_args
                )
                if len(encoded.ids) > max_seq_len:
                    too_long += 1
                else:
                    prompts.append(Prompt(len(prompts), messages, encoded.ids, *truth))
    if bad_rows and bad_rows.count:
        bad_rows.refuse_if_all(len(prompts) + too_long)
        ctx.print(str(bad_rows))
    if too_long:
        left_out = f"{too_long:,} prompts are longer than --max_seq_len {max_seq_len}"
        if not prompts:
            raise UserError(f"all {left_out}; raise it")
        ctx.print(f"{left_out} and left out")
    if not prompts:
        raise UserError(f"{', '.join(paths)} holds no prompts")
    return prompts


def parse_prompt_row(row: dict) -> tuple[list[Message], str | None]:
    """A row → its messages up to the last answer, and the truth: the row's "answer", or else what
    its last message has between <answer> and </answer>."""
    row = as_prompt(row)
    messages = check_messages(row["conversations"])
    answer = row.get("answer")
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        answer = tagged_answer(last["content"]) if answer is None else answer
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise UserError("has no question: a user message must come before the last answer")
    return messages, None if answer is None else str(answer)

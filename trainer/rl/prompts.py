"""The prompts of reinforcement learning: JSON lines → `Prompt` → `PromptDataset` → `PromptBatch`.

A row is a conversation. Its last answer is left out, because the policy writes its own; the row's
"answer", if it has one, is the truth that rules compare with (rewards.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dataset.lm_dataset import (
    Message,
    check_file,
    check_messages,
    encode_chat,
    parse_row,
    read_lines,
)
from dataset.replies import tagged_answer
from dataset.tools.loop import Task
from model.errors import UserError
from trainer.common.checkpoint import hash_of
from trainer.trainer_utils import Run


@dataclass
class Prompt:
    index: int  # its line in the data; part of the seed of its completions
    messages: list[Message]
    ids: list[int]  # the chat template's tokens, up to where the answer begins
    answer: str | None  # the truth, for rules
    task: Task | None = None  # train_agent.py: tools and expected calls


class GenerationRequest(NamedTuple):
    """One completion to generate."""

    ids: list[int]  # tokens to continue
    seed: int  # the same for all completions of a prompt
    sample: int  # which of them it is: with the seed it determines the random numbers


class PromptDataset(torch.utils.data.Dataset):
    """Prompts, with what a Run asks of its data."""

    documents_name = rows_name = "prompts"
    fill = 1.0

    def __init__(self, prompts: list[Prompt], max_tokens: int):
        """max_tokens: of a prompt with its completion."""
        self.prompts, self.tokens_of_longest = prompts, max_tokens
        self.chosen = np.array([prompt.index for prompt in prompts])

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int | None) -> Prompt | None:
        """None stands for no prompt: a rank that has none left stays in step with the others."""
        return None if index is None else self.prompts[index]

    @property
    def tokens(self) -> int:
        """Upper bound: every completion as long as it may be."""
        return len(self) * self.tokens_of_longest

    @property
    def description(self) -> str:
        """A hash of prompts and truths."""
        ids = [np.array(prompt.ids) for prompt in self.prompts]
        truths = [f"{prompt.answer}{prompt.task or ''}".encode() for prompt in self.prompts]
        return hash_of(*ids, *(np.frombuffer(truth, np.uint8) for truth in truths))

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
    labelled = 0

    @property
    def tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def rows(self) -> int:
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
    run: Run, parse_row: Callable | None = None
) -> tuple[PromptDataset, PromptDataset | None]:
    """Prompts to train on and held-out ones, split as the data of other stages is.

    Args:
        parse_row: row → (messages, answer) or (messages, answer, task); default:
            `parse_prompt_row`.

    Raises:
        UserError: a line is not what it must be, or every prompt is too long.
    """
    args = run.args
    prompts = load_prompts(run, args.data_path, parse_row)
    val_prompts = load_prompts(run, args.val_path, parse_row) if args.val_path else None
    order = np.random.default_rng(0).permutation(len(prompts)).tolist()
    num_held_out = 0 if val_prompts is not None else math.ceil(len(prompts) * args.val_share)
    if num_held_out >= len(prompts):
        raise UserError("the data is one prompt only; hold nothing out with --val_share 0")
    if val_prompts is None:
        val_prompts = [prompts[n] for n in order[:num_held_out]]
    max_tokens = args.max_seq_len + args.max_gen_len
    train_data = PromptDataset([prompts[n] for n in sorted(order[num_held_out:])], max_tokens)
    val_prompts = val_prompts[: args.val_documents]
    return train_data, PromptDataset(val_prompts, max_tokens) if val_prompts else None


def load_prompts(run: Run, paths: list[str], parse: Callable | None = None) -> list[Prompt]:
    template_args = {"open_thinking": True} if run.args.reasoning else {}
    prompts, too_long = [], 0
    for path in paths:
        for stretch in read_lines(check_file(path)):
            for number, line in enumerate(stretch.lines, stretch.first):
                if not line.strip():
                    continue
                try:
                    messages, *truth = (parse or parse_prompt_row)(parse_row(line))
                    encoded = encode_chat(
                        run.tokenizer, messages, add_generation_prompt=True, **template_args
                    )
                except UserError as error:
                    raise UserError(f"line {number} of {path} {error}") from None
                if len(encoded.ids) > run.args.max_seq_len:
                    too_long += 1
                else:
                    prompts.append(Prompt(len(prompts), messages, encoded.ids, *truth))
    if too_long:
        left_out = f"{too_long:,} prompts are longer than --max_seq_len {run.args.max_seq_len}"
        if not prompts:
            raise UserError(f"all {left_out}; raise it")
        run.print(f"{left_out} and left out")
    if not prompts:
        raise UserError(f"{', '.join(paths)} holds no prompts")
    return prompts


def parse_prompt_row(row: dict) -> tuple[list[Message], str | None]:
    """A row → its messages up to the last answer, and the truth: the row's "answer", or else what
    its last message has between <answer> and </answer>."""
    messages = check_messages(row.get("conversations"))
    answer = row.get("answer")
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        answer = tagged_answer(last["content"]) if answer is None else answer
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise UserError("asks nothing: before the last answer there must be a user's message")
    return messages, None if answer is None else str(answer)

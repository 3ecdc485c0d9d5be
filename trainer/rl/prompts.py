"""The prompts of reinforcement learning: JSON lines → `Prompt` → `PromptDataset` → `PromptBatch`.

A row is a conversation. Its last answer is left out, because the policy writes its own. The truth
that rules compare with (rewards.py) is the row's "answer", its "gt", or what its last answer has
between <answer> and </answer>. A row that has none needs a reward model; without one it is left
out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dataset.forms.rows import as_prompt
from dataset.grading import Truth, read_truth
from dataset.jsonl import BadRows, check_file, error_at, read_rows
from dataset.lm_dataset import Message, check_messages, encode_chat
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
    truth: Truth | None  # the right answer, for rules
    task: Task | None = None  # train_agent.py: tools and expected calls
    thinking: bool = False  # it ends with <think>, by --thinking_ratio
    answer_tags: bool = True  # the tokenizer has <answer> for the answers of --reasoning

    @property
    def fingerprint_text(self) -> str:
        """All that rules compare with. Checkpoints hold its hash, so that the form is that of the
        first version."""
        text = str(self.truth and self.truth.text)
        if task := self.task:
            text += (
                f"Task(messages={task.messages}, tools={task.tools}, offered={task.offered}, "
                f"calls={task.calls}, answer={task.answer!r}, known={task.recorded_results})"
            )
        return text + (f"gt={self.truth.parts}" if self.truth and self.truth.anywhere else "")


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
        texts = (prompt.fingerprint_text.encode() for prompt in self.prompts)
        truths = [np.frombuffer(text, np.uint8) for text in texts]
        return hash_of(*ids, *truths)

    @property
    def summary(self) -> str:
        lengths = [len(prompt.ids) for prompt in self.prompts]
        answered = sum(prompt.truth is not None for prompt in self.prompts)
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
    can_score: Callable[[Prompt], bool] = lambda prompt: True,
    parse_row: Callable | None = None,
) -> tuple[PromptDataset, PromptDataset | None]:
    """Prompts to train on, and held-out ones (None if none are asked for).

    Args:
        can_score: whether a prompt's completions can be rewarded; others are left out.
        parse_row: row → (messages, truth) or (messages, truth, task); default:
            `parse_prompt_row`.

    Raises:
        UserError: a line is not what it must be, every prompt is too long, or none can be rewarded.
    """
    args = ctx.args
    parse = parse_row or parse_prompt_row
    prompts = load_prompts(ctx, tokenizer, args.data_path, can_score, parse)
    val_prompts = None
    if args.val_path:
        val_prompts = load_prompts(ctx, tokenizer, args.val_path, can_score, parse)
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
    can_score: Callable[[Prompt], bool],
    parse: Callable,
) -> list[Prompt]:
    args, longest = ctx.args, ctx.args.max_prompt_len
    prompts: list[Prompt] = []
    too_long = unscored = 0
    answer_tags = "<answer>" in tokenizer.get_vocab()
    bad_rows = BadRows() if args.skip_bad_rows else None
    for path in paths:
        for number, row in read_rows(check_file(path), bad_rows):
            with error_at(path, number, bad_rows):
                messages, truth, task = (*parse(row), None)[:3]
                thinking = opens_thought(args, len(prompts))
                ids = encode_prompt(tokenizer, messages, thinking or args.reasoning)
                prompt = Prompt(len(prompts), messages, ids, truth, task, thinking, answer_tags)
                if len(ids) > longest:
                    too_long += 1
                elif not can_score(prompt):
                    unscored += 1
                else:
                    prompts.append(prompt)
    total = len(prompts) + too_long + unscored
    if bad_rows and bad_rows.count:
        bad_rows.refuse_if_all(total)
        ctx.print(str(bad_rows))
    if not total:
        raise UserError(f"{', '.join(paths)} holds no prompts")
    if too_long == total:
        raise UserError(f"all {total:,} prompts are longer than {args.max_prompt_flag}; raise it")
    if not prompts:
        raise UserError(
            'there is no reward: no prompt has a right answer ("answer", "gt" or <answer> tags in '
            "its row), and there is no reward model. python trainer/train_reward.py makes one, "
            "--reward_model_path DIR names one, and --reward length repetition language needs none"
        )
    if too_long:
        ctx.print(f"{too_long:,} prompts are longer than {args.max_prompt_flag} and left out")
    if unscored:
        ctx.print(
            f"{unscored:,} of {total:,} prompts have no right answer, and there is no reward model "
            "to score them: they are left out"
        )
    if args.thinking_ratio:
        opened = sum(prompt.thinking for prompt in prompts)
        ctx.print(f"{opened:,} of {len(prompts):,} prompts open with <think>")
    return prompts


def opens_thought(args: RolloutArgs, index: int) -> bool:
    """Whether the policy thinks about the prompt first. It depends on --seed and the prompt alone,
    so that all ranks and resumed runs agree."""
    return bool(np.random.default_rng((args.seed, index)).random() < args.thinking_ratio)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], thinking: bool
) -> list[int]:
    """The tokens of a prompt, up to where the answer begins, or with `thinking` the thought."""
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True).ids
    if not thinking:
        return ids
    opened = encode_chat(tokenizer, messages, add_generation_prompt=True, open_thinking=True).ids
    if opened == ids:
        raise UserError("cannot open with <think>: the chat template has no open_thinking")
    return opened


def parse_prompt_row(row: dict) -> tuple[list[Message], Truth | None]:
    """A row → its messages up to the last answer, and the truth."""
    row = as_prompt(row)
    messages = check_messages(row["conversations"])
    tagged = None
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        # without tags it is somebody's answer, and not the only right one
        tagged = last["content"] if "<answer>" in last["content"] else None
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise UserError("has no question: a user message must come before the last answer")
    return messages, read_truth(row, tagged)

"""Reinforcement learning's own data: prompts → completions of the policy → batches to learn from.

    prompts, held_out = read_prompts(run)                    # rows of rlaif-mini.jsonl
    completions = roll_out(run, model, prompts_of(window), copies)
    batches = micro_batches(run, completions)                # sorted by length, padded
    batch.old = log_probs(run, model, batch)                 # the same function as in the update

Completions come from the project's own engine, or from a server (--rollout_url): vLLM, SGLang or
whatever else speaks OpenAI's API. Which random numbers a completion is drawn with depends on seed,
update and prompt alone, so that any number of processes draws the same.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dataset.jsonl import check_file, error_at, read_rows
from dataset.lm_dataset import Message, check_messages, encode_chat
from dataset.packing import Batch, collate
from dataset.reply_parser import tagged_answer
from dataset.tools.loop import Task
from model.command_line import option
from model.errors import UserError
from model.inference.engine import Engine, Request
from model.inference.generation import generate
from model.inference.sampling import Sampling
from model.losses import IGNORED
from model.model_lora import add_lora, save_lora, without_additions
from model.model_minimind import MiniMindForCausalLM
from model.weights import save_weights
from trainer.common.arguments import DATASET, LoraArgs
from trainer.common.checkpoint import hash_of
from trainer.common.evaluation import uncompiled
from trainer.rl.rollout_server import complete_by_server, hand_over
from trainer.trainer_utils import Run, Window, unwrapped


@dataclass
class RolloutArgs(LoraArgs):
    """What PPO, GRPO and SPO have in common beyond the flags of every trainer."""

    batch_size_flag = "update_batch_size"
    reference_flag = "beta"  # the weight of the KL to the starting model; 0: no reference

    data_path: list[str] = option(
        [str(DATASET / "rlaif-mini.jsonl")],
        'JSONL of {"conversations": [messages]}, the last answer ignored; "answer" for a rule',
    )
    from_weight: str = option("dpo", "stage to start from")
    batch_size: int = option(2, "prompts a device takes at once")
    max_seq_len: int = option(256, "tokens of a prompt at most; longer ones are left out")
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "muon would walk along the noise of the samples as far as along the signal"
    )
    packing: bool = option(False, "without effect: answers are padded, like lengths side by side")
    max_gen_len: int = option(1024, "tokens of a completion at most")
    rollout_batch_size: int = option(64, "completions decoded side by side")
    update_batch_size: int = option(8, "completions in a forward pass of the update")
    update_epochs: int = option(1, "times to learn from the same completions")
    temperature: float = option(1.0, "of sampling; the policy is this distribution")
    reasoning: bool = option(False, "open with <think>, and reward the think/answer format")
    reward: list[str] = option(
        ["auto"],
        "auto, or parts with weights such as answer:1 repetition:0.2 (rewards.py lists them); "
        "auto: the model of --reward_model_path, else out/reward_*.pth, else answer",
    )
    reward_model_path: str = option(
        "../../internlm2-1_8b-reward", "folder of a transformers reward model"
    )
    trust_remote_code: bool = option(False, "run the code that comes with the reward model")
    judge_url: str = option("", "base URL of an OpenAI-compatible API, for the reward judge")
    judge_model: str = option("", "the judge's model")
    rollout_url: str = option("", "decode on a server: base URL, such as http://localhost:8000/v1")
    rollout_folder: str = option("", "folder for the weights handed over to it")
    rollout_reload: Literal["vllm", "sglang"] = option("vllm", "how it is told to read them anew")
    use_lora: bool = option(False, "train an addition only; the reference is the model without it")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in "max_gen_len rollout_batch_size update_batch_size update_epochs".split():
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.temperature <= 0:
            raise UserError(f"--temperature must be more than 0, not {self.temperature}")
        if self.rollout_url and not self.rollout_folder:
            raise UserError("--rollout_url needs --rollout_folder, where the server reads weights")

    @property
    def needs_reference(self) -> bool:
        return bool(getattr(self, self.reference_flag)) and not self.use_lora

    def stage(self, name: str) -> str:
        return f"lora/{name}" if self.use_lora else name


# -- prompts ---------------------------------------------------------------------------------------


@dataclass
class Prompt:
    row: int  # its place in the data
    messages: list[Message]
    ids: list[int]  # as the chat template has them, up to where the answer begins
    answer: str | None  # the truth, for a rule
    task: Task | None = None  # with tools (train_agent.py): the rest of the truth


class Prompts(torch.utils.data.Dataset):
    """Prompts, with what a Run wants to know of its data."""

    documents_name = rows_name = "prompts"
    fill = 1.0

    def __init__(self, prompts: list[Prompt], longest: int):
        self.prompts, self.tokens_of_longest = prompts, longest
        self.chosen = np.array([prompt.row for prompt in prompts])

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, place: int | None) -> list[Prompt]:
        """None gives no prompt: ranks without one stay in step."""
        return [] if place is None else [self.prompts[place]]

    @property
    def tokens(self) -> int:
        """Prompts and their completions, if these were as long as can be."""
        return len(self) * self.tokens_of_longest

    @property
    def description(self) -> str:
        """A hash of the prompts."""
        ids = [np.array(prompt.ids) for prompt in self.prompts]
        truths = [f"{prompt.answer}{prompt.task or ''}".encode() for prompt in self.prompts]
        answers = [np.frombuffer(truth, np.uint8) for truth in truths]
        return hash_of(*ids, *answers)

    @property
    def summary(self) -> str:
        lengths = [len(prompt.ids) for prompt in self.prompts]
        known = sum(prompt.answer is not None for prompt in self.prompts)
        return (
            f"{len(self):,} prompts of {min(lengths)} to {max(lengths)} tokens, "
            f"{known:,} of them with the right answer"
        )


@dataclass
class PromptBatch:
    """Prompts of one micro-step, in the place of a Batch of rows."""

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


def prompt_batch(rows: list[list[Prompt]], pad_id: int) -> PromptBatch:
    return PromptBatch([prompt for row in rows for prompt in row])


def prompts_of(window: Window) -> list[Prompt]:
    return [prompt for batch in window for prompt in batch.prompts]


def read_prompts(run: Run, read: Callable | None = None) -> tuple[Prompts, Prompts | None]:
    """Prompts to train on and held-out ones, split as the rows of other stages are.

    Args:
        read: of a row the messages, the answer, and perhaps the task; default: `asked`.

    Raises:
        UserError: a line is not what it must be, or every prompt is too long.
    """
    args = run.args
    rows = load_prompts(run, args.data_path, read)
    separate = load_prompts(run, args.val_path, read) if args.val_path else None
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    count = 0 if separate is not None else math.ceil(len(rows) * args.val_share)
    if count >= len(rows):
        raise UserError("the data is one prompt only; hold nothing out with --val_share 0")
    held_out = [rows[n] for n in order[:count]] if separate is None else separate
    length = args.max_seq_len + args.max_gen_len
    chosen = Prompts([rows[n] for n in sorted(order[count:])], length)
    held_out = held_out[: args.val_documents]
    return chosen, Prompts(held_out, length) if held_out else None


def load_prompts(run: Run, paths: list[str], read: Callable | None = None) -> list[Prompt]:
    options = {"open_thinking": True} if run.args.reasoning else {}
    found, too_long = [], 0
    for path in paths:
        for number, row in read_rows(check_file(path)):
            with error_at(path, number):
                messages, *truth = (read or asked)(row)
                encoded = encode_chat(
                    run.tokenizer, messages, add_generation_prompt=True, **options
                )
            if len(encoded.ids) > run.args.max_seq_len:
                too_long += 1
            else:
                found.append(Prompt(len(found), messages, encoded.ids, *truth))
    if too_long:
        left_out = f"{too_long:,} prompts are longer than --max_seq_len {run.args.max_seq_len}"
        if not found:
            raise UserError(f"all {left_out}; raise it")
        run.print(f"{left_out} and left out")
    if not found:
        raise UserError(f"{', '.join(paths)} holds no prompts")
    return found


def asked(row: dict) -> tuple[list[Message], str | None]:
    """The messages up to the last answer, and the truth: the row's "answer", or what its last
    message has between <answer> and </answer>."""
    messages = check_messages(row.get("conversations"))
    answer = row.get("answer")
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        answer = tagged_answer(last["content"]) if answer is None else answer
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise UserError("asks nothing: before the last answer there must be a user's message")
    return messages, None if answer is None else str(answer)


# -- completions -----------------------------------------------------------------------------------


@dataclass
class Completion:
    prompt: Prompt
    tokens: list[int]  # a final EOS included
    text: str
    finished: bool  # by its EOS, not by --max_gen_len
    written: list[bool] | None = None  # which tokens the policy drew, and learns from; None: all


@uncompiled
def roll_out(
    run: Run,
    model: nn.Module,
    prompts: list[Prompt],
    copies: int = 1,
    attempt: int = 0,
    temperature: float | None = None,
) -> list[Completion]:
    """`copies` completions of each prompt, neighbours in the list. The temperature of sampling is
    --temperature, where none is given."""
    args = run.args if temperature is None else replace(run.args, temperature=temperature)
    chosen = [
        (prompt, row_seed(args.seed, run.step, prompt.row, attempt), n)
        for prompt in prompts
        for n in range(copies)
    ]
    replies = writer(args, run, model)(chosen)
    run.pending["tokens"] += int(run.sum_over_ranks(sum(map(len, replies)))[0])
    return [completion(run, prompt, ids) for (prompt, *_), ids in zip(chosen, replies, strict=True)]


def writer(
    args: RolloutArgs, run: Run, model: nn.Module
) -> Callable[[list[tuple[Prompt, int, int]]], list]:
    """What completes prompts with these weights: the engine, or the server that gets them now."""
    if not args.rollout_url:
        return partial(complete, args, unwrapped(model))
    if run.is_main:
        hand_over(args, unwrapped(model), run.tokenizer)
    run.sum_over_ranks(0.0)  # nobody asks before the weights are there
    return partial(complete_by_server, args, run.tokenizer)


def row_seed(*numbers: int) -> int:
    return int(np.random.default_rng(numbers).integers(2**31))


def complete(
    args: RolloutArgs, model: MiniMindForCausalLM, chosen: list[tuple[Prompt, int, int]]
) -> list[list[int]]:
    """By the project's own engine: new tokens of each (prompt, seed, copy)."""
    settings = dict(max_new_tokens=args.max_gen_len, temperature=args.temperature)
    requests = [
        Request(prompt.ids, Sampling(**settings, seed=seed), row=n) for prompt, seed, n in chosen
    ]
    engine = Engine(model, slots=min(args.rollout_batch_size, max(1, len(requests))))
    was_training = model.training
    model.eval()
    try:
        for request in requests:
            engine.submit(request)
        while engine.busy:
            engine.step()
    finally:
        model.train(was_training)
    return [request.tokens for request in requests]


def completion(run: Run, prompt: Prompt, tokens: list[int]) -> Completion:
    text = run.tokenizer.decode(tokens, skip_special_tokens=True)
    return Completion(prompt, tokens, text, tokens[-1] == run.tokenizer.eos_token_id)


def shares(run: Run, count: int, figures: dict[str, float]) -> dict[str, float]:
    """Of means over this rank's `count` answers, its part of those over all; NaN counts as 0."""
    part = count / max(1.0, run.sum_over_ranks(count)[0])
    return {name: 0.0 if math.isnan(each) else each * part for name, each in figures.items()}


def lengths_and_ends(completions: list[Completion]) -> dict[str, float]:
    """How long they are, and how many ended by themselves, for the log."""
    total = max(1, len(completions))
    return {
        "length": sum(len(each.tokens) for each in completions) / total,
        "finished": sum(each.finished for each in completions) / total,
        "empty": sum(not each.text.strip() for each in completions) / total,
    }


# -- batches ---------------------------------------------------------------------------------------


@dataclass
class RolloutBatch(Batch):
    """Prompts with their completions, padded on the right; loss on the completions alone.

    What the algorithms need beside them is [B, T − 1], as log-probs are, or [B, 1].
    """

    members: Tensor | None = None  # [B], int64: places in the list of completions
    old: Tensor | None = None  # log-probs of the policy that sampled
    reference: Tensor | None = None  # of the reference
    advantages: Tensor | None = None
    values: Tensor | None = None  # PPO: of the critic that was
    returns: Tensor | None = None  # PPO: what it should have said

    @property
    def mask(self) -> Tensor:
        """[B, T − 1]: where a token of a completion is predicted; none after its EOS."""
        return self.labels[:, 1:] != IGNORED


def micro_batches(run: Run, completions: list[Completion]) -> list[RolloutBatch]:
    """Completions of like length together; one batch without any token if there are none."""
    size = run.args.update_batch_size
    lengths = [len(each.prompt.ids) + len(each.tokens) for each in completions]
    order = sorted(range(len(completions)), key=lengths.__getitem__)
    batches = []
    for at in range(0, max(1, len(order)), size):
        members = order[at : at + size]
        rows = [[piece(completions[n])] for n in members] or [[]]
        batch = collate(rows, run.tokenizer.pad_token_id)
        whole = RolloutBatch(**vars(batch), members=torch.tensor(members, dtype=torch.long))
        batches.append(move(whole, run.device))
    return batches


def piece(completion: Completion) -> dict[str, np.ndarray]:
    prompt, tokens = completion.prompt.ids, completion.tokens
    loss_mask = [False] * len(prompt) + (completion.written or [True] * len(tokens))
    return {"input_ids": np.array(prompt + tokens), "loss_mask": np.array(loss_mask)}


def move(batch: RolloutBatch, device: torch.device) -> RolloutBatch:
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(batch, name, value.to(device))
    return batch


def log_probs(run: Run, model: nn.Module, batch: RolloutBatch) -> Tensor:
    """log p of each token of the completions, [B, T − 1], without gradient. The very computation
    of an update, so that the ratio of the two is exactly 1 until there was one."""
    with torch.no_grad(), run.forward(unwrapped(model), sync=False):
        return unwrapped(model)(**policy_inputs(run, batch)).log_probs


def policy_inputs(run: Run, batch: RolloutBatch) -> dict:
    """The arguments with which a model gives the log-probs of a batch."""
    how = dict(return_log_probs=True, temperature=run.args.temperature)
    return dict(**batch.inputs, labels=batch.labels, use_cache=False, **how)


# -- the reference ---------------------------------------------------------------------------------


class Reference:
    """The policy as it was at the start: a frozen copy, or with LoRA the model without its
    addition, which takes no memory."""

    def __init__(self, run: Run, model: MiniMindForCausalLM):
        self.run, self.own = run, None
        if not run.args.use_lora:
            self.own = copy.deepcopy(model).requires_grad_(False).to(run.device)

    def log_probs(self, model: nn.Module, batch: RolloutBatch) -> Tensor:
        if self.own is not None:
            return log_probs(self.run, self.own, batch)
        with without_additions(unwrapped(model)):
            return log_probs(self.run, model, batch)


def with_addition(args: RolloutArgs, model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """The model to train; with --use_lora it has an addition, which alone is trained."""
    if args.use_lora:
        add_lora(model, args.settings())
    return model


def draw(prompts: Prompts, count: int, *seed: int) -> list[Prompt]:
    """Prompts at random."""
    places = np.random.default_rng(seed).integers(len(prompts), size=count)
    return [prompts.prompts[place] for place in places.tolist()]


# -- what is known of an update --------------------------------------------------------------------


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """k3 of each token: unbiased for samples of the policy, never negative
    (joschu.net/blog/kl-approx.html)."""
    difference = reference - log_probs
    return difference.exp() - difference - 1


def mean_and_deviation(run: Run, own: Tensor) -> tuple[float, float]:
    """Of the numbers of all ranks, of which `own` are this one's."""
    own = own.double()
    count, total, squares = run.sum_over_ranks(
        len(own), own.sum().item(), own.square().sum().item()
    )
    mean = total / max(1, count)
    return mean, math.sqrt(max(0.0, squares / max(1, count) - mean**2))


class Sums:
    """How much the batches of all ranks hold together, and sums over tokens for the log."""

    def __init__(self, run: Run, batches: list[RolloutBatch]):
        self.run = run
        answers = sum(len(batch.members) for batch in batches)
        labelled = sum(batch.labelled for batch in batches)
        answers, labelled = run.sum_over_ranks(answers, labelled)
        self.answers, self.tokens = max(1.0, answers), max(1.0, labelled)
        self.watched: dict[str, float] = defaultdict(float)
        self.seen = 0

    def balance_loss(self, batch: RolloutBatch, aux_loss: Tensor | None) -> Tensor | float:
        """The micro-batch's share of the balance loss of experts, a mean over all answers."""
        return 0.0 if aux_loss is None else aux_loss * len(batch.members) / self.answers

    def moved(self) -> float:
        """The KL to the policy that sampled, a mean over the tokens of all ranks."""
        return self.run.sum_over_ranks(self.watched["moved"])[0] / self.tokens

    @torch.no_grad()
    def watch(self, new: Tensor, batch: RolloutBatch, low: float, high: float) -> None:
        """Note how far the policy has moved; `new`: its log-probs, [B, T − 1]."""
        mask = batch.mask
        self.seen += batch.labelled
        self.watched["entropy"] -= new[mask].sum().item()  # of the tokens drawn: an estimate
        if batch.old is not None:
            ratio = (new - batch.old)[mask].exp()
            self.watched["moved"] += kl_estimate(new, batch.old)[mask].sum().item()
            self.watched["clipped"] += ((ratio < 1 - low) | (ratio > 1 + high)).sum().item()
        if batch.reference is not None:
            self.watched["kl"] += kl_estimate(new, batch.reference)[mask].sum().item()

    def figures(self) -> dict[str, float]:
        """This rank's part of means over all tokens: entropy; kl, to the reference; moved, the KL
        to the policy that sampled; clipped, the share whose ratio is beyond the clip."""
        seen = max(1.0, self.run.sum_over_ranks(self.seen)[0])
        return {name: value / seen for name, value in self.watched.items()}


def greedy(run: Run, model: nn.Module, prompts: list[Prompt]) -> list[Completion]:
    settings = Sampling(run.args.max_gen_len, temperature=0)
    ids = generate(unwrapped(model), [prompt.ids for prompt in prompts], settings)
    return [completion(run, *pair) for pair in zip(prompts, ids, strict=True)]


@uncompiled
def evaluate_policy(
    run: Run, model: nn.Module, held_out: Prompts, rewards: Callable, answer: Callable = greedy
) -> tuple[str, dict[str, float]]:
    """Greedy answers to held-out prompts: one of them to look at, and the means of the rewards."""
    mine = held_out.prompts[run.rank :: run.ranks]
    answers = answer(run, model, mine) if mine else []
    _, figures = rewards(answers)
    figures = {**figures, **lengths_and_ends(answers)}
    sums = run.sum_over_ranks(
        len(mine), *(len(mine) * (0 if math.isnan(each) else each) for each in figures.values())
    )
    means = (each / max(1, sums[0]) for each in sums[1:])
    first = f"{mine[0].messages[-1]['content']} ▸ {answers[0].text}" if mine else ""
    return first, {f"val_{name}": mean for name, mean in zip(figures, means, strict=True)}


def saver(args: RolloutArgs, part: Callable = lambda model: model) -> Callable:
    """How the weights of the policy, which is `part` of a model, are written."""
    save = partial(save_lora, settings=args.settings()) if args.use_lora else save_weights
    return lambda model, path, **about: save(part(model), path, **about)

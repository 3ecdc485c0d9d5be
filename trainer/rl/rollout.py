"""Rollouts: the policy completes prompts, with the project's engine or on a server.

    train_data, val_data = read_prompts(ctx, tokenizer)      # rows of rlaif.jsonl
    completions = generate_completions(ctx, model, tokenizer, prompts, G, step=run.step)
    batches = micro_batches(completions, …)                  # sorted by length, padded

A server (--rollout_url) is vLLM, SGLang or whatever else speaks OpenAI's API. The random numbers of
a completion depend on --seed, step and prompt alone, so that any number of ranks samples the same
completions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.chat import stop_tokens
from model.inference.engine import Engine, Request
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.model_minimind import MiniMindForCausalLM
from trainer.common.context import Context, unwrap
from trainer.common.evaluation import eager
from trainer.common.metrics import Metric
from trainer.rl.arguments import RolloutArgs
from trainer.rl.prompts import GenerationRequest, Prompt, PromptDataset
from trainer.rl.rollout_server import generate_on_server, send_weights


@dataclass
class Completion:
    prompt: Prompt
    tokens: list[int]  # as sampled, a final EOS included; never tokenised again from the text
    text: str
    terminated: bool  # by its EOS, not by --max_gen_len
    action_mask: list[bool] | None = None  # which tokens the policy sampled; None: all

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled, and that carry loss."""
        return len(self.tokens) if self.action_mask is None else sum(self.action_mask)

    @property
    def transcript(self) -> str:
        """What a person is shown of it."""
        return self.text


# -- sampling --------------------------------------------------------------------------------------


@eager
def generate_completions(
    ctx: Context[Any],
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    num_generations: int = 1,
    *,
    step: int,
    attempt: int = 0,
    temperature: float | None = None,
) -> list[Completion]:
    """`num_generations` completions of each prompt, neighbours in the list.

    Args:
        ctx: its arguments are RolloutArgs, or have the same flags (train_distillation.py).
        step, attempt: parts of the seed; several rollouts of a step need different attempts.
        temperature: of sampling; default: --temperature.
    """
    args = ctx.args if temperature is None else replace(ctx.args, temperature=temperature)
    owners = [prompt for prompt in prompts for _ in range(num_generations)]
    requests = [
        GenerationRequest(prompt.ids, make_seed(args.seed, step, prompt.index, attempt), n)
        for prompt in prompts
        for n in range(num_generations)
    ]
    outputs = make_generate_fn(ctx, args, model, tokenizer)(requests)
    return [
        make_completion(tokenizer, prompt, tokens)
        for prompt, tokens in zip(owners, outputs, strict=True)
    ]


def make_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, tokens: list[int]
) -> Completion:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Completion(prompt, tokens, text, tokens[-1] in stop_tokens(tokenizer))


def make_seed(*numbers: int) -> int:
    return int(np.random.default_rng(numbers).integers(2**31))


def make_generate_fn(
    ctx: Context, args: RolloutArgs, model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> Callable[[list[GenerationRequest]], list[list[int]]]:
    """A function that samples from the model as it is now: requests → new tokens of each, a final
    EOS included."""
    if not args.rollout_url:
        return partial(generate_locally, args, unwrap(model))
    if ctx.is_main:
        send_weights(args, unwrap(model), tokenizer)
    ctx.all_reduce_sum(0.0)  # a barrier: no rank asks before the server has the new weights
    return partial(generate_on_server, args, tokenizer)


def generate_locally(
    args: RolloutArgs, model: MiniMindForCausalLM, requests: list[GenerationRequest]
) -> list[list[int]]:
    """Sample with the project's engine, --rollout_batch_size completions side by side."""
    limits: dict[str, Any] = dict(max_new_tokens=args.max_gen_len, temperature=args.temperature)
    queue = [
        Request(ids, SamplingParams(**limits, seed=seed), index=sample)
        for ids, seed, sample in requests
    ]
    engine = Engine(model, slots=min(args.rollout_batch_size, max(1, len(queue))))
    was_training = model.training
    model.eval()
    try:
        for request in queue:
            engine.submit(request)
        while engine.busy:
            engine.step()
    finally:
        model.train(was_training)
    return [request.tokens for request in queue]


# -- metrics and evaluation ------------------------------------------------------------------------


def completion_stats(completions: Sequence[Completion]) -> dict[str, Metric]:
    """Metrics: length, the share that --max_gen_len cut off, and the share without text."""
    count = len(completions)
    return {
        "completions/mean_length": (sum(len(each.tokens) for each in completions), count),
        "completions/clipped_ratio": (sum(not each.terminated for each in completions), count),
        "completions/empty_ratio": (sum(not each.text.strip() for each in completions), count),
    }


def print_sample(
    ctx: Context[RolloutArgs], step: int, completions: Sequence[Completion], rewards: Tensor
) -> None:
    """With --debug_mode, every --debug_interval steps: a prompt, a completion and its reward."""
    args = ctx.args
    if not args.debug_mode or step % args.debug_interval or not completions:
        return
    n = step // args.debug_interval % len(completions)  # the next one at the next time
    shown = f"{completions[n].prompt.messages[-1]['content']} ▸ {completions[n].transcript}"
    reward = rewards.flatten()[n].item()
    ctx.print(f"step {step}: reward {reward:.3f}", "    " + shown.replace("\n", "\n    "))


def generate_greedy(
    ctx: Context[RolloutArgs],
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
) -> list[Completion]:
    """The completion of the likeliest tokens, one a prompt."""
    sampling = SamplingParams(ctx.args.max_gen_len, temperature=0)
    outputs = generate(unwrap(model), [prompt.ids for prompt in prompts], sampling)
    pairs = zip(prompts, outputs, strict=True)
    return [make_completion(tokenizer, prompt, tokens) for prompt, tokens in pairs]


@eager
def evaluate_policy(
    ctx: Context[RolloutArgs],
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    val_data: PromptDataset,
    rewards: Callable,
    generate_fn: Callable = generate_greedy,
) -> tuple[str, dict[str, float]]:
    """Greedy completions of held-out prompts: one of them as a sample, and means over all ranks of
    their rewards."""
    prompts = val_data.prompts[ctx.rank :: ctx.world_size]
    completions = generate_fn(ctx, model, tokenizer, prompts) if prompts else []
    _, metrics = rewards(completions)
    metrics = {**metrics, **completion_stats(completions)}
    sums = ctx.all_reduce_sum(*(number for pair in metrics.values() for number in pair))
    sample = ""
    if prompts:
        sample = f"{prompts[0].messages[-1]['content']} ▸ {completions[0].transcript}"
    pairs = zip(metrics, sums[::2], sums[1::2], strict=True)
    return sample, {f"eval_{name}": total / count for name, total, count in pairs if count}

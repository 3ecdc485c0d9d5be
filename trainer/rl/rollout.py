"""Rollouts: the policy completes prompts, with the project's engine or on a server.

    train_data, val_data = read_prompts(run)                 # rows of rlaif-mini.jsonl
    completions = generate_completions(run, model, prompts, num_generations)
    batches = micro_batches(completions, …)                  # sorted by length, padded

A server (--rollout_url) is vLLM, SGLang or whatever else speaks OpenAI's API. The random numbers of
a completion depend on --seed, update and prompt alone, so that any number of ranks samples the same
completions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from model.inference.engine import Engine, Request
from model.inference.generation import generate
from model.inference.sampling import Sampling
from model.model_minimind import MiniMindForCausalLM
from trainer.common.evaluation import uncompiled
from trainer.rl.arguments import RolloutArgs
from trainer.rl.prompts import GenerationRequest, Prompt, PromptDataset
from trainer.rl.rollout_server import generate_on_server, send_weights
from trainer.trainer_utils import Run, unwrapped


@dataclass
class Completion:
    prompt: Prompt
    tokens: list[int]  # as sampled, a final EOS included; never tokenised again from the text
    text: str
    terminated: bool  # by its EOS, not by --max_gen_len
    action_mask: list[bool] | None = None  # which tokens the policy sampled; None: all


# -- sampling --------------------------------------------------------------------------------------


@uncompiled
def generate_completions(
    run: Run,
    model: nn.Module,
    prompts: list[Prompt],
    num_generations: int = 1,
    attempt: int = 0,
    temperature: float | None = None,
) -> list[Completion]:
    """`num_generations` completions of each prompt, neighbours in the list.

    Args:
        attempt: distinguishes rollouts of the same prompts in one update.
        temperature: of sampling; default: --temperature.
    """
    args = run.args if temperature is None else replace(run.args, temperature=temperature)
    owners = [prompt for prompt in prompts for _ in range(num_generations)]
    requests = [
        GenerationRequest(prompt.ids, make_seed(args.seed, run.step, prompt.index, attempt), n)
        for prompt in prompts
        for n in range(num_generations)
    ]
    outputs = make_generate_fn(args, run, model)(requests)
    run.pending["tokens"] += int(run.sum_over_ranks(sum(map(len, outputs)))[0])
    return [
        make_completion(run.tokenizer, prompt, tokens)
        for prompt, tokens in zip(owners, outputs, strict=True)
    ]


def make_completion(tokenizer, prompt: Prompt, tokens: list[int]) -> Completion:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Completion(prompt, tokens, text, tokens[-1] == tokenizer.eos_token_id)


def make_seed(*numbers: int) -> int:
    return int(np.random.default_rng(numbers).integers(2**31))


def make_generate_fn(
    args: RolloutArgs, run: Run, model: nn.Module
) -> Callable[[list[GenerationRequest]], list[list[int]]]:
    """A function that samples from the model as it is now: requests → new tokens of each, a final
    EOS included."""
    if not args.rollout_url:
        return partial(generate_locally, args, unwrapped(model))
    if run.is_main:
        send_weights(args, unwrapped(model), run.tokenizer)
    run.sum_over_ranks(0.0)  # a barrier: no rank asks before the server has the new weights
    return partial(generate_on_server, args, run.tokenizer)


def generate_locally(
    args: RolloutArgs, model: MiniMindForCausalLM, requests: list[GenerationRequest]
) -> list[list[int]]:
    """Sample with the project's engine, --rollout_batch_size completions side by side."""
    limits = dict(max_new_tokens=args.max_gen_len, temperature=args.temperature)
    queue = [
        Request(ids, Sampling(**limits, seed=seed), row=sample) for ids, seed, sample in requests
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


def completion_stats(completions: list[Completion]) -> dict[str, tuple[float, float]]:
    """For the log, (sum, count): how long completions are, how many --max_gen_len cut off, and how
    many are empty."""
    count = len(completions)
    return {
        "completions/mean_length": (sum(len(each.tokens) for each in completions), count),
        "completions/clipped_ratio": (sum(not each.terminated for each in completions), count),
        "completions/empty_ratio": (sum(not each.text.strip() for each in completions), count),
    }


def rank_shares(run: Run, metrics: dict[str, tuple[float, float]]) -> dict[str, float]:
    """This rank's part of the means over all ranks, from its sums and counts."""
    counts = run.sum_over_ranks(*(count for _, count in metrics.values()))
    pairs = zip(metrics.items(), counts, strict=True)
    return {name: total / max(1.0, count) for (name, (total, _)), count in pairs}


def generate_greedy(run: Run, model: nn.Module, prompts: list[Prompt]) -> list[Completion]:
    """The completion of the likeliest tokens, one a prompt."""
    sampling = Sampling(run.args.max_gen_len, temperature=0)
    outputs = generate(unwrapped(model), [prompt.ids for prompt in prompts], sampling)
    pairs = zip(prompts, outputs, strict=True)
    return [make_completion(run.tokenizer, prompt, tokens) for prompt, tokens in pairs]


@uncompiled
def evaluate_policy(
    run: Run,
    model: nn.Module,
    val_data: PromptDataset,
    rewards: Callable,
    generate_fn: Callable = generate_greedy,
) -> tuple[str, dict[str, float]]:
    """Greedy completions of held-out prompts: one of them as a sample, and means over all ranks of
    their rewards."""
    prompts = val_data.prompts[run.rank :: run.ranks]
    completions = generate_fn(run, model, prompts) if prompts else []
    _, metrics = rewards(completions)
    metrics = {**metrics, **completion_stats(completions)}
    sums = run.sum_over_ranks(*(number for pair in metrics.values() for number in pair))
    means = [total / max(1, count) for total, count in zip(sums[::2], sums[1::2], strict=True)]
    sample = f"{prompts[0].messages[-1]['content']} ▸ {completions[0].text}" if prompts else ""
    return sample, {f"val_{name}": mean for name, mean in zip(metrics, means, strict=True)}

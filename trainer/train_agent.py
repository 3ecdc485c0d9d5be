"""Tool use, learnt from its success: GRPO over whole conversations with tools.

A completion o_i of a question is now an episode: replies of the policy and results of tools in turn
(dataset/tools/loop.py), until a reply calls no more tool. With rewards r_i for the G episodes of a
question, advantages and loss are those of train_grpo.py, from which they are imported:

    A_i = (r_i − mean(r)) / (std(r) + 1e-4)
    L   = −1/G · Σ_i 1/|o_i| · Σ_t [ min(ρ_t·A_i, clip(ρ_t, 1−ε, 1+ε)·A_i) − β·k_t ]

where t goes over the tokens that the policy sampled (action_mask). Those of the tools' results are
context without loss: they are no action of the policy (as in Search-R1, arXiv 2503.09516, §3.1).

--reward takes what train_grpo.py takes (answer: the final answer is the row's, or the share of the
row's "gt" that it contains), and

    name        1 if the right tools were called, in the right order
    arguments   1 if their arguments were right, too

The latter two count where the row has calls to compare with. A row with "gt" and an empty last
answer, as in agent_rl.jsonl, has none: its reward is that of its answer.

Departures from train_grpo.py:
1. An episode in which anything goes wrong (a call that is no JSON, an unknown tool, wrong
   arguments, a reply that does not end, still calling after --max_turns replies) has the reward 0,
   or the score of a reward model if that is lower.
2. --max_gen_len limits a reply, and --max_turns the replies.

    python trainer/train_agent.py --data_path out/demo/data/tools.jsonl --beta 0

The data are SFT's conversations with tools, whose calls and answers are the truth, or MiniMind's
agent_rl.jsonl. Rows without a truth are scored by the reward model that is there, or left out.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dataset.released import data_option
from dataset.tools import MAX_TURNS
from model.command_line import option, setting
from model.errors import UserError
from trainer.common.arguments import LEARNING_RATE_HELP, ROLLOUT
from trainer.common.command import parse_trainer, run_trainer
from trainer.rl.arguments import GroupArgs


@dataclass
class Args(GroupArgs):
    data_path: list[str] = data_option("agent", "JSONL of conversations with tools")
    from_weight: str = option("full_sft", "stage to initialise from; also the reference")
    learning_rate: float = option(1e-4, LEARNING_RATE_HELP)
    max_seq_len: int = option(1024, "most tokens of a prompt; longer ones are left out")
    max_gen_len: int = option(256, "most tokens of a reply")
    max_turns: int = setting(
        MAX_TURNS,
        "most replies of an episode; tools are run between them",
        group=ROLLOUT,
        at_least=1,
    )
    max_total_len: int = setting(
        0,
        "most tokens of an episode, prompt and tool results included; 0: those of a prompt and of "
        "--max_turns replies",
        group=ROLLOUT,
        at_least=0,
    )
    reward: list[str] = option(
        ["answer:0.6", "arguments:0.2", "name:0.2"],
        "parts with weights: name, arguments, and what rewards.py lists",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.max_total_len <= self.max_gen_len:
            raise UserError("--max_total_len must leave room for a prompt beside --max_gen_len")

    @property
    def max_prompt_len(self) -> int:
        if not self.max_total_len:
            return self.max_seq_len
        return min(self.max_seq_len, self.max_total_len - self.max_gen_len)

    @property
    def max_prompt_flag(self) -> str:
        if self.max_prompt_len == self.max_seq_len:
            return super().max_prompt_flag
        return f"--max_total_len {self.max_total_len} minus --max_gen_len {self.max_gen_len}"


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_trainer(Args, __doc__)


import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dataset.tools.loop import (
    ERRORS,
    Episode,
    describe_unrunnable,
    parse_task,
    run_episodes,
    score,
)
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer
from trainer.common.context import Context, unwrap
from trainer.common.evaluation import eager
from trainer.common.metrics import Metric
from trainer.common.optimizers import make_optimizer
from trainer.common.setup import add_lora_if_asked, init_model, make_save_fn, prepare_model
from trainer.rl.batches import UpdateStats, micro_batches
from trainer.rl.policy import policy_inputs
from trainer.rl.prompts import GenerationRequest, Prompt, collate_prompts, read_prompts
from trainer.rl.reference import ReferenceModel
from trainer.rl.rewards import Rewards, sum_count
from trainer.rl.rollout import (
    Completion,
    completion_stats,
    evaluate_policy,
    make_generate_fn,
    make_seed,
    print_sample,
)
from trainer.rl.rules import RULES, Rule
from trainer.train_grpo import aggregate_loss, generate_groups, group_advantages, policy_loss
from trainer.trainer_utils import Run

# -- episodes --------------------------------------------------------------------------------------


@dataclass
class EpisodeCompletion(Completion):
    """An episode as a completion: its tokens are all that follow the prompt, tool results too."""

    episode: Episode = field(kw_only=True)

    @property
    def transcript(self) -> str:
        return "\n".join(f"{role}: {text}" for role, text in self.episode.transcript)


def parse_task_row(row: dict) -> tuple:
    """A row → its messages up to the question, the truth, and the task itself."""
    task = parse_task(row)
    return task.messages, task.truth, task


def new_episode(ctx: Context[Args], tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Episode:
    assert prompt.task is not None  # parse_task_row gives every prompt one
    thinking = ctx.args.reasoning or prompt.thinking
    return Episode(prompt.task, tokenizer, open_thinking=thinking)


def to_completion(prompt: Prompt, episode: Episode) -> EpisodeCompletion:
    tokens = episode.ids[episode.prompt_length :]
    terminated = not {"unfinished", "endless", "too_long"} & set(episode.errors)
    return EpisodeCompletion(
        prompt, tokens, episode.text, terminated, episode.action_mask, episode=episode
    )


@eager
def generate_episodes(
    ctx: Context[Args],
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    num_generations: int = 1,
    *,
    step: int,
    attempt: int = 0,
) -> list[EpisodeCompletion]:
    """`num_generations` episodes of each prompt, neighbours in the list. As `generate_completions`,
    of whose completions these are the kind with tools."""
    args, generate_fn = ctx.args, make_generate_fn(ctx, ctx.args, model, tokenizer)
    started = [
        (prompt, new_episode(ctx, tokenizer, prompt), n)
        for prompt in prompts
        for n in range(num_generations)
    ]
    origin = {id(episode): (prompt, n) for prompt, episode, n in started}

    def write(waiting: list[Episode]) -> list[list[int]]:
        requests = []
        for episode in waiting:
            prompt, n = origin[id(episode)]
            turn = [episode.turns] if episode.turns else []  # the first reply is sampled as GRPO's
            seed = make_seed(args.seed, step, prompt.index, attempt, *turn)
            # The ids so far are those that were sampled, and not their text tokenised again: that
            # may give other tokens, whose log-probs are not those of the policy's choices.
            requests.append(GenerationRequest(episode.ids, seed, n))
        return generate_fn(requests)

    episodes = [episode for _, episode, _ in started]
    run_episodes(episodes, write, args.max_turns, token_budget(args, unwrap(model).config))
    return [to_completion(prompt, episode) for prompt, episode, _ in started]


def generate_greedy(
    ctx: Context[Args],
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
) -> list[EpisodeCompletion]:
    """Episodes of the likeliest tokens, one a prompt."""
    args, sampling = ctx.args, SamplingParams(ctx.args.max_gen_len, temperature=0)
    episodes = [new_episode(ctx, tokenizer, prompt) for prompt in prompts]

    def write(waiting: list[Episode]) -> list[list[int]]:
        return generate(unwrap(model), [episode.ids for episode in waiting], sampling)

    run_episodes(episodes, write, args.max_turns, token_budget(args, unwrap(model).config))
    return [to_completion(*pair) for pair in zip(prompts, episodes, strict=True)]


def token_budget(args: Args, config: MiniMindConfig) -> int:
    """Tokens of an episode beyond which another reply might not fit the model, or the memory."""
    longest = args.max_total_len or args.max_seq_len + args.max_turns * args.max_gen_len
    return min(longest, config.max_position_embeddings) - args.max_gen_len


# -- rewards ---------------------------------------------------------------------------------------


def has_calls(prompt: Prompt) -> bool:
    return prompt.task is not None and prompt.task.calls is not None


class ToolRewards:
    """Rewards of episodes; at most 0 where anything went wrong."""

    def __init__(self, ctx: Context[Args], tokenizer: PreTrainedTokenizerBase, hidden_size: int):
        tool_rules = {
            "name": Rule(lambda each, args: score(each.episode)["name"], has_calls),
            "arguments": Rule(lambda each, args: score(each.episode)["arguments"], has_calls),
        }
        self.args = ctx.args
        self.rewards = Rewards(ctx, tokenizer, hidden_size, tool_rules)

    def __call__(self, completions: list[EpisodeCompletion]) -> tuple[Tensor, dict[str, Metric]]:
        """[N] rewards; and metrics: their parts, right answers (success), calls, and each kind of
        error."""
        rewards, metrics = self.rewards(completions)
        episodes, count = [each.episode for each in completions], len(completions)
        failed = [bool(episode.errors) for episode in episodes]
        # An answer that is right after a broken call was guessed. A reward for it would teach that
        # calls need not be right.
        # Scores of a reward model may be below 0, which must not look worse than a broken call.
        worst = torch.zeros_like(rewards)
        if not self.rewards.are_bounded:
            worst = rewards.nan_to_num(0.0).clamp(max=0.0)
        rewards = torch.where(torch.tensor(failed, dtype=torch.bool), worst, rewards)
        graded = [each for each in completions if each.prompt.truth]
        correct = [
            not each.episode.errors and RULES["answer"].score(each, self.args) == 1
            for each in graded
        ]
        errors = Counter(error for episode in episodes for error in episode.errors)
        sums = {
            "tools/call_frequency": sum(len(episode.calls) for episode in episodes),
            **{f"error_{kind}": errors[kind] for kind in ERRORS},
        }
        per_episode = {name: (number, count) for name, number in sums.items()}
        success = {"success": (sum(correct), len(graded))}
        return rewards, {**metrics, "reward": sum_count(rewards), **success, **per_episode}


# -- training --------------------------------------------------------------------------------------


def main(args: Args) -> dict[str, Any]:
    # Setup: policy, data, rewards, reference.
    ctx = Context.create(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = add_lora_if_asked(args, init_model(args, tokenizer))
    rewards_of = ToolRewards(ctx, tokenizer, model.config.hidden_size)
    train_data, val_data = read_prompts(
        ctx, tokenizer, rewards_of.rewards.can_score, parse_task_row
    )
    if sentence := describe_unrunnable(prompt.task for prompt in train_data.prompts if prompt.task):
        ctx.print(sentence)
    stage = args.stage("agent")
    run = Run(ctx, stage, model, tokenizer, train_data, val_data, collate=collate_prompts)

    # The policy as it is now; without a KL in the loss there is no use for it.
    reference = ReferenceModel(ctx, model) if args.beta else None
    model = prepare_model(ctx, model)
    optimizer = make_optimizer(
        model, args.optimizer, args.learning_rate, args.weight_decay, ctx.dtype
    )
    run.resume(model, optimizer)

    # From here on the loop is train_grpo.py's, line by line but for the episodes: a reader of one
    # trainer should find its whole loop in it.
    for global_batch in run.steps():
        # Rollout and rewards: G episodes of each question, by the policy as it is now.
        prompts = [prompt for batch in global_batch for prompt in batch.prompts]
        completions, rewards, metrics = generate_groups(
            run, model, rewards_of, prompts, train_data, generate_episodes
        )
        print_sample(ctx, run.step, completions, rewards)

        # Advantages: one for the whole episode, so that an early call is credited for the answer.
        advantages = group_advantages(rewards, scale=args.loss_type != "dr_grpo").view(-1, 1)
        pad_id = tokenizer.pad_token_id
        batches = micro_batches(completions, args.update_batch_size, pad_id, ctx.device)
        for batch in batches:
            batch.advantages = advantages[batch.indices.cpu()].to(ctx.device)  # [B, 1]
            if reference:
                batch.ref_log_probs = reference.log_probs(run, model, batch)

        # Policy loss, as in train_grpo.py; completion_mask leaves out the tools' tokens.
        stats = UpdateStats(ctx, batches)
        for _ in range(args.update_epochs):
            for batch in batches:
                with run.forward(model, sync=batch is batches[-1]):
                    outputs = model(**policy_inputs(batch, args.temperature))
                    # in the first epoch the policy is still the one that sampled
                    batch.set_old_log_probs(outputs.log_probs)
                    token_losses = policy_loss(outputs.log_probs, batch, args)
                    loss = aggregate_loss(token_losses, batch, args, stats)
                run.backward(loss, stats.aux_loss(batch, outputs.aux_loss))
                stats.accumulate(outputs.log_probs, batch, *args.clip_range)
            run.update(model, optimizer)

        # Evaluate, log, save.
        if val_data and run.is_due(args.eval_interval):
            sample, val_metrics = evaluate_policy(
                ctx, model, tokenizer, val_data, rewards_of, generate_greedy
            )
            run.log_evaluation(sample, **val_metrics)
        metrics |= completion_stats(completions) | stats.metrics()
        run.log(**metrics)
        run.save_every(model, optimizer, save=make_save_fn(args))
    return run.finish()


if __name__ == "__main__":
    run_trainer(main, args)

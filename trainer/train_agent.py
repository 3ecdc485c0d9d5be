"""Tool use, learnt from its success: GRPO over whole conversations with tools.

An answer o_i to a question is now an episode: replies of the policy and results of tools in turn
(dataset/tools/loop.py), until it calls no more tool. With rewards r_i for the G episodes of a
question, A_i and the loss are those of train_grpo.py, from which they are imported:

    A_i = (r_i − mean(r)) / (std(r) + 1e-4)
    L   = −1/G · Σ_i 1/|o_i| · Σ_t [ min(ρ_t·A_i, clip(ρ_t, 1−ε, 1+ε)·A_i) − β·k_t ]

where t goes over the tokens that the policy drew. Those that the tools wrote are read, but carry
no loss: they are no choice of the policy (as in Search-R1, arXiv 2503.09516, §3.1). The ids that
were drawn are kept, never tokenised again, so that ρ is exactly 1 before the first update.

--reward takes what train_grpo.py takes (answer: the final answer is the row's), and

    name        1 if the right tools were called, in the right order
    arguments   1 if the arguments were right, too

An episode in which anything goes wrong (a call that is no JSON, an unknown tool, wrong arguments,
a reply that does not end, still calling after --max_turns replies) has the reward 0.

    python trainer/train_agent.py --data_path out/demo/data/tools.jsonl --beta 0

The data are SFT's conversations with tools: their calls and answers are the truth.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dataset.grading import grade
from dataset.tools.loop import ERRORS, MAX_TURNS, Episode, run_episodes, score, task_of
from model.command_line import option
from model.errors import UserError
from model.inference.generation import generate
from model.inference.sampling import Sampling
from model.weights import load_tokenizer
from trainer import train_grpo
from trainer.common.arguments import DATASET, LEARNING_RATE_HELP
from trainer.common.command import run_stage
from trainer.common.evaluation import uncompiled
from trainer.common.optimizers import make_optimizer
from trainer.rl.rewards import Rewards, answer_in, mean
from trainer.rl.rollout import (
    Completion,
    Prompt,
    Prompts,
    Reference,
    Sums,
    evaluate_policy,
    lengths_and_ends,
    log_probs,
    micro_batches,
    policy_inputs,
    prompt_batch,
    prompts_of,
    read_prompts,
    row_seed,
    saver,
    shares,
    with_addition,
    writer,
)
from trainer.train_grpo import answer_groups, group_advantages, policy_loss, total
from trainer.trainer_utils import Run, starting_model, unwrapped


@dataclass
class Args(train_grpo.Args):
    data_path: list[str] = option(
        [str(DATASET / "tools.jsonl")], "JSONL of conversations with tools, as for fine-tuning"
    )
    from_weight: str = option("full_sft", "stage to start from")
    learning_rate: float = option(1e-4, LEARNING_RATE_HELP)
    max_seq_len: int = option(1024, "tokens of a prompt at most; longer ones are left out")
    max_gen_len: int = option(256, "tokens of a reply at most")
    max_turns: int = option(MAX_TURNS, "replies to a question at most; the tools work between them")
    reward: list[str] = option(
        ["answer:0.6", "arguments:0.2", "name:0.2"],
        "parts with weights: name, arguments, and what rewards.py lists",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_turns < 1:
            raise UserError(f"--max_turns must be at least 1, not {self.max_turns}")


# -- episodes --------------------------------------------------------------------------------------


@dataclass
class Play(Completion):
    """An episode in the place of a completion: its tokens are all that follow the prompt."""

    episode: Episode | None = None


def read_task(row: dict) -> tuple:
    """The messages up to the question, the answer, and the task itself."""
    task = task_of(row)
    return task.messages, task.answer, task


def begin(run: Run, prompt: Prompt) -> Episode:
    return Episode(prompt.task, run.tokenizer, open_thinking=run.args.reasoning)


def finished(prompt: Prompt, episode: Episode) -> Play:
    tokens = episode.ids[episode.prompt_length :]
    ended = not {"unfinished", "endless", "too_long"} & set(episode.errors)
    return Play(prompt, tokens, episode.text, ended, episode.action_mask, episode)


@uncompiled
def roll_out(
    run: Run, model: nn.Module, prompts: list[Prompt], copies: int = 1, attempt: int = 0
) -> list[Play]:
    """`copies` episodes of each prompt, neighbours in the list."""
    args, draw = run.args, writer(run.args, run, model)
    begun = [(prompt, begin(run, prompt), n) for prompt in prompts for n in range(copies)]
    places = {id(episode): (prompt, n) for prompt, episode, n in begun}

    def write(waiting: list[Episode]) -> list[list[int]]:
        chosen = []
        for episode in waiting:
            prompt, n = places[id(episode)]
            turn = [episode.turns] if episode.turns else []  # the first is drawn as GRPO's
            seed = row_seed(args.seed, run.step, prompt.row, attempt, *turn)
            chosen.append((replace(prompt, ids=episode.ids), seed, n))
        return draw(chosen)

    episodes = [episode for _, episode, _ in begun]
    run_episodes(episodes, write, args.max_turns, room(run))
    drawn = sum(sum(episode.action_mask) for episode in episodes)
    run.pending["tokens"] += int(run.sum_over_ranks(drawn)[0])
    return [finished(prompt, episode) for prompt, episode, _ in begun]


def greedy(run: Run, model: nn.Module, prompts: list[Prompt]) -> list[Play]:
    """The same with the likeliest tokens."""
    settings = Sampling(run.args.max_gen_len, temperature=0)
    episodes = [begin(run, prompt) for prompt in prompts]

    def write(waiting: list[Episode]) -> list[list[int]]:
        return generate(unwrapped(model), [episode.ids for episode in waiting], settings)

    run_episodes(episodes, write, run.args.max_turns, room(run))
    return [finished(*pair) for pair in zip(prompts, episodes, strict=True)]


def room(run: Run) -> int:
    """Tokens of an episode after which another reply might not fit the model, or the memory."""
    args = run.args
    most = args.max_seq_len + args.max_turns * args.max_gen_len
    return min(most, run.config.max_position_embeddings) - args.max_gen_len


class ToolRewards:
    """Rewards of episodes; 0 where anything went wrong."""

    def __init__(self, run: Run, prompts: Prompts):
        own = {name: lambda each, name=name: score(each.episode)[name] for name in OWN}
        self.parts = Rewards(run, prompts, own)

    def __call__(self, plays: list[Play]) -> tuple[Tensor, dict[str, float]]:
        """[N] rewards; for the log their parts, how many answers are right (success), calls in
        an episode, and how many errors of each kind."""
        rewards, figures = self.parts(plays)
        episodes, args = [each.episode for each in plays], self.parts.run.args
        wrong = [bool(episode.errors) for episode in episodes]
        rewards = rewards.masked_fill(torch.tensor(wrong, dtype=torch.bool), 0.0)
        right = [grade(answer_in(each, args), each.prompt.answer) for each in plays]
        errors = Counter(error for episode in episodes for error in episode.errors)
        sums = {
            "success": sum(yes and not no for yes, no in zip(right, wrong, strict=True)),
            "calls": sum(len(episode.calls) for episode in episodes),
            **{f"error_{kind}": errors[kind] for kind in ERRORS},
        }
        means = {name: number / max(1, len(plays)) for name, number in sums.items()}
        return rewards, {**figures, "reward": mean(rewards), **means}


OWN = ("name", "arguments")


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = with_addition(args, starting_model(args, tokenizer))
    run = Run(args, args.stage("agent"), model.config, tokenizer)
    prompts, held_out = read_prompts(run, read_task)
    rewards = ToolRewards(run, prompts)
    loader = run.loader(prompts, prompt_batch)
    run.announce(model, prompts, held_out)

    reference = Reference(run, model) if args.beta else None
    model = run.distribute(model)
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    run.resume(model, optimizer)

    for window in run.steps(loader):
        asked = prompts_of(window)
        plays, scores, figures = answer_groups(run, model, rewards, asked, prompts, roll_out)
        advantages = group_advantages(scores, args.loss_type != "dr_grpo").view(-1, 1)
        batches = micro_batches(run, plays)  # loss on what the policy drew alone
        sums = Sums(run, batches)
        for batch in batches:
            batch.advantages = advantages[batch.members.cpu()].to(run.device)
            if args.update_epochs > 1:  # else they are those of the update itself
                batch.old = log_probs(run, model, batch)
            if reference:
                batch.reference = reference.log_probs(model, batch)
        for _ in range(args.update_epochs):
            for batch in batches:
                with run.forward(model, sync=batch is batches[-1]):
                    outputs = model(**policy_inputs(run, batch))
                    loss = policy_loss(outputs.log_probs, batch, args)
                    loss = total(loss, batch, args, sums)
                run.backward(loss, sums.balance_loss(batch, outputs.aux_loss))
                sums.watch(outputs.log_probs, batch, args.epsilon, args.epsilon_high)
            run.update(model, optimizer)
        if held_out and run.due(args.eval_interval):
            sample, val_figures = evaluate_policy(run, model, held_out, rewards, greedy)
            run.log_evaluation(sample, **val_figures)
        figures |= lengths_and_ends(plays)
        run.log(**shares(run, len(plays), figures), **sums.figures())
        run.save_every(model, optimizer, save=saver(args))
    return run.finish()


if __name__ == "__main__":
    run_stage(main, Args, __doc__)

"""Does a model call the right tool, with the right arguments, and answer right with the result?

    python scripts/eval_toolcall.py --weight full_sft [--json FILE]
    python scripts/eval_toolcall.py --load_from ./MiniMind2     any transformers folder

Each task is a conversation with tools (see README.md, "Data"), the demo's held-out ones if
--data_path names no file. The model gets the messages up to the last question, and then
dataset/tools/loop.py goes round: model → <tool_call> → execute → <tool_response> → answer. Scored
is
whether it called

    name        the same tools as the row, in the same order (none, where the row calls none)
    arguments   with the same arguments, but for case and space
    answer      and whether its final answer is the row's, but for case, space and a full stop

with standard errors. Where a call went wrong (no JSON, no such tool, wrong arguments), or the model
did not come to an end in --max_turns replies, all three are 0. Beside it: the same questions, asked
without tools. A clock tells the time that it tells in the row.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from dataset.demo.files import demo_rows
from dataset.tools.loop import (
    ERRORS,
    MAX_TURNS,
    Episode,
    Task,
    read_tasks,
    run_episodes,
    score,
    task_of,
)
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.inference.generation import generate
from model.inference.sampling import Sampling
from model.weights import write_json
from scripts.serving.chat_model import ChatModel, ModelArgs, load_chat_model


@dataclass
class Args(ModelArgs):
    data_path: str = option("", "JSONL of conversations with tools; default: the demo's, held out")
    tasks: int = option(0, "how many tasks, from the first; 0: all")
    max_turns: int = option(MAX_TURNS, "replies to a question at most")
    max_new_tokens: int = option(128, "tokens of a reply at most")
    temperature: float = option(0.0, "of sampling; 0: always the likeliest token")
    seed: int = option(42, "of sampling")
    open_thinking: bool = option(False, "have replies begin with thoughts")
    compare: bool = option(True, "ask the same questions without tools, too")
    batch_size: int = option(64, "tasks side by side")
    examples: int = option(3, "how many tasks to show, some that went wrong among them")
    json: str = option("", "also write the figures and every task to this file")

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("tasks", "temperature", "examples"):
            if not getattr(self, name) >= 0:  # nor is NaN
                raise UserError(f"--{name} must not be negative, as {getattr(self, name)} is")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed must be at least 0 and less than 2^31, not {self.seed}")


def main(args: Args) -> dict[str, Any]:
    tasks = tasks_of(args)
    loaded = load_chat_model(args, args.weight)
    if not loaded.tokenizer.chat_template:
        raise UserError(f"the tokenizer of {loaded.name} has no chat template, and so no tools")
    episodes = run_tasks(loaded, tasks, args, "with tools")
    report = {"model": loaded.name, "parameters": loaded.parameters, **figures(episodes)}
    if args.compare:
        bare = run_tasks(loaded, [task.without_tools() for task in tasks], args, "without")
        add_bare(report, tasks, bare)
    console = Console(highlight=False)
    show(console, report)
    for episode in chosen_examples(episodes, args.examples):
        show_episode(console, episode)
    if args.json:
        write_json(args.json, {**report, "episodes": list(map(told, episodes))})
    return report


def tasks_of(args: Args) -> list[Task]:
    if args.data_path:
        tasks = read_tasks(args.data_path)
    else:
        tasks = [task_of(row) for row in demo_rows("tools", held_out=True)]
    return tasks[: args.tasks or None]


def run_tasks(loaded: ChatModel, tasks: list[Task], args: Any, about: str) -> list[Episode]:
    """Go through the loop with each task, a batch at a time.

    Args:
        args: what to do it with: max_turns, max_new_tokens, temperature, seed, open_thinking,
            batch_size.
    """
    sampling = Sampling(args.max_new_tokens, args.temperature, seed=args.seed)
    write = partial(replies, loaded, sampling)
    longest = loaded.model.config.max_position_embeddings - args.max_new_tokens
    episodes = [Episode(task, loaded.tokenizer, args.open_thinking) for task in tasks]
    with tqdm(total=len(tasks), desc=about, unit="task", leave=False) as bar:
        for at in range(0, len(episodes), args.batch_size):
            some = episodes[at : at + args.batch_size]
            run_episodes(some, write, args.max_turns, longest)
            bar.update(len(some))
    return episodes


def replies(loaded: ChatModel, sampling: Sampling, episodes: list[Episode]) -> list[list[int]]:
    return generate(loaded.model, [episode.ids for episode in episodes], sampling)


# -- figures ---------------------------------------------------------------------------------------


def kind_of(task: Task) -> str:
    """The tools that the truth calls."""
    return ", ".join(dict.fromkeys(call["name"] for call in task.calls)) or "no call"


def figures(episodes: list[Episode]) -> dict[str, Any]:
    """Shares of what is right, by kind of task; "tools" are all that need a call."""
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(kind_of(episode.task), []).append(episode)
    calling = [episode for episode in episodes if episode.task.calls]
    groups = {kind: groups[kind] for kind in sorted(groups)}
    groups |= {"tools": calling} if calling else {}
    errors = Counter(error for episode in episodes for error in episode.errors)
    return {
        "kinds": {kind: shares(list(map(score, some))) for kind, some in groups.items()},
        "calls": sum(len(episode.calls) for episode in episodes) / len(episodes),
        "errors": {kind: errors[kind] for kind in ERRORS if errors[kind]},
    }


def shares(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means and their standard errors."""
    found: dict[str, float] = {"tasks": len(scores)}
    for name in scores[0]:
        mean = sum(each[name] for each in scores) / len(scores)
        found |= {name: mean, f"{name}_error": (mean * (1 - mean) / len(scores)) ** 0.5}
    return found


def add_bare(report: dict[str, Any], tasks: list[Task], bare: list[Episode]) -> None:
    """Put the answers to the same questions without tools beside the others."""
    right = [score(episode)["answer"] for episode in bare]
    for kind, own in report["kinds"].items():
        some = [
            {"bare": each}
            for task, each in zip(tasks, right, strict=True)
            if kind_of(task) == kind or (kind == "tools" and task.calls)
        ]
        own |= {k: v for k, v in shares(some).items() if k != "tasks"}


def show(console: Console, report: dict[str, Any]) -> None:
    console.print(f"{report['model']}: {report['parameters'] / 1e6:.2f}M parameters")
    title = "right, in % ± standard error"
    table = Table(title=title, title_justify="left")
    table.add_column("tasks that need")
    for name in ("tasks", "name", "arguments", "answer", "without tools"):
        table.add_column(name, justify="right")
    for kind, own in report["kinds"].items():
        cells = [
            f"{100 * own[name]:.1f} ± {100 * own[f'{name}_error']:.1f}" if name in own else ""
            for name in ("name", "arguments", "answer", "bare")
        ]
        table.add_row(kind if kind != "tools" else "any tool", str(own["tasks"]), *cells)
    console.print(table)
    console.print(f"{report['calls']:.2f} calls a task")
    for kind, count in report["errors"].items():
        console.print(f"{count} × {kind}: {ERRORS[kind]}")


def chosen_examples(episodes: list[Episode], count: int) -> list[Episode]:
    """Right and wrong ones in turn, as far as there are both."""
    right, wrong = [], []
    for episode in episodes:
        (right if score(episode)["answer"] else wrong).append(episode)
    some = [each for pair in zip(right, wrong, strict=False) for each in pair]
    shorter = len(some) // 2
    return (some + right[shorter:] + wrong[shorter:])[:count]


def show_episode(console: Console, episode: Episode) -> None:
    console.rule("right" if score(episode)["answer"] else "wrong", align="left")
    question = episode.task.messages[-1]["content"]
    for role, text in (("user", question), *episode.transcript):
        console.print(f"[bold]{role}[/bold] {escape(text)}", soft_wrap=True)
    if not score(episode)["answer"]:
        console.print(f"[bold]truth[/bold] {escape(episode.task.answer)}", soft_wrap=True)
        for error in episode.errors:
            console.print(f"[bold]{error}[/bold] {ERRORS[error]}")


def told(episode: Episode) -> dict[str, Any]:
    """An episode for the report."""
    task = episode.task
    return {
        "question": task.messages[-1]["content"],
        "said": [{"role": role, "content": text} for role, text in episode.transcript],
        "calls": task.calls,
        "answer": task.answer,
        "errors": episode.errors,
        **score(episode),
    }


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))

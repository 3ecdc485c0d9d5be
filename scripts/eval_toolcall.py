"""Evaluate tool use: does a model call the right tools, with the right arguments, and then answer?

    python scripts/eval_toolcall.py --weight full_sft [--json FILE]
    python scripts/eval_toolcall.py --load_from ./MiniMind2     any transformers folder

Each task is a conversation with tools (docs/data.md, "Formats"); without --data_path, those of
dataset/tools/tasks.jsonl. The model gets the messages up to the last question, and
dataset/tools/loop.py runs the episode: model → <tool_call> → execute → <tool_response> → answer.
Three metrics, from 0 to 1 each:

    name        it called the same tools as the row, in the same order (or none, as the row)
    arguments   with the same arguments, up to case and white space
    answer      its final answer says the same as the row's; of a "gt", the share that it contains

The table shows means with standard errors. All three are 0 where a call is invalid (no JSON, no
such tool, wrong arguments) or the model does not finish within --max_turns replies. Rows with "gt"
alone do not say which calls are right. For comparison, the same questions are also asked without
tools. The clock returns the time recorded in the row.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dataset.jsonl import BadRows, check_file
from dataset.tools import MAX_TURNS
from model.command_line import Ignored, Refused, option, parse_command_line
from model.errors import UserError, exit_on_user_error
from scripts.serving.arguments import MACHINE, SAMPLING, ModelArgs

TASKS = "tasks"  # a group of --help


@dataclass
class Args(ModelArgs):
    legacy_flags = {
        "backend": {
            "local": Ignored("the model is loaded here; --load_from and --weight name it"),
            "api": Refused(
                "the model is loaded here, by --load_from or --weight; a server is asked by "
                "scripts/chat_openai_api.py --base_url URL"
            ),
        },
        "api_base_url": Ignored("no server is asked; the model is loaded here"),
        "api_key": Ignored("no server is asked; the model is loaded here"),
        "api_model": Ignored("no server is asked; --load_from or --weight names the model"),
        "show_speed": Ignored("the progress bar shows the tasks per second"),
    }

    data_path: str = option(
        "",
        "JSONL of conversations with tools; default: dataset/tools/tasks.jsonl",
        group=TASKS,
        check=check_file,
    )
    tasks: int = option(0, "number of tasks, from the first; 0: all", group=TASKS, at_least=0)
    skip_bad_rows: bool = option(False, "leave bad rows out; 0: the first is an error", group=TASKS)
    max_turns: int = option(
        MAX_TURNS, "maximum number of replies to a question", group=TASKS, at_least=1
    )
    compare: bool = option(True, "also ask the same questions without tools", group=TASKS)
    examples: int = option(
        3, "number of tasks to print, right and wrong ones in turn", group=TASKS, at_least=0
    )
    json: str = option("", "also write metrics and all episodes to this file", group=TASKS)
    max_new_tokens: int = option(
        128, "maximum length of a reply, in tokens", group=SAMPLING, at_least=1
    )
    temperature: float = option(0.0, "sampling temperature; 0: greedy", group=SAMPLING, at_least=0)
    top_p: float = option(
        1.0,
        "nucleus sampling: smallest set of tokens with this probability",
        group=SAMPLING,
        above=0,
        at_most=1,
    )
    seed: int = option(42, "random seed of the sampling", group=SAMPLING, at_least=0, below=2**31)
    open_thinking: bool = option(
        False, "start replies with <think>, for reasoning models", group=SAMPLING
    )
    batch_size: int = option(64, "tasks generated in parallel", group=MACHINE, at_least=1)


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from dataset import tools
from dataset.tools.loop import (
    ERRORS,
    Episode,
    Task,
    describe_unrunnable,
    read_tasks,
    run_episodes,
    score,
)
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.weights import write_json
from scripts.serving.loading import ChatModel, load_chat_model

DEFAULT_TASKS = Path(tools.__file__).with_name("tasks.jsonl")


def main(args: Args) -> dict[str, Any]:
    tasks = load_tasks(args)
    loaded = load_chat_model(args)
    if not loaded.tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {loaded.name} has no chat template, which tool calls need"
        )
    episodes = run_tasks(loaded, tasks, args, "with tools")
    report = {"model": loaded.name, "parameters": loaded.num_parameters, **summarize(episodes)}
    if args.compare:
        tasks_without = [task.without_tools() for task in tasks]
        baseline = run_tasks(loaded, tasks_without, args, "without tools")
        add_baseline(report, tasks, baseline)
    console = Console(highlight=False)
    show_table(console, report)
    for episode in choose_examples(episodes, args.examples):
        show_episode(console, episode)
    if args.json:
        write_json(args.json, {**report, "episodes": [to_json(episode) for episode in episodes]})
    return report


def load_tasks(args: Args) -> list[Task]:
    """The tasks, as many as are asked for. Those without a right answer are left out."""
    path = args.data_path or DEFAULT_TASKS
    bad_rows = BadRows() if args.skip_bad_rows else None
    rows = read_tasks(path, bad_rows)
    if bad_rows and bad_rows.count:
        print(bad_rows)
    tasks = [task for task in rows if task.truth]
    if not tasks:
        raise UserError(
            f'no row of {path} has a right answer: give it an "answer", a "gt", or an answer as '
            "its last message"
        )
    if len(tasks) < len(rows):
        print(f"{len(rows) - len(tasks):,} of {len(rows):,} rows have no right answer: left out")
    tasks = tasks[: args.tasks or None]
    if sentence := describe_unrunnable(tasks):
        print(sentence)
    return tasks


def run_tasks(loaded: ChatModel, tasks: list[Task], args: Any, label: str) -> list[Episode]:
    """Run an episode for each task, a batch at a time.

    Args:
        args: has max_turns, max_new_tokens, temperature, top_p, seed, open_thinking and
            batch_size.
        label: of the progress bar.
    """
    sampling = SamplingParams(
        args.max_new_tokens, args.temperature, top_p=args.top_p, seed=args.seed
    )
    generate_batch = partial(generate_replies, loaded, sampling)
    max_prompt_tokens = loaded.max_positions - args.max_new_tokens
    episodes = [Episode(task, loaded.tokenizer, args.open_thinking) for task in tasks]
    with tqdm(total=len(tasks), desc=label, unit="task", leave=False) as bar:
        for at in range(0, len(episodes), args.batch_size):
            batch = episodes[at : at + args.batch_size]
            run_episodes(batch, generate_batch, args.max_turns, max_prompt_tokens)
            bar.update(len(batch))
    return episodes


def generate_replies(
    loaded: ChatModel, sampling: SamplingParams, episodes: list[Episode]
) -> list[list[int]]:
    return generate(loaded.model, [episode.ids for episode in episodes], sampling)


# -- metrics ---------------------------------------------------------------------------------------


def tools_needed(task: Task) -> str:
    """The names of the tools that the row calls."""
    if task.calls is None:
        return "calls not recorded"
    return ", ".join(dict.fromkeys(call["name"] for call in task.calls)) or "no call"


def summarize(episodes: list[Episode]) -> dict[str, Any]:
    """Metrics by the tools that a task needs; "tools" are all tasks that need a tool."""
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(tools_needed(episode.task), []).append(episode)
    calling = [episode for episode in episodes if episode.task.calls]
    groups = {kind: groups[kind] for kind in sorted(groups)}
    groups |= {"tools": calling} if calling else {}
    errors = Counter(error for episode in episodes for error in episode.errors)
    return {
        "kinds": {kind: means([score(each) for each in group]) for kind, group in groups.items()},
        "calls": sum(len(episode.calls) for episode in episodes) / len(episodes),
        "errors": {kind: errors[kind] for kind in ERRORS if errors[kind]},
    }


def means(scores: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric, with its standard error √(p (1 − p) / n)."""
    result: dict[str, float] = {"tasks": len(scores)}
    for name in scores[0]:
        mean = sum(each[name] for each in scores) / len(scores)
        result |= {name: mean, f"{name}_error": (mean * (1 - mean) / len(scores)) ** 0.5}
    return result


def add_baseline(report: dict[str, Any], tasks: list[Task], baseline: list[Episode]) -> None:
    """Add the accuracy of answers to the same questions without tools."""
    correct = [score(episode)["answer"] for episode in baseline]
    for kind, metrics in report["kinds"].items():
        group = [
            {"answer_without_tools": each}
            for task, each in zip(tasks, correct, strict=True)
            if tools_needed(task) == kind or (kind == "tools" and task.calls)
        ]
        metrics |= {k: v for k, v in means(group).items() if k != "tasks"}


def show_table(console: Console, report: dict[str, Any]) -> None:
    console.print(f"{report['model']}: {report['parameters'] / 1e6:.2f}M parameters")
    title = "right, in % ± standard error"
    table = Table(title=title, title_justify="left")
    table.add_column("tasks that need")
    for name in ("tasks", "name", "arguments", "answer", "without tools"):
        table.add_column(name, justify="right")
    for kind, metrics in report["kinds"].items():
        cells = [
            f"{100 * metrics[name]:.1f} ± {100 * metrics[f'{name}_error']:.1f}"
            if name in metrics
            else ""
            for name in ("name", "arguments", "answer", "answer_without_tools")
        ]
        table.add_row(kind if kind != "tools" else "any tool", str(metrics["tasks"]), *cells)
    console.print(table)
    console.print(f"{report['calls']:.2f} calls a task")
    for kind, count in report["errors"].items():
        console.print(f"{count} × {kind}: {ERRORS[kind]}")


def choose_examples(episodes: list[Episode], count: int) -> list[Episode]:
    """Right and wrong episodes in turn, as long as there are both."""
    right, wrong = [], []
    for episode in episodes:
        (right if is_right(episode) else wrong).append(episode)
    alternating = [each for pair in zip(right, wrong, strict=False) for each in pair]
    num_pairs = len(alternating) // 2
    return (alternating + right[num_pairs:] + wrong[num_pairs:])[:count]


def is_right(episode: Episode) -> bool:
    return score(episode)["answer"] == 1


def show_episode(console: Console, episode: Episode) -> None:
    console.rule("right" if is_right(episode) else "wrong", align="left")
    question = episode.task.messages[-1]["content"]
    for role, text in (("user", question), *episode.transcript):
        console.print(f"[bold]{role}[/bold] {escape(text)}", soft_wrap=True)
    if not is_right(episode):
        console.print(f"[bold]truth[/bold] {escape(episode.task.answer)}", soft_wrap=True)
        for error in episode.errors:
            console.print(f"[bold]{error}[/bold] {ERRORS[error]}")


def to_json(episode: Episode) -> dict[str, Any]:
    task = episode.task
    return {
        "question": task.messages[-1]["content"],
        "transcript": [{"role": role, "content": text} for role, text in episode.transcript],
        "calls": task.calls,
        "answer": task.answer,
        "errors": episode.errors,
        **score(episode),
    }


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

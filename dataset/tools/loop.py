"""The loop of tool use: the model replies, its tool calls are executed, and it goes on from the
results until a reply calls no tool.

    model → <tool_call> → execute → <tool_response> → model → … → answer

    tasks = read_tasks("out/demo/data/tools_val.jsonl")
    episodes = [Episode(task, tokenizer) for task in tasks]
    run_episodes(episodes, write)              # write: episodes → new tokens of each
    scores = [score(episode) for episode in episodes]

Evaluation (scripts/eval_toolcall.py) and reinforcement learning (trainer/train_agent.py) run this
loop; the web page, which shows each step to its user, executes calls by the same `answer_calls`.

A task is a row of conversations: the messages up to the last question, and what follows it in the
data: calls, results, and the truth (grading.py::read_truth). A call that the row makes too gets the
result recorded there, so that a clock tells the time of the row; any other call of the clock gets
CLOCK. An empty last answer is the place to answer: then the row knows neither calls nor answer, and
its truth is its "gt".

What the model wrote is never tokenised again: an episode keeps the ids that were sampled and
appends those of the results, as the chat template writes them. Text tokenised again may give other
tokens, and their log-probs are not those of the policy's choices.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dataset.chat import stop_tokens
from dataset.encoding import (
    Message,
    check_messages,
    encode_chat,
    ends_in_thought,
    parse_tool_fields,
)
from dataset.forms.rows import as_prompt
from dataset.grading import Truth, final_answer, read_truth
from dataset.jsonl import BadRows, check_file, error_at, read_rows
from dataset.reply_parser import Reply, parse_reply
from dataset.tools import MAX_TURNS
from dataset.tools.call import Result, Schema, call_tool, can_run, parameters_of, tool_name
from model.errors import UserError

CLOCK = '{"date": "2025-01-01", "weekday": "Wednesday", "time": "12:00"}'
# What can go wrong. An episode with any of these is scored 0.
ERRORS = {
    "malformed": "a call that is no JSON with a name and arguments",
    "unknown_tool": "a call of a tool that is not on offer",
    "bad_arguments": "missing, mistyped or surplus arguments",
    "failed": "a tool that failed on its arguments",
    "unfinished": "a reply that did not end",
    "endless": "still calling tools in the last turn",
    "too_long": "more tokens than the model has positions",
}

Call = dict[str, Any]  # name, arguments


# -- tasks -----------------------------------------------------------------------------------------


@dataclass
class Task:
    """A question with tools, and the truth."""

    messages: list[Message]  # up to the question
    tools: list[Schema]  # of the tools on offer
    offered: list[str]  # their names
    calls: list[Call] | None  # that the row makes; None: it does not say which are right
    truth: Truth | None  # of the final answer; None: a reward model must judge it
    recorded_results: dict[tuple, str] = field(default_factory=dict)  # of the row's calls

    @property
    def answer(self) -> str:
        """The right answer, to be shown."""
        return self.truth.text if self.truth else ""

    @property
    def schemas(self) -> dict[str, Schema]:
        return {tool_name(schema): schema for schema in self.tools}

    def without_tools(self) -> "Task":
        """The same question with no tool on offer."""
        messages = [{k: v for k, v in m.items() if k != "tools"} for m in self.messages]
        return replace(self, messages=messages, tools=[], offered=[], calls=[], recorded_results={})


def parse_task(row: dict[str, Any]) -> Task:
    """A row of conversations as a task.

    Raises:
        UserError: it is no conversation, has no question, or no place for an answer.
    """
    row = as_prompt(row)
    messages = [parse_tool_fields(message) for message in check_messages(row["conversations"])]
    questions = [n for n, message in enumerate(messages) if message["role"] == "user"]
    if not questions:
        raise UserError("has no question: there is no user message")
    asked, following = messages[: questions[-1] + 1], messages[questions[-1] + 1 :]
    tools = asked[0].get("tools", []) if asked[0]["role"] == "system" else []
    schemas = {tool_name(tool): tool for tool in tools}
    calls: list[Call] = []
    waiting: list[Call] = []
    recorded = {call_key({"name": "clock", "arguments": {}}): CLOCK}
    for message in following:
        if message["role"] == "assistant":
            waiting = [plain_call(call) for call in message.get("tool_calls", [])]
            calls += waiting
        elif waiting:
            recorded[call_key(waiting.pop(0), schemas)] = message["content"]
    ends = following and following[-1]["role"] == "assistant"
    answered = ends and not following[-1].get("tool_calls")
    truth = read_truth(row, following[-1]["content"] if answered else None)
    if not truth and not answered and "gt" not in row:
        raise UserError("does not end with the assistant's answer, so there is no truth")
    said = any(m["content"] for m in following if m["role"] == "assistant")
    offered = [tool_name(tool) for tool in tools]
    offered += [call["name"] for call in calls if call["name"] not in offered]
    return Task(asked, tools, offered, calls if calls or said else None, truth, recorded)


def plain_call(call: dict[str, Any]) -> Call:
    """A call of a file, which may have OpenAI's form and its arguments as text."""
    call = call.get("function") or call
    arguments = call.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"has a call of {call['name']} whose arguments are no JSON object")
    return {"name": call["name"], "arguments": arguments}


def read_tasks(path: str | Path, bad_rows: BadRows | None = None) -> list[Task]:
    """The tasks of a JSONL file.

    Args:
        bad_rows: counts the rows that are no task, which are then left out.

    Raises:
        UserError: names the line that is none.
    """
    tasks = []
    for number, row in read_rows(check_file(path), bad_rows):
        with error_at(path, number, bad_rows):
            tasks.append(parse_task(row))
    if bad_rows:
        bad_rows.refuse_if_all(len(tasks))
    if not tasks:
        raise UserError(f"{path} holds no tasks")
    return tasks


def describe_unrunnable(tasks: Iterable[Task]) -> str:
    """A sentence about the tools on offer that cannot be run here; "" if all of them can."""
    rows, names = 0, set()
    for task in tasks:
        missing = {name for name in task.offered if not can_run(name, task.schemas.get(name))}
        rows, names = rows + bool(missing), names | missing
    shown = ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if not names:
        return ""
    return (
        f"{rows:,} rows offer tools that cannot be run here ({shown}): a call of one gets the "
        "result that its row records, or else an error"
    )


def call_key(call: Call, schemas: dict[str, Schema] | None = None) -> tuple:
    """Equal for calls that count as the same: case, space, and quotes around numbers are ignored,
    and a default of the tool's schema may be given or not."""
    properties, _ = parameters_of((schemas or {}).get(call["name"], {}))
    defaults = {k: about["default"] for k, about in properties.items() if "default" in about}

    def simple(value: Any) -> float | str:
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
        try:
            text = json.dumps(value, ensure_ascii=False, sort_keys=True)
        except RecursionError:  # lists in lists in lists …
            return ""
        return "".join(text.casefold().split())

    arguments = defaults | call["arguments"]
    return call["name"], tuple(sorted((k, simple(v)) for k, v in arguments.items()))


# -- calls and their answers -----------------------------------------------------------------------


def answer_calls(
    reply: Reply,
    offered: Iterable[str],
    recorded_results: dict[tuple, str] | None = None,
    schemas: dict[str, Schema] | None = None,
) -> list[Result]:
    """The results of a reply's calls, in their order; [] if it calls nothing.

    Args:
        offered: the tools that may be called.
        recorded_results: by `call_key`; these calls are not executed.
        schemas: of the offered tools, by name, as the model was told; default: the tools' own.
    """
    results = []
    for call in reply.tool_calls:
        recorded = (recorded_results or {}).get(call_key(call, schemas))
        if recorded is not None and call["name"] in offered:
            results.append(Result(recorded))
        else:
            results.append(call_tool(call["name"], call["arguments"], offered, schemas))
    if "<tool_call>" in reply.content:  # the parser could not read it
        message = {"error": "a tool call is JSON with a name and arguments"}
        results.append(Result(json.dumps(message), "malformed"))
    return results


def tokens_of_results(
    tokenizer: PreTrainedTokenizerBase, results: list[Result], open_thinking: bool = False
) -> list[int]:
    """What the chat template writes between the end of a reply that called and the next reply."""
    before = [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]
    messages = before + [{"role": "tool", "content": result.text} for result in results]
    options = {"add_generation_prompt": True, "open_thinking": open_thinking}
    loss_mask = encode_chat(tokenizer, messages).loss_mask
    end = len(loss_mask) - loss_mask[::-1].index(True)  # of the reply
    return encode_chat(tokenizer, messages, **options).ids[end:]


class Episode:
    """A task, and the conversation about it so far.

    Attributes:
        ids: all tokens up to now: the prompt, then replies and results in turn.
        action_mask: for each token after the prompt, whether the model sampled it.
        calls: the model's tool calls, in order.
        errors: keys of ERRORS, one for each thing that went wrong.
        transcript: replies and results as text, (role, text).
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, open_thinking: bool = False):
        self.task, self.tokenizer, self.open_thinking = task, tokenizer, open_thinking
        options: dict[str, Any] = {"add_generation_prompt": True, "open_thinking": open_thinking}
        if task.tools:  # where any model's template looks for them
            options["tools"] = task.tools
        self.ids = encode_chat(tokenizer, task.messages, **options).ids
        self.prompt_length = len(self.ids)
        self.thinking = ends_in_thought(tokenizer, self.ids)  # each reply begins within a thought
        self.action_mask: list[bool] = []
        self.calls: list[Call] = []
        self.errors: list[str] = []
        self.transcript: list[tuple[str, str]] = []
        self.turns, self.done = 0, False
        self.text = ""  # of the last reply
        self.answer = ""  # the content of the final reply, once there is one

    def add_reply(self, tokens: list[int], last: bool) -> None:
        """Append a reply of the model, a final EOS included, and the results of its calls; `last`:
        no other reply may follow."""
        self.turns += 1
        self.extend(tokens, sampled=True)
        self.text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        self.transcript.append(("assistant", self.text))
        if tokens[-1] not in stop_tokens(self.tokenizer):
            self.end("unfinished")
            return
        reply = parse_reply(self.text, thinking=self.thinking)
        task = self.task
        results = answer_calls(reply, task.offered, task.recorded_results, task.schemas)
        self.calls += reply.tool_calls
        self.errors += [result.error for result in results if result.error]
        if not results:
            self.answer = reply.content
            self.end()
        elif last:
            self.end("endless")
        else:
            self.transcript += [("tool", result.text) for result in results]
            ids = tokens_of_results(self.tokenizer, results, self.open_thinking)
            self.extend(ids, sampled=False)

    def extend(self, tokens: list[int], sampled: bool) -> None:
        self.ids = self.ids + tokens  # a new list: the engine may still hold the old one
        self.action_mask += [sampled] * len(tokens)

    def end(self, *errors: str) -> None:
        self.errors += errors
        self.done = True


def run_episodes(
    episodes: list[Episode],
    write: Callable[[list[Episode]], list[list[int]]],
    max_turns: int = MAX_TURNS,
    token_budget: int | None = None,
) -> None:
    """Continue episodes, all side by side, until each is done.

    Args:
        write: the model: new tokens, at least one, for the `ids` of each episode.
        max_turns: replies to a question at most.
        token_budget: an episode with more tokens than this gets no further reply.
    """
    for turn in range(1, max_turns + 1):
        for episode in episodes:
            too_long = token_budget is not None and len(episode.ids) > token_budget
            if too_long and not episode.done:
                episode.end("too_long")
        waiting = [episode for episode in episodes if not episode.done]
        if not waiting:
            return
        for episode, tokens in zip(waiting, write(waiting), strict=True):
            episode.add_reply(tokens, last=turn == max_turns)


def score(episode: Episode) -> dict[str, float]:
    """From 0 to 1 for the final answer; 1 or 0 for the names that were called and the arguments,
    where the row says which are right. All 0 if anything went wrong, or nothing was said."""
    task, called = episode.task, episode.calls
    answer = final_answer(episode.answer)
    right = not episode.errors and bool(called or answer.strip())
    scores = {"answer": task.truth.score(answer) if right and task.truth else 0.0}
    if task.calls is not None:
        names = [call["name"] for call in called] == [call["name"] for call in task.calls]
        equal = [call_key(call, task.schemas) for call in called] == [
            call_key(call, task.schemas) for call in task.calls
        ]
        scores |= {"name": float(right and names), "arguments": float(right and equal)}
    return scores

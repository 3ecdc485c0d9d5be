"""Rows as the field's tools write them → rows in MiniMind's form (docs/data.md has the table).

    as_conversation(row)["conversations"]     SFT, distillation, tools
    as_prompt(row)["conversations"]           RL: a question may come without an answer
    as_pair(row)["chosen"], ["rejected"]      DPO and reward models

What says the same in another form is read. A key that changes what should be learnt and that
nothing here can express, such as a loss weight or an image, is an error and never ignored; keys
that say nothing about training (id, source, score) are ignored. All errors are UserErrors that
begin with a verb, for `error_at` to put file and line before them.
"""

import re
from collections.abc import Iterable
from typing import Any

from dataset.forms.messages import (
    MEDIA,
    THOUGHTS,
    Message,
    as_json,
    is_plain,
    is_said,
    leave_out,
    messages_of,
    present,
    refuse_media,
    tool_list,
)
from dataset.jsonl import Row
from model.errors import UserError

LISTS = ("conversations", "messages", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem")
CONTEXTS = ("input", "context")  # follow an instruction or a question
ANSWERS = ("output", "response", "completion", "solution", "answer")
SYSTEMS = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions", "available_tools")
TRUTHS = ("answer", "gt")  # what rewards compare with
TRUTH_ALIASES = ("ground_truth", "solution", "reward_model", "expected_answer", "final_answer")
SIDES = ("chosen", "rejected")
REJECTED = ("rejected_response", "rejected_messages")  # beside the preferred answer: ms-swift
# Keys beside the messages that nothing here can express,
UNREAD = (
    *MEDIA,
    *("chat_template_kwargs", "enable_thinking", "train_on_input", "train_on_inputs", "mask"),
    *("tool_schemas", "tool_definitions", "documents", "segments", "kto_tag", "label", "margin"),
)
WEIGHTS = ("weight", "weights", "loss_weight", "sample_weight", "loss_mask")
# and those that may repeat what the messages say, and must not say anything else.
REPEATED = (*QUESTIONS, *CONTEXTS, "output", "response", "completion", "history", *THOUGHTS)
MEANINGFUL = frozenset((*UNREAD, *WEIGHTS, *REPEATED, *SIDES, *REJECTED))
MESSAGES_AS_TEXT = re.compile(r'\s*\[\s*\{\s*"(role|from|content|value)"')


def is_pair(row: Row) -> bool:
    """Whether a row holds a preferred answer and another."""
    both = all(present(row, name) for name in SIDES)
    return both or present(row, "preferred_output") or bool(first_of(row, REJECTED))


def as_conversation(row: Row) -> Row:
    """{"conversations": [messages]}, and the truth for rewards ("answer", "gt") if there is one."""
    name = list_name(row)
    if name:
        given = row[name]
        if len(row) == 1 and isinstance(given, list) and all(map(is_plain, given)):  # most rows
            return {"conversations": given}
        messages = messages_of(given, f'"{name}"')
        for other in LISTS:
            if other != name and present(row, other) and messages_of(row[other]) != messages:
                raise UserError(f'has "{name}" and "{other}", which differ; {leave_out(other)}')
        used = [name]
    else:
        messages, used = exchange(row)
    messages = with_system_and_tools(row, messages)
    check_the_rest(row, messages, used)
    return {"conversations": messages, **truth_of(row, () if name else used)}


def as_prompt(row: Row) -> Row:
    """As `as_conversation`, but the last answer may be lacking, since the policy writes its own. A
    "solution" or "answer" to a question is the truth, not a turn."""
    if list_name(row):
        return as_conversation(row)
    messages, used = exchange(row, answered=False)
    messages = with_system_and_tools(row, messages)
    check_the_rest(row, messages, used)
    return {"conversations": messages, **truth_of(row)}


def as_pair(row: Row) -> Row:
    """{"chosen": [messages], "rejected": [messages]}, each a whole conversation."""
    if present(row, "preferred_output"):  # OpenAI's
        given = row.get("input")
        names = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
        sides = {side: row.get(name) for side, name in names.items()}
        rest = {k: v for k, v in row.items() if k not in ("input", *names.values())}
        row = {**rest, **(given if isinstance(given, dict) else {"prompt": given}), **sides}
    if not present(row, "rejected") and (other := first_of(row, REJECTED)):
        preferred = {k: v for k, v in row.items() if k != other}
        chosen = as_conversation(preferred)["conversations"]
        end = last_question(chosen)
        row = {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": row[other]}
    if lacking := [f'"{side}"' for side in SIDES if not present(row, side)]:
        raise UserError(
            f'has no {" and ".join(lacking)} (rows are {{"chosen": [messages], "rejected": …}})'
        )
    if row.keys() == set(SIDES) and all(
        isinstance(row[side], list) and all(map(is_plain, row[side])) for side in SIDES
    ):
        return row
    name, used = list_name(row), list(SIDES)
    prompt = messages_of(row[name], f'"{name}"') if name else []
    if prompt and prompt[-1]["role"] == "assistant":  # UltraFeedback has the chosen side twice
        if prompt != side_messages(row["chosen"], "chosen"):
            raise UserError(f'has "{name}" that are neither the prompt nor "chosen"')
        prompt = []
    if name:
        used.append(name)
    if not prompt and first_of(row, QUESTIONS):
        prompt, asked = exchange(row, answered=False)
        used += asked
    pair = {side: with_prompt(prompt, row[side], side) for side in SIDES}
    pair = {side: with_system_and_tools(row, messages) for side, messages in pair.items()}
    check_the_rest(row, [*pair["chosen"], *pair["rejected"]], used)
    return pair


def as_text(row: Row, field: str = "text") -> str:
    """The text of a pretraining row."""
    text = row.get(field)
    if not isinstance(text, str):
        raise UserError(
            f'has no "{field}" (pretraining rows are {{"text": "…"}}); '
            "`python scripts/prepare_data.py clean --to text` makes them of conversations"
        )
    if len(row) > 1:
        refuse_media(row)
    return text


# -- parts of rows ---------------------------------------------------------------------------------


def exchange(row: Row, answered: bool = True) -> tuple[list[Message], list[str]]:
    """A question and its answer in separate keys → messages, and the keys that they were in."""
    asked = asked_in(row)
    answers = [name for name in ANSWERS if name != asked]
    if any(present(row, name) for name in TOOLS):
        answers.append("answers")
    if not answered:  # what is no demonstration is the truth
        answers = ["output", "response", "completion"]
    replied = first_of(row, answers)
    if not asked or (answered and not replied):
        raise UserError(what_it_is(row))
    used = [name for name in (asked, replied) if name]
    question, reply = row[asked], row.get(replied)
    messages: list[Message] = []
    if present(row, "history"):
        messages += history(row["history"])
        used.append("history")
    if isinstance(question, list) or MESSAGES_AS_TEXT.match(str(question)):
        messages += messages_of(question, f'"{asked}"')
    elif isinstance(question, str):
        context = first_of(row, [n for n in CONTEXTS if n != asked and present(row, n)])
        used += [context] if context else []
        parts = [text_in(row, name) for name in (asked, context) if name]
        messages.append({"role": "user", "content": "\n".join(parts)})
    else:
        raise UserError(f'has "{asked}" that is neither text nor a list of messages')
    if replied:
        thought = first_of(row, THOUGHTS)
        used += [thought] if thought else []
        if replied == "answers":  # calls, as xLAM has them
            calls = tool_list(reply, replied)
            turns = [{"role": "assistant", "content": "", "tool_calls": calls}]
        else:
            turns = side_messages(reply, replied)
        if thought and len(turns) == 1:
            turns = [{**turns[0], "reasoning_content": text_in(row, thought)}]
        messages += turns
    return messages, used


def history(pairs: Any) -> list[Message]:
    """LLaMA-Factory's earlier turns: pairs of what the user and the assistant said."""
    pairs = as_json(pairs, "history")
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise UserError('has a "history" that is no list of pairs')
    turns = [zip(("user", "assistant"), pair, strict=True) for pair in pairs]
    return [{"role": role, "content": content} for pair in turns for role, content in pair]


def last_question(messages: list[Message]) -> int:
    """Where the answer to the last question begins."""
    return max((n for n, m in enumerate(messages, 1) if m.get("role") == "user"), default=0)


def text_in(row: Row, name: str) -> str:
    if not isinstance(row[name], str):
        raise UserError(f'has "{name}" that is no text')
    return row[name]


def side_messages(given: Any, name: str) -> list[Message]:
    """A completion, or a side of a pair, as messages; it may be given as text or one message."""
    if isinstance(given, int) and not isinstance(given, bool):
        given = str(given)
    if isinstance(given, str) and not MESSAGES_AS_TEXT.match(given):
        return [{"role": "assistant", "content": given}]
    return messages_of([given] if isinstance(given, dict) else given, f'"{name}"')


def with_prompt(prompt: list[Message], given: Any, side: str) -> list[Message]:
    """A side of a pair as a whole conversation, whether it repeats the prompt or not."""
    if isinstance(given, str) and not prompt:
        raise UserError(f'has "{side}" as text, and no "prompt" that it answers')
    messages = side_messages(given, side)
    asks = any(isinstance(m, dict) and m.get("role") == "user" for m in messages)
    if not asks:
        return prompt + messages
    if not all(is_said(m.get("content"), messages) for m in prompt):
        raise UserError(f'has a prompt that its "{side}" messages do not begin with')
    return messages


def with_system_and_tools(row: Row, messages: list[Message]) -> list[Message]:
    """The messages, with the system prompt and the tools that stand beside them in front."""
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    head = first if first.get("role") == "system" else None
    for name in SYSTEMS:
        if present(row, name) and (text := text_in(row, name)):
            if head and head.get("content") not in ("", text):
                raise UserError(f'has "{name}" and another system message; {leave_out(name)}')
            head = {**(head or {"role": "system"}), "content": text}
    for name in TOOLS:
        if present(row, name) and (tools := tool_list(row[name], name)):
            if head and head.get("tools", tools) != tools:
                raise UserError(f'has "{name}" and other tools in a message; {leave_out(name)}')
            head = {**(head or {"role": "system", "content": ""}), "tools": tools}
    rest = messages[1:] if first.get("role") == "system" else messages
    for message in rest:
        if isinstance(message, dict) and message.get("tools"):
            raise UserError(
                f'has "tools" in a message of the {message.get("role")}; a first system message, '
                "or the row itself, may offer them"
            )
    return ([head] if head else []) + rest


def truth_of(row: Row, used: Iterable[str] = ()) -> Row:
    """What rewards compare with, under SPEC's names."""
    truth = {name: row[name] for name in TRUTHS if row.get(name) is not None and name not in used}
    name = first_of(row, [name for name in TRUTH_ALIASES if name not in used])
    if name and not truth:
        value = row[name]
        if name == "reward_model":  # verl's
            value = as_json(value, name)
            value = value.get("ground_truth") if isinstance(value, dict) else value
        if isinstance(value, str | int | float):
            truth["answer"] = value
        elif isinstance(value, list):
            truth["gt"] = value
        else:
            raise UserError(f'has "{name}" that is no text; write the truth as "answer"')
    return truth


def has_messages(row: Row) -> bool:
    return bool(list_name(row))


def has_exchange(row: Row) -> bool:
    """Whether a row has a question and its answer in separate keys."""
    asked = asked_in(row)
    calls = present(row, "answers") and any(present(row, name) for name in TOOLS)
    return bool(asked and (calls or first_of(row, [name for name in ANSWERS if name != asked])))


def asked_in(row: Row) -> str:
    return first_of(row, QUESTIONS) or first_of(row, ("input",))


def list_name(row: Row) -> str:
    """The key of a row's list of messages; "" if it has none."""
    return next((name for name in LISTS if present(row, name)), "")


def first_of(row: Row, names: Iterable[str]) -> str:
    """The first of these keys that says something; "" if none does. "None" may be an answer."""
    return next((name for name in names if row.get(name) not in (None, "", [])), "")


# -- keys that nothing here can express ------------------------------------------------------------


def check_the_rest(row: Row, messages: list[Message], used: Iterable[str]) -> None:
    """UserError for a key that carries meaning and was not read."""
    for name in sorted((row.keys() & MEANINGFUL) - {*used}):
        if not present(row, name):
            continue
        value = row[name]
        if name in MEDIA:
            refuse_media(row)
        if name in WEIGHTS and value == 1:
            continue
        if name == "label" and not isinstance(value, bool):  # of a class, as hub sets have it
            continue
        if name in SIDES:
            if is_said(last_text(value), messages):
                continue
            raise UserError(f'has "{name}" beside its messages: a pair for train_dpo.py')
        if name in REPEATED and (value is False or is_said(value, messages)):
            continue
        raise UserError(f'has "{name}", which the training cannot use; {leave_out(name)}')


def last_text(value: Any) -> Any:
    last = value[-1] if isinstance(value, list) else value
    return last.get("content", last.get("value")) if isinstance(last, dict) else last


def what_it_is(row: Row) -> str:
    """Why a row without messages is no conversation."""
    no = 'has no "conversations" (a list of messages {"role": "user", "content": "…"})'
    if is_pair(row):
        return f"{no}: it is a preference pair, for train_dpo.py or train_reward.py"
    if isinstance(row.get("text"), str):
        return f"{no}: it is a text, for train_pretrain.py"
    if asked := asked_in(row):
        return f'has "{asked}" and no answer to it'
    if present(row, "segments"):
        return f'{no}, and "segments" are not read; write them as messages'
    return f"{no}, and its keys ({', '.join(map(str, row)) or 'none'}) are of no known form"

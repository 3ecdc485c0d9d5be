"""Messages of any form → messages in MiniMind's form.

{"role": "system" | "user" | "assistant" | "tool", "content": text}, a first system message perhaps
with "tools", an assistant's with "tool_calls" and "reasoning_content"; tools and calls as lists.
"""

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from dataset.forms.files import CLEAN
from dataset.jsonl import parse_json
from model.errors import UserError

Message = dict[str, Any]

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "cot", "chain_of_thought")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "ipython", "tool_response"), "tool"),
}
PLAIN_MESSAGE = {"role", "content"}
# Keys of a message that say whether it carries loss: by default what the assistant says does.
LOSS_KEYS = ("weight", "loss", "loss_mask", "train", "trainable", "training")
# Keys of a message that nothing here can express.
UNREAD = ("refusal", "documents", "reasoning_details", "thinking_blocks", "train_detail")
ABSENT = ("", "null", "none", "nan", "[]", "{}")  # as exporters write that there is nothing


def is_plain(message: Any) -> bool:
    """Whether a message is in MiniMind's form and no more than a text."""
    return (
        isinstance(message, dict)
        and message.keys() == PLAIN_MESSAGE
        and isinstance(message["content"], str)
        and message["role"] in ("user", "assistant", "system")
    )


def messages_of(given: Any, key: str = "messages") -> list[Message]:
    """Messages of any form in MiniMind's; what is no message is left for `check_messages`."""
    given = as_json(given, key.strip('"'))
    if not isinstance(given, list):
        raise UserError(f'has no {key} (a list of messages {{"role": "user", "content": "…"}})')
    if any(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in given):
        return in_order_of_calls(
            [m if is_plain(m) else message_of(m) for m in one_call_turn(given)]
        )
    return [message for turn in given for message in messages_of_turn(turn)]


def messages_of_turn(turn: Any) -> list[Message]:
    """A question and its answer in one object, as XTuner ("input", "output") and Firefly ("human",
    "assistant") have them."""
    for asked, replied in (("input", "output"), ("human", "assistant")):
        if isinstance(turn, dict) and {asked, replied} <= turn.keys() <= {"system", asked, replied}:
            sides = (("system", "system"), ("user", asked), ("assistant", replied))
            return [
                message_of({"role": role, "content": turn[name]})
                for role, name in sides
                if name == replied or turn.get(name)
            ]
    raise UserError('has a message without a "role"')


def one_call_turn(given: list[Any]) -> Iterator[Any]:
    """Calls in messages of their own that follow one another (ms-swift) are one turn's."""
    for is_call, group in groupby(given, key=is_call_message):
        turns = list(group)
        if is_call and len(turns) > 1:
            calls = [
                tool_list(turn.get("content", turn.get("value")), "tool_call") for turn in turns
            ]
            yield {"role": "assistant", "content": "", "tool_calls": sum(calls, [])}
        else:
            yield from turns


def is_call_message(turn: Any) -> bool:
    speaker = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    content = turn.get("content", turn.get("value")) if speaker else None
    return speaker in ("function_call", "tool_call") and "<tool_call>" not in str(content)


def message_of(given: Any) -> Message:
    if not isinstance(given, dict):
        raise UserError('has a message without a "role"')
    speaker = given.get("role", given.get("from"))
    if speaker is None:
        raise UserError('has a message without a "role"')
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"has the unknown role {speaker!r}; known: {', '.join(ROLES)}")
    message = {k: v for k, v in given.items() if k not in ("from", "value") and v is not None}
    content = given["content"] if "content" in given else given.get("value")
    message |= {"role": role, "content": content}
    set_thought(message)
    set_calls(message, speaker.lower())
    set_content(message)
    refuse_unread(message)
    return message


def set_content(message: Message) -> None:
    """The content as text: parts are joined, a number and a tool's JSON result are written out."""
    content, role = message["content"], message["role"]
    if isinstance(content, list) and role != "tool":
        texts = [text_of_part(part, message) for part in content]
        content = "".join(texts)
    elif isinstance(content, int) and not isinstance(content, bool):
        content = str(content)
    elif role == "tool" and isinstance(content, list | dict | float | bool):
        parts = content if isinstance(content, list) else []
        if parts and all(isinstance(p, dict) and p.get("type") == "text" for p in parts):
            content = "".join(text_of_part(part, message) for part in parts)
        else:
            content = json.dumps(content, ensure_ascii=False)
    elif content is None and role in ("assistant", "system"):  # as "" is after an export
        content = ""
    message["content"] = content


def text_of_part(part: Any, message: Message) -> str:
    """The text of a part of a content that is a list, as OpenAI has it."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text") or "", str):
        return part.get("text") or ""
    if kind in ("thinking", "reasoning") and isinstance(part.get(kind), str):
        message["reasoning_content"] = message.get("reasoning_content", "") + part[kind]
        return ""
    media = isinstance(kind, str) and any(name in kind for name in ("image", "audio", "video"))
    why = "the model reads text alone" if media else f"{CLEAN} does not know it either"
    raise UserError(f"has a message of the {message['role']} with a part of type {kind!r}; {why}")


def set_thought(message: Message) -> None:
    """The assistant's thought under "reasoning_content", whatever its key was."""
    names = [name for name in THOUGHTS if name in message]
    thoughts = {name: message.pop(name) for name in names}
    said = {name: t for name, t in thoughts.items() if t is not False and not is_absent(t)}
    for name, thought in said.items():
        if not isinstance(thought, str):
            raise UserError(f'has a "{name}" that is no text')
        if message["role"] != "assistant":
            raise UserError(
                f'has a "{name}" in a message of the {message["role"]}; only answers have one'
            )
    if len(set(said.values())) > 1:
        raise UserError(f"has several thoughts in one message ({', '.join(said)}), which differ")
    if said:
        message["reasoning_content"] = next(iter(said.values()))


def set_calls(message: Message, speaker: str) -> None:
    """Tools and tool calls as lists, and OpenAI's former "function_call" as one of them."""
    for name in ("tools", "tool_calls"):
        if name in message:
            value = tool_list(message.pop(name), name)
            if value:
                message[name] = value
    call = message.pop("function_call", None)
    if speaker in ("function_call", "tool_call") and not message.get("tool_calls"):
        content = message["content"]
        if not (isinstance(content, str) and "<tool_call>" in content):
            call, message["content"] = content, ""
    if not is_absent(call):
        message["tool_calls"] = [*message.get("tool_calls", []), *tool_list(call, "function_call")]
    if message.get("tool_calls") and message["role"] != "assistant":
        raise UserError(
            f'has "tool_calls" in a message of the {message["role"]}; only answers have them'
        )


def tool_list(value: Any, name: str) -> list[Any]:
    """Tools or calls, which may be JSON in a text, so that the columns of a table are uniform."""
    value = as_json(value, name)
    if is_absent(value):
        return []
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f'has "{name}" that are no list of objects')
    if name == "functions":  # OpenAI's former form of tools
        value = [f if "function" in f else {"type": "function", "function": f} for f in value]
    return value


def as_json(value: Any, name: str) -> Any:
    """The value of JSON that is given as text."""
    if not isinstance(value, str) or is_absent(value):
        return value
    try:
        return parse_json(value)
    except UserError as error:
        raise UserError(f'has "{name}" whose text {error}') from None


def in_order_of_calls(messages: list[Message]) -> list[Message]:
    """Results of tools in the order of their calls, since templates write no ids."""
    order: dict[str, int] = {}
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            ids = [call.get("id") for call in message.get("tool_calls", [])]
            order = {identity: n for n, identity in enumerate(ids) if isinstance(identity, str)}
        elif message["role"] == "tool" and messages[at - 1]["role"] != "tool" and order:
            end = at
            while end < len(messages) and messages[end]["role"] == "tool":
                end += 1
            results = messages[at:end]
            if all(str(result.get("tool_call_id")) in order for result in results):
                messages[at:end] = sorted(results, key=lambda m: order[str(m["tool_call_id"])])
    return messages


def present(row: dict[str, Any], name: str) -> bool:
    """Whether a key says something: "null" as text, as exporters write it, is absence too."""
    return name in row and not is_absent(row[name])


def is_absent(value: Any) -> bool:
    if value is None or value in ([], {}) or value != value:  # NaN, of an empty cell
        return True
    return isinstance(value, str) and len(value) < 8 and value.strip().lower() in ABSENT


def refuse_media(row: dict[str, Any]) -> None:
    for name in MEDIA:
        if present(row, name):
            raise UserError(f'has "{name}", and the model reads text alone; {leave_out(name)}')


def refuse_unread(message: Message) -> None:
    role = message["role"]
    for name in (*MEDIA, *UNREAD):
        if present(message, name):
            refuse_media(message)
            raise UserError(f'has "{name}" in a message of the {role}; {leave_out(name)}')
    for name in LOSS_KEYS:
        has_loss = role == "assistant"
        if name in message and message[name] != has_loss:
            raise UserError(
                f'has "{name}": {json.dumps(message[name])} in a message of the {role}; there is '
                f"loss on all answers and on nothing else; {leave_out(name)}"
            )
    if present(message, "name") and role != "tool" and message["name"] != role:
        raise UserError(
            f'has "name" in a message of the {role}, which is not shown; {leave_out("name")}'
        )


def is_said(value: Any, messages: list[Message]) -> bool:
    """Whether the messages hold this text, or these messages."""
    if isinstance(value, list):
        return all(is_said(item, messages) for item in value)
    if isinstance(value, dict):  # a message
        value = value.get("content", value.get("value"))
    texts = [m.get(name) for m in messages for name in ("content", "reasoning_content")]
    said = [text for text in texts if isinstance(text, str)]
    return isinstance(value, str) and any(value.strip() in text for text in said)


def says_nothing(message: Message) -> bool:
    """Whether an answer is empty: it is a place that the model has to fill."""
    return not any(message.get(name) for name in ("content", "reasoning_content", "tool_calls"))


def answered_part(messages: list[Message]) -> list[Message]:
    """The conversation without an empty answer at its end; [] if no answer is left."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant" and says_nothing(messages[end - 1]):
        end -= 1
    answers = any(message["role"] == "assistant" for message in messages[:end])
    return messages[:end] if answers else []


def leave_out(key: str) -> str:
    return f"`python scripts/prepare_data.py clean --drop_keys {key}` leaves it out"

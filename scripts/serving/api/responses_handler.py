"""POST /v1/responses: OpenAI's newer API for chats, which openai-agents and the AI SDK use.

A request is put into the form of a chat and answered as one. Replies are kept in memory, the newest
thousand of them, for clients that refer to them (previous_response_id, item_reference).
"""

import secrets
from collections import OrderedDict
from typing import Any

from pydantic import ValidationError

from scripts.serving.api.chat_handler import ChatHandler
from scripts.serving.api.errors import ApiError
from scripts.serving.api.normalize import MALFORMED, normalize_chat, text_of
from scripts.serving.api.openai_types import ChatRequest, ResponsesRequest, invalid
from scripts.serving.api.service import Delta, Service

MAX_STORED = 1000
Json = dict[str, Any]

# What a request may hold without any effect, and what of a chat has the same name.
IGNORED = {"include", "truncation", "max_tool_calls", "stream_options", "context_management"}
NOT_HERE = {"background": (False,), "conversation": (), "prompt": ()}
STATED = ("instructions", "max_output_tokens", "previous_response_id", "temperature", "top_p")


class ResponseStore:
    """The newest responses: the items of each conversation, and single items, by their ids."""

    def __init__(self) -> None:
        self.items: OrderedDict[str, list[Json]] = OrderedDict()

    def add(self, identity: str, items: list[Json]) -> None:
        self.items[identity] = items
        while len(self.items) > MAX_STORED:
            self.items.popitem(last=False)

    def get(self, identity: Any) -> list[Json]:
        if not isinstance(identity, str) or identity not in self.items:
            raise ApiError(
                f"there is no {identity!r} here (any more); send the whole conversation as input",
                404,
                param="input",
            )
        return self.items[identity]


class ResponsesHandler(ChatHandler):
    id_prefix = "resp"
    chunk_type = "response"
    ends_with_done = False

    def __init__(self, service: Service, store: ResponseStore, asked: ResponsesRequest):
        self.asked, self.store = asked, store
        self.conversation = conversation_of(asked, store)
        if len(self.conversation) > service.args.max_messages:
            raise ApiError(
                f"the conversation has {len(self.conversation)} items, more than "
                f"{service.args.max_messages} (--max_messages)",
                param="input",
            )
        try:
            chat = ChatRequest.model_validate(normalize_chat(chat_of(asked, self.conversation)))
        except ValidationError as error:
            raise invalid(error) from error
        except MALFORMED as error:
            raise ApiError("the input is not in the form of OpenAI's API", param="input") from error
        super().__init__(service, chat)
        self.output: list[Json] = []
        self.num_events = 0

    # -- reply -------------------------------------------------------------------------------------

    def add_delta(self, index: int, delta: Delta) -> None:
        self.chunks(index, delta)

    def chunks(self, index: int, delta: Delta) -> list[Json]:
        events = []
        for part in self.parse_delta(index, delta):
            for call in part.get("tool_calls", ()):
                events += [*self.close_item(), *self.call_events(call)]
            if text := part.get("reasoning_content"):
                events += self.text_events("reasoning", text)
            if text := part.get("content"):
                events += self.text_events("message", text)
        return [self.numbered(event) for event in events]

    def text_events(self, kind: str, text: str) -> list[Json]:
        """Add text to the current item, or to a new one if that is of another kind."""
        events, item = [], self.output[-1] if self.output else None
        if item is None or item["type"] != kind or item["status"] != "in_progress":
            events += self.close_item()
            prefix = "msg" if kind == "message" else "rs"
            item = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, "content": []}
            item |= {"role": "assistant"} if kind == "message" else {"summary": []}
            item["status"] = "in_progress"
            events += self.added(item)
            item["content"] = [text_part(kind, "")]
            place = {"item_id": item["id"], "output_index": len(self.output) - 1}
            part = text_part(kind, "")
            events.append(
                {"type": "response.content_part.added", **place, "content_index": 0, "part": part}
            )
        item["content"][0]["text"] += text
        name = "output_text" if kind == "message" else "reasoning_text"
        events.append({"type": f"response.{name}.delta", **self.place(), "delta": text})
        if kind == "message":
            events[-1]["logprobs"] = []
        return events

    def call_events(self, call: Json) -> list[Json]:
        function = call["function"]
        item = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "status": "in_progress",
        }
        item |= {"call_id": call["id"], "name": function["name"], "arguments": ""}
        events = self.added(item)
        item |= {"arguments": function["arguments"], "status": "completed"}
        place = {"item_id": item["id"], "output_index": len(self.output) - 1}
        name = "response.function_call_arguments"
        events.append({"type": f"{name}.delta", **place, "delta": item["arguments"]})
        events.append({"type": f"{name}.done", **place, "arguments": item["arguments"]})
        events[-1]["name"] = item["name"]
        return [*events, self.done(item)]

    def close_item(self) -> list[Json]:
        """The events that end the current item, if it is a text."""
        item = self.output[-1] if self.output else None
        if item is None or item["status"] != "in_progress":
            return []
        item["status"] = "completed"
        part = item["content"][0]
        name = "output_text" if item["type"] == "message" else "reasoning_text"
        done = {"type": f"response.{name}.done", **self.place(), "text": part["text"]}
        if item["type"] == "message":
            done["logprobs"] = []
        ended = {"type": "response.content_part.done", **self.place(), "part": part}
        return [done, ended, self.done(item)]

    def added(self, item: Json) -> list[Json]:
        self.output.append(item)
        index = len(self.output) - 1
        return [{"type": "response.output_item.added", "output_index": index, "item": {**item}}]

    def done(self, item: Json) -> Json:
        index = len(self.output) - 1
        return {"type": "response.output_item.done", "output_index": index, "item": {**item}}

    def place(self) -> Json:
        index = len(self.output) - 1
        return {"item_id": self.output[-1]["id"], "output_index": index, "content_index": 0}

    def numbered(self, event: Json) -> Json:
        self.num_events += 1
        return {**event, "sequence_number": self.num_events - 1}

    # -- response ----------------------------------------------------------------------------------

    def beginning(self) -> list[Json]:
        response = self.response_object("in_progress")
        names = ("response.created", "response.in_progress")
        return [self.numbered({"type": name, "response": response}) for name in names]

    def ending(self) -> list[Json]:
        events = self.close_item()
        response = self.response()
        name = f"response.{response['status']}"
        return [self.numbered(each) for each in (*events, {"type": name, "response": response})]

    def error_event(self, error: ApiError) -> Json:
        body = error.body["error"]
        told = {name: body[name] for name in ("code", "message", "param")}
        return self.numbered({"type": "error", **told})

    def response(self) -> Json:
        self.close_item()
        if not self.output:  # a reply without a word is one, too
            self.text_events("message", "")
            self.close_item()
        incomplete = self.choices[0].finish_reason == "length"
        if incomplete and "status" in self.output[-1]:
            self.output[-1]["status"] = "incomplete"
        if self.asked.store is not False:
            for item in self.output:
                self.store.add(item["id"], [item])
            self.store.add(self.id, self.conversation + self.output)
        return self.response_object("incomplete" if incomplete else "completed")

    def response_object(self, status: str) -> Json:
        body, usage = self.body, None
        if status != "in_progress":
            counted = self.usage()
            usage = {
                "input_tokens": counted["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": counted["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counted["total_tokens"],
            }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "model": self.service.args.model_name,
            "output": [] if status == "in_progress" else self.output,
            "parallel_tool_calls": True,
            "tool_choice": self.asked.tool_choice or "auto",
            "tools": [
                {"type": "function", "strict": None, **tool.function.model_dump(exclude_none=True)}
                for tool in body.tools or ()
            ],
            "text": self.asked.text or {"format": {"type": "text"}},
            "reasoning": self.asked.reasoning or {"effort": None, "summary": None},
            "truncation": "disabled",
            "store": self.asked.store is not False,
            "metadata": self.asked.metadata or {},
            "usage": usage,
            **{name: getattr(self.asked, name) for name in STATED},
        }


def text_part(kind: str, text: str) -> Json:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


# -- request ---------------------------------------------------------------------------------------


def conversation_of(asked: ResponsesRequest, store: ResponseStore) -> list[Json]:
    """All items of the conversation so far, those that are only referred to included."""
    items = list(store.get(asked.previous_response_id)) if asked.previous_response_id else []
    given = asked.input
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        if not isinstance(item, dict):
            raise ApiError("items of input are objects", param="input")
        reference = item.get("type") == "item_reference"
        items += store.get(item.get("id")) if reference else [item]
    return items


def chat_of(asked: ResponsesRequest, items: list[Json]) -> Json:
    """The body of a chat completion that asks the same."""
    body = {key: value for key, value in asked.model_dump().items() if value is not None}
    for name, neutral in NOT_HERE.items():
        if name in body and body[name] not in neutral:
            raise ApiError(f"{name} is not supported here", param=name)
    for name in (*IGNORED, *NOT_HERE, "input", "previous_response_id"):
        body.pop(name, None)
    instructions = body.pop("instructions", None)
    system = [{"role": "system", "content": instructions}] if instructions else []
    body["messages"] = system + messages_of(items)
    if "max_output_tokens" in body:
        body["max_completion_tokens"] = body.pop("max_output_tokens")
    form = body.pop("text", {}).get("format")
    if isinstance(form, dict):
        if form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": {**form}}
        body["response_format"] = form
    return body


def messages_of(items: list[Json]) -> list[Json]:
    """Items as the messages of a chat: calls belong to the assistant's message before them."""
    messages: list[Json] = []
    for item in items:
        kind = item.get("type", "message")
        last = messages[-1] if messages else {}
        if kind == "message":
            message = {"role": item.get("role"), "content": item.get("content")}
            if last.get("role") == "assistant" == message["role"] and "content" not in last:
                last["content"] = message["content"]  # the answer after a thought
            else:
                messages.append(message)
        elif kind == "reasoning":
            thought = [part for part in item.get("content") or () if isinstance(part, dict)]
            text = "".join(str(part.get("text") or "") for part in thought)
            if text:
                messages.append({"role": "assistant", "reasoning_content": text})
        elif kind == "function_call":
            if last.get("role") != "assistant":
                last = {"role": "assistant", "content": ""}
                messages.append(last)
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            last["tool_calls"] = [*last.get("tool_calls", ()), call]
        elif kind == "function_call_output":
            output = text_of(item.get("output"))
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
            )
        else:
            raise ApiError(f"items of type {kind!r} are not supported here", param="input")
    return messages

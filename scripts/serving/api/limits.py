"""Limits before work: what a request may cost is checked before it is parsed, validated, tokenised.

A request passes, in this order: its key (access.py), the time and size of its HTTP form (here), the
counts of its JSON (here), the types (openai_types.py), and the lengths of texts, which its handler
checks before it tokenises them.
"""

import asyncio
import json
import math
from typing import Any

from fastapi import Request as HttpRequest
from uvicorn.protocols.http.h11_impl import H11Protocol

from scripts.serving.api.errors import ApiError
from scripts.serving.arguments import ServerArgs

MAX_VALUES = 50_000  # of a body's JSON: all numbers, texts, lists and objects
MAX_DEPTH = 64  # of lists and objects in each other
MAX_FIELDS = 200  # of a body: OpenAI documents some forty

# -- HTTP ------------------------------------------------------------------------------------------


async def read_body(http: HttpRequest, args: ServerArgs) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is no JSON, is too large, or does not come in time.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):  # as a page of another site can send without asking: CORS allows it plain text
        raise ApiError("the body must be JSON: send the header Content-Type: application/json")
    too_large = ApiError(
        f"the body is larger than {args.max_body} bytes (--max_body)", 413, code="body_too_large"
    )
    length = http.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > args.max_body:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(args.max_wait):
            async for part in http.stream():
                parts.append(part)
                size += len(part)
                if size > args.max_body:
                    raise too_large
    except TimeoutError:
        message = f"the body did not come within {args.max_wait:g} s (--max_wait)"
        raise ApiError(message, 408) from None
    return b"".join(parts)


def patient_protocol(args: ServerArgs) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection that does not send a request in time; uvicorn
    itself waits for the first one for ever, and for the end of each."""

    class Protocol(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.deadline:
                self.deadline.cancel()
            super().connection_lost(exc)

        def watch(self) -> None:
            """Start the clock where no request is being answered, and stop it where one is."""
            waits = self.cycle is None or self.cycle.response_complete
            if waits and self.deadline is None:
                self.deadline = self.loop.call_later(args.max_wait, self.give_up)
            elif not waits and self.deadline:
                self.deadline.cancel()
                self.deadline = None

        def give_up(self) -> None:
            self.deadline = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Protocol


# -- JSON ------------------------------------------------------------------------------------------


def parse(data: bytes, args: ServerArgs) -> Any:
    """The JSON of a body.

    Raises:
        ApiError: it is none, or has more of something than the server takes.
    """
    try:
        body = json.loads(data, parse_constant=no_number, parse_float=finite)
    except RecursionError:
        raise too_deep() from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise ApiError(f"the body is no JSON that can be read: {str(error)[:200]}") from None
    check_values(body)
    if isinstance(body, dict):
        check_counts(body, args)
    return body


def no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else no_number(digits[:50])


def check_values(body: Any) -> None:
    """ApiError for JSON that holds too much or is nested too deeply."""
    level, count, depth = [body], 0, 0
    while level:
        depth += 1
        count += len(level)
        if depth > MAX_DEPTH + 1:
            raise too_deep()
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, list):
                below += value
            if count + len(below) > MAX_VALUES:
                raise ApiError(f"the body has more than {MAX_VALUES} values")
        level = below


def too_deep() -> ApiError:
    return ApiError(f"lists and objects of the body are nested more than {MAX_DEPTH} deep")


def check_counts(body: dict[str, Any], args: ServerArgs) -> None:
    """ApiError for a list that is longer than the server takes."""
    if len(body) > MAX_FIELDS:
        raise ApiError(f"the body has {len(body)} fields, more than {MAX_FIELDS}")
    most = {
        "messages": ("max_messages", args.max_messages),
        "input": ("max_messages", args.max_messages),
        "tools": ("max_tools", args.max_tools),
        "stop": ("", 16),
        "logit_bias": ("", 10_000),
    }
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        is_tokens = bool(prompt) and isinstance(prompt[0], int)
        flag = "max_length" if is_tokens else "max_replies"
        most["prompt"] = (flag, getattr(args, flag))
    for name, (flag, limit) in most.items():
        value = body.get(name)
        if isinstance(value, list | dict) and len(value) > limit:
            told = f" (--{flag})" if flag else ""
            raise ApiError(f"{name} has {len(value)} items, more than {limit}{told}", param=name)
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop")
    for stop in stops if isinstance(stops, list) else ():
        if isinstance(stop, str) and len(stop) > args.max_stop:
            raise ApiError(
                f"a stop string has {len(stop)} characters, more than {args.max_stop} (--max_stop)",
                param="stop",
            )


def check_schema(schema: Any, args: ServerArgs, param: str) -> None:
    """ApiError for a schema that is too large to be compiled."""
    size = len(json.dumps(schema))
    if size > args.max_schema:
        raise ApiError(
            f"the schema has {size} characters, more than {args.max_schema} (--max_schema)",
            param=param,
        )

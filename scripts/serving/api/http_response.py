"""The HTTP response to a request: one JSON object, or a stream of server-sent events."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse

from scripts.serving.api.errors import ApiError
from scripts.serving.api.handler import Handler
from scripts.serving.api.normalize import clean
from scripts.serving.api.service import Delta

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
DISCONNECT_CHECK_SECONDS = 0.2

Deltas = AsyncGenerator[tuple[int, Delta], None]


async def respond(handler: Handler, http: HttpRequest) -> Response:
    """Decode a request and answer it, as a stream if it asks for one."""
    await handler.prepare()
    deltas = handler.service.stream(handler.requests)
    # Waits for the first delta: a full queue must still be able to set the HTTP status.
    first = await anext(deltas)
    if handler.body.stream:
        # no cache, no proxy and no compression may hold back the parts of a stream
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **handler.headers}
        stream = events(handler, first, deltas)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    try:
        last_check = time.monotonic()
        handler.add_delta(*first)
        async for index, delta in deltas:
            handler.add_delta(index, delta)
            await asyncio.sleep(0)  # deltas that came together do not hold the event loop up
            # nobody tells when the client is gone: ask, so that its requests can be cancelled
            if time.monotonic() > last_check + DISCONNECT_CHECK_SECONDS:
                last_check = time.monotonic()
                if await http.is_disconnected():
                    break
    finally:
        await deltas.aclose()
    text = await asyncio.to_thread(lambda: as_json(handler.response()))
    return Response(text, media_type="application/json", headers=handler.headers)


def as_json(value: Any) -> str:
    # in pieces: one call of dumps would hold Python's lock until its end
    return "".join(ENCODER.iterencode(clean(value)))


async def events(handler: Handler, first: tuple[int, Delta], deltas: Deltas) -> AsyncIterator[str]:
    """Server-sent events. Starlette closes this when the client is gone, which cancels decoding."""
    try:
        for chunk in [*handler.beginning(), *handler.chunks(*first)]:
            yield event(chunk)
        async for index, delta in deltas:
            for chunk in handler.chunks(index, delta):
                yield event(chunk)
        for chunk in handler.ending():
            yield event(chunk)
        if handler.ends_with_done:
            yield "data: [DONE]\n\n"
    except ApiError as error:  # too late for an HTTP status
        yield event(handler.error_event(error))
    finally:
        await deltas.aclose()


def event(data: dict[str, Any]) -> str:
    """One event; those of /v1/responses have their type as a name."""
    name = f"event: {data['type']}\n" if isinstance(data.get("type"), str) else ""
    return f"{name}data: {json.dumps(clean(data), ensure_ascii=False)}\n\n"

"""The HTTP response to a request: one JSON object, or a stream of server-sent events."""

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from scripts.serving.api.errors import ApiError
from scripts.serving.api.handler import Handler
from scripts.serving.api.service import Delta

DISCONNECT_CHECK_SECONDS = 0.2

Deltas = AsyncGenerator[tuple[int, Delta], None]


async def respond(handler: Handler, http: HttpRequest) -> Response:
    """Decode a request and answer it, as a stream if it asks for one."""
    deltas = handler.service.stream(handler.requests)
    # Waits for the first delta: a full queue must still be able to set the HTTP status.
    first = await anext(deltas)
    if handler.body.stream:
        return StreamingResponse(events(handler, first, deltas), media_type="text/event-stream")
    try:
        last_check = time.monotonic()
        handler.add_delta(*first)
        async for index, delta in deltas:
            handler.add_delta(index, delta)
            # nobody tells when the client is gone: ask, so that its requests can be cancelled
            if time.monotonic() > last_check + DISCONNECT_CHECK_SECONDS:
                last_check = time.monotonic()
                if await http.is_disconnected():
                    break
    finally:
        await deltas.aclose()
    return JSONResponse(handler.response())


async def events(handler: Handler, first: tuple[int, Delta], deltas: Deltas) -> AsyncIterator[str]:
    """Server-sent events. Starlette closes this when the client is gone, which cancels decoding."""
    try:
        for chunk in handler.chunks(*first):
            yield event(chunk)
        async for index, delta in deltas:
            for chunk in handler.chunks(index, delta):
                yield event(chunk)
        if handler.body.stream_options and handler.body.stream_options.include_usage:
            yield event(handler.chunk([]) | {"usage": handler.usage()})
        yield "data: [DONE]\n\n"
    except ApiError as error:  # too late for an HTTP status
        yield event(error.body)
    finally:
        await deltas.aclose()


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"

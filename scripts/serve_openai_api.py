"""Serve a model over OpenAI's API, for chat programs, libraries and your own code.

    python scripts/serve_openai_api.py                             own weights, out/full_sft_*.pth
    python scripts/serve_openai_api.py --load_from ./MiniMind2     any transformers folder
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "minimind", "messages": [{"role": "user", "content": "Who are you?"}]}'

One engine decodes all requests with continuous batching (model/inference/engine.py). The endpoints
are /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /health and /metrics.
"""

import asyncio
import errno
import gc
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from model.command_line import parse_command_line
from model.errors import UserError, exit_on_user_error
from scripts.serving.arguments import ServerArgs

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(ServerArgs, __doc__)


import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import PlainTextResponse, Response
from pydantic import BeforeValidator

from scripts.serving.api.access import add_access_rules
from scripts.serving.api.chat_handler import ChatHandler
from scripts.serving.api.completion_handler import CompletionHandler
from scripts.serving.api.errors import add_error_handlers
from scripts.serving.api.handler import Handler
from scripts.serving.api.http_response import respond
from scripts.serving.api.limits import patient_protocol
from scripts.serving.api.normalize import clean, lenient, normalize_chat, normalize_completion
from scripts.serving.api.openai_types import (
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    describe_bodies,
    validator,
)
from scripts.serving.api.responses_handler import ResponsesHandler, ResponseStore
from scripts.serving.api.service import Service
from scripts.serving.loading import ChatModel, load_chat_model

SHUTDOWN_SECONDS = 30  # for running requests to finish after Ctrl-C


def main(args: ServerArgs) -> None:
    sockets = bind(args.host, args.port)
    loaded = load_chat_model(args)
    millions = loaded.num_parameters / 1e6
    print(f"{loaded.name}: {millions:.2f}M parameters, {loaded.model.device}")
    port = sockets[0].getsockname()[1]
    print(f"http://{args.host}:{port}/v1, model {args.model_name}; Ctrl-C stops the server")
    make_server(args, loaded, log_level="warning").run(sockets=sockets)


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of the host; UserError if there is none to listen on, which is
    told before a model is loaded."""
    bound = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(found):
            bound.append(socket.socket(family))
            if os.name == "posix":  # elsewhere it would share the port with another server
                bound[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                bound[-1].bind(address)
            except OSError as error:
                bound.pop().close()
                if error.errno != errno.EADDRNOTAVAIL or len(found) == 1:
                    raise  # but localhost may have an address of IPv6 that this machine has not
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"the server cannot listen on --host {host} --port {port}: {error}"
        ) from error
    return bound


def make_server(args: ServerArgs, loaded: ChatModel, **settings: Any) -> uvicorn.Server:
    config = uvicorn.Config(
        make_app(args, loaded),
        http=patient_protocol(args),
        ws="none",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        **settings,
    )
    return uvicorn.Server(config)


def make_app(args: ServerArgs, loaded: ChatModel) -> FastAPI:
    service = Service(args, loaded)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        gc.collect()
        gc.freeze()  # a search through all of torch's objects would take half a second
        yield
        gc.unfreeze()
        await asyncio.to_thread(service.stop, SHUTDOWN_SECONDS)

    app = FastAPI(title="MiniMind", lifespan=lifespan)
    app.state.service = service
    add_error_handlers(app)
    add_access_rules(app, args)
    errors = {status: {"description": "OpenAI's error object"} for status in (400, 404, 429, 500)}
    errors |= dict.fromkeys((401, 403, 408, 413), errors[400])
    stream = {200: {"content": {"text/event-stream": {}}}}  # or JSON, as the request asks

    # a request is put in OpenAI's form before it is validated
    strict, responses_so_far = args.strict_requests, ResponseStore()
    Chat = Annotated[ChatRequest, BeforeValidator(lenient(normalize_chat, strict))]
    Text = Annotated[CompletionRequest, BeforeValidator(lenient(normalize_completion, strict))]
    Turn = Annotated[ResponsesRequest, BeforeValidator(clean)]

    def answer(path: str, make: Callable[[Any], Handler]) -> None:
        async def post(http: HttpRequest) -> Response:
            return await respond(await service.prepare(http, make), http)

        app.post(path, name=path.rpartition("/")[2], responses=errors | stream)(post)

    chat, text, turn = validator(Chat), validator(Text), validator(Turn)
    answer("/v1/chat/completions", lambda body: ChatHandler(service, chat(body)))
    answer("/v1/completions", lambda body: CompletionHandler(service, text(body)))
    answer("/v1/responses", lambda body: ResponsesHandler(service, responses_so_far, turn(body)))
    describe_bodies(
        app,
        {
            "/v1/chat/completions": ChatRequest,
            "/v1/completions": CompletionRequest,
            "/v1/responses": ResponsesRequest,
        },
    )

    @app.get("/v1/models", responses=errors)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card]}

    @app.get("/v1/models/{name:path}", responses=errors)
    async def get_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model_card

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        text = service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

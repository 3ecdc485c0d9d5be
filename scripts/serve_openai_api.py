"""Serve a model over OpenAI's API, for chat programs, libraries and your own code.

    python scripts/serve_openai_api.py                             own weights, out/full_sft_*.pth
    python scripts/serve_openai_api.py --load_from ./MiniMind2     any transformers folder
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "minimind", "messages": [{"role": "user", "content": "Who are you?"}]}'

One engine decodes all requests with continuous batching (model/inference/engine.py). The endpoints
are /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /health and /metrics.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from model.command_line import parse_command_line
from model.errors import exit_on_user_error
from scripts.serving.arguments import ServerArgs

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(ServerArgs, __doc__)


import uvicorn
from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import PlainTextResponse, Response
from pydantic import BeforeValidator

from scripts.serving.api.browsers import add_browser_rules
from scripts.serving.api.chat_handler import ChatHandler
from scripts.serving.api.completion_handler import CompletionHandler
from scripts.serving.api.errors import add_error_handlers
from scripts.serving.api.http_response import respond
from scripts.serving.api.normalize import clean, lenient, normalize_chat, normalize_completion
from scripts.serving.api.openai_types import ChatRequest, CompletionRequest, ResponsesRequest
from scripts.serving.api.responses_handler import ResponsesHandler, ResponseStore
from scripts.serving.api.service import Service
from scripts.serving.loading import ChatModel, load_chat_model

SHUTDOWN_SECONDS = 30  # for running requests to finish after Ctrl-C


def main(args: ServerArgs) -> None:
    loaded = load_chat_model(args)
    millions = loaded.num_parameters / 1e6
    print(f"{loaded.name}: {millions:.2f}M parameters, {loaded.model.device}")
    print(f"http://{args.host}:{args.port}/v1, model {args.model_name}; Ctrl-C stops the server")
    uvicorn.run(
        make_app(args, loaded),
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


def make_app(args: ServerArgs, loaded: ChatModel) -> FastAPI:
    service = Service(args, loaded)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.thread.stop, SHUTDOWN_SECONDS)

    app = FastAPI(title="MiniMind", lifespan=lifespan)
    app.state.service = service
    add_error_handlers(app)
    add_browser_rules(app, args)
    errors = {status: {"description": "OpenAI's error object"} for status in (400, 404, 429, 500)}
    needs_key = dict(
        dependencies=[Depends(service.check_key)], responses={401: errors[400]} | errors
    )

    # a request is put in OpenAI's form before it is validated
    strict, responses_so_far = args.strict_requests, ResponseStore()
    Chat = Annotated[ChatRequest, BeforeValidator(lenient(normalize_chat, strict))]
    Text = Annotated[CompletionRequest, BeforeValidator(lenient(normalize_completion, strict))]
    Turn = Annotated[ResponsesRequest, BeforeValidator(clean)]

    @app.post("/v1/chat/completions", **needs_key)
    async def chat_completions(body: Chat, http: HttpRequest) -> Response:
        return await respond(ChatHandler(service, body), http)

    @app.post("/v1/completions", **needs_key)
    async def completions(body: Text, http: HttpRequest) -> Response:
        return await respond(CompletionHandler(service, body), http)

    @app.post("/v1/responses", **needs_key)
    async def responses(body: Turn, http: HttpRequest) -> Response:
        return await respond(ResponsesHandler(service, responses_so_far, body), http)

    @app.get("/v1/models", **needs_key)
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card]}

    @app.get("/v1/models/{name:path}", **needs_key)
    def get_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model_card

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        text = service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

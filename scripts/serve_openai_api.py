"""A server that speaks OpenAI's API, for chat programs, libraries and your own code.

    python scripts/serve_openai_api.py                             own weights, out/full_sft_*.pth
    python scripts/serve_openai_api.py --load_from ./MiniMind2     any transformers folder
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "minimind", "messages": [{"role": "user", "content": "Who are you?"}]}'

All requests are decoded side by side by one engine (model/inference/engine.py). There are
/v1/chat/completions, /v1/completions, /v1/models, /health and /metrics.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import encode_chat, encode_text
from dataset.reply_parser import ReplyParser
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.inference.engine import Engine, LogProb, QueueFull, Request
from model.inference.engine_thread import EngineThread
from model.inference.grammar import Grammar, Grammars
from model.inference.sampling import Sampling
from model.inference.streaming import TextStream
from scripts.serving.chat_model import ChatModel, ModelArgs, load_chat_model
from scripts.serving.openai_types import (
    ApiError,
    ChatRequest,
    ChosenTool,
    CompletionRequest,
    Message,
    Settings,
)

DRAIN_SECONDS = 30
LOG = logging.getLogger("uvicorn.error")


@dataclass
class Args(ModelArgs):
    host: str = option("127.0.0.1", "who can reach it; 0.0.0.0: other machines too")
    port: int = option(8000, "where it listens")
    api_key: str = option("", "what clients must send; default: nothing")
    model_name: str = option("minimind", "what clients call the model")
    max_batch: int = option(32, "requests that are decoded at a time")
    max_queue: int = option(256, "requests that may wait for that")
    max_length: int = option(4096, "tokens of a prompt and its reply together, at most")
    max_new_tokens: int = option(512, "tokens of a reply, where the client does not say")
    prefill_tokens: int = option(512, "tokens of prompts that are read in one step")
    open_thinking: bool = option(False, "let it think first, where the client does not say")
    temperature: float = option(0.85, "where the client does not say")
    top_p: float = option(0.85, "where the client does not say")

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_length", "max_new_tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.max_queue < 0:
            raise UserError(f"--max_queue must not be negative, as {self.max_queue} is")


def main(args: Args) -> None:
    loaded = load_chat_model(args, args.weight)
    millions = loaded.parameters / 1e6
    print(f"{loaded.name}: {millions:.2f}M parameters, {loaded.model.device}")
    print(f"http://{args.host}:{args.port}/v1, model {args.model_name}; Ctrl-C ends it")
    uvicorn.run(
        make_app(args, loaded),
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )


# -- the application -------------------------------------------------------------------------------


def make_app(args: Args, loaded: ChatModel) -> FastAPI:
    service = Service(args, loaded)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.thread.stop, DRAIN_SECONDS)

    app = FastAPI(title="MiniMind", lifespan=lifespan)
    app.state.service = service
    errors = {status: {"description": "OpenAI's error object"} for status in (400, 404, 429, 500)}
    guarded = dict(dependencies=[Depends(service.check_key)], responses={401: errors[400]} | errors)

    @app.post("/v1/chat/completions", **guarded)
    async def chat(body: ChatRequest, http: HttpRequest) -> Response:
        return await service.answer(Chat(service, body), http)

    @app.post("/v1/completions", **guarded)
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        return await service.answer(Completion(service, body), http)

    @app.get("/v1/models", **guarded)
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{name:path}", **guarded)
    def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.card

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        text = service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(ApiError)
    def refused(http: HttpRequest, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status)

    @app.exception_handler(RequestValidationError)
    def wrong(http: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        message = f"{where}: {first['msg']}" if where else first["msg"]
        return refused(http, ApiError(message, param=where or None))

    @app.exception_handler(HTTPException)
    def elsewhere(http: HttpRequest, error: HTTPException) -> JSONResponse:
        message = f"{http.method} {http.url.path}: {error.detail}"
        response = refused(http, ApiError(message, error.status_code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    def failed(http: HttpRequest, error: Exception) -> JSONResponse:
        return refused(http, failure())

    return app


class Metrics:
    """What /metrics tells, in the names of Prometheus."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        own = dict(namespace="minimind", registry=self.registry)
        self.requests = Counter("requests", "Requests by outcome", ["outcome"], **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **own)
        self.new_tokens = Counter("generated_tokens", "Tokens of replies", **own)
        first = dict(buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30))
        self.first_token = Histogram(
            "first_token_seconds", "Until the first token of a reply", **own, **first
        )
        self.whole = Histogram("request_seconds", "Until a reply was whole", **own)
        Gauge("running", "Requests being decoded", **own).set_function(lambda: len(engine.rows))
        Gauge("waiting", "Requests that wait", **own).set_function(lambda: len(engine.waiting))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Service:
    """The model with its engine, and what all requests share."""

    def __init__(self, args: Args, loaded: ChatModel):
        self.args, self.tokenizer = args, loaded.tokenizer
        self.model = loaded.model
        self.card = {
            "id": args.model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "minimind",
        }
        self.max_length = min(args.max_length, loaded.model.config.max_position_embeddings)
        self.engine = Engine(loaded.model, args.max_batch, args.prefill_tokens, args.max_queue)
        self.metrics = Metrics(self.engine)

    def start(self) -> None:
        self.thread = EngineThread(self.engine)

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer)

    def check_key(self, http: HttpRequest) -> None:
        given = http.headers.get("authorization", "").removeprefix("Bearer ")
        wanted = self.args.api_key
        if wanted and not secrets.compare_digest(given.encode(), wanted.encode()):
            raise ApiError("the API key is missing or wrong", 401, code="invalid_api_key")

    def check_model(self, name: str) -> None:
        if name != self.args.model_name:
            message = f"there is no model {name!r} here, only {self.args.model_name!r}"
            raise ApiError(message, 404, param="model", code="model_not_found")

    def sampling(self, body: Settings, asked: int | None, prompt: list[int]) -> Sampling:
        """How to go on from a prompt, and how long at most."""
        room = self.max_length - len(prompt)
        if room < 1:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens, and prompt and reply together may have "
                f"{self.max_length}",
                param="messages" if isinstance(body, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        args = self.args
        return Sampling(
            max_new_tokens=min(asked or args.max_new_tokens, room),
            temperature=args.temperature if body.temperature is None else body.temperature,
            top_k=body.top_k or 0,
            top_p=args.top_p if body.top_p is None else body.top_p,
            repetition_penalty=body.repetition_penalty or 1.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            seed=None if body.seed is None else body.seed % 2**31,
        )

    async def answer(self, task: "Task", http: HttpRequest) -> Response:
        """Decode what a task asks for: as a stream, or as a whole."""
        parts = self.merged(task)
        first = await anext(parts)  # a refusal comes before the answer begins
        if task.body.stream:
            events = sse(task, first, parts)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            checked = time.monotonic()
            task.collect(*first)
            async for index, news in parts:
                task.collect(index, news)
                if time.monotonic() > checked + 0.2:
                    checked = time.monotonic()
                    if await http.is_disconnected():
                        break
        finally:
            await parts.aclose()
        return JSONResponse(task.whole())

    async def merged(self, task: "Task") -> AsyncIterator[tuple[int, "News"]]:
        """The news of all choices of a task, as they come."""
        news: asyncio.Queue[tuple[int, News] | Exception | None] = asyncio.Queue()

        async def follow(index: int, request: Request) -> None:
            started, told = time.monotonic(), 0
            self.metrics.prompt_tokens.inc(len(request.prompt))
            outcome = "cancelled"
            try:
                async for count in self.thread.follow(request):
                    if not told:
                        self.metrics.first_token.observe(time.monotonic() - started)
                    tokens = request.tokens[told:count]
                    reason = request.finish_reason if count == len(request.tokens) else None
                    logprobs = request.logprobs[told:count]
                    told = count
                    await news.put((index, News(request.text.take(), tokens, logprobs, reason)))
                outcome = request.finish_reason
                await news.put(None)
            except Exception as error:
                outcome = "refused" if isinstance(error, QueueFull) else "failed"
                await news.put(error)
            finally:
                self.metrics.requests.labels(outcome).inc()
                self.metrics.new_tokens.inc(len(request.tokens))
                self.metrics.whole.observe(time.monotonic() - started)

        runs = [asyncio.create_task(follow(*each)) for each in enumerate(task.requests)]
        try:
            left = len(runs)
            while left:
                each = await news.get()
                if isinstance(each, QueueFull):
                    raise ApiError(str(each), 429, "rate_limit_error", code="queue_full")
                if isinstance(each, Exception):
                    LOG.error("a request failed", exc_info=each)
                    raise failure()
                if each is None:
                    left -= 1
                else:
                    yield each
        finally:
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)


def failure() -> ApiError:
    return ApiError("the server failed; its log says how", 500, "server_error")


async def sse(
    task: "Task", first: tuple[int, "News"], parts: AsyncIterator[tuple[int, "News"]]
) -> AsyncIterator[str]:
    """Server-sent events; when the client is gone, closing this cancels what is being decoded."""
    try:
        for chunk in task.chunks(*first):
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        async for index, news in parts:
            for chunk in task.chunks(index, news):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
        if task.body.stream_options and task.body.stream_options.include_usage:
            yield f"data: {json.dumps(task.chunk([]) | {'usage': task.usage()})}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status has been sent
        yield f"data: {json.dumps(error.body)}\n\n"
    finally:
        await parts.aclose()


# -- the two kinds of requests ---------------------------------------------------------------------


@dataclass
class News:
    """What one choice got since the last time."""

    text: str
    tokens: list[int]
    logprobs: list[LogProb]
    reason: str | None  # at the end: "stop" or "length"


class Task:
    """A request of the API: its requests to the engine, and how their replies are told."""

    kind: str

    def __init__(self, service: Service, body: Settings):
        service.check_model(body.model)
        self.service, self.body = service, body
        self.tokenizer: PreTrainedTokenizerBase = service.tokenizer
        self.id = f"{self.kind}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.requests: list[Request] = []

    def add(self, prompt: list[int], asked: int | None, logprobs: int | None, grammar=None) -> None:
        """As many requests as choices are wanted."""
        sampling = self.service.sampling(self.body, asked, prompt)
        for _ in range(self.body.n or 1):
            constraint = grammar(sampling.max_new_tokens) if grammar else None
            text = TextStream(self.tokenizer, self.body.stops)
            row = len(self.requests)
            self.requests.append(Request(prompt, sampling, row, logprobs, constraint, text))

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        model = self.service.args.model_name
        shared = {"id": self.id, "object": kind, "created": self.created, "model": model}
        return shared | {"choices": choices}

    def usage(self) -> dict[str, int]:
        prompt = sum(len(r.prompt) for r in self.requests[:: self.body.n or 1])
        new = sum(len(r.tokens) for r in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
        }

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token])


class Chat(Task):
    kind = "chatcmpl"

    def __init__(self, service: Service, body: ChatRequest):
        super().__init__(service, body)
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        choice = body.tool_choice or ("auto" if tools else "none")
        if choice not in ("none", "auto") and not tools:
            raise ApiError("tool_choice needs tools", param="tool_choice")
        forced = choice not in ("none", "auto")
        shaped = body.response_format is not None and body.response_format.type != "text"
        if forced and shaped:
            raise ApiError("response_format and a forced tool call exclude each other")
        wanted = service.args.open_thinking if body.thinking is None else body.thinking
        self.thinking = wanted and not (forced or shaped)
        options: dict[str, Any] = {"open_thinking": True} if self.thinking else {}
        if tools and choice != "none":
            options["tools"] = tools
        messages = [as_message(message) for message in body.messages]
        try:
            prompt = encode_chat(
                self.tokenizer, messages, add_generation_prompt=True, **options
            ).ids
        except UserError as error:
            raise ApiError(str(error), param="messages") from error
        grammar = None
        if shaped:
            grammar = self.json_grammar
        elif forced:
            grammar = self.call_grammar
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self.add(prompt, body.max_completion_tokens or body.max_tokens, logprobs, grammar)
        self.parsers = [ReplyParser(self.thinking) for _ in self.requests]
        self.begun = [False] * len(self.requests)
        self.calls: list[list[dict[str, Any]]] = [[] for _ in self.requests]
        self.said = [{"content": "", "reasoning": ""} for _ in self.requests]
        self.reasons: list[str | None] = [None] * len(self.requests)
        self.told: list[list[dict[str, Any]]] = [[] for _ in self.requests]

    def json_grammar(self, most: int) -> Grammar:
        wanted = self.body.response_format
        schema = wanted.json_schema.schema_ if wanted.json_schema else {"type": "object"}
        try:
            return self.service.grammars.json(schema, most)
        except UserError as error:
            raise ApiError(str(error), param="response_format") from error

    def call_grammar(self, most: int) -> Grammar:
        """A tool call, of the named tool or of any."""
        choice = self.body.tool_choice
        wanted = choice.function.name if isinstance(choice, ChosenTool) else None
        functions = [tool.function for tool in self.body.tools]
        functions = [each for each in functions if wanted in (None, each.name)]
        if not functions:
            raise ApiError(f"there is no tool {wanted!r} among tools", param="tool_choice")
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": each.name},
                    "arguments": each.parameters or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for each in functions
        ]
        schema = json.dumps({"anyOf": calls, "x-guidance": {"whitespace_flexible": False}})
        grammar = f'start: <tool_call> "\\n" call "\\n" </tool_call>\ncall: %json {schema}\n'
        try:
            return self.service.grammars.lark(grammar, most)
        except UserError as error:
            raise ApiError(str(error), param="tool_choice") from error

    def deltas(self, index: int, news: News) -> tuple[list[dict[str, Any]], str | None]:
        """What is new of a choice, in OpenAI's words, and why it ended."""
        parser, found = self.parsers[index], []
        parts = list(parser.feed(news.text))
        if news.reason:
            parts += parser.end()
        for kind, part in parts:
            if kind == "tool_call":
                number = len(self.calls[index])
                function = {
                    "name": part["name"],
                    "arguments": json.dumps(part["arguments"], ensure_ascii=False),
                }
                call = {"id": f"call_{secrets.token_hex(8)}", "type": "function"}
                self.calls[index].append(call | {"function": function})
                found.append({"tool_calls": [{"index": number, **call, "function": function}]})
            else:
                self.said[index][kind] += part
                found.append({"reasoning_content" if kind == "reasoning" else "content": part})
        reason = "tool_calls" if news.reason == "stop" and self.calls[index] else news.reason
        return found, reason

    def chunks(self, index: int, news: News) -> list[dict[str, Any]]:
        deltas, reason = self.deltas(index, news)
        if not self.begun[index]:
            self.begun[index] = True
            deltas = [{"role": "assistant", "content": ""}, *deltas]
        logprobs = self.logprobs(news)
        if logprobs and not deltas:
            deltas = [{}]
        choices = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for delta in deltas
        ]
        if logprobs:
            choices[-1]["logprobs"] = {"content": logprobs, "refusal": None}
        if reason:
            end = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
            choices.append(end)
        return [self.chunk([choice]) for choice in choices]

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.envelope("chat.completion.chunk", choices)

    def collect(self, index: int, news: News) -> None:
        _, reason = self.deltas(index, news)
        self.reasons[index] = reason
        self.told[index] += self.logprobs(news)

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, said in enumerate(self.said):
            calls = self.calls[index]
            message = {"role": "assistant", "content": said["content"] or (None if calls else "")}
            if said["reasoning"]:
                message["reasoning_content"] = said["reasoning"]
            if calls:
                message["tool_calls"] = calls
            told = {"content": self.told[index], "refusal": None}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": told if self.body.logprobs else None,
                    "finish_reason": self.reasons[index],
                }
            )
        return self.envelope("chat.completion", choices) | {"usage": self.usage()}

    def logprobs(self, news: News) -> list[dict[str, Any]]:
        if not self.body.logprobs:
            return []

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.token_text(token)
            told = max(logprob, -9999.0)  # JSON has no infinity
            return {"token": text, "logprob": told, "bytes": list(text.encode())}

        return [
            entry(token, told.chosen) | {"top_logprobs": [entry(*each) for each in told.top]}
            for token, told in zip(news.tokens, news.logprobs, strict=True)
        ]


class Completion(Task):
    kind = "cmpl"

    def __init__(self, service: Service, body: CompletionRequest):
        super().__init__(service, body)
        given = body.prompt
        several = isinstance(given, list) and given and not isinstance(given[0], int)
        vocab_size = service.model.config.vocab_size
        for prompt in given if several else [given]:
            ids = prompt if isinstance(prompt, list) else self.encode(prompt)
            if not ids:
                raise ApiError("the prompt is empty", param="prompt")
            if not all(0 <= token < vocab_size for token in ids):
                raise ApiError(f"tokens are from 0 to {vocab_size - 1}", param="prompt")
            self.add(ids, body.max_tokens or 16, body.logprobs)
        if body.echo and body.logprobs is not None:
            raise ApiError("echo with logprobs is not supported", param="echo")
        self.texts = [""] * len(self.requests)
        self.begun = [False] * len(self.requests)
        self.reasons: list[str | None] = [None] * len(self.requests)
        self.told: list[dict[str, Any] | None] = [None] * len(self.requests)
        self.length = [0] * len(self.requests)

    def encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text).ids[:-1]

    def choice(self, index: int, news: News) -> dict[str, Any]:
        text = news.text
        if self.body.echo and not self.begun[index]:
            prompt = self.requests[index].prompt
            text = self.tokenizer.decode(prompt, skip_special_tokens=True) + text
        self.begun[index] = True
        return {
            "index": index,
            "text": text,
            "logprobs": self.logprobs(index, news),
            "finish_reason": news.reason,
        }

    def chunks(self, index: int, news: News) -> list[dict[str, Any]]:
        choice = self.choice(index, news)
        empty = not (choice["text"] or choice["logprobs"] or choice["finish_reason"])
        return [] if empty else [self.chunk([choice])]

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.envelope("text_completion", choices)

    def collect(self, index: int, news: News) -> None:
        choice = self.choice(index, news)
        self.texts[index] += choice["text"]
        self.reasons[index] = news.reason
        if told := choice["logprobs"]:
            before = self.told[index] or {name: [] for name in told}
            self.told[index] = {name: before[name] + told[name] for name in told}

    def whole(self) -> dict[str, Any]:
        columns = zip(self.texts, self.told, self.reasons, strict=True)
        choices = [
            {"index": index, "text": text, "logprobs": told, "finish_reason": reason}
            for index, (text, told, reason) in enumerate(columns)
        ]
        return self.envelope("text_completion", choices) | {"usage": self.usage()}

    def logprobs(self, index: int, news: News) -> dict[str, list] | None:
        if self.body.logprobs is None:
            return None
        texts = [self.token_text(token) for token in news.tokens]
        offsets = []
        for text in texts:
            offsets.append(self.length[index])
            self.length[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(told.chosen, -9999.0) for told in news.logprobs],
            "top_logprobs": [
                {self.token_text(token): value for token, value in told.top}
                for told in news.logprobs
            ],
            "text_offset": offsets,
        }


def as_message(message: Message) -> dict[str, Any]:
    """A message of the API as the chat template takes it."""
    told = message.model_dump(exclude_none=True, exclude={"name", "tool_call_id"})
    if message.role == "developer":
        told["role"] = "system"
    told.setdefault("content", "")
    if isinstance(message.content, list):
        told["content"] = "".join(part.text for part in message.content)
    return told


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))

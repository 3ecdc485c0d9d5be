"""What all requests to the server share: model, engine thread, limits, defaults and metrics."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import cached_property

from fastapi import Request as HttpRequest

from model.inference.engine import Engine, QueueFull, Request, TokenLogprob
from model.inference.engine_thread import EngineThread
from model.inference.grammar import GrammarCompiler
from model.inference.sampling import SamplingParams
from scripts.serving.api.errors import ApiError, server_error
from scripts.serving.api.metrics import Metrics
from scripts.serving.api.openai_types import BaseRequest, ChatRequest
from scripts.serving.arguments import ServerArgs
from scripts.serving.loading import ChatModel

LOG = logging.getLogger("uvicorn.error")


@dataclass
class Delta:
    """What the engine added to one reply since the last delta."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprob]
    finish_reason: str | None  # in the last delta: "stop" or "length"


class Service:
    """The model with its engine, and what all requests share."""

    def __init__(self, args: ServerArgs, loaded: ChatModel):
        self.args, self.model, self.tokenizer = args, loaded.model, loaded.tokenizer
        self.model_card = {
            "id": args.model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "minimind",
            "root": args.model_name,
            "parent": None,
            "permission": [],
            "name": args.model_name,
        }
        self.max_length = min(args.max_length, loaded.max_positions)
        self.model_card["max_model_len"] = self.max_length  # as vLLM calls it
        self.model_card["context_length"] = self.max_length  # as OpenRouter does
        self.engine = Engine(loaded.model, args.max_batch, args.prefill_tokens, args.max_queue)
        self.metrics = Metrics(self.engine)

    def start(self) -> None:
        self.thread = EngineThread(self.engine)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        return GrammarCompiler(
            self.tokenizer, self.vocab_size, min(self.engine.stop_ids, default=0)
        )

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    def check_key(self, http: HttpRequest) -> None:
        """ApiError unless the request carries the API key, where one is set: as OpenAI's bearer
        token, or in the header that Azure's or Anthropic's clients send."""
        scheme, _, key = http.headers.get("authorization", "").strip().partition(" ")
        sent = [key.strip() if scheme.lower() == "bearer" else scheme]
        sent += [http.headers.get(name, "") for name in ("api-key", "x-api-key")]
        expected = self.args.api_key.encode()
        # compare_digest takes the same time wherever the keys differ
        if expected and not any([secrets.compare_digest(k.encode(), expected) for k in sent]):
            raise ApiError("the API key is missing or wrong", 401, code="invalid_api_key")

    def check_model(self, name: str) -> None:
        """ApiError for another model's name. Clients write a vendor before a name and a tag behind
        it (openai/minimind, minimind:latest); --strict_requests takes the plain name only."""
        ours, names = self.args.model_name, {name}
        if not self.args.strict_requests:
            untagged = name.removesuffix(":latest")
            names |= {untagged, untagged.rpartition("/")[2], name.rpartition("/")[2], name or ours}
        if ours not in names:
            message = f"there is no model {name!r} here, only {ours!r}"
            raise ApiError(message, 404, param="model", code="model_not_found")

    def sampling(
        self, body: BaseRequest, max_tokens: int | None, prompt: list[int]
    ) -> SamplingParams:
        """The request's sampling parameters, the server's defaults where it does not say.

        Raises:
            ApiError: the prompt leaves no room for a reply.
        """
        room = self.max_length - len(prompt)
        if room < 1:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens, and prompt and reply together may have at "
                f"most {self.max_length}",
                param="messages" if isinstance(body, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        args, bias = self.args, body.logit_bias or {}
        if not all(0 <= token < self.vocab_size for token in bias):
            most = self.vocab_size - 1
            raise ApiError(f"tokens of logit_bias must be from 0 to {most}", param="logit_bias")
        return SamplingParams(
            max_new_tokens=min(max_tokens or args.max_new_tokens, room),
            temperature=args.temperature if body.temperature is None else body.temperature,
            top_k=args.top_k if body.top_k is None else body.top_k,
            top_p=args.top_p if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            logit_bias=tuple(bias.items()),
            repetition_penalty=body.repetition_penalty or 1.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            seed=None if body.seed is None else body.seed % 2**31,
        )

    async def stream(self, requests: list[Request]) -> AsyncGenerator[tuple[int, Delta], None]:
        """Decode requests side by side; yields (index of the request, delta) as deltas arrive.

        Closing the iterator cancels all of them.

        Raises:
            ApiError: the queue is full, or the model failed.
        """
        deltas: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self.decode(*each, deltas)) for each in enumerate(requests)]
        try:
            num_running = len(tasks)
            while num_running:
                item = await deltas.get()
                if isinstance(item, QueueFull):
                    raise ApiError(str(item), 429, "rate_limit_error", code="queue_full")
                if isinstance(item, Exception):
                    LOG.error("a request failed", exc_info=item)
                    raise server_error()
                if item is None:
                    num_running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def decode(self, index: int, request: Request, deltas: asyncio.Queue) -> None:
        """Put the deltas of one request into the queue; at its end None, or the exception."""
        start, num_sent = time.monotonic(), 0
        self.metrics.prompt_tokens.inc(len(request.prompt))
        outcome = "cancelled"
        try:
            async for count in self.thread.stream(request):
                if not num_sent:
                    self.metrics.first_token_seconds.observe(time.monotonic() - start)
                # the engine may have gone on since: send the tokens up to `count` only, and the
                # finish reason only with the last of them
                tokens = request.tokens[num_sent:count]
                logprobs = request.logprobs[num_sent:count]
                finish_reason = request.finish_reason if count == len(request.tokens) else None
                num_sent = count
                delta = Delta(request.detokenizer.read(), tokens, logprobs, finish_reason)
                await deltas.put((index, delta))
            outcome = request.finish_reason
            await deltas.put(None)
        except Exception as error:
            outcome = "refused" if isinstance(error, QueueFull) else "failed"
            await deltas.put(error)
        finally:
            self.metrics.requests.labels(outcome).inc()
            self.metrics.generated_tokens.inc(len(request.tokens))
            self.metrics.request_seconds.observe(time.monotonic() - start)

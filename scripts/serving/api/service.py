"""What all requests to the server share: model, engine thread, limits, defaults and metrics."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from model.inference.engine import Engine, QueueFull, Request, TokenLogprob
from model.inference.engine_thread import EngineThread
from model.inference.grammar import GrammarCompiler
from model.inference.sampling import SamplingParams
from scripts.serving.api.errors import ApiError, server_error
from scripts.serving.api.limits import parse, read_body
from scripts.serving.api.metrics import Metrics
from scripts.serving.api.openai_types import BaseRequest, ChatRequest
from scripts.serving.arguments import ServerArgs
from scripts.serving.loading import ChatModel

LOG = logging.getLogger("uvicorn.error")


Made = TypeVar("Made")


def queue_full(message: str) -> ApiError:
    return ApiError(message, 429, "rate_limit_error", code="queue_full")


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
        # Requests are validated and tokenised in one thread and grammars compiled in another, so
        # that the event loop answers meanwhile. More threads would be no faster: most of the work
        # holds Python's lock.
        self.preparing = ThreadPoolExecutor(1, "prepare")
        self.compiling = ThreadPoolExecutor(1, "compile")
        self.num_waiting = 0  # for these threads
        # no token stands for more characters than its name has
        self.max_characters = self.max_length * max(map(len, self.tokenizer.get_vocab()))

    def start(self) -> None:
        self.thread = EngineThread(self.engine)

    async def prepare(self, http: HttpRequest, make: Callable[[Any], Made]) -> Made:
        """What `make` makes of the JSON of a request, in another thread.

        Raises:
            ApiError: limits.py, or too many requests are waiting for that.
        """
        data = await read_body(http, self.args)
        return await self.run(self.preparing, lambda: make(parse(data, self.args)))

    async def run(self, thread: ThreadPoolExecutor, function: Callable[[], Made]) -> Made:
        """What the function returns, in another thread; ApiError if too many wait for one."""
        if self.num_waiting > self.args.max_queue + self.args.max_batch:
            raise queue_full(f"{self.num_waiting} requests are waiting already")
        self.num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, function)
        finally:
            self.num_waiting -= 1

    def check_characters(self, texts: Iterable[str], param: str) -> None:
        """ApiError for texts that are too long for a prompt even if all tokens were the longest:
        they are not tokenised, which takes time and memory."""
        count = sum(map(len, texts))
        if count > self.max_characters:
            raise ApiError(
                f"the prompt has {count} characters, and with the reply it may have at most "
                f"{self.max_length} tokens",
                param=param,
                code="context_length_exceeded",
            )

    @cached_property
    def grammars(self) -> GrammarCompiler:
        return GrammarCompiler(
            self.tokenizer, self.vocab_size, min(self.engine.stop_ids, default=0)
        )

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

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
        self, body: BaseRequest, max_tokens: int | None, prompt: list[int], num_replies: int
    ) -> SamplingParams:
        """The request's sampling parameters, the server's defaults where it does not say.

        Raises:
            ApiError: the prompt leaves no room for a reply, or the replies are too long together.
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
        most = min(max_tokens or args.max_new_tokens, room)
        if num_replies * most > args.max_reply_tokens:
            raise ApiError(
                f"{num_replies} replies of {most} tokens are more than {args.max_reply_tokens} "
                "tokens (--max_reply_tokens)",
                param="n",
            )
        return SamplingParams(
            max_new_tokens=most,
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

    def stop(self, seconds: float) -> None:
        """Finish all requests, for at most `seconds`."""
        self.thread.stop(seconds)
        for each in (self.preparing, self.compiling):
            each.shutdown(wait=False, cancel_futures=True)

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
                    raise queue_full(str(item))
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

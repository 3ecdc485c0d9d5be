"""From a request of the API to engine requests, and from deltas to OpenAI's response objects."""

import secrets
import time
from typing import Any

from model.inference.engine import Request
from model.inference.streaming import StreamingDetokenizer
from model.inference.tokens import decode_token_bytes
from scripts.serving.api.errors import ApiError
from scripts.serving.api.openai_types import BaseRequest
from scripts.serving.api.service import Delta, Service

MAX_LOGPROBS = 200_000  # in a response: some 20 MB of JSON
MIN_LOGPROB = -9999.0  # for JSON, which has no −infinity


class Handler:
    """One request of the API. Subclasses validate it, encode its prompts and word the response.

    A response without streaming is collected with `add_delta` and made by `response`; a stream
    turns each delta into `chunks`.
    """

    id_prefix: str
    chunk_type: str  # the "object" field of a chunk
    num_prompts = 1
    ends_with_done = True  # a stream ends with [DONE]

    def __init__(self, service: Service, body: BaseRequest):
        service.check_model(body.model)
        self.service, self.body, self.tokenizer = service, body, service.tokenizer
        self.id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.requests: list[Request] = []  # `n` for each prompt
        self.headers: dict[str, str] = {}  # of the HTTP response

    async def prepare(self) -> None:
        """What has to be computed before the reply."""

    def beginning(self) -> list[dict[str, Any]]:
        """The chunks of a stream before all deltas."""
        return []

    def ending(self) -> list[dict[str, Any]]:
        """The chunks of a stream after all deltas."""
        options = self.body.stream_options
        return (
            [self.chunk([]) | {"usage": self.usage()}] if options and options.include_usage else []
        )

    def add_requests(
        self,
        prompt: list[int],
        max_tokens: int | None,
        top_logprobs: int | None,
    ) -> None:
        """Append the engine requests of one prompt: `n`, which differ in their random numbers.

        Args:
            top_logprobs: number of alternatives per token; None: no log-probabilities.
        """
        n = self.body.n or 1
        num_replies = n * self.num_prompts
        if num_replies > self.service.args.max_replies:
            raise ApiError(
                f"{num_replies} replies are more than {self.service.args.max_replies} "
                "(--max_replies)",
                param="n",
            )
        sampling = self.service.sampling(self.body, max_tokens, prompt, num_replies)
        if top_logprobs is not None:
            echoed = len(prompt) if getattr(self.body, "echo", False) else 0
            count = num_replies * (sampling.max_new_tokens + echoed) * (1 + top_logprobs)
            if count > MAX_LOGPROBS:
                raise ApiError(
                    f"{count} log-probabilities are more than {MAX_LOGPROBS}; ask for fewer tokens "
                    "or alternatives",
                    param="logprobs",
                )
        for _ in range(n):
            text = StreamingDetokenizer(self.tokenizer, self.body.stop_strings)
            row = len(self.requests)
            self.requests.append(Request(prompt, sampling, row, top_logprobs, None, text))

    def error_event(self, error: ApiError) -> dict[str, Any]:
        """What ends a stream when the model fails."""
        return error.body

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of a stream for a delta of choice `index`."""
        raise NotImplementedError

    def add_delta(self, index: int, delta: Delta) -> None:
        """Collect a delta of choice `index` for the response."""
        raise NotImplementedError

    def response(self) -> dict[str, Any]:
        """The response of all deltas that were added."""
        raise NotImplementedError

    def envelope(self, object_type: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_type,
            "created": self.created,
            "model": self.service.args.model_name,
            "choices": choices,
        }

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.envelope(self.chunk_type, choices)

    def usage(self) -> dict[str, int]:
        # the `n` choices of a prompt share it, so that it counts once
        prompt_tokens = sum(len(r.prompt) for r in self.requests[:: self.body.n or 1])
        completion_tokens = sum(len(r.tokens) for r in self.requests)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def token_text(self, token: int) -> str:
        return decode_token_bytes(self.tokenizer, token).decode(errors="replace")

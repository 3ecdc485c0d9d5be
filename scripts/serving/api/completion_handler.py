"""POST /v1/completions: the continuation of texts or tokens, without a chat template."""

import asyncio
import codecs
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dataset.chat import Segments
from dataset.encoding import encode_segments
from model.inference.engine import TokenLogprob
from model.inference.generation import prompt_logprobs
from model.inference.tokens import decode_token_bytes
from scripts.serving.api.errors import ApiError
from scripts.serving.api.handler import MIN_LOGPROB, Handler
from scripts.serving.api.openai_types import CompletionRequest
from scripts.serving.api.service import Delta, Service


@dataclass
class Choice:
    """One of the replies, as far as it has come."""

    started: bool = False
    text: str = ""
    # for the offsets of log-probabilities: characters so far, the last of which may be incomplete
    characters: int = 0
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )
    logprobs: dict[str, list] | None = None
    finish_reason: str | None = None


class CompletionHandler(Handler):
    body: CompletionRequest
    id_prefix = "cmpl"
    chunk_type = "text_completion"

    def __init__(self, service: Service, body: CompletionRequest):
        super().__init__(service, body)
        prompts = body.prompt
        if isinstance(prompts, str) or not prompts or isinstance(prompts[0], int):
            prompts = [prompts]  # a single text, or its tokens
        vocab_size, self.num_prompts = service.vocab_size, len(prompts)
        for prompt in prompts:
            if isinstance(prompt, str):
                service.check_characters([prompt], "prompt")
            ids = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
            if not ids:
                raise ApiError("the prompt is empty", param="prompt")
            if not all(0 <= token < vocab_size for token in ids):
                raise ApiError(f"tokens must be from 0 to {vocab_size - 1}", param="prompt")
            # 16 is OpenAI's default. The engine generates at least one token; with max_tokens 0 it
            # is left out of the response.
            most = 16 if body.max_tokens is None else max(body.max_tokens, 1)
            self.add_requests(ids, most, body.logprobs)
        self.prompt_logprobs: list[list[TokenLogprob | None]] = []
        self.choices = [Choice() for _ in self.requests]

    def encode_prompt(self, text: str) -> list[int]:
        """A text that goes on: without EOS."""
        bos = self.tokenizer.bos_token_id
        begin: Segments = [(bos, False)] if bos is not None and self.body.add_special_tokens else []
        return encode_segments(self.tokenizer, [[*begin, (text, False)]])[0].ids if text else []

    async def prepare(self) -> None:
        """With echo and logprobs, the log-probabilities of the prompts: one forward pass each."""
        if not self.body.echo or self.body.logprobs is None:
            return
        thread, model = self.service.thread, self.service.model
        for request in self.requests[:: self.body.n or 1]:
            compute = partial(prompt_logprobs, model, request.prompt, self.body.logprobs)
            found = await asyncio.to_thread(thread.call, compute)
            self.prompt_logprobs += [found] * (self.body.n or 1)

    def choice_delta(self, index: int, delta: Delta) -> dict[str, Any]:
        """A delta as OpenAI's choice; with echo, the first one begins with the prompt."""
        choice, text = self.choices[index], delta.text
        tokens, logprobs = delta.tokens, list(delta.logprobs)
        if self.body.max_tokens == 0:
            text, tokens, logprobs = "", [], []
        if self.body.echo and not choice.started:
            prompt = self.requests[index].prompt
            text = self.tokenizer.decode(prompt, skip_special_tokens=True) + text
            if self.prompt_logprobs:
                tokens, logprobs = prompt + tokens, self.prompt_logprobs[index] + logprobs
        choice.started = True
        return {
            "index": index,
            "text": text,
            "logprobs": self.format_logprobs(choice, tokens, logprobs),
            "finish_reason": delta.finish_reason and self.finish_reason(delta),
        }

    def finish_reason(self, delta: Delta) -> str | None:
        return "length" if self.body.max_tokens == 0 else delta.finish_reason

    def usage(self) -> dict[str, Any]:
        usage = super().usage()
        if self.body.max_tokens == 0:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return usage

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        choice = self.choice_delta(index, delta)
        empty = not (choice["text"] or choice["logprobs"] or choice["finish_reason"])
        return [] if empty else [self.chunk([choice])]

    def add_delta(self, index: int, delta: Delta) -> None:
        added, choice = self.choice_delta(index, delta), self.choices[index]
        choice.text += added["text"]
        choice.finish_reason = added["finish_reason"]
        if logprobs := added["logprobs"]:
            before = choice.logprobs or {name: [] for name in logprobs}
            choice.logprobs = {name: before[name] + logprobs[name] for name in logprobs}

    def response(self) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return self.envelope("text_completion", choices) | {"usage": self.usage()}

    def format_logprobs(
        self, choice: Choice, tokens: list[int], logprobs: list[TokenLogprob | None]
    ) -> dict[str, list] | None:
        """Those of some tokens; the first token of a prompt has none."""
        if self.body.logprobs is None:
            return None
        texts = [self.token_text(token) for token in tokens]
        offsets, special = [], set(self.tokenizer.all_special_ids)
        for token in tokens:
            offsets.append(choice.characters)
            if token not in special:  # which the text leaves out
                characters = choice.decoder.decode(decode_token_bytes(self.tokenizer, token))
                choice.characters += len(characters)
        return {
            "tokens": texts,
            "token_logprobs": [each and max(each.logprob, MIN_LOGPROB) for each in logprobs],
            "top_logprobs": [
                each and self.top_logprobs(each) | {text: max(each.logprob, MIN_LOGPROB)}
                for text, each in zip(texts, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def top_logprobs(self, of: TokenLogprob) -> dict[str, float]:
        # of tokens with the same text, the most likely one: they come in this order
        return {
            self.token_text(token): max(logprob, MIN_LOGPROB) for token, logprob in reversed(of.top)
        }

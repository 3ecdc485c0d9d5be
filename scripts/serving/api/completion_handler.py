"""POST /v1/completions: the continuation of texts or tokens, without a chat template."""

from dataclasses import dataclass
from typing import Any

from dataset.lm_dataset import encode_text
from scripts.serving.api.errors import ApiError
from scripts.serving.api.handler import MIN_LOGPROB, Handler
from scripts.serving.api.openai_types import CompletionRequest
from scripts.serving.api.service import Delta, Service


@dataclass
class Choice:
    """One of the replies, as far as it has come."""

    started: bool = False
    text: str = ""
    text_offset: int = 0  # characters of all tokens so far, for log-probabilities
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
        vocab_size = service.model.config.vocab_size
        for prompt in prompts:
            # without the EOS that encode_text appends: the text goes on
            ids = (
                encode_text(self.tokenizer, prompt).ids[:-1] if isinstance(prompt, str) else prompt
            )
            if not ids:
                raise ApiError("the prompt is empty", param="prompt")
            if not all(0 <= token < vocab_size for token in ids):
                raise ApiError(f"tokens must be from 0 to {vocab_size - 1}", param="prompt")
            self.add_requests(ids, body.max_tokens or 16, body.logprobs)  # 16: OpenAI's default
        if body.echo and body.logprobs is not None:
            raise ApiError("echo with logprobs is not supported", param="echo")
        self.choices = [Choice() for _ in self.requests]

    def choice_delta(self, index: int, delta: Delta) -> dict[str, Any]:
        """A delta as OpenAI's choice; with echo, the first one begins with the prompt."""
        choice, text = self.choices[index], delta.text
        if self.body.echo and not choice.started:
            prompt = self.requests[index].prompt
            text = self.tokenizer.decode(prompt, skip_special_tokens=True) + text
        choice.started = True
        return {
            "index": index,
            "text": text,
            "logprobs": self.format_logprobs(choice, delta),
            "finish_reason": delta.finish_reason,
        }

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        choice = self.choice_delta(index, delta)
        empty = not (choice["text"] or choice["logprobs"] or choice["finish_reason"])
        return [] if empty else [self.chunk([choice])]

    def add_delta(self, index: int, delta: Delta) -> None:
        added, choice = self.choice_delta(index, delta), self.choices[index]
        choice.text += added["text"]
        choice.finish_reason = delta.finish_reason
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

    def format_logprobs(self, choice: Choice, delta: Delta) -> dict[str, list] | None:
        if self.body.logprobs is None:
            return None
        texts = [self.token_text(token) for token in delta.tokens]
        offsets = []
        for text in texts:
            offsets.append(choice.text_offset)
            choice.text_offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(each.logprob, MIN_LOGPROB) for each in delta.logprobs],
            "top_logprobs": [
                {self.token_text(token): logprob for token, logprob in each.top}
                for each in delta.logprobs
            ],
            "text_offset": offsets,
        }

"""The engine: decodes many requests side by side, each of which may come and go at any time.

1. Continuous batching (Orca, OSDI 2022). Decoding is bound by reading the weights, so a step for 32
   requests takes little longer than a step for one: all running requests share each step.
2. Chunked prefill (arXiv 2308.16369). A step first decodes one token for each request whose prompt
   has been read, then reads at most `prefill_tokens` of new prompts, so that a long prompt does not
   hold up the others.
3. Prefix sharing. The keys and values of a prefix that a running request has in common with a new
   prompt are copied instead of computed: several replies to one prompt need one prefill.

Letters in the shape comments: B rows of one forward pass   T tokens of each of them
S length of the longest row   V vocabulary
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.attention import causal_mask
from model.config import CACHE_ARGUMENT, MiniMindConfig
from model.inference.kv_cache import KVCache
from model.inference.sampling import SamplingParams, make_generator, sample
from model.inference.streaming import StreamingDetokenizer

MIN_SHARED_PREFIX = 8  # tokens; copying a shorter prefix saves nothing


class QueueFull(Exception):
    """The queue of waiting requests is full."""


class Constraint(Protocol):
    """Restricts the tokens of a reply, such as a grammar does (grammar.py)."""

    is_complete: bool  # the reply may end here
    is_finished: bool  # nothing else can follow

    def allowed(self) -> Tensor:
        """[V], bool: the tokens that may come next; at least one."""

    def accept(self, token: int) -> int:
        """Accept the sampled token, or replace it by the one that is returned."""


class TokenLogprob(NamedTuple):
    """log p of a token in the model's own distribution, and the most likely tokens with theirs."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Request:
    """A prompt, how to sample the reply, and the reply."""

    prompt: list[int]
    sampling: SamplingParams
    index: int = 0  # of several samples with one seed: each draws its own random numbers
    top_logprobs: int | None = None  # number of most likely tokens to record; None: no log-probs
    constraint: Constraint | None = None
    detokenizer: StreamingDetokenizer | None = None  # also finds stop strings
    tokens: list[int] = field(default_factory=list)  # the reply, with its final stop token
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length" or "cancelled"


class Sequence:
    """A running request: its row of the KV cache and the state of its sampling."""

    def __init__(self, request: Request, vocab_size: int, device: torch.device):
        self.request = request
        self.length = 0  # tokens in the KV cache, of the prompt and then of the reply
        self.generator = make_generator(request.sampling.seed, request.index, device)
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # in prompt or reply
        self.seen[request.prompt] = True
        self.counts = torch.zeros(vocab_size, device=device)  # of each token in the reply
        self.bias: Tensor | None = None  # of the logits
        if request.sampling.logit_bias:
            tokens, values = zip(*request.sampling.logit_bias, strict=True)
            self.bias = torch.zeros(vocab_size, device=device)
            self.bias[list(tokens)] = torch.tensor(values, device=device)

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are not yet in the KV cache."""
        return max(0, len(self.request.prompt) - self.length)


class Engine:
    """Decodes requests with a model in eval mode.

    Row n of the KV cache belongs to running[n]. The first `num_decoding` sequences decode, the rest
    prefill: each kind is one slice of the cache, which a forward pass can use without copying.

    Args:
        slots: the number of requests that run at a time; the others wait.
        prefill_tokens: prompt tokens per step at most; None: whole prompts.
        max_queue: the number of requests that may wait; None: any number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int = 32,
        prefill_tokens: int | None = 512,
        max_queue: int | None = None,
    ):
        self.model, self.slots = model, slots
        self.prefill_tokens, self.max_queue = prefill_tokens, max_queue
        self.waiting: deque[Request] = deque()
        self.running: list[Sequence] = []
        self.num_decoding = 0
        self.kv_cache = KVCache(slots)
        self.is_minimind = isinstance(model.config, MiniMindConfig)
        self.stop_ids = set(eos_ids(model))
        self.vocab_size = model.config.get_text_config().vocab_size

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: the prompt is empty, or prompt and reply exceed the model's positions.
            QueueFull
        """
        most = max_positions(self.model)
        if not request.prompt:
            raise ValueError("every prompt needs at least one token")
        if len(request.prompt) + request.sampling.max_new_tokens > most:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and {request.sampling.max_new_tokens} new "
                f"ones are more than the model's {most} positions"
            )
        free = self.slots - len(self.running)
        if self.max_queue is not None and len(self.waiting) >= self.max_queue + free:
            raise QueueFull(f"{self.max_queue} requests are waiting already")
        self.waiting.append(request)

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Stop a request, waiting or running; its slot is free at once."""
        if request.finish_reason is not None:
            return
        request.finish_reason = "cancelled"
        if request in self.waiting:
            self.waiting.remove(request)
        for row, sequence in enumerate(self.running):
            if sequence.request is request:
                self.remove(row)
                break

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Decode one token for each request whose prompt has been read, and read on in the others'
        prompts; returns the requests that got a token."""
        self.admit()
        decoding = self.running[: self.num_decoding]
        prefilling = self.running[self.num_decoding :][: self.num_prefilling()]
        tokens = self.decode(decoding) if decoding else []
        if prefilling:
            tokens += self.prefill(prefilling)
        # The last chunk of a prompt gives the first token of its reply: from now on it decodes.
        served = [each for each in decoding + prefilling if not each.prompt_left]
        for sequence, token in zip(served, tokens, strict=True):
            self.append_token(sequence, token)
        self.num_decoding = len(served)
        for row in reversed(range(len(served))):  # backwards: removing a row moves the last one
            if served[row].request.finish_reason:
                self.remove(row)
        return [each.request for each in served]

    def admit(self) -> None:
        """Give free slots to waiting requests. A request waits while another one prefills the
        prefix that they share, and then copies it."""
        deferred = []
        for _ in range(len(self.waiting)):  # not `while`: other threads may append meanwhile
            if len(self.running) == self.slots:
                break
            request = self.waiting.popleft()
            shared, source = self.longest_shared_prefix(request.prompt)
            if source is not None and self.running[source].length < shared:
                deferred.append(request)
                continue
            sequence = Sequence(request, self.vocab_size, self.model.device)
            if source is not None:
                self.kv_cache.copy(source, len(self.running), shared)
                sequence.length = shared
            self.running.append(sequence)
        self.waiting.extendleft(reversed(deferred))

    def longest_shared_prefix(self, prompt: list[int]) -> tuple[int, int | None]:
        """The length of the longest prefix that this prompt shares with that of a running sequence,
        and the row of that sequence; None if copying would not pay."""
        best: tuple[int, int | None] = (MIN_SHARED_PREFIX - 1, None)
        most = len(prompt) - 1  # the last token is always computed: its logits are needed
        for row, sequence in enumerate(self.running):
            other = sequence.request.prompt
            if prompt[:MIN_SHARED_PREFIX] == other[:MIN_SHARED_PREFIX]:
                pairs = zip(prompt[:most], other, strict=False)
                shared = next(
                    (n for n, (a, b) in enumerate(pairs) if a != b), min(most, len(other))
                )
                if shared > best[0]:
                    best = shared, row
        return best

    # -- the two kinds of forward pass ---------------------------------------------------------

    def decode(self, sequences: list[Sequence]) -> list[int]:
        """The next token of each sequence."""
        tokens = [each.request.tokens[-1:] for each in sequences]
        return self.sample_tokens(sequences, self.forward(0, sequences, tokens)[:, -1])

    def num_prefilling(self) -> int:
        """The number of prefilling sequences that this step reads: as many as fit into
        `prefill_tokens` when all chunks are padded to the longest."""
        budget, longest = self.prefill_tokens, 0
        if budget is None:
            return len(self.running) - self.num_decoding
        for n, sequence in enumerate(self.running[self.num_decoding :]):
            longest = max(longest, min(sequence.prompt_left, budget))
            if longest * (n + 1) > budget:
                return n
        return len(self.running) - self.num_decoding

    def prefill(self, sequences: list[Sequence]) -> list[int]:
        """Read the next chunk of each prompt; returns the first token of each reply whose prompt
        ends here."""
        most = self.prefill_tokens or max(each.prompt_left for each in sequences)
        chunks = [each.request.prompt[each.length :][:most] for each in sequences]
        last = [len(chunk) - 1 for chunk in chunks]
        kept = sorted(set(last))  # logits are needed at these positions only
        logits = self.forward(self.num_decoding, sequences, chunks, kept)
        done = [n for n, each in enumerate(sequences) if not each.prompt_left]
        logits = logits[done, [kept.index(last[n]) for n in done]]
        return self.sample_tokens([sequences[n] for n in done], logits) if done else []

    def forward(
        self,
        first: int,
        sequences: list[Sequence],
        chunks: list[list[int]],
        kept: list[int] | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or at the positions `kept` only, of the next tokens of the sequences in
        rows first, first + 1, …"""
        device = self.model.device
        # Shorter chunks are padded on the right. What padding leaves in the cache lies behind each
        # row's length: causality hides it, and the next tokens overwrite it.
        T = max(map(len, chunks))
        tokens = torch.tensor([chunk + [0] * (T - len(chunk)) for chunk in chunks], device=device)
        lengths = [each.length for each in sequences]
        cache = self.kv_cache.view(first, lengths, T)
        mask = positions = None  # rows of equal length need no mask but the model's own
        if min(lengths) < max(lengths) or not self.is_minimind:
            steps = torch.arange(T, device=device)
            positions = torch.tensor(lengths, device=device)[:, None] + steps  # [B, T]
            mask = causal_mask(positions, max(lengths) + T)  # [B, 1, T, S]
        outputs = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=0 if kept is None else torch.tensor(kept, device=device),
            **{CACHE_ARGUMENT: cache},
        )
        for sequence, chunk in zip(sequences, chunks, strict=True):
            sequence.length += len(chunk)
        return outputs.logits

    # -- tokens --------------------------------------------------------------------------------

    def sample_tokens(self, sequences: list[Sequence], logits: Tensor) -> list[int]:
        """The next token of each sequence from logits [B, V]; sequences with the same sampling
        parameters are sampled together."""
        logits = logits.float()
        unconstrained = logits
        if any(each.request.constraint or each.bias is not None for each in sequences):
            logits = logits.clone()
            for sequence, row in zip(sequences, logits, strict=True):
                if sequence.bias is not None:
                    row += sequence.bias
                if sequence.request.constraint:
                    row[~sequence.request.constraint.allowed()] = -torch.inf
        groups = defaultdict(list)
        for n, sequence in enumerate(sequences):
            groups[sequence.request.sampling.group_key].append(n)
        tokens = [0] * len(sequences)
        for members in groups.values():
            group = [sequences[n] for n in members]
            sampled = sample(
                logits if len(group) == len(sequences) else logits[members],
                group[0].request.sampling,
                [each.seen for each in group],
                [each.counts for each in group],
                [each.generator for each in group],
            )
            for n, token in zip(members, sampled.tolist(), strict=True):
                constraint = sequences[n].request.constraint
                tokens[n] = constraint.accept(token) if constraint else token
        if any(each.request.top_logprobs is not None for each in sequences):
            record_logprobs(sequences, unconstrained.log_softmax(-1), tokens)
        return tokens

    def append_token(self, sequence: Sequence, token: int) -> None:
        """Append a token to a reply, and finish the request if it ends here."""
        request, sampling = sequence.request, sequence.request.sampling
        request.tokens.append(token)
        sequence.seen[token] = True
        sequence.counts[token] += 1
        if request.detokenizer:
            request.detokenizer.feed(token)
        if token in (self.stop_ids if sampling.stop_ids is None else sampling.stop_ids):
            request.finish_reason = "stop"
        elif request.detokenizer and request.detokenizer.stopped:
            request.finish_reason = "stop"
        elif request.constraint and request.constraint.is_finished:
            request.finish_reason = "stop"
        elif len(request.tokens) == sampling.max_new_tokens:
            complete = request.constraint is not None and request.constraint.is_complete
            request.finish_reason = "stop" if complete else "length"
        if request.detokenizer and request.finish_reason:
            request.detokenizer.end()

    def remove(self, row: int) -> None:
        """Free a row. The last decoding sequence moves there, and the last of all moves to the row
        of that one, so that both kinds remain one slice."""
        last = len(self.running) - 1
        if row < self.num_decoding:
            self.num_decoding -= 1
            self.move(self.num_decoding, row)
            row = self.num_decoding
        self.move(last, row)
        self.running.pop()

    def move(self, source: int, target: int) -> None:
        if source != target:
            self.kv_cache.copy(source, target, self.running[source].length)
            self.running[target] = self.running[source]


def record_logprobs(sequences: list[Sequence], logprobs: Tensor, tokens: list[int]) -> None:
    """Store the log-probs [B, V] of the new tokens in the requests that ask for them."""
    for sequence, row, token in zip(sequences, logprobs, tokens, strict=True):
        if sequence.request.top_logprobs is not None:
            values, ids = row.topk(sequence.request.top_logprobs)
            top = list(zip(ids.tolist(), values.tolist(), strict=True))
            sequence.request.logprobs.append(TokenLogprob(row[token].item(), top))


def max_positions(model: PreTrainedModel) -> int:
    """The longest sequence that a model takes; configs without a limit name none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def eos_ids(model: PreTrainedModel) -> list[int]:
    """The ids of the tokens that end a reply."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = getattr(model.config, "eos_token_id", None) if ids is None else ids
    return [ids] if isinstance(ids, int) else list(ids or [])

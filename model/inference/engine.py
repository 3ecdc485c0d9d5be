"""The engine: requests decoded side by side, each of which comes and goes when it will.

Decoding is bound by reading the weights, so that a step for 32 requests takes little longer than
one for a single request: requests share their steps ("continuous batching", Orca, OSDI 2022). A
step first gives each request whose prompt has been read its next token, and then reads on in the
prompts of new ones, at most so many tokens that the others need not wait long ("chunked prefill",
arXiv 2308.16369). What a prompt has in common with that of a running row is copied, not read again:
several replies to one prompt cost its reading once.

Letters in the shape comments: R rows   B rows of one forward pass   T tokens of each of them
S the longest row   K key/value heads   D size of a head   V vocabulary
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.inference.sampling import SamplingParams, make_generator, sample
from model.inference.streaming import StreamingDetokenizer
from model.model_minimind import CACHE_ARGUMENT, MiniMindConfig

MIN_SHARED_PREFIX = 8  # common tokens from which on copying them pays


class QueueFull(Exception):
    """There is no room for another request, not even to wait."""


class Constraint(Protocol):
    """What a reply may look like, told token by token."""

    def allowed(self) -> Tensor:
        """[V], bool: the tokens that may come next; at least one."""

    def accept(self, token: int) -> int:
        """Take this one, or another one that it returns."""


class TokenLogprob(NamedTuple):
    """log p of a token by the model's own distribution, and the likeliest tokens with theirs."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Request:
    """A prompt, how to go on from it, and what came of it."""

    prompt: list[int]
    sampling: SamplingParams
    index: int = 0  # of several samples with one seed: each draws its own random numbers
    top_logprobs: int | None = None  # how many of the likeliest to tell; None: no log-probs at all
    constraint: Constraint | None = None
    detokenizer: StreamingDetokenizer | None = None  # also looks for stop strings
    tokens: list[int] = field(default_factory=list)  # new ones, a final stop token included
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length" or "cancelled"


class Sequence:
    """A request that has a place in the batch."""

    def __init__(self, request: Request, vocab_size: int, device: torch.device):
        self.request = request
        self.length = 0  # tokens that the cache holds: of the prompt, then of the reply
        self.generator = make_generator(request.sampling.seed, request.index, device)
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # in prompt or reply
        self.seen[request.prompt] = True
        self.counts = torch.zeros(vocab_size, device=device)  # how often each is in the reply

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are still to be read."""
        return max(0, len(self.request.prompt) - self.length)


class Engine:
    """Decodes requests for a model, which must be in eval mode.

    Rows that decode stand before those whose prompts are being read, in memory too, so that each
    kind is one slice.

    Args:
        slots: how many requests run at a time; the others wait.
        prefill_tokens: how much of prompts a step reads at most; None: everything.
        queue: how many requests may wait; None: any number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int = 32,
        prefill_tokens: int | None = 512,
        queue: int | None = None,
    ):
        self.model, self.slots = model, slots
        self.prefill_tokens, self.queue = prefill_tokens, queue
        self.waiting: deque[Request] = deque()
        self.rows: list[Sequence] = []
        self.decoding = 0  # so many of the rows, from the first on
        self.memory = KVCache(slots)
        self.own = isinstance(model.config, MiniMindConfig)
        self.stop_ids = set(eos_ids(model))

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting)

    def submit(self, request: Request) -> None:
        """Have a request wait for its turn.

        Raises:
            ValueError: the prompt is empty, or longer than the model's positions allow.
            QueueFull
        """
        most = self.model.config.max_position_embeddings
        if not request.prompt:
            raise ValueError("every prompt needs at least one token")
        if len(request.prompt) + request.sampling.max_new_tokens > most:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and {request.sampling.max_new_tokens} new "
                f"ones are more than the model's {most} positions"
            )
        free = self.slots - len(self.rows)
        if self.queue is not None and len(self.waiting) >= self.queue + free:
            raise QueueFull(f"{self.queue} requests are waiting already")
        self.waiting.append(request)

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Give up a request, wherever it is; its place is free at once."""
        if request.finish_reason is not None:
            return
        request.finish_reason = "cancelled"
        if request in self.waiting:
            self.waiting.remove(request)
        for at, row in enumerate(self.rows):
            if row.request is request:
                self.remove(at)
                break

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One token more for each request whose prompt was read; returns those that got one."""
        self.admit()
        running = self.rows[: self.decoding]
        served = running + self.rows[self.decoding : self.decoding + self.prefill_rows()]
        new = self.decode(running) if running else []
        read = served[len(running) :]
        if read:
            new += self.prefill(read)
        served = [row for row in served if not row.unread]
        for row, token in zip(served, new, strict=True):
            self.append_token(row, token)
        self.decoding = len(served)
        for at in reversed(range(len(served))):  # from the end, as removing moves the last
            if served[at].request.finish_reason:
                self.remove(at)
        return [row.request for row in served]

    def admit(self) -> None:
        """Give free places to waiting requests. Those that share a beginning which another row is
        just reading wait until it has been read."""
        put_off = []
        for _ in range(len(self.waiting)):  # other threads may append meanwhile
            if len(self.rows) == self.slots:
                break
            request = self.waiting.popleft()
            shared, source = self.longest_shared(request.prompt)
            if source is not None and self.rows[source].length < shared:
                put_off.append(request)
                continue
            row = Sequence(request, self.model.config.vocab_size, self.model.device)
            if source is not None:
                self.memory.move(source, len(self.rows), shared)
                row.length = shared
            self.rows.append(row)
        self.waiting.extendleft(reversed(put_off))

    def longest_shared(self, prompt: list[int]) -> tuple[int, int | None]:
        """How many first tokens a row's prompt has in common with this one, and the row that has
        most of them; None if copying would not pay. The last token is always read: its logits are
        wanted."""
        best: tuple[int, int | None] = (MIN_SHARED_PREFIX - 1, None)
        for at, row in enumerate(self.rows):
            other, most = row.request.prompt, len(prompt) - 1
            if prompt[:MIN_SHARED_PREFIX] == other[:MIN_SHARED_PREFIX]:
                pairs = zip(prompt[:most], other, strict=False)
                shared = next(
                    (n for n, (a, b) in enumerate(pairs) if a != b), min(most, len(other))
                )
                if shared > best[0]:
                    best = shared, at
        return best

    # -- the two kinds of forward pass ---------------------------------------------------------

    def decode(self, rows: list[Sequence]) -> list[int]:
        tokens = [row.request.tokens[-1:] for row in rows]
        return self.sample_tokens(rows, self.forward(0, rows, tokens)[:, -1])

    def prefill_rows(self) -> int:
        """How many of the rows that are being read have their turn in this step: as many as fit
        its tokens when all are padded to the longest part."""
        budget, longest = self.prefill_tokens, 0
        if budget is None:
            return len(self.rows) - self.decoding
        for n, row in enumerate(self.rows[self.decoding :]):
            longest = max(longest, min(row.unread, budget))
            if longest * (n + 1) > budget:
                return n
        return len(self.rows) - self.decoding

    def prefill(self, rows: list[Sequence]) -> list[int]:
        """Read on in prompts; the first new token of each whose end is reached."""
        most = self.prefill_tokens or max(row.unread for row in rows)
        parts = [row.request.prompt[row.length :][:most] for row in rows]
        ends = [len(part) - 1 for part in parts]
        kept = sorted(set(ends))  # logits at these places only
        logits = self.forward(self.decoding, rows, parts, kept)
        done = [n for n, row in enumerate(rows) if not row.unread]
        chosen = logits[done, [kept.index(ends[n]) for n in done]]
        return self.sample_tokens([rows[n] for n in done], chosen) if done else []

    def forward(
        self,
        first: int,
        rows: list[Sequence],
        parts: list[list[int]],
        kept: list[int] | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or at the places `kept` only, of more tokens for neighbouring rows.
        Shorter parts are padded on the right, where the next tokens will be."""
        device = self.model.device
        T = max(map(len, parts))
        tokens = torch.tensor([part + [0] * (T - len(part)) for part in parts], device=device)
        starts = [row.length for row in rows]
        cache = self.memory.slice(first, starts, T)
        mask = positions = None  # where all rows begin at the same place causality says it all
        if min(starts) < max(starts) or not self.own:
            steps = torch.arange(T, device=device)
            positions = torch.tensor(starts, device=device)[:, None] + steps  # [B, T]
            columns = torch.arange(max(starts) + T, device=device)
            mask = (columns <= positions[..., None])[:, None]  # [B, 1, T, S]
        outputs = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=0 if kept is None else torch.tensor(kept, device=device),
            **{CACHE_ARGUMENT: cache},
        )
        for row, part in zip(rows, parts, strict=True):
            row.length += len(part)
        return outputs.logits

    # -- tokens --------------------------------------------------------------------------------

    def sample_tokens(self, rows: list[Sequence], logits: Tensor) -> list[int]:
        """The next token of each row from logits [B, V]; rows of the same settings together."""
        logits = logits.float()
        free = logits
        if any(row.request.constraint for row in rows):
            logits = logits.clone()
            for row, own in zip(rows, logits, strict=True):
                if row.request.constraint:
                    own[~row.request.constraint.allowed()] = -torch.inf
        groups = defaultdict(list)
        for n, row in enumerate(rows):
            groups[row.request.sampling.filters].append(n)
        chosen = [0] * len(rows)
        for members in groups.values():
            some = [rows[n] for n in members]
            their = logits if len(some) == len(rows) else logits[members]
            tokens = sample(
                their,
                some[0].request.sampling,
                [row.seen for row in some],
                [row.counts for row in some],
                [row.generator for row in some],
            )
            for n, token in zip(members, tokens.tolist(), strict=True):
                constraint = rows[n].request.constraint
                chosen[n] = constraint.accept(token) if constraint else token
        if any(row.request.top_logprobs is not None for row in rows):
            record_logprobs(rows, free.log_softmax(-1), chosen)
        return chosen

    def append_token(self, row: Sequence, token: int) -> None:
        """A token to a request, which it may be the last of."""
        request, sampling = row.request, row.request.sampling
        request.tokens.append(token)
        row.seen[token] = True
        row.counts[token] += 1
        if request.detokenizer:
            request.detokenizer.feed(token)
        if token in (self.stop_ids if sampling.stop_ids is None else sampling.stop_ids):
            request.finish_reason = "stop"
        elif request.detokenizer and request.detokenizer.stopped:
            request.finish_reason = "stop"
        elif len(request.tokens) == sampling.max_new_tokens:
            request.finish_reason = "length"
        if request.detokenizer and request.finish_reason:
            request.detokenizer.end()

    def remove(self, at: int) -> None:
        """Give up a row: the last decoding one takes its place, and the last of all takes that
        one's, so that each kind stays one slice."""
        last = len(self.rows) - 1
        if at < self.decoding:
            self.decoding -= 1
            self.move(self.decoding, at)
            at = self.decoding
        self.move(last, at)
        self.rows.pop()

    def move(self, source: int, target: int) -> None:
        if source != target:
            self.memory.move(source, target, self.rows[source].length)
            self.rows[target] = self.rows[source]


def record_logprobs(rows: list[Sequence], logprobs: Tensor, chosen: list[int]) -> None:
    """Note in requests that want it how likely their new tokens were; logprobs [B, V]."""
    for row, own, token in zip(rows, logprobs, chosen, strict=True):
        if row.request.top_logprobs is not None:
            values, ids = own.topk(row.request.top_logprobs)
            top = list(zip(ids.tolist(), values.tolist(), strict=True))
            row.request.logprobs.append(TokenLogprob(own[token].item(), top))


def eos_ids(model: PreTrainedModel) -> list[int]:
    """The ids after which a reply is over."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = model.config.eos_token_id if ids is None else ids
    return [ids] if isinstance(ids, int) else list(ids or [])


# -- keys and values -------------------------------------------------------------------------------


class KVCache:
    """Keys and values of all rows, [R, K, capacity, D] for each layer; grows when it must."""

    def __init__(self, rows: int, capacity: int = 256):
        self.rows, self.capacity = rows, capacity
        self.layers: list[tuple[Tensor, Tensor]] = []

    def slice(self, first: int, starts: list[int], tokens: int) -> "KVCacheView":
        """A cache for a forward pass of neighbouring rows, with room for that many more tokens."""
        while self.capacity < max(starts) + tokens:
            self.capacity *= 2
        return KVCacheView(self, first, starts, tokens)

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, of the capacity that is wanted now."""
        if number == len(self.layers):
            self.layers.append(
                tuple(like.new_empty(self.rows, like.shape[1], 0, like.shape[3]) for _ in "kv")
            )
        stored = self.layers[number]
        if stored[0].shape[2] < self.capacity:
            R, K, length, D = stored[0].shape
            grown = tuple(each.new_zeros(R, K, self.capacity, D) for each in stored)
            for old, new in zip(stored, grown, strict=True):
                new[:, :, :length] = old
            self.layers[number] = stored = grown
        return stored

    def move(self, source: int, target: int, length: int) -> None:
        for stored in self.layers:
            for each in stored:
                each[target, :, :length] = each[source, :, :length]


class KVCacheView:
    """What a model sees of it in one forward pass: the interface of a transformers cache, as far as
    models use it. Each row goes on where it ends."""

    def __init__(self, memory: KVCache, first: int, starts: list[int], tokens: int):
        self.memory, self.starts = memory, starts
        self.rows = slice(first, first + len(starts))
        self.even = min(starts) == max(starts)
        self.end = max(starts) + tokens

    def get_seq_length(self, layer: int = 0) -> int:
        return max(self.starts)

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Put [B, K, T, D] behind what the rows have; returns them whole, [B, K, S, D]."""
        found = []
        for stored, new in zip(self.memory.layer(layer, key), (key, value), strict=True):
            rows = stored[self.rows]
            if self.even:
                rows[:, :, self.starts[0] : self.end] = new
            else:
                for row, own, start in zip(rows, new, self.starts, strict=True):
                    row[:, start : start + new.shape[2]] = own
            found.append(rows[:, :, : self.end])
        return tuple(found)

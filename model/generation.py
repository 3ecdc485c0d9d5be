"""Tokens out of a language model: KV cache, sampling, batched decoding, text as it comes.

The one engine behind chat, evaluation and samples during training. `decode` is the loop itself
and yields tokens step by step; `generate` collects them, `stream_text` turns them into text.
Models of transformers work too, with a cache of their own.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from model.model_minimind import CACHE, MiniMindConfig


@dataclass
class Sampling:
    """How the next token is chosen. The defaults sample from the model's own distribution."""

    max_new_tokens: int = 512
    temperature: float = 1.0  # 0: greedy, always the most likely token
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the most likely tokens that make up this probability
    repetition_penalty: float = 1.0  # > 1 makes tokens that have occurred less likely
    seed: int | None = None  # the same seed gives a prompt the same tokens, whatever its batch
    stop_ids: tuple[int, ...] | None = None  # default: the EOS of the model


class KVCache:
    """Keys and values of all positions so far, in memory allocated ahead.

    The interface of a transformers cache as far as the model uses it. Rows have the same length:
    shorter prompts are padded on the left.
    """

    def __init__(self, config: MiniMindConfig, capacity: int = 256):
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * config.num_hidden_layers
        self.capacity = capacity
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append [B, K, T, D] to a layer; returns all of it, [B, K, S, D]."""
        end = self.length + key.shape[2]
        if end > self.capacity:  # doubled, so that copying costs little for each token
            self.capacity = max(end, 2 * self.capacity)
        stored = self.layers[layer]
        if stored is None or stored[0].shape[2] < self.capacity:
            B, K, _, D = key.shape
            grown = tuple(new.new_empty(B, K, self.capacity, D) for new in (key, value))
            for old, new in zip(stored or (), grown, strict=False):
                new[:, :, : self.length] = old[:, :, : self.length]
            self.layers[layer] = stored = grown
        stored[0][:, :, self.length : end] = key
        stored[1][:, :, self.length : end] = value
        if layer == len(self.layers) - 1:  # all layers have this step's tokens now
            self.length = end
        return stored[0][:, :, :end], stored[1][:, :, :end]

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.layers = [(key[rows], value[rows]) for key, value in self.layers]


@torch.inference_mode()
def decode(
    model: PreTrainedModel, prompts: list[list[int]], sampling: Sampling
) -> Iterator[dict[int, int]]:
    """Decode a batch step by step; each step yields {row: its new token} for rows still running.

    A row ends with a stop token (which is yielded) or after max_new_tokens, and then leaves the
    batch. Rows do not influence each other.

    Raises:
        ValueError: a prompt is empty, or longer than the model's positions allow.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    longest = max(map(len, prompts))
    if longest + sampling.max_new_tokens > model.config.max_position_embeddings:
        raise ValueError(
            f"{longest} prompt tokens and {sampling.max_new_tokens} new ones are more than the "
            f"model's {model.config.max_position_embeddings} positions"
        )
    device = model.device
    stop = set(eos_ids(model) if sampling.stop_ids is None else sampling.stop_ids)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    tokens = torch.tensor(padded, device=device)  # [B, T]
    positions = (torch.arange(longest, device=device) - padding[:, None]).clamp(min=0)  # [B, T]
    columns = torch.arange(longest + sampling.max_new_tokens, device=device)
    real = columns >= padding[:, None]  # [B, T + max_new_tokens]
    ragged = bool(padding.any())
    V = model.config.vocab_size
    seen = torch.zeros(len(prompts), V + 1, dtype=torch.bool, device=device)
    marks = tokens.masked_fill(~real[:, :longest], V)  # padding marks a column of its own
    seen.scatter_(1, marks, True)
    seen = seen[:, :V]  # tokens that have occurred in a row
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    noise = [row_generator(sampling.seed, row, device) for row in rows]

    own = isinstance(model.config, MiniMindConfig)
    cache = KVCache(model.config) if own else DynamicCache(config=model.config)
    was_training = model.training
    model.eval()
    try:
        for step in range(sampling.max_new_tokens):
            logits = model(
                input_ids=tokens,
                attention_mask=real[:, : longest + step] if ragged else None,
                position_ids=positions if ragged else None,
                use_cache=True,
                logits_to_keep=1,
                **{CACHE: cache},
            ).logits[:, -1]
            chosen = sample(logits.float(), sampling, seen, noise)
            new = chosen.tolist()
            yield dict(zip(rows, new, strict=True))

            running = [i for i, token in enumerate(new) if token not in stop]
            if not running:
                return
            if len(running) < len(rows):
                index = torch.tensor(running, device=device)
                cache.batch_select_indices(index)
                chosen, seen, real, positions = (t[index] for t in (chosen, seen, real, positions))
                ragged = not real.all()
                rows, noise = [rows[i] for i in running], [noise[i] for i in running]
            tokens, positions = chosen[:, None], positions[:, -1:] + 1
            seen.scatter_(1, tokens, True)
    finally:
        model.train(was_training)


def generate(
    model: PreTrainedModel, prompts: list[list[int]], sampling: Sampling
) -> list[list[int]]:
    """The new tokens of each prompt, a final stop token included."""
    replies: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, prompts, sampling):
        for row, token in step.items():
            replies[row].append(token)
    return replies


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    batch_size: int = 64,
) -> Iterator[str]:
    """The replies as text, in the order of the prompts, decoded a batch at a time."""
    for start in range(0, len(prompts), batch_size):
        for reply in generate(model, prompts[start : start + batch_size], sampling):
            yield tokenizer.decode(reply, skip_special_tokens=True)


def stream_text(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Tokens as they come → pieces of text as early as they can be shown.

    A Chinese character or an emoji can be several tokens: its bytes are held back until it is
    whole. What is still incomplete at the end comes out as the replacement character.
    """
    decoder = DecodeStream(skip_special_tokens=True)
    shown, ids = "", []
    for token in tokens:
        ids.append(token)
        piece = decoder.step(tokenizer.backend_tokenizer, token)
        if piece:
            shown += piece
            yield piece
    rest = tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]
    if rest:
        yield rest


# -- weights in half the bytes ---------------------------------------------------------------------


def prepare_to_decode(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model on a CPU two to three times as fast at decoding, and unfit for anything else.

    To decode a token is to read every weight and to do little with it, so that bytes are time. Our
    files hold float16 numbers: kept as such they are half the bytes of float32, and exact. FBGEMM,
    which is part of PyTorch on x86, multiplies from them in float32, and shares a single row out to
    all cores, where F.linear uses one. Models of other numbers or on other machines stay as they
    are.
    """
    on_x86 = model.device.type == "cpu" and torch.backends.quantized.engine in ("x86", "fbgemm")
    linears = {name: each for name, each in model.named_modules() if type(each) is nn.Linear}
    weights = [linear.weight for linear in linears.values()]
    if on_x86 and all(torch.equal(weight, weight.half().float()) for weight in weights):
        for name, linear in linears.items():
            model.set_submodule(name, LinearOfHalves(linear))
    return model.eval()


class LinearOfHalves(nn.Module):
    """nn.Linear with its weights in float16, for float32 rows on an x86 CPU. No gradients."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight, linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(rows, self.packed)


# -- choosing the next token -----------------------------------------------------------------------


def sample(
    logits: Tensor, sampling: Sampling, seen: Tensor, noise: list[torch.Generator]
) -> Tensor:
    """[B] next tokens from logits [B, V]; seen [B, V] marks the tokens that have occurred."""
    logits = filter_logits(logits, sampling, seen)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # p_i / E_i with E_i ~ Exp(1) is largest at i with probability p_i. Unlike multinomial it lets
    # each row draw from its own generator, so that neighbours do not change a row's tokens.
    draws = [torch.empty_like(logits[0]).exponential_(generator=g) for g in noise]
    return (logits.softmax(-1) / torch.stack(draws)).argmax(-1)


def filter_logits(logits: Tensor, sampling: Sampling, seen: Tensor) -> Tensor:
    """Repetition penalty (CTRL, arXiv 1909.05858), temperature, top-k, top-p (arXiv 1904.09751),
    in this order, which is that of transformers. What is ruled out becomes −inf."""
    if sampling.repetition_penalty != 1:
        factor = sampling.repetition_penalty
        penalised = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # of all likelier tokens
        unlikely = before >= sampling.top_p
        unlikely[:, 0] = False  # the likeliest always stays
        logits = logits.masked_fill(unlikely.scatter(1, order, unlikely), -torch.inf)
    return logits


def row_generator(seed: int | None, row: int, device: torch.device) -> torch.Generator:
    """Random numbers of one row of a batch: the same prompt at row r draws the same again."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed << 20) + row)  # no row of one seed is a row of another
    return generator


def eos_ids(model: PreTrainedModel) -> list[int]:
    """The ids after which a reply is over."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = model.config.eos_token_id if ids is None else ids
    return [ids] if isinstance(ids, int) else list(ids or [])

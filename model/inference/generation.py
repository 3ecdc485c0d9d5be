"""Tokens and text out of a language model, for chat, evaluation and samples during training.

`decode` yields the tokens of a batch of prompts step by step; `generate` collects them. The work is
done by engine.py. Models of transformers work too.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.inference.engine import Engine, Request
from model.inference.sampling import SamplingParams


def decode(
    model: PreTrainedModel, prompts: list[list[int]], sampling: SamplingParams
) -> Iterator[dict[int, int]]:
    """Decode a batch step by step; each step yields {row: its new token} for rows still running.

    A row ends with a stop token (which is yielded) or after max_new_tokens, and then leaves the
    batch. Rows do not influence each other.

    Raises:
        ValueError: a prompt is empty, or longer than the model's positions allow.
    """
    engine = Engine(model, slots=max(1, len(prompts)), prefill_tokens=None)
    requests = [Request(prompt, sampling, row) for row, prompt in enumerate(prompts)]
    if not requests:
        raise ValueError("every prompt needs at least one token")
    was_training = model.training
    model.eval()
    try:
        for request in requests:
            engine.submit(request)
        while engine.busy:
            yield {request.index: request.tokens[-1] for request in engine.step()}
    finally:
        model.train(was_training)


def generate(
    model: PreTrainedModel, prompts: list[list[int]], sampling: SamplingParams
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
    sampling: SamplingParams,
    batch_size: int = 64,
) -> Iterator[str]:
    """The replies as text, in the order of the prompts, decoded a batch at a time."""
    for start in range(0, len(prompts), batch_size):
        for reply in generate(model, prompts[start : start + batch_size], sampling):
            yield tokenizer.decode(reply, skip_special_tokens=True)


# -- weights in half the bytes ---------------------------------------------------------------------


def pack_for_cpu_decoding(model: PreTrainedModel) -> PreTrainedModel:
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
            model.set_submodule(name, Fp16Linear(linear))
    return model.eval()


class Fp16Linear(nn.Module):
    """nn.Linear with its weights in float16, for float32 rows on an x86 CPU. No gradients."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight, linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(rows, self.packed)

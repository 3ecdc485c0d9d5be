"""Generation for chat, evaluation and samples during training, on top of engine.py.

`decode` yields the tokens of a batch of prompts step by step, `generate` collects them,
`generate_text` decodes them. Models of transformers work too.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.inference.engine import Engine, Request, TokenLogprob
from model.inference.sampling import SamplingParams


def decode(
    model: PreTrainedModel, prompts: list[list[int]], sampling: SamplingParams
) -> Iterator[dict[int, int]]:
    """Decode a batch of prompts; each step yields {index of the prompt: its new token} for those
    that still run.

    A reply ends with a stop token (which is yielded) or after max_new_tokens. The replies do not
    depend on what else is in the batch.

    Raises:
        ValueError: a prompt is empty, or longer than the model's positions allow.
    """
    engine = Engine(model, slots=max(1, len(prompts)), prefill_tokens=None)
    requests = [Request(prompt, sampling, index) for index, prompt in enumerate(prompts)]
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
    """The reply to each prompt as tokens, with its final stop token."""
    replies: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, prompts, sampling):
        for index, token in step.items():
            replies[index].append(token)
    return replies


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: SamplingParams,
    batch_size: int = 64,
) -> Iterator[str]:
    """The replies as text in the order of the prompts, generated a batch at a time."""
    for start in range(0, len(prompts), batch_size):
        for reply in generate(model, prompts[start : start + batch_size], sampling):
            yield tokenizer.decode(reply, skip_special_tokens=True)


# -- float16 weights on a CPU ----------------------------------------------------------------------


def pack_for_cpu_decoding(model: PreTrainedModel) -> PreTrainedModel:
    """Pack the linear layers for decoding on an x86 CPU: two to three times as fast. The model can
    do nothing else afterwards.

    Decoding one token reads every weight once and computes little, so its time is the bytes of the
    weights. Weight files are float16; kept so, they are half the bytes of float32, and exact.
    FBGEMM (part of PyTorch on x86) multiplies float32 rows by them and uses all cores for a single
    row, where F.linear uses one. A model whose weights are not exactly float16, or on another
    machine, stays as it is.
    """
    on_x86 = model.device.type == "cpu" and torch.backends.quantized.engine in ("x86", "fbgemm")
    linears = {name: each for name, each in model.named_modules() if type(each) is nn.Linear}
    weights = [linear.weight for linear in linears.values()]
    if on_x86 and all(torch.equal(weight, weight.half().float()) for weight in weights):
        for name, linear in linears.items():
            model.set_submodule(name, Fp16Linear(linear))
    return model.eval()


class Fp16Linear(nn.Module):
    """nn.Linear with float16 weights for float32 inputs, on an x86 CPU. No gradients."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight, linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(rows, self.packed)


@torch.inference_mode()
def prompt_logprobs(
    model: PreTrainedModel, prompt: list[int], top: int
) -> list[TokenLogprob | None]:
    """log p of each token of a prompt, given those before it, with the `top` most likely tokens of
    its place; None for the first, which nothing predicts."""
    ids = torch.tensor([prompt], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]  # [T - 1, V]
    found: list[TokenLogprob | None] = [None]
    for rows, targets in zip(logits.split(256), ids[0, 1:].split(256), strict=True):
        logprobs = rows.float().log_softmax(-1)
        of_targets = logprobs.gather(-1, targets[:, None])[:, 0].tolist()
        values, tokens = logprobs.topk(top, dim=-1)
        for logprob, *pair in zip(of_targets, tokens.tolist(), values.tolist(), strict=True):
            found.append(TokenLogprob(logprob, list(zip(*pair, strict=True))))
    return found

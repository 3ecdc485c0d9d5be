"""Tokens a second of greedy decoding: this project's `generate` against that of transformers.

    python benchmarks/decode_speed.py [--weight FILE.pth] [--ragged True] [--json FILE]

Both sides have the same weights (transformers': LlamaForCausalLM, or Qwen3ForCausalLM with q/k
norm), the same random prompts, float32, a cache, PyTorch's scaled_dot_product_attention, and no
EOS, so that every row gets all its tokens. A round times one call of each, prompts included, after
a first call that is not counted. The table shows the medians; the ratio is the median of the
rounds' own ratios, since other work on a machine slows down neighbours in time alike.

"ours" is the model as eval_llm.py uses it, `prepare_to_decode` done before: on x86 it multiplies
from weights in float16, which they are in a .pth file (random ones are rounded). "plain" is the
same without that. "products" is what the matrix products alone would allow with float32 weights:
all matrices of the model, one F.linear each.

Tokens are compared. Sums in another order differ in their last bits, and where the two best tokens
are as close as that, both choices are right: a row may differ from such a place on.
"""

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from peers import peer_of
from torch import nn
from transformers import PreTrainedModel

from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.generation import Sampling, generate, prepare_to_decode
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import count_parameters, load_model, write_json
from trainer.hardware import describe_machine, resolve_device

TIE = 1e-3  # logits nearer than this are equally good
SIDES = ("ours", "transformers", "plain", "products")


@dataclass
class Args:
    weight: str = option("", "a .pth file; default: random weights of the 512×8 model")
    prompt_tokens: int = option(32, "length of the prompts")
    ragged: bool = option(False, "prompts of many lengths, at most prompt_tokens, in one batch")
    new_tokens: int = option(128, "tokens to decode for each prompt")
    batch_sizes: list[int] = option([1, 32], "how many prompts at a time")
    rounds: int = option(5, "how often each side is timed")
    device: str = option("auto", "auto, cuda, mps or cpu")
    seed: int = option(0, "of the random weights and prompts")
    json: str = option("", "also write the figures to this file")


@dataclass
class Models:
    """The same model three times."""

    ours: MiniMindForCausalLM
    plain: MiniMindForCausalLM
    transformers: PreTrainedModel


def main(args: Args) -> dict:
    if min(args.prompt_tokens, args.new_tokens, args.rounds, *args.batch_sizes) < 1:
        raise UserError("lengths, batch sizes and rounds must be at least 1")
    device = resolve_device(args.device)
    torch.manual_seed(args.seed)
    model = load_model(args.weight) if args.weight else MiniMindForCausalLM(MiniMindConfig())
    model = model.half().float().to(device).eval()  # numbers as in a .pth file
    peer = peer_of(model.config)
    peer.load_state_dict(model.state_dict(), strict=True)
    peer.generation_config.eos_token_id = None  # so that all tokens are made
    models = Models(prepare_to_decode(deepcopy(model)), model, peer.to(device).eval())
    report = {
        "date": str(date.today()),
        "machine": describe_machine(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": count_parameters(model),
        "arguments": vars(args),
        "batch_sizes": {size: compare(models, size, args) for size in args.batch_sizes},
    }
    print(f"\n{report['parameters'] / 1e6:.2f}M parameters, {report['machine']}, {report['date']}")
    print(f"{'':12}" + "".join(f"{name:>14}" for name in SIDES))
    for size, row in report["batch_sizes"].items():
        speeds = "".join(f"{row[name]:14.0f}" for name in SIDES)
        print(f"batch {size:<6}{speeds}   tokens/s; ours {row['ratio']:.2f} × transformers")
    if args.json:
        write_json(args.json, report)
    return report


def compare(models: Models, size: int, args: Args) -> dict:
    """The figures of one batch size."""
    model = models.plain
    lengths = [args.prompt_tokens] * size
    if args.ragged:
        lengths = torch.randint(1, args.prompt_tokens + 1, (size,)).tolist()
    prompts = [torch.randint(3, model.config.vocab_size, (n,)).tolist() for n in lengths]
    sides: dict[str, Callable] = {
        "ours": partial(generate_ours, models.ours, prompts, args.new_tokens),
        "transformers": partial(generate_peer, models.transformers, prompts, args.new_tokens),
        "plain": partial(generate_ours, model, prompts, args.new_tokens),
        "products": partial(multiply_all, model, size, args.new_tokens),
    }
    replies = sides["transformers"]()
    for side in ("ours", "plain"):
        check_tokens(model, prompts, sides[side](), replies)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, run in sides.items():
            synchronise(model.device)
            start = time.perf_counter()
            run()
            synchronise(model.device)
            seconds[side].append(time.perf_counter() - start)
    tokens = size * args.new_tokens
    speeds = {side: round(tokens / statistics.median(times), 1) for side, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
    return speeds | {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def generate_ours(
    model: MiniMindForCausalLM, prompts: list[list[int]], new_tokens: int
) -> list[list[int]]:
    return generate(model, prompts, Sampling(new_tokens, temperature=0, stop_ids=()))


def generate_peer(
    peer: PreTrainedModel, prompts: list[list[int]], new_tokens: int
) -> list[list[int]]:
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    replies = peer.generate(
        torch.tensor(padded, device=peer.device),
        attention_mask=torch.tensor(real, device=peer.device),
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
    )
    return replies[:, longest:].tolist()


@torch.inference_mode()
def multiply_all(model: MiniMindForCausalLM, size: int, times: int) -> None:
    """What one decoded token needs of matrix products, so many times."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {n: torch.randn(size, n, device=model.device) for _, n in {w.shape for w in weights}}
    for _ in range(times):
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)


@torch.inference_mode()
def check_tokens(
    model: MiniMindForCausalLM,
    prompts: list[list[int]],
    ours: list[list[int]],
    theirs: list[list[int]],
) -> None:
    """RuntimeError unless the replies are the same, but for ties."""
    for prompt, own, other in zip(prompts, ours, theirs, strict=True):
        if own == other:
            continue
        at = next(i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b)
        ids = torch.tensor([prompt + own[:at]], device=model.device)
        logits = model(ids, logits_to_keep=1).logits[0, -1]
        if logits.max() - logits[[own[at], other[at]]].min() > TIE:
            raise RuntimeError(f"the replies differ at token {at}: {own[at]} and {other[at]}")
        print(f"a tie at token {at} of a row: {own[at]} and {other[at]}")


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))

"""Speed of greedy decoding in tokens per second: this project, transformers and llama.cpp.

    python benchmarks/speed/decode_speed.py [--use_moe 1] [--weight FILE.pth] [--ragged 1]

All have the same weights (in transformers the class that scripts/convert_model.py chooses), random
prompts, a KV cache, the same number of threads, and no EOS, so that every row gets all its tokens.
PyTorch computes in float32. A round times one call of each, with prefill, after a warm-up call. The
table shows medians over the rounds. A ratio is the median of the ratios of each round, since other
load on the machine slows down neighbours in time alike.

ours          the model as eval_llm.py uses it, `pack_for_cpu_decoding` done before: on x86 it
              multiplies from float16 weights, as they are in a .pth file (random ones are rounded)
plain         the same without packing
transformers  its generate, with PyTorch's scaled_dot_product_attention
llama f32     llama.cpp with float32 weights and cache; needs `pip install llama-cpp-python`
llama f16     llama.cpp with float16 weights and cache, as it is mostly used; it also rounds
              activations to float16, so that its tokens are not compared
products      dense models only: the upper limit of the matrix products alone with float32 weights,
              one F.linear per matrix

Tokens are compared. Another order of summation changes the last bits. Where the two best logits are
closer than that (a tie), both tokens are right, and the rows may differ from there on.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Any

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error


@dataclass
class Args:
    weight: str = option("", "a .pth file; default: random weights of the 512×8 model")
    use_moe: bool = option(False, "random weights of a mixture-of-experts model")
    prompt_tokens: int = option(32, "length of the prompts, in tokens")
    ragged: bool = option(False, "random prompt lengths in a batch, at most prompt_tokens")
    new_tokens: int = option(128, "number of tokens to generate per prompt")
    batch_sizes: list[int] = option([1, 32], "prompts per batch")
    rounds: int = option(5, "number of timed rounds")
    device: str = option("auto", "auto, cuda, mps or cpu")
    seed: int = option(0, "random seed of weights and prompts")
    json: str = option("", "also write the results to this file")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import torch
import torch.nn.functional as F
import transformers
from peers import peer_with_weights
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from model.inference.generation import generate, pack_for_cpu_decoding
from model.inference.sampling import SamplingParams
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import count_parameters, load_model, write_json
from trainer.common.hardware import describe_machine, resolve_device

TIE = 1e-3  # logits closer than this count as equal
SIDES = ("ours", "plain", "transformers", "llama f32", "llama f16", "products")


def main(args: Args) -> dict:
    if min(args.prompt_tokens, args.new_tokens, args.rounds, *args.batch_sizes) < 1:
        raise UserError("lengths, batch sizes and rounds must be at least 1")
    device = resolve_device(args.device)
    torch.manual_seed(args.seed)
    if args.weight:
        model = load_model(args.weight)
    else:
        model = MiniMindForCausalLM(MiniMindConfig(use_moe=args.use_moe))
    model = model.half().float().to(device).eval()  # rounded to float16, as in a .pth file
    packed = pack_for_cpu_decoding(deepcopy(model))
    peer = peer_with_weights(model).to(device).eval()
    peer.generation_config.eos_token_id = None  # so that all tokens are generated
    report = {
        "date": str(date.today()),
        "machine": describe_machine(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": count_parameters(model),
        "arguments": vars(args),
        "batch_sizes": {
            size: compare(model, packed, peer, size, args) for size in args.batch_sizes
        },
    }
    table = Table(title="tokens a second", title_justify="left")
    table.add_column("batch", justify="right")
    for side in SIDES:
        table.add_column(side, justify="right")
    for size, speeds in report["batch_sizes"].items():
        cells = (f"{speeds[side]:,.0f}" if side in speeds else "–" for side in SIDES)
        table.add_row(str(size), *cells)
        ratios = (f"{x:.2f}×" if (x := speeds["ratios"].get(side)) else "" for side in SIDES)
        table.add_row("ours ÷ it", *ratios)
    Console().print(table)
    print(f"{report['parameters'] / 1e6:.2f}M parameters, {report['machine']}, {report['date']}")
    if args.json:
        write_json(args.json, report)
    return report


def compare(
    model: MiniMindForCausalLM,
    packed: MiniMindForCausalLM,
    peer: PreTrainedModel,
    size: int,
    args: Args,
) -> dict[str, Any]:
    """Speeds and ratios for one batch size."""
    lengths = [args.prompt_tokens] * size
    if args.ragged:
        lengths = torch.randint(1, args.prompt_tokens + 1, (size,)).tolist()
    prompts = [torch.randint(3, model.config.vocab_size, (n,)).tolist() for n in lengths]
    sides: dict[str, Callable] = {
        "ours": partial(generate_ours, packed, prompts, args.new_tokens),
        "plain": partial(generate_ours, model, prompts, args.new_tokens),
        "transformers": partial(generate_peer, peer, prompts, args.new_tokens),
    }
    engines = []
    for dtype in ("float32", "float16"):
        if model.device.type == "cpu" and importlib.util.find_spec("llama_cpp"):
            from llama_cpp_peer import LlamaCpp

            room = args.prompt_tokens + args.new_tokens
            engine = LlamaCpp(model, dtype, size, room, torch.get_num_threads())
            engines.append(engine)
            name = f"llama {dtype[0]}{dtype[-2:]}"
            sides[name] = partial(engine.generate, prompts, args.new_tokens)
    replies = {side: run() for side, run in sides.items()}
    for side in sorted(replies.keys() - {"plain", "llama f16"}):
        check_tokens(model, side, prompts, replies["plain"], replies[side])
    if not model.config.use_moe:
        sides["products"] = partial(multiply_all, model, size, args.new_tokens)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in tqdm(range(args.rounds), desc=f"batch {size}"):
        for side, run in sides.items():
            synchronise(model.device)
            start = time.perf_counter()
            run()
            synchronise(model.device)
            seconds[side].append(time.perf_counter() - start)
    for engine in engines:
        engine.close()
    tokens = size * args.new_tokens
    rounds = {
        side: [other / own for own, other in zip(seconds["ours"], times, strict=True)]
        for side, times in seconds.items()
        if side not in ("ours", "products")
    }
    return {
        **{side: round(tokens / statistics.median(times), 1) for side, times in seconds.items()},
        "ratios": {side: round(statistics.median(each), 3) for side, each in rounds.items()},
        "rounds": {side: [round(ratio, 3) for ratio in each] for side, each in rounds.items()},
    }


def generate_ours(
    model: MiniMindForCausalLM, prompts: list[list[int]], new_tokens: int
) -> list[list[int]]:
    return generate(model, prompts, SamplingParams(new_tokens, temperature=0, stop_ids=()))


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
    """The matrix products of decoding `times` tokens."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {n: torch.randn(size, n, device=model.device) for _, n in {w.shape for w in weights}}
    for _ in range(times):
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)


@torch.inference_mode()
def check_tokens(
    model: MiniMindForCausalLM,
    side: str,
    prompts: list[list[int]],
    plain: list[list[int]],
    theirs: list[list[int]],
) -> None:
    """RuntimeError unless a side generates the same tokens as the plain one, except at ties."""
    for prompt, own, other in zip(prompts, plain, theirs, strict=True):
        if own == other:
            continue
        at = next(i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b)
        ids = torch.tensor([prompt + own[:at]], device=model.device)
        logits = model(ids, logits_to_keep=1).logits[0, -1]
        if logits.max() - logits[[own[at], other[at]]].min() > TIE:
            raise RuntimeError(f"{side} differs at token {at}: {other[at]} and not {own[at]}")
        print(f"{side}: a tie at token {at} of a row, {other[at]} and {own[at]}")


def synchronise(device: torch.device) -> None:
    """Wait for the GPU to finish."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

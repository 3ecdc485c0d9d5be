"""What the machine is and can do: device, precision, peak speed, memory."""

import importlib.util
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from model.errors import UserError
from model.model_minimind import MiniMindConfig, MiniMindModel
from model.weights import count_parameters

PRODUCT = 512  # rows and columns of a matrix product that is timed
WORTHWHILE_GAIN = 1.5  # of products, at which a training gains in spite of the casts
# Peak dense bf16 rates in TFLOP/s, from NVIDIA's data sheets, without sparsity.
GPU_TFLOPS = {
    "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "T4": 65, "V100": 125,
    "4090": 165, "4080": 97, "4070": 58, "3090": 71, "3080": 60, "3070": 41, "3060": 25,
}  # fmt: skip


def resolve_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA, else Apple's MPS, else the CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        mps = torch.backends.mps.is_available() and ranks_here() == 1  # there is one such GPU
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown; try auto, cuda, cuda:1, mps or cpu") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch sees no CUDA GPU; use --device auto")
        if device.index is not None and ranks_here() > 1:
            raise UserError(f"--device {name} is one GPU for all processes; use --device cuda")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(
                f"there is no GPU {index}: this machine has {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this PyTorch sees no Apple GPU; use --device auto")
    elif device.type not in ("cpu", "mps"):
        raise UserError(f"--device {name} is not supported; try auto, cuda, mps or cpu")
    return device


def ranks_here() -> int:
    """How many processes of this training run on this machine (torchrun tells)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))


def physical_cores() -> int:
    """More threads than these make training slower."""
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type to compute in; the weights themselves are float32 always.

    "auto" is bfloat16 on CUDA, and on a CPU whose products are much faster in it. float16 is for
    CUDA alone, and float32 the safe choice on MPS.
    """
    if device.type == "cuda":
        if name in ("auto", "bfloat16"):  # GPUs before Ampere only emulate bfloat16, slowly
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        return getattr(torch, name)
    if device.type != "cpu":
        return torch.float32
    fast = name == "auto" and bfloat16_gain() >= WORTHWHILE_GAIN
    return torch.bfloat16 if fast or name == "bfloat16" else torch.float32


@cache
def bfloat16_gain() -> float:
    """How many times as fast as float32's this CPU's bfloat16 products are, by the clock: less
    than 1 without instructions for it (AVX-512 BF16, AMX, or an ARM processor's), 2 to 16 with."""
    single, half = math.inf, math.inf
    left, right = torch.randn(2, PRODUCT, PRODUCT)
    for _ in range(5):  # in turn, so that other work on the machine slows both
        single = min(single, product_seconds(left, right))
        half = min(half, product_seconds(left.bfloat16(), right.bfloat16()))
    return single / half


def product_seconds(left: Tensor, right: Tensor) -> float:
    start = time.perf_counter()
    (left @ right)[0, 0].item()  # which waits for a GPU
    return time.perf_counter() - start


def should_compile(device: torch.device) -> bool:
    """Whether torch.compile is worth the minute it takes: on CUDA, if Triton is installed."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """The context of a forward pass in `dtype`."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating point operations a second that the device can do, a multiply-add counted as two.

    CUDA: from the data sheet, None for a GPU that is not in the table. Otherwise measured here,
    with a matrix product, in a fraction of a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((tflops for key, tflops in GPU_TFLOPS.items() if key in name), None)
        if known is None:
            return None
        return known * 1e12 / (2 if dtype == torch.float32 else 1)
    left, right = torch.randn(2, 2 * PRODUCT, 2 * PRODUCT, device=device, dtype=dtype)
    return 2 * (2 * PRODUCT) ** 3 / min(product_seconds(left, right) for _ in range(6))


def flops_per_token(config: MiniMindConfig, seq_len: int) -> float:
    """Floating-point operations to train one token, forward and backward (arXiv 2204.02311,
    appendix B): 6 for each weight of a matrix that the token is multiplied with, and for attention
    12 · layers · hidden · T/2 in a sequence of T, of which a causal token sees half on average."""
    C, head = config.hidden_size, config.head_dim
    attention = C * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    feed_forward = 3 * C * config.active_intermediate_size
    feed_forward += C * config.n_routed_experts * config.use_moe  # the router
    matrices = config.num_hidden_layers * (attention + feed_forward)
    matrices += C * config.vocab_size  # the output head
    return 6 * matrices + 6 * config.num_hidden_layers * C * seq_len


def is_oom(error: Exception) -> bool:
    """Whether the error says that memory ran out, of a GPU or of the machine."""
    on_cpu = "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError)


@contextmanager
def oom_guard(args: Any, hint: str = "try a smaller one") -> Iterator[None]:
    """Turn running out of memory into a UserError that names the batch size and what would fit."""
    try:
        yield
    except RuntimeError as error:
        if not is_oom(error):
            raise
        flag = args.batch_size_flag
        raise UserError(f"out of memory with --{flag} {getattr(args, flag)}; {hint}") from error


def memory_in_use(device: torch.device) -> float:
    """Bytes: the peak of PyTorch's allocations on CUDA, else this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def memory_available(device: torch.device) -> float:
    """Bytes that are free for us now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def total_memory(device: torch.device) -> float:
    """Bytes of the whole machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total


def describe_machine(device: torch.device) -> str:
    """One line for logs and reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {physical_cores()} cores, {torch.get_num_threads()} threads"


def training_memory(
    config: MiniMindConfig,
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    optimizer: str,
    gradient_checkpointing: bool,
) -> tuple[float, float]:
    """An estimate of what training needs: bytes in any case, and bytes per token of a batch.

    In any case: the weights, and for each trainable one its gradient and the optimizer's moments
    (AdamW has two, Muon one), in float32. Per token, what backward keeps of each layer: about 12
    vectors of the hidden size and 4 of the intermediate size, or with gradient checkpointing one
    vector a layer and one whole layer at a time; and the logits, which a CPU and float32 make in
    chunks and autocast on a GPU as a whole, three times. A critic beside the actor doubles all
    that.
    """
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    fixed = 4 * (count_parameters(model) + trainable * (3 if optimizer == "adamw" else 2))
    is_float32 = dtype == torch.float32
    in_chunks = is_float32 or device.type == "cpu"
    size = 4 if is_float32 else 3  # under autocast part of it stays float32
    layer = 12 * config.hidden_size + 4 * config.active_intermediate_size
    layers = config.num_hidden_layers
    kept = layer + layers * config.hidden_size if gradient_checkpointing else layers * layer
    models = sum(isinstance(part, MiniMindModel) for part in model.modules())
    return fixed, models * (size * kept + config.vocab_size * (1 if in_chunks else 14))


# -- random states ---------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator, in types that torch.load reads with weights_only."""
    version, numbers, gauss = random.getstate()
    legacy: Any = np.random.get_state()  # a tuple; it could be asked for a dict
    kind, keys, *rest = legacy
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "device": device_rng(device).get_rng_state() if device.type != "cpu" else None,
    }


def restore_rng_state(state: dict[str, Any], device: torch.device) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and device.type != "cpu":
        device_rng(device).set_rng_state(state["device"])


def device_rng(device: torch.device) -> Any:
    """torch.cuda or torch.mps, which hold the state of the current GPU's generator."""
    return getattr(torch, device.type)

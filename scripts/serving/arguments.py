"""Flags that chat, web page, server and evaluation share: which model, and how to sample."""

from dataclasses import dataclass
from typing import Literal

from model.command_line import option
from model.errors import UserError
from model.inference.sampling import SamplingParams
from model.weights import OUT, TOKENIZER


@dataclass
class ModelArgs:
    """Which model to load, and on what device."""

    load_from: str = option(
        str(TOKENIZER), "./model: own weights from save_dir; else a transformers folder"
    )
    weight: str = option("full_sft", "own weights: a stage, such as pretrain, a .pth or a folder")
    lora_weight: str = option("", "own weights: a LoRA adapter, such as lora_identity, or a .pth")
    hidden_size: int | None = option(None, "own weights: hidden size; default: the newest file")
    use_moe: bool | None = option(
        None, "own weights: with experts (1) or without (0); default: the newest file"
    )
    save_dir: str = option(str(OUT), "folder of own weights")
    tokenizer_path: str = option(
        "", "folder of the tokenizer; default: load_from, or beside the weights"
    )
    inference_rope_scaling: bool = option(False, "YaRN, for texts longer than in training")
    yarn_factor: float | None = option(None, "YaRN: context length / trained length; default: 4")
    yarn_original_length: int | None = option(None, "YaRN: trained length; default: 2048")
    yarn_beta_fast: float | None = option(
        None, "YaRN: dimensions with more rotations are not scaled; default: 32"
    )
    yarn_beta_slow: float | None = option(
        None, "YaRN: dimensions with fewer rotations are fully interpolated; default: 1"
    )
    yarn_attention_factor: float | None = option(
        None, "YaRN: factor on cos and sin of the rotation; default: 0.1 · ln(factor) + 1"
    )
    device: str = option("auto", "auto, cuda, cuda:1, mps or cpu")
    dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", "of the weights on CUDA; elsewhere float32"
    )


@dataclass
class ChatArgs(ModelArgs):
    """Which model to load, and how to sample its answers."""

    historys: int = option(0, "number of earlier messages in the prompt; 0: each prompt alone")
    max_new_tokens: int = option(512, "maximum length of an answer, in tokens")
    temperature: float = option(0.85, "sampling temperature; 0: greedy")
    top_p: float = option(0.85, "nucleus sampling: smallest set of tokens with this probability")
    top_k: int = option(0, "sample from the k most likely tokens; 0: all")
    repetition_penalty: float = option(1.0, "above 1 makes repetition less likely")
    open_thinking: bool = option(False, "start answers with <think>, for reasoning models")
    seed: int | None = option(None, "random seed of the sampling; default: a new one each time")

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # also refuses NaN
            raise UserError(f"--temperature must be at least 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= (self.seed or 0) < 2**31:
            raise UserError(f"--seed must be at least 0 and below 2^31, not {self.seed}")
        if self.historys < 0:
            raise UserError(f"--historys must be at least 0, not {self.historys}")

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


@dataclass
class ServerArgs(ModelArgs):
    """Which model to serve, where, and with what limits."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: reachable from other machines")
    port: int = option(8000, "port to listen on")
    api_key: str = option("", "API key that clients must send; default: none needed")
    model_name: str = option("minimind", "name of the model in the API")
    max_batch: int = option(32, "maximum number of requests decoded at a time")
    max_queue: int = option(256, "maximum number of requests waiting; more are refused")
    max_length: int = option(4096, "maximum length of prompt and reply together, in tokens")
    max_new_tokens: int = option(512, "maximum length of a reply; default of requests")
    prefill_tokens: int = option(512, "maximum number of prompt tokens per engine step")
    open_thinking: bool = option(False, "start replies with <think>; default of requests")
    temperature: float = option(0.85, "sampling temperature; default of requests")
    top_p: float = option(0.85, "nucleus sampling; default of requests")

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_length", "max_new_tokens", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.max_queue < 0:
            raise UserError(f"--max_queue must be at least 0, not {self.max_queue}")

"""Which model to talk to, and how: flags that chat, web page and server share, and loading it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.command_line import option
from model.errors import UserError
from model.inference.generation import pack_for_cpu_decoding
from model.inference.loading import load_for_chat, yarn_settings
from model.model_lora import load_lora, merge_and_unload
from model.weights import (
    OUT,
    TOKENIZER,
    count_parameters,
    find_weights,
)
from trainer.common.hardware import resolve_device, resolve_dtype


@dataclass
class ModelArgs:
    load_from: str = option(
        str(TOKENIZER), "./model: own weights from save_dir; else a transformers folder"
    )
    weight: str = option("full_sft", "own weights: the stage, such as pretrain, or a .pth file")
    lora_weight: str = option("", "own weights: what train_lora.py made, as lora_identity")
    hidden_size: int | None = option(None, "own weights: which size; default: the newest")
    save_dir: str = option(str(OUT), "folder of own weights")
    tokenizer_path: str = option("", "folder of the tokenizer; default: that of load_from")
    inference_rope_scaling: bool = option(False, "YaRN, for texts longer than in training")
    yarn_factor: float | None = option(None, "with it: how many times longer; default: 4")
    yarn_original_length: int | None = option(None, "the length in training; default: 2048")
    yarn_beta_fast: float | None = option(None, "pairs that turn more often stay; default: 32")
    yarn_beta_slow: float | None = option(None, "pairs that turn less are slowed; default: 1")
    yarn_attention_factor: float | None = option(None, "default: 0.1 · ln(factor) + 1")
    device: str = option("auto", "auto, cuda, cuda:1, mps or cpu")
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "on CUDA")


@dataclass
class TalkArgs(ModelArgs):
    """How to talk to it, too."""

    historys: int = option(0, "how many earlier messages the model sees; 0: each prompt alone")
    max_new_tokens: int = option(512, "longest answer")
    temperature: float = option(0.85, "how freely it chooses; 0: always the likeliest token")
    top_p: float = option(0.85, "choose among the likeliest tokens that make up this share")
    top_k: int = option(0, "choose among this many of the likeliest tokens; 0: all")
    repetition_penalty: float = option(1.0, "more than 1 discourages repetition")
    open_thinking: bool = option(False, "let it think first, if it has learnt to")
    seed: int | None = option(None, "the same seed gives the same answers")

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # nor is NaN
            raise UserError(f"--temperature must not be negative, as {self.temperature} is")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be more than 0 and at most 1, not {self.top_p}")
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= (self.seed or 0) < 2**31:
            raise UserError(f"--seed must be at least 0 and less than 2^31, not {self.seed}")
        if self.historys < 0:
            raise UserError(f"--historys must not be negative, as {self.historys} is")


class ChatModel(NamedTuple):
    """A model that is ready to decode, and what is known of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stage: str  # "" where unknown
    name: str
    parameters: int


def load_chat_model(args: ModelArgs, weight: str, decode_only: bool = True) -> ChatModel:
    """The model that the flags name. `decode_only` makes it faster at that and unfit for the rest,
    such as judging whole texts."""
    device = resolve_device(args.device)
    model, tokenizer, stage = load_for_chat(
        args.load_from,
        weight,
        hidden_size=args.hidden_size,
        directory=args.save_dir,
        tokenizer_path=args.tokenizer_path,
        device=device,
        dtype=resolve_dtype(args.dtype, device),
        yarn=yarn_settings(args),
    )
    parameters = count_parameters(model)
    foreign = (Path(args.load_from) / "config.json").exists()
    if args.lora_weight:
        if foreign:
            raise UserError("--lora_weight is for own weights, and --load_from is another model")
        add_weights_of_lora(model, args)
    name = args.load_from if foreign else weight
    model = pack_for_cpu_decoding(model) if decode_only else model.eval()
    return ChatModel(model, tokenizer, stage, name, parameters)


def add_weights_of_lora(model: PreTrainedModel, args: ModelArgs) -> None:
    """Merge an addition into the model; a stage's name or a .pth file says which."""
    path = Path(args.lora_weight)
    if path.suffix != ".pth":
        sizes = dict(hidden_size=model.config.hidden_size, use_moe=model.config.use_moe)
        path = find_weights(f"lora/{args.lora_weight}", directory=args.save_dir, **sizes)
    load_lora(model, path)
    merge_and_unload(model)

"""The one loader of a finished model, for chat, server, web page, evaluation and demo."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dataset.chat import stop_tokens
from model.errors import UserError
from model.formats.hf_format import load_transformers
from model.formats.lora_format import load_lora, resolve_lora
from model.formats.native_format import is_native
from model.inference.engine import eos_ids, max_positions
from model.inference.generation import pack_for_cpu_decoding
from model.inference.thinking import close_thoughts
from model.model_lora import merge_and_unload
from model.weights import (
    TOKENIZER,
    count_parameters,
    load_model,
    load_tokenizer,
    read_info,
    tokenizer_beside,
)
from scripts.serving.arguments import ModelArgs, find_model
from trainer.common.hardware import resolve_device, resolve_dtype


class ChatModel(NamedTuple):
    """A model in eval mode, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stage: str  # "" where unknown
    name: str
    num_parameters: int

    @property
    def is_base_model(self) -> bool:
        """It was only pretrained, or has no chat template: it continues text, and does not chat."""
        return self.stage == "pretrain" or not self.tokenizer.chat_template

    @property
    def max_positions(self) -> int:
        return max_positions(self.model)


def load_chat_model(
    args: ModelArgs, weight: str | None = None, decode_only: bool = True
) -> ChatModel:
    """Load the model that the flags name, with its LoRA adapter merged.

    Args:
        weight: instead of args.weight, where a command takes several: a stage, a .pth or a folder.
        decode_only: on a CPU, pack the weights as float16. This makes decoding two to three times
            as fast; forward passes over whole texts need the unpacked model.

    Raises:
        UserError: there are no such weights, they do not fit the tokenizer, or flags contradict.
    """
    device, path = resolve_device(args.device), find_model(args, weight)
    tokenizer = load_tokenizer(args.tokenizer_path or find_tokenizer(args, path))
    config = args.config_fields()
    dtype = resolve_dtype(args.dtype if device.type == "cuda" else "float32", device)
    # A folder is run as its own architecture, unless it is to do what only MiniMind's can.
    if path.is_dir() and not (is_native(path) or config or args.lora_weight):
        model = load_transformers(path, dtype).to(device).eval()
    else:
        model = load_model(path, tokenizer=tokenizer, device=device, dtype=dtype, **config)
    stop_at_end_of_turn(model, tokenizer, is_own=not path.is_dir())
    num_parameters = count_parameters(model)
    if not path.is_dir():
        check_depth(args, model, path)
    if args.lora_weight:
        lora = resolve_lora(args.lora_weight, model.config, args.save_dir)
        load_lora(model, lora)
        merge_and_unload(model)
        if (read_info(lora) or {}).get("empty_think"):
            close_thoughts(tokenizer)
    stage = "" if path.is_dir() else (read_info(path) or {}).get("stage", "")
    name = str(path) if path.is_dir() else weight or args.weight
    model = pack_for_cpu_decoding(model) if decode_only else model.eval()
    return ChatModel(model, tokenizer, stage, name, num_parameters)


def check_depth(args: ModelArgs, model: PreTrainedModel, path: Path) -> None:
    """UserError if weights have another depth than the flag says."""
    given, found = args.num_hidden_layers, model.config.num_hidden_layers
    if given not in (None, found):
        raise UserError(f"{path} has --num_hidden_layers {found}, not {given}")


def stop_at_end_of_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, is_own: bool
) -> None:
    """Let replies end at the token with which the chat template ends a turn, which may be another
    than EOS; a folder of transformers may name still others."""
    ids = [*(() if is_own else eos_ids(model)), *stop_tokens(tokenizer)]
    if ids and set(ids) != set(eos_ids(model)):
        model.generation_config.eos_token_id = list(dict.fromkeys(ids))


def find_tokenizer(args: ModelArgs, path: Path) -> Path | str:
    """The tokenizer's folder where no flag names it: of --load_from, or beside the weights."""
    if Path(args.load_from) != TOKENIZER:
        return args.load_from
    return tokenizer_beside(path) or TOKENIZER

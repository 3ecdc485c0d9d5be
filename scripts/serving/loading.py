"""The one loader of a finished model, for chat, server, web page, evaluation and demo."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dataset.chat import stop_tokens
from model.errors import UserError
from model.inference.engine import eos_ids
from model.inference.generation import pack_for_cpu_decoding
from model.inference.loading import load_for_chat, yarn_settings
from model.model_lora import load_lora, merge_and_unload
from model.weights import count_parameters, find_weights
from scripts.serving.arguments import ModelArgs
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
        return self.model.config.max_position_embeddings


def load_chat_model(
    args: ModelArgs, weight: str | None = None, decode_only: bool = True
) -> ChatModel:
    """Load the model that the flags name, with its LoRA adapter merged.

    Args:
        weight: instead of args.weight, where a command takes several.
        decode_only: on a CPU, pack the weights as float16. This makes decoding two to three times
            as fast; forward passes over whole texts need the unpacked model.

    Raises:
        UserError: there are no such weights, they do not fit the tokenizer, or flags contradict.
    """
    weight = args.weight if weight is None else weight
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
    stop_at_end_of_turn(model, tokenizer, in_hf_format=is_hf_folder(args.load_from))
    num_parameters = count_parameters(model)
    in_hf_format = is_hf_folder(args.load_from)
    if args.lora_weight:
        if in_hf_format:
            raise UserError("--lora_weight needs own weights, but --load_from names another model")
        merge_lora(model, args)
    name = args.load_from if in_hf_format else weight
    model = pack_for_cpu_decoding(model) if decode_only else model.eval()
    return ChatModel(model, tokenizer, stage, name, num_parameters)


def stop_at_end_of_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, in_hf_format: bool
) -> None:
    """Let replies end at the token with which the chat template ends a turn, which may be another
    than EOS; a folder of transformers may name still others."""
    ids = [*(eos_ids(model) if in_hf_format else ()), *stop_tokens(tokenizer)]
    if ids and set(ids) != set(eos_ids(model)):
        model.generation_config.eos_token_id = list(dict.fromkeys(ids))


def is_hf_folder(folder: str | Path) -> bool:
    """Whether a folder holds a model in the format of transformers."""
    return (Path(folder) / "config.json").is_file()


def merge_lora(model: PreTrainedModel, args: ModelArgs) -> None:
    """Merge the adapter that --lora_weight names, by stage or as a .pth file, into the weights."""
    path = Path(args.lora_weight)
    if path.suffix != ".pth":
        config = model.config
        path = find_weights(
            f"lora/{args.lora_weight}",
            config.hidden_size,
            args.save_dir,
            use_moe=config.use_moe,
        )
    load_lora(model, path)
    merge_and_unload(model)

"""Load a model and its tokenizer for chat, from MiniMind's own weights or a transformers folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.errors import UserError
from model.formats.hf_format import load_transformers
from model.paths import check_model_folder
from model.weights import OUT, find_weights, load_model, load_tokenizer, read_info


def load_for_chat(
    load_from: Path | str,
    weight: str,
    *,
    hidden_size: int | None = None,
    use_moe: bool | None = None,
    directory: Path | str = OUT,
    tokenizer_path: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    yarn: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """A model in eval mode, its tokenizer and its stage ("" if unknown).

    Args:
        load_from: a transformers folder (with a config.json); any other folder, such as ./model,
            means MiniMind's own weights with the tokenizer of that folder.
        weight: own weights only: a stage, or the path of a `.pth`.
        hidden_size: own weights only: the size; default: the newest file of the stage.
        use_moe: own weights only: the mixture, or the dense model; default: either.
        directory: own weights only: their folder.
        yarn: own weights only: config fields of YaRN; a transformers folder has its own.
    """
    load_from = Path(load_from)
    check_model_folder(load_from)
    tokenizer = load_tokenizer(tokenizer_path or load_from)
    if (load_from / "config.json").exists():
        if yarn:
            raise UserError(
                "--inference_rope_scaling is for own weights; a transformers folder has "
                f"rope_parameters in its config.json ({load_from})"
            )
        return load_transformers(load_from, dtype).to(device).eval(), tokenizer, ""
    path = Path(weight)
    if path.suffix != ".pth":
        path = find_weights(weight, hidden_size, directory, use_moe=use_moe)
    model = load_model(path, tokenizer=tokenizer, device=device, dtype=dtype, **(yarn or {}))
    return model, tokenizer, (read_info(path) or {}).get("stage", "")


def yarn_settings(args: Any) -> dict[str, Any]:
    """The config fields that the flags --inference_rope_scaling and --yarn_* set."""
    given = {n: v for n, v in vars(args).items() if n.startswith("yarn_") and v is not None}
    if given and not args.inference_rope_scaling:
        raise UserError(f"--{min(given)} is for --inference_rope_scaling 1")
    return {"inference_rope_scaling": True, **given} if args.inference_rope_scaling else {}

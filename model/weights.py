"""Weight files: `{stage}_{hidden_size}[_moe].pth` with a `.json` of the same name beside it.

The `.pth` is a plain float16 state dict with the names of transformers. The `.json` holds what the
shapes do not show: the config, the stage, the hash of the tokenizer and how the weights were
trained. Without it (earlier versions) the config is read from the shapes (formats/minimind_format).

Wherever weights are named, a stage, a `.pth` or a folder will do (`resolve_weights`, `load_model`).
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from model.errors import UserError, reading
from model.formats.files import atomic_write, read_json, write_json  # noqa: F401
from model.formats.hf_format import load_hf_folder
from model.formats.minimind_format import (
    build_model,
    config_from_shapes,
    make_config,
    read_state,
    save_tensors,
)
from model.inference.thinking import close_thoughts, closes_thoughts
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindForScoring
from model.paths import (  # noqa: F401  where weights lie, for whoever has torch imported anyway
    OUT,
    ROOT,
    TOKENIZER,
    check_tokenizer_folder,
    find_weights,
    is_hf_folder,
    list_weights,
    resolve_weights,
    tokenizer_beside,
    weight_name,
    weight_path,
)

SCORE_HEAD = "score.weight"  # a reward model has it instead of lm_head.weight


# -- saving ----------------------------------------------------------------------------------------


def save_weights(
    model: MiniMindForCausalLM | MiniMindForScoring,
    path: Path | str,
    *,
    stage: str,
    tokenizer: PreTrainedTokenizerBase,
    origin: dict[str, Any],
) -> Path:
    """Save `model` as a float16 `.pth` with its `.json`.

    Args:
        stage: the stage that trained the weights, such as "pretrain".
        origin: how they were trained: arguments, data, steps, metrics; anything that JSON can hold.
    """
    state = to_fp16_cpu(model.state_dict())
    if model.config.tie_word_embeddings and "lm_head.weight" in state:
        state["lm_head.weight"] = state[
            "model.embed_tokens.weight"
        ]  # tied: stored once in the file
    info = {"stage": stage, "parameters": count_parameters(model), "origin": origin}
    return write_weights(path, state, model, tokenizer, info)


def write_weights(
    path: Path | str,
    state: dict[str, Tensor],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    info: dict[str, Any],
) -> Path:
    """Write a state dict as `.pth`, and `info` with config and tokenizer hash as `.json`."""
    path = Path(path)
    config = {"config": model.config.to_diff_dict(), "tokenizer_hash": tokenizer_hash(tokenizer)}
    if Path(tokenizer.name_or_path) != TOKENIZER:
        config["tokenizer_path"] = tokenizer.name_or_path
    thinking = {"empty_think": True} if closes_thoughts(tokenizer) else {}
    write_json(path.with_suffix(".json"), {**info, **config, **thinking}, checksum=True)
    save_tensors(path, state)
    return path


def to_fp16_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as weight files hold them: float16, on the CPU."""
    return {name: tensor.detach().half().cpu() for name, tensor in tensors.items()}


def count_parameters(model: torch.nn.Module) -> int:
    """The number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


# -- loading ---------------------------------------------------------------------------------------


def load_model(
    path: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> MiniMindForCausalLM:
    """Load a model from its `.pth` or folder; missing and unexpected keys are errors.

    Args:
        tokenizer: must be the one that the weights were trained with. If no hash is known, only the
            size of its vocabulary is checked.
        overrides: fields of the config that replace those of the file; structural ones must agree
            with its `.json` or config.json.

    Raises:
        UserError: not a checkpoint; a key is missing, unexpected or of another shape; another
            tokenizer; a folder of an architecture that MiniMind does not have.
    """
    path = Path(path)
    if is_hf_folder(path):
        with reading(f"the model in {path}"):
            model = load_hf_folder(path, **overrides)
        if tokenizer is not None:
            own = tokenizer_beside(path)
            info = {"tokenizer_hash": tokenizer_hash(load_tokenizer(own))} if own else None
            check_tokenizer(tokenizer, model.config, info, path)
        return model.to(device=device, dtype=dtype).eval()
    state = read_state(path)
    if SCORE_HEAD in state:
        raise UserError(
            f"{path} is a reward model, which scores texts and cannot generate; name a language "
            "model, such as full_sft"
        )
    if any(".lora" in name for name in state):
        raise UserError(
            f"{path} is a LoRA adapter and no whole model; --lora_weight names an adapter"
        )
    config = resolve_config(path, state, tokenizer, overrides)
    model = build_model(MiniMindForCausalLM, config, state, path)
    return model.to(device=device, dtype=dtype).eval()


def load_scoring_model(
    path: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> MiniMindForScoring:
    """Load a reward model from its `.pth`. Arguments and errors as in `load_model`; a language
    model, which has no scoring head, is a UserError too."""
    path = Path(path)
    state = read_state(path)
    if SCORE_HEAD not in state:
        raise UserError(
            f"{path} is not a reward model: it has no {SCORE_HEAD}; trainer/train_reward.py trains "
            "one from it"
        )
    del state["lm_head.weight"]  # added by read_state, which assumes a tied head
    config = resolve_config(path, state, tokenizer, {})
    model = build_model(MiniMindForScoring, config, state, path)
    return model.to(device=device, dtype=dtype).eval()


def resolve_config(
    path: Path,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    overrides: dict[str, Any],
) -> MiniMindConfig:
    """The config of a weight file, from its `.json` or its shapes, with `overrides`. UserError if
    they contradict each other, or the tokenizer is another one."""
    info = read_info(path)
    heads = overrides.get("num_attention_heads", 8)
    known = info["config"] if info else config_from_shapes(state, path, heads)
    if info is None and tokenizer is not None:  # shapes do not tell which tokens are special
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        known |= {name: getattr(tokenizer, name) for name in ids}
    config = make_config(known, overrides, path, ".json" if info else "")
    if tokenizer is not None:
        check_tokenizer(tokenizer, config, info, path)
        if info and info.get("empty_think"):
            close_thoughts(tokenizer)
    return config


def read_info(path: Path | str) -> dict[str, Any] | None:
    """The `.json` beside a `.pth`, or None where there is none."""
    path = Path(path).with_suffix(".json")
    if not path.exists():
        return None
    advice = "if you remove it, the config is read from the shapes of the weights"
    info = read_json(path, advice)
    if not isinstance(info.get("config"), dict):
        raise UserError(f"{path} is damaged: it has no config; {advice}")
    return info


# -- tokenizer -------------------------------------------------------------------------------------


def load_tokenizer(path: Path | str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; by default MiniMind's own, in model/."""
    path = Path(path) if path else TOKENIZER
    check_tokenizer_folder(path)
    try:
        # without the argument, a folder with code of its own would ask on stdin whether to run it
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except BaseException as error:  # of many types: damaged JSON, an unknown model type, …
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the tokenizer in {path} cannot be read: {reason}") from error
    if tokenizer.pad_token_id is None:  # what fills a batch is never read: any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def require_tokenizer(path: Path, tokenizer_path: str) -> None:
    """UserError if nothing says which tokenizer weights were trained with. With another one each id
    means another text, and a training would begin from nonsense."""
    if not tokenizer_path and (path.is_dir() or read_info(path) is None):
        raise UserError(
            f"{path} does not say which tokenizer it was trained with; name its folder with "
            "--tokenizer_path (this project's is in model/)"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies what each id means: SHA-256 over the vocabulary in the order of the ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    config: MiniMindConfig,
    info: dict[str, Any] | None,
    path: Path | str,
) -> None:
    """UserError if `tokenizer` is not the one of the weights; if that is unknown, a warning, unless
    the tokenizer is another than MiniMind's own."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but {path} only {config.vocab_size}; "
            "--tokenizer_path names the folder of the right one"
        )
    if info is None or "tokenizer_hash" not in info:
        if Path(tokenizer.name_or_path) != TOKENIZER:  # somebody has named it
            return
        warnings.warn(
            f"{path} does not say which tokenizer it was trained with; if it answers with "
            "nonsense, name the right one with --tokenizer_path",
            stacklevel=2,
        )
    elif info["tokenizer_hash"] != tokenizer_hash(tokenizer):
        then = f", then {info['tokenizer_path']}" if info.get("tokenizer_path") else ""
        raise UserError(
            f"{path} was trained with another tokenizer (hash {info['tokenizer_hash']}, this one "
            f"is {tokenizer_hash(tokenizer)}); --tokenizer_path names the folder of the right one"
            + then
        )

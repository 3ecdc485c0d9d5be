"""Weight files: `{stage}_{hidden_size}[_moe].pth` with a `.json` of the same name beside it.

The `.pth` is a plain float16 state dict with the names of transformers. The `.json` holds what the
shapes do not show: the config, the stage, the hash of the tokenizer and how the weights were
trained. Without it (earlier versions) the config is read from the shapes (formats/minimind_format).

A weight file can never run code: torch.load is called with weights_only=True everywhere.
"""

import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from model.errors import UserError
from model.formats.minimind_format import config_from_shapes
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindForScoring

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
TOKENIZER = ROOT / "model"
SCORE_HEAD = "score.weight"  # a reward model has it instead of lm_head.weight
# Flags cannot override these fields of a .json: the weights would not fit, or mean something else.
STRUCTURAL_FIELDS = set(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads qk_norm use_moe n_routed_experts n_shared_experts num_experts_per_tok "
    "moe_intermediate_size scoring_func".split()
)


# -- names -----------------------------------------------------------------------------------------


def weight_name(stage: str, hidden_size: int, use_moe: bool = False) -> str:
    """{stage}_{hidden_size}[_moe]"""
    return f"{stage}_{hidden_size}" + "_moe" * use_moe


def weight_path(
    stage: str, hidden_size: int, directory: Path | str = OUT, use_moe: bool = False
) -> Path:
    """out/{stage}_{hidden_size}[_moe].pth"""
    return Path(directory) / f"{weight_name(stage, hidden_size, use_moe)}.pth"


def find_weights(
    stage: str,
    hidden_size: int | None = None,
    directory: Path | str = OUT,
    newest: bool = True,
    use_moe: bool | None = None,
) -> Path:
    """The weight file of a stage.

    Args:
        hidden_size: its size; None: any.
        newest: of several files take the newest; False: several are an error.
        use_moe: with experts, without, or (None) either.

    Raises:
        UserError: there is no such file, or several and not `newest`.
    """
    beginning = Path(directory) / stage  # a stage may contain a folder, such as lora/medical
    size = hidden_size or r"\d+"
    moe = {None: "(_moe)?", True: "_moe", False: ""}[use_moe]
    pattern = re.compile(rf"{re.escape(beginning.name)}_{size}{moe}\.pth")
    found = [path for path in beginning.parent.glob("*.pth") if pattern.fullmatch(path.name)]
    if not found:
        size = f"_{hidden_size or '*'}" + "_moe" * bool(use_moe)
        there = sorted(path.name for path in beginning.parent.glob("*.pth"))
        raise UserError(
            f"there are no weights {beginning}{size}.pth; "
            + (f"that folder has {', '.join(there)}" if there else "train that stage first")
        )
    if len(found) > 1 and not newest:
        names = ", ".join(sorted(path.name for path in found))
        raise UserError(f"there are several sizes of {stage} ({names}); choose with --hidden_size")
    return max(found, key=lambda path: path.stat().st_mtime)


# -- saving ----------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """Write to a temporary file, then rename it to `path`: a reader sees the old file or the new
    one, never half of it, even if the process is killed. UserError if it cannot be written.

    The `.{name}.partial` that a killed process leaves is overwritten next time.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # on a full disk, torch.save raises a RuntimeError from the OSError
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        why = reason.strerror or reason
        raise UserError(
            f"cannot write {path}: {why}; a file that was there before is unchanged"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_json(path: Path | str, content: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


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
    write_json(path.with_suffix(".json"), {**info, **config})
    with atomic_write(path) as file:
        torch.save(state, file)
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
    """Load a model from its `.pth`; missing and unexpected keys are errors.

    Args:
        tokenizer: must be the one that the weights were trained with. If no hash is known, only the
            size of its vocabulary is checked.
        overrides: fields of the config that replace those of the file; STRUCTURAL_FIELDS must
            agree with its `.json`.

    Raises:
        UserError: not a checkpoint; a key is missing, unexpected or of another shape; another
            tokenizer.
    """
    path = Path(path)
    state = read_state(path)
    if SCORE_HEAD in state:
        raise UserError(
            f"{path} is a reward model, which scores texts and cannot generate; name a language "
            "model, such as full_sft"
        )
    model = MiniMindForCausalLM(resolve_config(path, state, tokenizer, overrides))
    check_state(state, model, path)
    model.load_state_dict(state, strict=True)
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
    model = MiniMindForScoring(resolve_config(path, state, tokenizer, {}))
    check_state(state, model, path)
    model.load_state_dict(state, strict=True)
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
    try:
        config = MiniMindConfig(**{**known, **overrides})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} does not describe a MiniMind model: {error}") from error
    for name in STRUCTURAL_FIELDS & overrides.keys() if info else ():
        saved = getattr(MiniMindConfig(**known), name)
        if saved != overrides[name]:
            raise UserError(
                f"{path} has {name} {saved}, as its .json says, and not {overrides[name]}"
            )
    if tokenizer is not None:
        check_tokenizer(tokenizer, config, info, path)
    return config


def read_state(path: Path | str) -> dict[str, Tensor]:
    """The state dict in a `.pth`, on the CPU. UserError if the file holds anything else."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"the weights {path} cannot be read: that {what}")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"the weights {path} cannot be read: {error.strerror}") from error
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer and not the weights; fetch them with `git lfs pull`"
        )
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        raise UserError(f"{path} is a safetensors file; name its folder instead")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is not a plain state dict (a damaged file, or a pickle with "
            "code, which is never executed here)"
        ) from error
    except Exception as error:  # which one depends on where the file is damaged
        raise UserError(
            f"{path} is not a checkpoint, or only part of one ({path.stat().st_size} bytes); copy "
            "or download it again"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path} does not hold a state dict (tensors by name)")
    # prefixes of DistributedDataParallel and torch.compile
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): v for name, v in state.items()}
    if "lm_head.weight" not in state and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied: saved once
    return state


def read_info(path: Path | str) -> dict[str, Any] | None:
    """The `.json` beside a `.pth`, or None where there is none."""
    path = Path(path).with_suffix(".json")
    if not path.exists():
        return None
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(info["config"], dict):
            raise TypeError
        return info
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged or cannot be read; if you remove it, the config is read from the "
            "shapes of the weights"
        ) from error


def check_state(state: dict[str, Tensor], model: PreTrainedModel, path: Path | str) -> None:
    """UserError with the first weight that is missing, unexpected or of another shape."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    if missing or unknown:
        names, what = (missing, "lacks") if missing else (unknown, "has, but the model does not,")
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{path} does not fit the model: it {what} {names[0]}{more}")
    embedding = state["model.embed_tokens.weight"]
    head = state.get("lm_head.weight", embedding)
    if model.config.tie_word_embeddings and not torch.equal(embedding, head):
        raise UserError(
            f"{path} has an lm_head.weight that differs from the embedding, but its config ties "
            "them (tie_word_embeddings)"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{path} does not fit the model: {name} is {list(tensor.shape)} in the file "
                f"and {list(expected[name].shape)} in the model; check the size flags"
            )


# -- tokenizer -------------------------------------------------------------------------------------


def load_tokenizer(path: Path | str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; by default MiniMind's own, in model/."""
    path = Path(path) if path else TOKENIZER
    if not (path / "tokenizer.json").is_file():
        raise UserError(f"there is no tokenizer.json in {path}; --tokenizer_path names its folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of many types: damaged JSON, an unknown model type, …
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the tokenizer in {path} cannot be read: {reason}") from error
    if tokenizer.pad_token_id is None:  # what fills a batch is never read: any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
    """UserError if `tokenizer` is not the one of the weights; a warning if that is unknown."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but {path} only {config.vocab_size}; "
            "--tokenizer_path names the folder of the right one"
        )
    if info is None or "tokenizer_hash" not in info:
        warnings.warn(
            f"{path} does not say which tokenizer it was trained with; if it answers with "
            "nonsense, name the right one with --tokenizer_path",
            stacklevel=2,
        )
    elif info["tokenizer_hash"] != tokenizer_hash(tokenizer):
        raise UserError(
            f"{path} was trained with another tokenizer (hash {info['tokenizer_hash']}, this one "
            f"is {tokenizer_hash(tokenizer)}); --tokenizer_path names the folder of the right one"
        )

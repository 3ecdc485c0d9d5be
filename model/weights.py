"""Weight files: `{stage}_{hidden_size}[_moe].pth` with a `.json` of the same name beside it.

The `.pth` is a plain float16 state dict, with the names of transformers. The `.json` tells what
the shapes cannot: the config, the stage, the tokenizer (hash) and how the weights were trained.
A `.pth` without one, such as an earlier MiniMind's, is read by its shapes.

Nothing here executes what a file contains: torch.load runs with weights_only=True throughout.
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
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from model.errors import UserError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindForScoring

ROUTER_BIAS = "mlp.e_score_correction_bias"
ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"
TOKENIZER = ROOT / "model"
SCORE_HEAD = "score.weight"  # what a reward model has instead of lm_head.weight
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
    """The weights of a stage; without a size the newest of them, or the only ones there are if not
    `newest`; with experts, without, or (None) either. UserError if there are none, or several to
    choose from."""
    beginning = Path(directory) / stage  # the stage may name a folder too
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
    """Write to a file beside `path`, then rename: whoever reads sees the old file or the new one,
    never half of one, whenever the process dies. UserError if the place cannot be written.

    What a killed process leaves, `.{name}.partial`, the next one writes over.
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
        # torch.save raises a RuntimeError while it handles the OSError of a full disk
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        why = reason.strerror or reason
        raise UserError(f"cannot write {path}: {why}; what was there before is whole") from error
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
    """Save `model` as float16 `.pth` and its `.json`.

    Args:
        stage: what made the weights, such as "pretrain".
        origin: how: arguments, data, steps, figures; anything that JSON can hold.
    """
    state = to_fp16_cpu(model.state_dict())
    if model.config.tie_word_embeddings and "lm_head.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # one tensor in the file too
    info = {"stage": stage, "parameters": count_parameters(model), "origin": origin}
    return write_weights(path, state, model, tokenizer, info)


def write_weights(
    path: Path | str,
    state: dict[str, Tensor],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    info: dict[str, Any],
) -> Path:
    """A state dict as `.pth`, and as `.json` what the model is and `info`."""
    path = Path(path)
    config = {"config": model.config.to_diff_dict(), "tokenizer_hash": tokenizer_hash(tokenizer)}
    write_json(path.with_suffix(".json"), {**info, **config})
    with atomic_write(path) as file:
        torch.save(state, file)
    return path


def to_fp16_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a weight file holds them: float16, on the CPU."""
    return {name: tensor.detach().half().cpu() for name, tensor in tensors.items()}


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, those that are shared counted once."""
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
    """A model from its `.pth`, every weight accounted for.

    Args:
        tokenizer: if given, it must be the one that the weights were trained with (UserError);
            where no hash is known, another vocabulary size is an error too.
        overrides: fields of the config that count more than what the files say; but the structure
            of the model must be as a `.json` says it.

    Raises:
        UserError: no checkpoint, a key missing, unknown or of another shape, another tokenizer.
    """
    path = Path(path)
    state = read_state(path)
    if SCORE_HEAD in state:
        raise UserError(
            f"{path} is a reward model, which says how good a text is and writes none; name a "
            "language model, such as full_sft"
        )
    model = MiniMindForCausalLM(config_of(path, state, tokenizer, overrides))
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
    """A reward model from its `.pth`; the arguments and errors of `load_model`, and a UserError for
    a language model, which has no head that scores."""
    path = Path(path)
    state = read_state(path)
    if SCORE_HEAD not in state:
        raise UserError(
            f"{path} is no reward model: it has no {SCORE_HEAD}; trainer/train_reward.py trains "
            "one from it"
        )
    del state["lm_head.weight"]  # which read_state takes for tied, and saved once
    model = MiniMindForScoring(config_of(path, state, tokenizer, {}))
    check_state(state, model, path)
    model.load_state_dict(state, strict=True)
    return model.to(device=device, dtype=dtype).eval()


def config_of(
    path: Path,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    overrides: dict[str, Any],
) -> MiniMindConfig:
    """What the files and `overrides` say that the model is; UserError where they do not agree, or
    the tokenizer is another."""
    info = read_info(path)
    heads = overrides.get("num_attention_heads", 8)
    known = info["config"] if info else config_from_shapes(state, path, heads)
    try:
        config = MiniMindConfig(**{**known, **overrides})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} does not describe a MiniMind model: {error}") from error
    for name in STRUCTURAL_FIELDS & overrides.keys() if info else ():
        said = getattr(MiniMindConfig(**known), name)
        if said != overrides[name]:
            raise UserError(
                f"{path} has {name} {said}, as its .json says, and not {overrides[name]}"
            )
    if tokenizer is not None:
        check_tokenizer(tokenizer, config, info, path)
    return config


def yarn_settings(args: Any) -> dict[str, Any]:
    """The fields of a config that the flags --inference_rope_scaling and --yarn_* change."""
    given = {n: v for n, v in vars(args).items() if n.startswith("yarn_") and v is not None}
    if given and not args.inference_rope_scaling:
        raise UserError(f"--{min(given)} is for --inference_rope_scaling 1")
    return {"inference_rope_scaling": True, **given} if args.inference_rope_scaling else {}


def read_state(path: Path | str) -> dict[str, Tensor]:
    """The state dict in a `.pth`, on the CPU. UserError if the file is anything else."""
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
        raise UserError(f"{path} is a safetensors file; give the folder that it is in instead")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is no plain state dict (a damaged file, or a pickle that "
            "holds code, which is never executed here)"
        ) from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise UserError(
            f"{path} is no checkpoint, or only part of one ({path.stat().st_size} bytes); copy or "
            "download it again"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path} does not hold a state dict (names and tensors) but something else")
    # what DistributedDataParallel and torch.compile put before the names
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): v for name, v in state.items()}
    if "lm_head.weight" not in state and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied, and saved once
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
            f"{path} is damaged or cannot be read; without that file the sizes are read from the "
            "weights' shapes"
        ) from error


def config_from_shapes(
    state: dict[str, Tensor], path: Path | str = "the file", heads: int = 8
) -> dict[str, Any]:
    """The config of a bare `.pth`, from the shapes of its weights.

    What shapes leave open follows the generation: those with q/k norm (newer) have
    rms_norm_eps 1e-6, those without (older) 1e-5; both have `heads` where no norm tells, an
    older mixture gives each token two experts, a newer one; YaRN has the settings of each.
    """
    try:
        embedding = state["model.embed_tokens.weight"]
        vocab_size, hidden_size = embedding.shape
        layers = [re.match(r"model\.layers\.(\d+)\.", name) for name in state]
        first = "model.layers.0."
        key_rows = state[first + "self_attn.k_proj.weight"].shape[0]
        query_rows = state[first + "self_attn.q_proj.weight"].shape[0]
        use_moe = first + "mlp.gate.weight" in state
        expert = "experts.0." if use_moe else ""
        intermediate_size = state[f"{first}mlp.{expert}gate_proj.weight"].shape[0]
        q_norm = state.get(first + "self_attn.q_norm.weight")
        head_dim = query_rows // heads if q_norm is None else q_norm.shape[0]
        heads, key_heads = query_rows // head_dim, key_rows // head_dim
    except KeyError as error:
        raise UserError(f"{path} has no MiniMind weights: {error} is not among its keys") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path} has weights of shapes that are not MiniMind's") from error
    newer = q_norm is not None
    generation = {"yarn_factor": 16.0, "yarn_attention_factor": 1.0} if newer else {}
    if use_moe:
        generation |= {
            "use_moe": True,
            "n_routed_experts": len(state[first + "mlp.gate.weight"]),
            "n_shared_experts": sum(
                name.startswith(first + "mlp.shared_experts.") and "gate_proj" in name
                for name in state
            ),
            "num_experts_per_tok": 1 if newer else 2,
            "scoring_func": "sigmoid" if first + ROUTER_BIAS in state else "softmax",
        }
    return {
        **generation,
        "yarn_beta_fast": 32.0 if newer else 4.0,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(int(match[1]) for match in layers if match),
        "intermediate_size": intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "qk_norm": newer,
        "rms_norm_eps": 1e-6 if newer else 1e-5,
        "tie_word_embeddings": torch.equal(state.get("lm_head.weight", embedding), embedding),
    }


def check_state(state: dict[str, Tensor], model: PreTrainedModel, path: Path | str) -> None:
    """UserError that names the first weight that is missing, unknown or of another shape."""
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
            f"{path} has a lm_head.weight of its own, but its config says that it is the embedding "
            "(tie_word_embeddings)"
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
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of many kinds: damaged JSON, a model type nobody knows
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the tokenizer in {path} cannot be read: {reason}") from error


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for what every id means: SHA-256 over the vocabulary, in the order of the ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    config: MiniMindConfig,
    info: dict[str, Any] | None,
    path: Path | str,
) -> None:
    """UserError where `tokenizer` is not the one of the weights; a warning where none can tell."""
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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def load_transformers(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A transformers folder, every weight accounted for. UserError if it cannot be loaded so."""
    try:
        with quiet_transformers():  # it tells the same at length
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # of many kinds: no such architecture, an LFS pointer, half a file
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{folder} cannot be loaded ({reason}); if its files are small, they may be Git LFS "
            "pointers: fetch them with `git lfs pull`"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            name = min(map(str, info[what]))
            raise UserError(f"{folder} does not fit its config.json: {what[:-5]} weight {name}")
    return model


# -- models to talk to -----------------------------------------------------------------------------


def load_for_chat(
    load_from: Path | str,
    weight: str,
    *,
    hidden_size: int | None = None,
    directory: Path | str = OUT,
    tokenizer_path: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    yarn: dict[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """A model, its tokenizer and its stage ("" where unknown), from either kind of place.

    Args:
        load_from: a transformers folder (it has a config.json); any other folder, such as
            ./model, means MiniMind's own weights, with that folder's tokenizer.
        weight: own weights only: a stage, or the path of a `.pth`.
        hidden_size: which size of the stage; default: the newest.
        directory: where own weights are.
        yarn: fields of the config for YaRN, own weights only; a transformers folder has its own.
    """
    load_from = Path(load_from)
    if not load_from.is_dir():
        raise UserError(f"--load_from {load_from} is no folder")
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
        path = find_weights(weight, hidden_size, directory)
    model = load_model(path, tokenizer=tokenizer, device=device, dtype=dtype, **(yarn or {}))
    return model, tokenizer, (read_info(path) or {}).get("stage", "")

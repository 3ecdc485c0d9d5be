"""MiniMind's `.pth` files, of this and earlier versions: the state dict, and the config from the
shapes of the weights where no `.json` lies beside them."""

import pickle
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model.config import STRUCTURAL_FIELDS, MiniMindConfig
from model.errors import UserError, reading
from model.formats.files import add_checksum, atomic_write, verify
from model.paths import check_weights

ModelT = TypeVar("ModelT", bound=PreTrainedModel)
DAMAGED = "copy or download it again, or train it again"
FIELD_TYPES = {
    name: get_args(kind)[0] if get_origin(kind) is Annotated else kind
    for name, kind in MiniMindConfig.__annotations__.items()
}
MAX_LENGTH = 2**26  # of max_position_embeddings: RoPE's tables are made for it
ROUTER_BIAS = "mlp.e_score_correction_bias"  # its name in a layer, with scoring_func "sigmoid"


# -- files -----------------------------------------------------------------------------------------


def save_tensors(path: Path | str, content: Any) -> None:
    """torch.save with a checksum, which any torch.load passes over."""
    with atomic_write(path) as file:
        torch.save(content, file)
        add_checksum(file, zipped=True)


def load_tensors(path: Path | str, advice: str, check: bool = True) -> Any:
    """torch.load on the CPU. The tensors of files in today's format are mapped, not copied: they
    are to be copied into a model, and are gone from memory then.

    Args:
        advice: what to do about a damaged file.
        check: the checksum. False for a look at a few bytes of a file of gigabytes.

    Raises:
        UserError: the checksum differs. What torch.load raises else passes through.
    """
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\3\4"
    if check:
        verify(path, advice)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def read_state(path: Path | str) -> dict[str, Tensor]:
    """The state dict in a `.pth`, on the CPU; of a resume file, the weights under "model".

    A file can never run code: weights_only=True allows tensors and plain values alone.

    Raises:
        UserError: the file holds anything else.
    """
    path = check_weights(Path(path))
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
        state = load_tensors(path, DAMAGED)
    except UserError:
        raise
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
    if isinstance(state, dict) and "rng_states" in state:
        raise UserError(
            f"{path} is a checkpoint, which --resume goes on from; its weights are the .pth of the "
            "same name in --save_dir"
        )
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # beside the optimizer and the position in the data
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path} does not hold a state dict (tensors by name)")
    for name, tensor in state.items():
        check_plain(tensor, f"{path} is refused: its {name}")
    # DistributedDataParallel and torch.compile add these to the names
    state = {re.sub(r"^(module\.)+", "", n.replace("_orig_mod.", "")): v for n, v in state.items()}
    if "lm_head.weight" not in state and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied: saved once
    return state


def check_plain(tensor: Tensor, subject: str) -> None:
    """UserError unless a tensor holds its numbers one by one: sparse, quantised and expanded ones
    may stand for gigabytes in a few bytes."""
    kind, size = "", tensor.numel() * tensor.element_size()
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "sparse or nested"
    elif tensor.is_quantized:
        kind = "quantised"
    elif tensor.is_meta or size > tensor.untyped_storage().nbytes():
        kind = "without numbers of its own"
    elif not (tensor.is_floating_point() or tensor.dtype in (torch.int64, torch.int32)):
        kind = f"of {tensor.dtype}"
    if kind:
        raise UserError(f"{subject} is {kind}, and weights are plain tensors of numbers")


# -- configs ---------------------------------------------------------------------------------------


def config_from_shapes(
    state: dict[str, Tensor], path: Path | str = "the file", heads: int = 8
) -> dict[str, Any]:
    """The config of a bare `.pth`, from the shapes of its weights.

    What shapes do not show depends on the generation: newer weights, which have q/k norm, have
    rms_norm_eps 1e-6 and one expert per token, older ones 1e-5 and two; each has its own YaRN.

    Args:
        heads: the number of query heads where no q/k norm shows the size of a head.
    """
    try:
        embedding = state["model.embed_tokens.weight"]
        vocab_size, hidden_size = embedding.shape
        layers = [re.match(r"model\.layers\.(\d+)\.", name) for name in state]
        first = "model.layers.0."
        key_rows = state[first + "self_attn.k_proj.weight"].shape[0]
        query_rows = state[first + "self_attn.q_proj.weight"].shape[0]
        numbers = {int(match[1]) for match in layers if match}
        if len(numbers) != 1 + max(numbers):
            raise UserError(f"{path} has no whole model: layers are missing")
        use_moe = first + "mlp.gate.weight" in state
        expert = "experts.0." if use_moe else ""
        intermediate_size = state[f"{first}mlp.{expert}gate_proj.weight"].shape[0]
        q_norm = state.get(first + "self_attn.q_norm.weight")
        head_dim = query_rows // heads if q_norm is None else q_norm.shape[0]
        heads, key_heads = query_rows // head_dim, key_rows // head_dim
    except KeyError as error:
        raise UserError(
            f"{path} does not hold MiniMind weights: the key {error} is missing"
        ) from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} does not hold MiniMind weights: their shapes do not fit"
        ) from error
    newer = q_norm is not None
    generation: dict[str, Any] = {}
    if newer:
        generation = {"yarn_factor": 16.0, "yarn_attention_factor": 1.0}
    if use_moe:
        generation |= {
            "use_moe": True,
            "n_routed_experts": len(state[first + "mlp.gate.weight"]),
            "n_shared_experts": sum(
                name.startswith(first + "mlp.shared_experts.") and "gate_proj" in name
                for name in state
            ),
            "num_experts_per_tok": 1 if newer else 2,
            "aux_loss_alpha": 5e-4 if newer else 0.1,
            "scoring_func": "sigmoid" if first + ROUTER_BIAS in state else "softmax",
        }
    return {
        **generation,
        "yarn_beta_fast": 32.0 if newer else 4.0,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(numbers),
        "intermediate_size": intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "qk_norm": newer,
        "rms_norm_eps": 1e-6 if newer else 1e-5,
        "tie_word_embeddings": torch.equal(state.get("lm_head.weight", embedding), embedding),
    }


def make_config(
    known: dict[str, Any], overrides: dict[str, Any], path: Path | str, said_by: str = ""
) -> MiniMindConfig:
    """The config of weights, with overrides.

    Args:
        known: its fields, as a file or the shapes have them.
        said_by: the file beside the weights that has them; structural fields must agree with it.

    Raises:
        UserError: they do not make a model, or an override contradicts the file.
    """
    where = f"{path}{f' ({said_by})' * bool(said_by)}"
    try:
        check_fields(known)
        config = MiniMindConfig(**{**known, **overrides})
        before = MiniMindConfig(**known)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} does not describe a MiniMind model: {error}") from error
    except Exception as error:  # checks of transformers have types of their own
        with reading(where):
            raise error
    for name in sorted(STRUCTURAL_FIELDS & overrides.keys()) if said_by else ():
        saved = getattr(before, name)
        if saved != overrides[name]:
            raise UserError(
                f"{path} has {name} {saved}, as its {said_by} says, and not {overrides[name]}"
            )
    return config


def check_fields(known: dict[str, Any]) -> None:
    """TypeError or ValueError for a field of another type than the config's, or an absurd one.
    Sizes that weights have are compared with them in `check_sizes`."""
    kinds = {name: get_args(hint) or (hint,) for name, hint in FIELD_TYPES.items()}
    for name, value in known.items():
        allowed = kinds.get(name)
        if allowed is None:
            continue
        number = float in allowed and isinstance(value, int)
        if bool in allowed and value in (0, 1):  # earlier versions wrote numbers
            continue
        is_bool = isinstance(value, bool) and bool not in allowed
        lists = any(get_origin(each) is list for each in allowed) and isinstance(value, list)
        plain = tuple(each for each in allowed if isinstance(each, type))
        if is_bool or not (number or lists or isinstance(value, plain)):
            raise TypeError(f"{name} cannot be {value!r}"[:200])
        if isinstance(value, int | float) and not -1e15 < value < 1e15:
            raise ValueError(f"{name} cannot be {value}")
    length = known.get("max_position_embeddings") or 0
    if length > MAX_LENGTH:
        raise ValueError(f"max_position_embeddings {length} is more than {MAX_LENGTH}")
    for name in ("num_hidden_layers", "n_routed_experts", "n_shared_experts"):
        if (known.get(name) or 0) > 10_000:
            raise ValueError(f"{name} cannot be {known[name]}")


def parameters_of(config: MiniMindConfig) -> int:
    """About how many parameters a config means, to within a few thousandths."""
    width, depth = config.hidden_size, config.num_hidden_layers
    keys = config.num_key_value_heads * config.head_dim
    assert config.intermediate_size is not None and config.moe_intermediate_size is not None
    feed_forward = 3 * width * config.intermediate_size
    if config.use_moe:
        experts = config.n_routed_experts + config.n_shared_experts
        feed_forward = 3 * width * config.moe_intermediate_size * experts
    heads = 1 if config.tie_word_embeddings else 2
    return depth * (2 * width * (width + keys) + feed_forward) + heads * config.vocab_size * width


def check_sizes(config: MiniMindConfig, size: int, path: Path | str) -> None:
    """UserError before memory is taken, if a config means more weights than files have bytes."""
    wanted = parameters_of(config)
    if wanted > 2 * size + 1_000_000:  # at four bits each
        raise UserError(
            f"{path} does not fit the model: its config means {wanted:,} parameters, and its "
            f"weights have {size:,} bytes; check the size flags, or copy the config again"
        )


def build_model(
    model_class: type[ModelT], config: MiniMindConfig, state: dict[str, Tensor], path: Path | str
) -> ModelT:
    """The model with these weights. UserError if they do not fit."""
    check_sizes(config, sum(t.numel() * t.element_size() for t in state.values()), path)
    with reading(path):
        model = model_class(config)
        check_state(state, model, path)
        model.load_state_dict(state, strict=True)
    return model


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
    if model.config.tie_word_embeddings and not (
        embedding.shape == head.shape and torch.equal(embedding, head)
    ):
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

"""Convert models between MiniMind's format and those of other programs.

    python scripts/convert_model.py to-hf out/full_sft_512.pth my-model
    python scripts/convert_model.py from-hf MiniMind2 out/minimind2_512.pth
    python scripts/convert_model.py to-gguf out/full_sft_512.pth minimind.gguf --ollama
    python scripts/convert_model.py merge-lora out/full_sft_512.pth out/merged_512.pth --lora L.pth
    python scripts/convert_model.py to-peft out/lora/lora_identity_512.pth my-adapter
    python scripts/convert_model.py from-peft my-adapter L.pth --base out/full_sft_512.pth

to-hf writes an ordinary Llama, Qwen, Mixtral or GLM model in the format of transformers, which vLLM
and others load too. from-hf also reads a bare .pth or resume file of an earlier MiniMind, and its
folders with code of their own, which is not run. to-gguf is for llama.cpp and ollama. All of them
read a .pth or a folder. Each conversion of a model compares the logits before and
after, and fails if they differ by more than rounding; to-gguf also compares with llama.cpp itself,
if llama-cpp-python is installed. `convert_model.py to-gguf --help` lists the flags of to-gguf, and
likewise for the others.
"""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.command_line import option, parse_command
from model.errors import UserError, exit_on_user_error
from model.paths import check_exists, check_tokenizer_folder, tokenizer_beside
from scripts.serving.arguments import BARE_FIELDS, ConfigArgs


@dataclass
class Conversion:
    source: Path = option(Path(), "a .pth file or a folder", positional=True, check=check_exists)
    target: Path = option(Path(), "the output: a file, or a folder", positional=True)
    force: bool = option(False, "overwrite existing files")
    suffix = ""  # not a flag: that of the target; "": it is a folder


@dataclass
class ModelConversion(ConfigArgs, Conversion):
    tokenizer_path: str = option("", "folder of the tokenizer", check=check_tokenizer_folder)


@dataclass
class ToHf(ModelConversion):
    """write a transformers folder"""

    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the weights")
    native: bool = option(False, "keep MiniMind's architecture and include its code")


@dataclass
class FromHf(ModelConversion):
    """read a transformers folder, or an earlier .pth"""

    suffix = ".pth"


@dataclass
class ToGguf(ModelConversion):
    """write a file for llama.cpp and ollama"""

    dtype: Literal["float16", "float32", "q8_0"] = option("float16", "type of the weights")
    ollama: bool = option(False, "also write a Modelfile for ollama")
    suffix = ".gguf"


@dataclass
class MergeLora(ModelConversion):
    """merge a LoRA adapter into the weights"""

    lora: Path | None = option(None, "the adapter, a .pth", required=True)
    suffix = ".pth"


@dataclass
class ToPeft(Conversion):
    """write a LoRA adapter in peft's format"""

    base: str = option("", "base model to name in the adapter: a folder or a Hub id")


@dataclass
class FromPeft(Conversion):
    """read an adapter of peft"""

    base: Path | None = option(None, "base model of the adapter, a .pth or a folder", required=True)
    tokenizer_path: str = option("", "folder of the tokenizer", check=check_tokenizer_folder)
    suffix = ".pth"


FLAGS = {
    "to-hf": ToHf,
    "from-hf": FromHf,
    "to-gguf": ToGguf,
    "merge-lora": MergeLora,
    "to-peft": ToPeft,
    "from-peft": FromPeft,
}

if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    with exit_on_user_error():
        command, args = parse_command(FLAGS, __doc__)

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.formats import gguf_format, ollama_format
from model.formats.hf_format import load_transformers, save_hf_folder
from model.formats.lora_format import load_lora, load_peft, save_lora, save_peft
from model.formats.native_format import is_native
from model.inference.thinking import close_thoughts
from model.model_lora import merge_and_unload
from model.model_minimind import MiniMindForCausalLM
from model.weights import (
    load_model,
    load_tokenizer,
    read_info,
    require_tokenizer,
    save_weights,
)

# Tolerances of logits, relative to the largest: for the same weights with sums in another order,
# and for weights or activations rounded to float16 or to 8 bits.
EXACT, FLOAT16, EIGHT_BITS = 1e-4, 0.02, 0.1


# -- the conversions -------------------------------------------------------------------------------


def to_hf(args: ToHf) -> None:
    with atomic_output(args, args.target) as folder:
        tokenizer, model = load_source(args)
        dtype = getattr(torch, args.dtype)
        if args.native:
            save_native(model, tokenizer, folder, dtype)
        else:
            save_hf_folder(model, tokenizer, folder, dtype)
        rounded = copy.deepcopy(model).to(dtype).float()
        check_logits(logits(load_transformers(folder, torch.float32)), logits(rounded), EXACT)
        report_rounding(rounded, model, args.dtype)
    print(f"{args.target}: load it with AutoModelForCausalLM.from_pretrained")


def from_hf(args: FromHf) -> None:
    with atomic_output(args, args.target) as folder:
        tokenizer, model = load_source(args)
        save_and_check(model, tokenizer, args, folder, {"converted from": args.source.name})


def to_gguf(args: ToGguf) -> None:
    modelfiles = [args.target.with_name("Modelfile")] if args.ollama else []
    with atomic_output(args, args.target, *modelfiles) as folder:
        tokenizer, model = load_source(args)
        path = folder / args.target.name
        gguf_format.save_gguf(model, tokenizer, path, args.dtype, args.target.stem)
        rounded = copy.deepcopy(model)
        rounded.load_state_dict(gguf_format.read_gguf(path, model), strict=True)
        gguf_format.check_roundtrip(model.state_dict(), rounded.state_dict(), args.dtype)
        report_rounding(rounded, model, args.dtype)
        compare_with_llama_cpp(rounded, path, args.dtype)
        if args.ollama:
            text = ollama_format.modelfile(args.target, model.config, tokenizer)
            (folder / "Modelfile").write_text(text, encoding="utf-8")
    flags = gguf_format.yarn_flags(model.config)
    print(f"{args.target}: llama-cli -m {args.target} {flags}".rstrip())
    for modelfile in modelfiles:
        print(f"{modelfile}: ollama create {args.target.stem} -f {modelfile}")


def merge_lora(args: MergeLora) -> None:
    with atomic_output(args, args.target) as folder:
        tokenizer, model = load_source(args)
        load_lora(model, args.lora)
        if (read_info(args.lora) or {}).get("empty_think"):
            close_thoughts(tokenizer)
        merged = merge_and_unload(copy.deepcopy(model))
        check_logits(logits(merged), logits(model), FLOAT16)
        origin = {"converted from": args.source.name, "merged": args.lora.name}
        save_and_check(merged, tokenizer, args, folder, origin)


def to_peft(args: ToPeft) -> None:
    with atomic_output(args, args.target) as folder:
        save_peft(args.source, folder, base=args.base or "")
    print(f"{args.target}: load it with peft.PeftModel.from_pretrained(model, folder)")


def from_peft(args: FromPeft) -> None:
    with atomic_output(args, args.target) as folder:
        tokenizer = find_tokenizer(args.base, args.tokenizer_path)
        model = load_model(args.base, tokenizer=tokenizer)
        config = load_peft(model, args.source)
        name, _, _ = args.target.stem.removesuffix("_moe").rpartition("_")
        stage = f"lora/{name or args.target.stem}"
        origin = {"converted from": args.source.name}
        about = dict(stage=stage, config=config, tokenizer=tokenizer, origin=origin)
        save_lora(model, folder / args.target.name, **about)
    print(f"{args.target}: use it with eval_llm.py --lora_weight {args.target}")


# -- reading and writing ---------------------------------------------------------------------------


def load_source(
    args: ModelConversion,
) -> tuple[PreTrainedTokenizerBase, MiniMindForCausalLM]:
    """The model in a `.pth` or a folder; of another architecture in transformers, the logits are
    compared with those of transformers."""
    overrides = args.config_fields()
    in_transformers = args.source.is_dir() and not is_native(args.source)
    if args.source.is_dir() and overrides:
        raise UserError(f"--{min(overrides)} is for a .pth; a folder has its own config.json")
    tokenizer = find_tokenizer(args.source, args.tokenizer_path)
    model = load_model(args.source, tokenizer=tokenizer, **overrides)
    if in_transformers:
        check_logits(logits(model), logits(load_transformers(args.source, torch.float32)), EXACT)
    if args.source.is_file() and read_info(args.source) is None:
        assumed = ", ".join(f"{name} {getattr(model.config, name)}" for name in BARE_FIELDS)
        print(f"assumed, since shapes do not tell (flags of these names change it): {assumed}")
    return tokenizer, model


def find_tokenizer(source: Path, tokenizer_path: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of --tokenizer_path, or of the weights; UserError if that is unknown."""
    tokenizer_path = tokenizer_path or tokenizer_beside(source)
    require_tokenizer(source, tokenizer_path)
    return load_tokenizer(tokenizer_path)


def save_native(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    """A folder with this project's model code, for AutoModelForCausalLM with trust_remote_code."""
    MiniMindForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    type(model.config).register_for_auto_class()
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_and_check(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    args: Conversion,
    folder: Path,
    origin: dict[str, str],
) -> None:
    """Save as `.pth`, and check that the saved model has the same logits up to float16."""
    stage = (read_info(args.source) or {}).get("stage", "") if args.source.is_file() else ""
    path = folder / args.target.name
    save_weights(model, path, stage=stage, tokenizer=tokenizer, origin=origin)
    rounded = copy.deepcopy(model).half().float()
    check_logits(logits(load_model(path, tokenizer=tokenizer)), logits(rounded), EXACT)
    report_rounding(rounded, model, "float16")
    print(f"{args.target}: {model.num_parameters() / 1e6:.2f}M parameters")


@contextmanager
def atomic_output(args: Conversion, *targets: Path) -> Iterator[Path]:
    """A temporary folder to write to; its files are moved to the target when they are complete.

    A target with a suffix is a file (a `.pth` comes with a `.json`); otherwise it is a folder, in
    which new files replace old ones of the same name and others stay.

    Raises:
        UserError: the target exists and may not be replaced, or cannot be written.
    """
    target = args.target
    is_file = args.suffix != ""
    if is_file and target.suffix != args.suffix:
        raise UserError(f"{target} should be a {args.suffix} file")
    files = [*targets, target.with_suffix(".json")] if args.suffix == ".pth" else [*targets]
    for file in files:
        if file.is_dir() and is_file:
            raise UserError(f"{file} is a folder")
        if file.exists() and not args.force:
            raise UserError(f"{file} exists already; --force overwrites it")
    if not is_file and target.exists():
        check_replaceable(target)
    parent = target.resolve().parent
    partial = parent / f".{target.resolve().name}.partial"
    created = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        destination = parent if is_file else target
        destination.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir()):  # a .json before its .pth
            os.replace(file, destination / file.name)
        created = []
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in created:  # a failed conversion leaves no empty folders
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def check_replaceable(folder: Path) -> None:
    """UserError unless a folder holds a model or an adapter in one file, which may be replaced."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{folder} holds something else than a model, and is not overwritten")
    ours = ("model.safetensors", "adapter_model.safetensors")
    for file in folder.iterdir():
        if file.suffix in (".safetensors", ".bin", ".pth", ".index") and file.name not in ours:
            raise UserError(f"{folder} has other weights too ({file.name}), and is not overwritten")


# -- checks ----------------------------------------------------------------------------------------


def check_logits(actual: Tensor, expected: Tensor, tolerance: float, where: str = "") -> None:
    """UserError unless logits [T, V] agree within the tolerance.

    Rounding may change the experts that a router chooses for a token. So rounded models must agree
    at the median token, exact ones at every token.
    """
    difference = (actual - expected).abs().amax(-1)  # [T]
    scale = expected.abs().max().item()
    worst, median = difference.max().item(), difference.median().item()
    print(f"largest difference of a logit{where}: {worst:.2g} (logits go up to {scale:.1f})")
    if not (worst if tolerance == EXACT else median) <= tolerance * max(1.0, scale):
        raise UserError(f"the logits differ by {worst:.2g}, which is more than rounding")


def report_rounding(rounded: MiniMindForCausalLM, model: MiniMindForCausalLM, dtype: str) -> None:
    largest = (logits(rounded) - logits(model)).abs().max().item()
    if largest:
        print(f"{dtype} itself changes a logit by {largest:.2g} at most")


def compare_with_llama_cpp(model: MiniMindForCausalLM, path: Path, dtype: str) -> None:
    """UserError unless llama.cpp computes the same logits; a message if it is not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        print("not compared with llama.cpp, since llama-cpp-python is not installed")
        return
    config, ids = model.config, random_tokens(model).tolist()
    engine = Llama(
        str(path),
        n_ctx=len(ids),
        logits_all=True,
        type_k=0,  # KV cache in float32
        type_v=0,
        yarn_beta_fast=config.yarn_beta_fast,
        yarn_beta_slow=config.yarn_beta_slow,
        verbose=False,
    )
    engine.eval(ids)
    tolerance = {"float32": EXACT, "float16": FLOAT16, "q8_0": EIGHT_BITS}[dtype]
    check_logits(torch.tensor(engine.scores), logits(model), tolerance, " in llama.cpp")


def random_tokens(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (64,), generator=generator)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    if not isinstance(model, MiniMindForCausalLM):
        model.set_experts_implementation("eager")  # the grouped kernel needs sizes that align
    return model.eval()(random_tokens(model)[None]).logits[0]


RUN = (to_hf, from_hf, to_gguf, merge_lora, to_peft, from_peft)
COMMANDS = dict(zip(FLAGS, RUN, strict=True))


def main(argv: list[str] | None = None) -> None:
    command, args = parse_command(FLAGS, __doc__, argv)
    COMMANDS[command](args)


if __name__ == "__main__":
    with exit_on_user_error():
        COMMANDS[command](args)

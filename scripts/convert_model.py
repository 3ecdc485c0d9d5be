"""From MiniMind's files to those of other programs, and back.

    python scripts/convert_model.py to-hf out/full_sft_512.pth MiniMind2-mine
    python scripts/convert_model.py from-hf MiniMind2 out/full_sft_512.pth
    python scripts/convert_model.py to-gguf out/full_sft_512.pth minimind.gguf --ollama
    python scripts/convert_model.py merge-lora out/full_sft_512.pth out/merged_512.pth --lora L.pth
    python scripts/convert_model.py to-peft out/lora/lora_identity_512.pth my-adapter
    python scripts/convert_model.py from-peft my-adapter L.pth --base out/full_sft_512.pth

A folder made by to-hf is an ordinary Llama or Qwen model of transformers, which vLLM and others
read too. from-hf also reads a bare .pth of an earlier MiniMind. to-gguf, for llama.cpp and ollama,
takes a .pth or a folder. Conversions of models compare the logits of both sides before they say
that they are done; those of a GGUF file also by llama.cpp itself where llama-cpp-python is there.
"""

import argparse
import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model import gguf_file
from model.errors import UserError, exit_on_user_error
from model.model_lora import load_lora, merged_for_good, read_peft, save_lora, save_peft
from model.model_minimind import MiniMindForCausalLM
from model.transformers_folder import load_folder, save_folder
from model.weights import (
    atomic_write,
    load_model,
    load_tokenizer,
    load_transformers,
    read_info,
    save_weights,
)

# How much logits may differ, as a share of the largest: by the order of sums, by rounding to
# float16 (of merged weights, and of what llama.cpp multiplies), and by rounding to 8 bits.
SAME, HALF, EIGHT_BITS = 1e-4, 0.02, 0.1
DTYPES = {"to-hf": ("float32", "bfloat16", "float16"), "to-gguf": tuple(gguf_file.DTYPES)}


def to_hf(args: argparse.Namespace) -> None:
    tokenizer, model = tokenizer_and_model(args)
    dtype = getattr(torch, args.dtype)
    with new_folder(args) as folder:
        if args.native:
            save_native(model, tokenizer, folder, dtype)
        else:
            save_folder(model, tokenizer, folder, dtype)
        rounded = copy.deepcopy(model).to(dtype).float()
        compare(logits(load_transformers(folder, torch.float32).eval()), logits(rounded), SAME)
    print(f"{args.target}: load it with AutoModelForCausalLM.from_pretrained")


def from_hf(args: argparse.Namespace) -> None:
    if args.source.is_file():  # an earlier MiniMind's, without its .json
        tokenizer, model = tokenizer_and_model(args)
        other: PreTrainedModel = model
    else:
        tokenizer = load_tokenizer(args.tokenizer_path or args.source)
        model = load_folder(args.source)
        other = load_transformers(args.source, torch.float32).eval()
    save_new(model, args, tokenizer, other.half().float(), SAME)


def to_gguf(args: argparse.Namespace) -> None:
    if args.source.is_file():
        tokenizer, model = tokenizer_and_model(args)
    else:
        tokenizer = load_tokenizer(args.tokenizer_path or args.source)
        model = load_folder(args.source)
    refuse_existing(args)
    unfinished = args.target.with_name(f".{args.target.stem}.partial.gguf")
    try:
        args.target.parent.mkdir(parents=True, exist_ok=True)
        gguf_file.save_gguf(model, tokenizer, unfinished, args.dtype, args.target.stem)
        rounded = copy.deepcopy(model)
        rounded.load_state_dict(gguf_file.read_gguf(unfinished, model), strict=True)
        compare(logits(rounded), logits(model), EIGHT_BITS if args.dtype == "q8_0" else SAME)
        compare_with_llama_cpp(rounded, unfinished, args.dtype)
        unfinished.rename(args.target)
    except OSError as error:
        raise UserError(f"cannot write {args.target}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    flags = gguf_file.needed_flags(model.config)
    print(f"{args.target}: llama-cli -m {args.target} {flags}".rstrip())
    if args.ollama:
        recipe = args.target.with_name("Modelfile")
        with atomic_write(recipe) as file:
            file.write(gguf_file.modelfile(args.target, model.config).encode())
        print(f"{recipe}: ollama create {args.target.stem} -f {recipe}")


def merge_lora(args: argparse.Namespace) -> None:
    if args.lora is None:
        raise UserError("merge-lora needs the addition too: --lora FILE")
    tokenizer, model = tokenizer_and_model(args)
    load_lora(model, args.lora)
    save_new(merged_for_good(copy.deepcopy(model)), args, tokenizer, model, HALF)


def to_peft(args: argparse.Namespace) -> None:
    with new_folder(args) as folder:
        save_peft(args.source, folder, base=args.base or "")
    print(f"{args.target}: load it with peft.PeftModel.from_pretrained(model, folder)")


def from_peft(args: argparse.Namespace) -> None:
    if args.base is None:
        raise UserError("from-peft needs the model that the adapter is for: --base FILE.pth")
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = load_model(args.base, tokenizer=tokenizer)
    settings = read_peft(model, args.source)
    refuse_existing(args)
    origin = {"converted from": args.source.name}
    name, _, _ = args.target.stem.rpartition("_")
    stage = f"lora/{name or args.target.stem}"
    save_lora(
        model, args.target, stage=stage, settings=settings, tokenizer=tokenizer, origin=origin
    )
    print(f"{args.target}: use it with eval_llm.py --lora_weight {args.target}")


# -- steps of several conversions ------------------------------------------------------------------


def tokenizer_and_model(args: argparse.Namespace) -> tuple:
    tokenizer = load_tokenizer(args.tokenizer_path)
    return tokenizer, load_model(args.source, tokenizer=tokenizer)


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


def save_new(
    model: MiniMindForCausalLM,
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    source: PreTrainedModel,
    tolerance: float,
) -> None:
    """Save a model as `.pth`, which takes its place when it says the same as its source."""
    refuse_existing(args)
    stage = (read_info(args.source) or {}).get("stage", "") if args.source.is_file() else ""
    origin = {"converted from": args.source.name}
    unfinished = args.target.with_name(f".{args.target.stem}.partial.pth")
    try:
        save_weights(model, unfinished, stage=stage, tokenizer=tokenizer, origin=origin)
        compare(logits(load_model(unfinished, tokenizer=tokenizer)), logits(source), tolerance)
        for suffix in (".json", ".pth"):
            unfinished.with_suffix(suffix).rename(args.target.with_suffix(suffix))
    finally:
        for suffix in (".json", ".pth"):
            unfinished.with_suffix(suffix).unlink(missing_ok=True)
    print(f"{args.target}: {model.num_parameters() / 1e6:.2f}M parameters")


def compare(given: Tensor, expected: Tensor, tolerance: float, where: str = "") -> None:
    """Logits of both sides, [T, V]; UserError unless they say the same."""
    largest, scale = (given - expected).abs().max().item(), expected.abs().max().item()
    print(f"largest difference of a logit{where}: {largest:.2g} (logits go up to {scale:.1f})")
    if not largest <= tolerance * max(1.0, scale):
        raise UserError(f"the logits differ by {largest:.2g}, which is more than rounding")


def some_tokens(model: PreTrainedModel) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (64,), generator=draw)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(some_tokens(model)[None]).logits[0]


def compare_with_llama_cpp(model: MiniMindForCausalLM, path: Path, dtype: str) -> None:
    """UserError unless llama.cpp says the same; a note where it is not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        print("not tried with llama.cpp itself, for llama-cpp-python is not installed")
        return
    config, ids = model.config, some_tokens(model).tolist()
    engine = Llama(
        str(path),
        n_ctx=len(ids),
        logits_all=True,
        type_k=0,  # a cache in float32
        type_v=0,
        yarn_beta_fast=config.yarn_beta_fast,
        yarn_beta_slow=config.yarn_beta_slow,
        verbose=False,
    )
    engine.eval(ids)
    tolerance = {"float32": SAME, "float16": HALF, "q8_0": EIGHT_BITS}[dtype]
    compare(torch.tensor(engine.scores), logits(model), tolerance, " in llama.cpp")


def refuse_existing(args: argparse.Namespace) -> None:
    if args.target.exists() and not args.force:
        raise UserError(f"{args.target} exists already; --force writes over it")


@contextmanager
def new_folder(args: argparse.Namespace) -> Iterator[Path]:
    """A folder that takes its place when it is complete."""
    refuse_existing(args)
    unfinished = args.target.with_name(f".{args.target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if args.target.exists():
            shutil.rmtree(args.target)
        unfinished.rename(args.target)
    except OSError as error:
        raise UserError(f"cannot write {args.target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


CONVERSIONS = {
    "to-hf": to_hf,
    "from-hf": from_hf,
    "to-gguf": to_gguf,
    "merge-lora": merge_lora,
    "to-peft": to_peft,
    "from-peft": from_peft,
}


USED_BY = {
    "native": ["to-hf"],
    "dtype": list(DTYPES),
    "ollama": ["to-gguf"],
    "lora": ["merge-lora"],
    "base": ["to-peft", "from-peft"],
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = usage
    parser.add_argument("conversion", choices=CONVERSIONS, help="what to make of what")
    parser.add_argument("source", type=Path, help="a .pth file or a folder")
    parser.add_argument("target", type=Path, help="where the result goes")
    dtypes = "; ".join(f"{name}: {', '.join(choices)}" for name, choices in DTYPES.items())
    parser.add_argument("--dtype", help=f"of the weights, by default the first: {dtypes}")
    switch = dict(type=int, nargs="?", const=1, default=0, choices=(0, 1))
    parser.add_argument("--native", **switch, help="to-hf: as MiniMind, with its code")
    parser.add_argument("--ollama", **switch, help="to-gguf: write a Modelfile for ollama too")
    parser.add_argument("--lora", type=Path, help="merge-lora: the addition")
    parser.add_argument("--base", type=Path, help="to-peft, from-peft: the model it belongs to")
    parser.add_argument("--tokenizer_path", help="folder of the tokenizer; default: model/")
    parser.add_argument("--force", **switch, help="write over what is there")
    args = parser.parse_args(words)
    for name, users in USED_BY.items():
        if getattr(args, name) not in (None, 0) and args.conversion not in users:
            usage(f"--{name} is for {' and '.join(users)}")
    if choices := DTYPES.get(args.conversion):
        args.dtype = args.dtype or choices[0]
        if args.dtype not in choices:
            usage(f"--dtype of {args.conversion} is one of {', '.join(choices)}")
    if not args.source.exists():
        raise UserError(f"{args.source} does not exist")
    CONVERSIONS[args.conversion](args)


def usage(message: str) -> None:
    raise UserError(f"{message}; see --help")


if __name__ == "__main__":
    with exit_on_user_error():
        main()

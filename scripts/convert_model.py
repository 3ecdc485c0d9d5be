"""From MiniMind's files to those of other programs, and back.

    python scripts/convert_model.py to-hf out/full_sft_512.pth my-model
    python scripts/convert_model.py from-hf MiniMind2 out/minimind2_512.pth
    python scripts/convert_model.py to-gguf out/full_sft_512.pth minimind.gguf --ollama
    python scripts/convert_model.py merge-lora out/full_sft_512.pth out/merged_512.pth --lora L.pth
    python scripts/convert_model.py to-peft out/lora/lora_identity_512.pth my-adapter
    python scripts/convert_model.py from-peft my-adapter L.pth --base out/full_sft_512.pth

A folder made by to-hf is an ordinary Llama, Qwen, Mixtral or GLM model of transformers, which vLLM
and others read too. from-hf also reads a bare .pth of an earlier MiniMind; to-gguf, for llama.cpp
and ollama, takes a .pth or a folder. Conversions of models compare the logits of both sides before
they say that they are done; those to GGUF also with llama.cpp itself, if llama-cpp-python is there.
`convert_model.py to-gguf --help` tells more, and likewise the others.
"""

import argparse
import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model.errors import UserError, exit_on_user_error
from model.formats import gguf_format
from model.formats.hf_format import (
    load_hf_folder,
    load_transformers,
    read_hf_config,
    save_hf_folder,
)
from model.inference.loading import yarn_settings
from model.model_lora import load_lora, load_peft, merge_and_unload, save_lora, save_peft
from model.model_minimind import MiniMindForCausalLM
from model.weights import (
    load_model,
    load_tokenizer,
    read_info,
    save_weights,
)

# How far logits may be from each other, as a share of the largest: after the same numbers were
# added in another order, and after some were rounded to float16 or to 8 bits on the way.
SAME, HALF, EIGHT_BITS = 1e-4, 0.02, 0.1
OVERRIDES = {  # what the shapes of a bare .pth do not tell
    "num_attention_heads": int,
    "num_experts_per_tok": int,
    "rms_norm_eps": float,
    "rope_theta": float,
    "max_position_embeddings": int,
}
YARN = {
    "yarn_factor": float,
    "yarn_original_length": int,
    "yarn_beta_fast": float,
    "yarn_beta_slow": float,
    "yarn_attention_factor": float,
}


# -- the conversions -------------------------------------------------------------------------------


def to_hf(args: argparse.Namespace) -> None:
    with unfinished(args, args.target) as folder:
        tokenizer, model = tokenizer_and_model(args)
        dtype = getattr(torch, args.dtype)
        if args.native:
            save_native(model, tokenizer, folder, dtype)
        else:
            save_hf_folder(model, tokenizer, folder, dtype)
        rounded = copy.deepcopy(model).to(dtype).float()
        compare(logits(load_transformers(folder, torch.float32)), logits(rounded), SAME)
        tell_rounding(rounded, model, args.dtype)
    print(f"{args.target}: load it with AutoModelForCausalLM.from_pretrained")


def from_hf(args: argparse.Namespace) -> None:
    with unfinished(args, args.target) as folder:
        tokenizer, model = tokenizer_and_model(args)
        save_checked(model, tokenizer, args, folder, {"converted from": args.source.name})


def to_gguf(args: argparse.Namespace) -> None:
    recipe = [args.target.with_name("Modelfile")] if args.ollama else []
    with unfinished(args, args.target, *recipe) as folder:
        tokenizer, model = tokenizer_and_model(args)
        path = folder / args.target.name
        gguf_format.save_gguf(model, tokenizer, path, args.dtype, args.target.stem)
        rounded = copy.deepcopy(model)
        rounded.load_state_dict(gguf_format.read_gguf(path, model), strict=True)
        gguf_format.check_roundtrip(model.state_dict(), rounded.state_dict(), args.dtype)
        tell_rounding(rounded, model, args.dtype)
        compare_with_llama_cpp(rounded, path, args.dtype)
        if args.ollama:
            text = gguf_format.modelfile(args.target, model.config, tokenizer)
            (folder / "Modelfile").write_text(text, encoding="utf-8")
    flags = gguf_format.yarn_flags(model.config)
    print(f"{args.target}: llama-cli -m {args.target} {flags}".rstrip())
    for each in recipe:
        print(f"{each}: ollama create {args.target.stem} -f {each}")


def merge_lora(args: argparse.Namespace) -> None:
    with unfinished(args, args.target) as folder:
        tokenizer, model = tokenizer_and_model(args)
        load_lora(model, args.lora)
        merged = merge_and_unload(copy.deepcopy(model))
        compare(logits(merged), logits(model), HALF)
        origin = {"converted from": args.source.name, "merged": args.lora.name}
        save_checked(merged, tokenizer, args, folder, origin)


def to_peft(args: argparse.Namespace) -> None:
    with unfinished(args, args.target) as folder:
        save_peft(args.source, folder, base=args.base or "")
    print(f"{args.target}: load it with peft.PeftModel.from_pretrained(model, folder)")


def from_peft(args: argparse.Namespace) -> None:
    with unfinished(args, args.target) as folder:
        tokenizer = load_tokenizer(args.tokenizer_path)
        model = load_model(args.base, tokenizer=tokenizer)
        settings = load_peft(model, args.source)
        name, _, _ = args.target.stem.removesuffix("_moe").rpartition("_")
        stage = f"lora/{name or args.target.stem}"
        origin = {"converted from": args.source.name}
        about = dict(stage=stage, config=settings, tokenizer=tokenizer, origin=origin)
        save_lora(model, folder / args.target.name, **about)
    print(f"{args.target}: use it with eval_llm.py --lora_weight {args.target}")


# -- reading and writing ---------------------------------------------------------------------------


def tokenizer_and_model(
    args: argparse.Namespace,
) -> tuple[PreTrainedTokenizerBase, MiniMindForCausalLM]:
    """The model in a `.pth`, or in a folder of transformers, with which it is compared."""
    changes = {name: x for name in OVERRIDES if (x := getattr(args, name)) is not None}
    changes |= yarn_settings(args)
    if args.source.is_dir():
        read_hf_config(args.source)  # a mistake in it shows before one in the tokenizer
        tokenizer = load_tokenizer(args.tokenizer_path or args.source)
        if changes:
            raise UserError(f"--{min(changes)} is for a .pth; a folder has its own config.json")
        model = load_hf_folder(args.source)
        compare(logits(model), logits(load_transformers(args.source, torch.float32)), SAME)
        return tokenizer, model
    if read_info(args.source) is None and not args.tokenizer_path:
        raise UserError(
            f"{args.source} does not say which tokenizer it belongs to; --tokenizer_path names "
            "its folder (model/ has this project's)"
        )
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = load_model(args.source, tokenizer=tokenizer, **changes)
    if read_info(args.source) is None:
        assumed = ", ".join(f"{name} {getattr(model.config, name)}" for name in OVERRIDES)
        print(f"not told by shapes, so assumed (flags of these names say otherwise): {assumed}")
    return tokenizer, model


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


def save_checked(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
    folder: Path,
    origin: dict[str, str],
) -> None:
    """Save as `.pth`, and see that the file says what the model says, but for float16."""
    stage = (read_info(args.source) or {}).get("stage", "") if args.source.is_file() else ""
    path = folder / args.target.name
    save_weights(model, path, stage=stage, tokenizer=tokenizer, origin=origin)
    rounded = copy.deepcopy(model).half().float()
    compare(logits(load_model(path, tokenizer=tokenizer)), logits(rounded), SAME)
    tell_rounding(rounded, model, "float16")
    print(f"{args.target}: {model.num_parameters() / 1e6:.2f}M parameters")


@contextmanager
def unfinished(args: argparse.Namespace, *targets: Path) -> Iterator[Path]:
    """A folder to write to; what is in it takes its place when it is complete.

    A target with a suffix is a file, and a `.pth` has a `.json` beside it; else it is a folder,
    of which the files that are made are replaced and others stay.

    Raises:
        UserError: something is there already and may not be replaced, or it cannot be written.
    """
    target = args.target
    single = args.suffix != ""
    if single and target.suffix != args.suffix:
        raise UserError(f"{target} should be a {args.suffix} file")
    files = [*targets, target.with_suffix(".json")] if args.suffix == ".pth" else [*targets]
    for file in files:
        if file.is_dir() and single:
            raise UserError(f"{file} is a folder")
        if file.exists() and not args.force:
            raise UserError(f"{file} exists already; --force writes over it")
    if not single and target.exists():
        check_that_it_is_ours(target)
    place = target.resolve().parent
    partial = place / f".{target.resolve().name}.partial"
    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        goal = place if single else target
        goal.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir()):  # a .json before its .pth
            os.replace(file, goal / file.name)
        made = []
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:  # of a conversion that failed nothing stays
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def check_that_it_is_ours(folder: Path) -> None:
    """UserError unless a folder may be written over: a model or an adapter in one file."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{folder} holds something else than a model, and is left as it is")
    ours = ("model.safetensors", "adapter_model.safetensors")
    for file in folder.iterdir():
        if file.suffix in (".safetensors", ".bin", ".pth", ".index") and file.name not in ours:
            raise UserError(f"{folder} has other weights too ({file.name}), and is left as it is")


# -- comparing -------------------------------------------------------------------------------------


def compare(given: Tensor, expected: Tensor, tolerance: float, where: str = "") -> None:
    """Logits of both sides, [T, V]; UserError unless they say the same.

    What was rounded may send a token to other experts, so that then most tokens must agree, where
    otherwise all must.
    """
    difference = (given - expected).abs().amax(-1)  # [T]
    scale = expected.abs().max().item()
    worst, typical = difference.max().item(), difference.median().item()
    print(f"largest difference of a logit{where}: {worst:.2g} (logits go up to {scale:.1f})")
    if not (worst if tolerance == SAME else typical) <= tolerance * max(1.0, scale):
        raise UserError(f"the logits differ by {worst:.2g}, which is more than rounding")


def tell_rounding(rounded: MiniMindForCausalLM, model: MiniMindForCausalLM, dtype: str) -> None:
    largest = (logits(rounded) - logits(model)).abs().max().item()
    if largest:
        print(f"{dtype} itself changes a logit by {largest:.2g} at most")


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


def some_tokens(model: PreTrainedModel) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (64,), generator=draw)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    if not isinstance(model, MiniMindForCausalLM):
        model.set_experts_implementation("eager")  # the fast one wants certain sizes
    return model.eval()(some_tokens(model)[None]).logits[0]


# -- the command line ------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the flags)")


def command_line() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="CONVERSION")
    switch = dict(type=int, nargs="?", const=1, default=0, choices=(0, 1))

    def command(name: str, run, about: str, suffix: str, reads_model: bool = True) -> Parser:
        added = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        added.set_defaults(run=run, suffix=suffix)
        added.add_argument("source", type=Path, help="a .pth file or a folder")
        what = f"where the result goes, a {suffix} file" if suffix else "folder of the result"
        added.add_argument("target", type=Path, help=what)
        added.add_argument("--force", **switch, help="write over what is there")
        if reads_model:
            added.add_argument("--tokenizer_path", help="folder of the tokenizer")
            for field, kind in OVERRIDES.items():
                added.add_argument(f"--{field}", type=kind, help="of a .pth without .json")
            added.add_argument("--inference_rope_scaling", **switch, help="with YaRN")
            for field, kind in YARN.items():
                added.add_argument(f"--{field}", type=kind, help="with it; as in eval_llm.py")
        return added

    floats = ("float32", "bfloat16", "float16")
    added = command("to-hf", to_hf, "a folder of transformers", "")
    added.add_argument("--dtype", choices=floats, default="float32", help="of the weights")
    added.add_argument("--native", **switch, help="as MiniMind, with its code")
    command("from-hf", from_hf, "such a folder, or an earlier .pth, to .pth and .json", ".pth")
    added = command("to-gguf", to_gguf, "a file for llama.cpp and ollama", ".gguf")
    kinds = tuple(gguf_format.DTYPES)
    added.add_argument("--dtype", choices=kinds, default=kinds[0], help="of the weights")
    added.add_argument("--ollama", **switch, help="write a Modelfile for ollama beside it")
    added = command("merge-lora", merge_lora, "a model with an addition in its weights", ".pth")
    added.add_argument("--lora", type=Path, required=True, help="the addition, a .pth")
    added = command("to-peft", to_peft, "an addition as an adapter of peft", "", reads_model=False)
    added.add_argument("--base", help="the model that the adapter is to name: a folder or a hub id")
    added = command("from-peft", from_peft, "and back", ".pth", reads_model=False)
    added.add_argument("--base", type=Path, required=True, help="the model it is for, a .pth")
    added.add_argument("--tokenizer_path", help="folder of the tokenizer")
    return parser


def main(words: list[str] | None = None) -> None:
    args = command_line().parse_args(words)
    if not args.source.exists():
        raise UserError(f"{args.source} does not exist")
    args.run(args)


if __name__ == "__main__":
    with exit_on_user_error():
        main()

"""What a training starts from: the model, the data to train on, and the held-out data."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from dataset.chat import stop_tokens, turns_end
from dataset.lm_dataset import has_thoughts, load_documents
from dataset.packing import PackedDataset, document_lengths
from dataset.pairs import PreferenceDataset
from model.errors import UserError
from model.formats.lora_format import save_lora
from model.inference.thinking import can_close_thoughts, close_thoughts, closes_thoughts
from model.model_lora import add_lora
from model.model_minimind import MiniMindBlock, MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model, require_tokenizer, save_weights
from trainer.common.arguments import OptionalLoraArgs, TrainArgs
from trainer.common.context import Context, ModelT


def init_model(args: TrainArgs, tokenizer: PreTrainedTokenizerBase) -> MiniMindForCausalLM:
    """The weights of `from_weight`, or random ones; on the CPU, in float32."""
    torch.manual_seed(args.seed)
    given = {name: getattr(args, name, None) for name in MiniMindConfig.__annotations__}
    sizes = {name: value for name, value in given.items() if value is not None}
    sizes |= special_ids(tokenizer)
    if not args.use_moe and not args.preset:  # loaded weights know whether they are a mixture
        del sizes["use_moe"]
    if args.from_weight == "none":
        try:
            config = MiniMindConfig(vocab_size=len(tokenizer), **sizes)
        except ValueError as error:
            raise UserError(f"these sizes do not make a model: {error}") from error
        model = MiniMindForCausalLM(config)
    else:
        path = args.initial_weights()
        model = load_for_training(path, args, tokenizer, **sizes)
    if args.gradient_checkpointing:  # transformers 5.23 renamed the method
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)()
    return model.train()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | list[int] | None]:
    """The fields of the config that name tokens: a model stops at EOS, and at the token with which
    the chat template ends a turn, if that is another."""
    stops = stop_tokens(tokenizer)
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops if len(stops) > 1 else tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def load_for_training(
    path: Path, args: TrainArgs, tokenizer: PreTrainedTokenizerBase, **overrides: Any
) -> MiniMindForCausalLM:
    """The model in a .pth or folder. UserError as from `load_model`, and if nothing says which
    tokenizer it was trained with, of which a chat is only warned."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not say which tokenizer")
        model = load_model(path, tokenizer=tokenizer, **overrides)
    require_tokenizer(path, args.tokenizer_path)
    return model


def add_lora_if_asked(args: OptionalLoraArgs, model: MiniMindForCausalLM) -> MiniMindForCausalLM:
    """The model to train; with --use_lora it gets an adapter, and only that is trained."""
    if args.use_lora:
        add_lora(model, args.lora_config())
    return model


def make_save_fn(args: OptionalLoraArgs, policy_of: Callable = lambda model: model) -> Callable:
    """What writes the trained weights, or the adapter; in PPO those of a part, the policy."""
    save = partial(save_lora, config=args.lora_config()) if args.use_lora else save_weights
    return lambda model, path, **about: save(policy_of(model), path, **about)


def prepare_model(ctx: Context, model: ModelT) -> ModelT:
    """The model on this rank's device, with compiled blocks if the context says so, and with
    gradients averaged over the ranks."""
    model = model.to(ctx.device)
    if ctx.compile:  # block by block: they share one compilation
        for module in model.modules():
            if isinstance(module, MiniMindBlock):
                module.compile()
    if ctx.world_size == 1:
        return model
    devices = [ctx.device] if ctx.device.type == "cuda" else None
    # buffers stay apart: each rank counts the load of its own experts
    prepared = DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
    return cast(ModelT, prepared)  # called like the model; `unwrap` gives access to its parts


def load_packed(
    ctx: Context, tokenizer: PreTrainedTokenizerBase, kind: str
) -> tuple[PackedDataset, PackedDataset | None]:
    """Packed sequences to train on, and held-out ones (None if none are asked for)."""
    args = ctx.args
    documents, train_indices, val_documents, val_indices = load_split(ctx, tokenizer, kind)
    shortest = document_lengths(documents)[train_indices].min()
    if kind != "text" and shortest > args.max_seq_len:
        raise UserError(
            f"every conversation is longer than --max_seq_len {args.max_seq_len} (the shortest has "
            f"{shortest} tokens), which would cut each answer from its question; raise it"
        )
    train_data = PackedDataset(documents, args.max_seq_len, train_indices, args.packing)
    if len(train_data) == 0:
        raise UserError("no document of the data has two tokens, so there is nothing to predict")
    if len(val_indices) == 0:
        return train_data, None
    return train_data, PackedDataset(val_documents, args.max_seq_len, val_indices, args.packing)


def load_pairs(
    ctx: Context, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """Preference pairs to train on, and held-out ones (None if none are asked for)."""
    args = ctx.args
    documents, train_indices, val_documents, val_indices = load_split(ctx, tokenizer, "preferences")
    train_data = PreferenceDataset(documents, args.max_seq_len, train_indices)
    if len(train_data) == 0:
        raise UserError(
            f"every pair has a side longer than --max_seq_len {args.max_seq_len} (of the shortest "
            f"pair it has {train_data.longer_side.min()} tokens); raise it"
        )
    if len(val_indices) == 0:
        return train_data, None
    val_data = PreferenceDataset(val_documents, args.max_seq_len, val_indices)
    return train_data, val_data if len(val_data) else None


def load_split(
    ctx: Context, tokenizer: PreTrainedTokenizerBase, kind: str
) -> tuple[Dataset, np.ndarray, Dataset, np.ndarray]:
    """Documents and the indices to train on, documents and the indices held out. A preference pair
    counts as one document."""
    args = ctx.args
    missing = "eos_token" if tokenizer.eos_token_id is None else ""
    if kind != "text" and not tokenizer.chat_template:
        missing = "chat_template"
    if missing:
        raise UserError(
            f"the tokenizer in {args.tokenizer_path} has no {missing}; add it to its "
            "tokenizer_config.json, or leave --tokenizer_path away"
        )
    if kind != "text" and not turns_end(tokenizer):
        ctx.print(
            "warning: the chat template ends answers with no special token of the tokenizer, so "
            "that replies will not stop by themselves"
        )
    load = partial(
        load_documents,
        kind=kind,
        tokenizer=tokenizer,
        empty_think_ratio=use_empty_thoughts(ctx, tokenizer),
        skip_bad_rows=args.skip_bad_rows,
        report=ctx.print,
    )
    documents = load(args.data_path)
    val_documents = load(args.val_path) if args.val_path else None
    each = 2 if kind == "preferences" else 1
    val_count = None if val_documents is None else len(val_documents) // each
    unit = "pairs" if kind == "preferences" else "documents"
    train_indices, val_indices = split_held_out(args, len(documents) // each, val_count, unit)
    return documents, train_indices, val_documents or documents, val_indices


def use_empty_thoughts(ctx: Context, tokenizer: PreTrainedTokenizerBase) -> float:
    """--empty_think_ratio where it matters, else 0: there are thoughts in the data, or the model
    that is trained has learnt from some. From then on prompts without open_thinking close one."""
    ratio = getattr(ctx.args, "empty_think_ratio", 0.0)
    if not ratio or not can_close_thoughts(tokenizer):
        return 0.0
    if not closes_thoughts(tokenizer):
        if not has_thoughts(ctx.args.data_path):
            return 0.0
        close_thoughts(tokenizer)
    ctx.print(f"{ratio:.0%} of the rows without thoughts have an empty one (--empty_think_ratio)")
    return ratio


def split_held_out(
    args: TrainArgs, count: int, val_count: int | None = None, unit: str = "documents"
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices to train on, and held-out ones; the one split of every stage.

    Held out are --val_documents of the `val_count` documents of --val_path, or (None) a share of
    the `count` documents of --data_path. The split depends on these numbers alone, so that a later
    run holds out the same documents. `unit` is their name in the data, for the error.
    """
    order = np.random.default_rng(0).permutation(count)
    held_out = 0 if val_count is not None else math.ceil(count * args.val_share)
    if held_out >= count:
        raise UserError(
            f"--val_share {args.val_share:g} holds out all {unit} of the data ({count}), so that "
            "none is left to train on; hold nothing out with --val_share 0"
        )
    train_indices, val_indices = np.sort(order[held_out:]), order[:held_out]
    if val_count is not None:
        val_indices = np.random.default_rng(0).permutation(val_count)
    return train_indices, np.sort(val_indices[: args.val_documents])

"""Models of transformers that are equivalent to ours, for benchmarks and tests."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from model.formats.hf_format import load_transformers, save_hf_folder, to_hf_config
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer


def peer_of(config: MiniMindConfig, **changes) -> PreTrainedModel:
    """A model of the same sizes with random weights; `changes` are fields of its config."""
    theirs = to_hf_config(config)
    for name, value in changes.items():
        setattr(theirs, name, value)
    return AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa")


def peer_with_weights(own: MiniMindForCausalLM) -> PreTrainedModel:
    """The same model in transformers, by saving and loading a folder."""
    with tempfile.TemporaryDirectory() as folder:
        save_hf_folder(own, load_tokenizer(), Path(folder))
        return load_transformers(Path(folder), torch.float32)

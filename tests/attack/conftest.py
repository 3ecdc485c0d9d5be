"""A tiny model in the forms in which strangers hand one over."""

from pathlib import Path

import pytest

from model.formats.hf_format import save_hf_folder
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer, save_weights

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer) -> Path:
    """A folder with the same tiny model as m_32.pth and as a folder of transformers."""
    folder = tmp_path_factory.mktemp("tiny")
    model = MiniMindForCausalLM(MiniMindConfig(**SIZES))
    save_weights(model, folder / "m_32.pth", stage="full_sft", tokenizer=tokenizer, origin={})
    save_hf_folder(model, tokenizer, folder / "hf")
    return folder

"""What several test files share."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import load_documents
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """So that results are the same on every machine, and tiny models fast."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """No test reads or fills the project's cache of tokenised data."""
    monkeypatch.setitem(load_documents.__kwdefaults__, "cache", tmp_path / "cache")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., MiniMindForCausalLM]:
    """A function that makes a tiny random model in eval mode; its arguments are config fields.

    Its weights are ten times as large as usual, so that its logits are far from each other.
    """

    def make(seed: int = 0, **fields) -> MiniMindForCausalLM:
        tiny = dict(
            vocab_size=128,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
        torch.manual_seed(seed)
        return MiniMindForCausalLM(MiniMindConfig(**{**tiny, **fields})).eval()

    return make

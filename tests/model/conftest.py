"""What several test files of model/ share."""

import json

import pytest
import torch

from model.weights import (
    load_tokenizer,
    save_weights,
    weight_path,
)


@pytest.fixture
def ids():
    return torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small_model(make_model):
    return make_model(hidden_size=32, vocab_size=6400, num_hidden_layers=1, rope_theta=5e5)


@pytest.fixture
def saved(small_model, tokenizer, tmp_path):
    """The weight file of `small_model`."""
    path = weight_path("pretrain", 32, tmp_path)
    return save_weights(
        small_model, path, stage="pretrain", tokenizer=tokenizer, origin={"steps": 3}
    )


@pytest.fixture
def other_tokenizer(tokenizer, tmp_path):
    """The same tokens with two ids swapped."""
    folder = tmp_path / "other"
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(folder)

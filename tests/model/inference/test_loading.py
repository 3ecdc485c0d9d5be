"""Loading a model for chat, from own weights and from a transformers folder."""

import pytest
import torch
from test_weights import check_sentence

from model.errors import UserError
from model.inference.loading import load_for_chat
from model.weights import (
    TOKENIZER,
    tokenizer_hash,
)


def test_load_for_chat_takes_own_weights_and_transformers_folders(saved, tokenizer, tmp_path):
    own, _, stage = load_for_chat(TOKENIZER, "pretrain", directory=tmp_path)
    assert stage == "pretrain"
    own.save_pretrained(tmp_path / "export")
    tokenizer.save_pretrained(tmp_path / "export")
    exported, other, stage = load_for_chat(tmp_path / "export", "ignored")
    assert stage == ""
    assert tokenizer_hash(other) == tokenizer_hash(tokenizer)
    ids = torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, own(ids).logits)


def test_load_for_chat_takes_a_file_and_a_tokenizer_of_its_own(saved, other_tokenizer):
    assert load_for_chat(TOKENIZER, str(saved))[2] == "pretrain"
    with pytest.raises(UserError, match="another tokenizer"):
        load_for_chat(TOKENIZER, str(saved), tokenizer_path=other_tokenizer.name_or_path)


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_load_for_chat_names_what_is_wrong_with_a_folder(tmp_path, place):
    with pytest.raises(UserError, match="not a folder|no tokenizer.json") as error:
        load_for_chat(tmp_path / place, "pretrain")
    check_sentence(error, tmp_path / place)


def test_an_incomplete_transformers_folder_is_refused(make_model, tmp_path, tokenizer):
    model = make_model(vocab_size=6400)
    state = model.state_dict()
    state.pop("model.layers.1.mlp.up_proj.weight")
    model.save_pretrained(tmp_path, state_dict=state)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="missing weight model.layers.1.mlp.up_proj"):
        load_for_chat(tmp_path, "")

"""Loading a model for chat: from own weights, and from folders of several kinds."""

import json
from dataclasses import replace

import pytest
import torch

from model.errors import UserError
from model.formats.hf_format import save_hf_folder
from model.formats.lora_format import save_lora
from model.model_lora import LoraConfig, add_lora, lora_layers, merge
from model.model_minimind import MiniMindForCausalLM
from model.weights import TOKENIZER, load_model, save_weights, tokenizer_hash
from scripts.serving.arguments import ModelArgs
from scripts.serving.loading import load_chat_model

IDS = torch.tensor([[1, 20, 30, 40]])


@pytest.fixture
def args(save, tmp_path):
    """Flags for the weights of a tiny model."""
    save()
    return ModelArgs(save_dir=str(tmp_path), device="cpu")


def loaded(args: ModelArgs, **changes):
    return load_chat_model(replace(args, **changes), decode_only=False)


@pytest.fixture
def other_tokenizer(tokenizer, tmp_path):
    """A folder with a tokenizer of the same tokens, two of whose ids are swapped."""
    folder = tmp_path / "other"
    tokenizer.save_pretrained(folder)
    words = (folder / "tokenizer.json").read_text(encoding="utf-8")
    swapped = words.replace("<tool_call>", "<swap>").replace("<tool_response>", "<tool_call>")
    (folder / "tokenizer.json").write_text(swapped.replace("<swap>", "<tool_response>"), "utf-8")
    return folder


@torch.no_grad()
def test_own_weights_and_folders(args, tokenizer, tmp_path):
    own = loaded(args)
    assert (own.stage, own.name) == ("full_sft", "full_sft")
    expected = own.model(IDS).logits
    own.model.save_pretrained(tmp_path / "native")
    tokenizer.save_pretrained(tmp_path / "native")
    save_hf_folder(own.model, tokenizer, tmp_path / "llama")
    for folder in (tmp_path / "native", tmp_path / "llama"):
        for flags in (dict(load_from=str(folder)), dict(weight=str(folder))):
            other = loaded(args, **flags)
            assert (other.stage, other.name) == ("", str(folder))
            assert tokenizer_hash(other.tokenizer) == tokenizer_hash(tokenizer)
            torch.testing.assert_close(other.model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_file_and_a_tokenizer_of_its_own(args, other_tokenizer, tmp_path):
    path = str(tmp_path / "full_sft_64.pth")
    assert loaded(args, weight=path).stage == "full_sft"
    with pytest.raises(UserError, match="another tokenizer"):
        loaded(args, weight=path, tokenizer_path=str(other_tokenizer))


def test_the_tokenizer_beside_the_weights_is_theirs(args, other_tokenizer, tmp_path):
    """As downloaded weights have it; --load_from and --tokenizer_path come first."""
    path = other_tokenizer / "full_sft_64.pth"
    (tmp_path / "full_sft_64.pth").rename(path)
    (tmp_path / "full_sft_64.json").unlink()
    flags = dict(weight=str(path))
    beside = loaded(args, **flags).tokenizer
    with pytest.warns(UserWarning, match="does not say which tokenizer"):
        named = loaded(args, **flags, tokenizer_path=str(TOKENIZER)).tokenizer
    assert beside.name_or_path == str(other_tokenizer) != named.name_or_path


@pytest.mark.filterwarnings("ignore:.*does not say which tokenizer")
def test_flags_tell_what_a_bare_file_leaves_open(args, make_model, tmp_path):
    fields = dict(vocab_size=6400, use_moe=True, qk_norm=True, n_shared_experts=0)
    path = tmp_path / "bare_64_moe.pth"
    torch.save(make_model(**fields).state_dict(), path)
    config = loaded(args, weight="bare").model.config
    assert (config.num_experts_per_tok, config.rms_norm_eps) == (1, 1e-6)
    flags = dict(num_experts_per_tok=2, rms_norm_eps=1e-5, rope_theta=1e4)
    config = loaded(args, weight="bare", **flags).model.config
    assert {name: getattr(config, name) for name in flags} == flags
    with pytest.raises(UserError, match="rms_norm_eps 1e-05, as its .json says, and not 0.001"):
        loaded(args, rms_norm_eps=1e-3)


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_what_is_wrong_with_a_folder_is_named(args, tmp_path, place):
    with pytest.raises(UserError, match="not a folder|no tokenizer.json") as error:
        loaded(args, load_from=str(tmp_path / place))
    assert str(tmp_path / place) in str(error.value)


def test_an_incomplete_folder_is_refused(args, make_model, tmp_path, tokenizer):
    model = make_model(vocab_size=6400)
    state = model.state_dict()
    state.pop("model.layers.1.mlp.up_proj.weight")
    model.save_pretrained(tmp_path / "folder", state_dict=state)
    tokenizer.save_pretrained(tmp_path / "folder")
    with pytest.raises(UserError, match="folder .* lacks model.layers.1.mlp.up_proj.weight"):
        loaded(args, load_from=str(tmp_path / "folder"))


@torch.no_grad()
def test_an_adapter_works_on_a_folder_of_another_architecture(args, tokenizer, tmp_path):
    model = load_model(tmp_path / "full_sft_64.pth")
    save_hf_folder(model, tokenizer, tmp_path / "llama")
    config = LoraConfig(r=2)
    add_lora(model, config)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    about = dict(stage="lora/x", config=config, tokenizer=tokenizer, origin={})
    save_lora(model, tmp_path / "x_64.pth", **about)  # beside the weights, not in lora/
    merge(model)
    expected = model(IDS).logits
    for flags in ({}, dict(load_from=str(tmp_path / "llama"))):
        merged = loaded(args, **flags, lora_weight="x").model
        assert isinstance(merged, MiniMindForCausalLM)
        torch.testing.assert_close(merged(IDS).logits, expected, atol=0.02, rtol=0.01)  # float16
    with pytest.raises(UserError, match="no LoRA adapter y_64.pth in .*train one first"):
        loaded(args, lora_weight="y")


def test_a_mixture_beside_a_dense_model_is_chosen_by_a_flag(args, make_model, tokenizer, tmp_path):
    mixture = make_model(vocab_size=6400, use_moe=True)
    path = tmp_path / "full_sft_64_moe.pth"
    save_weights(mixture, path, stage="full_sft", tokenizer=tokenizer, origin={})
    for use_moe in (True, False):
        assert loaded(args, use_moe=use_moe).model.config.use_moe is use_moe
    with pytest.raises(UserError, match="is a folder without config.json"):
        loaded(args, weight=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minimind"}))
    with pytest.raises(UserError, match="has no weights: neither model.safetensors"):
        loaded(args, weight=str(tmp_path))

"""LoRA: against peft, its invariances, its files, and training it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_training import LN_V
from torch import nn
from torch.testing import assert_close
from toy import Trainer, everything, logged, same

from model.errors import UserError
from model.formats.lora_format import load_lora, save_lora
from model.model_lora import (
    LoraConfig,
    LoraLinear,
    add_lora,
    lora_layers,
    lora_state,
    merge,
    merge_and_unload,
    unmerge,
)
from model.weights import load_model, save_weights
from trainer import train_lora
from trainer.common.hardware import training_memory

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
EVERY_LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
SETTINGS = LoraConfig(r=4, alpha=12.0, target_modules=EVERY_LINEAR)
pytestmark = pytest.mark.usefixtures("in_a_hurry")


@pytest.fixture
def make_lora(make_model):
    """A model with an adapter that is not zero."""

    def make(settings: LoraConfig = SETTINGS, **fields):
        model = make_model(**fields)
        add_lora(model, settings)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B.weight, std=0.1)
        return model

    return make


# -- the layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, dict(use_moe=True)], ids=["dense", "moe"])
@torch.no_grad()
def test_it_begins_as_nothing_at_all(make_model, fields):
    model = make_model(**fields)
    before = model(IDS).logits
    add_lora(model, SETTINGS)
    assert torch.equal(model(IDS).logits, before)
    assert len(list(lora_layers(model))) == (2 * 7 if not fields else 2 * (4 + 5 * 3))


@torch.no_grad()
def test_an_adapter_by_hand():
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.copy_(torch.tensor([[1.0, 2.0]]))
    layer = LoraLinear(linear, LoraConfig(r=1, alpha=3.0))
    layer.lora_A.weight.copy_(torch.tensor([[1.0, -1.0]]))
    layer.lora_B.weight.copy_(torch.tensor([[0.5]]))
    # 1·5 + 2·4 = 13; A·x = 1, B·A·x = 0.5, times 3/1
    assert layer(torch.tensor([5.0, 4.0])).item() == 14.5
    assert layer.delta_weight.tolist() == [[1.5, -1.5]]


@pytest.mark.parametrize("fields", [{}, dict(use_moe=True)], ids=["dense", "moe"])
@torch.no_grad()
def test_merging_keeps_the_logits_and_unmerging_gives_the_weights_back(make_lora, fields):
    model = make_lora(**fields)
    logits = model(IDS).logits
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    for _ in range(2):  # to do it again changes nothing
        merge(model)
    assert_close(model(IDS).logits, logits, atol=2e-4, rtol=1e-4)
    name, layer = next(lora_layers(model))
    assert not torch.equal(layer.weight, weights[f"{name}.weight"])
    for _ in range(2):
        unmerge(model)
    assert torch.equal(model(IDS).logits, logits)
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())


@torch.no_grad()
def test_merged_for_good_is_an_ordinary_model(make_lora, make_model):
    model = make_lora()
    logits = model(IDS).logits
    plain = merge_and_unload(model)
    assert plain.state_dict().keys() == make_model().state_dict().keys()
    assert_close(plain(IDS).logits, logits, atol=0.03, rtol=0)  # rounded to float16
    assert all(torch.equal(w, w.half().float()) for n, w in plain.named_parameters() if "proj" in n)


def test_experts_with_adapters_are_not_grouped(make_lora):
    """The grouped product reads the weights alone."""
    model = make_lora(use_moe=True).train()
    with torch.no_grad():
        expected = model(IDS).logits  # one by one
    assert_close(model(IDS).logits, expected)


def test_only_the_adapter_is_trained(make_lora):
    model = make_lora(LoraConfig(r=2))
    model(IDS, labels=IDS).loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    attention = [f"self_attn.{p}_proj.lora_{m}.weight" for p in "qkvo" for m in "AB"]
    assert trained == {f"model.layers.{n}.{name}" for n in range(2) for name in attention}
    assert trained == lora_state(model).keys()


@pytest.mark.parametrize(
    ("target", "complaint"),
    [("query", "no linear layer query; it has .*q_proj"), ("lm_head", "is tied to the embedding")],
)
def test_layers_that_are_not_there_or_not_for_it(make_model, target, complaint):
    with pytest.raises(UserError, match=complaint):
        add_lora(make_model(), LoraConfig(target_modules=[target]))


# -- against peft ----------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_equal_peft(make_lora, make_model, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_lora()
    state = {f"base_model.model.{name}": each for name, each in lora_state(model).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=12.0)
    config |= dict(target_modules=EVERY_LINEAR, bias="none", base_model_name_or_path="")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    assert_close(model(IDS).logits, other(IDS).logits, atol=1e-5, rtol=1e-5)


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(make_lora, tokenizer, tmp_path) -> Path:
    path = tmp_path / "persona_64.pth"
    return save_lora(
        make_lora(), path, stage="lora/persona", config=SETTINGS, tokenizer=tokenizer, origin={}
    )


@torch.no_grad()
def test_a_file_holds_the_adapter_and_its_config_only(saved, make_lora, make_model):
    state = torch.load(saved, weights_only=True)
    assert state.keys() == lora_state(make_lora()).keys()
    assert all(weight.dtype == torch.float16 for weight in state.values())
    model = make_model()
    assert load_lora(model, saved) == SETTINGS
    assert_close(model(IDS).logits, make_lora()(IDS).logits, atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(num_hidden_layers=1), "only one of them has"),
        (dict(hidden_size=32), r"is \[4, 64\] in the file and \[4, 32\]"),
    ],
    ids=["layers", "width"],
)
def test_an_adapter_of_another_model_is_refused(saved, make_model, fields, words):
    with pytest.raises(UserError, match=words):
        load_lora(make_model(**fields), saved)


def test_an_adapter_without_its_config_is_refused(saved, make_model):
    saved.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="no .json with the LoRA config"):
        load_lora(make_model(), saved)


# -- training --------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path):
    return Trainer(tmp_path, train_lora)


@pytest.mark.parametrize(
    "fields", [{}, dict(use_moe=True, scoring_func="sigmoid")], ids=["dense", "sigmoid"]
)
def test_the_base_stays_as_it_is_to_the_bit(lora, trajectory, fields):
    lora(max_steps=4, learning_rate=1e-2, lora_targets=["q_proj", "o_proj"], **fields)
    first, last = trajectory[0], trajectory[-1]
    for name, weight in last.items():
        assert torch.equal(weight, first[name]) == (".lora_" not in name), name


def test_a_base_from_a_file_is_resumed_and_kept(lora, killed, tokenizer):
    """The checkpoint holds the adapter only; the base is loaded from its file again."""
    base = lora.stage.init_model(lora.stage.Args(**lora.settings(seed=7)), tokenizer)
    path = lora.folder / "full_sft_32.pth"
    save_weights(base, path, stage="full_sft", tokenizer=tokenizer, origin={})
    heads = dict(num_attention_heads=None, num_key_value_heads=None)
    common = dict(from_weight=str(path), save_interval=2, max_steps=4, **heads)
    lora("whole", **common)
    killed(2, lora, "cut", **common)
    lora("cut", **common, resume=True)
    assert same(everything(lora, "cut"), everything(lora, "whole"))


def test_the_loss_falls_and_the_file_is_named_after_the_data(lora):
    metrics = lora(epochs=30, learning_rate=2e-2, lora_targets=EVERY_LINEAR)
    losses = [record["loss"] for record in logged(metrics) if "loss" in record]
    assert losses[0] == pytest.approx(LN_V, abs=0.2) and losses[-1] < losses[0] - 0.2
    path = lora.folder / "a" / "out" / "lora" / "data_32.pth"
    assert path.exists() and path.with_suffix(".json").exists()
    assert lora.saved()["model"].keys() == torch.load(path, weights_only=True).keys()


def test_an_adapter_belongs_to_the_model_it_was_trained_on(lora, tokenizer):
    base = lora.stage.init_model(lora.stage.Args(**lora.settings()), tokenizer)
    metrics = lora(max_steps=3, learning_rate=1e-2, val_share=0.3)
    load_lora(base, lora.folder / "a" / "out" / "lora" / "data_32.pth")
    assert any((layer.lora_B.weight != 0).any() for _, layer in lora_layers(base))
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize("earlier", [False, True], ids=["own", "earlier version"])
def test_an_adapter_is_trained_further(lora, earlier):
    """From where it is; with the names and without the .json of an earlier version too."""
    lora(max_steps=2, learning_rate=1e-2, lora_targets=["q_proj", "o_proj"], lora_alpha=4.0)
    path = lora.folder / "a" / "out" / "lora" / "data_32.pth"
    state = torch.load(path)
    if earlier:
        path = lora.folder / "lora_identity_32.pth"
        torch.save({n.replace(".lora_", ".lora."): weight for n, weight in state.items()}, path)
    lora("b", max_steps=1, lora_weight=str(path), lora_r=8, learning_rate=1e-9)
    further = lora.folder / "b" / "out" / "lora" / "data_32.pth"
    assert same(torch.load(further), state)
    config = json.loads(further.with_suffix(".json").read_text())["lora"]
    assert (config["r"], config["alpha"]) == (4, 4.0)
    lora("c", max_steps=1, lora_weight=str(path), lora_r=8, learning_rate=1e-2)
    assert not same(torch.load(lora.folder / "c" / "out" / "lora" / "data_32.pth"), state)
    with pytest.raises(UserError, match="has lora_r 4, lora_alpha 4, .* flags cannot change"):
        lora("d", max_steps=1, lora_weight=str(path), lora_r=16)


@pytest.mark.parametrize(
    "change",
    [dict(lora_r=0), dict(lora_alpha=0.0), dict(lora_dropout=1.0), dict(save_weight="full_sft")],
    ids=str,
)
def test_bad_settings_are_named(lora, change):
    (name,) = change
    with pytest.raises(UserError, match=name):
        lora(**change)


def test_a_persona_is_not_a_model(saved):
    with pytest.raises(UserError, match="a LoRA adapter and no whole model; --lora_weight"):
        load_model(saved)


def test_what_is_frozen_needs_no_gradients(make_model):
    """4 bytes for each weight, 8 more for each that Muon trains, 12 for AdamW."""
    model = make_model()
    whole = sum(weight.numel() for weight in model.parameters())
    add_lora(model, LoraConfig())
    added = sum(layer.numel() for layer in lora_state(model).values())
    for optimizer, bytes_each in (("muon", 8), ("adamw", 12)):
        cpu = torch.device("cpu")
        fixed, _ = training_memory(model.config, model, cpu, torch.float32, optimizer, False)
        assert fixed == 4 * (whole + added) + bytes_each * added

"""LoRA files as adapters of peft and back; trl trains an exported model."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_convert import IDS, convert
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.errors import UserError
from model.formats.lora_format import load_lora, load_peft, save_lora
from model.model_lora import LoraConfig, add_lora, lora_layers, lora_state
from model.weights import load_model

# -- LoRA files ------------------------------------------------------------------------------------


@pytest.fixture
def adapter_file(save, tokenizer, tmp_path) -> Path:
    model = load_model(save())
    settings = LoraConfig(r=4, alpha=6.0, target_modules=["q_proj", "down_proj"])
    add_lora(model, settings)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    path = tmp_path / "persona_64.pth"
    save_lora(model, path, stage="lora", config=settings, tokenizer=tokenizer, origin={})
    return path


@torch.no_grad()
def test_to_peft_and_back(adapter_file, tmp_path):
    peft = pytest.importorskip("peft")
    base, adapter = tmp_path / "full_sft_64.pth", tmp_path / "adapter"
    convert("to-hf", base, tmp_path / "folder")
    convert("to-peft", adapter_file, adapter, "--base", tmp_path / "folder")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    other = peft.PeftModel.from_pretrained(other, adapter)
    convert("merge-lora", base, tmp_path / "merged.pth", "--lora", adapter_file)
    merged = load_model(tmp_path / "merged.pth")
    assert_close(other(IDS).logits, merged(IDS).logits, atol=5e-3, rtol=0)  # merged in float16
    assert (load_model(base)(IDS).logits - merged(IDS).logits).abs().max() > 0.1

    convert("from-peft", adapter, tmp_path / "back.pth", "--base", base)
    before, after = (
        torch.load(p, weights_only=True) for p in (adapter_file, tmp_path / "back.pth")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_what_peft_trained_is_read(save, tmp_path):
    """An adapter that peft itself made."""
    peft = pytest.importorskip("peft")
    base = save()
    convert("to-hf", base, tmp_path / "folder")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["k_proj", "up_proj"])
    other = peft.get_peft_model(other, config)
    for name, weight in other.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    other.save_pretrained(tmp_path / "adapter")
    model = load_model(base)
    settings = load_peft(model, tmp_path / "adapter")
    assert (settings.r, settings.alpha, len(lora_state(model))) == (2, 8, 2 * 2 * 2)
    assert_close(model(IDS).logits, other(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture
def exported(save, tmp_path):
    """A tiny model, its file and its transformers folder."""
    path = save()
    convert("to-hf", path, tmp_path / "folder")
    return path, tmp_path / "folder"


def adapter_of_peft(folder: Path, target: Path, settings: dict, as_bin: bool = False):
    """An adapter with weights that are not 0, as peft saves it; the model that it was made on."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    model.save_pretrained(target)
    if as_bin:  # as peft saved it before safetensors
        state = load_file(target / "adapter_model.safetensors")
        torch.save(state, target / "adapter_model.bin")
        (target / "adapter_model.safetensors").unlink()
    return model


LAYERS = [f"model.layers.{n}.self_attn" for n in range(2)]
CONVERTED = {  # settings of peft, and the layers that have an adapter
    "names": (dict(target_modules=["q_proj", "v_proj"]), ["q_proj", "v_proj"]),
    "all-linear": (
        dict(target_modules="all-linear"),
        sorted("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()),
    ),
    "regex": (dict(target_modules=r".*self_attn\.(q|v)_proj"), ["q_proj", "v_proj"]),
    "first layer": (
        dict(target_modules=["q_proj"], layers_to_transform=[0]),
        [f"{LAYERS[0]}.q_proj"],
    ),
    "whole names": (
        dict(target_modules=[f"{LAYERS[0]}.q_proj", f"{LAYERS[1]}.v_proj"]),
        [f"{LAYERS[0]}.q_proj", f"{LAYERS[1]}.v_proj"],
    ),
    "default": ({}, ["q_proj", "v_proj"]),
    "excluded": (
        dict(target_modules=["q_proj"], exclude_modules=[f"{LAYERS[1]}.q_proj"]),
        [f"{LAYERS[0]}.q_proj"],
    ),
    "rsLoRA": (dict(target_modules=["q_proj"], use_rslora=True), ["q_proj"]),
    "ranks": (
        dict(target_modules=["q_proj", "v_proj"], rank_pattern={r"layers\.1.*\.q_proj": 2}),
        ["q_proj", "v_proj"],
    ),
    "larger ranks and alphas": (
        dict(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"v_proj": 7},
            alpha_pattern={"layers.0.self_attn.v_proj": 3, "v_proj": 20},
        ),
        ["q_proj", "v_proj"],
    ),
    "rsLoRA with ranks": (
        dict(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, use_rslora=True),
        ["q_proj", "v_proj"],
    ),
    "bin": (dict(target_modules=["q_proj"]), ["q_proj"]),
    "gaussian": (dict(target_modules=["q_proj"], init_lora_weights="gaussian"), ["q_proj"]),
}
REFUSED = {
    "dora": (dict(use_dora=True), "has use_dora.*merge it with peft"),
    "modules": (dict(modules_to_save=["embed_tokens"]), "has modules_to_save"),
    "pissa": (dict(init_lora_weights="pissa"), "has init_lora_weights pissa, which changes the"),
    "head": (
        dict(target_modules=["q_proj", "lm_head"]),
        "the weight lm_head.*in the blocks",
    ),
    "embedding": (
        dict(target_modules=["q_proj", "embed_tokens"]),
        "the weight model.embed_tok",
    ),
    "bias": (dict(bias="lora_only"), "or it trains biases"),
    "tokens": (dict(trainable_token_indices=[1, 2]), "has trainable_token_indices"),
}


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("kind", CONVERTED)
@torch.no_grad()
def test_adapters_of_peft_are_converted_exactly(exported, tmp_path, kind):
    (base, folder), (settings, targets) = exported, CONVERTED[kind]
    other = adapter_of_peft(folder, tmp_path / "adapter", settings, as_bin=kind == "bin")
    model = load_model(base)
    before = model(IDS).logits
    config = load_peft(model, tmp_path / "adapter")
    assert config.target_modules == targets
    assert_close(model(IDS).logits, other(IDS).logits, atol=1e-4, rtol=1e-4)
    assert (model(IDS).logits - before).abs().max() > 0.01

    # through MiniMind's file, in float16, and back to peft
    convert("from-peft", tmp_path / "adapter", tmp_path / "x_64.pth", "--base", base)
    model = load_model(base)
    load_lora(model, tmp_path / "x_64.pth")
    assert_close(model(IDS).logits, other(IDS).logits, atol=5e-3, rtol=0)
    convert("to-peft", tmp_path / "x_64.pth", tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    again = pytest.importorskip("peft").PeftModel.from_pretrained(again, tmp_path / "back")
    assert_close(again(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_an_adapter_cannot_be_here_is_named(exported, tmp_path, kind):
    (base, folder), (settings, sentence) = exported, REFUSED[kind]
    adapter_of_peft(folder, tmp_path / "adapter", {"target_modules": ["q_proj"], **settings})
    with pytest.raises(UserError, match=sentence):
        convert("from-peft", tmp_path / "adapter", tmp_path / "x.pth", "--base", base)
    assert not list(tmp_path.glob("x.*"))


def test_an_adapter_of_experts_cannot_become_peft(save, tokenizer, tmp_path):
    model = load_model(save(use_moe=True))
    settings = LoraConfig(target_modules=["gate_proj"])
    add_lora(model, settings)
    path = tmp_path / "x_64_moe.pth"
    save_lora(model, path, stage="lora", config=settings, tokenizer=tokenizer, origin={})
    with pytest.raises(UserError, match="merge-lora"):
        convert("to-peft", path, tmp_path / "adapter")


@pytest.mark.parametrize(
    "change",
    [
        dict(r="4"),
        dict(r=0),
        dict(lora_alpha=None),
        dict(alpha_pattern={"q_proj": 0}),
        dict(alpha_pattern=["q_proj"]),
        dict(r=3),
        dict(lora_dropout=2),
        dict(peft_type="IA3"),
        dict(fan_in_fan_out=True),
    ],
    ids=str,
)
def test_an_adapter_of_another_kind_is_refused(adapter_file, tmp_path, change):
    convert("to-peft", adapter_file, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    base = tmp_path / "full_sft_64.pth"
    with pytest.raises(UserError, match="LoRA|adapter"):
        convert("from-peft", tmp_path / "adapter", tmp_path / "x.pth", "--base", base)
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize("change", [dict(r=0), dict(colour="red"), dict(target_modules=None)])
def test_a_damaged_lora_config_is_named(adapter_file, tmp_path, change):
    file = adapter_file.with_suffix(".json")
    info = json.loads(file.read_text())
    info["lora"] |= change
    file.write_text(json.dumps(info))
    with pytest.raises(UserError, match="LoRA"):
        convert("to-peft", adapter_file, tmp_path / "adapter")


def test_a_model_is_not_a_lora_file(save, tmp_path):
    path = save()
    with pytest.raises(UserError, match="a whole model and not a LoRA file"):
        convert("merge-lora", path, tmp_path / "new.pth", "--lora", path)


# -- trl -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_trl_trains_an_exported_model(save, tmp_path, stage):
    trl = pytest.importorskip("trl")
    convert("to-hf", save(), tmp_path / "folder")
    asked = [{"role": "user", "content": "2 + 2"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("4", "5")]
    common = dict(
        output_dir=str(tmp_path / "trl"),
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
    )
    if stage == "sft":
        data = Dataset.from_list([{"messages": asked + answers[0]}] * 4)
        kind, config = trl.SFTTrainer, trl.SFTConfig(**common)
    else:
        row = {"prompt": asked, "chosen": answers[0], "rejected": answers[1]}
        data = Dataset.from_list([row] * 4)
        kind, config = trl.DPOTrainer, trl.DPOConfig(**common)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    trainer = kind(
        str(tmp_path / "folder"), args=config, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    expected = math.log(2)
    if stage == "sft":
        own, ids = load_model(tmp_path / "full_sft_64.pth"), trainer.train_dataset[0]["input_ids"]
        ids = torch.tensor([ids])
        expected = own(ids, labels=ids).loss.item()
    assert len(losses) == 2
    assert losses[0] == pytest.approx(expected, abs=1e-3)

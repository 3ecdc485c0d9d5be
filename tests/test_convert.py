"""Conversion: to transformers, peft and trl, and back, with the same logits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_model import PAIRS
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.errors import UserError
from model.model_lora import LoraSettings, add_lora, lora_layers, lora_state, save_lora
from model.weights import load_model
from scripts import convert_model

IDS = torch.randint(3, 6400, (2, 12), generator=torch.Generator().manual_seed(1))
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama_yarn": "LlamaForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen2_moe_fine_grained": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def convert(*words: object) -> None:
    convert_model.main(list(map(str, words)))


# -- transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
@torch.no_grad()
def test_to_transformers_and_back(save, tmp_path, capsys, kind):
    path, folder = save(**PAIRS[kind]), tmp_path / "folder"
    convert("to-hf", path, folder)
    assert "largest difference of a logit" in capsys.readouterr().out
    own, other = load_model(path), AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(other).__name__ == CLASSES[kind]
    assert_close(other(IDS).logits, own(IDS).logits, atol=2e-5, rtol=1e-5)
    assert other.generation_config.eos_token_id == 2
    assert (folder / "model.safetensors").exists()

    convert("from-hf", folder, tmp_path / "back.pth")
    back = load_model(tmp_path / "back.pth")
    assert all(
        torch.equal(weight, own.state_dict()[name]) for name, weight in back.state_dict().items()
    )
    assert torch.equal(back(IDS).logits, own(IDS).logits)


@torch.no_grad()
def test_the_folder_holds_all_that_a_chat_needs(save, tmp_path, tokenizer):
    convert("to-hf", save(use_moe=True), tmp_path / "folder", "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert model.dtype == torch.bfloat16
    other = AutoTokenizer.from_pretrained(tmp_path / "folder")
    messages = [{"role": "user", "content": "你好 <|im_end|>"}]
    settings = dict(add_generation_prompt=True, return_tensors="pt")
    inputs = other.apply_chat_template(messages, **settings)
    assert inputs["input_ids"].tolist() == tokenizer.apply_chat_template(messages, **settings)["input_ids"].tolist()  # fmt: skip # noqa: E501
    assert model.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("fields", [{}, dict(use_moe=True)], ids=["dense", "moe"])
@torch.no_grad()
def test_in_float16_a_folder_says_what_the_file_said(save, tmp_path, fields):
    path = save(**fields)
    convert("to-hf", path, tmp_path / "folder", "--dtype", "float16")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).eval()
    assert_close(other(IDS).logits, load_model(path)(IDS).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_earlier_file_gets_its_json(save, tmp_path):
    path = save(num_attention_heads=8)
    path.with_suffix(".json").unlink()
    with pytest.warns(UserWarning, match="does not say which tokenizer"):
        convert("from-hf", path, tmp_path / "new.pth")
        expected = load_model(path)
    assert load_model(tmp_path / "new.pth").config.num_attention_heads == 8
    assert torch.equal(load_model(tmp_path / "new.pth")(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(use_moe=True, scoring_func="sigmoid"), "a bias balances"),
        (dict(use_moe=True, qk_norm=True), "both q/k norm and shared experts"),
        (dict(use_moe=True, n_shared_experts=0), "neither q/k norm nor shared experts"),
    ],
    ids=["sigmoid", "both", "neither"],
)
def test_what_transformers_has_not_is_said_to_be_so(save, tmp_path, fields, words):
    with pytest.raises(UserError, match=words):
        convert("to-hf", save(**fields), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert not list(tmp_path.glob(".*"))


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
torch.save(model(torch.tensor([[1, 20, 30, 40]])).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_a_native_folder_brings_its_code_along(save, tmp_path):
    """Read by a program that knows nothing of this project."""
    path, folder = save(use_moe=True, scoring_func="sigmoid"), tmp_path / "folder"
    convert("to-hf", path, folder, "--native")
    words = [sys.executable, "-c", LOAD, folder, tmp_path / "logits.pt"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = load_model(path)(torch.tensor([[1, 20, 30, 40]])).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


# -- mistakes --------------------------------------------------------------------------------------


def test_what_is_there_is_not_written_over(save, tmp_path):
    path, folder = save(), tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert("to-hf", path, folder)
    assert (folder / "mine.txt").read_text() == "mine"
    convert("to-hf", path, folder, "--force")
    assert not (folder / "mine.txt").exists() and (folder / "config.json").exists()


def test_a_conversion_that_changes_the_logits_is_no_success(save, tmp_path, monkeypatch):
    monkeypatch.setattr("model.transformers_folder.HALF_OPEN", 5.0)
    with pytest.raises(UserError, match="more than rounding"):
        convert("to-hf", save(use_moe=True), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["to-gguff", ".", "x"], "to-gguff"),
        (["to-hf", "nowhere.pth", "x"], "nowhere.pth does not exist"),
        (["to-hf", "."], "target"),
        (["from-hf", ".", "x.pth"], "tokenizer.json|config.json"),
        (["from-peft", ".", "x.pth"], "--base"),
        (["to-hf", ".", "x", "--lora", "y"], "--lora is for merge-lora"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_sentence(words, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        convert(*words)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("attention_bias", True, "biases in its attention"),
        ("hidden_act", "gelu", "activation is gelu"),
        ("head_dim", 32, "not as wide as the model"),
        ("model_type", "gpt2", "GPT2Config is none of Llama"),
    ],
)
def test_a_model_that_is_none_of_ours_is_refused(save, tmp_path, name, value, complaint):
    convert("to-hf", save(), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config[name] = value
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=complaint):
        convert("from-hf", tmp_path / "folder", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def test_a_difference_leaves_nothing_behind(save, tmp_path, monkeypatch):
    path, target = save(), tmp_path / "new.pth"
    monkeypatch.setattr(convert_model, "SAME", -1.0)
    with pytest.raises(UserError, match="more than rounding"):
        convert("from-hf", path, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full_sft_64.json", "full_sft_64.pth"]


# -- LoRA and peft ---------------------------------------------------------------------------------


@pytest.fixture
def addition(save, tokenizer, tmp_path) -> Path:
    model = load_model(save())
    settings = LoraSettings(r=4, alpha=6.0, target_modules=["q_proj", "down_proj"])
    add_lora(model, settings)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    path = tmp_path / "persona_64.pth"
    save_lora(model, path, stage="lora", settings=settings, tokenizer=tokenizer, origin={})
    return path


@torch.no_grad()
def test_to_peft_and_back(addition, tmp_path):
    peft = pytest.importorskip("peft")
    base, adapter = tmp_path / "full_sft_64.pth", tmp_path / "adapter"
    convert("to-hf", base, tmp_path / "folder")
    convert("to-peft", addition, adapter, "--base", tmp_path / "folder")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    other = peft.PeftModel.from_pretrained(other, adapter)
    convert("merge-lora", base, tmp_path / "merged.pth", "--lora", addition)
    merged = load_model(tmp_path / "merged.pth")
    assert_close(other(IDS).logits, merged(IDS).logits, atol=5e-3, rtol=0)  # merged in float16
    assert (load_model(base)(IDS).logits - merged(IDS).logits).abs().max() > 0.1

    convert("from-peft", adapter, tmp_path / "back.pth", "--base", base)
    before, after = (torch.load(p, weights_only=True) for p in (addition, tmp_path / "back.pth"))
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
    settings = convert_model.read_peft(model, tmp_path / "adapter")
    assert (settings.r, settings.alpha, len(lora_state(model))) == (2, 8, 2 * 2 * 2)
    assert_close(model(IDS).logits, other(IDS).logits, atol=1e-4, rtol=1e-4)


def test_an_addition_to_experts_has_no_place_in_peft(save, tokenizer, tmp_path):
    model = load_model(save(use_moe=True))
    settings = LoraSettings(target_modules=["gate_proj"])
    add_lora(model, settings)
    path = tmp_path / "x_64_moe.pth"
    save_lora(model, path, stage="lora", settings=settings, tokenizer=tokenizer, origin={})
    with pytest.raises(UserError, match="merge-lora"):
        convert("to-peft", path, tmp_path / "adapter")


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
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    result = trainer.train()
    assert result.global_step == 2 and result.training_loss > 0, losses

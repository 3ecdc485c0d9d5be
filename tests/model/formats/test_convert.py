"""Conversion to transformers and back, with the same logits."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_model import PAIRS
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from model.errors import UserError
from model.formats.hf_format import save_hf_folder
from model.weights import ROOT, load_model
from scripts import convert_model

IDS = torch.randint(3, 6400, (2, 12), generator=torch.Generator().manual_seed(1))
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama_yarn": "LlamaForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen2_moe_fine_grained": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4_moe_qk_norm": "Glm4MoeForCausalLM",
}


def convert(*words: object) -> None:
    convert_model.main(list(map(str, words)))


# -- there and back --------------------------------------------------------------------------------


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


def test_what_vllm_needs_and_others_do_not_is_written(save, tmp_path):
    """Its classes have biases of q, k and v whatever the config says, and tie no head of GLM."""
    zeros = set()
    for kind in ("qwen2_moe", "glm4_moe"):
        convert("to-hf", save(kind, **PAIRS[kind]), tmp_path / kind)
        state = load_file(tmp_path / kind / "model.safetensors")
        zeros |= {name for name, weight in state.items() if not weight.any()}
        assert ("lm_head.weight" in state) == (kind == "glm4_moe")
    names = {f"model.layers.{n}.self_attn.{part}_proj.bias" for n in (0, 1) for part in "qkv"}
    assert names == {name for name in zeros if "e_score" not in name}


@torch.no_grad()
def test_biases_are_read_where_they_are_zero(tmp_path, tokenizer):
    """Of a model that transformers made; it starts with biases of zero."""
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=6400)
    other = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, attention_bias=True, mlp_bias=True, **sizes)
    ).eval()
    for value, complaint in ((0.0, ""), (0.1, "has biases .model.layers.1.mlp.up_proj.bias.")):
        other.model.layers[1].mlp.up_proj.bias[3] = value
        other.save_pretrained(tmp_path / "folder")
        tokenizer.save_pretrained(tmp_path / "folder")
        if complaint:
            with pytest.raises(UserError, match=complaint):
                load_model(tmp_path / "folder")
        else:
            assert_close(load_model(tmp_path / "folder")(IDS).logits, other(IDS).logits)


@torch.no_grad()
def test_the_folder_holds_all_that_a_chat_needs(save, tmp_path, tokenizer, capsys):
    path = save("full_sft_64_moe", use_moe=True)
    convert("to-hf", path, tmp_path / "folder", "--dtype", "bfloat16")
    assert "bfloat16 itself changes a logit by" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert model.dtype == torch.bfloat16
    other = AutoTokenizer.from_pretrained(tmp_path / "folder")
    messages = [{"role": "user", "content": "你好 <|im_end|>"}]
    settings = dict(add_generation_prompt=True, return_tensors="pt")
    inputs = other.apply_chat_template(messages, **settings)
    assert inputs["input_ids"].tolist() == tokenizer.apply_chat_template(messages, **settings)["input_ids"].tolist()  # fmt: skip # noqa: E501
    own = load_model(tmp_path / "full_sft_64_moe.pth").bfloat16()
    settings = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(**inputs, **settings), own.generate(**inputs, **settings))


@pytest.mark.parametrize("fields", [{}, dict(use_moe=True)], ids=["dense", "moe"])
@torch.no_grad()
def test_in_float16_a_folder_says_what_the_file_said(save, tmp_path, fields):
    path = save(**fields)
    convert("to-hf", path, tmp_path / "folder", "--dtype", "float16")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).eval()
    assert_close(other(IDS).logits, load_model(path)(IDS).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_earlier_file_gets_its_json(save, tmp_path, capsys):
    """What its shapes leave open is told, and flags say otherwise."""
    model = load_model(path := save(num_attention_heads=4))
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="which tokenizer"):
        convert("from-hf", path, tmp_path / "new.pth")
    words = ("from-hf", path, tmp_path / "new.pth", "--tokenizer_path", ROOT / "model")
    with pytest.warns(UserWarning, match="does not say which tokenizer"):
        convert(*words)
        assert "num_attention_heads 8" in capsys.readouterr().out
        assert (load_model(tmp_path / "new.pth")(IDS).logits - model(IDS).logits).abs().max() > 0.01
        convert(*words, "--num_attention_heads", 4, "--force")
    assert torch.equal(load_model(tmp_path / "new.pth")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_weights_that_are_not_float16_come_back(make_model, tokenizer, tmp_path, dtype):
    """As another program may have trained them: with sharp logits, after which rounding shows."""
    model = make_model(vocab_size=6400, use_moe=True, n_shared_experts=0, qk_norm=True)
    save_hf_folder(model, tokenizer, tmp_path / "folder", getattr(torch, dtype))
    convert("from-hf", tmp_path / "folder", tmp_path / "back.pth")
    state = load_model(tmp_path / "back.pth").state_dict()
    for name, weight in model.to(getattr(torch, dtype)).state_dict().items():
        assert torch.equal(state[name], weight.float().half().float())
    for kind in ("float32", "float16", "q8_0"):
        convert("to-gguf", tmp_path / "folder", tmp_path / f"{kind}.gguf", "--dtype", kind)


@torch.no_grad()
def test_yarn_is_a_matter_of_flags(save, tmp_path):
    path = save()
    flags = dict(inference_rope_scaling=1, yarn_original_length=16, yarn_factor=8.0)
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    convert("to-hf", path, tmp_path / "folder", *words)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    own = load_model(path, **{**flags, "inference_rope_scaling": True})
    assert_close(other(IDS).logits, own(IDS).logits, atol=2e-5, rtol=1e-5)
    assert (other(IDS).logits - load_model(path)(IDS).logits).abs().max() > 0.01
    with pytest.raises(UserError, match="--yarn_factor has no effect without --inference_rope"):
        convert("to-hf", path, tmp_path / "other", "--yarn_factor", 2)


YARN = {
    "factor": 16,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": 1.0,
}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "type": "yarn", **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": None}},
        {"rope_theta": 1e4, "rope_scaling": None},
    ],
    ids=["type", "both", "rope_parameters", "defaults", "none"],
)
@torch.no_grad()
def test_rope_of_any_version_of_transformers_is_read(save, tmp_path, rope):
    """As transformers itself reads it."""
    convert("to-hf", save(qk_norm=True, max_position_embeddings=2048), tmp_path / "folder")
    file = tmp_path / "folder" / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    file.write_text(json.dumps(config | rope))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    convert("from-hf", tmp_path / "folder", tmp_path / "own.pth")
    own = load_model(tmp_path / "own.pth")
    assert own.config.inference_rope_scaling is (rope.get("rope_scaling", 1) is not None)
    ids = torch.randint(3, 6400, (1, 300), generator=torch.Generator().manual_seed(2))
    assert_close(own(ids).logits, other(ids).logits, atol=5e-5, rtol=1e-5)


def test_the_weight_of_the_balance_loss_comes_along(save, tmp_path):
    path = save(use_moe=True, n_shared_experts=0, qk_norm=True, aux_loss_alpha=5e-4)
    convert("to-hf", path, tmp_path / "folder")
    convert("from-hf", tmp_path / "folder", tmp_path / "own.pth")
    assert load_model(tmp_path / "own.pth").config.aux_loss_alpha == 5e-4


def test_odd_sizes_of_experts_are_no_obstacle(save, tmp_path):
    convert("to-hf", save(use_moe=True, moe_intermediate_size=25), tmp_path / "folder")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            dict(scoring_func="sigmoid", n_shared_experts=0),
            "scoring_func sigmoid, without q/k norm, without",
        ),
        (dict(qk_norm=True), "scoring_func softmax, with q/k norm, with shared experts"),
        (dict(n_shared_experts=0, norm_topk_prob=False), "norm_topk_prob False"),
    ],
    ids=["bias_alone", "both", "weights"],
)
def test_models_without_an_equivalent_in_transformers_are_refused(save, tmp_path, fields, words):
    with pytest.raises(UserError, match=f"{words}.*--native"):
        convert("to-hf", save(use_moe=True, **fields), tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
torch.save(model(torch.tensor([[1, 20, 30, 40]])).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_a_native_folder_contains_the_code(save, tmp_path):
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
    """And with --force only what is a model, and of it only what is made anew."""
    path, folder = save(), tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert("to-hf", path, folder)
    for words in ((folder, "--force"), (tmp_path, "--force")):
        with pytest.raises(UserError, match="something else than a model"):
            convert("to-hf", path, *words)
    (folder / "config.json").write_text("old")
    convert("to-hf", path, folder, "--force")
    assert (folder / "mine.txt").read_text() == "mine"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    (folder / "pytorch_model.bin").write_text("old")
    with pytest.raises(UserError, match="other weights too .pytorch_model.bin."):
        convert("to-hf", path, folder, "--force")
    assert path.exists()


@pytest.mark.parametrize("there", ["b.pth", "b.json"])
def test_neither_of_two_files_is_written_over(save, tmp_path, there):
    convert("to-hf", save(), tmp_path / "folder")
    (tmp_path / there).write_text("mine")
    with pytest.raises(UserError, match=f"{there} exists already"):
        convert("from-hf", tmp_path / "folder", tmp_path / "b.pth")
    assert (tmp_path / there).read_text() == "mine"
    assert not {p.name for p in tmp_path.glob("b.*")} - {there}


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("b", "should be a .pth file"),
        ("v1.5", "should be a .pth file"),
        ("full_sft_64.pth/b.pth", "cannot write"),
        ("folder", "should be a .pth file"),
    ],
)
def test_where_a_file_cannot_be(save, tmp_path, target, complaint):
    convert("to-hf", save(), tmp_path / "folder")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=complaint):
        convert("from-hf", tmp_path / "folder", tmp_path / target, "--force")
    assert sorted(tmp_path.rglob("*")) == before


def test_as_a_command(save, tmp_path):
    """From another directory, by a person who errs once."""
    script = ROOT / "scripts" / "convert_model.py"
    path = save()
    for words, code, said in (
        (["to-hf", "--help"], 0, "--native"),
        (["to-hf", path.name, "new", "--dtype", "q8_0"], 2, "error: argument --dtype"),
        (["to-hf", path.name, "new"], 0, "new: load it with AutoModelForCausalLM"),
        (["to-hf", path.name, "new"], 2, "error: new exists already; --force overwrites it"),
    ):
        result = subprocess.run(
            [sys.executable, script, *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert (result.returncode, said in result.stdout + result.stderr) == (code, True), result
        assert "Traceback" not in result.stderr


def test_a_conversion_that_changes_the_logits_is_no_success(save, tmp_path, monkeypatch):
    monkeypatch.setattr("model.formats.hf_format.NEAR_ZERO_GATE", 5.0)
    with pytest.raises(UserError, match="more than rounding"):
        convert("to-hf", save(use_moe=True), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["to-gguff", ".", "x"], "to-gguff"),
        (["to-hf", "nowhere.pth", "x"], "nowhere.pth does not exist"),
        (["to-hf", "."], "target"),
        (["to-hf", ".", "x"], "config.json"),
        (["from-hf", ".", "x.pth"], "config.json"),
        (["from-peft", ".", "x.pth"], "--base"),
        (["merge-lora", ".", "x.pth"], "--lora"),
        (["to-hf", ".", "x", "--lora", "y"], "--lora"),
        (["to-hf", ".", "x", "--for"], "--for"),
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
        ("hidden_act", "gelu", "activation is gelu"),
        ("head_dim", 32, "not together as wide as"),
        ("model_type", "gpt2", "GPT2Config is not supported; it must be one of Llama"),
    ],
)
def test_unsupported_models_are_refused(save, tmp_path, name, value, complaint):
    convert("to-hf", save(), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config[name] = value
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=complaint):
        convert("from-hf", tmp_path / "folder", tmp_path / "back.pth")
    assert not (tmp_path / "back.pth").exists()


def test_a_difference_leaves_nothing_behind(save, tmp_path, monkeypatch):
    path = save()
    monkeypatch.setattr(convert_model, "EXACT", -1.0)
    for words in (("to-hf", tmp_path / "new"), ("from-hf", tmp_path / "new.pth")):
        with pytest.raises(UserError, match="more than rounding"):
            convert(words[0], path, *words[1:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full_sft_64.json", "full_sft_64.pth"]


@pytest.mark.parametrize("name", ["mscale", "truncate"])
def test_unsupported_rope_fields_are_refused(save, tmp_path, name):
    convert("to-hf", save(inference_rope_scaling=True), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["rope_parameters"][name] = 0.5 if name == "mscale" else False
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    for words in (("from-hf", tmp_path / "b.pth"), ("to-gguf", tmp_path / "b.gguf")):
        with pytest.raises(UserError, match=f"RoPE has {name}"):
            convert(words[0], tmp_path / "folder", *words[1:])

"""Files of earlier MiniMind versions, tiny ones in exactly their shapes: `.pth`, resume files, LoRA
and folders with code of their own. Logits are compared with the equivalent model of transformers.
"""

import json
from pathlib import Path

import pytest
import torch
from peers import peer_with_weights
from safetensors.torch import save_file
from test_convert import IDS, convert
from torch.testing import assert_close

from model.errors import UserError
from model.formats.lora_format import load_lora, read_lora
from model.model_lora import lora_state, merge
from model.model_minimind import MiniMindConfig
from model.weights import ROOT, load_model

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=8, vocab_size=6400)
OLDER = dict(num_key_value_heads=2, rms_norm_eps=1e-5, intermediate_size=192)
NEWER = dict(
    num_key_value_heads=4, rms_norm_eps=1e-6, intermediate_size=256, qk_norm=True
)  # 64 · ceil(π · 64 / 64)
RELEASED = {
    "minimind2": OLDER,
    "minimind2-moe": dict(OLDER, use_moe=True, n_routed_experts=4, n_shared_experts=1),
    "minimind-3": NEWER,
    "minimind-3-moe": dict(
        NEWER, use_moe=True, n_shared_experts=0, num_experts_per_tok=1, aux_loss_alpha=5e-4
    ),
}
# config.json of their folders with code, as their own classes write it
COMMON = dict(
    architectures=["MiniMindForCausalLM"],
    auto_map={"AutoConfig": "model_minimind.MiniMindConfig"},
    bos_token_id=1,
    dropout=0.0,
    eos_token_id=2,
    flash_attn=True,
    hidden_act="silu",
    hidden_size=64,
    inference_rope_scaling=False,
    max_position_embeddings=32768,
    model_type="minimind",
    num_attention_heads=8,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    norm_topk_prob=True,
    rope_theta=1000000.0,
    rope_scaling=None,
    torch_dtype="float16",
    transformers_version="4.57.1",
    use_moe=False,
    vocab_size=6400,
)
NATIVE_2025 = dict(
    COMMON,
    aux_loss_alpha=0.01,
    intermediate_size=192,
    n_routed_experts=4,
    n_shared_experts=1,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    scoring_func="softmax",
    seq_aux=True,
)
NATIVE_2026 = dict(
    COMMON,
    head_dim=8,
    intermediate_size=256,
    moe_intermediate_size=256,
    num_experts=4,
    num_experts_per_tok=1,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    router_aux_loss_coef=5e-4,
    tie_word_embeddings=True,
)
NATIVE = {
    "minimind2": NATIVE_2025,
    "minimind2-moe": dict(NATIVE_2025, use_moe=True),
    "minimind-3": NATIVE_2026,
    "minimind-3-moe": dict(NATIVE_2026, use_moe=True),
}
YARN = {  # since 2025-12
    "type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": 1.0,
}


@pytest.fixture
def released(make_model):
    """A function that makes a tiny model of a released name: its weights as float16, and the same
    model in transformers."""

    def make(name: str, **fields):
        model = make_model(**SIZES, **{**RELEASED[name], **fields}, initializer_range=0.05)
        for each, weight in model.named_parameters():
            if each.endswith("norm.weight"):
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        model.half().float()
        state = {name: weight.half() for name, weight in model.state_dict().items()}
        return state, peer_with_weights(model).eval()

    return make


@pytest.fixture
def native_folder(released, tokenizer, tmp_path):
    """A function that writes a folder of a released name, whose code must never run."""

    def make(name: str, kind: str = "safetensors", **values) -> Path:
        folder = tmp_path / "native"
        folder.mkdir()
        state, _ = released(name)
        del state["lm_head.weight"]  # tied
        (folder / "config.json").write_text(json.dumps({**NATIVE[name], **values}))
        (folder / "model_minimind.py").write_text("raise SystemExit('their code was run')")
        tokenizer.save_pretrained(folder)
        if kind == "safetensors":
            save_file(state, folder / "model.safetensors")
        elif kind == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            suffix = "safetensors" if kind == "sharded safetensors" else "bin"
            stem = "model" if suffix == "safetensors" else "pytorch_model"
            weight_map = {}
            for n, key in enumerate(state):
                weight_map[key] = f"{stem}-0000{1 + n % 2}-of-00002.{suffix}"
            for file in set(weight_map.values()):
                part = {key: state[key] for key, where in weight_map.items() if where == file}
                save_file(part, folder / file) if suffix == "safetensors" else torch.save(
                    part, folder / file
                )
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        return folder

    return make


# -- .pth ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("resume", [False, True], ids=["weights", "resume file"])
@torch.no_grad()
def test_a_bare_file_is_the_model_that_it_was(released, tmp_path, name, resume):
    state, peer = released(name)
    path = tmp_path / "full_sft_64.pth"
    content = {
        "model": {f"module.{key}": weight for key, weight in state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 1,
        "step": 300,
        "world_size": 8,
        "wandb_id": None,
    }
    torch.save(content if resume else state, path)
    model = load_model(path)
    assert_close(model(IDS).logits, peer(IDS).logits, atol=2e-5, rtol=1e-5)
    for field, value in RELEASED[name].items():
        assert getattr(model.config, field) == value, field
    assert model.config.rope_theta == 1e6


def test_what_shapes_leave_open_can_be_told(released, tmp_path):
    state, _ = released("minimind-3-moe")
    torch.save(state, tmp_path / "x.pth")
    words = ["from-hf", tmp_path / "x.pth", tmp_path / "y.pth", "--tokenizer_path", ROOT / "model"]
    with pytest.warns(UserWarning, match="which tokenizer"):
        convert(*words, "--num_experts_per_tok", 2, "--rms_norm_eps", 1e-5)
    config = load_model(tmp_path / "y.pth").config
    assert (config.num_experts_per_tok, config.rms_norm_eps) == (2, 1e-5)


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_a_native_folder_is_read_without_its_code(native_folder, released, tmp_path, name, kind):
    folder = native_folder(name, kind)
    model, peer = load_model(folder), released(name)[1]
    assert_close(model(IDS).logits, peer(IDS).logits, atol=2e-5, rtol=1e-5)
    if kind == "safetensors":
        convert("from-hf", folder, tmp_path / "own.pth")
        config = load_model(tmp_path / "own.pth").config
        assert config.to_dict() == model.config.to_dict()
        wanted = {**RELEASED[name], "aux_loss_alpha": 5e-4 if "3" in name else 0.01}
        assert {field: getattr(config, field) for field in wanted} == wanted


@pytest.mark.parametrize(
    "values",
    [
        {"inference_rope_scaling": True, "rope_scaling": YARN},
        {"rope_scaling": {**YARN, "rope_type": "yarn"}, "inference_rope_scaling": None},
        {"rope_parameters": {**YARN, "rope_theta": 1e6}, "inference_rope_scaling": None},
    ],
    ids=["their own", "rope_scaling", "rope_parameters"],
)
@torch.no_grad()
def test_yarn_of_a_native_folder_is_that_of_transformers(native_folder, released, values):
    model = load_model(native_folder("minimind-3", **values))
    yarn = dict(inference_rope_scaling=True, yarn_factor=16.0, yarn_attention_factor=1.0)
    _, peer = released("minimind-3", **yarn)
    _, without = released("minimind-3")
    assert peer.config.rope_parameters["factor"] == 16
    ids = torch.randint(3, 6400, (1, 300), generator=torch.Generator().manual_seed(2))
    assert_close(model(ids).logits, peer(ids).logits, atol=5e-5, rtol=1e-5)
    assert (model(ids).logits - without(ids).logits).abs().max() > 0.01


def test_yarn_that_is_switched_off_stays_off(native_folder):
    config = load_model(native_folder("minimind-3", rope_scaling=YARN)).config
    assert (config.inference_rope_scaling, config.yarn_factor) == (False, 16)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (dict(hidden_act="gelu"), "activation in .*native is gelu"),
        (dict(head_dim=16), "head_dim must be hidden_size / num_attention_heads, here 8"),
        (dict(num_hidden_layers=3), "lacks model.layers.2"),
        (
            dict(rope_scaling={"type": "linear", "factor": 4}),
            "rope_scaling of type linear; MiniMind supports yarn",
        ),
        (dict(num_experts_per_tok=9, use_moe=True), "cannot use 9 of 4 experts"),
    ],
    ids=str,
)
def test_a_native_folder_that_does_not_fit_is_refused(native_folder, values, complaint):
    with pytest.raises(UserError, match=complaint):
        load_model(native_folder("minimind-3", **values))


def test_a_native_folder_keeps_its_structure(native_folder):
    folder = native_folder("minimind-3")
    assert load_model(folder, dropout=0.1).config.dropout == 0.1
    with pytest.raises(UserError, match="num_key_value_heads 4, as its config.json says, and not"):
        load_model(folder, num_key_value_heads=2)


@pytest.mark.parametrize("damage", ["no weights", "half a file", "no index"])
def test_a_damaged_native_folder_is_named(native_folder, damage):
    folder = native_folder("minimind2")
    if damage == "half a file":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    else:
        (folder / "model.safetensors").unlink()
    if damage == "no index":
        (folder / "model.safetensors.index.json").write_text("[]")
    words = {"no weights": "has no weights", "half a file": "LFS pointer", "no index": "no index"}
    with pytest.raises(UserError, match=words[damage]) as error:
        load_model(folder)
    assert str(folder) in str(error.value)


# -- LoRA ------------------------------------------------------------------------------------------


@pytest.fixture
def lora_file(released, tmp_path):
    """A function that writes a base model and an adapter of an earlier version beside it."""

    def make(r: int, prefix: str = "", resume: bool = False) -> tuple[Path, Path]:
        base, path = tmp_path / "full_sft_64.pth", tmp_path / "lora_identity_64.pth"
        state, _ = released("minimind-3")
        torch.save(state, base)
        torch.manual_seed(5)
        adapter = {}
        for n in range(2):
            for name in ("q_proj", "o_proj"):
                module = f"{prefix}model.layers.{n}.self_attn.{name}.lora."
                adapter[f"{module}A.weight"] = torch.randn(r, 64).mul(0.1).half()
                adapter[f"{module}B.weight"] = torch.randn(64, r).mul(0.1).half()
        torch.save({"model": {**state, **adapter}, "epoch": 2} if resume else adapter, path)
        return base, path

    return make


@pytest.mark.parametrize("resume", [False, True], ids=["adapter", "resume file"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("r", [16, 8])
@torch.no_grad()
def test_an_adapter_adds_b_times_a_as_it_is(lora_file, r, prefix, resume):
    base, path = lora_file(r, prefix, resume)
    model = load_model(base)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapter = torch.load(path, weights_only=True)
    adapter = adapter["model"] if resume else adapter
    for name in (f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qo"):
        a, b = (adapter[f"{prefix}{name}.lora.{part}.weight"].float() for part in "AB")
        expected[f"{name}.weight"] += b @ a
    config = load_lora(model, path)
    assert (config.r, config.alpha) == (r, r)
    merge(model)
    for name, weight in expected.items():
        assert_close(model.state_dict()[name], weight)


@torch.no_grad()
def test_an_adapter_becomes_one_of_peft_and_a_model(lora_file, tmp_path):
    peft = pytest.importorskip("peft")
    base, path = lora_file(16)
    tokenizer = ["--tokenizer_path", ROOT / "model"]
    with pytest.warns(UserWarning, match="which tokenizer"):
        convert("to-hf", base, tmp_path / "folder", *tokenizer)
        convert("merge-lora", base, tmp_path / "merged.pth", "--lora", path, *tokenizer)
    convert("to-peft", path, tmp_path / "adapter")
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    other = peft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    model = load_model(base)
    load_lora(model, path)
    assert_close(model(IDS).logits, other(IDS).logits, atol=1e-4, rtol=1e-4)
    assert (model(IDS).logits - load_model(base)(IDS).logits).abs().max() > 0.1
    merged = load_model(tmp_path / "merged.pth")
    assert_close(merged(IDS).logits, model(IDS).logits, atol=0.05, rtol=0)  # float16


def test_an_adapter_of_several_ranks_is_refused(lora_file):
    _, path = lora_file(8)
    state = torch.load(path, weights_only=True)
    name = "model.layers.0.self_attn.q_proj.lora.A.weight"
    state[name] = state[name][:4]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"layers of ranks \[4, 8\]; MiniMind supports one"):
        read_lora(path)


def test_an_adapter_of_another_size_is_refused(lora_file, make_model):
    _, path = lora_file(8)
    with pytest.raises(UserError, match="does not fit the model"):
        load_lora(make_model(hidden_size=32), path)
    assert lora_state(make_model()) == {} and MiniMindConfig().hidden_size == 512

"""Weight files: exact round trips, the config of bare files, tokenizers, finding and writing."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from model.errors import UserError, tell_once
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import (
    atomic_write,
    find_weights,
    load_model,
    load_tokenizer,
    resolve_weights,
    save_weights,
    tokenizer_hash,
    weight_path,
    write_json,
)

IDS = torch.tensor([[1, 20, 30, 40]])


def bare(path: Path, state: dict) -> Path:
    """A `.pth` without a `.json`."""
    torch.save(state, path)
    return path


def check_sentence(error: pytest.ExceptionInfo, path: Path) -> str:
    """One sentence of reasonable length that names the file; returns it."""
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message.replace(str(path), "")) < 250
    return message


# -- round trips -----------------------------------------------------------------------------------


@torch.no_grad()
def test_round_trip_is_exact_but_for_float16(small_model, saved, tokenizer):
    loaded = load_model(saved, tokenizer=tokenizer)
    assert not loaded.training
    for weight in small_model.parameters():
        weight.copy_(weight.half())
    assert all(
        torch.equal(tensor, loaded.state_dict()[name])
        for name, tensor in small_model.state_dict().items()
    )
    assert torch.equal(loaded(IDS).logits, small_model(IDS).logits)


def test_saving_what_was_loaded_gives_the_same_tensors(saved, tokenizer, tmp_path):
    again = tmp_path / "again_32.pth"
    save_weights(load_model(saved), again, stage="again", tokenizer=tokenizer, origin={})
    first, second = torch.load(saved), torch.load(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_json_beside_the_weights(small_model, saved, tokenizer):
    info = json.loads(saved.with_suffix(".json").read_text())
    assert info["stage"] == "pretrain"
    assert info["origin"] == {"steps": 3}
    assert info["tokenizer_hash"] == tokenizer_hash(tokenizer)
    assert info["parameters"] == 6400 * 32 + 32 * 32 * 3 + 32 * 128 * 3 + 3 * 32
    assert MiniMindConfig(**info["config"]).to_dict() == small_model.config.to_dict()


def test_the_file_is_a_plain_float16_state_dict(small_model, saved):
    state = torch.load(saved, weights_only=True)
    assert type(state) is dict
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert saved.stat().st_size < 2 * small_model.num_parameters() + 10_000  # the tied matrix once
    MiniMindForCausalLM(small_model.config).load_state_dict(state, strict=True)


def test_untied_head_is_kept(make_model, tokenizer, tmp_path):
    model = make_model(tie_word_embeddings=False)
    path = tmp_path / "x_64.pth"
    save_weights(model, path, stage="x", tokenizer=tokenizer, origin={})
    path.with_suffix(".json").unlink()  # by shapes too
    loaded = load_model(path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.half().float())
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_dtype_and_overrides(saved):
    loaded = load_model(saved, dtype=torch.bfloat16, flash_attn=False)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.flash_attn is False
    assert loaded.config.rope_theta == 5e5


# What the shapes leave open, in the two generations of MiniMind.
OLDER = dict(rms_norm_eps=1e-5, yarn_beta_fast=4.0)
NEWER = dict(qk_norm=True, rms_norm_eps=1e-6, yarn_factor=16.0, yarn_attention_factor=1.0)


# -- bare `.pth` files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "fields"),
    [
        (OLDER, dict(num_attention_heads=8, num_key_value_heads=2)),
        (NEWER, dict(num_attention_heads=8, num_key_value_heads=4)),
        (NEWER, dict(num_attention_heads=4, num_key_value_heads=1)),
        (OLDER, dict(num_attention_heads=8, use_moe=True, n_routed_experts=5, n_shared_experts=2)),
        (OLDER, dict(num_attention_heads=8, use_moe=True, scoring_func="sigmoid")),
        (
            NEWER,
            dict(use_moe=True, n_shared_experts=0, num_experts_per_tok=1, aux_loss_alpha=5e-4),
        ),
    ],
    ids=str,
)
@torch.no_grad()
def test_bare_file_is_read_by_its_shapes(make_model, tmp_path, generation, fields):
    sizes = dict(hidden_size=96, num_hidden_layers=3, intermediate_size=320)
    model = make_model(**sizes, **generation, **fields)
    path = bare(tmp_path / "any name.pth", model.state_dict())
    loaded = load_model(path, max_position_embeddings=256)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert {**loaded.config.to_dict(), "initializer_range": 0.2} == model.config.to_dict()


def test_overrides_count_more_than_shapes(make_model, tmp_path):
    path = bare(tmp_path / "x.pth", make_model().state_dict())
    loaded = load_model(path, num_attention_heads=4, num_key_value_heads=2)
    assert loaded.config.head_dim == 16


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", ""])
def test_prefixes_of_wrappers_and_a_tied_head_left_out(make_model, tmp_path, prefix):
    state = make_model().state_dict()
    del state["lm_head.weight"]
    path = bare(tmp_path / "x.pth", {prefix + name: tensor for name, tensor in state.items()})
    loaded = load_model(path, num_attention_heads=4, num_key_value_heads=2)
    assert torch.equal(loaded.lm_head.weight, state["model.embed_tokens.weight"])


# -- tokenizer -------------------------------------------------------------------------------------


def test_another_tokenizer_is_refused(saved, tokenizer, other_tokenizer):
    load_model(saved, tokenizer=tokenizer)
    with pytest.raises(UserError, match="another tokenizer.*--tokenizer_path") as error:
        load_model(saved, tokenizer=other_tokenizer)
    check_sentence(error, saved)


def test_the_folder_of_the_right_tokenizer_is_named(
    small_model, tokenizer, other_tokenizer, tmp_path
):
    path = tmp_path / "theirs_32.pth"
    save_weights(small_model, path, stage="x", tokenizer=other_tokenizer, origin={})
    with pytest.raises(UserError, match=f"the right one, then {other_tokenizer.name_or_path}$"):
        load_model(path, tokenizer=tokenizer)


def test_tokenizer_hash_is_of_the_vocabulary(tokenizer, other_tokenizer):
    assert tokenizer_hash(tokenizer) == tokenizer_hash(load_tokenizer())
    assert tokenizer_hash(tokenizer) != tokenizer_hash(other_tokenizer)


def test_unknown_tokenizer_is_warned_about(saved, tokenizer):
    saved.with_suffix(".json").unlink()
    with pytest.warns(UserWarning, match="--tokenizer_path"):
        load_model(saved, tokenizer=tokenizer, num_attention_heads=4, num_key_value_heads=2)


def test_tokenizer_with_more_tokens_than_the_model_is_refused(make_model, tokenizer, tmp_path):
    path = bare(tmp_path / "x.pth", make_model().state_dict())
    with pytest.raises(UserError, match="6400 tokens, but .* only 128") as error:
        load_model(path, tokenizer=tokenizer)
    check_sentence(error, path)


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json") as error:
        load_tokenizer(tmp_path)
    check_sentence(error, tmp_path)


# -- finding and writing ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Weights of several stages, the newest first."""
    names = "sft_64_moe.pth sft_big_64.pth sft_64.pth sft_512.pth pretrain_64.pth sft_64.json"
    for age, name in enumerate(names.split()):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    return tmp_path


@pytest.mark.parametrize(
    ("stage", "size", "name"),
    [("sft", None, "sft_64_moe"), ("sft", 512, "sft_512"), ("sft_big", None, "sft_big_64")],
)
def test_find_weights(folder, stage, size, name):
    assert find_weights(stage, size, folder) == folder / f"{name}.pth"


@pytest.mark.parametrize(("use_moe", "name"), [(True, "sft_64_moe.pth"), (False, "sft_64.pth")])
def test_weights_with_experts_have_names_of_their_own(folder, use_moe, name):
    assert find_weights("sft", 64, folder, use_moe=use_moe).name == name
    assert find_weights("sft", None, folder, use_moe=use_moe).name == name
    assert weight_path("sft", 64, use_moe=use_moe).name == name


@pytest.mark.parametrize(
    ("size", "use_moe", "told"),
    [
        (64, None, "weights: sft_64_moe.pth, and not sft_64.pth; choose with --use_moe"),
        (64, False, "weights: sft_64.pth, and not sft_64_moe.pth; choose with --use_moe"),
        (None, None, "sft_64_moe.pth, and not sft_512.pth, sft_64.pth; choose with --hidden_size"),
        (512, None, ""),
    ],
)
def test_a_choice_among_files_of_one_name_is_told(folder, capsys, size, use_moe, told):
    tell_once.cache_clear()
    for _ in range(2):
        find_weights("sft", size, folder, use_moe=use_moe)
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == bool(told)


def test_a_name_is_a_stage_a_file_or_a_folder(folder, tmp_path):
    assert resolve_weights("sft", 512, folder) == folder / "sft_512.pth"
    assert resolve_weights("ppo_actor_768.pth", 512, folder) == Path("ppo_actor_768.pth")
    assert resolve_weights(folder / "sft_64.json", 512, folder) == folder / "sft_64.json"
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="without config.json.*name the .pth file itself"):
        resolve_weights(other, 512, folder)
    (other / "config.json").touch()
    assert resolve_weights(other, 512, folder) == other


def test_newest_weights_are_found_whatever_their_size(folder):
    os.utime(folder / "sft_512.pth")
    assert find_weights("sft", None, folder).name == "sft_512.pth"


@pytest.mark.parametrize("size", [None, 64])
def test_weights_that_are_not_there(folder, size):
    with pytest.raises(UserError, match="that folder has .*pretrain_64.pth, sft_512.pth"):
        find_weights("dpo", size, folder)
    with pytest.raises(UserError, match="train that stage first"):
        find_weights("dpo", size, folder / "nowhere")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"half of the new one")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "new folder" / "file"
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_who_is_reading_the_old_file_reads_it_to_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        with atomic_write(path) as file:
            file.write(b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write") as error:
        write_json(tmp_path / "file" / "x.json", {})
    check_sentence(error, tmp_path / "file" / "x.json")


def test_json_is_readable_by_people(tmp_path):
    write_json(tmp_path / "x.json", {"text": "你好"})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "text": "你好"\n}\n'


def test_a_structure_that_contradicts_the_json_is_refused(saved):
    """Eight heads read as four would fit the shapes, and compute nonsense."""
    with pytest.raises(UserError, match="has num_attention_heads 4, as its .json says, and not 2"):
        load_model(saved, num_attention_heads=2)


def test_training_does_not_guess_among_several_sizes(tmp_path):
    for size in (64, 128):
        (tmp_path / f"pretrain_{size}.pth").touch()
    with pytest.raises(UserError, match="several sizes of pretrain .*choose with --hidden_size"):
        find_weights("pretrain", directory=tmp_path, newest=False)
    assert find_weights("pretrain", 64, tmp_path, newest=False).name == "pretrain_64.pth"

"""Files that hold no weights, or weights of another model: refused in one sentence."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from test_weights import bare, check_sentence

from model.errors import UserError
from model.formats.minimind_format import read_state
from model.weights import (
    load_model,
)


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


BAD_FILES = {
    "git_lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs"),
    "empty": (b"", "0 bytes"),
    "text": (b"hello world\n" * 20, "is (refused|not a checkpoint)"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "is (refused|not a checkpoint)"),
    "list": ([torch.ones(1)], "state dict"),
    "tensor": (torch.ones(1), "state dict"),
    "resume_file": ({"model": {"a": torch.ones(1)}, "epoch": 3}, "not hold MiniMind weights"),
    "resume_file_of_plans": ({"model": {"layers": 3}, "epoch": 3}, "state dict"),
    "checkpoint": ({"model": {"a": torch.ones(1)}, "rng_states": []}, "which --resume goes on"),
    "resume_file_with_code": ({"model": {}, "epoch": np.float64(2)}, "never executed here"),
    "another_model": ({"weight": torch.ones(1)}, "not hold MiniMind weights"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "safetensors"),
}


@pytest.mark.parametrize(("content", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_refused(tmp_path, content, words):
    path = tmp_path / "bad.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=words) as error:
        load_model(path)
    check_sentence(error, path)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_never_executed(tmp_path, zipped):
    path, target = tmp_path / "bomb.pth", tmp_path / "executed"
    content = {"model.embed_tokens.weight": Bomb(target)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match="never executed") as error:
        load_model(path)
    check_sentence(error, path)
    assert not target.exists()
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())
    assert target.exists()  # it would have gone off


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.5, 0.9, 0.999, 0.9999])
def test_truncated_file_is_refused(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError) as error:
        load_model(saved)
    check_sentence(error, saved)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_truncated_file_of_the_older_format_is_refused_at_any_length(make_model, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(make_model().state_dict(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in range(200):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_state(path)


def test_older_format_of_torch_is_read(make_model, tmp_path):
    path, state = tmp_path / "x.pth", make_model().state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_state(path).items())


@pytest.mark.parametrize(("kind", "words"), [("missing", "does not exist"), ("folder", "folder")])
def test_no_file_is_refused(tmp_path, kind, words):
    path = tmp_path / "x.pth"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=words) as error:
        load_model(path)
    check_sentence(error, path)


def without(name):
    return lambda state: state.pop(name)


BAD_STATES = {
    "missing": (without("model.norm.weight"), "lacks model.norm.weight"),
    "missing_in_a_layer": (
        without("model.layers.0.mlp.up_proj.weight"),
        "lacks model.layers.0.mlp.up_proj.weight",
    ),
    "missing_embedding": (without("model.embed_tokens.weight"), "lacks model.embed_tokens.weight"),
    "unknown": (lambda state: state.update(extra=torch.ones(1)), "does not, extra"),
    "two_unknown": (
        lambda state: state.update(a=torch.ones(1), b=torch.ones(1)),
        "does not, a and 1 more",
    ),
    "wrong_shape": (
        lambda state: state.update({"model.norm.weight": torch.ones(7)}),
        r"model.norm.weight is \[7\] in the file and \[32\] in the model",
    ),
}


@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.parametrize(("change", "words"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_weight_too_few_too_many_or_of_another_shape_is_named(saved, change, words, with_json):
    state = torch.load(saved)
    change(state)
    torch.save(state, saved)
    if not with_json:
        saved.with_suffix(".json").unlink()
        words = words.replace("lacks model.embed", "model.embed")
    with pytest.raises(UserError, match=words) as error:
        load_model(saved)
    check_sentence(error, saved)


@pytest.mark.parametrize("shape", [(), (2, 64)])
def test_shapes_that_make_no_sense_are_refused(make_model, tmp_path, shape):
    state = make_model().state_dict()
    state["model.layers.0.self_attn.q_proj.weight"] = torch.ones(shape)
    with pytest.raises(UserError):
        load_model(bare(tmp_path / "x.pth", state))


def test_an_untied_head_is_refused_where_the_config_says_tied(saved):
    state = torch.load(saved)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, saved)
    with pytest.raises(UserError, match="lm_head.weight"):
        load_model(saved)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"config": 3}', '{"config": {"hidden_size": 30}}', b"\xff\xfe"],
)
def test_damaged_json_is_refused(saved, content):
    path = saved.with_suffix(".json")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load_model(saved)
    check_sentence(error, saved.with_suffix(""))

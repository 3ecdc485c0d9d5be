"""Folders and weight files of strangers: other types, absurd sizes, tensors that stand for more
than they hold, code."""

import json
import shutil
from contextlib import suppress
from functools import partial
from importlib import import_module

import pytest
import torch
from attacks import is_refused, some

from dataset.chat_template import time_limit
from dataset.encoding import encode_chat
from dataset.jsonl import error_at
from model import errors
from model.command_line import names_where, parse_arguments
from model.errors import UserError
from model.formats.lora_format import load_peft, read_lora
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model, load_tokenizer
from trainer.report.recipes import read_recipe, recipe_argv
from trainer.train_pretrain import Args

NUMBERS = [0, -1, 10**9, 10**18, 0.5, 1e300, float("nan")]
VALUES = [*NUMBERS, None, True, "x", "os.system", [], [6400], {}, {"a": 1}]
ABSURD = {"num_labels": 10**9, "attn_implementation": "a/b", "_attn_implementation": "a/b"}
ABSURD |= {"torch_dtype": "os.system", "dtype": "os.system", "auto_map": {"AutoConfig": "x.C"}}


def copied(tiny, tmp_path, name):
    target = tmp_path / name
    if not target.exists():
        (shutil.copytree if (tiny / name).is_dir() else shutil.copy)(tiny / name, target)
    return target


def test_configs(tiny, tmp_path):
    folder = copied(tiny, tmp_path, "hf")
    config = json.loads((folder / "config.json").read_text())
    native = MiniMindConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4).to_dict()
    cases = [
        (base, name, value)
        for base in (config, native | {"model_type": "minimind"})
        for name in [*base, *ABSURD]
        for value in [*VALUES, ABSURD.get(name)]
    ]
    for base, name, value in some(cases, 40) + [(config, *each) for each in ABSURD.items()]:
        (folder / "config.json").write_text(json.dumps(base | {name: value}))
        if said := is_refused(load_model, folder):
            assert str(folder) in said or "model" in said
    (folder / "config.json").write_text("[" * 100_000)
    assert "nested too deeply" in is_refused(load_model, folder)


def test_configs_beside_weights(tiny, tmp_path):
    path = copied(tiny, tmp_path, "m_32.pth")
    info = json.loads((tiny / "m_32.json").read_text())
    info.pop("checksum")
    full = MiniMindConfig(**info["config"])
    names = [name for name in MiniMindConfig.__annotations__ if hasattr(full, name)]
    for name, value in some([(name, value) for name in names for value in VALUES], 40):
        config = info["config"] | {name: value}
        path.with_suffix(".json").write_text(json.dumps(info | {"config": config}))
        is_refused(load_model, path)
    for content in ("", "[]", "{}", '{"config": 1}', "[" * 100_000, "\x00", '{"config": {}}'):
        path.with_suffix(".json").write_text(content)
        is_refused(load_model, path)


WEIGHTS = {
    "sparse": lambda w: w.to_sparse(),
    "quantised": lambda w: torch.quantize_per_tensor(w.float(), 0.1, 0, torch.qint8),
    "expanded": lambda w: torch.zeros(1).expand(10**6, 10**6),
    "meta": lambda w: w.to("meta"),
    "complex": lambda w: w.to(torch.complex64),
    "bool": lambda w: w.bool(),
    "scalar": lambda w: torch.tensor(1.0),
    "empty": lambda w: w[:0],
    "transposed": lambda w: w.t() if w.ndim == 2 else w,
    "nested": lambda w: torch.nested.nested_tensor([w.flatten(), w.flatten()[:3]]),
    "list": lambda w: [1, 2],
    "none": lambda w: None,
}


@pytest.mark.filterwarnings("ignore")
def test_weights(tiny, tmp_path):
    state = torch.load(tiny / "m_32.pth", weights_only=True)
    names = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    for name, (kind, change) in some([(n, c) for n in names for c in WEIGHTS.items()], 12):
        for beside in (True, False):
            path = tmp_path / f"m{beside}_32.pth"
            torch.save(state | {name: change(state[name])}, path)
            if beside:
                shutil.copy(tiny / "m_32.json", path.with_suffix(".json"))
            if not (kind == "transposed" and state[name].ndim == 1):
                assert path.name in is_refused(load_model, path), (kind, name)
    path = tmp_path / "more.pth"
    for more in ("model.layers.99999999.mlp.up_proj.weight", "x", "", "\ud800"):
        torch.save(state | {more: state[names[1]]}, path)
        assert "more.pth" in is_refused(load_model, path)
    for content in (torch.ones(3), [1], {"a": 1}, {1: torch.ones(1)}, None, {"model": {"x": 3}}):
        torch.save(content, path)
        assert "more.pth" in is_refused(load_model, path)
        is_refused(read_lora, path)
    adapter = {"model.layers.0.self_attn.q_proj.lora.A.weight": torch.zeros(1).expand(10**7, 10**6)}
    torch.save(adapter, path)
    assert "without numbers of its own" in is_refused(read_lora, path)


def test_peft_folders(tiny, tmp_path):
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1))
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    cases = [(name, value) for name in (*good, "use_rslora", "lora_dropout") for value in VALUES]
    for name, value in some(cases, 20):
        (tmp_path / "adapter_config.json").write_text(json.dumps(good | {name: value}))
        assert is_refused(load_peft, model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    assert is_refused(load_peft, model, tmp_path)


TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 2 ** 2 ** 40 }}",
    "raises": "{{ raise_exception('boom') }}",
    "undefined": "{{ undefined.x }}",
    "syntax": "{% if %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "attribute": "{{ messages.__class__.__mro__ }}",
    "number": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setattr("dataset.chat_template.MAX_SECONDS", 0.3)
    folder = copied(tiny, tmp_path, "hf")
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    tokenizer = load_tokenizer(folder)
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match=r"^line 1 of a.jsonl "), error_at("a.jsonl", 1):
        encode_chat(tokenizer, asked)


def test_the_limit_of_time_leaves_nothing_behind():
    with pytest.raises(TimeoutError), time_limit(0.05):
        while True:
            pass
    with time_limit(5):
        pass


def test_code_of_a_folder_never_runs_and_nothing_asks(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    folder, mark = copied(tiny, tmp_path, "hf"), tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\nclass C: pass\n"
    for name in ("evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (folder / name).write_text(code)
    for file in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / file).read_text())
        maps = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}
        maps |= {"AutoTokenizer": ["evil.C", None]}
        for more in ({}, {"model_type": "evil", "tokenizer_class": "Evil"}):
            (folder / file).write_text(json.dumps(content | {"auto_map": maps} | more))
            is_refused(load_tokenizer, folder)
            is_refused(load_model, folder)
        (folder / file).write_text(json.dumps(content))
    assert not mark.exists()


RECIPE = {
    "name": "r",
    "stage": "pretrain",
    "flags": {"data_path": ["a.jsonl"], "learning_rate": 0.1},
    "data": "x",
    "tolerance": 0.05,
    "records": [{"num_tokens": 1, "eval_bpb": 1.0}],
}


def test_recipes(tmp_path):
    path = tmp_path / "r.json"

    def follow(recipe):
        path.write_text(json.dumps(recipe))
        return recipe_argv(read_recipe(str(path)), Args)

    assert "--learning_rate=0.1" in follow(RECIPE)
    for name, value in (
        *(("save_dir", "/x"), ("checkpoint_dir", "/x"), ("save_weight", "../x"), ("resume", True)),
        *(("use_wandb", True), ("data_dir", "/x"), ("num_workers", 64), ("device", "cuda:3")),
    ):
        with pytest.raises(UserError, match=f"sets --{name}, which is for you to say"):
            follow(RECIPE | {"flags": {name: value}})
    for name in RECIPE:
        for value in VALUES:
            is_refused(partial(follow, RECIPE | {name: value}))
    for name in RECIPE["flags"]:
        for value in VALUES:
            is_refused(partial(follow, RECIPE | {"flags": RECIPE["flags"] | {name: value}}))
    for record in ([], {}, 3, {"eval_bpb": 1.0}, {"num_tokens": "x", "eval_bpb": 1}):
        is_refused(partial(follow, RECIPE | {"records": [record]}))


def test_a_recipe_of_rl_neither_trusts_code_nor_names_a_judge(tmp_path):
    from trainer.train_grpo import Args as GrpoArgs

    path = tmp_path / "r.json"
    for name, value in (
        ("trust_remote_code", True),
        ("judge_url", "http://x"),
        ("judge_model", "x"),
    ):
        path.write_text(json.dumps(RECIPE | {"stage": "grpo", "flags": {name: value}}))
        with pytest.raises(UserError, match=f"sets --{name}"):
            recipe_argv(read_recipe(str(path)), GrpoArgs)


@pytest.mark.parametrize("stage", ["pretrain", "grpo"])
def test_a_value_of_a_recipe_sets_no_other_flag(tmp_path, stage):
    args_class = import_module(f"trainer.train_{stage}").Args
    path, usual = tmp_path / "r.json", vars(args_class())
    for name in names_where(args_class, "recipe", True):
        value = usual[name]
        for hostile in (
            *("--save_dir=/x", ["--save_dir", "/x"], [value, "--save_dir", "/x"]),
            *("--trust_remote_code", [value, "--trust_remote_code=1"], [[value]], {"a": value}),
        ):
            path.write_text(json.dumps(RECIPE | {"stage": stage, "flags": {name: hostile}}))
            with suppress(UserError):
                args = parse_arguments(
                    args_class, None, recipe_argv(read_recipe(str(path)), args_class)
                )
                changed = {key for key, value in vars(args).items() if value != usual[key]}
                assert changed <= {name}, (name, hostile)


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setattr(errors, "show_tracebacks", True)
    with pytest.raises(SystemExit) as end, errors.exit_on_user_error(), errors.reading("a.json"):
        raise KeyError("inner")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "KeyError: 'inner'" in said and "Traceback" in said
    assert said.splitlines()[-1] == "error: a.json cannot be used: KeyError: 'inner'"

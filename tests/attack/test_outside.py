"""Names, downloads and tools: nothing is written elsewhere, nothing endless is worked out."""

import json
import time
from types import SimpleNamespace

import pytest
from attacks import is_refused
from toy import Trainer

from dataset.prepare import hub
from dataset.tools.call import call_tool
from model.command_line import parse_arguments
from model.errors import UserError
from model.paths import ROOT
from scripts.make_recipe import Args as RecipeArgs
from trainer import train_grpo, train_lora, train_pretrain

NAMES = [
    "../x",
    "a/b",
    "/x",
    "..",
    ".hidden",
    "a\\b",
    "a\0b",
    "a\nb",
    "\udcff",
    "x" * 300,
    "字" * 99,
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_names(name):
    for args_class, flag in (
        (train_pretrain.Args, "--save_weight"),
        (train_grpo.Args, "--save_weight"),
        (train_lora.Args, "--lora_name"),
        (RecipeArgs, "--name"),
    ):
        with pytest.raises(UserError, match=f"^{flag} "):
            parse_arguments(
                args_class, argv=[flag, name, "--run", "x"][: 4 if flag == "--name" else 2]
            )


def test_other_names_are_fine(tmp_path):
    for name in ("my model", "模型", "a.b-c_1"):
        assert (
            parse_arguments(train_pretrain.Args, argv=["--save_weight", name]).save_weight == name
        )
    Trainer(tmp_path)(save_weight="my model", max_steps=1)
    assert (tmp_path / "a" / "out" / "my model_32.pth").exists()


class Hub:
    """The answers of a hub, one of them."""

    def __init__(self, answer):
        self.endpoint, self.answer = "https://hub.example", answer

    def repo_info(self, *_, **__):
        return SimpleNamespace(sha="1" * 40, siblings=self.answer)


def file(rfilename, size=3, lfs=None, blob_id=""):
    return SimpleNamespace(rfilename=rfilename, size=size, lfs=lfs, blob_id=blob_id)


@pytest.mark.parametrize(
    "siblings",
    ["text", 3, ["a.jsonl"], [None], [file(3)], [file("a", "x")], [file("a", -1)], [{"a": 1}]],
)
def test_answers_of_no_hub(siblings):
    repo = hub.HuggingFaceRepo("a/b", "dataset", "", "")
    repo.api = Hub(siblings)
    assert "https://hub.example" in is_refused(repo.files) or "hub" in is_refused(repo.files)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("lm_dataset.py", ROOT / "dataset"),
        ("demo/texts/skills.jsonl", ROOT / "dataset"),
        ("tools/tasks.jsonl", ROOT / "dataset"),
        ("pyproject.json", ROOT / "model"),
        ("tokenizer.json", ROOT / "model"),
        ("config.json", ROOT / ".git"),
        ("README.md", ROOT),
        ("pre.py", ROOT / "elsewhere"),
        ("run.sh", ROOT / "elsewhere"),
        ("Makefile", ROOT),
        ("data.jsonl/x.so", ROOT / "out"),
    ],
)
@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_neither_code_nor_a_file_of_the_project_is_downloaded(name, folder, repo_type):
    with pytest.raises(UserError):
        hub.only_data([hub.Remote(name, 1)], repo_type, "a/b", True, folder)


def test_data_and_weights_are_downloaded():
    data = [hub.Remote("a.jsonl", 1), hub.Remote("x.py", 1), hub.Remote("b/c.parquet", 1)]
    kept = hub.only_data(data, "dataset", "a/b", False, ROOT / "dataset" / "hub" / "b")
    assert [each.name for each in kept] == ["a.jsonl", "b/c.parquet"]
    assert hub.only_data(data[:1], "dataset", "a/b", True, ROOT / "dataset") == data[:1]
    model = [hub.Remote("model.safetensors", 1), hub.Remote("modeling_x.py", 1)]
    assert hub.only_data(model, "model", "a/b", False, ROOT / "m") == model[:1]
    assert hub.only_data(model, "model", "a/b", False, ROOT / "m", code=True) == model


def test_a_download_never_leaves_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    repo = SimpleNamespace(repo="a/b", fetch=lambda *_: pytest.fail("it was fetched"))
    for name in ("../x.jsonl", "/tmp/x.jsonl", "a/../../x.jsonl", "link.jsonl"):
        with pytest.raises(UserError, match="outside"):
            hub.download(repo, hub.Remote(name, 1), tmp_path / "in")


LONG = "x" * 10_000_000
CALLS = [
    ("calculator", {"expression": "round(5, -1000000000)"}),
    ("calculator", {"expression": "round(5, 10**12)"}),
    ("calculator", {"expression": "9**9**9"}),
    ("calculator", {"expression": "1e308*10"}),
    ("calculator", {"expression": "(" * 150 + "1"}),
    ("convert_units", {"value": 1e308, "from_unit": "week", "to_unit": "second"}),
    ("convert_units", {"value": 1.7e308, "from_unit": "celsius", "to_unit": "fahrenheit"}),
    ("convert_units", {"value": 1, "from_unit": LONG, "to_unit": "m"}),
    ("dictionary", {"word": LONG}),
    ("weather", {"location": LONG}),
    (LONG, {}),
    ("calculator", "[" * 100_000),
    ("calculator", {"expression": 3}),
    ("calculator", {LONG: 3}),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_results_of_tools_are_short_json_at_once(number):
    started = time.monotonic()
    text = call_tool(*CALLS[number]).text
    assert time.monotonic() - started < 2
    assert len(text) < 200_000

    def refuse(constant):
        raise ValueError(constant)

    assert isinstance(json.loads(text, parse_constant=refuse), dict)
    text.encode()

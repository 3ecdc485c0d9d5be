"""What a run leaves to look at, and how it compares: the report, recipes, runs side by side."""

import json
import re
from pathlib import Path

import pytest
from toy import TEXTS, Trainer, flags, text_file

from dataset.demo.files import write_demo_data
from dataset.lm_dataset import load_documents
from model.command_line import parse_arguments
from model.errors import UserError
from model.weights import tokenizer_hash
from scripts import compare_runs, make_recipe
from trainer import train_full_sft, train_pretrain, trainer_utils
from trainer.report import pages, parts, plots, recipes
from trainer.report.log import read_log
from trainer.report.old_keys import with_new_keys
from trainer.report.recipe_comparison import RecipeComparison

pytestmark = pytest.mark.usefixtures("in_a_hurry")
COMMON = dict(max_steps=6, val_share=0.2, eval_interval=2)


@pytest.fixture
def page(monkeypatch):
    """write_report as it is, which in_a_hurry leaves out; then the page of a run."""
    monkeypatch.setattr(trainer_utils, "write_report", pages.write_report)

    def read(train: Trainer, name="a") -> str:
        (path,) = (train.folder / name / "out").rglob("*.report.html")
        return path.read_text(encoding="utf-8")

    return read


@pytest.fixture
def recipe(train, tmp_path) -> str:
    """The file of a recipe made from a run "baseline"."""
    train("baseline", **COMMON)
    return write_recipe(tmp_path, "baseline")


def write_recipe(folder: Path, run: str, **more) -> str:
    args = dict(name="toy", prepare="make toys", folder=str(folder / "recipes"), **more)
    return str(
        make_recipe.main(make_recipe.Args(run=str(folder / run / "out/pretrain_32"), **args))
    )


# -- the page --------------------------------------------------------------------------------------


def test_the_page_of_a_run_has_everything_inside(any_stage, page):
    Path(f"{any_stage.data}.manifest.json").write_text('{"steps": ["clean", "<dedup>"]}')
    any_stage(**COMMON)
    text = page(any_stage)
    outside = re.findall(r'<script|<link|<img|@import|url\((?!#)|(?:src|href)="(?!#)', text)
    assert not outside and "<!DOCTYPE" not in text.replace("<!doctype", "")
    kinds = {key for record in any_stage.log(kind="step") for key in record}
    titles = {"eval_bpb": "held-out text", "eval_accuracy": "eval accuracy"}
    titles |= {"eval_rewards/accuracies": "eval rewards/accuracies"}
    (held_out,) = {title for kind, title in titles.items() if kind in kinds}
    for title in ("training loss", held_out, "learning rate", "gradient norm"):
        assert title in text
    for title in ("speed", "memory"):
        assert f">{title}</text>" in text
    records = any_stage.log(kind="eval_bpb")
    for record in records:
        assert f"step {record['step']}\n{record['eval_bpb']:.3f} bpb" in text
    assert "data.jsonl" in text and any_stage.saved()["fingerprint"]["data"] in text
    assert f"--learning_rate</td><td>{any_stage.settings()['learning_rate']}" in text
    assert "how data.jsonl was made" in text and "&lt;dedup&gt;" in text
    assert len(text) < 300_000


def test_a_curve_has_a_point_for_each_record():
    svg = plots.curve_svg({"a": [(0, 1.0), (10, 0.5), (20, 0.7)], "recipe b": []}, "loss", "nats")
    (path,) = re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke: #3b82f6', svg)
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML] (\S+) (\S+)", path)]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x2 - x1 == pytest.approx(x1 - x0)
    assert y1 > y2 > y0  # y grows downwards
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.5 / 0.3, rel=1e-3)
    assert "currentColor" in svg and "#123456" not in svg


def test_what_a_model_writes_cannot_break_the_page():
    records = [{"step": 1, "num_tokens": 2, "sample": '<script>alert("x")</script>'}]
    assert "<script" not in pages.samples(records)
    assert "&lt;script&gt;" in pages.samples(records)


def test_a_run_that_was_killed_and_resumed_has_the_same_page(
    train, page, killed, recipe, monkeypatch
):
    def curve(lines, title, unit, from_zero, color):
        return "" if from_zero else f"{title} {lines}"  # speed and memory are never the same

    monkeypatch.setattr(parts, "curve_svg", curve)

    def stable(name: str) -> str:
        varies = r"<b>[^<]*</b><span>(training time|tokens per|peak memory)"
        text = re.sub(varies, "", page(train, name))
        return text.replace(f"/{name}/", "/")

    settings = COMMON | dict(save_interval=1, recipe=recipe)
    train("a", **settings)
    killed(3, train, "b", **settings)
    train("b", resume=True, **settings)
    assert "on track" in stable("a")
    assert stable("b") == stable("a")
    train("b", resume=True, **settings)  # it is finished already
    assert stable("b") == stable("a")


# -- recipes ---------------------------------------------------------------------------------------


def test_the_run_of_a_recipe_is_on_track(train, recipe, page, capsys):
    metrics = train(recipe=recipe, **COMMON)
    baseline = train.log("baseline", kind="eval_bpb")
    ours = [record for record in metrics["history"] if "eval_bpb" in record]
    assert [record["recipe_eval_bpb"] for record in ours] == [r["eval_bpb"] for r in baseline]
    assert "on track: " in capsys.readouterr().out
    assert 'class="status on-track"' in page(train) and "recipe toy" in page(train)


@pytest.mark.parametrize(("learning_rate", "word"), [(1e-6, "behind"), (2e-2, "ahead")])
def test_a_run_that_learns_less_or_more_is_not(train, recipe, page, capsys, learning_rate, word):
    train(recipe=recipe, **COMMON, learning_rate=learning_rate)
    printed = capsys.readouterr().out
    assert f"but with --learning_rate {learning_rate} instead of 0.001" in printed
    assert f"    {word}: " in printed
    assert f'class="status {word}"' in page(train)


def test_the_curve_of_a_recipe_is_interpolated_over_tokens():
    recipe = RecipeComparison.__new__(RecipeComparison)
    recipe.curve = [(100, 4.0), (200, 2.0), (300, 1.0)]
    values = [recipe.expected(tokens) for tokens in (50, 100, 150, 275, 300, 400)]
    assert values == [None, 4.0, 3.0, 1.25, 1.0, 1.0]


def test_flags_of_the_command_line_count_more(train, recipe, command, page):
    settings = train.settings()
    words = flags({name: settings[name] for name in ("save_dir", "checkpoint_dir", "device")})
    code, printed = command(
        train_pretrain, "--recipe", recipe, *words, "--seed", "7", "--num_workers", "0"
    )
    assert code == 0, printed.err
    args = json.loads((train.folder / "a/out/pretrain_32.json").read_text())["origin"]["args"]
    ours = json.loads((train.folder / "baseline/out/pretrain_32.json").read_text())
    theirs = ours["origin"]["args"]
    changed = {name for name in theirs if args[name] != theirs[name]}
    assert changed == {"seed", "recipe", "save_dir", "checkpoint_dir", "save_interval"}
    assert "--seed 7 instead of 42" in printed.out


def test_other_data_are_refused_or_not_compared(train, recipe, capsys):
    text_file(train.folder / "data.jsonl", TEXTS[:-1])
    with pytest.raises(UserError, match="recipe toy pins data .*`make toys` makes it"):
        train(recipe=recipe, **COMMON)
    other = text_file(train.folder / "other.jsonl", TEXTS[:-1])
    metrics = train(recipe=recipe, **COMMON, data_path=[other])
    assert "bits per byte of other data are not compared" in capsys.readouterr().out
    assert not any("recipe_eval_bpb" in record for record in metrics["history"])


@pytest.mark.parametrize(
    ("words", "stage", "told"),
    [
        (["--recipe", "none"], train_pretrain, "there is no recipe .*of these: .*demo_pretrain"),
        (
            ["--recipe", "demo_full_sft"],
            train_pretrain,
            "for a trainer of full_sft: .*--sample_prompt",
        ),
    ],
)
def test_mistakes_with_recipes(words, stage, told):
    with pytest.raises(UserError, match=told):
        recipes.with_recipe([*words, "--data_path", "x"], stage.Args)


def test_a_recipe_needs_its_data(recipe, train):
    Path(train.data).unlink()
    with pytest.raises(UserError, match="needs the data file .*data.jsonl; `make toys` makes it"):
        recipes.with_recipe(["--recipe", recipe], train_pretrain.Args)


def test_a_recipe_needs_a_run_that_was_evaluated(train, tmp_path):
    train("a", max_steps=2)
    with pytest.raises(UserError, match="has no evaluation on held-out data"):
        write_recipe(tmp_path, "a")
    with pytest.raises(UserError, match="b/out/pretrain_32.metrics.jsonl cannot be read: No such"):
        write_recipe(tmp_path, "b")


@pytest.mark.slow
def test_the_recipes_of_the_project_fit_its_demo_data(tmp_path, tokenizer):
    """If this fails after a change of the demo data: make the recipes anew (benchmarks/README)."""
    write_demo_data(tmp_path)
    stages = {"pretrain": (train_pretrain, "text"), "full_sft": (train_full_sft, "conversations")}
    names = [path.stem for path in recipes.RECIPES.glob("*.json")]
    assert {"demo_pretrain", "demo_full_sft"} <= set(names)
    for name in names:
        made = recipes.read_recipe(name)
        stage, kind = stages[made["stage"]]
        args = parse_arguments(stage.Args, argv=recipes.recipe_argv(made, stage.Args))
        for paths, pinned in ((args.data_path, "data"), (args.val_path, "held_out")):
            files = [tmp_path / Path(path).name for path in paths]
            found = load_documents(files, kind, tokenizer).info.description
            assert found == made[pinned], f"{name}: {pinned}"
        assert made["tokenizer"] == tokenizer_hash(tokenizer)
        assert made["records"][-1]["step"] == args.max_steps


def test_an_old_recipe_is_read_with_the_names_of_today(tmp_path, recipe):
    new = json.loads(Path(recipe).read_text())
    old = {name: value for name, value in new.items() if name != "tolerance"}
    names = {"learning_rate": "lr", "num_tokens": "tokens", "eval_loss": "val_loss"}
    names |= {"eval_bpb": "val_bpb", "changed_fraction": "changed_share"}
    old["records"] = [{names.get(k, k): v for k, v in r.items()} for r in new["records"]]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old | {"band": new["tolerance"]}))
    assert recipes.read_recipe(str(path)) == recipes.read_recipe(recipe)


def test_old_keys_of_each_stage_have_a_name_of_today():
    old = {"step": 1, "accuracy": 0.5, "val_margin": 2.0, "val_finished": 0.75, "reward_answer": 1}
    (dpo,) = with_new_keys([old], "lora/dpo")
    assert dpo["rewards/accuracies"] == 0.5 and dpo["eval_rewards/margins"] == 2.0
    assert dpo["eval_completions/clipped_ratio"] == 0.25 and dpo["rewards/answer/mean"] == 1
    (reward,) = with_new_keys([old], "reward")
    assert reward["accuracy"] == 0.5 and reward["eval_margin"] == 2.0
    assert with_new_keys([{"value": 1.0}], "ppo") == [{"critic_value": 1.0}]


# -- runs side by side -----------------------------------------------------------------------------


def test_runs_side_by_side(train, tmp_path, capsys, recipe):
    train("a", **COMMON)
    train("b", **COMMON, learning_rate=2e-3)
    runs = [str(tmp_path / name / "out/pretrain_32") for name in "ab"]
    args = compare_runs.Args(runs=runs, recipe=[recipe], output=str(tmp_path / "c.html"))
    rows = compare_runs.main(args)
    for row, name in zip(rows, ("a", "b", "baseline"), strict=True):
        assert row[-1] == f"{train.log(name, kind='eval_bpb')[-1]['eval_bpb']:.4f}"
        assert row[-2] == f"{train.log(name)[-1]['loss']:.4f}"
        assert row[2] == "6"
    assert rows[0][-2:] == rows[2][-2:] != rows[1][-2:]
    text = (tmp_path / "c.html").read_text()
    assert "--learning_rate</td><td>0.001</td><td>0.002</td><td>0.001" in text
    assert "--batch_size" not in text and "a/out/pretrain_32" in text


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", "run.metrics.jsonl is empty"),
        ('{"step": 1}\n{"step": 2, "lo\n', "line 2 of .*run.metrics.jsonl is not JSON"),
        ('{"step": 1}\n{"text": "a"}\n', "line 2 of .* has no step: this is not a training log"),
    ],
)
def test_a_file_that_is_no_log(tmp_path, lines, told):
    path = tmp_path / "run.metrics.jsonl"
    path.write_text(lines)
    with pytest.raises(UserError, match=told):
        read_log(path, "pretrain")


def test_mistakes_in_comparing(tmp_path):
    with pytest.raises(UserError, match="--runs needs the runs to compare"):
        compare_runs.Args()
    with pytest.raises(UserError, match="x.metrics.jsonl cannot be read: No such file"):
        compare_runs.main(compare_runs.Args(runs=[str(tmp_path / "x")]))
    with pytest.raises(UserError, match="the same run twice"):
        compare_runs.short_names(["out/a", "out/a.pth"])

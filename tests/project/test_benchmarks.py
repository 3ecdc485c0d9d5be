"""What the benchmarks compute besides running things."""

import json
import math
import subprocess

import checksum_cost
import empty_thoughts
import memory
import numpy as np
import pytest
import same_numbers
import speedrun
import stage_distillation
import stages
from peers import peer_of
from toy import CHATS, TEXTS, chat_file, saved_teacher, text_file

from dataset.lm_dataset import load_documents
from dataset.packing import PackedDataset
from model.command_line import parse_arguments
from model.errors import UserError
from model.inference.generation import generate
from model.inference.sampling import SamplingParams
from model.losses import IGNORE_INDEX
from model.weights import load_tokenizer
from trainer.common.arguments import TrainArgs
from trainer.common.context import Context
from trainer.common.evaluation import evaluate_loss


@pytest.mark.parametrize(
    ("value", "seconds"), [(4.0, 0.0), (3.5, 5.0), (3.0, 10.0), (2.25, 25.0), (2.0, 30.0)]
)
def test_when_a_curve_reaches_a_value(value, seconds):
    curve = [(0.0, 4.0), (10.0, 3.0), (20.0, 2.5), (30.0, 2.0)]
    assert speedrun.time_to_reach(curve, value) == pytest.approx(seconds)


def test_a_curve_that_never_passes():
    with pytest.raises(ValueError, match="ends at 3.0, above 2"):
        speedrun.time_to_reach([(0.0, 4.0), (10.0, 3.0)], 2.0)


def test_the_plain_way_has_a_document_a_row(tmp_path):
    texts = [*TEXTS[:5], "one " * 900]
    documents = load_documents(text_file(tmp_path / "a.jsonl", texts), "text", load_tokenizer())
    lengths = sorted(map(len, documents["input_ids"]))
    assert lengths[-1] > 512
    batches = speedrun.padded_batches(documents, 4, seed=0)
    for _ in range(2):  # epochs
        first, rest = next(batches), next(batches)
        assert (first[0].shape, rest[0].shape) == ((4, 512), (2, 512))
        real = [row for ids, _ in (first, rest) for row in (ids != 0).sum(1).tolist()]
        assert sorted(real) == [*lengths[:-1], 512]
        for ids, labels in (first, rest):
            kept = labels != IGNORE_INDEX
            assert np.array_equal(labels[kept], ids[kept])
            assert kept.sum() == (ids != 0).sum()


def test_as_many_steps_as_fit_the_time():
    recipe = speedrun.Recipe.__new__(speedrun.Recipe)
    recipe.args = speedrun.Args(
        "pretrain", "a", "b", recipe="--batch_ramp 100 --batch_size 4 --accumulation_steps 2"
    )
    recipe.trainer = speedrun.train_pretrain
    recipe.tokens_per_row = 512
    recipe.fixed, recipe.per_row = 0.5, 0.25
    assert recipe.steps_within(0.9) == 0
    assert recipe.steps_within(10) == 10  # steps of 2 rows, a second each
    steps, trained, seconds = 0, 0, 0.0
    while (seconds := seconds + 0.5 + 0.25 * min(8, max(2, trained // 200 * 2))) <= 2000:
        trained += min(8, max(2, trained // 200 * 2))
        steps += 1
    assert recipe.steps_within(2000) == steps
    assert math.isclose(trained / steps, 7, abs_tol=1)


@pytest.mark.parametrize("stage", ["pretrain", "full_sft"])
def test_a_race_from_end_to_end(tmp_path, stage):
    write, examples = {"pretrain": (text_file, TEXTS), "full_sft": (chat_file, CHATS)}[stage]
    data = write(tmp_path / "data.jsonl", examples[4:])
    held_out = write(tmp_path / "val.jsonl", examples[:4])
    args = speedrun.Args(
        stage,
        data,
        held_out,
        from_weight=saved_teacher(tmp_path) if stage == "full_sft" else "",
        size="48x2",
        baseline_minutes=0.005,
        baseline_lrs=[5e-4],
        budgets=[0.2, 2.0],
        minutes=0.02,
        plot=str(tmp_path / "plot.png"),
        json=str(tmp_path / "report.json"),
    )
    report = speedrun.main(args)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plain, *recipes = report["curves"].values()
    target = report["baseline_bpb" if stage == "pretrain" else "baseline_loss"]
    assert plain[-1][1] == target and len(recipes) == 2
    assert recipes[0][-1][1] <= target
    assert 0 <= report["seconds_to_baseline"] <= recipes[0][-1][0]


@pytest.mark.parametrize("stage", ["pretrain", "full_sft"])
def test_both_sides_of_a_race_are_measured_alike(tmp_path, tokenizer, make_model, stage):
    write, examples = {"pretrain": (text_file, TEXTS), "full_sft": (chat_file, CHATS)}[stage]
    held_out = write(tmp_path / "val.jsonl", examples)
    args = speedrun.Args(stage, held_out, held_out, from_weight="some.pth")
    model = make_model(vocab_size=6400)
    peer = peer_of(model.config, use_cache=False)
    peer.load_state_dict(model.state_dict())
    plain = speedrun.make_evaluate(args)(peer.eval())

    _, kind, metric, _ = speedrun.STAGES[stage]
    ctx = Context.create(TrainArgs(device="cpu"))
    rows = PackedDataset(load_documents(held_out, kind, tokenizer), 512)
    assert evaluate_loss(ctx, model, tokenizer, rows)[f"eval_{metric}"] == pytest.approx(
        plain, rel=1e-4
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(size="256"), "such as 768x16"),
        (dict(data_path=""), "--data_path is required"),
        (dict(stage="full_sft"), "--from_weight"),
    ],
)
def test_a_race_that_cannot_be_run(wrong, said):
    with pytest.raises(UserError, match=said):
        flags = {"data_path": "a.jsonl", "val_path": "b.jsonl", **wrong}
        parse_arguments(speedrun.Args, argv=[f"--{name}={value}" for name, value in flags.items()])


@pytest.mark.slow
def test_empty_thoughts_from_end_to_end(tmp_path):
    args = empty_thoughts.Args(
        ratios=[1.0], rows=60, questions=6, epochs=1, hidden_size=16, output=str(tmp_path)
    )
    report = empty_thoughts.main(args)
    closed, opened = (report[f"ratio 1, open_thinking {n}"] for n in (0, 1))
    assert closed["closes"] and not opened["closes"]
    assert all(0 <= value <= 1 for value in closed.values())


def test_the_cost_of_checksums_from_end_to_end(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(checksum_cost, "verify", lambda path, advice: checked.append(path.name))
    args = checksum_cost.Args(size="16x1", tokens=1000, rounds=3, folder=str(tmp_path))
    files = checksum_cost.main(args)["files"]
    assert [each["file"] for each in files] == ["weights", "checkpoint", "token cache"]
    assert all(each[kind] > 0 for each in files for kind in ("warm", "cold_checked"))
    assert checked == ["weights.pth"] * 6 + ["run.pt"] * 6 + ["cache.arrow"] * 6
    assert not list(tmp_path.iterdir())


def test_better_by_more_than_two_standard_errors():
    """Losses fall by 0.1, 0.2, 0.3, and accuracies rise by 0, 0.1, 0.02: 0.04 ± 0.031."""
    rows = [
        dict(metric=metric, before=0.5, after=0.5 + gain)
        for metric, gains in (
            ("held_out_loss", (-0.1, -0.2, -0.3)),
            ("skill_accuracy", (0.0, 0.1, 0.02)),
        )
        for gain in gains
    ]
    loss, accuracy = stage_distillation.mean_gains(rows)
    assert (loss["gain"], loss["error"]) == pytest.approx((0.2, 0.1 / math.sqrt(3)))
    assert loss["met"] and loss["after"] == pytest.approx(0.3)
    assert accuracy["error"] == pytest.approx(0.030551, abs=1e-6) and not accuracy["met"]


def test_the_peer_in_llama_cpp_decodes_rows_of_any_length(make_model):
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    from llama_cpp_peer import LlamaCpp

    model = make_model(vocab_size=6400)
    prompts = [[5, 6, 7], [8], list(range(20, 40))]
    expected = generate(model, prompts, SamplingParams(12, temperature=0, stop_ids=()))
    peer = LlamaCpp(model, "float32", rows=3, context=32, threads=1)
    for _ in range(2):  # nothing is left of the first time
        assert peer.generate(prompts, 12) == expected


def test_rows_of_a_stage_have_its_targets():
    before = {"skill_accuracy": 0.5}
    after = {"preference_accuracy": 0.9, "skill_accuracy": 0.46, "seconds": 3.0}
    level, gain = stages.target_rows("dpo", 42, before, after)
    assert (level["metric"], level["target"], level["met"]) == ("preference_accuracy", 0.85, True)
    assert (gain["metric"], gain["target"], gain["met"]) == ("skill_accuracy", 0.47, False)
    assert gain["details"] == {"preference_accuracy": 0.9, "seconds": 3.0}


def test_what_fits_grows_with_memory_and_shrinks_with_the_model():
    rows = {(row["model"], row["stage"]): row for row in memory.fitting()}
    for stage in memory.CASES:
        small, large = rows["26M", stage], rows["104M", stage]
        for tokens in (512, 1024):
            assert small[f"24 GB, {tokens}"] > large[f"24 GB, {tokens}"] > large[f"8 GB, {tokens}"]
    assert rows["26M", "sft"]["24 GB, 512"] // 2 == rows["26M", "dpo"]["24 GB, 512"]


RESULT = {
    "records": [
        {"step": 1, "loss": 2.5, "grad_norm": 1.0, "seconds": 0.1},
        {"step": 2, "val_loss": 2.25, "seconds": 0.2},
    ],
    "weights": {"pretrain_32.pth: norm": "a"},
    "float32 weights": {"norm": "b"},
    "optimizer's state": ["c", "d"],
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda result: result["records"][0].update(seconds=9.0, more=1), ""),
        (lambda result: result["records"][0].update(loss=2.6), "step 1: loss 2.5 → 2.6"),
        (lambda result: result["records"][0].pop("grad_norm"), "step 1: grad_norm 1.0 → none"),
        (lambda result: result["records"][1].update(val_loss=None), "step 2: val_loss 2.25 → None"),
        (lambda result: result["records"].pop(), "lines of the log: 2 → 1"),
        (lambda result: result["weights"].update({"pretrain_32.pth: norm": "x"}), "weights at"),
        (lambda result: result["float32 weights"].update(norm="x"), "float32 weights at"),
        (lambda result: result["optimizer's state"].pop(), "optimizer's state at"),
        (lambda result: result.update(failure="exit code 1"), "after: exit code 1"),
    ],
)
def test_a_changed_number_is_noticed(change, expected):
    after = json.loads(json.dumps(RESULT))
    change(after)
    told = same_numbers.difference(RESULT, after)
    assert told.startswith(expected) and bool(told) == bool(expected)


def test_a_metric_may_have_a_new_name(monkeypatch):
    after = json.loads(json.dumps(RESULT))
    after["records"][1]["eval_loss"] = after["records"][1].pop("val_loss")
    monkeypatch.setitem(same_numbers.RENAMED, "val_loss", "eval_loss")
    assert same_numbers.difference(RESULT, after) == ""
    after["records"][1]["eval_loss"] = 2.0
    assert same_numbers.difference(RESULT, after) == "step 2: val_loss 2.25 → 2.0"


@pytest.mark.slow
def test_another_seed_is_noticed_and_a_resumed_run_does_not_depend_on_it(tmp_path):
    try:
        same_numbers.hash_of_commit("HEAD")
    except (OSError, UserError) as reason:
        pytest.skip(f"this needs the project's git repository: {reason}")
    changed = same_numbers.copy_commit("HEAD", tmp_path / "changed")
    subprocess.run(["git", "init", "-q", changed], check=True)
    with open(changed / "model" / "__init__.py", "a") as file:
        file.write("\nimport torch\nseed = torch.manual_seed\n")
        file.write("torch.manual_seed = lambda number: seed(number + 1)\n")
    places = dict(keep=str(tmp_path / "runs"), cache=str(tmp_path / "cache"))
    args = same_numbers.Args("HEAD", str(changed), ["pretrain"], **places)
    told = same_numbers.main(args)
    assert told.pop("pretrain, resumed") == ""
    assert len(told) == 5 and all(each.startswith("step 1: loss ") for each in told.values())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(before=""), "--before is missing"),
        (dict(before="no_such_commit"), "no commit no_such_commit is found"),
        (dict(stage=["sft"]), "--stage sft is unknown; there are pretrain, full_sft"),
        (dict(keep="."), "exists already"),
    ],
)
def test_versions_that_cannot_be_compared(wrong, said):
    with pytest.raises(UserError, match=said):
        same_numbers.main(same_numbers.Args(**{"before": "HEAD", **wrong}))

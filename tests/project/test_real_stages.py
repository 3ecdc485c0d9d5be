"""benchmarks/real_stages.py: its splits, metrics and verdicts, and all of it on a few rows."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import real_stages
from later_stages import data, metrics, report
from later_stages.stages import STAGES
from later_stages.world import Job, changed_defaults, defaults_of
from toy import saved_teacher

from dataset.jsonl import load_rows, write_rows
from model.errors import UserError
from model.weights import load_model, load_tokenizer, write_json


def chat(question: str, answer: str) -> list[dict]:
    roles = ("user", "assistant")
    return [
        dict(role=role, content=text) for role, text in zip(roles, (question, answer), strict=True)
    ]


TOOLS = json.dumps([{"name": "add", "parameters": {"type": "object", "properties": {}}}])
CALLING = [
    {"role": "system", "content": "", "tools": TOOLS},
    *chat("hello", "How may I help?"),
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": '[{"name": "add", "arguments": {"a": 1}}]'},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


@pytest.fixture
def files(tmp_path) -> Path:
    """A few rows of each file that the benchmark reads."""
    folder = tmp_path / "data"
    folder.mkdir()
    chats = [{"conversations": chat(f"What is {n}?", f"{n} " * (1 + n % 9))} for n in range(40)]
    tools = [
        {"conversations": [*CALLING[:1], *chat(f"{n}?", "so"), *CALLING[3:]]} for n in range(10)
    ]
    pairs = [
        {"chosen": chat(f"{n}?", f"{n} yes"), "rejected": chat(f"{n}?", "no " * (n % 4 + 1))}
        for n in range(20)
    ]
    thoughts = "<think>\n{0}\n</think>\n<answer>\n{0}\n</answer>"
    reasoning = [{"conversations": chat(f"{n}?", thoughts.format(n))} for n in range(12)]
    rows = {
        **{
            "sft": chats + tools,
            "sft_val": chats[:5],
            "dpo": pairs + pairs[:3],
            "dpo_val": pairs[:1],
        },
        **{"rlaif": chats[:20], "r1_mix_1024": reasoning[2:], "r1_mix_1024_val": reasoning[:2]},
        **{"lora_medical": chats[10:], "lora_medical_val": chats[10:12]},
    }
    for name, content in rows.items():
        write_rows(folder / f"{name}.jsonl", content)
    return folder


def test_nothing_that_is_held_out_is_trained_on(files, tmp_path):
    out = tmp_path / "splits"
    data.write_splits(files, out, held_out=6)

    def asked(name: str) -> set[str]:
        return set(map(data.question_of, load_rows(out / f"{name}.jsonl")))

    held = [asked(f"pairs_held_{n}") for n in range(data.FOLDS)]
    for n, fold in enumerate(held):
        assert not fold & asked(f"pairs_train_{n}")
        assert fold | asked(f"pairs_train_{n}") == set().union(*held)
    assert sum(len(load_rows(out / f"pairs_held_{n}.jsonl")) for n in range(data.FOLDS)) == 24
    assert [len(load_rows(out / f"pairs_half_{half}.jsonl")) for half in "ab"] == [12, 12]
    assert not asked("pairs_half_a") & asked("pairs_half_b")
    for name in ("prompts", "answers", "medical", "reasoning"):
        assert len(load_rows(out / f"{name}_held.jsonl")) == 6
        assert not asked(f"{name}_held") & asked(f"{name}_train")
    assert {len(row["answer"]) <= 16 for row in load_rows(out / "answers_train.jsonl")} == {True}
    assert sum(len(load_rows(out / f"tools_held_{n}.jsonl")) for n in range(data.FOLDS)) == 10


def test_the_error_of_a_loss_counts_documents_and_not_tokens():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 30, 500).astype(float)
    totals = counts * (2 + rng.normal(0, 0.5, 500))  # each document has its own mean
    ratio, error = metrics.ratio_and_se(totals, counts)
    resampled = []
    for _ in range(2000):
        rows = rng.integers(500, size=500)
        resampled.append(totals[rows].sum() / counts[rows].sum())
    assert ratio == pytest.approx(totals.sum() / counts.sum())
    assert error == pytest.approx(np.std(resampled), rel=0.1)
    assert error > 3 * 0.5 / math.sqrt(counts.sum()) / 2  # what independent tokens would have


def test_pairs_of_all_folds_count_as_one_sample():
    values, lengths = (
        np.array([[2.0, 1], [0, 1], [3, 0], [1, 1]]),
        np.array([[5, 4], [2, 9], [3, 3], [7, 1]]),
    )
    one = metrics.pair_metrics(values, lengths) | {"loss_sum": 2.0}
    assert (one["pairs"], one["right"], one["right_by_length"]) == (4, 2, 2.5)
    both = report.combine([one, {**one, "right": 4}])
    assert both["accuracy"] == 6 / 8 and both["loss"] == 0.5
    assert both["accuracy_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 8))
    assert both["accuracy_sigmas"] == pytest.approx(0.25 / math.sqrt(0.75 * 0.25 / 8))
    assert both["accuracy_by_length"] == 2.5 / 4
    assert both["accuracy_sd_of_folds"] == pytest.approx(np.std([0.5, 1.0], ddof=1))


def test_the_error_over_seeds_does_not_hide_that_of_the_held_out_data():
    seeds = [{"gain": 1.0, "gain_se": 0.3}, {"gain": 1.4, "gain_se": 0.3}]
    found = report.combine(seeds)
    assert found["gain"] == pytest.approx(1.2)
    assert found["gain_se"] == pytest.approx(math.sqrt(0.3**2 + 0.08 / 2))
    assert found["gain_sigmas"] == pytest.approx(1.2 / found["gain_se"])


def test_a_target_is_met_or_not():
    rows = report.judge("dpo", {"accuracy": 0.61, "accuracy_se": 0.02, "chats_change": 0.03})
    assert [row["met"] for row in rows] == [True, False, False]
    assert rows[0]["se"] == 0.02 and rows[1]["value"] is None and rows[2]["target"] == "<= 0.02"


def test_answers_that_become_all_the_same_are_seen_as_a_collapse():
    rng = np.random.default_rng(0)
    before = [rng.integers(100, size=10).tolist() for _ in range(50)]
    found = metrics.collapse_metrics(before, [list(range(5))] * 50)
    assert (found["length_ratio"], found["length_fold"]) == (0.5, 2)
    assert found["distinct_ratio"] == pytest.approx(1, abs=0.01)  # each answer alone is varied
    assert found["distinct_overall_ratio"] < 0.1


def test_a_reward_for_length_alone_is_no_gain_at_equal_length():
    rng = np.random.default_rng(0)
    lengths = [rng.integers(10, 60, 200), rng.integers(40, 128, 200)]
    rewards = [0.02 * each for each in lengths]
    assert np.mean(rewards[1]) > np.mean(rewards[0]) + 0.5
    assert metrics.gain_at_length(rewards, lengths) == pytest.approx(0, abs=1e-9)
    rewards[1] = rewards[1] + 0.3
    assert metrics.gain_at_length(rewards, lengths) == pytest.approx(0.3)


REPLY = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (REPLY, ["well_formed", "right_name", "right_arguments", "right_seen_name"]),
        (REPLY.replace("1", "2"), ["well_formed", "right_name", "right_seen_name"]),
        (REPLY.replace("add", "sub"), ["well_formed"]),
        (REPLY.replace("}}", "}"), []),
        (REPLY.replace("<|im_end|>", ""), []),
    ],
)
def test_calls_are_compared_with_those_of_the_data(tmp_path, monkeypatch, make_model, reply, right):
    path = tmp_path / "tools.jsonl"
    write_rows(path, [{"conversations": CALLING}])
    tokenizer = load_tokenizer()
    said = {"hello": "Hi.<|im_end|>", "1 + 2?": reply}

    def generate(model, prompts, sampling):
        texts = [tokenizer.decode(ids) for ids in prompts]
        asked = [text.split("user\n")[-1].split("<")[0] for text in texts]
        return [tokenizer.encode(said[each], add_special_tokens=False) for each in asked]

    monkeypatch.setattr(metrics, "generate", generate)
    found = metrics.tool_metrics(make_model(vocab_size=6400), path, path)
    expected = dict.fromkeys(metrics.TOOL_COUNTS, 0) | dict.fromkeys(right, 1)
    assert found == expected | {"calls": 1, "seen_name": 1, "other_turns": 1}


def test_names_of_results_tell_settings_apart():
    jobs = [Job("dpo", 0, "--beta 0.1"), Job("dpo", 0, scale=0.5), Job("dpo", 0, most_steps=2)]
    assert [job.name for job in jobs] == ["dpo_beta_0.1_0", "dpo_0_x0.5", "dpo_0_max2"]


def test_a_changed_default_is_found_and_a_new_or_lost_flag_is_not():
    then = defaults_of("dpo", "lora")
    assert changed_defaults(then) == []
    now = then["dpo.learning_rate"]
    assert changed_defaults({**then, "dpo.gone": 1, "dpo.learning_rate": 0.5}) == [
        f"dpo.learning_rate 0.5 -> {now}"
    ]


@pytest.mark.slow
def test_stages_from_end_to_end(tmp_path, files, monkeypatch):
    """Trained, measured, reported; a second call finds all of it, and refuses another base."""
    few = dict(held_out=4, folds=2, max_steps=1, student="32x2", output=str(tmp_path / "out"))
    args = real_stages.Args(str(files), saved_teacher(tmp_path), **few)
    args.stage = ["dpo", "grpo", "spo_rule", "lora", "distillation", "reason", "tools"]
    made = real_stages.main(args)
    assert {row["stage"]: row["parts"] for row in made["rows"]} == {
        **dict.fromkeys(("dpo", "tools"), [0, 1]),
        **dict.fromkeys(("grpo", "spo_rule", "lora", "distillation", "reason"), [42]),
    }
    for row in made["rows"]:
        assert [each["metric"] for each in row["targets"]] == list(STAGES[row["stage"]].targets)
    assert made["judges"]["a"]["pairs"] + made["judges"]["b"]["pairs"] == 24
    report_file = tmp_path / "out" / "report.json"
    assert json.loads(report_file.read_text(), parse_constant=pytest.fail) == made
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").glob("**/checkpoints/dpo_*"))

    monkeypatch.setattr(real_stages, "run", lambda *_: pytest.fail("trained once more"))
    assert real_stages.main(args)["rows"] == made["rows"]
    path = tmp_path / "out" / "results" / "dpo_0_max1.json"
    result = json.loads(path.read_text())
    write_json(path, {**result, "defaults": {**result["defaults"], "dpo.beta": 7.0}})
    with pytest.raises(pytest.fail.Exception, match="trained once more"):
        real_stages.main(args)
    args.base = saved_teacher(tmp_path, "other", seed=2)
    with pytest.raises(UserError, match="results of another base"):
        real_stages.main(args)


@pytest.mark.slow
def test_the_base_is_made_once(tmp_path, files, monkeypatch):
    texts = [{"text": f"one two {n}"} for n in range(20)]
    write_rows(files / "pretrain.jsonl", texts)
    monkeypatch.setattr(real_stages, "BASE_SIZE", "32x2")
    few = dict(stage=["tools"], folds=1, held_out=2, max_steps=1, output=str(tmp_path / "out"))
    made = real_stages.main(real_stages.Args(str(files), **few))
    base = tmp_path / "out" / "base" / "full_sft_32.pth"
    assert made["base"]["parameters"] == sum(each.numel() for each in load_model(base).parameters())
    before = base.stat().st_mtime_ns
    assert real_stages.main(real_stages.Args(str(files), **few))["rows"] == made["rows"]
    assert base.stat().st_mtime_ns == before


def test_a_policy_does_not_differ_from_itself(tmp_path, files):
    data.write_splits(files, tmp_path / "splits", held_out=6)
    model = load_model(saved_teacher(tmp_path))
    held = str(tmp_path / "splits" / "answers_held.jsonl")
    flags = dict(data_path=[held], reward=["similarity"], max_gen_len=8, save_dir=str(tmp_path))
    same = metrics.Policies(model, flags).compare(model)
    assert same["kl"] == pytest.approx(0, abs=1e-5) and same["length_ratio"] == 1
    assert same["gain_sd"] == 0 and same["prompts"] == 6


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(stage=["sft"]), "--stage: sft is unknown; known are reward, dpo"),
        (dict(student="3M"), "such as 160x4, not 3M"),
        (dict(data_dir="nowhere"), "--data_dir nowhere lacks sft.jsonl or sft.jsonl.gz"),
    ],
)
def test_what_cannot_be_run_is_told(tmp_path, wrong, said):
    with pytest.raises(UserError, match=said):
        real_stages.main(real_stages.Args(**{"output": str(tmp_path), **wrong}))

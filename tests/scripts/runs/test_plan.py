"""What a whole run is going to do: its stages, their order, time, data and money."""

import gzip
import json
from types import SimpleNamespace

import pytest

from dataset import released
from model.command_line import rules_of
from model.errors import UserError
from scripts.runs import cut_data, estimates, plan, stages
from scripts.runs.estimates import DataFile, Estimate, MachineSpeed, measure_file
from scripts.runs.plan import Args, cut_files, divide
from scripts.runs.stages import flags_of, in_hours, in_order, is_finished

FAST = MachineSpeed(train=1e6, step=0.01, decode=1e5, tokenize=1e7)
SLOW = MachineSpeed(train=20.0, step=1.0, decode=10.0, tokenize=1e7)


def estimate(seconds: float) -> Estimate:
    return Estimate("a.jsonl", 0, tokens=1000.0, seconds=seconds, memory=1, disk=1)


# -- stages ----------------------------------------------------------------------------------------


def test_stages_run_in_their_order_whatever_order_they_are_asked_for(tmp_path):
    assert in_order(["dpo", "full_sft", "pretrain"], tmp_path) == ["pretrain", "full_sft", "dpo"]


def test_reinforcement_learning_brings_its_reward_model(tmp_path):
    asked = ["pretrain", "full_sft", "dpo", "grpo"]
    assert in_order(asked, tmp_path) == ["pretrain", "full_sft", "dpo", "reward", "grpo"]


def test_a_stage_needs_the_one_that_it_starts_from(tmp_path, finish):
    with pytest.raises(UserError, match="full_sft starts from pretrain, which is not in STAGES"):
        in_order(["full_sft"], tmp_path)
    assert in_order(["full_sft"], finish("pretrain")) == ["full_sft"]


def test_a_mistyped_stage(tmp_path):
    with pytest.raises(UserError, match="STAGES has no stage full_stf.*did you mean full_sft"):
        in_order(["full_stf"], tmp_path)


def test_a_stage_is_finished_when_its_trainer_came_to_its_end(finish):
    folder = finish("pretrain")
    finish("full_sft", last="loss")  # stopped: the last line is one of training
    assert is_finished("pretrain", folder) and not is_finished("full_sft", folder)
    assert not is_finished("dpo", folder)


def test_what_is_left_to_do(finish, planned):
    folder = planned(finish("pretrain"), ["pretrain", "full_sft", "dpo"])
    assert flags_of("pretrain", folder) == ""  # finished
    assert flags_of("grpo", folder) == ""  # not wanted
    assert flags_of("full_sft", folder).startswith("--minutes 4.5 ")
    with pytest.raises(UserError, match="full_sft was stopped before its end"):
        flags_of("dpo", folder)
    finish("full_sft")
    assert flags_of("dpo", folder).startswith("--minutes 4.5 ")
    assert flags_of("chat", folder) == "--weight full_sft"
    assert "--weight pretrain full_sft --tasks" in flags_of("benchmarks", folder)
    (folder / "benchmarks.json").write_text("{}")
    assert flags_of("benchmarks", folder) == ""  # made after the weights


def test_a_download_only_if_something_is_missing(tmp_path, planned, data_dir, monkeypatch):
    monkeypatch.setattr(released, "DATASET", tmp_path)
    planned(tmp_path)
    assert flags_of("data", tmp_path) == "--set mini"
    planned(tmp_path, data_dir=str(data_dir))
    assert flags_of("data", tmp_path) == ""
    monkeypatch.setattr(released, "DATASET", data_dir)
    planned(tmp_path)
    assert flags_of("data", tmp_path) == ""


def test_a_price_keeps_its_currency():
    assert in_hours("1.5 RMB", 1200) == "0.50 RMB"
    assert in_hours("$0.4", 5400) == "$0.60" and in_hours("2", 3600) == "2.00"
    with pytest.raises(UserError, match="PRICE is a number"):
        Args(price="cheap")


# -- time ------------------------------------------------------------------------------------------


def test_a_stage_gets_what_it_needs_and_pretraining_the_rest():
    """An hour without 5 minutes of reading and 5 of what is not training: DPO needs 1 minute and
    gets a tenth more; fine-tuning would need an hour and gets its share, 4 of 10; pretraining has
    what is left."""
    estimates = {"pretrain": estimate(9000), "full_sft": estimate(3600), "dpo": estimate(60)}
    divide(3600, estimates, reading=300, evaluation=270, besides=10)
    left = 3000 - 66
    minutes = {stage: each.minutes for stage, each in estimates.items()}
    assert minutes["dpo"] == 1.1
    assert minutes["full_sft"] == pytest.approx(0.4 * left / 60, abs=0.01)
    assert minutes["pretrain"] == pytest.approx(0.6 * left / 60, abs=0.01)
    assert sum(each.seconds for each in estimates.values()) == pytest.approx(3000 + 30)
    assert estimates["full_sft"].tokens == pytest.approx(1000 * 0.4 * left / 3600)


def test_no_time_to_read_the_data():
    with pytest.raises(UserError, match="to read the data takes about 8 min of MINUTES=10"):
        divide(600, {"pretrain": estimate(60)}, reading=480, evaluation=0, besides=0)


def test_large_files_are_cut_to_twice_what_can_be_trained():
    """Of 1,000 s pretraining has 600 and fine-tuning 400, at 1,000 tokens a second and 4 bytes a
    token: 4.8 and 3.2 MB; a file of less stays whole, and one that is cut keeps 5 MB at least."""
    speed = MachineSpeed(train=1e3, step=0, decode=1, tokenize=1e5)
    large, small = DataFile("p", 1e6, 4e9, 1e9), DataFile("s", 100, 4e6, 1e6)
    files = {"pretrain": large, "full_sft": small}
    assert cut_files(1000, files, speed) == {"p": 5_000_000}
    assert files["full_sft"] == small
    assert files["pretrain"] == DataFile("p", 1250, 5e6, 1.25e6)
    files = {"pretrain": large, "full_sft": small}
    assert cut_files(100_000, files, speed) == {"p": 480_000_000}
    assert cut_files(1e6, {"pretrain": large}, speed) == {}  # there is time to read all


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_has_whole_lines_from_all_over_the_file(tmp_path, finish, planned, packed):
    lines = [json.dumps({"text": f"{n:06d} " + "word " * (n % 50)}) + "\n" for n in range(60_000)]
    source = tmp_path / ("pretrain.jsonl.gz" if packed else "pretrain.jsonl")
    text = "".join(lines).encode()
    source.write_bytes(gzip.compress(text) if packed else text)
    (tmp_path / "pretrain_val.jsonl").write_text(lines[0])
    folder = planned(finish("dpo"), ["pretrain"], cut={source.name: 2_000_000})
    args = cut_data.Args(save_dir=str(folder), data_dir=str(tmp_path))
    (made,) = cut_data.main(args)
    kept = made.read_text().splitlines(keepends=True)
    assert set(kept) <= set(lines) and len(set(kept)) == len(kept)
    assert made.stat().st_size == pytest.approx(2_000_000, rel=0.2)
    numbers = [int(json.loads(line)["text"][:6]) for line in kept]
    tenths = [sum(n // 6000 == tenth for n in numbers) for tenth in range(10)]
    assert min(tenths) > 0.5 * len(kept) / 10
    assert (folder / "data/pretrain_val.jsonl").read_text() == lines[0]
    assert stages.data_dir_of(folder) == str(folder / "data")
    assert flags_of("cut", folder)
    before = made.stat().st_mtime_ns
    cut_data.main(args)
    assert made.stat().st_mtime_ns == before


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_of_a_file(tmp_path, tokenizer, monkeypatch, packed):
    """Whole if it is small, and otherwise from its beginning; of a .gz by its compressed size."""
    texts = [f"line {n} has some words" for n in range(4000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(lines.encode()) if packed else lines.encode())
    true = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    found = measure_file(str(path), tokenizer)
    assert (found.rows, found.bytes, found.tokens) == (4000, len(lines), true)
    if not packed:  # a compressed file is read in blocks larger than this one
        monkeypatch.setattr(estimates, "SAMPLE_BYTES", 20_000)
        found = measure_file(str(path), tokenizer)
        assert found.tokens == pytest.approx(true, rel=0.1)


def test_rows_that_cannot_be_read_are_left_to_the_trainer(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "tea and bread"}\n\n{"text": oops}\n')
    assert measure_file(str(path), tokenizer).rows == 1
    path.write_text("\n")
    with pytest.raises(UserError, match="a.jsonl has no row of data"):
        measure_file(str(path), tokenizer)


@pytest.fixture
def make(data_dir, tmp_path, monkeypatch):
    """A function that makes a plan on a machine of a given speed; what it prints."""

    def call(speed: MachineSpeed, capsys=None, **settings):
        monkeypatch.setattr(plan, "measure_machine", lambda *_: speed)
        usual = dict(save_dir=str(tmp_path / "run"), data_dir=str(data_dir))
        flags = "--device cpu --hidden_size 32 --num_hidden_layers 1"
        return plan.main(Args(**{**usual, "flags": flags, **settings}))

    return call


def test_a_cpu_without_minutes_is_told_how_many_days_it_would_take(make, monkeypatch):
    huge = DataFile("huge.jsonl", 1e6, 1e9, 3e8)
    monkeypatch.setattr(plan, "measure_file", lambda path, tokenizer: huge)
    with pytest.raises(UserError, match="would take about [0-9]+ days here; MINUTES=60 fits"):
        make(SLOW)


def test_the_table_has_totals_and_the_plan_is_kept(make, capsys, tmp_path):
    made = make(FAST, price="2 RMB")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("pretrain", "full_sft", "dpo", "total", "RMB"))
    assert json.loads((tmp_path / "run/plan.json").read_text()) == made
    assert list(made["stages"]) == ["pretrain", "full_sft", "dpo"]


def test_a_run_goes_on_with_its_own_minutes_and_may_get_more_stages(make, capsys, monkeypatch):
    first = make(FAST, minutes=10.0)
    more = make(FAST, minutes=10.0, stages=["pretrain", "full_sft", "dpo", "reward"])
    assert list(more["stages"]) == ["pretrain", "full_sft", "dpo", "reward"]
    assert more["stages"]["pretrain"] == first["stages"]["pretrain"]
    monkeypatch.setattr(plan, "make_plan", None)  # nothing is measured again
    make(FAST, minutes=10.0)
    with pytest.raises(UserError, match="was begun with MINUTES=10"):
        make(FAST, minutes=20.0)
    with pytest.raises(UserError, match="was begun with DATA=.*some data"):
        make(FAST, minutes=10.0, data_dir="")


def test_little_disk_or_memory_is_told_before_it_starts(make, capsys, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(plan.hardware, "memory_available", lambda device: 1000)
    make(FAST)
    printed = capsys.readouterr().out
    assert "the memory may not do" in printed and "the disk will be full" in printed


def test_two_runs_do_not_share_a_folder(make, tmp_path, monkeypatch):
    other = SimpleNamespace(pid=7, info={"cmdline": None})
    words = ["python", "trainer/train_dpo.py", "--save_dir", str(tmp_path / "run")]
    trainer = SimpleNamespace(pid=4711, info={"cmdline": words})
    monkeypatch.setattr(plan.psutil, "process_iter", lambda names: [other, trainer])
    with pytest.raises(UserError, match="process 4711 trains in .*run: wait .*`kill 4711`"):
        make(FAST)
    make(FAST, save_dir=str(tmp_path / "another"))


def test_data_that_is_not_there(make, tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder"):
        make(FAST, data_dir=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has none of pretrain_t2t_mini.jsonl"):
        make(FAST, data_dir=str(tmp_path / "empty"))


def test_every_stage_has_its_trainer():
    for name, stage in stages.STAGES.items():
        args = plan.trainer_args(name, Args())
        assert args.from_weight == (stage.start or "none"), name
        assert rules_of(type(args))["data_path"]["released"] == stage.data

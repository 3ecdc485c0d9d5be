"""The training page: logs that grow, states, the form, and what may be started."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest
from toy import text_file

from model.errors import UserError
from model.weights import ROOT
from scripts.web import models, training, training_form
from scripts.web.models import DemoTraining
from scripts.web.processes import Process, last_lines
from scripts.web.training_form import find_data, resume_flags, stages
from scripts.web.training_runs import FoundRun, WatchedRun, find_reports, find_runs, thin_out
from trainer.common.checkpoint import Progress
from trainer.common.loop import Plan
from trainer.report import run_state
from trainer.report.run_state import RunState, read_state


def line(step: int, **metrics) -> str:
    return (
        json.dumps({"step": step, "num_tokens": 10 * step, "seconds": 6.0 * step, **metrics}) + "\n"
    )


@pytest.fixture
def run(tmp_path):
    """A run without records."""
    log = tmp_path / "pretrain_32.metrics.jsonl"
    log.write_text("")
    return WatchedRun(FoundRun("pretrain_32", log))


MAIN = SimpleNamespace(is_main=True, world_size=1)  # of a Context, what a state asks


# -- logs and states -------------------------------------------------------------------------------


def test_a_log_is_followed_while_it_is_written_and_after_it_begins_anew(run):
    log = run.run.log
    log.write_text(line(1, loss=3.0) + line(2, loss=2.0)[:20])
    run.refresh()
    assert run.points("loss", "step") == [(1, 3.0)]
    log.write_text(line(1, loss=3.0) + line(2, loss=2.0) + line(2, eval_bpb=1.5, sample="a ▸b"))
    run.refresh()
    assert run.points("loss", "step") == [(1, 3.0), (2, 2.0)]
    assert run.points("loss", "num_tokens") == [(10, 3.0), (20, 2.0)]
    assert run.points("eval_bpb", "minutes") == [(0.2, 1.5)]
    assert [record["sample"] for record in run.samples_shown()] == ["a ▸b"]
    with open(log, "a") as file:  # a number that JSON does not know, one of each layer, the end
        file.write(
            line(3, loss=None, expert_load=[1.0, 1.5]) + '{"step": 3, "changed_fraction": 1}\n'
        )
    run.refresh()
    assert run.points("loss", "step")[-1] == (2, 2.0) and run.last["loss"] == 2.0
    assert run.points("expert_load", "step") == [(3, 1.5)] and run.status == "finished"
    # --resume writes a new file, up to the checkpoint
    new = log.with_name("new")
    new.write_text(line(1, loss=3.0))
    os.replace(new, log)
    run.refresh()
    assert run.points("loss", "step") == [(1, 3.0)] and run.samples == [] and run.status == ""
    log.write_text("no log\n")
    run.refresh()
    assert "line 1 of" in run.error and "is not JSON" in run.error


def test_a_long_log_is_read_once_and_thinned_out(run):
    log, count = run.run.log, 100_000
    log.write_text("".join(line(step, loss=1 / step) for step in range(1, count + 1)))
    run.refresh()
    before = run.reader.position
    assert before == log.stat().st_size
    with open(log, "a") as file:
        file.write(line(count + 1, loss=7.0))
    start = time.process_time()
    run.refresh()
    points = run.points("loss", "step")
    assert time.process_time() - start < 0.1  # the first time took a hundred times as long
    assert len(points) == 400 and points[-1] == (count + 1, 7.0)


def test_a_thin_curve_has_the_means_of_the_whole_one():
    x, y = np.arange(11.0), np.arange(11.0) ** 2
    assert thin_out(x, y, 11) == list(zip(x, y, strict=True))
    # of 10 points: three, three and four; then the last one
    expected = [(1, (0 + 1 + 4) / 3), (4, (9 + 16 + 25) / 3), (7.5, (36 + 49 + 64 + 81) / 4)]
    assert np.allclose(thin_out(x, y, 4), [*expected, (10, 100)])


def test_runs_and_reports_are_found_below_all_folders(tmp_path):
    for name in ("out/a_32", "out/lora/b_32", "out/demo/trial/c_32", "other/a_32"):
        path = tmp_path / f"{name}.metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "out" / "a_32.report.html").touch()
    (tmp_path / "out" / "minimind").mkdir()
    (tmp_path / "out" / "minimind" / "report.html").touch()
    folders = str(tmp_path / "out"), str(tmp_path / "other")
    assert {run.label for run in find_runs(folders)} == {"a_32", "lora/b_32", f"{folders[1]}/a_32"}
    assert find_reports(folders) == [tmp_path / "out" / "minimind" / "report.html"]


def test_a_state_is_dead_when_its_process_is(tmp_path):
    path = tmp_path / "a.state.json"
    state, plan = RunState(path, "pretrain"), Plan("a", 8, 16, 2, 2)
    state.begin(MAIN, Progress(step=2, samples_seen=4), plan)
    assert read_state(path).state == "running" and read_state(path).seconds_left is None
    state.started -= 30
    state.updated -= 3
    state.update(MAIN, Progress(step=4, samples_seen=8), plan)
    found = read_state(path)
    assert (found.step, found.total_steps) == (4, 8)
    assert found.seconds_left == pytest.approx(60, abs=1)  # a quarter took 30 seconds
    other = subprocess.Popen([sys.executable, "-c", "pass"])
    other.wait()
    state.pid = other.pid
    state.write(MAIN)
    assert read_state(path).state == "died"
    state.pid, state.process_started = os.getpid(), state.process_started - 60  # an earlier process
    state.write(MAIN)
    assert read_state(path).state == "died"
    state.host = "elsewhere"  # nobody can see its processes from here
    state.write(MAIN)
    assert read_state(path).state == "running"
    state.end(MAIN, "stopped")
    assert read_state(path).state == "stopped"
    path.write_text('{"stage": "pretra')
    assert read_state(path) is None


def test_the_state_is_written_every_two_seconds_only(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(run_state.time, "time", lambda: now[0])
    state, plan = RunState(tmp_path / "a.state.json", "pretrain"), Plan("a", 100, 100, 1, 1)
    state.begin(MAIN, Progress(), plan)
    seen = []
    for step in range(1, 11):
        now[0] += 1
        state.update(MAIN, Progress(step=step, samples_seen=step), plan)
        seen.append(read_state(state.path).step)
    assert seen == [0, 0, 3, 3, 3, 6, 6, 6, 9, 9]


# -- what is started -------------------------------------------------------------------------------


def test_the_stages_are_the_trainers_in_the_order_of_a_pipeline():
    names = list(stages())
    assert names[:2] == ["pretrain", "full_sft"]
    assert {f"train_{name}.py" for name in names} == {
        path.name for path in (ROOT / "trainer").glob("train_*.py")
    }
    assert names.index("dpo") < names.index("grpo")


def training_alone() -> None:
    """The training page, which AppTest cannot reach through the navigation."""
    from model.command_line import parse_arguments
    from scripts.web.texts import Translator
    from scripts.web.training import training_page
    from scripts.web_demo import Args

    training_page(parse_arguments(Args), Translator("en"))


@pytest.fixture
def open_form(tmp_path, monkeypatch):
    """A function that opens the form, with these flags of the page."""

    def start(*flags: str, address: str | None = None) -> AppTest:
        monkeypatch.setattr(type(st.context), "ip_address", property(lambda self: address))
        monkeypatch.setattr(sys, "argv", ["x", "--save_dir", str(tmp_path / "out"), *flags])
        page = AppTest.from_function(training_alone, default_timeout=120)
        page.session_state.next_view = "new_training"
        page.run()
        assert not page.exception
        return page

    return start


@pytest.fixture
def form(open_form, monkeypatch):
    """The form, and the list of what it starts instead of starting it."""
    started = []
    monkeypatch.setattr(training_form, "Process", lambda *given: started.append(given))
    monkeypatch.setattr(training, "started", lambda process: None)
    return open_form(), started


def test_the_form_shows_and_runs_one_command_line(form, tmp_path):
    page, started = form
    data = text_file(tmp_path / "my data.jsonl")
    assert "there is no training data" in page.error[0].value and page.button[-1].disabled
    page.multiselect[0].set_value([data])
    page.text_input(key="form_pretrain_max_steps").set_value("10")
    page.text_input(key="form_pretrain_others").set_value("--batch_size 8 --optimizer adamw")
    page.run()
    assert not page.error
    flags = ["--data_path", data, "--max_steps", "10", "--save_dir", str(tmp_path / "out")]
    flags += ["--checkpoint_dir", str(tmp_path / "out" / "checkpoints")]
    flags += ["--batch_size", "8", "--optimizer", "adamw"]
    command = page.code[-1].value
    assert shlex.split(command)[2:] == flags and "train_pretrain.py" in command
    page.button[-1].click().run()
    ((argv, output, folder),) = started
    assert argv[1:] == flags and (folder / argv[0]).resolve() == ROOT / "trainer/train_pretrain.py"
    assert output.parent == tmp_path / "out" / "logs"


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ("--batch_size 0", "--batch_size must be more than 0, not 0"),
        ("--batchsize 8", "unknown argument --batchsize; did you mean --batch_size?"),
        ("--optimizer sgd", "--optimizer: invalid choice: 'sgd'"),
        ("--recipe nothing", "there is no recipe"),
        ("--seed '1", "cannot be split into words: No closing quotation"),
        ("--help", "leave it away"),
        ("; rm -r /", "unknown argument ;"),
    ],
)
def test_a_bad_value_gets_the_trainers_sentence(form, tmp_path, others, told):
    page, started = form
    page.multiselect[0].set_value([text_file(tmp_path / "data.jsonl")])
    page.text_input(key="form_pretrain_others").set_value(others)
    page.run()
    assert told in page.error[0].value and page.button[-1].disabled and not started


def test_visitors_from_elsewhere_only_look(open_form):
    flag = "--remote_training", "1"
    for flags, address, allowed in [
        ((), "192.0.2.7", False),
        (flag, "192.0.2.7", True),
        ((), "::1", True),
    ]:
        page = open_form(*flags, address=address)
        assert bool(page.selectbox) == allowed and bool(page.info) != allowed


def test_held_out_files_are_not_offered_as_data(tmp_path):
    (tmp_path / "demo" / "data").mkdir(parents=True)
    for name in ("a.jsonl", "a_val.jsonl", "b_test.jsonl", "c.jsonl.gz", "d.txt"):
        (tmp_path / "demo" / "data" / name).touch()
    names = [os.path.basename(path) for path in find_data(str(tmp_path))]
    assert [name for name in names if name[1] == "."] == ["a.jsonl", "c.jsonl.gz"]


def test_only_trainers_are_continued(tmp_path):
    def state(argv: list[str], **more) -> RunState:
        return RunState(tmp_path / "a", "pretrain", argv=argv, folder=str(ROOT), **more)

    script = ROOT / "trainer" / "train_pretrain.py"
    flags = ["--force", "1", "--resume", "1"]
    assert resume_flags(state(["trainer/train_pretrain.py", "--force", "1"])) == (script, flags)
    assert resume_flags(state([str(script), *flags])) == (script, flags)
    assert resume_flags(state(["scripts/runs/demo.py"])) is None
    assert resume_flags(state(["/tmp/trainer/train_pretrain.py"])) is None
    assert resume_flags(state([str(script)], world_size=2)) is None
    with pytest.raises(UserError, match="only a trainer"):
        training_form.continue_run(state(["demo.py"]), str(tmp_path))


# -- processes -------------------------------------------------------------------------------------


def wait_for_output(output) -> None:
    while not output.read_bytes():
        time.sleep(0.01)


def test_a_process_prints_into_a_file_and_outlives_the_page(tmp_path):
    script = tmp_path / "a.py"
    script.write_text("import os, sys, time; print(sys.argv[1:], os.getsid(0)); time.sleep(60)")
    process = Process([str(script), "--a", "$HOME; ls"], tmp_path / "logs" / "a.log", tmp_path)
    wait_for_output(process.output)
    # a session of its own: a hang-up or Ctrl-C in the terminal of the page does not reach it
    assert last_lines(process.output) == f"['--a', '$HOME; ls'] {process.popen.pid}"
    assert process.running and not process.failed
    process.popen.send_signal(signal.SIGINT)
    process.popen.wait(30)
    assert not process.running and process.failed
    with pytest.raises(UserError, match="a.py does not start: .*: File exists"):
        Process([str(script)], script / "a.log")  # a file is where its folder should be


def test_the_end_of_a_progress_bar_is_its_last_state(tmp_path):
    output = tmp_path / "a.log"
    assert last_lines(output) == ""
    output.write_bytes(b"1%\r50%\r100%\r\n\nend\n")
    assert last_lines(output) == "100%\nend"


def test_the_demo_is_a_process_that_can_be_stopped(tmp_path, monkeypatch):
    (tmp_path / "scripts" / "runs").mkdir(parents=True)
    slow = "import sys, time; print(sys.argv[1:], flush=True); time.sleep(60)"
    (tmp_path / "scripts" / "runs" / "demo.py").write_text(slow)
    monkeypatch.setattr(models, "ROOT", tmp_path)
    demo = DemoTraining()
    demo.start(str(tmp_path / "out"), 3)
    output = demo.process.output
    wait_for_output(output)
    assert demo.running and f"'--minutes', '3', '--output', '{tmp_path}" in last_lines(output)
    demo.stop()
    assert not demo.running and demo.process is None

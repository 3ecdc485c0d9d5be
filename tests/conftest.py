"""What several test files share."""

import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import isolation  # before what reads its settings when it is imported

# isort: split
import psutil
import pytest
import torch
from toy import STAGES, Trainer, name_of
from transformers import PreTrainedTokenizerBase

from dataset.lm_dataset import load_documents
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import ROOT, load_tokenizer, save_weights
from trainer import trainer_utils
from trainer.common import command as trainer_command
from trainer.common import hardware
from trainer.common.context import unwrap
from trainer.trainer_utils import Run

# Tests that are started in the background ignore Ctrl-C, and so would all programs that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# -- no test writes outside its own folder ---------------------------------------------------------

BEFORE, WRITTEN = pytest.StashKey[dict](), pytest.StashKey[list]()


def pytest_sessionstart(session) -> None:
    if not isolation.is_worker():
        session.config.stash[BEFORE] = isolation.project_files()


def pytest_sessionfinish(session) -> None:
    """At the end, for processes side by side share the project: none knows whose file it is."""
    if not isolation.is_worker():
        session.config.stash[WRITTEN] = isolation.written(session.config.stash[BEFORE])
        if session.config.stash[WRITTEN] and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config) -> None:
    if config.stash.get(WRITTEN, []):
        terminalreporter.section("written into the project", red=True)
        for path in config.stash[WRITTEN]:
            terminalreporter.line(str(path))
        terminalreporter.line("A test wrote these; it may write into tmp_path only. If another")
        terminalreporter.line("program did it meanwhile, run the tests again.")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    """Each test tokenises its data anew, in this process or in one that it starts."""
    monkeypatch.setitem(load_documents.__kwdefaults__, "cache", tmp_path / "cache")
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def closed_port():
    """A port of this machine that nobody listens on, and that nobody else is given meanwhile."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


# -- models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """So that results are the same on every machine, and tiny models fast."""
    torch.set_num_threads(1)
    # Where workers are not forked (macOS), they know nothing of what a test has replaced.
    multiprocessing.set_start_method("fork", force=True)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., MiniMindForCausalLM]:
    """A function that makes a tiny random model in eval mode; its arguments are config fields.

    Its weights are ten times as large as usual, so that its logits are far from each other.
    """

    def make(seed: int = 0, **fields) -> MiniMindForCausalLM:
        tiny = dict(
            vocab_size=128,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
        torch.manual_seed(seed)
        return MiniMindForCausalLM(MiniMindConfig(**{**tiny, **fields})).eval()

    return make


@pytest.fixture
def save(make_model, tokenizer, tmp_path):
    """A function that makes a model and saves it; its file."""

    def make(name="full_sft_64", **fields) -> Path:
        usual = dict(vocab_size=len(tokenizer), initializer_range=0.05)
        model = make_model(**{**usual, **fields})
        path = tmp_path / f"{name}.pth"
        return save_weights(model, path, stage="full_sft", tokenizer=tokenizer, origin={})

    return make


@pytest.fixture
def browser():
    """A real Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium to open the page with (apt install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


# -- toy trainings ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def float32_on_every_cpu(monkeypatch) -> None:
    """So that trainings of the tests compute the same on CPUs with and without bfloat16."""
    monkeypatch.setattr(hardware, "bfloat16_gain", lambda: 1.0)


@pytest.fixture
def in_a_hurry(monkeypatch) -> None:
    """No time is spent on measuring this machine, on drawing, or on waiting for its disk or for
    other processes."""
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: 1e11)
    monkeypatch.setattr(trainer_utils, "plot_losses", lambda runs, path: None)
    monkeypatch.setattr(trainer_utils, "write_report", lambda *args, **about: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    for wait in ("POLL_SECONDS", "TELL_SECONDS", "FIRST_RANK_SECONDS"):
        monkeypatch.setattr(trainer_command, wait, getattr(trainer_command, wait) / 10)


@pytest.fixture
def train(tmp_path) -> Trainer:
    return Trainer(tmp_path)


@pytest.fixture(params=STAGES, ids=name_of)
def any_stage(request, tmp_path) -> Trainer:
    """Every trainer in turn."""
    return Trainer(tmp_path, request.param)


@pytest.fixture
def trajectory(monkeypatch):
    """The weights after each step, in memory instead of files; train() empties it first."""
    states = []

    def remember(run, model, optimizer, save=None):
        if run.step == 1:
            states.clear()
        state = unwrap(model).state_dict()
        states.append({name: tensor.clone() for name, tensor in state.items()})

    monkeypatch.setattr(Run, "save_every", remember)
    return states


class Killed(Exception):
    pass


@pytest.fixture
def killed(monkeypatch):
    """Run something until `step` is done (and saved, where that is due), and no further."""

    def until(step, call, *args, **settings):
        with monkeypatch.context() as patch:
            save_every = Run.save_every

            def die(run, *everything, **more):
                save_every(run, *everything, **more)
                if run.step == step:
                    raise Killed

            patch.setattr(Run, "save_every", die)
            try:
                call(*args, **settings)
            except Killed:
                return
        pytest.fail(f"there was no step {step}")

    return until


@pytest.fixture
def command(monkeypatch, capsys):
    """A trainer's script, run in this process: (exit code, what it prints)."""

    def call(stage, *arguments):
        monkeypatch.setattr(sys, "argv", [stage.__file__, *arguments])
        try:
            runpy.run_path(stage.__file__, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr()

    return call


@pytest.fixture
def shell():
    """Start a program as a person does."""
    started = []

    def start(*words, cwd=ROOT) -> subprocess.Popen:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(subprocess.Popen([sys.executable, *words], cwd=cwd, env=env, **pipe))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:  # and torchrun's workers with it
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
            process.kill()
            process.wait()

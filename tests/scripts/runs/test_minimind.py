"""scripts/runs/minimind.sh from end to end: interrupted, run again, and with mistakes."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from model.weights import ROOT

SCRIPT = ROOT / "scripts/runs/minimind.sh"
TINY = """--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 4 --max_steps 60 --epochs 99
    --batch_size 2 --accumulation_steps 1 --max_seq_len 64 --device cpu --num_workers 0
    --save_interval 5""".split()

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.fixture
def start(tmp_path):
    """A function that starts the script in a session of its own, as a terminal does, from a folder
    that is not the project's; its output goes to a file."""
    started = []

    def begin(*flags: str, **settings: str) -> subprocess.Popen:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
        with open(tmp_path / f"log{len(started)}", "wb") as log:
            process = subprocess.Popen(
                ["bash", str(SCRIPT), *flags],
                cwd=tmp_path,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.log = tmp_path / f"log{len(started)}"
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(process: subprocess.Popen, seconds: float = 900) -> tuple[int, str]:
    code = process.wait(timeout=seconds)
    return code, process.log.read_text(errors="replace")


@pytest.mark.slow
def test_it_goes_on_where_it_was_stopped(start, data_dir, tmp_path):
    """Ctrl-C while it pretrains; the second run resumes and comes to the end. All paths have a
    space and are relative."""
    places = dict(DATA=data_dir.name, OUT="my run", STAGES="full_sft pretrain", PRICE="2 RMB")
    log = tmp_path / "my run/pretrain_32.metrics.jsonl"
    first = start(*TINY, **places)
    deadline = time.monotonic() + 600
    checkpoint = tmp_path / "my run/checkpoints/pretrain_32.checkpoint.pt"
    while not checkpoint.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)
    code, printed = ended(first)
    assert code == 130, printed
    assert "the same command goes on from here" in printed
    assert not (tmp_path / "my run/full_sft_32.pth").exists()

    code, printed = ended(start(*TINY, **places))
    assert code == 0, printed
    assert "resuming pretrain_32.checkpoint.pt at step" in printed
    run = tmp_path / "my run"
    assert {"results.json", "questions.md", "report.html", "full_sft_32.pth"} <= set(
        os.listdir(run)
    )
    assert "RMB" in (run / "report.html").read_text()
    history = [json.loads(line) for line in log.read_text().splitlines()]
    assert history[-1]["step"] == 60 and "changed_fraction" in history[-1]
    assert list(json.loads((run / "results.json").read_text())) == ["pretrain", "full_sft"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"STAGES": "pretrian"}, "STAGES has no stage pretrian"),
        ({"PRICE": "cheap"}, "PRICE is a number"),
        ({"MINUTES": "soon"}, "invalid float value: 'soon'"),
        ({"MINUTES": "-1"}, "--minutes must not be negative"),
    ],
)
def test_a_mistake_ends_it_before_anything_is_done(start, tmp_path, settings, told):
    code, printed = ended(start(OUT=str(tmp_path / "run"), **settings))
    assert code == 2 and told in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_data_that_is_not_there(start, tmp_path):
    code, printed = ended(start(OUT="run", DATA="nowhere"))
    assert code == 2 and f"{tmp_path / 'nowhere'} is no folder" in printed
    assert "Traceback" not in printed


def test_it_is_about_25_lines_of_old_bash():
    """Each command in it is explained by --help and by the texts; macOS has bash 3.2."""
    lines = [line.strip() for line in SCRIPT.read_text().splitlines()]
    commands = [line for line in lines if line and not line.startswith("#")]
    assert len(commands) <= 36
    newer = ("declare -A", "mapfile", "readarray", "${!", ",,}", "^^}", "&>>", "|&")
    assert not [line for line in commands if any(word in line for word in newer)]
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, str(SCRIPT)], check=True)

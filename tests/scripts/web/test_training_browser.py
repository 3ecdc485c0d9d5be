"""The training page in a real browser, while a training runs."""

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
from toy import text_file
from web_page import open_when_served

# The number of points of each line of the first chart.
POINTS = """() => [...document.querySelector('[data-testid="stVegaLiteChart"]')
    ?.querySelectorAll('.mark-line path') ?? []].map(
        line => (line.getAttribute('d') || '').match(/[ML]/g)?.length)"""
STEPS = 120
OTHERS = """--num_attention_heads 4 --num_key_value_heads 2 --device cpu --num_workers 0
    --max_seq_len 32 --batch_size 2 --accumulation_steps 1 --batch_ramp 0 --log_interval 5
    --eval_interval 100 --save_interval 0 --val_documents 4""".split()


class Held:
    """The process of a run, which stands still between two of its log's lines."""

    def __init__(self, run: Path):
        self.log, self.about = run.with_suffix(".metrics.jsonl"), run.with_suffix(".state.json")

    @property
    def state(self) -> dict:
        return json.loads(self.about.read_text())

    def at_line(self, number: int) -> None:
        while not self.log.exists() or self.log.read_bytes().count(b"\n") < number:
            time.sleep(0.002)
        os.kill(self.state["pid"], signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.state["pid"], signal.SIGCONT)


def fill(page, label: str, value: str) -> None:
    box = page.get_by_label(label, exact=True).first
    box.fill(value)
    box.press("Enter")


def choose_data(page, path: str) -> None:
    box = page.get_by_test_id("stMultiSelect").locator("input")
    box.fill(path)
    page.get_by_text(f"Add: {path}").click()
    box.press("Escape")


def open_form(page) -> None:
    page.get_by_test_id("stButtonGroup").get_by_text("New training").click()


def progress(page) -> int:
    """The step that the first run of the list is at."""
    line = page.locator(".mm-run").first.inner_text()
    return int(re.search(r"step ([\d,]+)", line)[1].replace(",", ""))


@pytest.mark.slow
def test_a_training_is_started_watched_stopped_and_continued(browser, serve, tmp_path):
    out, data = (
        tmp_path / "out",
        text_file(tmp_path / "data.jsonl", [f"{n} " * 9 for n in range(9000)]),
    )
    page = browser.new_page(locale="en-US", viewport={"width": 1300, "height": 1400})
    open_when_served(page, serve("--save_dir", str(out)) + "/training")

    # `first` everywhere: while a page is drawn anew, an element may be there twice for a moment

    # the form: the trainer's own sentence for a mistake, then the command line that is run
    open_form(page)
    choose_data(page, data)
    fields = {"Width": "32", "Layers": "1", "Steps": str(STEPS), "Name of the run": "first"}
    for label, value in {**fields, "Other flags": " ".join(OTHERS)}.items():
        fill(page, label, value)
    fill(page, "Learning rate", "fast")
    page.get_by_text("invalid float value: 'fast'").first.wait_for()
    start = page.get_by_role("button", name="Start", exact=True)
    assert start.is_disabled()
    fill(page, "Learning rate", "2e-3")
    page.locator("button[kind=primary]:not([disabled])").first.wait_for()
    command = page.get_by_test_id("stCode").last.inner_text()
    assert command.startswith("python ") and "--learning_rate 2e-3 --save_weight first" in command
    start.click()

    # it runs, and its curve grows; between two looks it is held, so that it does not end meanwhile
    held = Held(out / "first_32")
    held.at_line(3)
    page.locator(".mm-running").first.wait_for(timeout=300_000)
    page.wait_for_function(f"({POINTS})()[0] >= 2")
    assert held.state["argv"] == shlex.split(command)[1:]
    held.go_on()
    held.at_line(8)
    page.wait_for_function(f"({POINTS})()[0] >= 7")

    # stopped, with its checkpoint
    page.get_by_role("button", name="Stop").first.click()
    page.get_by_text("saves its checkpoint").first.wait_for()
    held.go_on()
    page.locator(".mm-stopped").first.wait_for()
    assert (out / "checkpoints" / "first_32.checkpoint.pt").exists()
    assert 0 < progress(page) < STEPS

    # continued to the end, where it stopped
    page.get_by_role("button", name="Continue").first.click()
    page.locator(".mm-finished").first.wait_for(timeout=300_000)
    assert progress(page) == STEPS
    log = (out / "first_32.metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log if '"loss"' in line]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS

    # a second run is laid over it
    open_form(page)  # which has kept its values
    fill(page, "Steps", "60")
    fill(page, "Name of the run", "second")
    page.get_by_test_id("stCode").last.get_by_text("second", exact=True).first.wait_for()
    page.locator("button[kind=primary]:not([disabled])").first.wait_for()
    start.click()
    page.get_by_role("tab", name="second_32").first.wait_for()
    page.get_by_role("tab", name="first_32").first.wait_for()
    page.locator(".mm-finished").nth(1).wait_for(timeout=300_000)
    page.wait_for_function(f"({POINTS})().length == 2")
    for axis in ("steps", "minutes"):
        page.get_by_test_id("stButtonGroup").get_by_text(axis).first.click()
        page.wait_for_function(f"({POINTS})().length == 2")

    # and the page speaks Chinese
    page.get_by_text("中文").first.click()
    page.get_by_text("训练损失").first.wait_for()
    page.get_by_text("已完成").first.wait_for()

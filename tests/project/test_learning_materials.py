"""Every lesson runs, its claims hold (they are asserted in it), and its solutions solve."""

import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from matplotlib.image import imread
from toy import ended, fork

from model.weights import ROOT

LESSONS = sorted((ROOT / "learning_materials").glob("[0-9]*.py"))


def start(lesson: Path, out: Path, *flags: str, typed: int | None = None) -> int:
    """A lesson in a process of its own; what it prints goes to a .txt, what is typed is a terminal.

    It is forked from this one, which has imported already what takes longest to import.
    """

    def as_a_script() -> None:
        if typed is not None:
            os.dup2(typed, 0)
            sys.stdin = open(0, closefd=False)
        sys.argv = [str(lesson), "--out", str(out), *flags]
        sys.path.insert(0, str(lesson.parent))
        runpy.run_path(str(lesson), run_name="__main__")

    return fork(as_a_script, out / f"{lesson.stem}.txt")


@pytest.mark.slow
def test_every_lesson_holds_what_it_claims(tmp_path):
    assert len(LESSONS) >= 16
    failed = []
    for first in range(0, len(LESSONS), 2):  # two side by side
        pair = LESSONS[first : first + 2]
        processes = [start(lesson, tmp_path, "--solutions") for lesson in pair]
        for lesson, code in zip(pair, map(ended, processes), strict=True):
            if code:
                failed.append(f"{lesson}: {(tmp_path / f'{lesson.stem}.txt').read_text()}")
    assert not failed, "\n".join(failed)
    for lesson in LESSONS:
        printed = (tmp_path / f"{lesson.stem}.txt").read_text()
        assert "def solution_1(" in printed and "def solution_2(" in printed, lesson
        picture = tmp_path / f"{lesson.stem}.png"
        assert imread(picture)[..., :3].std() > 0.01, lesson  # not an empty one
        assert picture.stat().st_size < 60_000, lesson


@pytest.mark.slow
def test_a_lesson_as_a_person_runs_it(tmp_path):
    """Without arguments it shows questions and conclusions, and keeps the solutions back."""
    lesson = LESSONS[5]
    command = [sys.executable, lesson, "--out", tmp_path / "new"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.index("1. Predict: ") < printed.index("=> ") < printed.index("Exercise 2: ")
    assert "--solutions" in printed and "def solution_1" not in printed
    assert (tmp_path / "new" / f"{lesson.stem}.png").exists()


@pytest.mark.slow
def test_with_ask_it_waits_for_enter(tmp_path):
    lesson = LESSONS[5]
    try:
        terminal, typed = os.openpty()
    except OSError as error:
        pytest.skip(f"this machine gives no terminal: {error}")
    process = start(lesson, tmp_path, "--ask", typed=typed)
    printed = tmp_path / f"{lesson.stem}.txt"
    while not printed.exists():
        time.sleep(0.05)
    for question in range(1, 6):
        deadline = time.monotonic() + 60
        while printed.read_text().count("(Enter shows the answer)") < question:
            assert time.monotonic() < deadline, printed.read_text()
            time.sleep(0.05)
        assert printed.read_text().count("=> ") == question - 1  # it waits
        os.write(terminal, b"\n")
    assert ended(process) == 0


def test_a_wrong_flag_is_told_in_a_sentence(tmp_path):
    assert ended(start(LESSONS[5], tmp_path, "--solution")) == 2
    assert (tmp_path / f"{LESSONS[5].stem}.txt").read_text().startswith("error: ")

"""Every lesson runs, its claims hold (they are asserted in it), and its solutions solve."""

import os
import subprocess
import sys
import time

import pytest
from matplotlib.image import imread
from warm_python import WarmPython

from model.weights import ROOT

LESSONS = sorted((ROOT / "learning_materials").glob("[0-9]*.py"))


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    runner = WarmPython(ROOT, tmp_path_factory.mktemp("lessons") / "log")
    yield runner
    runner.close()


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_every_lesson_holds_what_it_claims(lesson, python, tmp_path):
    code, printed, _ = python.run([str(lesson), "--out", str(tmp_path), "--solutions"], tmp_path)
    assert code == 0, printed
    assert "def solution_1(" in printed and "def solution_2(" in printed
    picture = tmp_path / f"{lesson.stem}.png"
    assert imread(picture)[..., :3].std() > 0.01  # not an empty one
    assert picture.stat().st_size < 60_000


def test_there_are_lessons():
    assert len(LESSONS) >= 16


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
    printed = tmp_path / "printed.txt"
    command = [sys.executable, lesson, "--out", tmp_path, "--ask"]
    with open(printed, "wb") as file:
        process = subprocess.Popen(command, stdin=typed, stdout=file, stderr=file)
    for question in range(1, 6):
        deadline = time.monotonic() + 120
        while printed.read_text().count("(Enter shows the answer)") < question:
            assert time.monotonic() < deadline, printed.read_text()
            time.sleep(0.05)
        assert printed.read_text().count("=> ") == question - 1  # it waits
        os.write(terminal, b"\n")
    assert process.wait(60) == 0


def test_a_wrong_flag_is_told_in_a_sentence(python, tmp_path):
    code, printed, _ = python.run([str(LESSONS[5]), "--solution"], tmp_path)
    assert code == 2 and printed.startswith("error: ")

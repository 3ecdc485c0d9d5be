"""Every lesson runs, its claims hold (they are asserted in it), and its solutions solve."""

import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from matplotlib.image import imread
from toy import ended, fork

from model.weights import ROOT

LESSONS = sorted((ROOT / "learning_materials").glob("[0-9]*.py"))


def run(lesson: Path, out: Path) -> tuple[int, str]:
    """A lesson with its solutions in a process of its own: exit code and what it prints.

    It is forked from this one, which has imported what takes longest to import.
    """

    def as_a_script() -> None:
        sys.argv = [str(lesson), "--solutions", "--out", str(out)]
        sys.path.insert(0, str(lesson.parent))
        runpy.run_path(str(lesson), run_name="__main__")

    log = out / f"{lesson.stem}.txt"
    code = ended(fork(as_a_script, log))
    return code, log.read_text()


@pytest.mark.slow
def test_every_lesson_holds_what_it_claims(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda lesson: run(lesson, tmp_path), LESSONS))
    assert len(results) >= 16
    failed = [text for code, text in results if code]
    assert not failed, "\n".join(failed)
    for lesson, (_, text) in zip(LESSONS, results, strict=True):
        assert "Exercise 2: " in text and "def solution_2(" in text, lesson
        picture = tmp_path / f"{lesson.stem}.png"
        assert imread(picture)[..., :3].std() > 0.01, lesson  # not an empty one
        assert picture.stat().st_size < 60_000, lesson


@pytest.mark.slow
def test_a_lesson_as_a_person_runs_it(tmp_path):
    """Without arguments it shows questions and conclusions, and keeps the solutions back."""
    command = [sys.executable, LESSONS[5], "--out", tmp_path / "new"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "1. Predict: " in printed and "=> " in printed and "--solutions" in printed
    assert "def solution_1" not in printed
    assert (tmp_path / "new" / f"{LESSONS[5].stem}.png").exists()


@pytest.mark.slow
def test_a_wrong_flag_is_told_in_a_sentence():
    command = [sys.executable, LESSONS[5], "--solution"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ")

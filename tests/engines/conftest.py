"""The engine or client that a test file is about, in its own environment (see run.py)."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.weights import ROOT

FOLDER = Path(os.environ.get("ENGINES_FOLDER") or ROOT / ".engines")


@dataclass(frozen=True)
class Engine:
    name: str
    folder: Path  # a virtual environment, or one of npm, or both

    def program(self, name: str) -> str:
        """A program that came with the engine."""
        return str(self.folder / "bin" / name)

    @property
    def python(self) -> str:
        return self.program("python")

    @property
    def environment(self) -> dict[str, str]:
        """The tests' own, without this project's modules and without a network."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {**kept, "PATH": path, "HF_HUB_OFFLINE": "1"}

    def run(self, *words: object, timeout: float = 300, **settings) -> str:
        """What a program prints; the test fails with its last lines if it ends with an error."""
        result = subprocess.run(
            list(map(str, words)),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            **settings,
        )
        if result.returncode:
            pytest.fail(f"exit code {result.returncode}: {(result.stdout + result.stderr)[-3000:]}")
        return result.stdout


@pytest.fixture(scope="module")
def engine(request) -> Engine:
    """Of test_NAME.py: NAME. The test is skipped where it is not installed."""
    name = request.path.stem.removeprefix("test_")
    if not (FOLDER / name).is_dir():
        pytest.skip(f"{name} is not installed: {Path(sys.executable).name} tests/engines/run.py")
    return Engine(name, FOLDER / name)

"""`python WORDS` without the seconds that imports take."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from model.weights import ROOT


class Ended(NamedTuple):
    code: int
    printed: str
    seconds: float


class WarmPython:
    """Runs scripts one after the other, each in a process forked from command_runner.py.

    That one has done nothing but its imports. A process forked from the tests' own might find a
    lock taken by one of the threads of earlier tests, which it does not have.
    """

    def __init__(self, cwd: Path, log: Path):
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests/helpers/command_runner.py", log],
            env={**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"},
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, words: list[str], folder: Path, typed: str = "", parse: bool = False) -> Ended:
        """What `python WORDS` does in a folder.

        Args:
            typed: what stands in its standard input.
            parse: end as soon as its flags have been read.
        """
        job = dict(words=words, folder=str(folder), typed=typed, parse=parse)
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return Ended(*json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)

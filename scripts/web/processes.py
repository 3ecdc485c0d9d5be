"""Commands that the page starts: they run on when it is closed, and print into a file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from model.errors import UserError
from model.paths import ROOT
from trainer.report.run_state import OUTPUT

# What a training is stopped with, so that it saves first; on Windows SIGINT would kill it.
STOP = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)
BYTES_SHOWN = 8000  # of the end of what a process prints


class Process:
    """A Python script in a process of its own.

    Args:
        argv: the script and its flags; no shell sees them.
        output: the file for what it prints.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, argv: list[str], output: Path, folder: Path | str = ROOT):
        self.argv, self.output, self.started = argv, output, time.time()
        env = {**os.environ, "PYTHONUNBUFFERED": "1", OUTPUT: str(output.resolve())}
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with open(output, "wb") as file:
                self.popen = subprocess.Popen(
                    [sys.executable, *argv],
                    cwd=folder,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C in the page's terminal is not for it
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows
                )
        except OSError as error:
            reason = f"{error.filename or output}: {error.strerror}"
            raise UserError(f"{Path(argv[0]).name} does not start: {reason}") from error

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    @property
    def failed(self) -> bool:
        return self.popen.poll() not in (None, 0)

    def kill(self) -> None:
        """End it at once. Files that it has written are complete: they are written atomically."""
        self.popen.kill()
        self.popen.wait()


def last_lines(output: Path, count: int = 8) -> str:
    """The end of what a process has printed; of a progress bar, which overwrites its line, the last
    state. "" if there is no such file."""
    try:
        with open(output, "rb") as file:
            file.seek(max(0, output.stat().st_size - BYTES_SHOWN))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip("\r").split("\r")[-1].rstrip() for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-count:])

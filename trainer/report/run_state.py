"""What a run is doing, for whoever watches it: out/{name}.state.json, beside its log.

A process that is killed cannot say so. Its file still says "running", and `read_state` finds that
there is no such process any more.
"""

import json
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from trainer.common.checkpoint import Progress
from trainer.common.context import Context
from trainer.common.loop import Plan

INTERVAL = 2.0  # seconds between two writings
SILENCE = 600.0  # seconds after which a run of another machine counts as dead
OUTPUT = "MINIMIND_OUTPUT"  # environment: the file that the process prints to, if there is one


def process_started() -> float:
    """With its id, this tells the process from a later one of the same id."""
    return psutil.Process().create_time()


@dataclass
class RunState:
    """How far a run is, and the command that it runs by."""

    path: Path
    stage: str
    step: int = 0
    total_steps: int = 0
    done: float = 0.0  # share of the samples of all epochs
    done_before: float = 0.0  # by earlier processes of this run
    state: Literal["running", "stopped", "finished", "died"] = "running"
    argv: list[str] = field(default_factory=lambda: [*sys.argv])
    folder: str = field(default_factory=os.getcwd)
    world_size: int = 1
    output: str = field(default_factory=lambda: os.environ.get(OUTPUT, ""))
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    process_started: float = field(default_factory=process_started)
    started: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)

    def begin(self, ctx: Context, progress: Progress, plan: Plan) -> None:
        self.update(ctx, progress, plan)
        self.done_before = self.done
        self.write(ctx)

    def update(self, ctx: Context, progress: Progress, plan: Plan) -> None:
        """Tell how far the run is, every two seconds."""
        self.step, self.total_steps = progress.step, plan.total_steps
        self.done = progress.samples_seen / max(1, plan.total_samples)
        if time.time() - self.updated > INTERVAL:
            self.write(ctx)

    def end(self, ctx: Context, state: Literal["stopped", "finished"]) -> None:
        self.state = state
        self.write(ctx)

    def write(self, ctx: Context) -> None:
        """Replace the file. Unlike weights it is not synced: that would hold up the training. A
        full disk does not end the training either."""
        if not ctx.is_main:
            return
        self.updated, self.world_size = time.time(), ctx.world_size
        partial = self.path.with_name(f".{self.path.name}.partial")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(asdict(self) | {"path": str(self.path)}))
            os.replace(partial, self.path)

    @property
    def seconds_left(self) -> float | None:
        """At the speed so far, evaluations and saving included; None before it is known."""
        done = self.done - self.done_before
        if self.state != "running" or done <= 0:
            return None
        return (self.updated - self.started) * max(0.0, 1 - self.done) / done

    def is_alive(self) -> bool:
        """Whether its process runs; of another machine, whether it wrote lately."""
        if self.host != socket.gethostname():
            return time.time() - self.updated < SILENCE
        try:
            process = psutil.Process(self.pid)
            is_it = abs(process.create_time() - self.process_started) < 1
            return is_it and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def read_state(path: Path) -> RunState | None:
    """The state of a run; None if there is no such file, or one of another version."""
    try:
        found = RunState(**json.loads(path.read_text()) | {"path": path})
    except (OSError, ValueError, TypeError):
        return None
    if found.state == "running" and not found.is_alive():
        found.state = "died"
    return found

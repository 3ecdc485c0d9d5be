"""The trainings below some folders: their logs as curves, their states and samples."""

import threading
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
import streamlit as st

from model.errors import UserError
from trainer.report.log import LogReader, Record
from trainer.report.run_state import RunState, read_state

SUFFIX = ".metrics.jsonl"
SKIPPED_FOLDERS = {"trial"}  # the demo's measurement of speed
MAX_POINTS = 400  # of a curve
MAX_SAMPLES = 40
POSITION = ("step", "num_tokens", "seconds")  # where in the training a record stands


class FoundRun(NamedTuple):
    """A log, and how the page calls its run: by its path from the folder that it was found in."""

    label: str
    log: Path

    def beside(self, suffix: str) -> Path:
        """A file of the run, such as its .report.html."""
        return self.log.with_name(self.log.name.removesuffix(SUFFIX) + suffix)


@st.cache_data(ttl=3, show_spinner=False)
def find_runs(folders: tuple[str, ...]) -> list[FoundRun]:
    """All runs below the folders, the one that wrote last first."""
    found: dict[Path, tuple[float, FoundRun]] = {}
    for folder in map(Path, folders):
        for log in folder.rglob(f"*{SUFFIX}"):
            relative = log.relative_to(folder)
            if not SKIPPED_FOLDERS & set(relative.parts):
                label = str(relative).removesuffix(SUFFIX)
                if any(label == run.label for _, run in found.values()):  # in another folder
                    label = str(log).removesuffix(SUFFIX)
                found.setdefault(log.resolve(), (log.stat().st_mtime, FoundRun(label, log)))
    return [run for _, run in sorted(found.values(), reverse=True)]


@st.cache_data(ttl=10, show_spinner=False)
def find_reports(folders: tuple[str, ...]) -> list[Path]:
    """Report pages of whole pipelines. A run's own stands beside its log."""
    pages = (page for folder in folders for page in Path(folder).rglob("*report.html"))
    return [page for page in pages if not FoundRun("", log_of(page)).log.exists()]


def log_of(report: Path) -> Path:
    return report.with_name(report.name.removesuffix(".report.html") + SUFFIX)


class WatchedRun:
    """A run's log in memory, as columns, and its state. All visitors of the page share it."""

    def __init__(self, run: FoundRun):
        self.run, self.lock = run, threading.Lock()
        self.state: RunState | None = None
        self.reader = LogReader(run.log, "")
        self.error = ""
        self.version: tuple[int, int] = (0, 0)  # of the log, as last read
        self.clear()

    def clear(self) -> None:
        self.position = {name: array("d") for name in POSITION}  # of each record
        self.columns: dict[str, tuple[array, array]] = {}  # metric → its records, their values
        self.samples: list[Record] = []
        self.last: Record = {}  # the latest value of each metric
        self.finished = False

    def refresh(self) -> None:
        """Read what is new."""
        with self.lock:
            self.state = read_state(self.run.beside(".state.json"))
            try:
                about = self.run.log.stat()
                version = about.st_mtime_ns, about.st_size
                if version == self.version:
                    return
                name = self.run.log.name.split("_")[0]  # where no state says the stage
                self.reader.stage = self.state.stage if self.state else name
                records, anew = self.reader.read()
                self.error = ""
            except (OSError, UserError) as error:
                self.error = str(error)
                return
            if anew:
                self.clear()
            for record in records:
                self.add(record)
            self.version = version

    def add(self, record: Record) -> None:
        self.last |= {name: value for name, value in record.items() if value is not None}
        self.finished |= "changed_fraction" in record  # the last line of a finished run
        at = len(self.position["step"])
        for name, values in self.position.items():
            values.append(self.last.get(name, 0))
        if record.get("sample"):
            self.samples.append(record)
        for name, value in record.items():
            if isinstance(value, list):  # one for each layer: the largest
                value = max(value, default=None)
            if isinstance(value, int | float) and name not in POSITION:
                records, values = self.columns.setdefault(name, (array("L"), array("d")))
                records.append(at)
                values.append(value)

    @property
    def status(self) -> str:
        """running, stopped, finished or died; of a run without a state file, "" or finished."""
        if self.state:
            return self.state.state
        return "finished" if self.finished else ""

    def points(self, metric: str, axis: str) -> list[tuple[float, float]]:
        """(position, value) of a metric's curve over num_tokens, step or minutes, thinned out."""
        with self.lock:  # copies: an array of which there is a view cannot grow
            if metric not in self.columns:
                return []
            records, values = map(np.array, self.columns[metric])
            if axis == "minutes":
                x = np.array(self.position["seconds"])[records] / 60
            else:
                x = np.array(self.position[axis])[records]
        return thin_out(x, values)

    def samples_shown(self) -> list[Record]:
        """The latest sample and evenly spaced ones before it, the latest first."""
        step = -(-len(self.samples) // MAX_SAMPLES) or 1
        return self.samples[::-1][::step]


def thin_out(x: np.ndarray, y: np.ndarray, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """A curve of at most `limit` points. Each is the mean of its neighbours, so that a peak does
    not depend on which points are left; the last one stays as it is."""
    if len(x) > limit:
        ends = np.linspace(0, len(x) - 1, limit).astype(int)  # of the means; then the last point
        counts = np.diff(ends)
        means = (np.add.reduceat(v[:-1], ends[:-1]) / counts for v in (x, y))
        x, y = (np.append(mean, v[-1]) for mean, v in zip(means, (x, y), strict=True))
    return list(zip(x.tolist(), y.tolist(), strict=True))


@st.cache_resource(max_entries=64, show_spinner=False)
def watch(run: FoundRun) -> WatchedRun:
    return WatchedRun(run)

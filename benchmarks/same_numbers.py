"""Does a change of the code leave every number as it was? Both versions train, and are compared.

    python benchmarks/same_numbers.py --before main                    # against the working tree
    python benchmarks/same_numbers.py --before main --stage dpo grpo   # these trainers only
    python benchmarks/same_numbers.py --before v1 --after v2           # two commits

Both versions run the same command lines (tiny_trainings.py) on the same data, from the same
weights, which the version of --before makes: tiny models, a few steps, one thread, float32.
Compared are loss, gradient norm and every other metric of each line of the log; and, bit by bit,
the saved weights, those in float32, and the state of the optimizer.

In a "resumed" case the version of --before is interrupted, and the other one goes on from its
checkpoint: it must end where the former ends when nothing interrupts it.

A metric that is renamed on purpose is listed in tiny_trainings.py::RENAMED. The results of
--before are kept in --cache, so that they are computed once. Exit code 0: all is the same; 1:
something differs; 2: a mistake in the command.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import astuple, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tiny_trainings import (
    LONG,
    RENAMED,
    TRAINERS,
    Case,
    Training,
    cases,
    data,
    run_all,
    starting_weights,
)

from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(tempfile.gettempdir()) / "minimind_same_numbers"
# not compared: what depends on the machine, and which held-out prompt an evaluation shows
IGNORED = ("seconds", "tokens_per_second", "mfu", "memory_gb", "sample")
EXACT = ("loss", "eval_loss", "grad_norm")  # the others are rounded sums of this step's metrics


@dataclass
class Args:
    before: str = option("", "commit whose numbers are right")
    after: str = option("", "commit, or folder of a working tree; default: the one of this file")
    stage: list[str] = option([], "trainers, such as dpo grpo; default: all")
    jobs: int = option(2, "trainings side by side")
    keep: str = option("", "new folder for logs and weights of the trainings; default: deleted")
    cache: str = option(str(CACHE), "folder for the results of --before")

    def __post_init__(self) -> None:
        self.stage = self.stage or list(TRAINERS)
        for name in self.stage:
            if name not in TRAINERS:
                raise UserError(f"--stage {name} is unknown; there are {', '.join(TRAINERS)}")
        if not self.before:
            raise UserError("--before is missing: the commit whose numbers are right")
        if self.jobs < 1:
            raise UserError(f"--jobs must be at least 1, not {self.jobs}")
        if self.keep and Path(self.keep).exists():
            raise UserError(f"--keep {self.keep} exists already; name a new folder")


# -- versions --------------------------------------------------------------------------------------


def git(*words: str, folder: Path = ROOT) -> bytes:
    answer = subprocess.run(["git", "-C", str(folder), *words], capture_output=True)
    if answer.returncode:
        raise UserError(f"git {words[0]} in {folder}: {answer.stderr.decode().strip()}")
    return answer.stdout


def hash_of_commit(name: str) -> str:
    try:
        return git("rev-parse", "--verify", f"{name}^{{commit}}").decode().strip()
    except UserError as error:
        raise UserError(f"no commit {name} is found; `git log --oneline` lists them") from error


def copy_commit(commit: str, root: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(git("archive", commit))) as archive:
        archive.extractall(root)
    return root


def copy_worktree(folder: Path, root: Path) -> Path:
    """A working tree as it is now, so that work on it may go on meanwhile."""
    files = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=folder)
    for name in files.decode().split("\0")[:-1]:
        if (folder / name).is_file():  # a deleted one is listed too
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, root / name)
    return root


# -- comparing -------------------------------------------------------------------------------------


def is_same(name: str, before: Any, after: Any) -> bool:
    """Losses and gradient norms are equal; of other metrics the last digit may be rounded."""
    if name in EXACT or not all(isinstance(each, float) for each in (before, after)):
        return before == after
    return abs(before - after) < 1.5e-4


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The first difference between two results; "" if there is none."""
    for version, result in (("before", before), ("after", after)):
        if "failure" in result:
            return f"{version}: {result['failure']}"
    for old, new in zip_longest(before["records"], after["records"]):
        if old is None or new is None:
            lines = (len(result["records"]) for result in (before, after))
            return "lines of the log: {} → {}".format(*lines)
        for name, value in old.items():
            names = RENAMED.get(name, name).split()
            if name in IGNORED or not names:
                continue
            # its own name too, for two versions that are both older than the new one
            found = next((new[each] for each in [*names, name] if each in new), "none")
            if not is_same(name, value, found):
                return f"step {old['step']}: {name} {value} → {found}"
    for kind in ("weights", "float32 weights", "optimizer's state"):
        if before[kind] != after[kind]:
            return f"{kind} at the end, not seen in the log"
    return ""


def results(args: Args, folder: Path) -> list[tuple[str, dict, dict]]:
    """The name of each case, and what it gives before and after; all files are in `folder`."""
    commit = hash_of_commit(args.before)
    before = copy_commit(commit, folder / "code before")
    if not args.after or Path(args.after).is_dir():
        after = copy_worktree(Path(args.after or ROOT), folder / "code after")
    else:
        after = copy_commit(hash_of_commit(args.after), folder / "code after")
    chosen = cases(args.stage)
    resumed = [case for case in chosen if case.variant == "resumed"]
    files = {}  # what the flags of cases name
    for name, rows in data().items():
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )

    def training(case: Case, version: Path, side: str, **more: Any) -> Training:
        return Training(case, version, folder / side / case.name, files, **more)

    # what the version before makes for both
    starts = [training(case, before, "start") for case in starting_weights()]
    starts *= any("{weights}" in case.flags for case in chosen)
    halves = [training(case, before, "after", stop_after=2) for case in resumed]
    run_all(starts, args.jobs, "starting weights")
    for start in starts:
        files[start.case.variant] = str(next(start.folder.glob("out/*.pth"), ""))
    run_all(halves, args.jobs, "interrupted runs")
    for each in starts + halves:
        if failure := each.failure():
            raise UserError(f"--before {args.before} fails: {each.case.name}: {failure}")
        if each in halves and each.metrics().count('"loss"') == LONG:
            print(f"{each.case.name}: it was too fast to be interrupted, so this shows nothing")

    cache = Path(args.cache) / f"{commit}-{fingerprint()}.json"
    known = json.loads(cache.read_text(encoding="utf-8")) if cache.exists() else {}
    old = [training(case, before, "before") for case in chosen if case.name not in known]
    new = [training(case, after, "after", resume=case in resumed) for case in chosen]
    run_all(old + new, args.jobs, "trainings")
    known |= {each.case.name: each.result() for each in old}
    remember({name: each for name, each in known.items() if "failure" not in each}, cache)
    return [(each.case.name, known[each.case.name], each.result()) for each in new]


def fingerprint() -> str:
    """Of what the results of a commit depend on besides."""
    listed = [astuple(case) for case in [*starting_weights(), *cases(list(TRAINERS))]]
    text = json.dumps([data(), listed, torch.__version__, transformers.__version__])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def remember(known: dict[str, Any], cache: Path) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(known), encoding="utf-8")
    temporary.replace(cache)


def main(args: Args) -> dict[str, str]:
    """The first difference of each case; "" where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        compared = results(args, Path(args.keep or folder).resolve())
    table = Table()
    for column in ("case", "steps", "last loss", "weights", f"as in {args.before}?"):
        table.add_column(column)
    differences = {name: difference(before, after) for name, before, after in compared}
    for name, _, after in compared:
        losses = [record for record in after.get("records", []) if "loss" in record] or [{}]
        weights = hashlib.sha256(json.dumps(after.get("weights")).encode()).hexdigest()[:8]
        verdict = differences[name].partition("\n")[0]
        cells = (str(losses[-1].get("step", "")), str(losses[-1].get("loss", "")), weights)
        table.add_row(name, *cells, f"DIFFERS: {verdict}" if verdict else "same")
    Console().print(table)
    for name, told in differences.items():
        if "\n" in told:  # the log of a training that failed
            print(f"{name}: {told}")
    print(f"{sum(map(bool, differences.values()))} of {len(compared)} cases differ")
    there = {path.stem.removeprefix("train_") for path in (ROOT / "trainer").glob("train_*.py")}
    if unknown := there - set(TRAINERS):
        print(f"not compared, as tiny_trainings.py has no flags for it: {', '.join(unknown)}")
    return differences


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(1 if any(main(parse_arguments(Args, __doc__)).values()) else 0)

"""Installs engines and clients, each in an environment of its own, and runs their tests.

    python tests/engines/run.py [--engine vllm openai] [--install 0]        (make engines)

engines.toml has the list. An engine's environment holds the engine alone, since engines need other
versions of torch and transformers than MiniMind and each other: the tests run in the project's
environment and start the engine's programs from there (conftest.py). The table at the end has what
was tried, with which version and when; engines that were not run this time keep their row.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENGINES = tomllib.loads((HERE / "engines.toml").read_text(encoding="utf-8"))
HEADER = "| engine | version | tried | result | date |\n|---|---|---|---|---|"
ROW = "result.json"  # in an engine's folder: its row of the table


@dataclass
class Args:
    engine: list[str] = option(list(ENGINES), "engines and clients of engines.toml; default: all")
    folder: str = option(str(ROOT / ".engines"), "where their environments are made")
    install: bool = option(True, "install what is missing; 0: run those that are installed")

    def __post_init__(self) -> None:
        for name in self.engine:
            if name not in ENGINES:
                raise UserError(f"there is no engine {name}; there is {', '.join(ENGINES)}")


def install(name: str, folder: Path) -> None:
    """Make an engine's environment. CalledProcessError if it cannot be installed."""
    about = ENGINES[name]
    python = folder / "bin" / "python"
    if packages := about.get("requirements"):
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "-q", "--no-compile"]
        subprocess.run([*pip, *packages], check=True)
    if packages := about.get("npm"):
        folder.mkdir(parents=True, exist_ok=True)
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder]
        subprocess.run([*npm, *packages], check=True)
    for command in about.get("after", ()):
        subprocess.run([python, *shlex.split(command)], cwd=HERE, check=True)


def version(name: str, folder: Path) -> str:
    about = ENGINES[name]
    first = [*about.get("requirements", ()), *about.get("npm", ())][0]
    package = about.get("version_of") or first.split(">")[0].split("=")[0].split("[")[0]
    manifest = folder / "node_modules" / package / "package.json"
    if manifest.exists():
        return f"{package} {json.loads(manifest.read_text(encoding='utf-8'))['version']}"
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    words = [folder / "bin" / "python", "-c", code]
    return f"{package} " + subprocess.run(words, capture_output=True, text=True).stdout.strip()


def run_tests(name: str, folder: Path) -> str:
    """Run an engine's tests; how many passed."""
    (file,) = HERE.rglob(f"test_{name}.py")
    report = folder / "report.xml"
    words = [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run(words, cwd=ROOT, env={**os.environ, "ENGINES_FOLDER": str(folder.parent)})
    counts = ElementTree.parse(report).getroot().find("testsuite").attrib  # type: ignore[union-attr]
    tests, skipped = int(counts["tests"]), int(counts["skipped"])
    failed = int(counts["failures"]) + int(counts["errors"])
    text = f"{tests - failed - skipped} of {tests} tests passed"
    return text + (f", {skipped} skipped" if skipped else "")


def try_engine(name: str, folder: Path, may_install: bool) -> dict[str, str]:
    """The row of an engine after its tests have run."""
    row = {"engine": ENGINES[name].get("title", name), "version": "", "date": str(date.today())}
    row |= {"tried": ENGINES[name]["tried"]}
    try:
        if may_install and not (folder / ROW).exists():  # a row: it was installed completely
            install(name, folder)
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        return row | {"result": f"not installed: {error}"}
    if not folder.exists():
        return row | {"result": "not installed"}
    row |= {"version": version(name, folder), "result": run_tests(name, folder)}
    (folder / ROW).write_text(json.dumps(row), encoding="utf-8")
    return row


def main(args: Args) -> bool:
    """Try the engines and print the table. Whether all of them passed all tests."""
    folder = Path(args.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: try_engine(name, folder / name, args.install) for name in args.engine}
    print(HEADER)
    for name in ENGINES:
        if (kept := folder / name / ROW).exists():
            rows.setdefault(name, json.loads(kept.read_text(encoding="utf-8")))
        if name in rows:
            cells = (rows[name][key] for key in ("engine", "version", "tried", "result", "date"))
            print(f"| {' | '.join(cells)} |")
    return all(re.fullmatch(r"(\d+) of \1 tests passed", row["result"]) for row in rows.values())


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(not main(parse_command_line(Args, __doc__)))

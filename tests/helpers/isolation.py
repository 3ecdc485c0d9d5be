"""Keeps the tests apart from the machine they run on: no settings of its user, no files outside.

Importing this module gives the process, and with it all that it starts, a home folder that lasts as
long as the tests do. Libraries keep their caches, logins and settings there, and read where it is
when they are imported: conftest imports this module first.
"""

import atexit
import os
import shutil
import site
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
# What would let a user's own settings in: other folders, logins, addresses, ranks.
SETTINGS = (
    "HF_",
    "XDG_",
    "MODELSCOPE_",
    "OPENAI_",
    "STREAMLIT_",
    "SWANLAB_",
    "WANDB_",
    "MINIMIND_",
)
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What changes while the tests run and is not their doing.
NOT_OURS = {".git", ".venv", ".engines", ".pytest_cache", ".ruff_cache", ".idea", ".vscode"}
NOT_OURS |= {"__pycache__"}
EDITED = {".md", ".py", ".toml", ".yml"}  # by a person who goes on working meanwhile


def is_worker() -> bool:
    """Whether this is one of the processes of pytest-xdist, which share the first one's home."""
    return "PYTEST_XDIST_WORKER" in os.environ


def move_home() -> None:
    for name in [*os.environ]:
        if name.startswith(SETTINGS) or name in RANKS:
            del os.environ[name]
    os.environ["PYTHONUSERBASE"] = site.getuserbase()  # what `pip install --user` has installed
    home = tempfile.mkdtemp(prefix="minimind_home_")
    atexit.register(remove_home, home, os.getpid())
    os.environ["HOME"] = home
    # git reads a folder of another user, as the project is in some containers, only if told to
    Path(home, ".gitconfig").write_text(f"[safe]\n\tdirectory = {PROJECT}\n")
    os.environ["MINIMIND_CACHE"] = os.path.join(home, "minimind")
    # no proxy between tests and the servers that they start
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "localhost,127.0.0.1"


def remove_home(home: str, process: int) -> None:
    if os.getpid() == process:  # and not a forked one
        shutil.rmtree(home, ignore_errors=True)


def project_files() -> dict[Path, tuple[int, int]]:
    """Size and time of each file of the project; folders stand there with zeros."""
    seen = {}
    for folder, folders, files in os.walk(PROJECT):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        seen.update({Path(folder, name): (0, 0) for name in folders})
        for path in (Path(folder, name) for name in files):
            if path.exists():
                stat = path.stat()
                seen[path] = stat.st_size, stat.st_mtime_ns
    return seen


def written(before: dict[Path, tuple[int, int]]) -> list[Path]:
    """What of the project is new, gone or changed since; a text that was there may be edited."""
    now = project_files()
    differ = (path for path in {*before, *now} if before.get(path) != now.get(path))
    return sorted(
        path for path in differ if not (path in before and path in now and path.suffix in EDITED)
    )


if not is_worker():
    move_home()

"""wandb, SwanLab and trackio: a copy of the log in a browser, or in a folder. None is needed.

trackio is local: it writes below --save_dir, and needs neither login nor network. So do the others
with WANDB_MODE=offline and SWANLAB_MODE=offline; `wandb sync` and `swanlab sync` send it later.
"""

import importlib
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from model.errors import UserError

QUIET = {
    "WANDB_CONSOLE": "off",  # neither of them needs to record what is printed
    "SWANLAB_TERMINAL_PROXY_TYPE": "none",
    "WANDB_ERROR_REPORTING": "false",  # it would look for a server even when offline
    "WANDB_INIT_TIMEOUT": "20",  # 90 seconds are long where there is no network
}
REMOTE_TRACKIO = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


def start_tracker(args: Any, run_name: str, run_id: str | None) -> tuple[Any, str]:
    """The tracker's module and the id that it logs under: a new one, or `run_id`, so that a run
    that goes on after --resume goes on there too.

    Raises:
        UserError: it is not installed, or does not start (nobody is logged in, say).
    """
    name, folder = args.tracker, Path(args.save_dir)
    settings = {
        "wandb": dict(id=run_id, resume="allow", dir=folder),
        "swanlab": dict(id=run_id, resume="allow", log_dir=folder / "swanlog"),
        # It resumes by name: the latest run that has it. The metrics of the machine stay away.
        "trackio": dict(
            resume="allow" if run_id else "never", auto_log_cpu=False, auto_log_gpu=False
        ),
    }
    for variable, value in (QUIET | {"TRACKIO_DIR": str(folder.resolve() / "trackio")}).items():
        os.environ.setdefault(variable, value)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        tracker = importlib.import_module(name)
        with local_trackio() if name == "trackio" else nullcontext():
            started = tracker.init(
                project=args.wandb_project, name=run_name, config=asdict(args), **settings[name]
            )
    except ImportError as error:
        raise UserError(
            f"--tracker {name} is not installed, or not completely ({error}); `pip install {name}`"
        ) from error
    except Exception as error:  # of many kinds: neither has one class for all of its errors
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"--tracker {name} does not start: {reason}; log in with `{name} login`, or set "
            f"{name.upper()}_MODE=offline, or leave --use_wandb away"
        ) from error
    # SwanLab's own handler would close its log at the first Ctrl-C, before the last step
    signal.signal(signal.SIGINT, on_interrupt)
    if name == "trackio":
        command = f"trackio show --project {shlex.quote(args.wandb_project)}"
        print(f"tracker: TRACKIO_DIR={shlex.quote(os.environ['TRACKIO_DIR'])} {command}")
    return tracker, started.id


@contextmanager
def local_trackio() -> Iterator[None]:
    """Start trackio without network: it would ask the hub for the name of whoever is logged in
    there. What it prints would not find the folder below --save_dir."""
    if any(os.environ.get(name) for name in REMOTE_TRACKIO):  # the user wants it elsewhere
        yield
        return
    with redirect_stdout(StringIO()), patch("huggingface_hub.whoami", side_effect=OSError):
        yield

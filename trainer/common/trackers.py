"""wandb and SwanLab: a copy of the log in a browser, or (offline) in a folder. Neither is needed.

WANDB_MODE=offline and SWANLAB_MODE=offline write below --save_dir and need neither login nor
network; `wandb sync` and `swanlab sync` send it later.
"""

import importlib
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.errors import UserError

QUIET = {
    "WANDB_CONSOLE": "off",  # neither of them needs to record what is printed
    "SWANLAB_TERMINAL_PROXY_TYPE": "none",
    "WANDB_ERROR_REPORTING": "false",  # it would look for a server even when offline
    "WANDB_INIT_TIMEOUT": "20",  # 90 seconds are long where there is no network
}


def start_tracker(args: Any, run_name: str, run_id: str | None) -> tuple[Any, str]:
    """The tracker's module and the id that it logs under: a new one, or `run_id`, so that a run
    that goes on after --resume goes on there too.

    Raises:
        UserError: it is not installed, or does not start (nobody is logged in, say).
    """
    name, folder = args.tracker, Path(args.save_dir)
    where = {"dir": folder} if name == "wandb" else {"log_dir": folder / "swanlog"}
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        tracker = importlib.import_module(name)
        started = tracker.init(
            project=args.wandb_project,
            name=run_name,
            config=asdict(args),
            id=run_id,
            resume="allow",
            **where,
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
    return tracker, started.id

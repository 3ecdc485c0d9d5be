"""A trainer as a command: what ends it, how, and with which exit code."""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch.distributed as dist

from model.command_line import parse_arguments
from model.errors import UserError, exit_on_user_error
from model.presets import with_preset
from trainer.common.hardware import is_oom
from trainer.common.recipes import with_recipe

WORKER_DIED = (BrokenProcessPool, ConnectionError, EOFError)


def run_trainer(main: Callable[[Any], Any], args_class: type, about: str | None) -> None:
    """The command line of a trainer: parse and train; a mistake or an accident ends it with one
    sentence and exit code 2, and no process group is left behind."""
    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    code = 1
    try:
        with exit_on_user_error():
            try:
                argv = with_preset(with_recipe(sys.argv[1:], args_class))
                main(parse_arguments(args_class, about, argv))
                code = 0
            except (OSError, RuntimeError, EOFError) as error:
                ignore_dead_workers()
                failure = explain_failure(error)
                if failure is None:
                    raise
                raise failure from error
            except UserError:
                if distributed and os.environ.get("RANK") != "0":
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    time.sleep(3)  # most likely all processes see it: the first one tells it
                raise
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        print("stopped at once, nothing saved", file=sys.stderr)
        code = 130  # as shells have it
    except Exception:
        if not distributed:
            raise
        traceback.print_exc()
    if (
        code and distributed
    ):  # a thread that waits for a dead process would keep this one from ending
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        sys.exit(code)


def ignore_dead_workers() -> None:
    """Stop PyTorch's SIGCHLD handler, which would raise the same error again wherever the program
    is by then."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def explain_failure(error: Exception) -> UserError | None:
    """A sentence for a failure that is no bug (full disk, dead worker, out of memory); None for a
    bug, whose traceback is shown."""
    text, go_on = str(error), "--resume goes on from the last checkpoint"
    # a worker that dies breaks the pipe, or is noticed by the DataLoader or the pool, as it happens
    if "DataLoader worker" in text or isinstance(error, WORKER_DIED):
        return UserError(
            "a process that prepares data was killed, most likely for want of memory; try "
            f"--num_workers 0, and {go_on}"
        )
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return UserError(
                f"the disk is full ({error.filename or error}); make room, and {go_on}"
            )
        return UserError(f"{error.filename or 'a file'}: {error.strerror or error}; {go_on}")
    if is_oom(error):
        return UserError(
            "out of memory; try a smaller --batch_size with more --accumulation_steps, "
            "--gradient_checkpointing 1, or a smaller model"
        )
    if isinstance(error, dist.DistError) or "/gloo/" in text or "NCCL" in text:
        return UserError(
            "another process of this training has died, so this one ends too; what that one said "
            f"tells why, and {go_on}"
        )
    return None

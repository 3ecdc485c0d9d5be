"""A trainer as a command: what ends it, how, and with which exit code. Imports nothing slow."""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from model.command_line import (
    Arguments,
    check_files,
    parse_arguments,
)
from model.errors import UserError, exit_on_user_error
from model.presets import with_preset
from trainer.report.recipes import with_recipe

WORKER_DIED = (BrokenProcessPool, ConnectionError, EOFError)


def parse_trainer(args_class: type[Arguments], about: str | None) -> Arguments:
    """The command line of a trainer, with the flags of its --recipe; a mistake ends it with one
    sentence and exit code 2."""
    with exit_on_user_error(), told_once():
        return trainer_arguments(args_class, sys.argv[1:], about)


def trainer_arguments(
    args_class: type[Arguments], argv: list[str], about: str | None = None
) -> Arguments:
    """The arguments in a trainer's command line, with the flags of its --recipe. UserError for a
    mistake, and for a file that is not there."""
    args = parse_arguments(args_class, about, with_preset(with_recipe(argv, args_class)))
    check_files(args)
    return args


@contextmanager
def told_once() -> Iterator[None]:
    """Of torchrun's processes, most likely all of which see a mistake, the first one tells it."""
    try:
        yield
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        raise


def run_trainer(main: Callable[[Any], Any], args: Any) -> None:
    """Train; a mistake or an accident ends it with one sentence and exit code 2, and no process
    group is left behind."""
    import torch.distributed as dist

    distributed = int(os.environ.get("WORLD_SIZE", 1)) > 1
    code = 1
    try:
        with exit_on_user_error(), told_once():
            try:
                main(args)
                code = 0
            except (OSError, RuntimeError, EOFError) as error:
                ignore_dead_workers()
                failure = explain_failure(error)
                if failure is None:
                    raise
                raise failure from error
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
    import torch.distributed as dist

    from trainer.common.hardware import is_oom

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

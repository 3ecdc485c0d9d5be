"""A trainer as a command: what ends it, how, and with which exit code. Imports nothing slow."""

import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
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
    try:
        with exit_on_user_error(), told_once():
            return trainer_arguments(args_class, sys.argv[1:], about)
    finally:
        stay_for_other_ranks()


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
    except UserError as error:
        tell_other_ranks(str(error))
        if os.environ.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(FIRST_RANK_SECONDS)
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
        tell_other_ranks("stopped at once")
        code = 130  # as shells have it
    except Exception as error:
        if not distributed:
            raise
        traceback.print_exc()
        tell_other_ranks(f"{type(error).__name__}: {error}")
    if (
        code and distributed
    ):  # a thread that waits for a dead process would keep this one from ending
        sys.stdout.flush()
        sys.stderr.flush()
        stay_for_other_ranks()
        os._exit(code if isinstance(code, int) else 1)
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        sys.exit(code)


# -- several machines ------------------------------------------------------------------------------
# torchrun ends the processes of its own machine when one of them fails; those of the others would
# wait for it, for half an hour. So a rank that fails says so in the store where the ranks find each
# other, and every rank looks there.

POLL_SECONDS = 0.5
TELL_SECONDS = 10.0  # a rank that fails early tries so long to reach the store
FIRST_RANK_SECONDS = 4.0  # after which torchrun has ended the others, if rank 0 saw it too
MEET_SECONDS = 10.0  # a rank may start so much later than rank 0, which has failed already
FAILED = f"minimind/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
KNOWN = f"{FAILED}/known"  # how many ranks know it, the failed one included
ended_here = threading.Event()  # this rank has failed itself, and says so itself
stores: list[Any] = []  # this rank's connection, if it has one; a store ends with its host's object


def rank_store(seconds: float, may_host: bool = False) -> Any:
    """A connection to the store of the ranks. Without torchrun rank 0 has it in its own process,
    and may fail before it has one (may_host)."""
    from datetime import timedelta

    import torch.distributed as dist

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=seconds)
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if may_host and os.environ.get("RANK") == "0" and not by_torchrun:
        with suppress(RuntimeError):  # in use: init_process_group has made it
            return dist.TCPStore(
                host, port, is_master=True, timeout=timeout, wait_for_workers=False
            )
    return dist.TCPStore(host, port, is_master=False, timeout=timeout)


def tell_other_ranks(sentence: str) -> None:
    """Let the other ranks know that this one ends."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or ended_here.is_set():
        return
    ended_here.set()
    with suppress(Exception):  # the ranks have not met, or their store is gone
        if not stores:
            stores.append(rank_store(TELL_SECONDS, may_host=True))
        stores[0].set(FAILED, f"rank {os.environ['RANK']} has ended: {sentence}")
        stores[0].add(KNOWN, 1)


def stay_for_other_ranks() -> None:
    """Rank 0, whose store may end with it, stays until the others have looked there. Only after it
    has said what was wrong: torchrun may end it at once."""
    if not ended_here.is_set() or os.environ.get("RANK") != "0":
        return
    met = "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()
    end = time.monotonic() + (2 * POLL_SECONDS if met else MEET_SECONDS)
    with suppress(Exception):
        while stores[0].add(KNOWN, 0) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < end:
            time.sleep(POLL_SECONDS / 5)


def end_with_other_ranks() -> None:
    """Watch, in the background, for a rank that fails; its sentence ends this one too."""
    threading.Thread(target=watch_other_ranks, daemon=True).start()


def watch_other_ranks() -> None:
    sentence = "the first machine has ended"
    try:
        time.sleep(POLL_SECONDS)
        store = rank_store(seconds=600)
        stores.append(store)
        while not store.check([FAILED]):
            time.sleep(POLL_SECONDS)
        sentence = store.get(FAILED).decode()
        if not ended_here.is_set():  # else this rank is counted already
            store.add(KNOWN, 1)
    except Exception:
        time.sleep(10)  # the store is gone: at the end of a training they all go
    if not ended_here.is_set():
        from tqdm import tqdm

        tqdm.write(f"error: {sentence}", file=sys.stderr)  # below the progress bar, not in its line
        sys.stderr.flush()
        os._exit(2)


# -- what is no bug --------------------------------------------------------------------------------


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

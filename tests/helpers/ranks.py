"""Trainers in several processes, as torchrun starts them."""

import os
import secrets
import socket
import sys
from contextlib import suppress

from toy import Trainer, ended, flags, fork, run_stage


def start_ranks(train: Trainer, ranks: int, **settings) -> list[int]:
    """The trainer's command line in so many processes, as torchrun would start them; returns
    their ids. What rank r says is in the file log{r}."""
    port = str(free_port())

    def start(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
        sys.argv = ["train", *flags(train.settings(**settings))]
        run_stage(train.stage)

    logs = [train.folder / f"log{rank}" for rank in range(ranks)]
    return [fork(lambda rank=rank: start(rank), log) for rank, log in enumerate(logs)]


def free_port() -> int:
    """A port that nobody listens on. Below those that the system hands out (from 32768 on, on
    Linux): one of them might be another test's by the time the ranks meet there."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", port))
            return port


def together(train: Trainer, ranks: int, **settings) -> None:
    """Run the trainer in so many processes to its end."""
    for rank, process in enumerate(start_ranks(train, ranks, **settings)):
        assert ended(process) == 0, (train.folder / f"log{rank}").read_text()


def errors(train: Trainer, rank: int) -> list[str]:
    """What a rank complained of; a traceback is one complaint more."""
    log = train.folder / f"log{rank}"
    said = log.read_text() if log.exists() else ""  # it may have been ended before it said a word
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("error: ")]


def metrics_of(train: Trainer, name: str) -> list[tuple]:
    return [
        tuple(
            record.get(key, 0.0) for key in ("step", "num_tokens", "loss", "grad_norm", "eval_bpb")
        )
        for record in train.log(name, "step")
    ]

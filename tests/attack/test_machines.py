"""Several machines, each with files of its own: two ranks that share no folder."""

import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ranks import free_port
from toy import TEXTS, Trainer, assert_close, ended, flags, fork, run_stage, text_file

pytestmark = [pytest.mark.usefixtures("in_a_hurry"), pytest.mark.slow]


def machines(train: Trainer, *settings: dict) -> tuple[list[int], list[str], float]:
    """The trainer on so many machines, each with its settings: exit codes, what each said, and
    seconds until all have ended."""
    port = str(free_port())

    def start(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(len(settings)))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
        sys.argv = ["train", *flags(settings[rank])]
        run_stage(train.stage)

    logs = [train.folder / f"machine{rank}" for rank in range(len(settings))]
    started = time.monotonic()
    processes = [fork(lambda rank=rank: start(rank), log) for rank, log in enumerate(logs)]
    codes = [ended(process, 120) for process in processes]
    said = [log.read_text() for log in logs]
    assert not any("Traceback" in each for each in said), said
    return codes, said, time.monotonic() - started


@pytest.fixture
def stopped(train, killed) -> Trainer:
    """A run on one machine, "one", and the same stopped after the second step, "a"."""
    train.data = text_file(train.folder / "few.jsonl", TEXTS[:12])
    common = dict(batch_size=4, max_steps=3, save_interval=1)
    train("one", **common)
    killed(2, train, "a", **common)
    return train


COMMON = dict(batch_size=2, max_steps=3, save_interval=1, resume=True)


def test_the_checkpoint_of_the_first_machine_is_handed_over(stopped):
    first, second = (stopped.settings(name, **COMMON) for name in ("a", "b"))
    codes, said, _ = machines(stopped, first, second)
    assert codes == [0, 0], said
    assert "rank 0 hands pretrain_32.checkpoint.pt over" in said[0]
    assert_close(stopped.saved("a")["model"], stopped.saved("one")["model"])
    losses = [[record["loss"] for record in stopped.log(name)] for name in ("a", "one")]
    np.testing.assert_allclose(*losses, atol=2e-4)


def test_a_checkpoint_on_the_second_machine_alone_ends_both(stopped):
    first, second = (stopped.settings(name, **COMMON) for name in ("b", "a"))
    codes, said, seconds = machines(stopped, first, second)
    assert codes == [2, 2] and seconds < 60
    assert "rank 1 has the checkpoint" in said[0]


def test_a_damaged_checkpoint_on_one_machine_ends_both(stopped):
    shutil.copytree(stopped.folder / "a", stopped.folder / "b")
    path = stopped.checkpoint("b")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    first, second = (stopped.settings(name, **COMMON) for name in ("a", "b"))
    codes, said, seconds = machines(stopped, first, second)
    assert codes == [2, 2] and seconds < 60
    assert "is damaged: its content is not what was written" in said[0]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("lacks", ["data_path", "from_weight"])
def test_a_machine_without_its_files_ends_both_within_seconds(stopped, lacks, rank):
    nowhere = ["nowhere.jsonl"] if lacks == "data_path" else "nowhere.pth"
    settings = [stopped.settings(name, batch_size=2, max_steps=3) for name in ("x", "y")]
    settings[rank][lacks] = nowhere
    codes, said, seconds = machines(stopped, *settings)
    assert codes == [2, 2] and seconds < 40
    assert all("nowhere" in each for each in said), said


def test_other_data_on_one_machine_end_both(stopped):
    settings = [stopped.settings(name, batch_size=2, max_steps=3) for name in ("x", "y")]
    settings[1]["data_path"] = [text_file(Path(stopped.folder) / "other.jsonl", TEXTS[3:15])]
    codes, said, seconds = machines(stopped, *settings)
    assert codes == [2, 2] and seconds < 60
    assert "rank 1 has another data than rank 0" in said[0]


def test_torchrun_on_two_machines_goes_on_as_one_process_would(stopped, shell):
    """By two agents, as torchrun is started on two machines; only the first has the checkpoint."""
    meeting = f"--nnodes 2 --nproc_per_node 1 --master_addr localhost --master_port {free_port()}"
    agents = []
    for rank, name in enumerate("ab"):
        words = ["-m", "torch.distributed.run", *meeting.split(), f"--node_rank={rank}"]
        settings = flags(stopped.settings(name, **COMMON))
        agents.append(shell(*words, "trainer/train_pretrain.py", *settings))
    said = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert_close(stopped.saved("a")["model"], stopped.saved("one")["model"])
    losses = [[record["loss"] for record in stopped.log(name)] for name in ("a", "one")]
    np.testing.assert_allclose(*losses, atol=2e-4)

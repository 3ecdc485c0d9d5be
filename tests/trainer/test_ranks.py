"""Several processes train as one."""

import json
import os

import numpy as np
import pytest
from ranks import metrics_of, start_ranks, together
from torch.nn.parallel import DistributedDataParallel
from toy import Trainer, assert_close, ended

from trainer import train_full_sft, train_pretrain
from trainer.common import loop
from trainer.trainer_utils import Run

pytestmark = [pytest.mark.usefixtures("in_a_hurry"), pytest.mark.slow]


@pytest.mark.parametrize(
    ("ranks", "batch_size", "accumulation_steps", "batch_ramp"),
    [(1, 1, 4, 0), (2, 1, 2, 0), (2, 2, 1, 0), (3, 1, 2, 0), (2, 2, 1, 2)],
)
def test_however_a_window_is_shared_out_the_training_is_the_same(
    any_stage, windows, monkeypatch, ranks, batch_size, accumulation_steps, batch_ramp
):
    train, window = any_stage, ranks * batch_size * accumulation_steps
    monkeypatch.setattr(loop, "INITIAL_BATCH_TOKENS", 2)  # tokens, so a row
    windows["batch_ramp"] = batch_ramp
    train("one", batch_size=window, **windows)
    shape = dict(batch_size=batch_size, accumulation_steps=accumulation_steps)
    together(train, ranks, **windows, **shape)
    assert_close(train.saved()["model"], train.saved("one")["model"])
    np.testing.assert_allclose(metrics_of(train, "a"), metrics_of(train, "one"), atol=2e-4)
    assert len(train.saved()["rng_states"]) == ranks


@pytest.mark.parametrize("stage", [train_pretrain, train_full_sft])
def test_packed_rows_too(tmp_path, stage):
    """What users train with: packed rows, Muon, steps that grow."""
    train = Trainer(tmp_path, stage)
    settings = dict(packing=True, max_seq_len=24, batch_ramp=4, epochs=2, save_interval=1)
    train("one", batch_size=4, **settings)
    together(train, 2, batch_size=2, **settings)
    assert len(metrics_of(train, "a")) > 2
    assert_close(train.saved()["model"], train.saved("one")["model"])
    np.testing.assert_allclose(metrics_of(train, "a"), metrics_of(train, "one"), atol=2e-4)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 3)])
def test_a_run_goes_on_with_another_number_of_processes(
    any_stage, windows, monkeypatch, first, then
):
    """The window is 6 rows throughout, so that the whole run is that of one process."""
    train = any_stage
    shape = {n: dict(batch_size=1, accumulation_steps=6 // n) for n in (1, 2, 3)}
    train("one", **shape[1], **windows)
    update = Run.update
    with monkeypatch.context() as patch:
        patch.setattr(
            Run,
            "update",
            lambda run, *a: os.kill(os.getpid(), 9) if run.step == 2 else update(run, *a),
        )
        for process in start_ranks(train, first, **shape[first], **windows):
            assert ended(process) != 0
    assert train.saved()["progress"]["step"] == 1
    together(train, then, **shape[then], **windows, resume=True)
    assert_close(train.saved()["model"], train.saved("one")["model"])
    np.testing.assert_allclose(metrics_of(train, "a"), metrics_of(train, "one"), atol=2e-4)
    assert (
        train.saved()["progress"]["samples_seen"] == train.saved("one")["progress"]["samples_seen"]
    )


def test_gradients_travel_once_an_update(any_stage, windows, monkeypatch):
    """With the last micro-batch of a window; the others stay on their rank."""
    forward, finish, travel = DistributedDataParallel.forward, Run.finish, []

    def watched(model, *args, **more):
        travel.append(model.require_backward_grad_sync)
        return forward(model, *args, **more)

    def tell(run):
        (any_stage.folder / f"travel{run.ctx.rank}").write_text(json.dumps(travel))
        return finish(run)

    monkeypatch.setattr(DistributedDataParallel, "forward", watched)
    monkeypatch.setattr(Run, "finish", tell)
    together(any_stage, 2, batch_size=1, accumulation_steps=3, epochs=1)
    for rank in (0, 1):  # 7 rows are a window of 6 and one of 1
        seen = json.loads((any_stage.folder / f"travel{rank}").read_text())
        assert seen == [False, False, True, True]

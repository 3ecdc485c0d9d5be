"""--minutes: the size and the steps that fit a given time."""

import time
from types import SimpleNamespace

import pytest
from toy import TINY, Trainer, everything, logged, same

from dataset.sampler import GlobalBatchSampler
from model.errors import UserError
from model.model_minimind import MiniMindConfig
from model.weights import load_tokenizer
from trainer import train_full_sft
from trainer.common import compute_optimal
from trainer.common.checkpoint import Progress
from trainer.common.compute_optimal import ScalingLaw, Speed, lowest
from trainer.common.context import Context
from trainer.common.hardware import flops_per_token
from trainer.common.loop import Plan, fit_minutes
from trainer.common.metrics import Accumulator
from trainer.trainer_utils import Run

pytestmark = pytest.mark.usefixtures("in_a_hurry")

TINY_SIZES = [(16, 1), (16, 2), (32, 2), (64, 2), (64, 4), (128, 4)]
NO_SIZES = dict.fromkeys(
    ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
)


# -- the law ---------------------------------------------------------------------------------------


def test_chinchillas_law():
    """Hoffmann et al.'s own numbers: 70B parameters and 1.4T tokens have 1.94 nats a token."""
    law = ScalingLaw(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
    assert law.loss(70e9, 1.4e12) == pytest.approx(1.69 + 0.0836 + 0.1627, abs=1e-3)


def test_repeated_tokens_count_less():
    """Four epochs are nearly as good as new data, forty are far from it (arXiv 2305.16264)."""
    law = ScalingLaw(E=0, A=0, alpha=1, B=1, beta=1)
    worth = {epochs: 1 / law.loss(1, 100 * epochs, 100) / 100 for epochs in (0.5, 1, 4, 40, 10**6)}
    assert worth[0.5] == 0.5 and worth[1] == 1
    assert worth[4] == pytest.approx(3.73, abs=0.01)
    assert worth[40] == pytest.approx(15.2, abs=0.1)
    assert worth[10**6] == pytest.approx(1 + 15.4)


@pytest.mark.parametrize("start", range(5))
def test_the_valley_is_found_from_either_side(start):
    losses, seen = [5.0, 3.0, 2.0, 2.5, 4.0], []

    def loss(index: int) -> float:
        seen.append(index)
        return losses[index]

    assert lowest(loss, start, len(losses)) == 2
    assert start != 2 or set(seen) == {1, 2, 3}  # what is far from it is not measured


def test_the_steps_that_fit_a_time():
    """An update of 1 s, 2 s a sequence: 4 + 4 + 8 + … of a growing batch."""
    sampler = GlobalBatchSampler(
        10**6, batch_size=4, accumulation_steps=4, batch_ramp=2, initial_batch_size=2
    )
    speed = Speed(update=1.0, sample=2.0)
    seconds, counts = 0.0, []
    for before, after in zip((0, 2, 4, 6, 8, 12), (2, 4, 6, 8, 12, 18), strict=True):
        seconds += 1 + 2 * (after - before)
        counts.append(seconds)
    for steps, needed in enumerate(counts, start=1):
        assert speed.steps_within(needed, sampler)[0] == steps
        assert speed.steps_within(needed - 0.1, sampler)[0] == steps - 1


# -- pretraining: size and steps -------------------------------------------------------------------


@pytest.fixture
def made_up_machine(monkeypatch):
    """1e9 FLOP/s, and a law by which the best of TINY_SIZES depends on the minutes."""
    measured = []

    def speed(ctx, model, tokenizer, train_data):
        measured.append((model.config.hidden_size, model.config.num_hidden_layers))
        flops = flops_per_token(model.config, ctx.args.max_seq_len)
        return Speed(update=0.0, sample=flops * train_data.num_tokens / len(train_data) / 1e9)

    monkeypatch.setattr(compute_optimal, "SIZES", TINY_SIZES)
    monkeypatch.setattr(compute_optimal, "measure_speed", speed)
    # measuring takes no time, so that every run has the same number of steps
    monkeypatch.setattr(compute_optimal, "time", SimpleNamespace(monotonic=lambda: 0.0))
    law = ScalingLaw(E=1.0, A=2e5, alpha=1.0, B=1e5, beta=1.0)
    monkeypatch.setattr(compute_optimal, "LAW", law)
    monkeypatch.setattr(compute_optimal, "REPETITIONS", 1e9)  # so that toy data suffice
    return measured


def best_of_all(minutes: float) -> tuple[int, int]:
    def loss(size: tuple[int, int]) -> float:
        width, depth = size
        config = MiniMindConfig(hidden_size=width, num_hidden_layers=depth)
        inner = width * width * (2 + 2 * config.num_key_value_heads / 8)
        inner += 3 * width * config.intermediate_size + 2 * width
        parameters = 6400 * width + depth * inner + width
        tokens = 1e9 * 60 * minutes / flops_per_token(config, 32)
        return compute_optimal.LAW.loss(parameters, tokens)

    return min(TINY_SIZES, key=loss)


@pytest.mark.parametrize("minutes", [0.2, 3.0, 60.0])
def test_the_size_is_the_best_for_the_time(train, made_up_machine, monkeypatch, minutes):
    monkeypatch.setattr(Run, "steps", lambda run: iter(()))
    monkeypatch.setattr(
        Run, "finish", lambda run: dict(config=run.config, rate=run.ctx.args.learning_rate)
    )
    result = train(minutes=minutes, **NO_SIZES)
    config = result["config"]
    best = best_of_all(minutes)
    assert (config.hidden_size, config.num_hidden_layers) == best
    assert result["rate"] == TINY["learning_rate"]  # which is given
    assert len(set(made_up_machine)) < len(TINY_SIZES) or best in TINY_SIZES[1:-1]


def test_narrow_models_have_a_higher_learning_rate(train, made_up_machine, killed):
    """Also after resuming, which would be refused with another rate."""
    common = dict(minutes=0.005, save_interval=1, learning_rate=5e-4, **NO_SIZES)
    killed(2, train, "a", **common)
    width = train.saved("a")["fingerprint"]["hidden_size"]
    assert train.saved("a")["fingerprint"]["learning_rate"] == 5e-4 * 256 / width
    train("a", resume=True, **common)
    assert compute_optimal.learning_rate(512) == 5e-4


def test_longer_times_have_larger_models(made_up_machine):
    chosen = [TINY_SIZES.index(best_of_all(minutes)) for minutes in (0.2, 3.0, 60.0)]
    assert chosen[0] < chosen[1] < chosen[2]


def test_a_batch_that_does_not_fit_the_memory_is_split(train, made_up_machine, monkeypatch):
    """Into parts of the same optimizer step; sizes of which no sequence fits are left out."""
    args = train.stage.Args(
        **train.settings(minutes=0.01, batch_size=4, accumulation_steps=3, **NO_SIZES)
    )
    ctx, tokenizer = Context.create(args), load_tokenizer()

    def chosen(memory: float) -> list[tuple[int, int]]:
        monkeypatch.setattr(compute_optimal.hardware, "total_memory", lambda device: memory)
        sizes = compute_optimal.candidates(ctx, tokenizer)
        return [(size["batch_size"], size["accumulation_steps"]) for size in sizes]

    assert chosen(1e9) == [(4, 3)] * len(TINY_SIZES)
    assert chosen(3e6) == [(4, 3), (2, 6)]
    assert chosen(1.0) == [(1, 12)]  # the smallest in any case


def test_sizes_that_are_given_stay(train, made_up_machine):
    result = train(minutes=0.01)
    assert made_up_machine == [(32, 2)]
    assert result["step"] > 1 and result["name"] == "pretrain_32"


def test_a_run_of_seconds_ends_in_time_and_is_saved(train, monkeypatch, capsys):
    """Nothing is made up here: the speed is that of this machine."""
    monkeypatch.setattr(compute_optimal, "SIZES", TINY_SIZES[:3])
    began = time.monotonic()
    result = train(minutes=0.1, log_interval=1, **NO_SIZES)
    assert time.monotonic() - began < 60 and 1 < result["seconds"] < 40  # busy machines too
    rates = [record["learning_rate"] for record in logged(result)]
    assert rates[-1] < 0.1 * max(rates)  # at the end of its schedule
    assert len(list(train.folder.glob("a/out/pretrain_*.pth"))) == 1
    printed = capsys.readouterr().out
    assert "--minutes 0.1: " in printed and f"{result['step']:,} steps" in printed


def test_a_resumed_run_keeps_its_choice(train, killed, made_up_machine):
    """Size, steps and schedule, though a machine that is measured anew might choose others."""
    common = dict(minutes=0.005, save_interval=1, **NO_SIZES)
    train("whole", **common)
    whole = everything(train, "whole")
    total = train.saved("whole")["progress"]["step"]
    assert total > 4
    killed(3, train, "a", **common)
    made_up_machine.clear()
    train("a", resume=True, **common)
    assert not made_up_machine  # not measured again
    assert same(everything(train, "a"), whole)


def test_a_run_goes_on_with_its_own_minutes_only(train, killed, made_up_machine):
    """Also where more minutes would choose another size, whose checkpoint has another name."""
    common = dict(save_interval=1, **NO_SIZES)
    killed(2, train, "a", minutes=0.02, **common)
    assert best_of_all(0.02) != best_of_all(1.0)
    for minutes in (0.021, 1.0):
        with pytest.raises(UserError, match="pt was begun with --minutes 0.02, .*same, or begin"):
            train("a", resume=True, minutes=minutes, **common)


def test_too_few_minutes(train, made_up_machine):
    with pytest.raises(UserError, match="--minutes 1e-06 is too short: .*give more minutes"):
        train(minutes=1e-6)
    assert not (train.folder / "a" / "out").exists()


# -- the other stages: steps, from their own first ones --------------------------------------------


class Rank(SimpleNamespace):
    """What fit_minutes needs of a context."""

    world_size = 1

    def all_reduce_sum(self, *numbers):
        return list(numbers)


def plan_after(steps: int, seconds_each: float, minutes: float, **settings) -> Plan:
    """The plan of 1000 samples in batches of 2, after some steps; the first took 7 s."""
    sampler = GlobalBatchSampler(1000, batch_size=2)
    progress = Progress()
    plan = Plan.of("toy", sampler, progress, 0)
    progress.step, progress.samples_seen = steps, 2 * steps
    progress.seconds = 7 + seconds_each * (steps - 1)
    args = SimpleNamespace(minutes=minutes, max_steps=0, **settings)
    ctx = Rank(args=args, print=lambda *lines: None)
    metrics = SimpleNamespace(
        history=[{"seconds": 7.0}], accumulator=Accumulator(), bar=SimpleNamespace()
    )
    return fit_minutes(ctx, plan, sampler, progress, metrics)


def test_the_steps_follow_from_the_first_ones():
    assert plan_after(3, 6.0, minutes=2).total_steps == 3 + (120 - 19) // 6
    assert plan_after(10, 0.5, minutes=2).total_steps == 10 + int((120 - 11.5) / 0.5)
    assert plan_after(2, 60.0, minutes=2).total_steps == 500  # too early to say
    assert plan_after(9, 0.5, minutes=2).total_steps == 500
    assert plan_after(10, 0.5, minutes=60).total_steps == 500  # all of the data
    assert plan_after(3, 60.0, minutes=1).total_steps == 4  # one more, which evaluates and saves
    assert plan_after(10, 0.5, minutes=0).total_steps == 500


@pytest.fixture
def sft(tmp_path) -> Trainer:
    return Trainer(tmp_path, train_full_sft)


def test_fine_tuning_ends_in_time(sft):
    result = sft(minutes=0.05, epochs=10**6)
    assert 1 < result["seconds"] < 10 and result["step"] > 10
    rates = [record["learning_rate"] for record in logged(result)]
    assert rates[-1] < 0.1 * max(rates)
    assert sft.saved()["total_steps"] == result["step"]


@pytest.mark.slow
def test_every_stage_ends_in_time(any_stage):
    result = any_stage(minutes=0.03, epochs=10**5)
    assert result["seconds"] < 10 and result["step"] > 3
    rates = [record["learning_rate"] for record in logged(result)]
    assert rates[-1] < 0.3 * max(rates)


def test_resumed_fine_tuning_keeps_its_steps(sft, killed):
    common = dict(minutes=0.05, epochs=10**6, save_interval=1)
    killed(12, sft, "a", **common)
    total = sft.saved("a")["total_steps"]
    assert total == sft.saved("a")["progress"]["max_steps"] > 12
    assert sft("a", resume=True, **common)["step"] == total

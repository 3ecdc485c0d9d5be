"""The scaling law's benchmark: its fit, and how it adds runs to what is there."""

import json

import numpy as np
import pytest
import scaling_fit
import scaling_law
from toy import TEXTS, text_file

from model.errors import UserError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.common.compute_optimal import SIZES, ScalingLaw, Speed
from trainer.common.hardware import flops_per_token

TRUE = ScalingLaw(E=0.8, A=300.0, alpha=0.42, B=150.0, beta=0.35)


def points(noise: float = 0.0) -> tuple[list, list, list]:
    """Parameters, tokens and bits per byte by the law: five sizes for each of five amounts of
    compute, 2e12 to 5e14 FLOPs."""
    rng = np.random.default_rng(0)
    parameters, tokens, losses = [], [], []
    for compute in np.geomspace(2e12, 5e14, 5):
        for size in SIZES[:9:2]:
            n = scaling_fit.parameters_of(*size)
            parameters.append(n)
            tokens.append(compute / (6 * n))
            losses.append(TRUE.loss(n, tokens[-1]) * (1 + noise * rng.standard_normal()))
    return parameters, tokens, losses


def test_the_fit_finds_a_known_law():
    law = scaling_fit.fit(*points())
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(TRUE, name), rel=1e-3), name


def test_a_noisy_fit_forecasts_within_its_error():
    """0.3% of noise, and 20 times the compute of the largest point."""
    parameters, tokens, losses = points(noise=0.003)
    runs = [
        dict(parameters=n, tokens=d, bits_per_byte=loss)
        for n, d, loss in zip(parameters, tokens, losses, strict=True)
    ]
    law = scaling_fit.fit(parameters, tokens, losses)
    laws = scaling_fit.bootstrap(law, runs)
    there = (26e6, 1e16 / (6 * 26e6))
    assert law.loss(*there) == pytest.approx(TRUE.loss(*there), abs=0.03)
    low, high = np.percentile([each.loss(*there) for each in laws], (2.5, 97.5))
    assert low < TRUE.loss(*there) < high and 0.001 < high - low < 0.2


def test_parameters_are_those_of_the_model():
    for width, depth in SIZES[:3]:
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=width, num_hidden_layers=depth))
        counted = sum(parameter.numel() for parameter in model.parameters())
        assert scaling_fit.parameters_of(width, depth) == counted
    assert scaling_fit.parameters_of(512, 8) == 25_829_888


def test_a_faster_gpu_has_a_larger_model_and_a_lower_loss():
    small, _, high = scaling_fit.best_on_gpu(TRUE, "3090", 0.25)
    large, _, low = scaling_fit.best_on_gpu(TRUE, "H100", 1.0)
    assert low < high
    assert scaling_law.NAMES.index(small) <= scaling_law.NAMES.index(large)


@pytest.fixture
def results(tmp_path) -> str:
    """Speeds and runs by the law, at 50 GFLOP/s a core, for budgets of 1 to 8 minutes."""
    path, speeds = tmp_path / "results.jsonl", {}
    for width, depth in SIZES[:9]:
        config = MiniMindConfig(hidden_size=width, num_hidden_layers=depth)
        speed = Speed(0.01, 512 * flops_per_token(config, 512) / 1e11)
        speeds[f"{width}x{depth}"] = speed
        n = scaling_fit.parameters_of(width, depth)
        record = {"kind": "speed", "size": f"{width}x{depth}", "parameters": n}
        record |= speed._asdict()
        scaling_law.append(str(path), record)
    for minutes in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0):
        for size in list(speeds)[:4]:
            n = scaling_fit.parameters_of(*map(int, size.split("x")))
            steps, samples = speeds[size].steps_within(60 * minutes, scaling_fit.default_sampler())
            rate = scaling_law.rate_of(size)
            key = dict(kind="run", size=size, steps=steps, learning_rate=rate, seed=42, recipe="")
            found = dict(parameters=n, tokens=512 * samples)
            found["bits_per_byte"] = TRUE.loss(n, found["tokens"])
            scaling_law.append(str(path), key | {"minutes": minutes} | found)
    return str(path)


def test_the_report_of_runs_that_follow_the_law(results, tmp_path, capsys):
    plot = tmp_path / "law.png"
    report = scaling_law.main(
        scaling_law.Args(results=results, plot=str(plot), held_out=[1.5, 3.0, 6.0])
    )
    assert report["law"]["beta"] == pytest.approx(TRUE.beta, abs=0.01)
    assert report["tests"] == {1.5: 0.0, 3.0: 0.0, 6.0: 0.0}
    assert report["forecasts"]["H100"]["loss"] < report["forecasts"]["3090"]["loss"]
    assert plot.stat().st_size > 10_000
    assert "16 runs, residuals of 0.0000" in capsys.readouterr().out


def test_runs_are_added_and_not_repeated(tmp_path, monkeypatch):
    """Two sizes that train 2,048 tokens, and a second time none."""
    monkeypatch.setattr(scaling_law.train_pretrain, "main", counted := Counted(tmp_path))
    for name in ("pretrain", "pretrain_val"):
        text_file(tmp_path / f"{name}.jsonl", TEXTS)
    args = scaling_law.Args(
        data_dir=str(tmp_path),
        results=str(tmp_path / "results.jsonl"),
        output=str(tmp_path / "out"),
        sizes=["96x4", "128x4"],
        tokens=[2048.0],
    )
    for _ in range(2):
        assert scaling_law.main(args) == {}  # too few for a fit
    assert counted.sizes == [(96, 4), (128, 4)]
    runs = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert [(run["size"], run["steps"], run["tokens"]) for run in runs] == [
        ("96x4", 2, 2000),
        ("128x4", 2, 2000),
    ]


class Counted:
    """Instead of the trainer."""

    def __init__(self, folder):
        self.folder, self.sizes = folder, []

    def __call__(self, args) -> dict:
        self.sizes.append((args.hidden_size, args.num_hidden_layers))
        assert args.resume and args.max_steps == 2
        return {"stopped": False, "num_tokens": 2000, "eval_bpb": 3.0}


def test_what_a_budget_needs():
    with pytest.raises(UserError, match="need --data_dir"):
        scaling_law.Args(budgets=[5.0])
    with pytest.raises(UserError, match="--tokens needs --sizes"):
        scaling_law.Args(data_dir=".", tokens=[1e5])

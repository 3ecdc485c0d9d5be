"""SPO: the loss against a slow transcription, the value tracker by hand."""

import math

import numpy as np
import pytest
from rl_toy import ASKED, RL, batch_of, prompt_file
from toy import Trainer

from trainer import train_spo


@pytest.mark.parametrize("loss_type", ["simple", "clip", "plain"])
def test_spo_loss_equals_a_slow_transcription(loss_type):
    batch, new = batch_of()
    args = train_spo.Args(loss_type=loss_type, epsilon=0.2, beta=0.05)
    expected = 0.0
    for row, t in batch.completion_mask.nonzero().tolist():
        log_probs = (new, batch.old_log_probs, batch.ref_log_probs)
        log_p, old, ref = (x[row, t].item() for x in log_probs)
        a, ratio = batch.advantages[row, 0].item(), math.exp(log_p - old)
        if loss_type == "simple":
            expected -= ratio * a - abs(a) / 0.4 * (ratio - 1) ** 2
        elif loss_type == "clip":
            expected -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        else:
            expected -= a * log_p
        expected += 0.05 * (math.exp(ref - log_p) - (ref - log_p) - 1)
    assert train_spo.policy_loss(new, batch, args).sum().item() == pytest.approx(expected)


def test_the_tracker_by_hand():
    args = train_spo.Args(first_value=0.25, rho_min=0.5, rho_max=0.75, kl_half_life=0.1)
    tracker = train_spo.ValueTracker(3, args)
    assert tracker.values.tolist() == [0.25] * 3  # 0.5 successes and 1.5 failures each
    tracker.update(np.array([0, 1]), np.array([1.0, 0.25]))
    kept = 0.75  # nothing has moved: the least is forgotten
    assert tracker.values[0] == pytest.approx((kept * 0.5 + 1) / (kept * 2 + 1))
    assert tracker.values[1] == pytest.approx((kept * 0.5 + 0.25) / (kept * 2 + 1))
    tracker.total_kl += 0.08  # 2^-0.8 = 0.574
    a, b = tracker.successes[0], tracker.failures[0]
    tracker.update(np.array([0]), np.array([0.0]))
    kept = 2**-0.8
    assert tracker.values[0] == pytest.approx(kept * a / (kept * (a + b) + 1))
    tracker.total_kl += 5  # the most is forgotten
    a, b = tracker.successes[2], tracker.failures[2]
    tracker.update(np.array([2]), np.array([1.0]))
    assert tracker.values[2] == pytest.approx((0.5 * a + 1) / (0.5 * (a + b) + 1))


def test_the_tracker_asks_most_what_succeeds_now_and_then():
    tracker = train_spo.ValueTracker(3, train_spo.Args(exploration=0.0))
    tracker.successes = np.array([0.5, 0.98, 0.1])
    tracker.failures = 1 - tracker.successes
    drawn = [tracker.sample(1, [seed])[0] for seed in range(3000)]
    chances = np.sqrt([0.25, 0.0196, 0.09])
    expected = chances / chances.sum()
    assert np.bincount(drawn) / 3000 == pytest.approx(expected, abs=0.03)
    assert sorted(tracker.sample(3, [1])) == [0, 1, 2]


def test_a_trackers_state_is_that_of_the_first_version_too():
    args = train_spo.Args()
    tracker, again = train_spo.ValueTracker(2, args), train_spo.ValueTracker(2, args)
    tracker.total_kl, tracker.kl_at_sampling = 0.5, np.array([0.25, 0.5])
    tracker.update(np.array([1]), np.array([1.0]))
    state = tracker.state_dict()
    assert set(state) == {"successes", "failures", "kl_at_sampling", "total_kl"}
    old = {"moved": state["total_kl"], "asked_at": state["kl_at_sampling"]}
    for each in (state, old | {key: state[key] for key in ("successes", "failures")}):
        again.load_state_dict(each)
        assert again.total_kl == 0.5 and again.kl_at_sampling.tolist() == [0.25, 0.5]
        assert again.values.tolist() == tracker.values.tolist()


@pytest.mark.usefixtures("in_a_hurry")
def test_tokens_are_those_of_the_prompts_that_were_sampled(tmp_path, monkeypatch):
    train = Trainer(tmp_path, train_spo, (prompt_file, ASKED, RL))
    generate, seen = train_spo.generate_completions, []

    def counting(*given, **settings):
        completions = generate(*given, **settings)
        seen.append(sum(len(each.prompt.ids) + len(each.tokens) for each in completions))
        return completions

    monkeypatch.setattr(train_spo, "generate_completions", counting)
    train(max_steps=2, accumulation_steps=2, max_seq_len=64)
    assert [line["num_tokens"] for line in train.log()] == np.cumsum(seen).tolist()

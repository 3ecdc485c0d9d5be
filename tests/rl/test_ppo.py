"""PPO: GAE by brute force, token rewards, the loss against a slow transcription, early stopping."""

import math

import pytest
import torch
from rl_toy import ASKED, RL, B, P, T, batch_of, prompt_file
from torch.testing import assert_close
from toy import Trainer

from model.model_minimind import MiniMindForScoring
from trainer import train_ppo
from trainer.report.fp16 import changed_fraction, trainable_fp16
from trainer.trainer_utils import Run

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def test_gae_equals_brute_force():
    """A_t = Σ (γλ)^k δ_t+k, summed over all that follows."""
    batch, rewards = batch_of()
    gamma, lam = 0.97, 0.9
    values, mask = batch.values * batch.completion_mask, batch.completion_mask
    got = train_ppo.compute_gae(rewards * mask, values, mask, gamma, lam)
    for row in range(B):
        places = mask[row].nonzero().flatten().tolist()
        v = [values[row, t].item() for t in places] + [0.0]
        deltas = [rewards[row, t].item() + gamma * v[n + 1] - v[n] for n, t in enumerate(places)]
        for n, t in enumerate(places):
            expected = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[n:]))
            assert got[row, t].item() == pytest.approx(expected, abs=1e-12)
    assert (got[~mask] == 0).all()


def test_token_rewards_charge_for_departing_and_pay_at_the_end():
    batch, _ = batch_of()
    scores = torch.arange(1.0, 7)
    got = train_ppo.token_rewards(batch, scores, kl_coef=0.1)
    for row, length in enumerate([7, 3, 1, 5, 7, 2]):
        for t in range(P + T - 1):
            inside = P - 1 <= t < P - 1 + length
            kl = (batch.old_log_probs - batch.ref_log_probs)[row, t].item()
            expected = -0.1 * kl if inside else 0.0
            expected += scores[row].item() if t == P - 2 + length else 0.0
            assert got[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_ppo_loss_equals_a_slow_transcription():
    batch, new = batch_of()
    batch.advantages = batch.advantages.expand(-1, P + T - 1)
    values = batch.values + 0.5 * torch.randn(batch.values.shape, dtype=torch.float64)
    args = train_ppo.Args(clip_epsilon=0.15, value_clip=0.2)
    actor = critic = 0.0
    for row, t in batch.completion_mask.nonzero().tolist():
        ratio = math.exp(new[row, t] - batch.old_log_probs[row, t])
        a = batch.advantages[row, t].item()
        actor -= min(ratio * a, min(max(ratio, 0.85), 1.15) * a)
        v, before, wanted = (x[row, t].item() for x in (values, batch.values, batch.returns))
        near = before + min(max(v - before, -0.2), 0.2)
        critic += max((v - wanted) ** 2, (near - wanted) ** 2) / 2
    got = train_ppo.ppo_loss(new, values, batch, args)
    assert_close(torch.stack(got), torch.tensor([actor, critic], dtype=torch.float64))


def test_learning_stops_when_the_policy_has_moved_too_far(tmp_path, monkeypatch):
    updates = []
    update = Run.update
    monkeypatch.setattr(Run, "update", lambda *args: updates.append(1) or update(*args))
    settings = dict(RL, update_epochs=6, num_minibatches=1, learning_rate=0.01, max_steps=1)
    train = Trainer(tmp_path, train_ppo, (prompt_file, ASKED, settings))
    train("never", target_kl=0.0)
    assert len(updates) == 6
    updates.clear()
    train("soon", target_kl=1e-3)
    assert len(updates) == 2  # the first step was made by the very policy


def test_a_critic_that_moves_hides_no_policy_that_stays(make_model):
    policy = make_model()
    model = train_ppo.ActorCritic(policy, MiniMindForScoring.from_language_model(make_model()))
    before = trainable_fp16(model)
    with torch.no_grad():
        model.critic.model.norm.weight += 1
        assert changed_fraction(before, trainable_fp16(model)) == 0
        policy.model.norm.weight += 1
    norm = policy.model.norm.weight.numel()
    total = sum(each.numel() for each in policy.parameters())
    assert changed_fraction(before, trainable_fp16(model)) == pytest.approx(norm / total)

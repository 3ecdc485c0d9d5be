"""GRPO: the losses against trl, advantages by hand, and dapo's resampling."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from rl_toy import B, P, T, batch_of, some_prompts
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from model.weights import load_tokenizer
from trainer import train_grpo
from trainer.rl.prompts import PromptDataset

pytestmark = pytest.mark.usefixtures("in_a_hurry")


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """A function that makes trl's GRPOTrainer, whose log-probs are given to it."""

    def make(args: train_grpo.Args, new: torch.Tensor) -> GRPOTrainer:
        tokenizer = load_tokenizer()
        folder = tmp_path_factory.mktemp("trl")
        tiny = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **tiny)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = GRPOConfig(
            str(folder / "out"),
            loss_type=args.loss_type,
            beta=args.beta,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
            max_completion_length=args.max_gen_len,
            num_generations=2,
            use_bias_correction_kl=False,
            per_device_train_batch_size=B,
            gradient_accumulation_steps=1,
            use_cpu=True,
            report_to=[],
        )
        data = Dataset.from_list([{"prompt": "a"}] * B)
        trainer = GRPOTrainer(
            str(folder), lambda completions, **_: [0.0], args=config, train_dataset=data
        )
        given = lambda *_, **__: (new[:, P - 1 :], torch.zeros(B, T), None)  # noqa: E731
        trainer._get_per_token_logps_and_entropies = given
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "dapo", "cispo"])
def test_grpo_losses_are_those_of_trl(trl_trainer, loss_type, beta):
    batch, new = batch_of()
    args = train_grpo.Args(loss_type=loss_type, beta=beta, max_gen_len=T)
    trainer = trl_trainer(args, new)
    mask = batch.completion_mask[:, P - 1 :].long()
    expected = trainer._compute_loss(
        trainer.model,
        dict(
            prompt_ids=batch.input_ids[:, :P],
            prompt_mask=torch.ones(B, P, dtype=torch.long),
            completion_ids=batch.input_ids[:, P:],
            completion_mask=mask,
            advantages=batch.advantages[:, 0],
            old_per_token_logps=batch.old_log_probs[:, P - 1 :],
            ref_per_token_logps=batch.ref_log_probs[:, P - 1 :],
            num_items_in_batch=mask.sum(),
        ),
    )
    if not beta:
        batch.ref_log_probs = None
    stats = SimpleNamespace(num_completions=B, num_tokens=batch.num_label_tokens)
    token_losses = train_grpo.policy_loss(new, batch, args)
    loss = train_grpo.aggregate_loss(token_losses, batch, args, stats)
    assert_close(loss, expected, atol=1e-6, rtol=0)


def test_group_advantages_by_hand():
    nan = math.nan
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [nan, 1, 0, 1], [nan, nan, nan, 1]])
    centred = torch.tensor(
        [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [0, 1 / 3, -2 / 3, 1 / 3], [0] * 4]
    )
    assert_close(train_grpo.group_advantages(rewards, scale=False), centred)
    scaled = train_grpo.group_advantages(rewards, scale=True)
    assert_close(scaled[0], centred[0] / (math.sqrt(1 / 3) + 1e-4))
    assert_close(scaled[2], centred[2] / (math.sqrt(1 / 3) + 1e-4))
    assert train_grpo.zero_variance_groups(rewards).tolist() == [False, True, False, True]


def test_a_group_without_variance_is_replaced(make_run, tokenizer, monkeypatch):
    """dapo: completions of prompts 0 and 2 always have equal rewards, those of prompt 1 not."""
    run, model = make_run(loss_type="dapo", num_generations=2, resample=5)
    prompts = PromptDataset(some_prompts(tokenizer), 99)

    def rewards_of(completions):
        own = [each.prompt.index == 1 and n % 2 for n, each in enumerate(completions)]
        return torch.tensor(own, dtype=torch.float), {}

    completions, rewards, metrics = train_grpo.generate_groups(
        run, model, rewards_of, prompts.prompts, prompts
    )
    assert metrics["frac_reward_zero_std"] == (2, 3)
    assert [each.prompt.index for each in completions] == [1] * 6
    assert rewards.tolist() == [[0, 1]] * 3

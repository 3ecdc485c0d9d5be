"""Rollouts: completions, batches with loss on completions alone, ratios, the reference."""

import pytest
import torch
from rl_toy import batches_of, sample, some_prompts
from torch.testing import assert_close

from model.weights import load_model
from trainer.rl import policy, rollout
from trainer.rl.batches import micro_batches
from trainer.rl.reference import ReferenceModel
from trainer.rl.rollout import Completion

pytestmark = pytest.mark.usefixtures("in_a_hurry")


def test_completions_are_the_same_in_any_company(make_run, tokenizer):
    """Alone, beside others, and on another rank: seed, step and prompt say all."""
    run, model = make_run()
    prompts = some_prompts(tokenizer)
    together = sample(run, model, prompts, 4)
    assert [each.prompt.index for each in together] == [0] * 4 + [1] * 4 + [2] * 4
    alone = sample(run, model, prompts[1:2], 4)
    assert [each.tokens for each in alone] == [each.tokens for each in together[4:8]]
    assert len({tuple(each.tokens) for each in alone}) == 4
    run.progress.step += 1
    later = sample(run, model, prompts[1:2], 4)
    assert [each.tokens for each in later] != [each.tokens for each in alone]
    assert model.training


@torch.no_grad()
def test_batches_carry_loss_on_the_completions_alone(make_run, tokenizer):
    run, model = make_run(update_batch_size=2)
    prompts = some_prompts(tokenizer)
    eos = tokenizer.eos_token_id
    completions = [
        Completion(prompt, tokens, "", tokens[-1] == eos)
        for prompt, tokens in zip(prompts, [[9, 8, eos], [7, 7, 7, 7, 7, 7], [eos]], strict=True)
    ]
    batches = batches_of(run, completions)
    order = [index for batch in batches for index in batch.indices.tolist()]
    lengths = [len(each.prompt.ids) + len(each.tokens) for each in completions]
    assert order == sorted(range(3), key=lengths.__getitem__)
    for batch in batches:
        found = policy.log_probs(run, model, batch)
        for row, index in enumerate(batch.indices.tolist()):
            each = completions[index]
            ids = torch.tensor([each.prompt.ids + each.tokens])
            expected = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            start = len(each.prompt.ids) - 1
            assert batch.completion_mask[row].nonzero().flatten().tolist() == list(
                range(start, start + len(each.tokens))
            )
            own = found[row, batch.completion_mask[row]]
            assert_close(own, expected[start:], atol=1e-5, rtol=0)
    assert rollout.completion_stats(completions) == {
        "completions/mean_length": (10, 3),
        "completions/clipped_ratio": (1, 3),
        "completions/empty_ratio": (3, 3),
    }


def test_the_ratio_is_exactly_one_until_there_was_an_update(make_run, tokenizer):
    run, model = make_run(update_batch_size=4)
    completions = sample(run, model, some_prompts(tokenizer), 3)
    for batch in batches_of(run, completions):
        old = policy.log_probs(run, model, batch)
        new = model(**policy.policy_inputs(batch, 1.0)).log_probs
        assert torch.equal(torch.exp(new - old), torch.ones_like(old))
        batch.set_old_log_probs(new)
        batch.set_old_log_probs(new + 1)  # of a policy that was updated
        assert torch.equal(batch.old_log_probs, old) and not batch.old_log_probs.requires_grad


def test_no_completions_make_one_batch_without_loss(make_run):
    run, model = make_run()
    (batch,) = micro_batches([], 4, run.tokenizer.pad_token_id, run.ctx.device)
    loss = model(**policy.policy_inputs(batch, 1.0)).log_probs.sum()
    loss.backward()
    assert loss.item() == 0 and batch.num_label_tokens == 0
    assert all((weight.grad == 0).all() for weight in model.parameters())


def test_the_reference_of_an_adapter_is_the_model_without_it(make_run, tokenizer):
    run, model = make_run(use_lora=True)
    plain = load_model(run.ctx.args.from_weight, tokenizer=tokenizer)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    reference = ReferenceModel(run.ctx, model)
    assert reference.copy is None
    (batch,) = batches_of(run, sample(run, model, some_prompts(tokenizer)))
    got = reference.log_probs(run, model, batch)
    assert torch.equal(got, policy.log_probs(run, plain, batch))
    assert not torch.equal(got, policy.log_probs(run, model, batch))

"""Rollouts, PPO, GRPO and SPO: against trl, slow transcriptions of the papers, and themselves."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_mistakes import complaint
from test_ranks import together
from torch.testing import assert_close
from toy import Trainer, everything, flags, same
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from dataset.lm_dataset import encode_chat
from model.errors import UserError
from model.losses import IGNORED
from model.weights import load_model, load_tokenizer
from trainer import train_agent, train_grpo, train_ppo, train_spo
from trainer.common import hardware
from trainer.rl import rollout
from trainer.rl.rollout import Completion, Prompt, RolloutBatch
from trainer.trainer_utils import Run

pytestmark = pytest.mark.usefixtures("in_a_hurry")
STAGES = [train_ppo, train_grpo, train_spo, train_agent]
B, P, T = 6, 5, 7  # answers, tokens of the prompts, of the answers


def batch_of(seed: int = 0, **more) -> tuple[RolloutBatch, torch.Tensor]:
    """Random answers of different length with everything an update needs, and new log-probs; as
    double, [B, P + T − 1], the answers on the right."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (B, P + T), generator=g)
    labels = ids.clone()
    labels[:, :P] = IGNORED
    for row, length in enumerate([7, 3, 1, 5, 7, 2]):
        labels[row, P + length :] = IGNORED
    shape = (B, P + T - 1)

    def some(scale: float = 1.0, centre: float = 0.0) -> torch.Tensor:
        return centre + scale * torch.randn(shape, generator=g, dtype=torch.float64)

    old = some(0.5, -2.0)
    batch = RolloutBatch(
        ids, labels, torch.arange(P + T).expand(B, -1), B * T, int((labels != IGNORED).sum()), B
    )
    batch.members = torch.arange(B)
    batch.old, batch.reference = old, old + some(0.3)
    batch.advantages = torch.randn(B, 1, generator=g, dtype=torch.float64)
    batch.values, batch.returns = some(0.5), some(0.5)
    for name, value in more.items():
        setattr(batch, name, value)
    return batch, old + some(0.2)


# -- GRPO ------------------------------------------------------------------------------------------


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
    mask = batch.mask[:, P - 1 :].long()
    expected = trainer._compute_loss(
        trainer.model,
        dict(
            prompt_ids=batch.input_ids[:, :P],
            prompt_mask=torch.ones(B, P, dtype=torch.long),
            completion_ids=batch.input_ids[:, P:],
            completion_mask=mask,
            advantages=batch.advantages[:, 0],
            old_per_token_logps=batch.old[:, P - 1 :],
            ref_per_token_logps=batch.reference[:, P - 1 :],
            num_items_in_batch=mask.sum(),
        ),
    )
    if not beta:
        batch.reference = None
    sums = SimpleNamespace(answers=B, tokens=batch.labelled)
    loss = train_grpo.total(train_grpo.policy_loss(new, batch, args), batch, args, sums)
    assert_close(loss, expected, atol=1e-6, rtol=0)


def test_group_advantages_by_hand():
    nan = math.nan
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [nan, 1, 0, 1], [nan, nan, nan, 1]])
    centred = torch.tensor(
        [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [0, 1 / 3, -2 / 3, 1 / 3], [0] * 4]
    )
    assert_close(train_grpo.group_advantages(rewards, scaled=False), centred)
    scaled = train_grpo.group_advantages(rewards, scaled=True)
    assert_close(scaled[0], centred[0] / (math.sqrt(1 / 3) + 1e-4))
    assert_close(scaled[2], centred[2] / (math.sqrt(1 / 3) + 1e-4))
    assert train_grpo.flat(rewards).tolist() == [False, True, False, True]


# -- PPO -------------------------------------------------------------------------------------------


def test_gae_equals_brute_force():
    """A_t = Σ (γλ)^k δ_t+k, summed over all that follows."""
    batch, rewards = batch_of()
    gamma, lam = 0.97, 0.9
    values, mask = batch.values * batch.mask, batch.mask
    got = train_ppo.advantage_estimates(rewards * mask, values, mask, gamma, lam)
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
            expected = -0.1 * (batch.old - batch.reference)[row, t].item() if inside else 0.0
            expected += scores[row].item() if t == P - 2 + length else 0.0
            assert got[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_ppo_loss_equals_a_slow_transcription():
    batch, new = batch_of()
    batch.advantages = batch.advantages.expand(-1, P + T - 1)
    values = batch.values + 0.5 * torch.randn(batch.values.shape, dtype=torch.float64)
    args = train_ppo.Args(clip_epsilon=0.15, value_clip=0.2)
    actor = critic = 0.0
    for row, t in batch.mask.nonzero().tolist():
        ratio = math.exp(new[row, t] - batch.old[row, t])
        a = batch.advantages[row, t].item()
        actor -= min(ratio * a, min(max(ratio, 0.85), 1.15) * a)
        v, before, wanted = (x[row, t].item() for x in (values, batch.values, batch.returns))
        near = before + min(max(v - before, -0.2), 0.2)
        critic += max((v - wanted) ** 2, (near - wanted) ** 2) / 2
    got = train_ppo.ppo_loss(new, values, batch, args)
    assert_close(torch.stack(got), torch.tensor([actor, critic], dtype=torch.float64))


# -- SPO -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["simple", "clip", "plain"])
def test_spo_loss_equals_a_slow_transcription(loss_type):
    batch, new = batch_of()
    args = train_spo.Args(loss_type=loss_type, epsilon=0.2, beta=0.05)
    expected = 0.0
    for row, t in batch.mask.nonzero().tolist():
        log_p, old, ref = (x[row, t].item() for x in (new, batch.old, batch.reference))
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
    tracker.learn(np.array([0, 1]), np.array([1.0, 0.25]))
    kept = 0.75  # nothing has moved: the least is forgotten
    assert tracker.values[0] == pytest.approx((kept * 0.5 + 1) / (kept * 2 + 1))
    assert tracker.values[1] == pytest.approx((kept * 0.5 + 0.25) / (kept * 2 + 1))
    tracker.moved += 0.08  # 2^-0.8 = 0.574
    a, b = tracker.successes[0], tracker.failures[0]
    tracker.learn(np.array([0]), np.array([0.0]))
    kept = 2**-0.8
    assert tracker.values[0] == pytest.approx(kept * a / (kept * (a + b) + 1))
    tracker.moved += 5  # the most is forgotten
    a, b = tracker.successes[2], tracker.failures[2]
    tracker.learn(np.array([2]), np.array([1.0]))
    assert tracker.values[2] == pytest.approx((0.5 * a + 1) / (0.5 * (a + b) + 1))


def test_the_tracker_asks_most_what_succeeds_now_and_then():
    tracker = train_spo.ValueTracker(3, train_spo.Args(exploration=0.0))
    tracker.successes = np.array([0.5, 0.98, 0.1])
    tracker.failures = 1 - tracker.successes
    drawn = [tracker.draw(1, [seed])[0] for seed in range(3000)]
    chances = np.sqrt([0.25, 0.0196, 0.09])
    expected = chances / chances.sum()
    assert np.bincount(drawn) / 3000 == pytest.approx(expected, abs=0.03)
    assert sorted(tracker.draw(3, [1])) == [0, 1, 2]


# -- rollouts --------------------------------------------------------------------------------------


@pytest.fixture
def make_run(save, tmp_path, tokenizer):
    """A run of GRPO with its model, nothing trained."""

    def make(stage=train_grpo, **settings):
        args = stage.Args(
            from_weight=str(save(num_hidden_layers=1)),
            data_path=["none"],
            device="cpu",
            max_gen_len=6,
            save_dir=str(tmp_path),
            **settings,
        )
        model = rollout.with_addition(args, load_model(args.from_weight, tokenizer=tokenizer))
        return Run(args, "grpo", model.config, tokenizer), model.train()

    return make


def some_prompts(tokenizer, count: int = 3) -> list[Prompt]:
    found = []
    for n in range(count):
        messages = [{"role": "user", "content": "why " * (1 + 3 * n) + str(n)}]
        ids = encode_chat(tokenizer, messages, add_generation_prompt=True).ids
        found.append(Prompt(n, messages, ids, str(n)))
    return found


def test_completions_are_the_same_in_any_company(make_run, tokenizer):
    """Alone, beside others, and on another rank: seed, update and prompt say all."""
    run, model = make_run()
    prompts = some_prompts(tokenizer)
    together = rollout.roll_out(run, model, prompts, copies=4)
    assert [each.prompt.row for each in together] == [0] * 4 + [1] * 4 + [2] * 4
    alone = rollout.roll_out(run, model, prompts[1:2], copies=4)
    assert [each.tokens for each in alone] == [each.tokens for each in together[4:8]]
    assert len({tuple(each.tokens) for each in alone}) == 4
    run.step += 1
    later = rollout.roll_out(run, model, prompts[1:2], copies=4)
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
    batches = rollout.micro_batches(run, completions)
    members = [member for batch in batches for member in batch.members.tolist()]
    lengths = [len(each.prompt.ids) + len(each.tokens) for each in completions]
    assert members == sorted(range(3), key=lengths.__getitem__)
    for batch in batches:
        found = rollout.log_probs(run, model, batch)
        for row, member in enumerate(batch.members.tolist()):
            each = completions[member]
            ids = torch.tensor([each.prompt.ids + each.tokens])
            expected = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            start = len(each.prompt.ids) - 1
            assert batch.mask[row].nonzero().flatten().tolist() == list(
                range(start, start + len(each.tokens))
            )
            assert_close(found[row, batch.mask[row]], expected[start:], atol=1e-5, rtol=0)
    assert rollout.lengths_and_ends(completions) == pytest.approx(
        {"length": 10 / 3, "finished": 2 / 3, "empty": 1}
    )


def test_the_ratio_is_exactly_one_until_there_was_an_update(make_run, tokenizer):
    run, model = make_run(update_batch_size=4)
    for batch in rollout.micro_batches(
        run, rollout.roll_out(run, model, some_prompts(tokenizer), 3)
    ):
        old = rollout.log_probs(run, model, batch)
        new = model(**rollout.policy_inputs(run, batch)).log_probs
        assert torch.equal(torch.exp(new - old), torch.ones_like(old))


def test_no_completions_make_one_batch_without_loss(make_run):
    run, model = make_run()
    (batch,) = rollout.micro_batches(run, [])
    loss = model(**rollout.policy_inputs(run, batch)).log_probs.sum()
    loss.backward()
    assert loss.item() == 0 and batch.labelled == 0
    assert all((weight.grad == 0).all() for weight in model.parameters())


def test_the_reference_of_an_addition_is_the_model_without_it(make_run, tokenizer):
    run, model = make_run(use_lora=True)
    plain = load_model(run.args.from_weight, tokenizer=tokenizer)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    reference = rollout.Reference(run, model)
    assert reference.own is None
    (batch,) = rollout.micro_batches(run, rollout.roll_out(run, model, some_prompts(tokenizer)))
    got = reference.log_probs(model, batch)
    assert torch.equal(got, rollout.log_probs(run, plain, batch))
    assert not torch.equal(got, rollout.log_probs(run, model, batch))


# -- training --------------------------------------------------------------------------------------


ASKED = [f"{n} + 1 =" + " please" * (n % 3) for n in range(9)]


def prompt_file(path, prompts=ASKED) -> str:
    def row(n: int, prompt: str) -> dict:
        turns = (("user", prompt), ("assistant", "ignored"))
        chat = [{"role": role, "content": content} for role, content in turns]
        return {"conversations": chat, "answer": str(n + 1)}

    path.write_text("".join(json.dumps(row(*each)) + "\n" for each in enumerate(prompts)))
    return str(path)


# Random weights write tokens of every language, so this reward differs from answer to answer.
RL = dict(from_weight="none", max_gen_len=5, reward=["language"], batch_size=3, update_batch_size=4)
MORE = {
    train_ppo: dict(num_generations=2, num_minibatches=2, critic_learning_rate=1e-3),
    train_grpo: dict(num_generations=3, update_epochs=2),
    train_spo: dict(update_epochs=2),
    train_agent: dict(num_generations=3, update_epochs=2),
}


@pytest.fixture(params=STAGES, ids=lambda stage: stage.__name__.rpartition("_")[2])
def rl(request, tmp_path) -> Trainer:
    more = {**RL, **MORE[request.param]}
    return Trainer(tmp_path, request.param, (prompt_file, ASKED, more))


@pytest.mark.parametrize("more", [{}, dict(use_moe=True), dict(use_lora=True)], ids=str)
def test_training_goes_on_where_it_stopped_bit_by_bit(rl, killed, more):
    """Weights, optimizers, the tracker, the log and random numbers; with experts and LoRA too."""
    held_out = prompt_file(rl.folder / "val.jsonl", ["2 + 3 =", "4 + 4 ="])
    settings = dict(epochs=2, save_interval=2, eval_interval=2, val_path=[held_out], **more)
    rl("whole", **settings)
    killed(4, rl, "a", **settings)
    rl("a", resume=True, **settings)
    assert same(everything(rl), everything(rl, "whole"))
    assert same(rl.saved()["beside"], rl.saved("whole")["beside"])
    log = rl.log("a", "reward")
    assert len(log) == 6 and all(math.isfinite(line["reward_language"]) for line in log)
    assert rl.log("a", "val_reward")
    changed = rl.log("a", "changed_share")[-1]["changed_share"]
    assert changed > 0.05  # most of such a tiny model is its embedding, of which much stays unread


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, dict(use_moe=True)], ids=str)
def test_two_processes_train_as_one(rl, more):
    """The same answers, whichever process writes them; 7 prompts, so that one gets fewer."""
    rl.data = prompt_file(rl.folder / "data.jsonl", ASKED[:7])
    more = dict(more, num_minibatches=1) if rl.stage is train_ppo else more
    more = dict(more, optimizer="muon")  # AdamW makes as much of rounding as of small gradients
    rl("one", batch_size=4, **more)
    together(rl, 2, batch_size=2, **more)
    one, two = rl.saved("one")["model"], rl.saved()["model"]
    for name in one:  # the mean, for embedding and norms have AdamW
        assert (two[name] - one[name]).abs().mean() < 3e-5, name
    for ours, theirs in zip(rl.log("a", "reward"), rl.log("one", "reward"), strict=True):
        for name in ("reward", "entropy", "length", "tokens", "loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-4), name


def test_a_group_without_signal_gives_its_place_to_another(make_run, tokenizer, monkeypatch):
    """dapo: prompts 0 and 2 are always answered alike, prompt 1 is not."""
    run, model = make_run(loss_type="dapo", num_generations=2, resample=5)
    prompts = rollout.Prompts(some_prompts(tokenizer), 99)

    def rewards(completions):
        own = [each.prompt.row == 1 and n % 2 for n, each in enumerate(completions)]
        return torch.tensor(own, dtype=torch.float), {}

    completions, scores, figures = train_grpo.answer_groups(
        run, model, rewards, prompts.prompts, prompts
    )
    assert figures["flat_groups"] == pytest.approx(2 / 3)
    assert [each.prompt.row for each in completions] == [1] * 6
    assert scores.tolist() == [[0, 1]] * 3


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
    assert len(updates) == 2  # the first update was made from the very policy


# -- mistakes --------------------------------------------------------------------------------------


def test_what_does_not_fit_into_memory_is_refused_with_what_would(rl, command, monkeypatch):
    monkeypatch.setattr(hardware, "memory_available", lambda device: 2e7)
    monkeypatch.setattr(hardware, "memory_in_all", lambda device: 2e7)
    more = dict(update_batch_size=1000, max_gen_len=64)
    code, printed = command(rl.stage, *flags(rl.settings(**more)))
    told = complaint(printed)
    fits = int(re.search(r"; --update_batch_size (\d+) should fit$", told)[1])
    assert code == 2 and "--update_batch_size 1000 with prompts of 96 tokens needs" in told
    assert 1 <= fits <= 500


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(reward=["beauty"]), "--reward knows answer, number"),
        (dict(reward=["answer:much"]), "'much' is no number"),
        (dict(reward=["auto", "answer"]), "auto stands alone"),
        (dict(reward=["judge"]), "the reward judge needs --judge_url"),
        (dict(reward=["transformers"]), "there is no folder .*internlm2-1_8b-reward"),
        (dict(reward=["model"]), "no weights .*reward"),
        (dict(max_gen_len=0), "--max_gen_len must be at least 1"),
        (dict(temperature=0.0), "--temperature must be more than 0"),
        (dict(update_batch_size=0), "--update_batch_size must be at least 1"),
        (dict(rollout_url="http://127.0.0.1:9/v1"), "--rollout_url needs --rollout_folder"),
        (dict(max_seq_len=2), r"all \d+ prompts are longer than --max_seq_len 2"),
        (dict(data_path=["nowhere.jsonl"]), "nowhere.jsonl does not exist"),
        (dict(lora_r=0, use_lora=1), "lora_r 0 must be at least 1"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(rl, command, settings, sentence):
    code, printed = command(rl.stage, *flags(rl.settings(**settings)))
    assert code == 2 and re.search(sentence, complaint(printed))


@pytest.mark.parametrize(
    ("stage", "flag", "value"),
    [
        (train_grpo, "num_generations", 1),
        (train_grpo, "beta", -0.1),
        (train_ppo, "num_minibatches", 0),
        (train_ppo, "gamma", 1.5),
        (train_ppo, "critic_learning_rate", 0.0),
        (train_spo, "epsilon", 0.0),
        (train_spo, "rho_min", 0.99),
        (train_spo, "first_value", 2.0),
    ],
)
def test_numbers_that_make_no_sense_are_refused(stage, flag, value):
    with pytest.raises(UserError, match=f"--{flag}"):
        stage.Args(**{flag: value})


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"conversations": [{"role": "system", "content": "a"}]}, "asks nothing"),
        ({"conversations": [{"role": "assistant", "content": "a"}]}, "asks nothing"),
        ({"text": "a"}, 'has no "conversations"'),
    ],
)
def test_a_row_that_asks_nothing_is_named(rl, command, row, sentence):
    rl.data = prompt_file(rl.folder / "data.jsonl", ASKED[:2])
    with open(rl.data, "a") as file:
        file.write(json.dumps(row) + "\n")
    code, printed = command(rl.stage, *flags(rl.settings()))
    assert code == 2 and re.search(f"line 3 of .*data.jsonl {sentence}", complaint(printed))


@pytest.mark.parametrize("rl", [train_ppo, train_grpo, train_spo], indirect=True)
def test_a_rule_needs_answers_and_auto_tells_how_to_get_a_reward(rl, command):
    rows = [json.loads(line) for line in open(rl.data)]
    del rows[3]["answer"]
    with open(rl.data, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    code, printed = command(rl.stage, *flags(rl.settings(reward=["answer"])))
    assert code == 2 and 'needs an "answer" in every row, and 1 of 9' in complaint(printed)
    code, printed = command(rl.stage, *flags(rl.settings(reward=["auto"])))
    assert code == 2
    for way in ("--reward_model_path", "train_reward.py", 'every row has an "answer"'):
        assert way in complaint(printed)

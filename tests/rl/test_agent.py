"""train_agent.py: episodes as GRPO's completions, the policy's own tokens alone with loss."""

import json
import math

import pytest
import torch
from rl_toy import ASKED, batches_of, prompt_file
from test_ranks import together
from torch.testing import assert_close
from toy import Trainer, everything, same

from dataset.demo.files import demo_rows
from dataset.reply_parser import Reply
from dataset.tools import loop
from dataset.tools.loop import ERRORS, parse_reply
from model.weights import load_model
from trainer import train_agent, train_grpo
from trainer.common.context import Context
from trainer.rl import policy, prompts
from trainer.rl.prompts import Prompt
from trainer.trainer_utils import Run

pytestmark = pytest.mark.usefixtures("in_a_hurry")
SUMS = [
    row
    for row in demo_rows("tools", held_out=True)
    if "expression" in row["conversations"][2].get("tool_calls", "")
]
ROWS = sorted(SUMS, key=lambda row: len(json.dumps(row)))[:9]
RL = dict(
    from_weight="none",
    max_gen_len=5,
    max_seq_len=600,
    max_turns=3,
    num_generations=3,
    batch_size=3,
    update_batch_size=4,
    update_epochs=2,
    reward=["language", "name"],
)


def tool_file(path, rows=ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def calling(monkeypatch):
    """Random weights call no tools; so every reply with an even number of letters is taken for a
    call, whether it ended or not."""
    monkeypatch.setattr(loop, "parse_reply", read_as_calls)
    add_reply = loop.Episode.add_reply

    def add_ended_reply(episode, tokens, last):
        add_reply(episode, tokens[:-1] + [episode.tokenizer.eos_token_id], last)

    monkeypatch.setattr(loop.Episode, "add_reply", add_ended_reply)


def sample(run: Run, model, data: list[Prompt], count: int = 1) -> list:
    """Episodes of each prompt."""
    ctx, step = run.ctx, run.step
    return train_agent.generate_episodes(ctx, model, run.tokenizer, data, count, step=step)


def read_as_calls(text: str, thinking: bool = False) -> Reply:
    if len(text) % 2:
        return parse_reply(text, thinking)
    call = {"name": "calculator", "arguments": {"expression": f"{len(text)} + 1"}}
    return Reply(tool_calls=[call])


@pytest.fixture
def agent(tmp_path) -> Trainer:
    return Trainer(tmp_path, train_agent, (tool_file, ROWS, RL))


@pytest.fixture
def make_run(save, tmp_path, tokenizer):
    def make(**settings):
        args = train_agent.Args(
            from_weight=str(save(num_hidden_layers=1, max_position_embeddings=2048)),
            data_path=[tool_file(tmp_path / "data.jsonl")],
            val_share=0.0,
            device="cpu",
            save_dir=str(tmp_path),
            **{**settings, "max_gen_len": 6},
        )
        model = load_model(args.from_weight, tokenizer=tokenizer)
        ctx = Context.create(args)
        data, _ = prompts.read_prompts(ctx, tokenizer, train_agent.parse_task_row)
        run = Run(ctx, "agent", model, tokenizer, data, collate=prompts.collate_prompts)
        return run, model.train(), data

    return make


# -- episodes --------------------------------------------------------------------------------------


def test_loss_is_on_what_the_policy_drew_alone(make_run, calling, tokenizer):
    """Token by token: nothing of the prompt, nothing of <tool_response> turns; and the log-probs
    are those of a whole forward pass."""
    run, model, prompts = make_run(update_batch_size=4)
    completions = sample(run, model, prompts.prompts[:4], 2)
    assert max(each.episode.turns for each in completions) > 1
    seen = 0
    for batch in batches_of(run, completions):
        found = policy.log_probs(run, model, batch)
        for row, index in enumerate(batch.indices.tolist()):
            episode = completions[index].episode
            drawn, ids = [], episode.ids
            at = episode.prompt_length
            for role, text in episode.transcript:  # walk through it by its texts
                if role == "assistant":
                    end = ids.index(tokenizer.eos_token_id, at) + 1
                    assert tokenizer.decode(ids[at:end], skip_special_tokens=True) == text
                    drawn += range(at, end)
                    at = end
                else:
                    end = tokenizer.eos_token_id
                    at = ids.index(end, at) + 1  # the end of the results' turn
                    at += len(tokenizer("\n<|im_start|>assistant\n").input_ids)
                    assert text in tokenizer.decode(ids[:at])
            assert at == len(ids)
            assert [
                place + 1 for place in batch.completion_mask[row].nonzero().flatten().tolist()
            ] == drawn
            whole = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
            expected = torch.stack([whole[place - 1, ids[place]] for place in drawn])
            assert_close(found[row, batch.completion_mask[row]], expected, atol=1e-5, rtol=0)
            seen += len(drawn)
    assert seen == sum(sum(each.action_mask) for each in completions)


def test_the_ratio_is_exactly_one_until_there_was_an_update(make_run, calling):
    run, model, prompts = make_run(update_batch_size=4)
    completions = sample(run, model, prompts.prompts[:4], 2)
    for batch in batches_of(run, completions):
        old = policy.log_probs(run, model, batch)
        new = model(**policy.policy_inputs(batch, 1.0)).log_probs
        assert torch.equal(torch.exp(new - old), torch.ones_like(old))


def test_the_sampled_ids_are_kept(make_run, calling, tokenizer, monkeypatch):
    """Tokens that no tokenizer would write so come back as they were drawn."""
    run, model, prompts = make_run()
    odd = [tokenizer(letter).input_ids[0] for letter in "the"]
    draw = lambda requests: [[*odd, tokenizer.eos_token_id] for _ in requests]  # noqa: E731
    monkeypatch.setattr(train_agent, "make_generate_fn", lambda *_: draw)
    assert tokenizer(tokenizer.decode(odd)).input_ids != odd
    for each in sample(run, model, prompts.prompts[:3]):
        drawn = [t for t, own in zip(each.tokens, each.action_mask, strict=True) if own]
        assert drawn == [*odd, tokenizer.eos_token_id] * each.episode.turns


def test_episodes_are_the_same_in_any_company(make_run, calling):
    run, model, prompts = make_run()
    side_by_side = sample(run, model, prompts.prompts[:4], 3)
    alone = sample(run, model, prompts.prompts[1:2], 3)
    assert [each.tokens for each in alone] == [each.tokens for each in side_by_side[3:6]]
    assert len({tuple(each.tokens) for each in alone}) == 3
    assert {each.episode.turns for each in side_by_side} > {1}


def test_rewards_and_metrics_by_hand(make_run, tokenizer, monkeypatch):
    """A right episode, one with wrong arguments, one that calls what is not there, one endless."""
    reward = ["answer:0.5", "arguments:0.3", "name:0.2"]
    run, model, prompts = make_run(reward=reward, max_turns=2)
    prompt = prompts.prompts[0]
    (call,) = prompt.task.calls
    worse = {**call, "arguments": {"expression": "1 + 1"}}
    says = [(call, prompt.answer), (worse, prompt.answer), ({**call, "name": "x"}, ""), (call,) * 2]

    def draw(requests):
        texts = []
        for request in requests:
            said = says[request.sample][int(len(request.ids) > len(prompt.ids))]
            texts.append(said if isinstance(said, str) else f"<tool_call>\n{json.dumps(said)}")
        return [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]

    monkeypatch.setattr(train_agent, "make_generate_fn", lambda *_: draw)
    completions = sample(run, model, [prompt], 4)
    rewards, metrics = train_agent.ToolRewards(run.ctx, tokenizer, 64, prompts)(completions)
    assert rewards.tolist() == pytest.approx([1.0, 0.7, 0.0, 0.0])
    assert metrics["success"] == (2, 4) and metrics["tools/call_frequency"] == (5, 4)
    assert metrics["reward"] == pytest.approx((1.7, 4))
    assert metrics["error_unknown_tool"] == metrics["error_endless"] == (1, 4)
    assert {f"error_{kind}" for kind in ERRORS} <= metrics.keys()


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_on_single_turns_it_is_grpo_bit_for_bit(tmp_path, monkeypatch, loss_type):
    """Questions without tools: the same answers, losses and weights as train_grpo; but that GRPO
    does not mind if an answer has no end."""
    end = lambda episode, *errors: setattr(episode, "done", True)  # noqa: E731
    monkeypatch.setattr(loop.Episode, "end", end)
    settings = {**RL, "reward": ["language", "similarity"], "loss_type": loss_type}
    del settings["max_turns"]
    trained = []
    for stage in (train_grpo, train_agent):
        folder = tmp_path / stage.__name__
        folder.mkdir()
        train = Trainer(folder, stage, (prompt_file, ASKED, settings))
        train(max_steps=3)
        trained.append(train)
    assert same(*(train.saved()["model"] for train in trained))
    for one, other in zip(*(train.log("a", "reward") for train in trained), strict=True):
        assert one["loss"] == other["loss"] and one["entropy"] == other["entropy"]
        assert one["reward"] == other["reward"] > 0


def test_training_goes_on_where_it_stopped_bit_by_bit(agent, calling, killed):
    held_out = tool_file(agent.folder / "val.jsonl", ROWS[:2])
    settings = dict(epochs=2, save_interval=2, eval_interval=2, val_path=[held_out])
    agent("whole", **settings)
    killed(4, agent, "a", **settings)
    agent("a", resume=True, **settings)
    assert same(everything(agent), everything(agent, "whole"))
    log = agent.log("a", "reward")
    assert len(log) == 6 and all(math.isfinite(line["success"]) for line in log)
    assert max(line["tools/call_frequency"] for line in log) > 0.3 and "error_malformed" in log[0]
    assert agent.log("a", "eval_success")


@pytest.mark.slow
def test_two_processes_train_as_one(agent, calling):
    """7 questions, so that one process gets fewer; one of them may have more turns."""
    agent.data = tool_file(agent.folder / "data.jsonl", ROWS[:7])
    agent("one", batch_size=4)
    together(agent, 2, batch_size=2)
    assert_close(agent.saved()["model"], agent.saved("one")["model"], atol=1e-4, rtol=0)
    for ours, theirs in zip(agent.log("a", "reward"), agent.log("one", "reward"), strict=True):
        for name in (
            "reward",
            "tools/call_frequency",
            "entropy",
            "completions/mean_length",
            "loss",
        ):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-4), name

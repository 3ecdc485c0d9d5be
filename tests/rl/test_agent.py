"""train_agent.py: episodes as GRPO's completions, the policy's own tokens alone with loss."""

import json
import math
from dataclasses import make_dataclass, replace

import pytest
import torch
from ranks import together
from rl_toy import ASKED, batches_of, prompt_file
from test_mistakes import complaint
from torch.testing import assert_close
from toy import Trainer, everything, flags, same

from dataset.demo.files import demo_rows
from dataset.reply_parser import Reply
from dataset.tools import loop
from dataset.tools.call import ALL_TOOLS
from dataset.tools.loop import ERRORS, parse_reply
from model.errors import UserError
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
    def make(data=ROWS, **settings):
        args = train_agent.Args(
            from_weight=str(save(num_hidden_layers=1, max_position_embeddings=2048)),
            data_path=[tool_file(tmp_path / "data.jsonl", data)],
            val_share=0.0,
            device="cpu",
            save_dir=str(tmp_path),
            **{**settings, "max_gen_len": 6},
        )
        model = load_model(args.from_weight, tokenizer=tokenizer)
        ctx = Context.create(args)
        data, _ = prompts.read_prompts(ctx, tokenizer, parse_row=train_agent.parse_task_row)
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
    says = [
        (call, prompt.truth.text),
        (worse, prompt.truth.text),
        ({**call, "name": "x"}, ""),
        (call,) * 2,
    ]

    def draw(requests):
        texts = []
        for request in requests:
            said = says[request.sample][int(len(request.ids) > len(prompt.ids))]
            texts.append(said if isinstance(said, str) else f"<tool_call>\n{json.dumps(said)}")
        return [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]

    monkeypatch.setattr(train_agent, "make_generate_fn", lambda *_: draw)
    completions = sample(run, model, [prompt], 4)
    rewards, metrics = train_agent.ToolRewards(run.ctx, tokenizer, 64)(completions)
    assert rewards.tolist() == pytest.approx([1.0, 0.7, 0.0, 0.0])
    assert metrics["success"] == (2, 4) and metrics["tools/call_frequency"] == (5, 4)
    assert metrics["reward"] == pytest.approx((1.7, 4))
    assert metrics["error_unknown_tool"] == metrics["error_endless"] == (1, 4)
    assert {f"error_{kind}" for kind in ERRORS} <= metrics.keys()


TOOLS = json.dumps([ALL_TOOLS["calculate_math"].schema["function"], {"name": "search_web"}])


def gt_row(question: str, gt: list | None, tools: str = TOOLS) -> dict:
    """A row as agent_rl.jsonl has it: the last answer is empty."""
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
    system = [{"role": "system", "content": "", "tools": tools}] if tools else []
    return {"conversations": [*system, *chat], "gt": gt}


def test_gt_decides_the_reward_of_agent_data(make_run, tokenizer, monkeypatch):
    """With the default reward: the share of gt in the final answer, whatever was called; nothing
    for an empty reply or a broken call."""
    run, model, prompts = make_run(
        data=[gt_row("What is 3 * 7, and 1000 + 250?", ["21", "1250"])], max_turns=2
    )
    (prompt,) = prompts.prompts
    call = json.dumps({"name": "calculate_math", "arguments": {"expression": "3 * 7"}})
    foreign = json.dumps({"name": "search_web", "arguments": {}})
    says = ["21 and 1,250.", "It is 21.", "", (call, "21, 1250"), (call, ""), (foreign, "21, 1250")]

    def draw(requests):
        texts = []
        for request in requests:
            said = says[request.sample]
            later = len(request.ids) > len(prompt.ids)
            text = said if isinstance(said, str) else said[later]
            texts.append(f"<tool_call>\n{text}\n</tool_call>" if text.startswith("{") else text)
        return [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]

    monkeypatch.setattr(train_agent, "make_generate_fn", lambda *_: draw)
    completions = sample(run, model, [prompt], 6)
    rewards, metrics = train_agent.ToolRewards(run.ctx, tokenizer, 64)(completions)
    assert rewards.tolist() == pytest.approx([1, 0.5, 0, 1, 0, 0])
    assert metrics["success"] == (2, 6) and metrics["error_failed"] == (1, 6)
    assert metrics["rewards/name/mean"] == (0, 0)  # the row does not say which calls are right
    assert "result" in completions[3].transcript and "21" in completions[3].transcript


def test_an_old_checkpoint_knows_the_data(make_run):
    """The text that checkpoints keep a hash of is that of the first version: an answer and the
    repr of a dataclass, one of whose fields had another name."""
    _, _, prompts = make_run()
    prompt = prompts.prompts[0]
    task, answer = prompt.task, prompt.task.answer
    first = make_dataclass("Task", ["messages", "tools", "offered", "calls", "answer", "known"])
    fields = (task.messages, task.tools, task.offered, task.calls, answer, task.recorded_results)
    assert prompt.fingerprint_text == f"{answer}{first(*fields)}"
    assert replace(prompt, task=None).fingerprint_text == answer
    assert replace(prompt, task=None, truth=None).fingerprint_text == "None"


def test_training_on_agent_data_as_they_are(agent, capsys, command):
    """Rows without gt are left out, and tools that cannot be run are told; before the training."""
    rows = [gt_row(f"What is {n} * 7?", [str(7 * n)]) for n in range(3)]
    agent.data = tool_file(agent.folder / "gt.jsonl", [*rows, gt_row("Hi", [], tools="")])
    default = train_agent.Args().reward
    agent(reward=default, max_steps=1, thinking_ratio=0.5, debug_mode=True, debug_interval=1)
    shown = capsys.readouterr().out
    assert "1 of 4 prompts have no right answer" in shown
    assert "3 rows offer tools that cannot be run here (search_web)" in shown
    assert "step 1: reward 0.000" in shown and "of 3 prompts open with <think>" in shown
    (line,) = agent.log(kind="reward")
    assert 0 <= line["completions/thinking_ratio"] <= 1
    tool_file(agent.folder / "gt.jsonl", [gt_row("Hi", [], tools="")])
    code, printed = command(train_agent, *flags(agent.settings(reward=default)))
    assert code == 2 and "there is no reward: no prompt has a right answer" in complaint(printed)


def test_an_episode_has_at_most_max_total_len_tokens(make_run, calling, monkeypatch):
    run, model, prompts = make_run()
    limit = max(len(prompt.ids) for prompt in prompts.prompts) + 60
    args = train_agent.Args(**{**vars(run.ctx.args), "max_total_len": limit, "max_turns": 4})
    make_generate_fn, lengths = train_agent.make_generate_fn, []

    def recording(*given):
        generate = make_generate_fn(*given)
        return lambda requests: lengths.extend(len(r.ids) for r in requests) or generate(requests)

    monkeypatch.setattr(train_agent, "make_generate_fn", recording)
    ctx = replace(run.ctx, args=args)
    episodes = train_agent.generate_episodes(ctx, model, run.tokenizer, prompts.prompts, step=1)
    assert limit - 60 < max(lengths) <= limit - args.max_gen_len
    assert any("too_long" in each.episode.errors for each in episodes)
    assert args.max_prompt_len == limit - args.max_gen_len < args.max_seq_len
    with pytest.raises(UserError, match="must leave room for a prompt"):
        train_agent.Args(max_total_len=100, max_gen_len=100)


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

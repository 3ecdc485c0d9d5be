"""Training with PPO, GRPO, SPO and tools: resumed, in two processes, and with mistakes."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
from ranks import together
from rl_toy import ASKED, prompt_file
from test_mistakes import complaint
from toy import everything, flags, same

from dataset.jsonl import write_rows
from model.command_line import parse_arguments
from model.errors import UserError
from trainer import train_grpo, train_ppo, train_spo
from trainer.common import hardware
from trainer.common.context import Context
from trainer.rl.prompts import Prompt, read_prompts

pytestmark = pytest.mark.usefixtures("in_a_hurry")


@pytest.mark.parametrize("more", [{}, dict(use_moe=True), dict(use_lora=True)], ids=str)
def test_training_goes_on_where_it_stopped_bit_by_bit(rl, killed, more):
    """Weights, optimizers, the tracker, the log and random numbers; with experts and LoRA too."""
    held_out = prompt_file(rl.folder / "val.jsonl", ["2 + 3 =", "4 + 4 ="])
    settings = dict(epochs=2, save_interval=2, eval_interval=2, val_path=[held_out], **more)
    rl("whole", **settings)
    killed(4, rl, "a", **settings)
    rl("a", resume=True, **settings)
    assert same(everything(rl), everything(rl, "whole"))
    assert same(rl.saved()["extra_state"], rl.saved("whole")["extra_state"])
    log = rl.log("a", "reward")
    assert len(log) == 6 and all(math.isfinite(line["rewards/language/mean"]) for line in log)
    assert rl.log("a", "eval_reward")
    changed = rl.log("a", "changed_fraction")[-1]["changed_fraction"]
    assert changed > 0.05  # most of such a tiny model is its embedding, of which much stays unread


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, dict(use_moe=True)], ids=str)
def test_two_processes_train_as_one(rl, more):
    """The same completions, whichever rank samples them; 7 prompts, so that one gets fewer."""
    rl.data = prompt_file(rl.folder / "data.jsonl", ASKED[:7])
    more = dict(more, num_minibatches=1) if rl.stage is train_ppo else more
    more = dict(more, optimizer="muon")  # AdamW makes as much of rounding as of small gradients
    rl("one", batch_size=4, **more)
    together(rl, 2, batch_size=2, **more)
    one, two = rl.saved("one")["model"], rl.saved()["model"]
    for name in one:  # the mean, for embedding and norms have AdamW
        assert (two[name] - one[name]).abs().mean() < 3e-5, name
    for ours, theirs in zip(rl.log("a", "reward"), rl.log("one", "reward"), strict=True):
        for name in ("reward", "entropy", "completions/mean_length", "num_tokens", "loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-4), name


def test_a_share_of_the_prompts_opens_a_thought(tmp_path, tokenizer):
    """Which ones depends on the seed and the prompt alone; all others stay as they are."""
    path = prompt_file(tmp_path / "prompts.jsonl", [f"{n} + 1 =" for n in range(200)])

    def read(**settings) -> list[Prompt]:
        args = train_grpo.Args(data_path=[path], device="cpu", val_share=0.0, **settings)
        return read_prompts(Context.create(args), tokenizer)[0].prompts

    plain, some, others = read(), read(thinking_ratio=0.3), read(thinking_ratio=0.3, seed=1)
    thinking = [prompt.thinking for prompt in some]
    assert 40 < sum(thinking) < 80 and thinking != [prompt.thinking for prompt in others]
    assert thinking == [prompt.thinking for prompt in read(thinking_ratio=0.3, max_gen_len=7)]
    assert all(prompt.thinking for prompt in read(thinking_ratio=1.0))
    for before, after in zip(plain, some, strict=True):
        if after.thinking:
            assert tokenizer.decode(after.ids).endswith("<think>\n")
        assert after.thinking or after.ids == before.ids
    with pytest.raises(UserError, match="--thinking_ratio has no effect with --reasoning 1"):
        read(thinking_ratio=0.3, reasoning=True)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("open_thinking", "something_else")
    with pytest.raises(UserError, match="line 1 of .* the chat template has no open_thinking"):
        read(thinking_ratio=1.0)


# -- mistakes --------------------------------------------------------------------------------------


def test_what_does_not_fit_into_memory_is_refused_with_what_would(rl, command, monkeypatch):
    monkeypatch.setattr(hardware, "memory_available", lambda device: 2e7)
    monkeypatch.setattr(hardware, "total_memory", lambda device: 2e7)
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
        (dict(lora_r=0, use_lora=1), "lora_r must be at least 1"),
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
        parse_arguments(stage.Args, argv=[f"--{flag}", str(value)])


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"conversations": [{"role": "system", "content": "a"}]}, "has no question"),
        ({"conversations": [{"role": "assistant", "content": "a"}]}, "has no question"),
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
def test_prompts_without_an_answer_are_left_out_and_all_of_them_are_a_mistake(rl, command, capsys):
    rows = [json.loads(line) for line in open(rl.data)]
    del rows[3]["answer"]
    rows[5]["answer"] = ""
    write_rows(Path(rl.data), rows)
    rl(reward=["answer"], max_steps=1)
    assert "2 of 9 prompts have no right answer, and there is no reward model" in (
        capsys.readouterr().out
    )
    for row in rows:
        row |= {"answer": None, "gt": []}
    write_rows(Path(rl.data), rows)
    for reward in ("answer", "auto"):
        code, printed = command(rl.stage, *flags(rl.settings(reward=[reward])))
        assert code == 2
        for way in ("train_reward.py", "--reward_model_path DIR", "--reward length repetition"):
            assert way in complaint(printed)

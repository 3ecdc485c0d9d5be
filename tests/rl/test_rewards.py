"""Rewards: the rules by hand, models against their own scores, and what survives."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from dataset.grading import read_truth
from dataset.lm_dataset import encode_chat
from model.errors import UserError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindForScoring
from model.weights import save_weights
from trainer.common.context import Context
from trainer.rl import rules
from trainer.rl.arguments import RolloutArgs
from trainer.rl.prompts import Prompt
from trainer.rl.rewards import Rewards
from trainer.rl.rollout import Completion


@pytest.fixture
def make_rewards(tokenizer, tmp_path):
    """A function that makes Rewards."""

    def make(*names: str, **settings) -> Rewards:
        args = RolloutArgs(
            reward=list(names) or ["auto"],
            data_path=["prompts.jsonl"],
            save_dir=str(tmp_path),
            max_gen_len=10,
            device="cpu",
            **settings,
        )
        return Rewards(Context.create(args), tokenizer, 32)

    return make


def prompt(answer="4", question: str = "What is 2 + 2?", **more) -> Prompt:
    """answer: a text; a list, as "gt" has it; or None."""
    row = {"gt" if isinstance(answer, list) else "answer": answer}
    return Prompt(0, [{"role": "user", "content": question}], [5, 6, 7], read_truth(row), **more)


def said(text: str, answer="4", tokens=(8, 9, 10, 2), **more) -> Completion:
    return Completion(prompt(answer, **more), list(tokens), text, True)


@pytest.mark.parametrize(
    ("name", "completion", "expected"),
    [
        ("answer", said("4"), 1),
        ("answer", said(" 4. "), 1),
        ("answer", said("It is 4"), 0),
        ("answer", said(""), 0),
        ("number", said("2 + 2 = 4"), 1),
        ("number", said("4.0!"), 1),
        ("number", said("4 or 5"), 0),
        ("number", said("four"), 0),
        ("similarity", said("4"), 1),
        ("similarity", said("14", answer="12"), 0.5),
        ("similarity", said("five", answer="12"), 0),
        ("answer", said("12 and 15", answer=["12", "15"]), 1),
        ("answer", said("It is 15.", answer=["12", "15"]), 0.5),
        ("answer", said("", answer=["12", "15"]), 0),
        ("number", said("It is 15.", answer=["12", "15"]), 0.5),
        ("number", said("", answer="4"), 0),
        ("answer", said("hm</think>\n\n4", thinking=True), 1),
        ("answer", said("4 or so", thinking=True), 0),  # the thought has no end
        ("answer", said("<think>\n\n</think>\n\n4"), 1),
        ("language", said("Vier"), 1),
        ("language", said("四"), 0),
        ("language", said("是 no", question="二加二？"), 1 / 3),
        ("language", said("123"), 0),
        ("length", said("4", tokens=[8] * 4), 0.6),
        ("length", said("4", tokens=[8] * 10), 0),
        ("repetition", said("x", tokens=[1, 2, 3, 1, 2, 3, 1, 2]), 3 / 6),
        ("repetition", said("x", tokens=[1, 2]), 0),
    ],
)
def test_rules_by_hand(make_rewards, name, completion, expected):
    total, metrics = make_rewards(name)([completion])
    assert total.item() == pytest.approx(expected)
    for key in ("reward", f"rewards/{name}/mean"):
        assert metrics.pop(key) == pytest.approx((expected, 1))
    assert metrics == {"frac_reward_failed": (0, 1)}


GOOD = "two and two\n</think>\n<answer>\n4\n</answer>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1.0),
        (GOOD + " more", 0.4),
        (GOOD.replace("</think>", ""), 0.3),
        (GOOD + "<answer>", 0.3),
        ("4", 0.1),  # the prompt has opened <think>
    ],
)
def test_the_form_of_reasoning(make_rewards, text, expected):
    total, _ = make_rewards("format", reasoning=True)([said(text)])
    assert total.item() == pytest.approx(expected)


def test_with_reasoning_the_answer_is_between_its_tags(make_rewards):
    rewards = make_rewards("answer", reasoning=True)
    total, _ = rewards([said(GOOD), said("4"), said(GOOD.replace("\n4\n", "\n5\n"))])
    assert total.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "form", "right"),
    [
        ("two and two\n</think>\n\n4", 1.0, 1),
        ("two and two\n</think>\n\n", 0.4, 0),
        ("4", 0.2, 0),
    ],
)
def test_reasoning_without_answer_tags(make_rewards, text, form, right):
    """A tokenizer that has no <answer>: the answer is what follows </think>."""
    completion = said(text, answer_tags=False)
    total, metrics = make_rewards("format", "answer", reasoning=True)([completion])
    assert metrics["rewards/format/mean"] == pytest.approx((form, 1))
    assert metrics["rewards/answer/mean"] == (right, 1)
    assert make_rewards("answer", reasoning=True)([said(text)])[0].item() == 0


def test_parts_are_weighted_and_logged_by_name(make_rewards):
    total, metrics = make_rewards("answer:2", "length:0.5")([said("4"), said("5")])
    assert total.tolist() == pytest.approx([2.3, 0.3])
    assert metrics["reward"] == pytest.approx((2.6, 2))
    assert metrics["rewards/answer/mean"] == (1, 2)
    assert metrics["rewards/length/mean"] == pytest.approx((1.2, 2))


def test_a_rule_that_fails_is_counted_and_survived(make_rewards, monkeypatch):
    def moody(text: str, answer: str) -> bool:
        if text == "5":
            raise ZeroDivisionError
        return True

    monkeypatch.setattr(rules, "same_number", moody)
    total, metrics = make_rewards("number")([said("4"), said("5")])
    assert total[0] == 1 and math.isnan(total[1])
    assert metrics["reward"] == metrics["rewards/number/mean"] == (1, 1)
    assert metrics["frac_reward_failed"] == (1, 2)


def test_auto_takes_what_is_there(make_rewards, tokenizer, tmp_path):
    assert make_rewards().weights == {"answer": 1}
    assert make_rewards(reasoning=True).weights == {"answer": 1, "format": 0.5}
    own_model(tmp_path, tokenizer)
    assert make_rewards().weights == {"model": 1}
    their_model(tmp_path / "theirs", tokenizer)
    assert make_rewards(reward_model_path=str(tmp_path / "theirs")).weights == {"transformers": 1}


def test_prompts_without_a_right_answer(make_rewards, tokenizer, tmp_path):
    """A rule cannot judge them, the reward model that is there can; and it judges no others."""
    known, unknown = prompt(), prompt(None)
    rewards = make_rewards("answer:0.6", "length:0.4")
    assert rewards.can_score(known) and not rewards.can_score(unknown)
    assert make_rewards("length").can_score(unknown)

    own = own_model(tmp_path, tokenizer)
    assert rewards.can_score(unknown)
    completions = [said("4"), said("4", answer=None), said("5")]
    total, metrics = rewards(completions)
    chat = [*unknown.messages, {"role": "assistant", "content": "4"}]
    with torch.no_grad():
        score = own(torch.tensor([encode_chat(tokenizer, chat).ids])).scores[0, -1].item()
    assert total.tolist() == pytest.approx([0.6 + 0.24, 0.6 * score + 0.24, 0.24], abs=1e-5)
    assert metrics["rewards/answer/mean"] == (1, 2)
    assert metrics["rewards/model/mean"] == pytest.approx((score, 1), abs=1e-5)


def own_model(folder, tokenizer) -> MiniMindForScoring:
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = MiniMindForScoring(config)
    torch.nn.init.normal_(model.score.weight)
    model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    path = folder / "reward_32.pth"
    save_weights(model, path, stage="reward", tokenizer=tokenizer, origin={})
    return model.eval()


def their_model(folder, tokenizer, labels: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_labels=labels, pad_token_id=0, bos_token_id=1, **sizes
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def test_models_give_their_scores(make_rewards, tokenizer, tmp_path):
    completions = [said("4"), said("No idea, and a longer text"), said("")]
    chats = [
        [*each.prompt.messages, {"role": "assistant", "content": each.text}] for each in completions
    ]
    own = own_model(tmp_path, tokenizer)
    total, _ = make_rewards("model", update_batch_size=2)(completions)
    rows = [torch.tensor([encode_chat(tokenizer, chat).ids]) for chat in chats]
    expected = [own(row).scores[0, -1].item() for row in rows]
    assert total.tolist() == pytest.approx(expected, abs=1e-5)

    theirs = their_model(tmp_path / "theirs", tokenizer)
    path = str(tmp_path / "theirs")
    total, _ = make_rewards("transformers", reward_model_path=path)(completions)
    ids = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats]
    expected = [theirs(torch.tensor([each])).logits.item() for each in ids]
    assert total.tolist() == pytest.approx(expected, abs=1e-5)


# As internlm2-1_8b-reward has it: a config of transformers 4, and code that takes whatever is in
# rope_scaling for a kind of scaling.
THEIR_CONFIG = """
from transformers import PretrainedConfig

class ToyConfig(PretrainedConfig):
    model_type = "toy_reward"

    def __init__(self, hidden_size=8, vocab_size=6400, rope_theta=1e4, rope_scaling=None, **more):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        super().__init__(**more)
"""
THEIR_MODEL = """
import torch
from transformers import PreTrainedModel
from .configuration_toy import ToyConfig

class ToyForRewardModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.factor = 1.0
        if config.rope_scaling is not None:
            if config.rope_scaling["type"] not in ("linear", "dynamic"):
                raise ValueError("only linear and dynamic scaling are supported")
            self.factor = config.rope_scaling["factor"]
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.v_head = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def get_score(self, tokenizer, conversation):
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        return self.factor * self.v_head(self.embed(ids)).mean().item()
"""


def model_with_code(folder: Path, tokenizer, **fields) -> tuple[torch.Tensor, torch.Tensor]:
    """A reward model that brings its own code; its embedding and its head."""
    folder.mkdir()
    (folder / "configuration_toy.py").write_text(THEIR_CONFIG)
    (folder / "modeling_toy.py").write_text(THEIR_MODEL)
    classes = {"AutoConfig": "configuration_toy.ToyConfig"}
    classes["AutoModel"] = "modeling_toy.ToyForRewardModel"
    config = dict(model_type="toy_reward", auto_map=classes, rope_scaling=None, rope_theta=1e4)
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    torch.manual_seed(2)
    embedding, head = torch.randn(6400, 8), torch.randn(1, 8)
    save_file({"embed.weight": embedding, "v_head.weight": head}, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return embedding, head


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_model_that_asks_whether_rope_scaling_is_none(make_rewards, tokenizer, tmp_path, factor):
    scaling = None if factor == 1 else {"type": "linear", "factor": factor}
    path = tmp_path / "theirs"
    embedding, head = model_with_code(path, tokenizer, rope_scaling=scaling)
    settings = dict(reward_model_path=str(path), trust_remote_code=True)
    total, _ = make_rewards("transformers", **settings)([said("4")])
    chat = [*said("4").prompt.messages, {"role": "assistant", "content": "4"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert total.item() == pytest.approx(factor * (embedding[ids] @ head.T).mean().item(), abs=1e-5)
    with pytest.raises(UserError, match="its own code, which runs only with --trust_remote_code 1"):
        make_rewards("transformers", reward_model_path=str(path))


def test_another_head_is_refused(make_rewards, tokenizer, tmp_path):
    their_model(tmp_path / "theirs", tokenizer, labels=3)
    with pytest.raises(UserError, match="does not give one score: it has another head"):
        make_rewards("transformers", reward_model_path=str(tmp_path / "theirs"))
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    about = dict(stage="reward", tokenizer=tokenizer, origin={})
    save_weights(MiniMindForCausalLM(config), tmp_path / "reward_32.pth", **about)
    with pytest.raises(UserError, match="is not a reward model"):
        make_rewards("model")


def chat_reply(text: str) -> dict:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def test_a_judge_gives_marks(make_rewards, server):
    def answer(path, body):
        asked = body["messages"][0]["content"]
        assert path == "/v1/chat/completions" and "What is 2 + 2?" in asked
        if "Answer:\nrude" in asked:
            return 400, {"error": {"message": "no"}}
        mark = re.search(r"Answer:\n(.*)", asked)[1]
        return 200, chat_reply(f"{mark}/10" if mark.isdigit() else "hm")

    url, asked = server(answer)
    completions = [said(text) for text in ("7", "x", "rude", " ")]
    total, metrics = make_rewards("judge", judge_url=url)(completions)
    assert total[0] == pytest.approx(0.7) and total[1:3].isnan().all()
    assert total[3] == 0 and len(asked) == 3  # nothing was said, so nobody is asked
    assert metrics["frac_reward_failed"] == (2, 4)

"""--empty_think_ratio from end to end: what is trained, saved, loaded and exported."""

import json

import pytest
from toy import CHATS, PAIRS, Trainer, chat_file, pair_file

from dataset.encoding import encode_chat, with_empty_thoughts
from dataset.lm_dataset import has_thoughts
from model.inference.thinking import closes_thoughts
from model.weights import load_model, load_tokenizer
from scripts.convert_model import main as convert
from scripts.serving.arguments import ModelArgs
from scripts.serving.loading import load_chat_model
from trainer import train_dpo, train_full_sft, train_lora

pytestmark = pytest.mark.usefixtures("in_a_hurry")
EMPTY = "<think>\n\n</think>\n\n"
THINKING = [
    [user, {**answer, "reasoning_content": "hm"}] if n % 3 == 0 else [user, answer]
    for n, (user, answer) in enumerate(CHATS)
]
QUESTION = [{"role": "user", "content": "1 + 1 ="}]


def prompt_of(tokenizer):
    return tokenizer.decode(encode_chat(tokenizer, QUESTION, add_generation_prompt=True).ids)


def sft(folder, name, chats=THINKING, **changes):
    train = Trainer(folder, train_full_sft, (chat_file, chats, {"from_weight": "none"}))
    train(name, epochs=1, **changes)
    return folder / name / "out" / "full_sft_32.pth"


def info_of(path):
    return json.loads(path.with_suffix(".json").read_text())


def test_data_without_thoughts_is_trained_as_before(tmp_path):
    first = sft(tmp_path, "default", CHATS)
    second = sft(tmp_path, "none", CHATS, empty_think_ratio=0.0)
    assert first.read_bytes() == second.read_bytes()
    assert "empty_think" not in info_of(first)
    tokenizer = load_tokenizer()
    load_model(first, tokenizer=tokenizer)
    assert not closes_thoughts(tokenizer)


def test_a_model_of_thoughts_is_asked_with_an_empty_one_from_then_on(tmp_path, capsys):
    path = sft(tmp_path, "sft", empty_think_ratio=0.5)
    assert "50% of the rows without thoughts have an empty one" in capsys.readouterr().out
    assert info_of(path)["empty_think"] is True
    loaded = load_chat_model(ModelArgs(weight=str(path), device="cpu"))
    assert prompt_of(loaded.tokenizer).endswith("assistant\n" + EMPTY)

    # the next stages ask in the same way, though their data has no thoughts
    dpo = Trainer(tmp_path, train_dpo, (pair_file, PAIRS, {"from_weight": str(path)}))
    dpo("dpo", epochs=1, hidden_size=None, num_hidden_layers=None)
    assert info_of(tmp_path / "dpo" / "out" / "dpo_32.pth")["empty_think"] is True
    lora = Trainer(tmp_path, train_lora, (chat_file, CHATS, {"from_weight": str(path)}))
    lora("lora", epochs=1, hidden_size=None, num_hidden_layers=None, lora_name="x")
    assert info_of(tmp_path / "lora" / "out" / "lora" / "x_32.pth")["empty_think"] is True

    # and so do other programs
    convert(["to-hf", str(path), str(tmp_path / "folder")])
    assert prompt_of(load_tokenizer(tmp_path / "folder")).endswith("assistant\n" + EMPTY)


def test_an_adapter_of_thoughts_closes_those_of_its_model(tmp_path):
    path = sft(tmp_path, "sft", CHATS)
    lora = Trainer(tmp_path, train_lora, (chat_file, THINKING, {"from_weight": str(path)}))
    lora("lora", epochs=1, hidden_size=None, num_hidden_layers=None, lora_name="x")
    adapter = tmp_path / "lora" / "out" / "lora" / "x_32.pth"
    loaded = load_chat_model(ModelArgs(weight=str(path), lora_weight=str(adapter), device="cpu"))
    assert prompt_of(loaded.tokenizer).endswith("assistant\n" + EMPTY)


@pytest.mark.parametrize(
    ("answer", "thinks"),
    [
        ({"content": "<think>\nhm\n</think>\n\n4"}, True),
        ({"content": "\n<think>hm</think>4"}, True),
        ({"content": "4", "reasoning_content": "hm"}, True),
        ({"content": "4", "reasoning_content": ""}, False),
        ({"content": "The <think> tags hold the thought."}, False),
        ({"content": "<think> is a tag."}, False),
    ],
)
def test_an_answer_that_speaks_of_the_tag_is_no_thought(tmp_path, answer, thinks):
    rows = [[{"role": "user", "content": "?"}, {"role": "assistant", **answer}]]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"conversations": rows[0]}) + "\n")
    assert has_thoughts([path]) == thinks
    assert ("empty_think" in with_empty_thoughts(1.0, *rows)[0][1]) != thinks


def test_a_ratio_of_0_leaves_it_to_the_model(tmp_path):
    path = sft(tmp_path, "sft", empty_think_ratio=0.0)
    assert "empty_think" not in info_of(path)

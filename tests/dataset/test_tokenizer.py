"""The tokenizer in model/: its vocabulary, round trips, and the rule that splits text."""

import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
TAGS = [
    *("<think>", "</think>", "<answer>", "</answer>"),
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
]


def test_ids_of_the_control_tokens(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 6400
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token is None
    assert tokenizer.model_max_length == 32768
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2]
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)
    for tag in TAGS:
        assert len(tokenizer.encode(tag)) == 1


def test_tags_survive_skip_special_tokens(tokenizer):
    text = "".join(TAGS) + "<think>\n3 < 4\n</think>\n<answer>\n是\n</answer>"
    ids = tokenizer.encode("<|im_start|>" + text + "<|im_end|><|endoftext|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_every_byte_is_a_token(tokenizer):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256
    assert set(alphabet) <= set(tokenizer.get_vocab())


def test_every_token_can_be_reached(tokenizer):
    """Each merge makes a token of two others; none stands in the vocabulary without one."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    made = {left + right for left, right in model["merges"]}
    tokens = [token for token, number in model["vocab"].items() if number >= 16]
    assert {token for token in tokens if len(token) > 1} == made


TEXTS = [
    "",
    " ",
    "\n\n",
    "a\n\n\nb \t\r\n",
    "  two  spaces ,and ' quotes'  don't can't clean_up . ! ? n't",
    "你好，世界！Hello, 世界。これはテスト。한국어 العربية",
    "emoji 👩‍👩‍👧‍👦🇨🇳🏳️‍🌈 é e\u0301 ﬁ Å \u00a0\u3000\u200b\ufeff\ufffd\x00\x7f",
    "def f(x):\n    return {'a': [1, 2.50], \"b\": x ** 2}\n\n\n# 注释\n",
    "1234567890 ３４ ²½ Ⅳ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_noise(tokenizer):
    noise = random.Random(0)
    letters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for _ in range(200):
        for text in (
            noise.randbytes(noise.randrange(100)).decode("latin-1"),
            "".join(noise.choices(letters, k=noise.randrange(50))),
            "".join(
                noise.choices("ab 你好\n\r\t'，。1<|im_end|>\U0001f600", k=noise.randrange(50))
            ),
        ):
            assert tokenizer.decode(tokenizer.encode(text)) == text
            plain = tokenizer.encode(text, split_special_tokens=True)
            assert not {0, 1, 2} & set(plain) and tokenizer.decode(plain) == text


def test_digits_one_by_one(tokenizer):
    assert tokenizer.tokenize("20250131") == list("20250131")
    assert tokenizer.tokenize("3.14+2=5") == list("3.14+2=5")
    assert not [token for token in tokenizer.get_vocab() if re.search(r"[0-9].*[0-9]", token)]


def test_blank_line_and_roles_are_tokens(tokenizer):
    for text in ("\n\n", "system", "user", "assistant"):
        assert len(tokenizer.encode(text)) == 1


def test_pre_tokenizer_is_llama_cpps_qwen2(tokenizer):
    """llama.cpp names its pre-tokenizers; the GGUF says "qwen2", so it must be just that."""
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert pattern == getattr(qwen2, "PRETOKENIZE_REGEX", pattern)
    content = json.loads((ROOT / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    split, to_bytes = content["pre_tokenizer"]["pretokenizers"]
    assert split["type"] == "Split" and split["pattern"] == {"Regex": pattern}
    assert split["behavior"] == "Isolated" and split["invert"] is False
    assert to_bytes["type"] == "ByteLevel"
    assert to_bytes["add_prefix_space"] is False and to_bytes["use_regex"] is False
    assert content["normalizer"] is None and content["post_processor"] is None
    assert content["model"]["ignore_merges"] is False


def test_compression(tokenizer):
    """A guard against a bad retraining, on text that no file holds."""
    zh = "学习一门新的语言需要耐心。你可以每天读一点简单的文章，再试着和朋友聊天。"
    en = "Learning a new language takes patience. Read a little every day, and talk to people."
    assert len(zh) / len(tokenizer.encode(zh)) > 1.2
    assert len(en) / len(tokenizer.encode(en)) > 3.0

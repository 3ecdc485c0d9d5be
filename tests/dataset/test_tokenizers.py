"""Tokenizers of all kinds: without BOS, EOS or padding, and the bytes of their tokens."""

import json
import math
import shutil

import pytest
import torch
from chats import assistant, user
from foreign_templates import LLAMA3, foreign_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dataset.chat import stop_tokens
from dataset.encoding import encode_text, has_exact_token_bytes
from dataset.lm_dataset import load_documents, token_bytes
from dataset.packing import PackedDataset
from dataset.tools.loop import tokens_of_results
from model.errors import UserError
from model.inference.engine import eos_ids
from model.inference.tokens import decode_token_bytes
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import TOKENIZER, load_model, load_tokenizer
from scripts.eval_ppl import bits_per_byte
from scripts.serving.arguments import ModelArgs
from scripts.serving.loading import load_chat_model
from trainer.common.arguments import TrainArgs
from trainer.common.context import Context
from trainer.common.evaluation import evaluate_loss
from trainer.common.setup import special_ids


def our_tokenizer_with(folder, **changes):
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    config = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return load_tokenizer(folder)


def test_without_bos_a_document_ends_with_eos(tmp_path):
    tokenizer = our_tokenizer_with(tmp_path, bos_token=None)
    encoded = encode_text(tokenizer, "one two")
    assert encoded.ids == [*tokenizer("one two").input_ids, 2]
    assert all(encoded.loss_mask)
    assert special_ids(tokenizer)["bos_token_id"] is None


def test_without_eos_a_document_is_refused(tmp_path):
    tokenizer = our_tokenizer_with(tmp_path, eos_token=None)
    with pytest.raises(UserError, match="has no eos_token"):
        encode_text(tokenizer, "one two")


def test_without_padding_eos_fills_a_batch(tmp_path):
    assert our_tokenizer_with(tmp_path, pad_token=None).pad_token_id == 2


def test_a_model_stops_at_eos_and_at_the_end_of_a_turn(tmp_path, tokenizer):
    assert stop_tokens(tokenizer) == [2]
    expected = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert special_ids(tokenizer) == expected
    # as Qwen's: a text ends with <|endoftext|>, a turn with <|im_end|>
    qwen = our_tokenizer_with(tmp_path, eos_token="<|endoftext|>", bos_token=None)
    assert stop_tokens(qwen) == [0, 2]
    expected = {"bos_token_id": None, "eos_token_id": [0, 2], "pad_token_id": 0}
    assert special_ids(qwen) == expected


def test_results_of_tools_follow_the_end_of_the_turn_whatever_token_that_is(tokenizer):
    class Result:
        text = "12:00"

    llama = foreign_tokenizer(LLAMA3)
    assert llama.decode(tokens_of_results(llama, [Result])) == (
        "<|start_header_id|>tool<|end_header_id|>\n\n12:00<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    messages = [user("…"), assistant("…"), {"role": "tool", "content": "12:00"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ours = tokenizer.decode(tokens_of_results(tokenizer, [Result]))
    assert rendered.endswith("…<|im_end|>" + ours)


# -- bytes -----------------------------------------------------------------------------------------

TEXTS = [
    "The quick brown fox, 12½ km; it's  a dog's\n\n\tlife.",
    "从零开始训练一个语言模型。 Ünïcode tëxt ﬁnds ＷＩＤＥ letters",
    "e\u0301 and é, 😀 👩‍👧 İstanbul ▁ ##x \u200d",
    " leading, and trailing ",
    "x",
]


def train(model, trainer, **parts):
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator(TEXTS[:2] * 5, trainer)
    content = json.loads(backend.to_str())  # the trainer knows no other way to add names of bytes
    content["added_tokens"] = [t for t in content["added_tokens"] if "<0x" not in t["content"]]
    backend = Tokenizer.from_str(json.dumps(content))
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if backend.token_to_id("<unk>") is not None:
        names["unk_token"] = "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


SPECIAL = ["<unk>", "<s>", "</s>"]
SPACES = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
KINDS = {
    "byte-level BPE": lambda: train(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL[1:],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    ),
    "byte-level BPE, NFC": lambda: train(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL[1:],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
        normalizer=normalizers.NFC(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    ),
    "BPE with byte fallback": lambda: train(
        models.BPE(byte_fallback=True, unk_token="<unk>"),
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL + [f"<0x{n:02X}>" for n in range(256)]
        ),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=SPACES,
    ),
    "WordPiece": lambda: train(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    ),
    "Unigram": lambda: train(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>"),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    ),
}


def write_texts(path):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [True, False])
def test_bits_per_byte_divide_by_the_bytes_of_the_text(kind, bos, tmp_path):
    """A model that gives every token the same probability: its bits are known."""
    tokenizer = KINDS[kind]()
    if not bos:
        tokenizer.bos_token = None
    path = write_texts(tmp_path / "t.jsonl")
    documents = load_documents(path, "text", tokenizer, cache=tmp_path)
    data = PackedDataset(documents, 16)
    config = MiniMindConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = MiniMindForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    ctx = Context.create(TrainArgs(data_path=["x"], batch_size=2, device="cpu"))
    result = evaluate_loss(ctx, model, tokenizer, data)

    control = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    num_tokens = size = 0
    for text in TEXTS:
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        assert not control & set(encoding.ids)
        skipped = 0 if bos else encoding.offsets[0][1]  # nothing predicts the first token
        num_tokens += len(encoding.ids) - (not bos)
        size += len(text[skipped:].encode())
    expected = num_tokens * math.log2(len(tokenizer)) / size
    assert result["eval_bpb"] == pytest.approx(expected, rel=1e-5)
    assert result["eval_loss"] == pytest.approx(math.log(len(tokenizer)), rel=1e-5)


def test_bytes_are_counted_by_token_only_where_that_is_exact(tokenizer, tmp_path):
    assert has_exact_token_bytes(tokenizer)
    exact = {kind for kind, make in KINDS.items() if has_exact_token_bytes(make())}
    assert exact == {"byte-level BPE"}
    (*_, last) = load_documents(
        write_texts(tmp_path / "t.jsonl"), "text", tokenizer, cache=tmp_path
    )
    assert set(last) == {"input_ids", "loss_mask"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_are_those_of_a_text_that_loses_nothing(kind):
    tokenizer = KINDS[kind]()
    text = "the quick brown fox"
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    parts = [decode_token_bytes(tokenizer, token) for token in ids]
    assert b"".join(parts).removeprefix(b" ") == text.encode()
    assert token_bytes(tokenizer)[ids].tolist() == [len(part) for part in parts]
    assert decode_token_bytes(tokenizer, tokenizer.eos_token_id) == b"</s>"


def test_bytes_that_have_no_token_of_their_own(tmp_path):
    tokenizer = KINDS["BPE with byte fallback"]()
    ids = tokenizer.backend_tokenizer.encode("é😀", add_special_tokens=False).ids
    parts = [decode_token_bytes(tokenizer, token) for token in ids]
    assert b"".join(parts) == " é😀".encode()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte-level BPE, NFC"])
def test_eval_ppl_divides_by_the_bytes_of_the_text(kind):
    tokenizer = KINDS[kind]()
    config = MiniMindConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = MiniMindForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    num_tokens = sum(
        len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        for text in TEXTS
    )
    expected = num_tokens * math.log2(len(tokenizer)) / sum(len(text.encode()) for text in TEXTS)
    assert bits_per_byte(model, tokenizer, TEXTS) == pytest.approx(expected, rel=1e-5)


def test_a_bare_file_of_weights_takes_the_special_tokens_of_its_tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer = our_tokenizer_with(folder, eos_token="<|endoftext|>", bos_token=None)
    config = MiniMindConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1)
    torch.save(MiniMindForCausalLM(config).half().state_dict(), tmp_path / "full_sft_16.pth")
    model = load_model(tmp_path / "full_sft_16.pth", tokenizer=tokenizer)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 0)
    settings = dict(weight=str(tmp_path / "full_sft_16.pth"), tokenizer_path=str(folder))
    loaded = load_chat_model(ModelArgs(**settings, device="cpu"), decode_only=False)
    assert eos_ids(loaded.model) == [0, 2]

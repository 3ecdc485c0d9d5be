"""GGUF files: what is in them, and what transformers and llama.cpp make of them."""

import json
import random

import gguf
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from test_convert import IDS, convert
from test_model import PAIRS
from tokenizers import Tokenizer, normalizers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from model.errors import UserError
from model.formats.gguf_format import read_gguf, strip_generation_tags
from model.formats.ollama_format import modelfile
from model.model_minimind import MiniMindConfig
from model.weights import load_model

KINDS = {name: fields for name, fields in PAIRS.items() if name != "glm4_moe"} | {
    "experts_and_qk_norm": dict(use_moe=True, qk_norm=True, n_shared_experts=2),
    "untied": dict(tie_word_embeddings=False),
    "yarn_of_an_older_model": dict(
        inference_rope_scaling=True, yarn_original_length=32, yarn_beta_fast=4.0
    ),
    "yarn_of_a_newer_model": dict(
        qk_norm=True,
        inference_rope_scaling=True,
        yarn_original_length=32,
        yarn_factor=16.0,
        yarn_attention_factor=1.0,
    ),
}
ARCHITECTURES = {
    "llama": "llama",
    "qwen3": "qwen3",
    "qwen2_moe": "bailingmoe",
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "experts_and_qk_norm": "bailingmoe2",
}
MESSAGES = [
    {"role": "system", "content": "Be brief.", "tools": '[{"name": "clock"}]'},
    {"role": "user", "content": "What time is it? 几点了？"},
    {"role": "assistant", "content": "", "tool_calls": '[{"name": "clock", "arguments": {}}]'},
    {"role": "tool", "content": "12:00"},
]


@pytest.fixture(params=KINDS)
def made(request, save, tmp_path):
    """A model, and a file in float32 made of it."""
    path = save(**KINDS[request.param])
    model = load_model(path)
    if hasattr(model.model.layers[0].mlp, "e_score_correction_bias"):  # not zeros, as at first
        for layer in model.model.layers:
            layer.mlp.e_score_correction_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
        torch.save(model.state_dict(), path)
    convert("to-gguf", path, tmp_path / "model.gguf", "--dtype", "float32")
    return request.param, load_model(path), tmp_path / "model.gguf"


# -- what is in the file ---------------------------------------------------------------------------


def test_the_file_holds_every_weight(made):
    kind, model, path = made
    state = read_gguf(path, model)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    fields = gguf.GGUFReader(path).fields
    if kind in ARCHITECTURES:
        assert fields["general.architecture"].contents() == ARCHITECTURES[kind]


@pytest.mark.parametrize("kind", ["llama", "untied"])
@torch.no_grad()
def test_transformers_reads_the_same_model(save, tmp_path, kind):
    """An independent reader, which turns q and k back."""
    path = save(**KINDS[kind])
    convert("to-gguf", path, tmp_path / "model.gguf", "--dtype", "float32")
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    assert type(other).__name__ == "LlamaForCausalLM"
    assert_close(other.eval()(IDS).logits, load_model(path)(IDS).logits, atol=2e-5, rtol=1e-5)


def test_eight_bits_take_half_the_room_and_spare_the_norms(save, tmp_path, capsys):
    path = save()
    sizes = {}
    for dtype in ("float16", "q8_0"):
        convert("to-gguf", path, tmp_path / f"{dtype}.gguf", "--dtype", dtype)
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / f"{dtype}.gguf").tensors}
        sizes[dtype] = sum(tensor.n_bytes for tensor in tensors.values())
        assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert sizes["q8_0"] < 0.55 * sizes["float16"]
    said = capsys.readouterr().out
    assert "q8_0 itself changes a logit" in said and "float16 itself" not in said


def test_the_tokenizer_goes_along(save, tmp_path, tokenizer):
    convert("to-gguf", save(vocab_size=6464), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert tokens[:6400] == tokenizer.convert_ids_to_tokens(range(6400))
    assert types[:3] == [gguf.TokenType.CONTROL] * 3
    assert types[tokenizer.convert_tokens_to_ids("<think>")] == gguf.TokenType.USER_DEFINED
    assert types[6400:] == [gguf.TokenType.UNUSED] * 64
    assert fields["tokenizer.ggml.pre"].contents() == "qwen2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["general.name"].contents() == "model"


def test_the_template_needs_nothing_of_transformers(tokenizer):
    def fail(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(
        strip_generation_tags(tokenizer.chat_template), {"raise_exception": fail}
    )
    for messages in (MESSAGES, MESSAGES[1:2]):
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        assert template.render(messages=messages, add_generation_prompt=True) == expected


def test_a_modelfile_names_the_file_and_ends_turns(save, tmp_path, tokenizer):
    convert("to-gguf", save(), tmp_path / "mine.gguf", "--ollama")
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./mine.gguf"
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "PARAMETER num_ctx 256" in lines  # as far as the model goes
    assert "num_ctx 2048" in modelfile(tmp_path / "mine.gguf", MiniMindConfig(), tokenizer)


def test_yarn_that_a_file_does_not_hold_is_told(save, tmp_path, capsys):
    path = save(inference_rope_scaling=True, yarn_beta_slow=2.0)
    convert("to-gguf", path, tmp_path / "mine.gguf")
    assert "--yarn-beta-fast 32 --yarn-beta-slow 2\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="ollama has no such setting"):
        convert("to-gguf", path, tmp_path / "new.gguf", "--ollama")
    assert not (tmp_path / "new.gguf").exists()


def test_a_file_that_is_not_the_model_is_no_success(save, tmp_path, monkeypatch):
    """One number of one weight, of which 8 bits keep the others apart."""
    right = gguf.quants.quantize

    def wrong(weight, kind):
        if weight.ndim == 2 and weight.shape == (64, 64):
            weight = weight.copy()
            weight[3, 5] += 0.2 * abs(weight).max()
        return right(weight, kind)

    path = save()
    for dtype in ("float32", "float16", "q8_0"):
        with monkeypatch.context() as patch:
            patch.setattr(gguf.quants, "quantize", wrong)
            with pytest.raises(UserError, match="by more than rounding"):
                convert("to-gguf", path, tmp_path / "m.gguf", "--dtype", dtype)
    assert not list(tmp_path.glob("*.gguf"))


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(use_moe=True, scoring_func="sigmoid"), "sigmoid. only with"),
        (
            dict(use_moe=True, n_shared_experts=0, norm_topk_prob=False),
            "norm_topk_prob False only with",
        ),
    ],
)
def test_what_llama_cpp_has_not_is_said_to_be_so(save, tmp_path, fields, words):
    with pytest.raises(UserError, match=words):
        convert("to-gguf", save(**fields), tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_mistakes_are_said_at_once(save, tmp_path):
    path = save()
    (tmp_path / "there.gguf").write_text("mine")
    for words, expected in (
        ((tmp_path / "there.gguf",), "exists already"),
        ((tmp_path / "new.gguf", "--dtype", "bfloat16"), "invalid choice: 'bfloat16'"),
        ((tmp_path / "new.gguf", "--native"), "--native"),
        ((tmp_path / "Modelfile", "--ollama"), "should be a .gguf file"),
    ):
        with pytest.raises(UserError, match=expected):
            convert("to-gguf", path, *words)
    (tmp_path / "Modelfile").write_text("mine")
    with pytest.raises(UserError, match="Modelfile exists already"):
        convert("to-gguf", path, tmp_path / "new.gguf", "--ollama")
    assert (tmp_path / "Modelfile").read_text() == (tmp_path / "there.gguf").read_text() == "mine"
    assert not (tmp_path / "new.gguf").exists()


def test_a_tokenizer_that_llama_cpp_does_not_support_is_refused(save, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "other")
    file = str(tmp_path / "other" / "tokenizer.json")
    changed = Tokenizer.from_file(file)
    changed.normalizer = normalizers.Lowercase()
    changed.save(file)
    with pytest.raises(UserError, match="without normalizer only"):
        convert("to-gguf", save(), tmp_path / "m.gguf", "--tokenizer_path", tmp_path / "other")


# -- llama.cpp itself ------------------------------------------------------------------------------


@pytest.fixture
def llama():
    """llama.cpp, with the settings that a file does not hold as the model has them."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama.cpp itself was not asked: pip install llama-cpp-python"
    )

    def load(path, config, **settings):
        return llama_cpp.Llama(
            str(path),
            n_ctx=256,
            type_k=0,  # a cache in float32
            type_v=0,
            yarn_beta_fast=config.yarn_beta_fast,
            yarn_beta_slow=config.yarn_beta_slow,
            verbose=False,
            **settings,
        )

    return load


@torch.no_grad()
def test_llama_cpp_has_the_same_logits_and_greedy_tokens(made, llama):
    _, model, path = made
    engine = llama(path, model.config, logits_all=True)
    prompt = IDS[0].tolist()
    reply = model.generate(IDS[:1], max_new_tokens=40, do_sample=False, eos_token_id=None)
    theirs = []
    for token in engine.generate(prompt, temp=0.0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == 40:
            break
    assert theirs == reply[0, len(prompt) :].tolist()
    logits = torch.tensor(engine.scores[: engine.n_tokens])
    assert_close(logits, model(reply[:, : len(logits)]).logits[0], atol=1e-3, rtol=1e-3)


def test_llama_cpp_cuts_text_into_the_same_tokens(save, tmp_path, tokenizer, llama):
    path = save()
    convert("to-gguf", path, tmp_path / "model.gguf")
    engine = llama(tmp_path / "model.gguf", load_model(path).config, vocab_only=True)
    for text in fuzz(2000):
        expected = tokenizer(text)["input_ids"]
        assert engine.tokenize(text.encode(), add_bos=False, special=True) == expected, text
        assert engine.detokenize(expected, special=True) == text.encode(), text


def fuzz(count: int) -> list[str]:
    """Words, digits, signs, white space, Chinese, emoji, tags and any character of Unicode."""
    draw = random.Random(0)
    pieces = "the model's I'LL 12345 3.14 ， 。 注意力 机制 é ñ 한국 مرحبا 👍🏽 … ’s __ +=".split()
    pieces += ["<|im_end|>", "<think>", "</tool_call>", "<|im_", "\u00a0", "\u3000"]
    pieces += [" ", "   ", "\t", "\n", "\n\n", "\r\n", " \n"]
    texts = ["", " ", "\n", "a" * 300, "你好" * 100]
    while len(texts) < count:
        some = [draw.choice(pieces) for _ in range(draw.randint(1, 12))]
        if draw.random() < 0.5:
            some += [chr(draw.choice((draw.randint(1, 0xD7FF), draw.randint(0xE000, 0x1FFFF))))]
        draw.shuffle(some)
        texts.append(draw.choice(("", " ")).join(some))
    return texts


def test_llama_cpp_talks_by_the_template(save, tmp_path, tokenizer, llama):
    path = save()
    convert("to-gguf", path, tmp_path / "model.gguf", "--dtype", "float32")
    model = load_model(path)
    engine = llama(tmp_path / "model.gguf", model.config)
    answer = engine.create_chat_completion(
        MESSAGES[1:2], max_tokens=8, temperature=0.0, repeat_penalty=1.0
    )
    inputs = tokenizer.apply_chat_template(
        MESSAGES[1:2], add_generation_prompt=True, return_tensors="pt"
    )
    reply = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"].strip("\ufffd") == expected.strip("\ufffd")

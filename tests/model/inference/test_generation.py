"""Greedy decoding against transformers' generate, the KV cache, and float16 weights."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from model.inference.engine import eos_ids
from model.inference.generation import (
    decode,
    generate,
    generate_text,
    pack_for_cpu_decoding,
)
from model.inference.kv_cache import KVCache
from model.inference.sampling import (
    SamplingParams,
)

PROMPTS = [[5, 9, 17, 33, 60], [7], [80, 81, 82]]
GREEDY = SamplingParams(max_new_tokens=20, temperature=0, stop_ids=())


def until(tokens, stop):
    """The tokens up to and including the first that is in `stop`."""
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens


# -- greedy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "penalty"),
    [(PROMPTS[:1], 1.0), (PROMPTS[:1], 1.5), (PROMPTS, 1.0)],
    ids=["single", "single_with_penalty", "left_padded_batch"],
)
def test_greedy_equals_transformers_generate(either, prompts, penalty):
    sampling = replace(GREEDY, repetition_penalty=penalty)
    free = generate(either, prompts, sampling)
    stop = [free[0][9], free[-1][3]]  # rows end at different steps
    longest = max(map(len, prompts))
    expected = either.generate(
        torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        max_new_tokens=20,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=stop,
        pad_token_id=0,
    )[:, longest:]
    replies = generate(either, prompts, replace(sampling, stop_ids=tuple(stop)))
    assert replies == [until(row.tolist(), stop) for row in expected]
    assert len(set(free[0])) > 3  # no single token for ever


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_batch_equals_each_prompt_alone(either, penalty):
    sampling = replace(GREEDY, repetition_penalty=penalty)
    alone = [generate(either, [prompt], sampling)[0] for prompt in PROMPTS]
    assert generate(either, PROMPTS, sampling) == alone


def test_finished_sequences_leave_the_batch_and_the_others_go_on(either):
    free = generate(either, PROMPTS, GREEDY)
    stop = (free[0][2], free[1][7])
    steps = list(decode(either, PROMPTS, SamplingParams(20, 0, stop_ids=stop)))
    replies = [[step[row] for step in steps if row in step] for row in range(3)]
    assert replies == [until(reply, stop) for reply in free]
    assert len({len(reply) for reply in replies}) > 1


def test_reply_ends_at_the_models_own_eos(model):
    free = generate(model, PROMPTS[:1], GREEDY)[0]
    model.generation_config.eos_token_id = free[4]
    assert generate(model, PROMPTS[:1], replace(GREEDY, stop_ids=None)) == [until(free, free[4:5])]
    assert generate(model, PROMPTS[:1], GREEDY) == [free]  # stop_ids of (): never


@pytest.mark.parametrize(
    ("generation", "config", "ids"), [(None, 7, [7]), ([3, 4], 7, [3, 4]), (None, None, [])]
)
def test_eos_ids(model, generation, config, ids):
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
    assert eos_ids(model) == ids


def test_text_of_many_prompts_comes_in_their_order(make_model, tokenizer):
    model = make_model(vocab_size=len(tokenizer))
    texts = list(generate_text(model, tokenizer, PROMPTS, GREEDY, batch_size=2))
    assert texts == [
        tokenizer.decode(reply, skip_special_tokens=True)
        for reply in generate(model, PROMPTS, GREEDY)
    ]


# -- cache -----------------------------------------------------------------------------------------


def test_kv_cache_holds_rows_of_any_length_and_grows():
    """Against a list of each row's keys; 2 fit, then 4, 8, 16."""
    memory = KVCache(rows=3, capacity=2)
    torch.manual_seed(0)
    kept = [torch.zeros(2, 0, 16) for _ in range(3)]
    for first, sizes in ((0, (1, 3)), (2, (4,)), (0, (1, 1, 1)), (1, (5, 5)), (0, (1, 1, 1))):
        starts = [kept[first + n].shape[1] for n in range(len(sizes))]
        new = torch.randn(len(sizes), 2, max(sizes), 16)
        for layer in range(2):
            cache = memory.view(first, starts, max(sizes))
            keys, values = cache.update(new + layer, -new, layer)
            for n, size in enumerate(sizes):
                whole = torch.cat((kept[first + n], new[n, :, :size]), 1)
                assert torch.equal(values[n, :, : starts[n] + size], -whole)
                assert torch.equal(
                    keys[n, :, starts[n] : starts[n] + size], new[n, :, :size] + layer
                )
                if layer:
                    kept[first + n] = whole
    assert memory.capacity == 16
    memory.copy(2, 0, kept[2].shape[1])
    _, values = memory.view(0, [kept[2].shape[1]], 1).update(keys[:1, :, :1], keys[:1, :, :1], 0)
    assert torch.equal(values[0, :, :-1], -kept[2])


# -- mode and errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [3, 20], ids=["closed_early", "to_the_end"])
def test_mode_of_the_model_is_restored(make_model, training, steps):
    model = make_model(dropout=0.5).train(training)
    model.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    stream = decode(model, PROMPTS, GREEDY)
    tokens, modes = [], []
    for _ in range(steps):
        tokens.append(next(stream)[0])
        assert not model.training  # no dropout while decoding
        assert not torch.is_inference_mode_enabled()  # decode is, the caller is not
    stream.close()
    assert model.training == training
    assert all(modes)
    assert tokens == generate(make_model(), PROMPTS, GREEDY)[0][:steps]


def test_mode_of_the_model_is_restored_after_an_error(model, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.model, "forward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        generate(model.train(), PROMPTS, GREEDY)
    assert model.training


@pytest.mark.parametrize("prompts", [[], [[]], [[5], []]])
def test_empty_prompts_are_refused(model, prompts):
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, prompts, GREEDY)


def test_more_tokens_than_positions_are_refused(make_model):
    model = make_model(max_position_embeddings=24)
    with pytest.raises(ValueError, match="5 prompt tokens and 20 new ones.* 24 positions"):
        generate(model, PROMPTS, GREEDY)
    assert len(generate(model, [[5, 9, 17, 33]], GREEDY)[0]) == 20  # exactly 24


# -- float16 weights on a CPU ----------------------------------------------------------------------

X86 = torch.backends.quantized.engine in ("x86", "fbgemm")


@pytest.mark.skipif(not X86, reason="FBGEMM is for x86")
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_has_float16_weights_and_the_same_logits(make_model, monkeypatch, tied):
    model = make_model(initializer_range=0.1, tie_word_embeddings=tied).half().float()
    ids = torch.tensor(PROMPTS[:1])
    expected = model(ids).logits
    prepared = pack_for_cpu_decoding(model)
    monkeypatch.setattr(F, "linear", None)  # not used any more
    assert_close(prepared(ids).logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["single", "batch"])
def test_greedy_decoding_of_a_packed_model_is_the_same(make_model, prompts):
    model = make_model().half().float()
    expected = generate(model, prompts, GREEDY)
    assert generate(pack_for_cpu_decoding(model), prompts, GREEDY) == expected


def test_weights_that_are_not_float16_are_not_packed(model):
    assert type(pack_for_cpu_decoding(model).lm_head) is torch.nn.Linear

"""Decoding against transformers' generate, sampling against its own probabilities, streaming."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.inference import engine
from model.inference.engine import KVCache, eos_ids
from model.inference.generation import (
    decode,
    generate,
    generate_text,
    pack_for_cpu_decoding,
)
from model.inference.sampling import (
    SamplingParams,
    apply_penalties,
    filter_logits,
    make_generator,
    sample,
)
from model.inference.streaming import StreamingDetokenizer, stream_text

PROMPTS = [[5, 9, 17, 33, 60], [7], [80, 81, 82]]
GREEDY = SamplingParams(max_new_tokens=20, temperature=0, stop_ids=())


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture(params=["own", "llama"])
def either(request, model):
    """The model, and one of transformers with the same weights, which has a cache of its own."""
    if request.param == "own":
        return model
    config = model.config
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
        )
    )
    peer.load_state_dict(model.state_dict(), strict=True)
    return peer.eval()


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


def test_rows_that_end_leave_the_batch_and_the_others_go_on(either):
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


def test_rows_of_any_length_lie_in_one_memory_which_grows():
    """Against a list of each row's keys; 2 fit, then 4, 8, 16."""
    memory = KVCache(rows=3, capacity=2)
    torch.manual_seed(0)
    kept = [torch.zeros(2, 0, 16) for _ in range(3)]
    for first, sizes in ((0, (1, 3)), (2, (4,)), (0, (1, 1, 1)), (1, (5, 5)), (0, (1, 1, 1))):
        starts = [kept[first + n].shape[1] for n in range(len(sizes))]
        new = torch.randn(len(sizes), 2, max(sizes), 16)
        for layer in range(2):
            cache = memory.slice(first, starts, max(sizes))
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
    memory.move(2, 0, kept[2].shape[1])
    _, values = memory.slice(0, [kept[2].shape[1]], 1).update(keys[:1, :, :1], keys[:1, :, :1], 0)
    assert torch.equal(values[0, :, :-1], -kept[2])


# -- sampling --------------------------------------------------------------------------------------

SAMPLED = SamplingParams(max_new_tokens=15, seed=7, stop_ids=())


def test_sampled_tokens_do_not_depend_on_the_neighbours(either):
    batch = generate(either, PROMPTS, SAMPLED)
    for others in ([[3] * 11], [[4, 5]]):  # longer and shorter ones, in the place of the third
        assert generate(either, PROMPTS[:2] + others, SAMPLED)[:2] == batch[:2]
    assert generate(either, PROMPTS[:1], SAMPLED) == batch[:1]


def test_a_row_goes_on_as_before_when_a_neighbour_ends(either):
    free = generate(either, PROMPTS, SAMPLED)
    stop = (free[0][2],)
    assert generate(either, PROMPTS, replace(SAMPLED, stop_ids=stop)) == [
        until(reply, stop) for reply in free
    ]


def test_the_seed_decides(model):
    first = generate(model, PROMPTS, SAMPLED)
    assert generate(model, PROMPTS, SAMPLED) == first
    assert generate(model, PROMPTS, replace(SAMPLED, seed=1000)) != first
    unseeded = replace(SAMPLED, seed=None)
    assert generate(model, PROMPTS, unseeded) != generate(model, PROMPTS, unseeded)


def test_the_same_prompt_gets_other_tokens_in_another_row(model):
    first, second = generate(model, PROMPTS[:1] * 2, SAMPLED)
    assert first != second


FILTERS = {
    "temperature": dict(temperature=0.7),
    "top_k": dict(top_k=5),
    "top_k_above_the_vocabulary": dict(top_k=99),
    "top_p": dict(top_p=0.8),
    "top_p_of_0": dict(top_p=0.0),
    "penalty": dict(repetition_penalty=1.4),
    "all": dict(temperature=1.6, top_k=20, top_p=0.9, repetition_penalty=0.8),
}


@pytest.mark.parametrize("fields", FILTERS.values(), ids=FILTERS)
def test_filter_logits_equals_the_processors_of_transformers(fields):
    torch.manual_seed(0)
    logits = 3 * torch.randn(16, 50)
    previous = torch.randint(50, (16, 9))
    seen = torch.zeros(16, 50, dtype=torch.bool).scatter_(1, previous, True)
    processors = LogitsProcessorList()
    if "repetition_penalty" in fields:
        processors.append(RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"]))
    if "temperature" in fields:
        processors.append(TemperatureLogitsWarper(fields["temperature"]))
    if "top_k" in fields:
        processors.append(TopKLogitsWarper(fields["top_k"]))
    if "top_p" in fields:
        processors.append(TopPLogitsWarper(fields["top_p"]))
    sampling = SamplingParams(**fields)
    ours = filter_logits(apply_penalties(logits, sampling, list(seen), []), sampling)
    assert_close(ours, processors(previous, logits))


def test_tokens_come_as_often_as_their_probabilities_say():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, -9.0])
    draws = 4000
    noise = [make_generator(0, row, torch.device("cpu")) for row in range(draws)]
    seen = torch.zeros(draws, 6, dtype=torch.bool)
    sampling = SamplingParams(temperature=1.5, top_k=5)  # all but the last
    chosen = sample(logits.expand(draws, 6), sampling, list(seen), [], noise)
    counts = Counter(chosen.tolist())
    assert counts[5] == 0
    expected = draws * (logits[:5] / 1.5).softmax(-1)
    observed = torch.tensor([counts[token] for token in range(5)])
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand


def test_penalised_are_prompt_and_reply_but_no_padding(model, monkeypatch):
    calls = []

    def spy(logits, sampling, seen, *more):
        calls.append([set(row.nonzero().flatten().tolist()) for row in seen])
        return sample(logits, sampling, seen, *more)

    stop = (generate(model, PROMPTS, GREEDY)[0][2],)  # the first row leaves
    monkeypatch.setattr(engine, "sample", spy)
    occurred = {row: set(prompt) for row, prompt in enumerate(PROMPTS)}
    for step in decode(model, PROMPTS, replace(GREEDY, stop_ids=stop)):
        assert calls[-1] == [occurred[row] for row in step]
        for row, token in step.items():
            occurred[row].add(token)


def test_penalty_without_temperature_is_greedy_over_penalised_logits():
    logits = torch.tensor([[2.0, 1.9, -0.1], [-2.0, -1.0, -1.1]])
    seen = torch.tensor([[True, False, False], [False, True, False]])
    sampling = SamplingParams(temperature=0, repetition_penalty=1.2)  # 2.0 → 1.67; −1.0 → −1.2
    assert sample(logits, sampling, list(seen), [], []).tolist() == [1, 2]


# -- what a caller can rely on ---------------------------------------------------------------------


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


# -- text as it comes ------------------------------------------------------------------------------

TEXTS = [
    "你好，世界！",
    "A family: 👩\u200d👩\u200d👧\u200d👦, flags: 🇨🇳🇩🇪, 𠮷野家 😀",
    "plain ASCII, don't you think?\n\n  indented",
    "<think>\n想一想\n</think>",
]


def plain_ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_hold_whole_characters_and_make_the_text(tokenizer, text):
    ids = plain_ids(tokenizer, text)
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 1


def test_a_character_comes_with_its_last_token(tokenizer):
    ids = plain_ids(tokenizer, "a😀b")
    assert len(ids) > 3  # the emoji takes several tokens
    fed = []

    def feed():
        for token in ids:
            fed.append(token)
            yield token

    arrived = {piece: len(fed) for piece in stream_text(tokenizer, feed())}
    assert arrived == {"a": 1, "😀": len(ids) - 1, "b": len(ids)}


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_cut_anywhere_is_what_decode_says(tokenizer, text):
    ids = plain_ids(tokenizer, text)
    for end in range(len(ids)):
        streamed = "".join(stream_text(tokenizer, ids[:end]))
        assert streamed == tokenizer.decode(ids[:end], skip_special_tokens=True)


def test_a_stream_of_any_tokens_is_what_decode_says(tokenizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):  # among them bytes that are no UTF-8
        ids = torch.randint(len(tokenizer), (40,), generator=generator).tolist()
        streamed = "".join(stream_text(tokenizer, ids))
        assert streamed == tokenizer.decode(ids, skip_special_tokens=True)


def test_control_tokens_are_not_shown_but_tags_are(tokenizer):
    end = tokenizer.eos_token_id
    ids = [*plain_ids(tokenizer, "<think>好</think>"), end]
    assert "".join(stream_text(tokenizer, ids)) == "<think>好</think>"


# -- weights in half the bytes ---------------------------------------------------------------------

X86 = torch.backends.quantized.engine in ("x86", "fbgemm")


@pytest.mark.skipif(not X86, reason="FBGEMM is for x86")
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_prepared_to_decode_has_halves_and_the_same_logits(make_model, monkeypatch, tied):
    model = make_model(initializer_range=0.1, tie_word_embeddings=tied).half().float()
    ids = torch.tensor(PROMPTS[:1])
    expected = model(ids).logits
    prepared = pack_for_cpu_decoding(model)
    monkeypatch.setattr(F, "linear", None)  # not used any more
    assert_close(prepared(ids).logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["single", "batch"])
def test_greedy_with_halves_equals_greedy_without(make_model, prompts):
    model = make_model().half().float()
    expected = generate(model, prompts, GREEDY)
    assert generate(pack_for_cpu_decoding(model), prompts, GREEDY) == expected


def test_weights_that_are_no_halves_are_left_alone(model):
    assert type(pack_for_cpu_decoding(model).lm_head) is torch.nn.Linear


STOPS = [
    ("世",),
    ("好，", "界！"),
    ("。。", "\n\n"),
    ("族", "👩\u200d👧"),
    ("不在",),
    ("ASCII, do", "n't"),
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_a_text_ends_before_its_first_stop_string(tokenizer, text, stop):
    stream, shown = StreamingDetokenizer(tokenizer, stop), ""
    found = [at for each in stop if (at := text.find(each)) >= 0]
    expected = text[: min(found)] if found else text
    for token in plain_ids(tokenizer, text):
        stream.feed(token)
        shown += stream.read()
        assert expected.startswith(shown)  # nothing is ever taken back
        if stream.stopped:
            break
    stream.end()
    assert shown + stream.read() == expected
    assert stream.stopped == bool(found)

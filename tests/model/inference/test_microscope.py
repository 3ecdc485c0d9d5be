"""The microscope against transformers' own attentions, the model's own loss, and sums by hand."""

import math

import pytest
import torch
from toy import assert_close
from transformers import AutoModelForCausalLM

from model.feed_forward import moe_layers
from model.formats.hf_format import save_hf_folder
from model.inference.generation import pack_for_cpu_decoding
from model.inference.microscope import (
    expert_load,
    logit_lens,
    observe,
    token_losses,
    token_ranks,
    top_tokens,
)
from model.inference.tokens import decode_token_bytes

IDS = torch.randint(0, 128, (23,), generator=torch.Generator().manual_seed(1)).tolist()
KINDS = {
    "dense": {},
    "qk_norm": dict(qk_norm=True),
    "yarn": dict(inference_rope_scaling=True, yarn_original_length=16),
    "shared": dict(use_moe=True),
    "unshared": dict(use_moe=True, n_shared_experts=0, qk_norm=True, num_experts_per_tok=1),
}


@pytest.fixture(params=KINDS)
def both(request, make_model, tokenizer, tmp_path):
    """A model, and as what transformers loads it."""
    own = make_model(**KINDS[request.param])
    save_hf_folder(own, tokenizer, tmp_path / "folder")
    return own, AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()


@torch.no_grad()
def test_attention_and_hidden_states_are_those_of_transformers(both):
    own, other = both
    seen = observe(own, IDS)
    other.set_attn_implementation("eager")
    outputs = other(torch.tensor([IDS]), output_attentions=True, output_hidden_states=True)
    assert_close(seen.attention, torch.cat(outputs.attentions), 1e-4)
    assert_close(seen.hidden, torch.cat(outputs.hidden_states), 1e-3)
    assert_close(seen.logits, outputs.logits[0], 1e-3)
    assert (seen.attention.triu(1) == 0).all()


def test_a_model_of_transformers_shows_the_same(both):
    own, other = both
    seen, theirs = observe(own, IDS), observe(other, IDS)
    assert other.config._attn_implementation == "sdpa"  # as it was
    assert_close(seen.attention, theirs.attention, 1e-4)
    assert_close(seen.logits, theirs.logits, 1e-3)
    for ours, their in zip(seen.routing, theirs.routing, strict=True):
        assert (ours is None) == (their is None)
        if ours:
            assert torch.equal(ours.experts, their.experts)
            assert_close(ours.weights, their.weights, 1e-4)
    lens, their_lens = (logit_lens(m, s.hidden, 3) for m, s in ((own, seen), (other, theirs)))
    assert torch.equal(lens.ids, their_lens.ids)


@torch.no_grad()
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_experts_are_those_that_the_gates_choose(make_model, scoring_func):
    model = make_model(use_moe=True, scoring_func=scoring_func)
    heard = []
    for mixture in moe_layers(model):
        mixture.gate.register_forward_hook(lambda gate, given, out: heard.append(out[0]))
    if scoring_func == "sigmoid":  # the bias counts for the choice, not for the weights
        for mixture in moe_layers(model):
            mixture.e_score_correction_bias[:] = torch.tensor([0.0, 9.0, 0.0, 0.0])
    model(torch.tensor([IDS]))
    logits, heard[:] = list(heard), []
    routing = observe(model, IDS).routing
    for gate, seen in zip(logits, routing, strict=True):
        scores = gate.softmax(-1) if scoring_func == "softmax" else gate.sigmoid()
        for token in range(len(IDS)):
            biased = scores[token].clone()
            biased[1] += 9.0 * (scoring_func == "sigmoid")
            best = sorted(range(4), key=lambda e: -biased[e])[:2]
            assert seen.experts[token].tolist() == best
            chosen = scores[token, best]
            assert_close(seen.weights[token], chosen / chosen.sum())
        counts = [sum(row.count(e) for row in seen.experts.tolist()) for e in range(4)]
        assert_close(expert_load(seen), torch.tensor(counts) / (2 * len(IDS)))


def test_losses_are_those_of_the_model(make_model):
    model, ids = make_model(), torch.tensor(IDS)
    seen = observe(model, IDS)
    losses = token_losses(seen.logits, seen.ids)
    mean = model(ids[None], labels=ids[None]).loss
    assert_close(losses.mean(), mean)
    at = 5  # −log softmax by hand
    exps = [math.exp(x) for x in seen.logits[at].tolist()]
    assert losses[at].item() == pytest.approx(-math.log(exps[IDS[at + 1]] / sum(exps)), rel=1e-4)
    rank = sum(x > exps[IDS[at + 1]] for x in exps)
    assert token_ranks(seen.logits, seen.ids)[at] == rank


def test_top_tokens_by_hand():
    ids, probabilities = top_tokens(torch.tensor([[0.0, math.log(3), math.log(6)]]), 2)
    assert ids.tolist() == [[2, 1]]
    assert_close(probabilities, torch.tensor([[0.6, 0.3]]))
    assert top_tokens(torch.zeros(3), 9).ids.shape == (3,)  # not more than there are


@torch.no_grad()
def test_the_lens_cuts_the_model_short(make_model):
    """Behind a layer it says what a model of the layers so far would say."""
    model = make_model(num_hidden_layers=3)
    seen = observe(model, IDS)
    lens = logit_lens(model, seen.hidden, 4)
    for layers in range(4):
        short = make_model(num_hidden_layers=3)
        short.load_state_dict(model.state_dict())
        short.model.layers = short.model.layers[:layers]
        logits = short(torch.tensor([IDS]), use_cache=False).logits[0]
        expected = logits.softmax(-1).topk(4)
        assert torch.equal(lens.ids[layers], expected.indices)
        assert_close(lens.probabilities[layers], expected.values)


def test_a_model_that_is_prepared_to_decode_shows_the_same(make_model):
    model = make_model(use_moe=True)
    for weight in model.parameters():
        weight.data = weight.data.half().float()
    before = observe(model, IDS)
    after = observe(pack_for_cpu_decoding(model), IDS)
    assert_close(before.attention, after.attention, 1e-4)
    assert_close(before.logits, after.logits, 1e-3)


@pytest.mark.parametrize("ids", [[], [1] * 257])
def test_a_text_must_fit(make_model, ids):
    with pytest.raises(ValueError, match="where 1 to 256 are possible"):
        observe(make_model(), ids)


def test_bytes_of_tokens_make_up_the_text(tokenizer):
    text = "Ünïcode, 字节 和 emoji 🦙🏽!\n\n\ttabs\x00\x7f\xad  “x” <think> def f(x): return x**2"
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = [decode_token_bytes(tokenizer, token) for token in ids]
    assert b"".join(parts) == text.encode()
    assert any(len(part) == 1 and part[0] > 127 for part in parts)  # a part of a character
    assert decode_token_bytes(tokenizer, tokenizer.eos_token_id) == b"<|im_end|>"

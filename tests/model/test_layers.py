"""Attention, RoPE, YaRN, RMSNorm and SwiGLU against numbers worked out by hand."""

import math

import pytest
import torch
from test_model import INPUTS, real
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model.attention import eager_attention, sdpa_attention
from model.formats.hf_format import to_hf_config
from model.model_minimind import (
    MiniMindConfig,
    RMSNorm,
    SwiGLU,
    apply_rotary_emb,
    rope_cos_sin,
)
from model.rope import yarn

# -- attention -------------------------------------------------------------------------------------

FUNCTIONS = (sdpa_attention, eager_attention)


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@torch.no_grad()
def test_eager_and_sdpa_attention_give_equal_logits(make_model, ids, inputs):
    fused, by_hand = (make_model(flash_attn=flag)(ids, **inputs).logits for flag in (True, False))
    assert_close(real(inputs, fused), real(inputs, by_hand), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("queries", "mask"),
    [
        (6, None),
        (1, None),
        (3, torch.ones(3, 6, dtype=torch.bool).tril(3)),
        (3, torch.randn(2, 1, 3, 6)),
    ],
    ids=["causal", "one_query", "bool_mask_with_past", "float_mask"],
)
def test_eager_attention_equals_sdpa(queries, mask):
    torch.manual_seed(0)
    query = torch.randn(2, 4, queries, 8, requires_grad=True)
    key, value = torch.randn(2, 2, 2, 6, 8).unbind()
    outputs = [f(query, key, value, mask, 0.0) for f in FUNCTIONS]
    assert_close(*outputs)
    gradients = [torch.autograd.grad(out.square().sum(), query)[0] for out in outputs]
    assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attend", FUNCTIONS)
def test_a_query_without_visible_keys_gives_no_nan(attend):
    query, key, value = torch.randn(1, 1, 1, 4), *torch.randn(2, 1, 1, 2, 4)
    assert attend(query, key, value, torch.zeros(1, 1, 1, 2, dtype=bool), 0.0).isfinite().all()


def test_rope_is_float32_in_a_bfloat16_model(make_model):
    model = make_model().to(torch.bfloat16)
    cos, _ = rope_cos_sin(model.config, torch.tensor([[200]]))
    angle = 200 * 1e6 ** (-2 / model.config.head_dim)  # of the second pair of a head
    assert cos.dtype == torch.float32
    assert cos[0, 0, 0, 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


# -- norm and feed-forward -------------------------------------------------------------------------


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 2.0])
    # mean(3², 4²) = 12.5, with eps 13, √13 = 3.605551
    assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([0.832050, 2.218801]))


def test_swiglu_by_hand():
    mlp = SwiGLU(MiniMindConfig(hidden_size=2, intermediate_size=1, num_attention_heads=1,
                                num_key_value_heads=1))  # fmt: skip
    mlp.gate_proj.weight.data = torch.tensor([[2.0, 0.0]])
    mlp.up_proj.weight.data = torch.tensor([[0.0, 3.0]])
    mlp.down_proj.weight.data = torch.tensor([[5.0], [-1.0]])
    # gate = 2, SiLU(2) = 2 / (1 + e⁻²) = 1.761594; up = 3; product 5.284783
    assert_close(mlp(torch.tensor([1.0, 1.0])), torch.tensor([26.423913, -5.284783]))


# -- RoPE and YaRN ---------------------------------------------------------------------------------


def rope(position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For heads of 4 numbers: two pairs, which rotate by 1 and by 100^(-1/2) = 0.1 per position."""
    config = MiniMindConfig(
        hidden_size=4, num_attention_heads=1, num_key_value_heads=1, rope_theta=100.0
    )
    return rope_cos_sin(config, torch.tensor([[position]]))


def test_rope_rotates_each_pair_by_its_angle():
    heads = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4)  # pairs (0, 2) and (1, 3)
    turned = apply_rotary_emb(heads, *rope(2)).flatten()
    # angles 2 · 1 and 2 · 0.1: cos 2, cos 0.2, sin 2, sin 0.2
    assert_close(turned, torch.tensor([-0.416147, 0.980067, 0.909297, 0.198669]))


def test_rope_frequencies_of_the_default():
    cos, sin = rope_cos_sin(MiniMindConfig(), torch.tensor([[1]]))  # by 1e6^(-2i/64)
    assert cos.shape == sin.shape == (1, 1, 1, 64)
    angles = torch.atan2(sin, cos).flatten()
    assert_close(angles[[0, 1, 16, 31, 32]], torch.tensor([1, 0.649382, 1e-3, 1.539927e-6, 1]))


YARN = {  # as SPEC has them: the default, an older and a newer MiniMind
    "default": dict(yarn_factor=4.0, yarn_beta_fast=32.0),
    "older": dict(yarn_factor=4.0, yarn_beta_fast=4.0),
    "newer": dict(yarn_factor=16.0, yarn_beta_fast=32.0, yarn_attention_factor=1.0),
    "short": dict(yarn_factor=2.0, yarn_original_length=512, yarn_beta_slow=2.0),
}


@pytest.mark.parametrize("settings", YARN.values(), ids=YARN)
def test_yarn_equals_that_of_transformers(settings):
    config = MiniMindConfig(inference_rope_scaling=True, rope_theta=1e5, **settings)
    positions = torch.tensor([[0, 1, 100, 2047, 2048, 9000, 32000]])
    peer = LlamaRotaryEmbedding(to_hf_config(config))
    expected = peer(torch.zeros(1), positions)
    for found, other in zip(rope_cos_sin(config, positions), expected, strict=True):
        assert_close(found[:, 0], other, atol=2e-3, rtol=0)  # of angles up to 32000, in float32


def test_yarn_by_hand():
    """Heads of 64, theta 1e6, length 2048: a pair turns 2048 · 1e6^(-i/32) / 2π times."""
    config = MiniMindConfig(inference_rope_scaling=True)
    # 32 times: i = 32 · ln(2048 / 64π) / ln 1e6 = 5.37; once: 13.40. So mixed from 5 to 14
    frequencies = 1e6 ** (-torch.arange(32) / 32)
    slowed, scale = yarn(config, frequencies)
    assert_close(slowed[:6], frequencies[:6])
    assert_close(slowed[14:], frequencies[14:] / 4)
    assert_close(slowed[8], frequencies[8] * (6 / 9 + 3 / 9 / 4))
    assert scale == pytest.approx(0.1 * math.log(4) + 1)


def test_rope_products_depend_on_the_distance_only():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 4)

    def product(at, other):
        turned = [apply_rotary_emb(x, *rope(n)) for x, n in ((query, at), (key, other))]
        return (turned[0] * turned[1]).sum()

    assert_close(product(7, 3), product(54, 50))
    assert abs(product(7, 3) - product(7, 4)) > 0.01


def test_attention_by_hand_on_two_tokens():
    query = torch.tensor([[1.0], [2.0]]).view(1, 1, 2, 1)
    key = torch.tensor([[0.0], [1.0]]).view(1, 1, 2, 1)
    value = torch.tensor([[10.0], [20.0]]).view(1, 1, 2, 1)
    # the first sees itself only; the second has scores 0 and 2, e²/(1 + e²) = 0.880797
    expected = torch.tensor([10.0, 18.807971])
    for attend in FUNCTIONS:
        assert_close(attend(query, key, value, None, 0.0).flatten(), expected)

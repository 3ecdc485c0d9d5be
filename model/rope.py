"""Rotary position embedding (RoFormer, arXiv 2104.09864), and YaRN for texts longer than trained.

Letters in the shape comments: B batch, T tokens, H heads, D size of a head.
"""

import math

import torch
from torch import Tensor


def rope_cos_sin(config, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B or 1, T] → cos and sin, each [B or 1, 1, T, D], the same for all heads.

    From one position to the next, pair i of a head turns by theta^(-2i/D) radians: fast for the
    first pairs, very slowly for the last. Always in float32, whatever the weights are: half
    precision cannot tell angles apart at far positions.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)  # [D/2]
    scale = 1.0
    if config.inference_rope_scaling:
        frequencies, scale = yarn(config, frequencies)
    angles = position_ids[:, None, :, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)  # number i is paired with number i + D/2
    return angles.cos() * scale, angles.sin() * scale


def yarn(config, frequencies: Tensor) -> tuple[Tensor, float]:
    """The frequencies [D/2] for texts `yarn_factor` times as long as those of training, and what
    cos and sin are multiplied with (YaRN, arXiv 2309.00071, sections 3.2 and 3.4).

    A pair that turned more than `yarn_beta_fast` times within the trained length knows distances
    between neighbours, and stays. One that turned less than `yarn_beta_slow` times has never seen
    the angles beyond, and is slowed down by the factor, so that it never will. Those between are
    mixed. More keys flatten the softmax; a temperature, here put into cos and sin, sharpens it.

    As in the authors' code and in transformers, the mixture is linear in the pair's number, between
    whole numbers, where the paper's text has it linear in the turns.
    """

    def pair_that_turns(times: float) -> float:
        trained = config.yarn_original_length
        turn = math.log(trained / (times * 2 * math.pi)) / math.log(config.rope_theta)
        return config.head_dim / 2 * turn

    first = max(0, math.floor(pair_that_turns(config.yarn_beta_fast)))
    # transformers too allows numbers up to head_dim here, though there are half as many pairs
    last = min(config.head_dim - 1, math.ceil(pair_that_turns(config.yarn_beta_slow)))
    pairs = torch.arange(len(frequencies), device=frequencies.device)
    slowed = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)  # 0: as trained, 1: slowed
    scale = config.yarn_attention_factor
    if scale is None:
        scale = 0.1 * math.log(config.yarn_factor) + 1 if config.yarn_factor > 1 else 1.0
    return frequencies * (1 - slowed + slowed / config.yarn_factor), scale


def apply_rotary_emb(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+D/2}) of [B, H, T, D] by its angle: the inner product of a query
    and a key then depends on the distance of their positions only."""
    first, second = heads.chunk(2, dim=-1)
    turned = heads * cos + torch.cat((-second, first), dim=-1) * sin
    return turned.to(heads.dtype)

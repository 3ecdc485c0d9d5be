"""Rotary position embedding (RoFormer, arXiv 2104.09864), and YaRN for texts longer than those of
training (arXiv 2309.00071).

Letters in the shape comments: B batch, T tokens, H heads, D size of a head.
"""

import math

import torch
from torch import Tensor


def rope_cos_sin(config, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B or 1, T] → cos and sin, each [B or 1, 1, T, D], the same for all heads.

    Pair i of a head rotates by theta^(-2i/D) radians per position: the first pairs fast, which
    tells neighbours apart, the last ones slowly, which tells far positions apart.
    """
    # float32 whatever the weights are: bfloat16 has 8 bits, and position 1001 would be 1000.
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)  # [D/2]
    attention_factor = 1.0
    if config.inference_rope_scaling:
        frequencies, attention_factor = yarn(config, frequencies)
    angles = position_ids[:, None, :, None] * frequencies
    # Rotate-half layout, as Llama in transformers: dimension i is paired with i + D/2, not i + 1.
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def yarn(config, frequencies: Tensor) -> tuple[Tensor, float]:
    """The frequencies [D/2] for texts `yarn_factor` times as long as those of training, and the
    attention factor that scales cos and sin (YaRN, arXiv 2309.00071, sections 3.2 and 3.4).

    A pair that makes more than `yarn_beta_fast` rotations within the trained length encodes local
    distances and keeps its frequency (extrapolation). One that makes fewer than `yarn_beta_slow`
    has only been trained on part of the circle: its frequency is divided by the factor, so that
    longer texts reach no new angle (interpolation). In between the two are blended.

    Departs from the paper as the authors' code and transformers do: the ramp is linear in the index
    of the pair, rounded to whole indices; in the paper's text it is linear in the rotations.
    """

    def pair_with_rotations(rotations: float) -> float:
        """Index of the pair that makes so many rotations within the trained length."""
        trained = config.yarn_original_length
        exponent = math.log(trained / (rotations * 2 * math.pi)) / math.log(config.rope_theta)
        return config.head_dim / 2 * exponent

    low = max(0, math.floor(pair_with_rotations(config.yarn_beta_fast)))
    # The bound is head_dim although there are half as many pairs: so it is in transformers.
    high = min(config.head_dim - 1, math.ceil(pair_with_rotations(config.yarn_beta_slow)))
    pairs = torch.arange(len(frequencies), device=frequencies.device)
    ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: extrapolate, 1: interpolate
    # More keys flatten the softmax. The factor acts as a temperature: it is in both q and k, so
    # logits grow by its square.
    attention_factor = config.yarn_attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(config.yarn_factor) + 1 if config.yarn_factor > 1 else 1.0
    return frequencies * (1 - ramp + ramp / config.yarn_factor), attention_factor


def apply_rotary_emb(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+D/2}) of [B, H, T, D] by its angle a: (x, y) becomes
    (x cos a − y sin a, y cos a + x sin a).

    Rotating q by m·f and k by n·f leaves a dot product that depends on m − n only.
    """
    first, second = heads.chunk(2, dim=-1)
    rotated = heads * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated.to(heads.dtype)  # cos and sin are float32; q and k may be half precision

"""The configuration of a model: sizes, and which variants of its parts it has."""

import math
from dataclasses import fields
from typing import Annotated, TypeVar, get_origin

from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

# The argument and output of forward that holds the KV cache: "past_key_values" in transformers,
# since 5.24 "cache". It is the second field of every output.
CACHE_ARGUMENT = fields(BaseModelOutputWithPast)[1].name

# A field that training fixes: with another value the weights would not fit, or compute nonsense.
T = TypeVar("T")
Structural = Annotated[T, "structural"]


class MiniMindConfig(PreTrainedConfig):
    """Sizes and switches of a model. The defaults are MiniMind-small, 25.83M parameters."""

    model_type = "minimind"
    keys_to_ignore_at_inference = [CACHE_ARGUMENT]

    vocab_size: Structural[int] = 6400
    hidden_size: Structural[int] = 512
    intermediate_size: Structural[int | None] = None  # None: 8/3 of hidden_size, rounded up to 64s
    num_hidden_layers: Structural[int] = 8
    num_attention_heads: Structural[int] = 8
    num_key_value_heads: Structural[int] = 2
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    # YaRN, for texts longer than those of training (rope.py)
    inference_rope_scaling: bool = False
    yarn_factor: float = 4.0
    yarn_original_length: int = 2048
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_attention_factor: float | None = None  # None: 0.1 · ln(factor) + 1
    rms_norm_eps: Structural[float] = 1e-5
    dropout: float = 0.0
    qk_norm: Structural[bool] = False
    # mixture of experts (feed_forward.py)
    use_moe: Structural[bool] = False
    n_routed_experts: Structural[int] = 4
    n_shared_experts: Structural[int] = 1
    num_experts_per_tok: Structural[int] = 2
    moe_intermediate_size: Structural[int | None] = None  # None: as intermediate_size
    scoring_func: Structural[str] = (
        "softmax"  # or "sigmoid": balanced by a router bias instead of a loss
    )
    aux_loss_alpha: float = 0.1  # weight of the load-balancing loss
    seq_aux: bool = True  # balance within each sequence; False: over the batch
    norm_topk_prob: bool = True  # the weights of the selected experts sum to 1
    bias_update_speed: float = 0.001  # step of the router bias, with "sigmoid"
    flash_attn: bool = True  # False: attention written out, slower but readable
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            # SwiGLU has three matrices where a plain MLP has two: 8/3 · C instead of 4 · C keeps
            # the number of parameters. Multiples of 64 suit the tiles of matrix products.
            self.intermediate_size = 64 * math.ceil(self.hidden_size * 8 / 3 / 64)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.use_moe and not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"a token cannot use {self.num_experts_per_tok} of {self.n_routed_experts} experts"
            )
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f'scoring_func is "softmax" or "sigmoid", not "{self.scoring_func}"')
        for name in "hidden_size num_hidden_layers num_attention_heads num_key_value_heads".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim {self.head_dim} (hidden_size / num_attention_heads) must be even, since "
                "RoPE rotates pairs of dimensions"
            )
        if kwargs.pop("head_dim", None) not in (None, self.head_dim):
            raise ValueError(
                f"head_dim must be hidden_size / num_attention_heads, here {self.head_dim}"
            )
        kwargs.pop("rope_scaling", None)  # of earlier versions: formats/native_format.py reads it
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def active_intermediate_size(self) -> int:
        """Width of the feed-forward computation that one token goes through in a layer."""
        assert self.intermediate_size is not None  # __post_init__ has set both
        assert self.moe_intermediate_size is not None
        if not self.use_moe:
            return self.intermediate_size
        return (self.num_experts_per_tok + self.n_shared_experts) * self.moe_intermediate_size


STRUCTURAL_FIELDS = {
    name for name, kind in MiniMindConfig.__annotations__.items() if get_origin(kind) is Annotated
}

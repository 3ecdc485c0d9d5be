"""The MiniMind language model, from the outside in: config, causal LM, stack, block, parts.

A decoder-only transformer in the layout of Llama: pre-RMSNorm, rotary positions (rotate-half),
grouped-query attention, SwiGLU, tied embeddings, no biases; with `qk_norm` the layout of Qwen3.
With `use_moe` each block's feed-forward layer is a mixture of experts. Names of the weights are
those of transformers, so that conversion is a change of labels.

Letters in the shape comments:
    B batch   T tokens fed now   S tokens attended to (cached + T)   V vocabulary
    C hidden size   H query heads   K key/value heads   D size of a head (C / H)
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention import (
    VarlenMetadata,
    eager_attention,
    make_attention_mask,
    sdpa_attention,
    supports_varlen,
)
from .feed_forward import MixtureOfExperts, SwiGLU
from .losses import cross_entropy_sum, token_log_probs
from .rope import apply_rotary_emb, rope_cos_sin

# What transformers calls the cache: "past_key_values", since 5.24 "cache"; its second output.
CACHE_ARGUMENT = fields(BaseModelOutputWithPast)[1].name


class MiniMindConfig(PreTrainedConfig):
    """Sizes and switches of a model. The defaults are MiniMind-small, 25.83M parameters."""

    model_type = "minimind"
    keys_to_ignore_at_inference = [CACHE_ARGUMENT]

    vocab_size: int = 6400
    hidden_size: int = 512
    intermediate_size: int | None = None  # None: 8/3 of hidden_size, rounded up to 64s
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    # YaRN, for texts beyond the trained length (rope.py)
    inference_rope_scaling: bool = False
    yarn_factor: float = 4.0
    yarn_original_length: int = 2048
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_attention_factor: float | None = None  # None: 0.1 · ln(factor) + 1
    rms_norm_eps: float = 1e-5
    dropout: float = 0.0
    qk_norm: bool = False
    # a mixture of experts (feed_forward.py)
    use_moe: bool = False
    n_routed_experts: int = 4
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None  # None: as intermediate_size
    scoring_func: str = "softmax"  # or "sigmoid", which balances by a bias
    aux_loss_alpha: float = 0.1  # weight of the balance loss
    seq_aux: bool = True  # balance within each row; False: over the batch
    norm_topk_prob: bool = True  # weights of the chosen experts add up to 1
    bias_update_speed: float = 0.001  # with "sigmoid"
    flash_attn: bool = True  # False: the hand-written attention, slower but readable
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
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
            raise ValueError(f"RoPE turns pairs of numbers, but a head has {self.head_dim}")
        if kwargs.pop("head_dim", None) not in (None, self.head_dim):
            raise ValueError(f"heads are {self.head_dim} wide here: hidden_size / heads")
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def active_intermediate_size(self) -> int:
        """What a token uses of a layer's feed-forward part."""
        if not self.use_moe:
            return self.intermediate_size
        return (self.num_experts_per_tok + self.n_shared_experts) * self.moe_intermediate_size


@dataclass
class ModelOutput(BaseModelOutputWithPast):
    aux_loss: Tensor | None = None


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """What transformers' models return, and the mixtures' balance loss (None in a dense model)."""

    aux_loss: Tensor | None = None
    log_probs: Tensor | None = None  # [B, T − 1], of the labels


@dataclass
class ScoreOutput(ModelOutput):
    scores: Tensor | None = None  # [B, T]


class MiniMindPreTrainedModel(PreTrainedModel):
    config_class = MiniMindConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["MiniMindBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02²); what writes to the residual stream is smaller by √(2·layers) (GPT-2), so
        that the stream's variance does not grow with depth."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            if getattr(module, "writes_to_residual", False):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, MixtureOfExperts):
            init.zeros_(
                module.tokens_per_expert
            )  # not in the files, so that loading leaves it undefined


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """The language model: a stack of blocks and a linear map from its output to the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        label_weights: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool = True,
        return_log_probs: bool = False,
        temperature: float = 1.0,
        cache: object | None = None,
        **kwargs,  # transformers hands over more settings than this model has a use for
    ) -> CausalLMOutput:
        """Logits of the next token, and the loss if labels are given.

        Args:
            input_ids: [B, T] token ids, or inputs_embeds: [B, T, C] instead.
            attention_mask: [B, S], 1 for real tokens and 0 for padding.
            position_ids: [B or 1, T]. Without a cache, positions that restart at 0 begin a new
                document, and documents packed into one row do not see each other.
            past_key_values: a transformers cache, or anything with its `update(k, v, layer)` and
                `get_seq_length()`; since transformers 5.24 its name is `cache`.
            labels: [B, T], the input_ids themselves with -100 where no loss is wanted; they are
                shifted here (position t predicts label t+1).
            label_weights: [V], how much each token counts as a label; default: 1.
            logits_to_keep: only the last n positions (0: all), or the positions in a tensor.
            num_items_in_batch: what the summed token loss is divided by. Default: the labels in
                this call, or their weights. Trainers give that of the whole window over all ranks.
            return_logits: False saves the memory of [B, T, V] where only the loss is wanted.
            return_log_probs: log p of each label instead of the loss, for preferences and
                reinforcement learning; `temperature` is what the tokens were sampled with.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        hidden = outputs.last_hidden_state  # [B, T, C]

        loss = log_probs = None
        if return_log_probs:
            states, targets = hidden[:, :-1], labels[:, 1:]
            log_probs = token_log_probs(states, self.lm_head.weight, targets, temperature)
        elif labels is not None:
            states, targets = hidden[:, :-1], labels[:, 1:]
            loss, count = cross_entropy_sum(states, self.lm_head.weight, targets, label_weights)
            loss = loss / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

        logits = None
        if return_logits and not return_log_probs:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = self.lm_head(hidden[:, kept])  # [B, kept, V]; slice(-0, None) keeps all

        return CausalLMOutput(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            log_probs=log_probs,
            **{CACHE_ARGUMENT: getattr(outputs, CACHE_ARGUMENT)},
        )


class MiniMindForScoring(MiniMindPreTrainedModel):
    """The same stack with one number for each position instead of logits: how good is the text up
    to here (a reward model, read at the last token) or what will come of it (PPO's critic)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)  # as in transformers
        self.post_init()

    @classmethod
    def from_language_model(cls, language_model: MiniMindForCausalLM) -> "MiniMindForScoring":
        """The stack of a language model (the same tensors) with a head that scores everything 0."""
        model = cls(language_model.config)
        model.model = language_model.model
        nn.init.zeros_(model.score.weight)
        return model.train(language_model.training)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> ScoreOutput:
        """[B, T] tokens → scores [B, T]; position_ids as in `MiniMindForCausalLM.forward`."""
        outputs = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        scores = self.score(outputs.last_hidden_state).squeeze(-1).float()
        return ScoreOutput(scores=scores, aux_loss=outputs.aux_loss)


class MiniMindModel(MiniMindPreTrainedModel):
    """Embedding, blocks, final norm."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            MiniMindBlock(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        cache: object | None = None,
        **kwargs,
    ) -> ModelOutput:
        """The arguments of `MiniMindForCausalLM.forward`; returns last_hidden_state [B, T, C]."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = cache if past_key_values is None else past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None  # running a layer twice would fill it twice
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        length = past + hidden.shape[1]

        documents = position_ids if past == 0 else None
        mask = make_attention_mask(
            hidden, past, attention_mask, documents, self.uses_varlen(hidden)
        )
        if position_ids is None:
            position_ids = torch.arange(past, length, device=hidden.device)[None]
        rotation = rope_cos_sin(self.config, position_ids)

        hidden = self.dropout(hidden)
        token_mask = None  # tokens that count for the balance of experts
        pad = self.config.pad_token_id
        if self.config.use_moe and self.training and input_ids is not None and pad is not None:
            token_mask = input_ids != pad
        all_hidden, aux_losses = [hidden], []
        for layer in self.layers:
            hidden, aux_loss = layer(
                hidden, rotation, mask, past_key_values, length, token_mask=token_mask
            )
            all_hidden.append(hidden)
            aux_losses.append(aux_loss)
        hidden = self.norm(hidden)
        all_hidden[-1] = hidden  # as transformers: the last one is normalised

        return ModelOutput(
            last_hidden_state=hidden,
            aux_loss=torch.stack(aux_losses).sum() if self.config.use_moe else None,
            hidden_states=tuple(all_hidden) if output_hidden_states else None,
            **{CACHE_ARGUMENT: past_key_values},
        )

    def uses_varlen(self, hidden: Tensor) -> bool:
        dropout = self.training and self.config.dropout > 0  # varlen has none
        return (
            self.config.flash_attn and not dropout and supports_varlen(hidden, self.config.head_dim)
        )


class MiniMindBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: MiniMindConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.use_moe else SwiGLU(config)

    def forward(
        self, hidden: Tensor, *context, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] → the same, and the balance loss of a mixture."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), *context)
        inputs, aux_loss = self.post_attention_layernorm(hidden), None
        if isinstance(self.mlp, MixtureOfExperts):
            out, aux_loss = self.mlp(inputs, token_mask)
        else:
            out = self.mlp(inputs)
        return hidden + out, aux_loss


class Attention(nn.Module):
    """Causal self-attention with grouped queries: H query heads share K key/value heads."""

    def __init__(self, config: MiniMindConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.attend = sdpa_attention if config.flash_attn else eager_attention
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.o_proj.writes_to_residual = True
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | VarlenMetadata | None,
        past_key_values: object | None,
        length: int,
    ) -> Tensor:
        """[B, T, C] → [B, T, C]; of what the cache holds, the first `length` positions count."""
        B, T, _ = hidden.shape
        query = self.q_norm(self.q_proj(hidden).view(B, T, -1, self.head_dim)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).view(B, T, -1, self.head_dim)).transpose(1, 2)
        value = self.v_proj(hidden).view(B, T, -1, self.head_dim).transpose(1, 2)
        query = apply_rotary_emb(query, *rotation)  # [B, H, T, D]
        key = apply_rotary_emb(key, *rotation)  # [B, K, T, D]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer)  # [B, K, S, D]
            key, value = key[:, :, :length], value[:, :, :length]  # caches of fixed size have more
        out = self.attend(query, key, value, mask, self.dropout if self.training else 0.0)
        out = self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        return F.dropout(out, self.dropout, self.training)


class RMSNorm(nn.Module):
    """weight · x / √(mean(x²) + eps) over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight.to(hidden.dtype)  # under autocast queries and keys come in half
        return F.rms_norm(hidden, weight.shape, weight, self.eps)


AutoConfig.register("minimind", MiniMindConfig, exist_ok=True)
AutoModel.register(MiniMindConfig, MiniMindModel, exist_ok=True)
AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)

"""The MiniMind language model, from the outside in: causal LM, stack of blocks, block, parts.

A decoder-only transformer in the layout of Llama: pre-RMSNorm, rotary positions (rotate-half),
grouped-query attention, SwiGLU, tied embeddings, no biases; with `qk_norm` the layout of Qwen3.
With `use_moe` the feed-forward layer of each block is a mixture of experts. The weights have the
names that they have in transformers, so conversion only renames.

Letters in the shape comments:
    B batch   T tokens fed now   S tokens attended to (cached + T)   V vocabulary
    C hidden size   H query heads   K key/value heads   D size of a head (C / H)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention import (
    Cache,
    VarlenMetadata,
    eager_attention,
    make_attention_mask,
    sdpa_attention,
)
from .config import CACHE_ARGUMENT, MiniMindConfig
from .feed_forward import MixtureOfExperts, SwiGLU
from .losses import cross_entropy_sum, token_log_probs
from .rope import apply_rotary_emb, rope_cos_sin


@dataclass
class MiniMindModelOutput(BaseModelOutputWithPast):
    aux_loss: Tensor | None = None  # load-balancing loss of all MoE layers


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """The output of transformers with the load-balancing loss (None in a dense model)."""

    aux_loss: Tensor | None = None
    log_probs: Tensor | None = None  # [B, T − 1], log p of each label


@dataclass
class ScoreOutput(MiniMindModelOutput):
    scores: Tensor | None = None  # [B, T]


class MiniMindPreTrainedModel(PreTrainedModel):
    config_class = MiniMindConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["MiniMindBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, 0.02²). Layers that write to the residual stream are divided by √(2 · layers), as in
        GPT-2: the stream is the sum of 2 · layers outputs, and its variance at the start of
        training should not grow with depth."""
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
    """The language model: a stack of blocks, and a linear head that gives logits."""

    # One matrix both reads and predicts tokens: at 512 × 6400 a second one would add 13%.
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
        past_key_values: Cache | None = None,
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
        cache: Cache | None = None,
        **kwargs,  # transformers passes arguments that this model does not use
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
            label_weights: [V], weight of each token id as a label; default: 1.
            logits_to_keep: only the last n positions (0: all), or the positions in a tensor.
            num_items_in_batch: divisor of the summed token loss. Default: the number of labels in
                this call, or the sum of their weights. Trainers pass the count of the whole
                global batch over all ranks.
            return_logits: False saves the memory of [B, T, V] where only the loss is needed.
            return_log_probs: return log p of each label instead of the loss, for DPO and RL;
                `temperature` is the one that the tokens were sampled with.
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
        # The shift: the state at position t predicts token t + 1, so the last state and the first
        # label have no partner.
        if return_log_probs:
            assert labels is not None  # the log-probs are theirs
            states, targets = hidden[:, :-1], labels[:, 1:]
            log_probs = token_log_probs(states, self.lm_head.weight, targets, temperature)
        elif labels is not None:
            states, targets = hidden[:, :-1], labels[:, 1:]
            loss, count = cross_entropy_sum(states, self.lm_head.weight, targets, label_weights)
            # The sum is divided once, by a count that a trainer may take over all micro-batches: a
            # mean of each would weigh tokens of short micro-batches more.
            loss = loss / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

        logits = None
        if return_logits and not return_log_probs:
            kept = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            # Sampling needs one position; logits of all would be V / C times the hidden states.
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
    """The same stack with a scalar head: the score of the text up to each position (a reward model,
    read at the last token) or the expected return from it (PPO's critic)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)  # as in transformers
        self.post_init()

    @classmethod
    def from_language_model(cls, language_model: MiniMindForCausalLM) -> "MiniMindForScoring":
        """Share the stack of a language model (the same tensors) under a new head.

        The head starts at 0: a critic's first values are 0 and not noise in the advantages.
        """
        model = cls(language_model.config)
        model.model = language_model.model
        nn.init.zeros_(model.score.weight)
        return model.train(language_model.training)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> ScoreOutput:
        """[B, T] token ids → scores [B, T]; position_ids as in `MiniMindForCausalLM.forward`."""
        outputs = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        scores = self.score(outputs.last_hidden_state).squeeze(-1).float()
        return ScoreOutput(scores=scores, aux_loss=outputs.aux_loss)


class MiniMindModel(MiniMindPreTrainedModel):
    """Token embedding, blocks, final norm."""

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
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        cache: Cache | None = None,
        **kwargs,
    ) -> MiniMindModelOutput:
        """The arguments of `MiniMindForCausalLM.forward`; returns last_hidden_state [B, T, C]."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = cache if past_key_values is None else past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            # The backward pass runs each block again, which would append its keys a second time.
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        length = past + hidden.shape[1]

        # A 0 in position_ids starts a document only while nothing is cached.
        documents = position_ids if past == 0 else None
        mask = make_attention_mask(
            self.config, hidden, past, attention_mask, documents, self.training
        )
        if position_ids is None:
            position_ids = torch.arange(past, length, device=hidden.device)[None]
        # Computed anew in each forward pass and shared by all layers: nothing of it is saved, so
        # the state dict is that of Llama, and YaRN or a longer context needs no new weights.
        cos_sin = rope_cos_sin(self.config, position_ids)

        hidden = self.dropout(hidden)
        # Padding does not count in the load-balancing loss: all pad tokens are alike and would be
        # routed to the same experts.
        token_mask = None
        pad = self.config.pad_token_id
        if self.config.use_moe and self.training and input_ids is not None and pad is not None:
            token_mask = input_ids != pad
        all_hidden, aux_losses = [hidden], []
        for layer in self.layers:
            hidden, aux_loss = layer(
                hidden, cos_sin, mask, past_key_values, length, token_mask=token_mask
            )
            all_hidden.append(hidden)
            aux_losses.append(aux_loss)
        # The blocks never normalise the stream itself, so the head needs one last norm.
        hidden = self.norm(hidden)
        all_hidden[-1] = hidden  # as in transformers, the last of hidden_states is normalised

        return MiniMindModelOutput(
            last_hidden_state=hidden,
            aux_loss=torch.stack(aux_losses).sum() if self.config.use_moe else None,
            hidden_states=tuple(all_hidden) if output_hidden_states else None,
            **{CACHE_ARGUMENT: past_key_values},
        )


class MiniMindBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Pre-norm: the norm is on the branch and never on the stream x, so the gradient reaches every
    layer through an unbroken sum, and deep stacks train without a delicate warmup.
    """

    def __init__(self, config: MiniMindConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.use_moe else SwiGLU(config)

    def forward(
        self, hidden: Tensor, *context, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] → [B, T, C], and the load-balancing loss of an MoE layer (else None)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), *context)
        inputs, aux_loss = self.post_attention_layernorm(hidden), None
        if isinstance(self.mlp, MixtureOfExperts):
            out, aux_loss = self.mlp(inputs, token_mask)
        else:
            out = self.mlp(inputs)
        return hidden + out, aux_loss


class Attention(nn.Module):
    """Causal self-attention with grouped queries (GQA): H query heads share K key/value heads, so
    the KV cache is H / K times smaller."""

    q_norm: nn.Module  # RMSNorm, or without qk_norm the identity
    k_norm: nn.Module
    attention_fn: Callable[..., Tensor]

    def __init__(self, config: MiniMindConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.attention_fn = sdpa_attention if config.flash_attn else eager_attention
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.o_proj.writes_to_residual = True  # type: ignore[assignment]  # a flag, no submodule
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        mask: Tensor | VarlenMetadata | None,
        past_key_values: Cache | None,
        length: int,
    ) -> Tensor:
        """[B, T, C] → [B, T, C]. Only the first `length` positions of the cache are used."""
        B, T, _ = hidden.shape
        # q/k norm comes before RoPE and over each head: rotation keeps lengths, so the logits
        # QKᵀ/√D stay bounded whatever q_proj and k_proj grow to. Without qk_norm: identity.
        query = self.q_norm(self.q_proj(hidden).view(B, T, -1, self.head_dim)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).view(B, T, -1, self.head_dim)).transpose(1, 2)
        value = self.v_proj(hidden).view(B, T, -1, self.head_dim).transpose(1, 2)
        # Positions enter queries and keys only, not values: a score depends on the distance, the
        # content that is summed does not.
        query = apply_rotary_emb(query, *cos_sin)  # [B, H, T, D]
        key = apply_rotary_emb(key, *cos_sin)  # [B, K, T, D]
        if past_key_values is not None:
            # Keys are cached after rotation: scores depend on distances alone, so that old keys
            # never have to be rotated again.
            key, value = past_key_values.update(key, value, self.layer)  # [B, K, S, D]
            key, value = key[:, :, :length], value[:, :, :length]  # a static cache is longer
        out = self.attention_fn(query, key, value, mask, self.dropout if self.training else 0.0)
        out = self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        return F.dropout(out, self.dropout, self.training)


class RMSNorm(nn.Module):
    """weight · x / √(mean(x²) + eps) over the last dimension (arXiv 1910.07467).

    Unlike LayerNorm it subtracts no mean and has no bias. F.rms_norm takes the mean in float32
    even where x is half precision.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight.to(hidden.dtype)  # under autocast, q and k are half precision here
        return F.rms_norm(hidden, weight.shape, weight, self.eps)


AutoConfig.register("minimind", MiniMindConfig, exist_ok=True)
AutoModel.register(MiniMindConfig, MiniMindModel, exist_ok=True)
AutoModelForCausalLM.register(MiniMindConfig, MiniMindForCausalLM, exist_ok=True)

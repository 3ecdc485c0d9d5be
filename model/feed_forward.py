"""Feed-forward layers: SwiGLU, and a mixture of experts (MoE), of which each token uses a few.

The mixture is DeepSeek's (arXiv 2401.06066, V3: 2412.19437): routed experts, of which a router
selects `num_experts_per_tok` for each token, and shared experts that every token uses. With more
experts and a `moe_intermediate_size` below the dense size it is fine-grained.

Letters in the shape comments:
    B batch   T tokens   N tokens of all rows   C hidden size   I intermediate size
    E routed experts   k selected experts of a token
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) · up(x)) (Shazeer 2020, arXiv 2002.05202): the gate scales each hidden
    dimension by the input itself, where a plain MLP applies one fixed nonlinearity."""

    def __init__(self, config, intermediate_size: int | None = None):
        super().__init__()
        size = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.down_proj.writes_to_residual = True  # type: ignore[assignment]  # a flag, no submodule
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden)))


class Routing(NamedTuple):
    """Which experts each token goes to, as the router (gate) decides it."""

    scores: Tensor  # [B, T, E], float32: affinity of each token for each expert
    experts: Tensor  # [B, T, k]: indices of the selected experts
    weights: Tensor  # [B, T, k]: factors of their outputs


class MixtureOfExperts(nn.Module):
    """Σ weight · expert(x) over the selected experts, plus Σ expert(x) over the shared ones.

    Left alone, a router collapses: experts that are selected learn, become better and are selected
    more often, until a few get all tokens. `scoring_func` decides what keeps the balance:

    - "softmax": `load_balancing_loss` draws all experts towards equal shares of the tokens.
    - "sigmoid" (DeepSeek-V3): a bias per expert is added to the scores for the selection only, and
      after every optimizer step raised for experts with too few tokens (`update_bias`). So
      no auxiliary loss disturbs the gradient (V3 keeps a very small one per sequence).
    """

    e_score_correction_bias: Tensor  # [E], with "sigmoid"
    tokens_per_expert: Tensor  # [E]

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.use_grouped_mm = True  # False: always loop over the experts, for comparison
        size = config.moe_intermediate_size
        routed, shared = config.n_routed_experts, config.n_shared_experts
        self.gate = nn.Linear(config.hidden_size, routed, bias=False)
        if config.scoring_func == "sigmoid":
            # A buffer and no parameter: no gradient and no optimizer moves it.
            self.register_buffer("e_score_correction_bias", torch.zeros(routed))
        self.experts = nn.ModuleList(SwiGLU(config, size) for _ in range(routed))
        self.shared_experts = nn.ModuleList(SwiGLU(config, size) for _ in range(shared))
        # Counted since the last optimizer step; a trainer reads it and sets it back to 0.
        self.register_buffer("tokens_per_expert", torch.zeros(routed), persistent=False)

    def forward(self, hidden: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, T, C] → [B, T, C], and in training the load-balancing loss (0 with "sigmoid").

        Args:
            token_mask: [B, T], 1 for tokens that count in the balance; default: all.
        """
        routing = self.route(hidden)
        tokens = hidden.flatten(0, 1)  # [N, C]
        out = self.routed(tokens, routing)
        for expert in self.shared_experts:
            out = out + expert(tokens)
        loss = hidden.new_zeros((), dtype=torch.float32)
        if self.training:
            if token_mask is None:
                token_mask = torch.ones_like(routing.scores[..., 0])
            token_mask = token_mask.float()
            if torch.is_grad_enabled():  # computing log-probs in RL is not a training step
                with torch.no_grad():
                    counts = count_tokens(routing.experts, token_mask, len(self.experts))
                    self.tokens_per_expert += counts.sum(0)
            if self.config.scoring_func == "softmax":
                loss = load_balancing_loss(routing, token_mask, self.config.seq_aux)
                loss = self.config.aux_loss_alpha * loss
        return out.view_as(hidden), loss

    def route(self, hidden: Tensor) -> Routing:
        """Score all experts for each token of [B, T, C] and select k of them."""
        # float32 also under autocast: two scores are often nearly equal, and rounding would select
        # another expert, which changes the output by a whole expert and not by a rounding error.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.gate(hidden).float()
        if self.config.scoring_func == "sigmoid":
            scores = logits.sigmoid()
            selection_scores = scores + self.e_score_correction_bias
        else:
            scores = selection_scores = logits.softmax(-1)
        experts = selection_scores.topk(self.config.num_experts_per_tok, dim=-1).indices
        # The weights are the unbiased scores: the bias steers who is selected, not the output. They
        # are the only path of the gradient to the gate, since topk has none.
        weights = scores.gather(-1, experts)
        if self.config.norm_topk_prob:
            # The scores of k out of E sum to less than 1, by an amount that differs from token to
            # token. Renormalised, every token has a whole feed-forward output.
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return Routing(scores, experts, weights)

    def routed(self, tokens: Tensor, routing: Routing) -> Tensor:
        """[N, C] → [N, C]: the weighted sum of the selected experts of each token."""
        k = self.config.num_experts_per_tok
        selected = routing.experts.flatten()  # [N · k]
        # Sorted by expert, each expert's tokens are one slice of one tensor.
        order = selected.argsort(stable=True)
        count = selected.new_zeros(len(self.experts))
        count = count.scatter_add_(0, selected, torch.ones_like(selected))  # [E]
        # Grouped products read the weights of all experts. The few tokens of a decoding step need
        # the weights of a few only.
        many = torch.is_grad_enabled() or len(tokens) > 256
        experts: Any = self.experts  # nn.ModuleList does not declare the class of its items
        group = self.use_grouped_mm and many and supports_grouped_mm(tokens, experts[0])
        run = grouped_experts if group else loop_experts
        out = run(experts, tokens[order // k], count)  # [N · k, C]
        out = out[order.argsort()].view(len(tokens), k, -1)  # back in the order of the tokens
        return (out * routing.weights.view(len(tokens), k, 1).to(out.dtype)).sum(1)


# -- running the experts ---------------------------------------------------------------------------


def loop_experts(experts: Sequence[SwiGLU], tokens: Tensor, count: Tensor) -> Tensor:
    """One expert after the other: tokens [N · k, C], sorted by expert, of which expert e has
    count[e] → [N · k, C]."""
    # In training an expert without tokens runs on an empty slice: its gradient is 0 and not None,
    # which DDP would wait for.
    parts = zip(experts, tokens.split(count.tolist()), strict=True)
    needed = [(expert, part) for expert, part in parts if len(part) or torch.is_grad_enabled()]
    return torch.cat([expert(part) for expert, part in needed])


def grouped_experts(experts: Sequence[SwiGLU], tokens: Tensor, count: Tensor) -> Tensor:
    """The same as three grouped matrix products, each over all experts at once (F.grouped_mm)."""
    device = tokens.device.type
    dtype = torch.get_autocast_dtype(device) if autocasts(tokens) else tokens.dtype
    ends = count.cumsum(0).int()

    def product(inputs: Tensor, name: str) -> Tensor:
        weights = torch.stack([getattr(expert, name).weight for expert in experts])
        return F.grouped_mm(inputs, weights.to(dtype).transpose(1, 2), offs=ends)

    tokens = tokens.to(dtype)
    inner = F.silu(product(tokens, "gate_proj")) * product(tokens, "up_proj")  # [N · k, I]
    return experts[0].dropout(product(inner, "down_proj"))


def supports_grouped_mm(tokens: Tensor, expert: SwiGLU) -> bool:
    """Whether F.grouped_mm can run: on a CPU, or in bfloat16 on a GPU since Ampere, with rows that
    are multiples of 16 bytes. LoRA layers cannot: grouped products read their base weights only."""
    layers = (expert.gate_proj, expert.up_proj, expert.down_proj)
    if any(type(layer) is not nn.Linear for layer in layers):
        return False
    size = 2 if autocasts(tokens) else tokens.element_size()
    if any(layer.in_features * size % 16 for layer in layers):
        return False
    if tokens.is_cuda:
        dtype = torch.get_autocast_dtype("cuda") if autocasts(tokens) else tokens.dtype
        recent = torch.cuda.get_device_capability(tokens.device) >= (8, 0)
        return recent and dtype == torch.bfloat16
    return tokens.device.type == "cpu" and not autocasts(tokens)


def autocasts(tokens: Tensor) -> bool:
    return torch.is_autocast_enabled(tokens.device.type)


# -- load balancing --------------------------------------------------------------------------------


def count_tokens(selected: Tensor, token_mask: Tensor, num_experts: int) -> Tensor:
    """[B, T, k], [B, T] → [B, E]: tokens of each row that go to each expert."""
    ones = token_mask[..., None].expand_as(selected).flatten(1)
    zeros = token_mask.new_zeros(len(selected), num_experts)
    return zeros.scatter_add_(1, selected.flatten(1), ones)


def load_balancing_loss(routing: Routing, token_mask: Tensor, per_sequence: bool) -> Tensor:
    """E · Σ f · P over the experts (DeepSeek-V2, arXiv 2405.04434, eq. 23–25): f is the share of
    selections that an expert gets, P its mean score. 1 in perfect balance, more the more uneven.

    f is a count and has no gradient; the gradient flows through P and lowers the scores of those
    experts that get more than their share.

    Args:
        token_mask: [B, T], 1 for tokens that count, 0 for padding.
        per_sequence: balance each row of the batch and take the mean; else balance all tokens of
            the micro-batch together.
    """
    scores, selected = routing.scores, routing.experts
    if not per_sequence:
        scores, selected, token_mask = (
            x.flatten(0, 1)[None] for x in (scores, selected, token_mask)
        )
    num_experts, k = scores.shape[-1], selected.shape[-1]
    tokens = token_mask.sum(1, keepdim=True)  # [B, 1]
    share = count_tokens(selected, token_mask, num_experts) / (k * tokens.clamp(min=1))  # [B, E]
    score = (scores * token_mask[..., None]).sum(1) / tokens.clamp(min=1)  # [B, E]
    return num_experts * (share * score).sum() / (tokens > 0).sum().clamp(min=1)


def moe_layers(model: nn.Module) -> list[MixtureOfExperts]:
    """The MoE layers of a model in order; none in a dense one."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@torch.no_grad()
def update_bias(mixture: MixtureOfExperts, load: Tensor) -> None:
    """With "sigmoid": raise the bias of experts whose load [E] is below the mean, lower that of the
    others, by a fixed step (arXiv 2408.15664). The bias of a frozen router stays."""
    if mixture.config.scoring_func == "sigmoid" and mixture.gate.weight.requires_grad:
        step = mixture.config.bias_update_speed * (load.mean() - load).sign()
        mixture.e_score_correction_bias += step

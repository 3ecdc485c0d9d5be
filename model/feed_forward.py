"""Feed-forward layers: SwiGLU, and a mixture of many of them of which each token uses a few.

The mixture is DeepSeek's (arXiv 2401.06066, V3: 2412.19437): routed experts, of which a gate picks
`num_experts_per_tok` for each token, and shared experts that every token uses. With a
`moe_intermediate_size` below the dense size and more experts it becomes fine-grained.

Letters in the shape comments:
    B batch   T tokens   N tokens of all rows   C hidden size   I intermediate size
    E routed experts   k experts that a token uses
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) · up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config, intermediate_size: int | None = None):
        super().__init__()
        size = intermediate_size or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=False)
        self.down_proj.writes_to_residual = True
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden)))


class Routing(NamedTuple):
    """Where the tokens go, as a gate decides it."""

    scores: Tensor  # [B, T, E], float32: how well each expert suits
    experts: Tensor  # [B, T, k]: the experts that are used
    weights: Tensor  # [B, T, k]: what their outputs are multiplied with


class MixtureOfExperts(nn.Module):
    """Σ weight · expert(x) over the chosen experts, plus Σ expert(x) over the shared ones.

    `scoring_func` decides how the experts are kept in balance, for a gate left to itself soon sends
    all tokens to the same few, and the others learn nothing:

    - "softmax": scores compete, and `load_balancing_loss` draws them towards equal shares.
    - "sigmoid" (DeepSeek-V3): a bias for each expert is added to the scores for the selection only,
      and every update raises it where too few tokens came (`update_router_bias`). No loss pulls
      at what the gate learns (V3 keeps a very small one for each row).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.use_grouped_mm = True  # False: always one by one, to compare
        size = config.moe_intermediate_size
        routed, shared = config.n_routed_experts, config.n_shared_experts
        self.gate = nn.Linear(config.hidden_size, routed, bias=False)
        if config.scoring_func == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(routed))
        self.experts = nn.ModuleList(SwiGLU(config, size) for _ in range(routed))
        self.shared_experts = nn.ModuleList(SwiGLU(config, size) for _ in range(shared))
        # tokens that each expert had since the last update
        self.register_buffer("tokens_per_expert", torch.zeros(routed), persistent=False)

    def forward(self, hidden: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, T, C] → the same, and in training the balance loss (0 with "sigmoid"), for which only
        tokens where `token_mask` [B, T] is 1 count (default: all)."""
        routing = self.route(hidden)
        tokens = hidden.flatten(0, 1)  # [N, C]
        out = self.routed(tokens, routing)
        for expert in self.shared_experts:
            out = out + expert(tokens)
        loss = hidden.new_zeros((), dtype=torch.float32)
        if self.training:
            token_mask = (
                torch.ones_like(routing.scores[..., 0])
                if token_mask is None
                else token_mask.float()
            )
            if torch.is_grad_enabled():  # to look at log-probs is not to train on them
                with torch.no_grad():
                    self.tokens_per_expert += count_tokens(
                        routing.experts, token_mask, len(self.experts)
                    ).sum(0)
            if self.config.scoring_func == "softmax":
                loss = self.config.aux_loss_alpha * load_balancing_loss(
                    routing, token_mask, self.config.seq_aux
                )
        return out.view_as(hidden), loss

    def route(self, hidden: Tensor) -> Routing:
        with torch.autocast(hidden.device.type, enabled=False):  # rounding would flip choices
            logits = self.gate(hidden).float()
        if self.config.scoring_func == "sigmoid":
            scores = logits.sigmoid()
            preferred = scores + self.e_score_correction_bias
        else:
            scores = preferred = logits.softmax(-1)
        chosen = preferred.topk(self.config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return Routing(scores, chosen, weights)

    def routed(self, tokens: Tensor, routing: Routing) -> Tensor:
        """[N, C] → [N, C]: the weighted sum of each token's chosen experts."""
        k = self.config.num_experts_per_tok
        chosen = routing.experts.flatten()  # [N · k]
        order = chosen.argsort(stable=True)  # the tokens of expert 0, of expert 1, …
        count = chosen.new_zeros(len(self.experts)).scatter_add_(0, chosen, torch.ones_like(chosen))
        # a few tokens, as in decoding, need a few experts, and stacking reads them all
        many = torch.is_grad_enabled() or len(tokens) > 256
        group = self.use_grouped_mm and many and supports_grouped_mm(tokens, self.experts[0])
        run = grouped_experts if group else loop_experts
        out = run(self.experts, tokens[order // k], count)  # [N · k, C]
        out = out[order.argsort()].view(len(tokens), k, -1)
        return (out * routing.weights.view(len(tokens), k, 1).to(out.dtype)).sum(1)


# -- experts at work -------------------------------------------------------------------------------


def loop_experts(experts: nn.ModuleList, tokens: Tensor, count: Tensor) -> Tensor:
    """Each expert on its own tokens, which stand behind each other: [N · k, C] → the same.

    In training an expert without tokens computes nothing of nothing, for a gradient of 0.
    """
    parts = zip(experts, tokens.split(count.tolist()), strict=True)
    needed = [(expert, part) for expert, part in parts if len(part) or torch.is_grad_enabled()]
    return torch.cat([expert(part) for expert, part in needed])


def grouped_experts(experts: nn.ModuleList, tokens: Tensor, count: Tensor) -> Tensor:
    """The same in three large products, each for all experts at once (F.grouped_mm)."""
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
    """Whether F.grouped_mm can compute this: on a CPU, or in bfloat16 on a GPU since Ampere, with
    rows that are whole multiples of 16 bytes, and layers that are their weights (no LoRA)."""
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


# -- balance ---------------------------------------------------------------------------------------


def count_tokens(chosen: Tensor, token_mask: Tensor, experts: int) -> Tensor:
    """[B, T, k], [B, T] → [B, E]: how many real tokens chose each expert, row by row."""
    ones = token_mask[..., None].expand_as(chosen).flatten(1)
    return token_mask.new_zeros(len(chosen), experts).scatter_add_(1, chosen.flatten(1), ones)


def load_balancing_loss(routing: Routing, token_mask: Tensor, per_sequence: bool) -> Tensor:
    """E · Σ share of the choices · mean score, over the experts (DeepSeek-V2, eq. 23–25).

    It is 1 where all experts have equal shares, and larger the more tokens the favoured ones have.
    Only tokens whose `token_mask` [B, T] is 1 count. `per_sequence`: for each row of
    the batch, then the mean; else over all tokens of the (micro-)batch together.
    """
    scores, chosen = routing.scores, routing.experts
    if not per_sequence:
        scores, chosen, token_mask = (x.flatten(0, 1)[None] for x in (scores, chosen, token_mask))
    experts, k = scores.shape[-1], chosen.shape[-1]
    tokens = token_mask.sum(1, keepdim=True)  # [B, 1]
    share = count_tokens(chosen, token_mask, experts) / (k * tokens.clamp(min=1))  # [B, E]
    score = (scores * token_mask[..., None]).sum(1) / tokens.clamp(min=1)
    return experts * (share * score).sum() / (tokens > 0).sum().clamp(min=1)


def moe_layers(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of a model, layer by layer; none in a dense one."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@torch.no_grad()
def update_router_bias(mixture: MixtureOfExperts, load: Tensor) -> None:
    """Towards balance, with "sigmoid": up for an expert with less than the mean load [E], down for
    one with more (arXiv 2408.15664). A gate that is frozen keeps its bias too."""
    if mixture.config.scoring_func == "sigmoid" and mixture.gate.weight.requires_grad:
        step = mixture.config.bias_update_speed * (load.mean() - load).sign()
        mixture.e_score_correction_bias += step

"""Sampling: how the next token is drawn from the logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-5  # below, logits / temperature may be infinite: greedy says the same


@dataclass
class SamplingParams:
    """How tokens are sampled. The defaults sample from the model's own distribution."""

    max_new_tokens: int = 512
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep only the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of likely tokens with this probability (nucleus)
    min_p: float = 0.0  # keep tokens at least this likely, relative to the most likely one
    repetition_penalty: float = 1.0  # > 1 makes tokens of prompt and reply less likely
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that are in the reply
    frequency_penalty: float = 0.0  # subtracted once for each time that a token is in the reply
    logit_bias: tuple[tuple[int, float], ...] = ()  # added to the logits of these tokens
    seed: int | None = None  # the same seed gives a prompt the same tokens, whatever its batch
    stop_ids: tuple[int, ...] | None = None  # default: the EOS of the model

    def __post_init__(self) -> None:
        if self.temperature < MIN_TEMPERATURE:
            self.temperature = 0

    @property
    def group_key(self) -> tuple[float, ...]:
        """What changes the distribution: sequences with equal keys are sampled together."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return self.temperature, self.top_k, self.top_p, self.min_p, *penalties


def sample(
    logits: Tensor,
    sampling: SamplingParams,
    seen: list[Tensor],
    counts: list[Tensor],
    generators: list[torch.Generator],
) -> Tensor:
    """[B] next tokens from logits [B, V].

    Args:
        seen: for each row [V], which tokens are in its prompt or reply.
        counts: for each row [V], how often each token is in its reply.
        generators: the random numbers of each row.
    """
    logits = filter_logits(apply_penalties(logits, sampling, seen, counts), sampling)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # The Gumbel-max trick in another form: p_i / E_i with E_i ~ Exp(1) is largest at i with
    # probability p_i. Unlike multinomial, it lets each row draw from its own generator, so that a
    # row's tokens do not depend on its neighbours in the batch.
    draws = [torch.empty_like(logits[0]).exponential_(generator=g) for g in generators]
    return (logits.softmax(-1) / torch.stack(draws)).argmax(-1)


def apply_penalties(
    logits: Tensor, sampling: SamplingParams, seen: list[Tensor], counts: list[Tensor]
) -> Tensor:
    """Repetition penalty (CTRL, arXiv 1909.05858); presence and frequency penalties (OpenAI)."""
    if sampling.repetition_penalty != 1:
        factor = sampling.repetition_penalty
        # Dividing a negative logit would make its token more likely.
        penalised = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(torch.stack(seen), penalised, logits)
    if sampling.presence_penalty or sampling.frequency_penalty:
        count = torch.stack(counts)
        logits = logits - sampling.presence_penalty * (count > 0)
        logits = logits - sampling.frequency_penalty * count
    return logits


def filter_logits(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Temperature, top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082), in this order as in
    transformers. Excluded tokens become −inf."""
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        # The probability of all more likely tokens, without the token itself: the token that
        # crosses top_p is still kept.
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        excluded = before >= sampling.top_p
        excluded[:, 0] = False  # the most likely token always stays
        logits = logits.masked_fill(excluded.scatter(1, order, excluded), -torch.inf)
    if sampling.min_p > 0:
        probs = logits.softmax(-1)
        least = sampling.min_p * probs.max(-1, keepdim=True).values
        logits = logits.masked_fill(probs < least, -torch.inf)
    return logits


def make_generator(seed: int | None, index: int, device: torch.device) -> torch.Generator:
    """The random numbers of sample `index` of a seed: the same again in each run."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed << 20) + index)  # distinct for all seeds and indices
    return generator

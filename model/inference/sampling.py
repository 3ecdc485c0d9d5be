"""How the next token is chosen from the logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SamplingParams:
    """How the next token is chosen. The defaults sample from the model's own distribution."""

    max_new_tokens: int = 512
    temperature: float = 1.0  # 0: greedy, always the most likely token
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the most likely tokens that make up this probability
    repetition_penalty: float = 1.0  # > 1 makes tokens of prompt and reply less likely
    presence_penalty: float = 0.0  # taken from the logits of tokens that are in the reply
    frequency_penalty: float = 0.0  # the same, as often as they are in it
    seed: int | None = None  # the same seed gives a prompt the same tokens, whatever its batch
    stop_ids: tuple[int, ...] | None = None  # default: the EOS of the model

    @property
    def filters(self) -> tuple[float, ...]:
        """What changes the distribution: rows in which this is the same are sampled together."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return self.temperature, self.top_k, self.top_p, *penalties


def sample(
    logits: Tensor,
    sampling: SamplingParams,
    seen: list[Tensor],
    counts: list[Tensor],
    noise: list[torch.Generator],
) -> Tensor:
    """[B] next tokens from logits [B, V].

    Args:
        seen: of each row, [V], which tokens are in its prompt or reply.
        counts: likewise, how often each is in its reply.
        noise: the random numbers of each row.
    """
    logits = filter_logits(apply_penalties(logits, sampling, seen, counts), sampling)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # p_i / E_i with E_i ~ Exp(1) is largest at i with probability p_i. Unlike multinomial it lets
    # each row draw from its own generator, so that neighbours do not change a row's tokens.
    draws = [torch.empty_like(logits[0]).exponential_(generator=g) for g in noise]
    return (logits.softmax(-1) / torch.stack(draws)).argmax(-1)


def apply_penalties(
    logits: Tensor, sampling: SamplingParams, seen: list[Tensor], counts: list[Tensor]
) -> Tensor:
    """Repetition penalty (CTRL, arXiv 1909.05858), and those of OpenAI's API."""
    if sampling.repetition_penalty != 1:
        factor = sampling.repetition_penalty
        penalised = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(torch.stack(seen), penalised, logits)
    if sampling.presence_penalty or sampling.frequency_penalty:
        often = torch.stack(counts)
        logits = logits - sampling.presence_penalty * (often > 0)
        logits = logits - sampling.frequency_penalty * often
    return logits


def filter_logits(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Temperature, top-k, top-p (arXiv 1904.09751), in this order, which is that of transformers.
    What is ruled out becomes −inf."""
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # of all likelier tokens
        unlikely = before >= sampling.top_p
        unlikely[:, 0] = False  # the likeliest always stays
        logits = logits.masked_fill(unlikely.scatter(1, order, unlikely), -torch.inf)
    return logits


def make_generator(seed: int | None, row: int, device: torch.device) -> torch.Generator:
    """Random numbers of one row of a batch: the same prompt at row r draws the same again."""
    generator = torch.Generator(device=device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed << 20) + row)  # no row of one seed is a row of another
    return generator

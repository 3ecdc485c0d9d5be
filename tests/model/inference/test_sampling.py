"""Sampling against transformers' logits processors and its own probabilities."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_generation import GREEDY, PROMPTS, until
from torch.testing import assert_close
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.inference import engine
from model.inference.generation import (
    decode,
    generate,
)
from model.inference.sampling import (
    SamplingParams,
    apply_penalties,
    filter_logits,
    make_generator,
    sample,
)

SAMPLED = SamplingParams(max_new_tokens=15, seed=7, stop_ids=())


def test_samples_do_not_depend_on_the_batch(either):
    batch = generate(either, PROMPTS, SAMPLED)
    for others in ([[3] * 11], [[4, 5]]):  # longer and shorter ones, in the place of the third
        assert generate(either, PROMPTS[:2] + others, SAMPLED)[:2] == batch[:2]
    assert generate(either, PROMPTS[:1], SAMPLED) == batch[:1]


def test_a_row_goes_on_as_before_when_a_neighbour_ends(either):
    free = generate(either, PROMPTS, SAMPLED)
    stop = (free[0][2],)
    assert generate(either, PROMPTS, replace(SAMPLED, stop_ids=stop)) == [
        until(reply, stop) for reply in free
    ]


def test_the_seed_decides(model):
    first = generate(model, PROMPTS, SAMPLED)
    assert generate(model, PROMPTS, SAMPLED) == first
    assert generate(model, PROMPTS, replace(SAMPLED, seed=1000)) != first
    unseeded = replace(SAMPLED, seed=None)
    assert generate(model, PROMPTS, unseeded) != generate(model, PROMPTS, unseeded)


def test_the_same_prompt_gets_other_tokens_at_another_index(model):
    first, second = generate(model, PROMPTS[:1] * 2, SAMPLED)
    assert first != second


FILTERS = {
    "temperature": dict(temperature=0.7),
    "top_k": dict(top_k=5),
    "top_k_above_the_vocabulary": dict(top_k=99),
    "top_p": dict(top_p=0.8),
    "top_p_of_0": dict(top_p=0.0),
    "penalty": dict(repetition_penalty=1.4),
    "all": dict(temperature=1.6, top_k=20, top_p=0.9, repetition_penalty=0.8),
}


@pytest.mark.parametrize("fields", FILTERS.values(), ids=FILTERS)
def test_filter_logits_equals_the_processors_of_transformers(fields):
    torch.manual_seed(0)
    logits = 3 * torch.randn(16, 50)
    previous = torch.randint(50, (16, 9))
    seen = torch.zeros(16, 50, dtype=torch.bool).scatter_(1, previous, True)
    processors = LogitsProcessorList()
    if "repetition_penalty" in fields:
        processors.append(RepetitionPenaltyLogitsProcessor(fields["repetition_penalty"]))
    if "temperature" in fields:
        processors.append(TemperatureLogitsWarper(fields["temperature"]))
    if "top_k" in fields:
        processors.append(TopKLogitsWarper(fields["top_k"]))
    if "top_p" in fields:
        processors.append(TopPLogitsWarper(fields["top_p"]))
    sampling = SamplingParams(**fields)
    ours = filter_logits(apply_penalties(logits, sampling, list(seen), []), sampling)
    assert_close(ours, processors(previous, logits))


def test_tokens_come_as_often_as_their_probabilities_say():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0, -9.0])
    draws = 4000
    noise = [make_generator(0, row, torch.device("cpu")) for row in range(draws)]
    seen = torch.zeros(draws, 6, dtype=torch.bool)
    sampling = SamplingParams(temperature=1.5, top_k=5)  # all but the last
    chosen = sample(logits.expand(draws, 6), sampling, list(seen), [], noise)
    counts = Counter(chosen.tolist())
    assert counts[5] == 0
    expected = draws * (logits[:5] / 1.5).softmax(-1)
    observed = torch.tensor([counts[token] for token in range(5)])
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand


def test_penalties_apply_to_prompt_and_reply_and_not_to_padding(model, monkeypatch):
    calls = []

    def spy(logits, sampling, seen, *more):
        calls.append([set(row.nonzero().flatten().tolist()) for row in seen])
        return sample(logits, sampling, seen, *more)

    stop = (generate(model, PROMPTS, GREEDY)[0][2],)  # the first row leaves
    monkeypatch.setattr(engine, "sample", spy)
    occurred = {row: set(prompt) for row, prompt in enumerate(PROMPTS)}
    for step in decode(model, PROMPTS, replace(GREEDY, stop_ids=stop)):
        assert calls[-1] == [occurred[row] for row in step]
        for row, token in step.items():
            occurred[row].add(token)


def test_penalty_without_temperature_is_greedy_over_penalised_logits():
    logits = torch.tensor([[2.0, 1.9, -0.1], [-2.0, -1.0, -1.1]])
    seen = torch.tensor([[True, False, False], [False, True, False]])
    sampling = SamplingParams(temperature=0, repetition_penalty=1.2)  # 2.0 → 1.67; −1.0 → −1.2
    assert sample(logits, sampling, list(seen), [], []).tolist() == [1, 2]

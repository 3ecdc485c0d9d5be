"""The engine: requests that come and go, beside each other, get what they would get alone."""

from random import Random

import pytest
import torch
from torch.testing import assert_close

from model.inference.engine import Engine, QueueFull, Request
from model.inference.sampling import SamplingParams

SETTINGS = [
    SamplingParams(12, temperature=0, stop_ids=()),
    SamplingParams(9, temperature=0.8, top_p=0.9, seed=5, stop_ids=()),
    SamplingParams(15, temperature=1.3, top_k=7, repetition_penalty=1.2, seed=6, stop_ids=()),
    SamplingParams(7, temperature=0, presence_penalty=4.0, frequency_penalty=3.0, stop_ids=()),
]


@pytest.fixture
def model(make_model):
    return make_model()


def some_requests(count: int) -> list[Request]:
    draw = Random(0)
    prompts = [[draw.randrange(128) for _ in range(draw.randint(1, 30))] for _ in range(count)]
    return [Request(prompt, SETTINGS[n % 4], index=n) for n, prompt in enumerate(prompts)]


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def alone(model, request: Request) -> list[int]:
    same = Request(request.prompt, request.sampling, request.index)
    engine = Engine(model, slots=1)
    engine.submit(same)
    finish(engine)
    return same.tokens


# -- batching and prefix sharing -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, dict(use_moe=True), dict(qk_norm=True)], ids=str)
@pytest.mark.parametrize(("slots", "prefill"), [(3, 8), (5, 16), (12, None)])
def test_requests_that_come_at_any_time_get_what_they_get_alone(make_model, kind, slots, prefill):
    model, requests = make_model(**kind), some_requests(12)
    engine, draw = Engine(model, slots, prefill), Random(1)
    coming = list(requests)
    while coming or engine.busy:
        for _ in range(draw.randint(0, 2)):
            if coming:
                engine.submit(coming.pop())
        engine.step()
    for request in requests:
        assert request.finish_reason == "length"
        assert request.tokens == alone(model, request)


def test_a_step_reads_no_more_than_its_share_and_keeps_others_going(model):
    """A long prompt is read in parts, and the request that runs gets a token in every step."""
    reads = []
    model.model.embed_tokens.register_forward_hook(lambda _, ids, __: reads.append(ids[0].shape))
    engine = Engine(model, slots=4, prefill_tokens=8)
    short, long = Request([5, 6], SETTINGS[0]), Request([9] * 30, SETTINGS[0])
    engine.submit(short)
    engine.step()
    engine.submit(long)
    for n in range(2, 6):
        engine.step()
        assert len(short.tokens) == n
    assert reads[2::2] == [(1, 8), (1, 8), (1, 8), (1, 6)]
    assert len(long.tokens) == 1
    finish(engine)
    assert long.tokens == alone(model, long)


def test_short_prompts_are_read_together_within_the_share(model):
    reads = []
    model.model.embed_tokens.register_forward_hook(lambda _, ids, __: reads.append(ids[0].shape))
    engine = Engine(model, slots=8, prefill_tokens=12)
    for length in (4, 3, 4, 5):
        engine.submit(Request([7] * length, SETTINGS[0]))
    engine.step()
    assert reads == [(3, 4)]


@pytest.mark.parametrize("prefill", [8, None])
def test_a_shared_beginning_is_read_once(model, prefill):
    """Replies to the same prompt, and to one that goes on differently after 15 tokens."""
    read = []
    model.model.embed_tokens.register_forward_hook(lambda _, ids, __: read.append(ids[0].numel()))
    prompt = list(range(20, 40))
    requests = [Request(prompt, SETTINGS[1], index=n) for n in range(5)]
    requests.append(Request(prompt[:15] + [9, 8, 7], SETTINGS[0]))
    requests.append(Request(prompt[:4] + [1] * 9, SETTINGS[0]))  # too little in common
    engine = Engine(model, slots=7, prefill_tokens=prefill)
    for request in requests:
        engine.submit(request)
    finish(engine)
    new = sum(len(request.tokens) - 1 for request in requests)  # the last is never read
    assert sum(read) - new <= 2 * 20 + 5 * 3  # padded: two prompts, then what is left of five
    assert len({tuple(request.tokens) for request in requests[:5]}) > 1
    for request in requests:
        assert request.tokens == alone(model, request)


# -- cancelling and stopping -----------------------------------------------------------------------


@pytest.mark.parametrize("when", ["waiting", "reading", "decoding"])
def test_a_cancelled_request_frees_its_place_and_disturbs_nobody(model, when):
    engine = Engine(model, slots=3, prefill_tokens=8)
    requests = some_requests(5)
    victim = Request([3] * 20, SETTINGS[0])
    order = [*requests[:3], victim] if when == "waiting" else [requests[0], victim, requests[1]]
    for request in order:
        engine.submit(request)
    engine.step()
    if when == "decoding":
        while not victim.tokens:
            engine.step()
    engine.cancel(victim)
    assert victim.finish_reason == "cancelled"
    assert all(each.request is not victim for each in engine.running)
    told = list(victim.tokens)
    finish(engine)
    assert victim.tokens == told
    for request in order:
        if request is not victim:
            assert request.tokens == alone(model, request)
    engine.cancel(order[0])  # too late: nothing happens
    assert order[0].finish_reason == "length"


def test_a_stop_token_ends_a_reply(model):
    free = alone(model, Request([5, 9, 17], SETTINGS[0]))
    stop = SamplingParams(12, temperature=0, stop_ids=(free[4],))
    request = Request([5, 9, 17], stop)
    engine = Engine(model)
    engine.submit(request)
    finish(engine)
    assert request.tokens == free[: free.index(free[4]) + 1]
    assert request.finish_reason == "stop"


def test_no_more_requests_wait_than_the_queue_has_room_for(model):
    engine = Engine(model, slots=2, max_queue=3)
    for _ in range(5):
        engine.submit(Request([4], SETTINGS[0]))
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        engine.submit(Request([4], SETTINGS[0]))
    engine.step()  # two run now
    with pytest.raises(QueueFull):
        engine.submit(Request([4], SETTINGS[0]))
    finish(engine)
    engine.submit(Request([4], SETTINGS[0]))


# -- log-probs and constraints ---------------------------------------------------------------------


def test_log_probs_are_those_of_the_model(model):
    requests = [Request(r.prompt, r.sampling, r.index, top_logprobs=3) for r in some_requests(4)]
    engine = Engine(model, slots=4)
    for request in requests:
        engine.submit(request)
    finish(engine)
    for request in requests:
        ids = torch.tensor([request.prompt + request.tokens])
        with torch.no_grad():
            expected = model(ids).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
        assert len(request.logprobs) == len(request.tokens)
        for token, told, own in zip(request.tokens, request.logprobs, expected, strict=True):
            assert_close(told.logprob, own[token].item(), atol=1e-4, rtol=1e-4)
            assert [n for n, _ in told.top] == own.topk(3).indices.tolist()


class EvenThenOdd:
    """Allows even tokens and odd ones in turn."""

    is_complete = is_finished = False

    def __init__(self):
        self.odd = 0

    def allowed(self):
        return torch.arange(128) % 2 == self.odd

    def accept(self, token):
        self.odd = 1 - self.odd
        return token


def test_a_constraint_holds_for_its_request_alone(model):
    bound = [Request([5, n], SETTINGS[n], index=n, constraint=EvenThenOdd()) for n in range(4)]
    free = some_requests(4)
    engine = Engine(model)
    for request in [*bound, *free]:
        engine.submit(request)
    finish(engine)
    for request in bound:
        assert [token % 2 for token in request.tokens] == ([0, 1] * 8)[: len(request.tokens)]
    for request in free:
        assert request.tokens == alone(model, request)


def test_penalties_are_openais(model):
    """logit − presence · (in the reply) − frequency · (times in the reply), token by token."""
    request = Request([5, 9, 17], SETTINGS[3])
    engine = Engine(model)
    engine.submit(request)
    finish(engine)
    said = []
    for token in request.tokens:
        with torch.no_grad():
            logits = model(torch.tensor([request.prompt + said])).logits[0, -1]
        for old in set(said):
            logits[old] -= 4 + 3 * said.count(old)
        assert logits.argmax() == token
        said.append(token)
    assert said != alone(model, Request([5, 9, 17], SETTINGS[0]))[: len(said)]

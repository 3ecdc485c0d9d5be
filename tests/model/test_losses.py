"""The loss and the log-probs of labels against those from all logits at once."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from model import losses
from model.losses import IGNORE_INDEX, cross_entropy_sum


@pytest.mark.parametrize("number", [7, torch.tensor(7)], ids=["int", "tensor"])
@torch.no_grad()
def test_num_items_in_batch_divides_the_summed_loss(make_model, ids, number):
    model = make_model()
    labels = ids.clone()
    labels[0, :5] = IGNORE_INDEX
    mean = model(ids, labels=labels).loss
    counted = 11 + 7  # the first label of a row is never predicted
    assert_close(model(ids, labels=labels, num_items_in_batch=number).loss, mean * counted / 7)


@torch.no_grad()
def test_loss_without_logits(make_model, ids):
    model = make_model()
    outputs = model(ids, labels=ids, return_logits=False)
    assert outputs.logits is None
    assert torch.equal(outputs.loss, model(ids, labels=ids).loss)


def test_log_probs_are_those_of_the_logits(make_model, ids, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SIZE", 5)  # several chunks
    model = make_model()
    labels = ids.clone()
    labels[0, :5] = IGNORE_INDEX
    log_probs = model(ids, labels=labels, return_log_probs=True, temperature=0.7).log_probs
    expected = (model(ids).logits[:, :-1] / 0.7).log_softmax(-1)
    expected = expected.gather(-1, ids[:, 1:, None])[..., 0].masked_fill(labels[:, 1:] < 0, 0)
    assert_close(log_probs, expected, atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 1, 22).view(2, 11)
    for got, wanted in zip(
        torch.autograd.grad((log_probs * weights).sum(), list(model.parameters())),
        torch.autograd.grad((expected * weights).sum(), list(model.parameters())),
        strict=True,
    ):
        assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_no_labels_at_all_give_zero_loss_and_gradients(make_model, ids):
    model = make_model()
    loss = model(ids, labels=torch.full_like(ids, IGNORE_INDEX)).loss
    loss.backward()
    assert loss.item() == 0
    assert all((weight.grad == 0).all() for weight in model.parameters())


@pytest.mark.parametrize(("labels", "fused"), [(1100, True), (100, True), (10, False), (0, False)])
def test_cross_entropy_equals_that_of_the_logits(monkeypatch, labels, fused):
    calls = []
    original = F.linear_cross_entropy
    monkeypatch.setattr(
        F, "linear_cross_entropy", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    torch.manual_seed(0)
    hidden = torch.randn(2, 600, 16, requires_grad=True)
    head = torch.randn(50, 16, requires_grad=True)
    target = torch.full((1200,), IGNORE_INDEX)
    target[torch.randperm(1200)[:labels]] = torch.randint(50, (labels,))  # 1100: three chunks
    target = target.view(2, 600)

    loss, count = cross_entropy_sum(hidden, head, target)
    logits = (hidden @ head.T).flatten(0, 1)
    expected = F.cross_entropy(logits, target.flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    assert (count.item(), bool(calls)) == (labels, fused)
    assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, (hidden, head)),
        torch.autograd.grad(expected, (hidden, head)),
        strict=True,
    ):
        assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "labels",
    [
        10,
        100,
    ],
)
def test_loss_of_a_half_precision_model_is_summed_in_float32(labels):
    hidden, head = torch.ones(1, 100, 16), torch.ones(50, 16)
    target = torch.zeros(1, 100, dtype=torch.long)
    target[:, labels:] = IGNORE_INDEX
    loss, _ = cross_entropy_sum(hidden.bfloat16(), head.bfloat16(), target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(labels * math.log(50), rel=1e-4)  # all tokens alike


def test_loss_under_autocast_is_float32_and_never_fused(make_model, ids, monkeypatch):
    model = make_model(num_hidden_layers=1, hidden_size=16)  # with 22 labels: else fused
    expected = model(ids, labels=ids).loss
    monkeypatch.setattr(F, "linear_cross_entropy", None)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("labels", [0, 3, 90])
def test_chunked_cross_entropy_has_the_gradients_of_the_logits(monkeypatch, labels, weighted):
    """In float32, where nothing but the order of sums differs; under autocast, by its rounding."""
    monkeypatch.setattr(losses, "CHUNK_SIZE", 7)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(90, 16, generator=generator), torch.randn(50, 16, generator=generator)
    target = torch.randint(50, (90,), generator=generator)[:labels]
    weights = torch.rand(50, generator=generator) if weighted else None

    def loss_and_gradients(loss_of) -> list[torch.Tensor]:
        hidden, head = (each.clone().requires_grad_() for each in start)
        loss = loss_of(hidden[:labels], head)
        return [loss.detach(), *torch.autograd.grad(3 * loss, (hidden, head))]

    def chunked(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        each = None if weights is None else weights[target]
        return losses.ChunkedCrossEntropy.apply(hidden, head, target, each, torch.float32, True)

    def under_autocast(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy_sum(hidden, head, target, weights)[0]

    expected = loss_and_gradients(
        lambda hidden, head: F.cross_entropy(hidden @ head.mT, target, weights, reduction="sum")
    )
    assert_close(loss_and_gradients(chunked), expected, atol=1e-4, rtol=1e-5)
    assert_close(loss_and_gradients(under_autocast), expected, atol=0.3, rtol=0.05)


def test_a_frozen_head_gets_no_gradient():
    hidden, head = torch.randn(9, 16, requires_grad=True), torch.randn(50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = cross_entropy_sum(hidden, head, torch.arange(9))
    loss.backward()
    assert hidden.grad is not None and head.grad is None


def test_untrained_loss_is_that_of_guessing(make_model, ids):
    model = make_model(initializer_range=0.02)
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(128), rel=0.01)

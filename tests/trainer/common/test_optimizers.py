"""Optimizers and learning rates: against torch, by hand, and by the size of their steps."""

import pytest
import torch
from toy import (
    assert_close,
)

from trainer.common.optimizers import (
    NORM_LR_SCALE,
    Muon,
    embedding_lr_scale,
    make_optimizer,
    orthogonalize,
    split_parameters,
)

pytestmark = pytest.mark.usefixtures("in_a_hurry")


# -- optimizers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, {"tie_word_embeddings": False}])
def test_every_parameter_is_in_one_group(make_model, fields):
    model = make_model(**fields)
    groups = split_parameters(model)
    ids = [id(parameter) for group in groups.values() for parameter in group]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    assert len(groups["matrices"]) == 7 * 2
    assert all(parameter.dim() == 1 for parameter in groups["norms"])
    assert {parameter.shape for parameter in groups["embedding"]} == {(128, 64)}


def test_what_is_frozen_is_not_trained(make_model):
    model = make_model()
    model.model.layers[0].requires_grad_(False)
    groups = split_parameters(model)
    assert len(groups["matrices"]) == 7 and len(groups["norms"]) == 3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_matrices_only(make_model, name):
    model = make_model()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = make_optimizer(model, name, learning_rate=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if "_proj" in key else 1
        assert_close(parameter.detach(), before[key] * factor)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_one_learning_rate_maps_to_every_group(make_model, name):
    model = make_model()
    optimizer = make_optimizer(model, name, learning_rate=0.1, weight_decay=0.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    multiples = {"matrices": 1, "embedding": 30, "norms": NORM_LR_SCALE}
    for role, parameters in split_parameters(model).items():
        for parameter in parameters:
            assert rates[id(parameter)] == pytest.approx(0.1 * multiples[role])


def test_the_embedding_of_a_wide_model_learns_more_slowly():
    """The head's logits are sums over the width. RECIPE_LOG.md, series 13."""
    multiples = [embedding_lr_scale(width) for width in (64, 256, 512, 768)]
    assert multiples == pytest.approx([30, 30, 10.61, 5.77], abs=0.01)


def test_a_wider_model_takes_no_larger_steps(make_model):
    """μP's coordinate check (arXiv 2203.03466): how far one step moves the logits."""
    ids = torch.randint(3, 128, (4, 64), generator=torch.Generator().manual_seed(0))

    def moved(width: int) -> float:
        model = make_model(hidden_size=width, initializer_range=0.02)
        optimizer = make_optimizer(model, "muon", learning_rate=1e-4, weight_decay=0.0)
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        return (model(ids).logits - outputs.logits).abs().mean().item()

    assert moved(1024) < 2.5 * moved(256)  # 4 times, were the embedding's multiple the same


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("kept", ["_proj", "embed", "norm"])
def test_a_role_alone_can_be_trained(make_model, name, kept):
    model = make_model()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(kept in key)
        parameter.grad = torch.ones_like(parameter)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    make_optimizer(model, name, learning_rate=0.1, weight_decay=0.0).step()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) == (kept not in key)


def test_muon_moves_a_matrix_by_its_rate(make_model):
    """The root mean square of a step is about the learning rate."""
    model = make_model()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    optimizer = make_optimizer(model, "muon", learning_rate=0.1, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    moved = (model.model.layers[0].mlp.up_proj.weight - before).square().mean().sqrt().item()
    assert moved == pytest.approx(0.1, rel=0.25)


@pytest.mark.parametrize("shape", [(48, 48), (32, 88), (88, 32)])
def test_orthogonal_is_the_polar_factor_nearly(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    ours = orthogonalize(matrices)
    mapped = (left.mT @ ours @ right.mT).diagonal(dim1=-2, dim2=-1)  # what became of each value
    assert_close(ours, left @ (mapped[..., None] * right), 1e-4)  # no direction has changed
    strong = values / values.square().sum(-1, keepdim=True).sqrt() > 0.01
    assert strong.float().mean() > 0.9
    assert (mapped[strong] - 1).abs().max() < 0.28


@pytest.mark.parametrize("shape", [(48, 48), (88, 32)])
def test_bfloat16_is_precise_enough_to_be_orthogonal_nearly(shape):
    """The step points the same way, and singular values are 1 ± 0.28 and some rounding."""
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    single, half = orthogonalize(matrices), orthogonalize(matrices.bfloat16())
    assert half.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(single.flatten(1), half.float().flatten(1))
    assert cosine.min() > 0.999
    values = torch.linalg.svdvals(half.float())
    assert values[:, : min(shape) * 9 // 10].sub(1).abs().max() < 0.3


def test_muon_is_momentum_looked_ahead_and_orthogonal():
    """Two steps by hand, of two matrices of one shape and one of another."""
    generator = torch.Generator().manual_seed(0)
    matrices = [
        torch.nn.Parameter(torch.randn(*shape, generator=generator))
        for shape in [(8, 16), (8, 16), (16, 16)]
    ]
    expected = [matrix.detach().clone() for matrix in matrices]
    averages = [torch.zeros_like(matrix) for matrix in expected]
    optimizer = Muon(matrices, lr=0.1, weight_decay=0.5)
    for _ in range(2):
        for k, matrix in enumerate(matrices):
            matrix.grad = torch.randn(matrix.shape, generator=generator)
            averages[k] = 0.8 * averages[k] + 0.2 * matrix.grad
            ahead = 0.8 * averages[k] + 0.2 * matrix.grad
            update = max(matrix.shape) ** 0.5 * orthogonalize(ahead[None])[0]
            expected[k] = (1 - 0.1 * 0.5) * expected[k] - 0.1 * update
        optimizer.step()
    for matrix, value in zip(matrices, expected, strict=True):
        assert_close(matrix.detach(), value, 1e-5)

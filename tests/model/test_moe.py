"""The mixture of experts: against written-out sums, its balance, and training it."""

import numpy as np
import pytest
import torch
from ranks import metrics_of, together
from torch.testing import assert_close
from toy import everything, logged, same

from model.feed_forward import (
    MixtureOfExperts,
    Routing,
    grouped_experts,
    load_balancing_loss,
    loop_experts,
    supports_grouped_mm,
    update_bias,
)
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import load_model, load_scoring_model
from trainer import train_lora, train_reward

pytestmark = pytest.mark.usefixtures("in_a_hurry")
MOE = dict(use_moe=True, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2)
SIGMOID = dict(**MOE, scoring_func="sigmoid")


@pytest.fixture
def make_mixture():
    def make(**fields) -> MixtureOfExperts:
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, moe_intermediate_size=24, num_attention_heads=2)
        mixture = MixtureOfExperts(MiniMindConfig(**{**sizes, **MOE, **fields}))
        for weight in mixture.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        return mixture

    return make


@pytest.fixture
def hidden():
    return torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(1))


# -- output ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, dict(norm_topk_prob=False), dict(n_shared_experts=0), dict(scoring_func="sigmoid")],
    ids=str,
)
def test_output_is_the_weighted_sum_of_the_selected_experts(make_mixture, hidden, fields):
    mixture = make_mixture(**fields)
    out, _ = mixture(hidden)
    for token, found in zip(hidden.flatten(0, 1), out.flatten(0, 1), strict=True):
        logits = mixture.gate(token)
        sigmoid = fields.get("scoring_func") == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
        best = scores.argsort(descending=True)[:2].tolist()
        total = scores[best].sum() if fields.get("norm_topk_prob", True) else 1.0
        expected = sum(scores[n] / total * mixture.experts[n](token) for n in best)
        expected = expected + sum(shared(token) for shared in mixture.shared_experts)
        assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_all_experts_together_are_the_dense_weighted_sum(make_mixture, hidden):
    mixture = make_mixture(num_experts_per_tok=4)
    weights = mixture.gate(hidden).softmax(-1)
    dense = sum(weights[..., n, None] * expert(hidden) for n, expert in enumerate(mixture.experts))
    expected = dense + mixture.shared_experts[0](hidden)
    assert_close(mixture(hidden)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [[5, 9, 4, 2], [20, 0, 0, 0], [0, 11, 0, 9]], ids=str)
def test_grouped_products_equal_the_loop(make_mixture, count):
    """Also where experts have no token; their gradients are 0 then and not missing."""
    mixture, tokens = make_mixture(), torch.randn(20, 16, requires_grad=True)
    assert supports_grouped_mm(tokens, mixture.experts[0])
    results = []
    for way in (grouped_experts, loop_experts):
        out = way(mixture.experts, tokens, torch.tensor(count))
        inputs = [tokens, *mixture.experts.parameters()]
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "runs"), [(24, True), (25, False), (26, False)])
def test_odd_sizes_are_left_to_the_loop(make_mixture, hidden, size, runs):
    mixture = make_mixture(moe_intermediate_size=size)
    assert supports_grouped_mm(hidden, mixture.experts[0]) == runs
    out, loss = mixture(hidden)
    (out.sum() + loss).backward()


def test_the_bias_selects_and_does_not_weigh(make_mixture, hidden):
    mixture = make_mixture(scoring_func="sigmoid", num_experts_per_tok=1, norm_topk_prob=False)
    mixture.e_score_correction_bias += torch.tensor([0.0, 0.0, 9.0, 0.0])
    routing = mixture.route(hidden)
    assert (routing.experts == 2).all()
    assert_close(routing.weights, mixture.gate(hidden).sigmoid()[..., 2:3])


# -- balance ---------------------------------------------------------------------------------------


def routing_of(scores: list, chosen: list) -> Routing:
    return Routing(torch.tensor(scores), torch.tensor(chosen), torch.zeros(0))


def test_balance_loss_by_hand():
    # row 1: expert 0 twice, mean scores 0.7 and 0.3: 2 · (1 · 0.7 + 0) = 1.4
    # row 2: once each, mean scores 0.5: 2 · (0.5 · 0.5 + 0.5 · 0.5) = 1
    routing = routing_of(
        [[[0.8, 0.2], [0.6, 0.4]], [[0.9, 0.1], [0.1, 0.9]]], [[[0], [0]], [[0], [1]]]
    )
    assert_close(load_balancing_loss(routing, torch.ones(2, 2), True), torch.tensor(1.2))
    # together: shares 3/4 and 1/4, mean scores 0.6 and 0.4: 2 · (0.45 + 0.1) = 1.1
    assert_close(load_balancing_loss(routing, torch.ones(2, 2), False), torch.tensor(1.1))


def test_padding_does_not_count():
    """The first row without its second token: 2 · 0.8 = 1.6; an empty row has no balance at all."""
    scores = [[[0.8, 0.2], [0.6, 0.4]], [[0.9, 0.1], [0.1, 0.9]]]
    routing = routing_of(scores, [[[0], [0]], [[0], [1]]])
    token_mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert_close(load_balancing_loss(routing, token_mask, True), torch.tensor(1.6))
    assert_close(load_balancing_loss(routing, token_mask, False), torch.tensor(1.6))
    assert load_balancing_loss(routing, torch.zeros(2, 2), True) == 0


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("per_sequence", [True, False])
def test_balance_is_a_loss_of_one(k, per_sequence):
    chosen = [[[(n + i) % 4 for i in range(k)] for n in range(8)]]
    routing = routing_of([[[0.25] * 4] * 8], chosen)
    assert_close(load_balancing_loss(routing, torch.ones(1, 8), per_sequence), torch.tensor(1.0))


def test_the_loss_of_a_model_is_that_of_its_layers(make_model):
    model, ids = make_model(**MOE, aux_loss_alpha=0.5).train(), torch.randint(3, 128, (2, 12))
    losses = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, out: losses.append(out[1]))
    outputs = model(ids, labels=ids)
    assert len(losses) == 2
    assert_close(outputs.aux_loss, sum(losses))
    assert make_model()(ids, labels=ids).aux_loss is None
    plain = make_model(**MOE, aux_loss_alpha=0.0).train()(ids, labels=ids)
    assert_close((plain.loss, plain.aux_loss), (outputs.loss, torch.tensor(0.0)))


def test_router_bias_moves_towards_balance(make_mixture):
    mixture = make_mixture(scoring_func="sigmoid", bias_update_speed=0.01)
    update_bias(mixture, torch.tensor([10.0, 2.0, 4.0, 0.0]))
    assert_close(mixture.e_score_correction_bias, torch.tensor([-0.01, 0.01, 0.0, 0.01]))
    update_bias(make_mixture(), torch.tensor([1.0, 0.0, 0.0, 0.0]))  # softmax has no bias


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_balance_comes_about(make_mixture, scoring_func):
    """A gate that prefers one expert for what all tokens have in common comes to use all alike."""
    mixture = make_mixture(scoring_func=scoring_func, bias_update_speed=0.01).train()
    common = torch.randn(16)
    with torch.no_grad():
        mixture.gate.weight[0] += 0.2 * common
    optimizer = torch.optim.AdamW(mixture.gate.parameters(), lr=1e-2)
    busiest = []
    for _ in range(150):
        _, loss = mixture(torch.randn(4, 64, 16) + common)
        if scoring_func == "softmax":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        busiest.append((mixture.tokens_per_expert.max() / mixture.tokens_per_expert.mean()).item())
        update_bias(mixture, mixture.tokens_per_expert)
        mixture.tokens_per_expert.zero_()
    assert busiest[0] > 1.6 and np.mean(busiest[-5:]) < 1.2, (busiest[0], busiest[-5:])


# -- the model -------------------------------------------------------------------------------------


def test_size_of_the_named_model():
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=640, use_moe=True))
    assert model.num_parameters() == pytest.approx(145e6, rel=0.001)


def test_names_of_the_weights(make_model):
    mlp = "model.layers.1.mlp."
    names = {n.removeprefix(mlp) for n in make_model(**MOE).state_dict() if n.startswith(mlp)}
    projections = ("gate_proj", "up_proj", "down_proj")
    experts = [f"experts.{n}.{p}.weight" for n in range(4) for p in projections]
    shared = [f"shared_experts.0.{p}.weight" for p in projections]
    assert names == {"gate.weight", *experts, *shared}


@pytest.mark.parametrize(
    "fields", [dict(num_experts_per_tok=5), dict(scoring_func="tanh")], ids=str
)
def test_settings_that_do_not_fit_are_refused(fields):
    with pytest.raises(ValueError, match="experts|scoring_func"):
        MiniMindConfig(**{**MOE, **fields})


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [MOE, SIGMOID], ids=["softmax", "sigmoid"])
def test_moe_is_trained_logged_and_saved(any_stage, settings):
    if any_stage.stage is train_lora:
        settings = {**settings, "lora_targets": ["gate_proj", "down_proj"]}
    metrics = any_stage(**settings, epochs=3)
    records = [record for record in logged(metrics) if "loss" in record]
    assert all(len(record["expert_load"]) == 2 for record in records)  # a value a layer
    assert all(1 <= load <= 4 for record in records for load in record["expert_load"])
    (path,) = (any_stage.folder / "a" / "out").rglob("*_32_moe.pth")
    if any_stage.stage is train_lora:  # which saves the adapter only
        return
    load = load_scoring_model if any_stage.stage is train_reward else load_model
    saved = load(path)
    assert saved.config.use_moe and saved.config.scoring_func == settings.get(
        "scoring_func", "softmax"
    )
    if settings is SIGMOID:
        assert all((layer.mlp.e_score_correction_bias != 0).any() for layer in saved.model.layers)


@pytest.mark.parametrize("settings", [MOE, SIGMOID], ids=["softmax", "sigmoid"])
def test_however_a_window_is_cut_the_training_is_the_same(train, settings):
    common = dict(**settings, max_steps=3)
    train("one", batch_size=4, **common)
    train("many", batch_size=1, accumulation_steps=4, **common)
    together(train, 2, batch_size=1, accumulation_steps=2, **common)
    for name in ("many", "a"):
        assert_close(train.saved(name)["model"], train.saved("one")["model"], rtol=0, atol=3e-5)
        np.testing.assert_allclose(metrics_of(train, name), metrics_of(train, "one"), atol=2e-4)
        loads = [[record["expert_load"] for record in train.log(n)] for n in (name, "one")]
        np.testing.assert_allclose(*loads, atol=2e-3)


@pytest.mark.parametrize("settings", [MOE, SIGMOID], ids=["softmax", "sigmoid"])
def test_resumed_moe_training_equals_one_never_stopped(train, killed, settings):
    """Also where the checkpoint lies between two lines of the log."""
    common = dict(**settings, save_interval=1, log_interval=2, max_steps=4)
    train("whole", **common)
    killed(3, train, "cut", **common)
    train("cut", resume=True, **common)
    assert same(everything(train, "cut"), everything(train, "whole"))


def test_moe_training_starts_from_an_moe_model(train):
    train("a", **MOE, max_steps=1)
    (path,) = (train.folder / "a" / "out").glob("*.pth")
    folder = dict(save_dir=str(path.parent), hidden_size=None, num_hidden_layers=None)
    heads = dict(num_attention_heads=None, num_key_value_heads=None)
    train(
        "b", from_weight="pretrain", use_moe=True, max_steps=1, save_weight="x", **folder, **heads
    )
    assert (path.parent / "x_32_moe.pth").exists()
    train("c", from_weight=str(path), max_steps=1, save_weight="y", **folder, **heads)
    assert (path.parent / "y_32_moe.pth").exists()

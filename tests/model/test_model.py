"""The model against transformers' own, its invariances, and numbers worked out by hand."""

import pytest
import torch
from peers import peer_with_weights
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
)

from model.formats.minimind_format import ROUTER_BIAS
from model.losses import IGNORE_INDEX
from model.model_minimind import (
    MiniMindConfig,
    MiniMindForCausalLM,
    MiniMindForScoring,
)

# Two rows of documents of 4, 3 and 5 tokens, and of 7 and 5.
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
# The second row has 3 tokens of padding on its left.
LEFT = torch.tensor([[1] * 12, [0] * 3 + [1] * 9])
LEFT_POSITIONS = (LEFT.cumsum(1) - 1).clamp(min=0)
RIGHT = LEFT.flip(1)

# Masks for every way in which a forward pass can hide keys.
INPUTS = {
    "causal": {},
    "left_padding": dict(attention_mask=LEFT, position_ids=LEFT_POSITIONS),
    "right_padding": dict(attention_mask=RIGHT),
    "packed": dict(position_ids=PACKED),
    "packed_one_row_for_all": dict(position_ids=PACKED[:1]),
}


PAIRS = {
    "llama": {},
    "qwen3": dict(qk_norm=True),
    "llama_yarn": dict(inference_rope_scaling=True, yarn_original_length=64),
    "qwen2_moe": dict(use_moe=True),
    "qwen2_moe_fine_grained": dict(
        use_moe=True,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=False,
    ),
    "qwen3_moe": dict(use_moe=True, qk_norm=True, n_shared_experts=0),
    "mixtral": dict(use_moe=True, n_shared_experts=0, n_routed_experts=5),
    "glm4_moe": dict(use_moe=True, scoring_func="sigmoid", n_shared_experts=2),
    "glm4_moe_qk_norm": dict(use_moe=True, scoring_func="sigmoid", qk_norm=True),
}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS)
def pair(request, make_model):
    """A model and the model of transformers that has the same weights."""
    own = make_model(**request.param)
    for name, weight in own.named_parameters():  # ones would hide where the norms act
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    for name, bias in own.named_buffers():  # and zeros that a bias of experts counts
        if name.endswith(ROUTER_BIAS):
            torch.nn.init.uniform_(bias, -0.2, 0.2)
    return own, peer_with_weights(own).eval()


def real(inputs, logits):
    """The logits at positions that are no padding; what padding predicts does not matter."""
    mask = inputs.get("attention_mask")
    return logits if mask is None else logits[mask.bool()]


# -- against transformers --------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@torch.no_grad()
def test_logits_equal_transformers(pair, ids, inputs):
    own, peer = (model(ids, use_cache=False, **inputs).logits for model in pair)
    assert_close(real(inputs, own), real(inputs, peer), atol=2e-5, rtol=1e-5)


def test_loss_and_gradients_equal_transformers(pair, ids):
    labels = ids.clone()
    labels[0, :5] = IGNORE_INDEX
    own, peer = pair
    losses = [model(ids, labels=labels).loss for model in pair]
    assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    expected = dict(peer.named_parameters())
    for name, weight in own.named_parameters():
        if name in expected and "shared_expert" not in name:  # the others are in larger tensors
            assert_close(weight.grad, expected[name].grad, atol=1e-5, rtol=1e-4, msg=name)
    for n, layer in enumerate(own.model.layers if own.config.use_moe else ()):
        theirs = peer.model.layers[n].mlp.experts
        for e, expert in enumerate(layer.mlp.experts):
            gate_and_up = torch.cat([expert.gate_proj.weight.grad, expert.up_proj.weight.grad])
            assert_close(gate_and_up, theirs.gate_up_proj.grad[e], atol=1e-5, rtol=1e-4)
            down = expert.down_proj.weight.grad
            assert_close(down, theirs.down_proj.grad[e], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_equal_transformers(pair, ids):
    own, peer = (model(ids, output_hidden_states=True).hidden_states for model in pair)
    assert len(own) == 3  # the embedding and two layers, the last one normalised
    assert_close(own, peer, atol=2e-5, rtol=1e-5)


# -- cache, padding, packing: other ways to the same logits ----------------------------------------


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=20),
}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["causal", "left_padding"])
@torch.no_grad()
def test_chunks_through_a_cache_equal_one_forward(make_model, ids, cache, padded):
    model = make_model(qk_norm=True)
    inputs = INPUTS["left_padding"] if padded else {}
    whole = model(ids, use_cache=False, **inputs).logits
    cache = CACHES[cache](model.config)
    logits, start = [], 0
    for size in (5, 1, 4, 2):
        end = start + size
        part = dict(attention_mask=LEFT[:, :end]) if padded else {}
        if padded:
            part["position_ids"] = LEFT_POSITIONS[:, start:end]
        logits.append(model(ids[:, start:end], past_key_values=cache, **part).logits)
        start = end
    assert_close(real(inputs, torch.cat(logits, 1)), real(inputs, whole), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_cache_is_returned_and_continues(make_model, ids):
    model = make_model()
    past = model(ids[:, :7], use_cache=True).past_key_values
    logits = model(ids[:, 7:], past_key_values=past).logits
    assert_close(logits, model(ids).logits[:, 7:], atol=2e-5, rtol=1e-5)
    assert model(ids, use_cache=False).past_key_values is None


@torch.no_grad()
def test_left_padded_row_equals_the_row_alone(make_model, ids):
    model = make_model()
    alone = model(ids[1:, 3:]).logits[0]
    assert_close(model(ids, **INPUTS["left_padding"]).logits[1, 3:], alone, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_documents_equal_the_documents_alone(make_model, ids):
    model = make_model()
    packed = model(ids, position_ids=PACKED).logits[0]
    alone = [model(document[None]).logits[0] for document in ids[0].split([4, 3, 5])]
    assert_close(packed, torch.cat(alone), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("flash_attn", [True, False])
@torch.no_grad()
def test_changing_one_document_leaves_the_others_bit_equal(make_model, ids, flash_attn):
    model = make_model(flash_attn=flash_attn)
    changed = ids.clone()
    changed[0, 4:7] = (ids[0, 4:7] + 1) % 128  # the middle one of three
    before, after = (model(x, position_ids=PACKED).logits[0] for x in (ids, changed))
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[7:], after[7:])
    assert not torch.equal(before[4:7], after[4:7])


@torch.no_grad()
def test_packing_holds_beside_an_attention_mask(make_model, ids):
    model = make_model()
    masked = model(ids, position_ids=PACKED, attention_mask=RIGHT).logits
    packed = model(ids, position_ids=PACKED).logits
    assert_close(masked[RIGHT.bool()], packed[RIGHT.bool()], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_future_is_hidden(make_model, ids):
    changed = ids.clone()
    changed[:, 8:] = 5
    model = make_model()
    assert torch.equal(model(ids).logits[:, :8], model(changed).logits[:, :8])


# -- arguments of forward --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, [11]), (3, [9, 10, 11]), (torch.tensor([0, 5]), [0, 5])]
)
@torch.no_grad()
def test_logits_to_keep(make_model, ids, keep, kept):
    model = make_model()
    assert_close(model(ids, logits_to_keep=keep).logits, model(ids).logits[:, kept])


@torch.no_grad()
def test_inputs_embeds_take_the_place_of_ids(make_model, ids):
    model = make_model()
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)


@torch.no_grad()
def test_scores_are_a_linear_function_of_the_last_hidden_states(make_model, ids):
    model = make_model()
    scorer = MiniMindForScoring(model.config).eval()
    scorer.model.load_state_dict(model.model.state_dict())
    hidden = model(ids, output_hidden_states=True, position_ids=PACKED).hidden_states[-1]
    scores = scorer(ids, position_ids=PACKED).scores
    assert_close(scores, (hidden * scorer.score.weight).sum(-1))


@pytest.mark.parametrize(
    "use_cache",
    [
        None,
        True,
    ],
)
def test_gradient_checkpointing_changes_nothing(make_model, ids, use_cache):
    results = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            new = getattr(model, "activation_checkpointing_enable", None)  # since 5.23
            (new or model.gradient_checkpointing_enable)()
        loss = model(ids, labels=ids, position_ids=PACKED, use_cache=use_cache).loss
        loss.backward()
        results.append([loss, *(weight.grad for weight in model.parameters())])
    assert_close(*results)


def test_dropout_acts_in_training_only(make_model, ids):
    model = make_model(dropout=0.5)
    assert torch.equal(model(ids).logits, make_model()(ids).logits)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)


# -- sizes, names, files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "millions"),
    [({}, 25.83), (dict(hidden_size=768, num_hidden_layers=16), 104.03)],
    ids=["small", "base"],
)
def test_parameter_counts_of_the_named_sizes(fields, millions):
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(**fields))
    assert round(model.num_parameters() / 1e6, 2) == millions


@pytest.mark.parametrize("qk_norm", [False, True])
def test_state_dict_names(make_model, qk_norm):
    layer = "input_layernorm post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
    layer += " self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
    if qk_norm:
        layer += " self_attn.q_norm self_attn.k_norm"
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    names |= {f"model.layers.{n}.{part}.weight" for n in range(2) for part in layer.split()}
    assert set(make_model(qk_norm=qk_norm).state_dict()) == names


def test_embedding_and_head_are_one_unless_told_otherwise(make_model):
    tied, untied = make_model(), make_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("fields", [{}, dict(qk_norm=True), dict(tie_word_embeddings=False)])
@torch.no_grad()
def test_saved_and_loaded_by_transformers_gives_equal_logits(make_model, ids, tmp_path, fields):
    model = make_model(**fields)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MiniMindForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_bfloat16_is_near_float32(make_model, ids):
    model = make_model()
    expected = model(ids, labels=ids).loss
    outputs = model.to(torch.bfloat16)(ids, labels=ids)
    assert outputs.logits.dtype == torch.bfloat16
    assert_close(outputs.loss.float(), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "fields",
    [
        dict(hidden_size=66),
        dict(num_key_value_heads=3),
        dict(hidden_size=12),
        dict(num_attention_heads=0),
        dict(num_key_value_heads=0),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(fields):
    with pytest.raises(ValueError, match="hidden_size|num_|head"):
        MiniMindConfig(**{**dict(hidden_size=64, num_attention_heads=4), **fields})


# -- initial weights -------------------------------------------------------------------------------


def test_intermediate_size_is_a_multiple_of_64():
    assert MiniMindConfig().intermediate_size == 1408  # 512 · 8/3 = 1365.3 = 21.3 · 64
    assert MiniMindConfig(hidden_size=768).intermediate_size == 2048  # exactly 32 · 64


def test_initial_weights():
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=256, num_hidden_layers=8, vocab_size=1000)
    model = MiniMindForCausalLM(config)
    layer = model.model.layers[3]
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):  # 0.02 / √16
        assert linear.weight.std().item() == pytest.approx(0.005, rel=0.02)
    for weight in (layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight, model.lm_head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (layer.input_layernorm.weight == 1).all()

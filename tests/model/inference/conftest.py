"""Models that several test files decode with."""

import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture(params=["own", "llama"])
def either(request, model):
    """The model, and one of transformers with the same weights, which has a cache of its own."""
    if request.param == "own":
        return model
    config = model.config
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
        )
    )
    peer.load_state_dict(model.state_dict(), strict=True)
    return peer.eval()

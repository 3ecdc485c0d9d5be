"""lm_eval's local-completions: log-likelihoods by /v1/completions, against the model itself."""

import pytest
import torch

from model.weights import TOKENIZER

PAIRS = [("The capital of France is", " Paris."), ("你好，", "我是 MiniMind。"), ("1 + 1 =", " 2")]


def log_likelihoods(url, tokenizer, pairs):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{url}/completions",
        model="minimind",
        tokenizer=tokenizer,
        tokenizer_backend="huggingface",
        num_concurrent=1,
        max_length=512,
    )
    requests = [Instance("loglikelihood", {}, tuple(pair), n) for n, pair in enumerate(pairs)]
    tokens = [
        [
            model.tok_encode(pair[0]),
            model.tok_encode("".join(pair))[len(model.tok_encode(pair[0])) :],
        ]
        for pair in pairs
    ]
    return [tokens, model.loglikelihood(requests)]


def test_log_likelihoods_are_the_models_own(engine, server):
    tokens, told = engine.call(log_likelihoods, server.url, str(TOKENIZER), PAIRS)
    for (context, continuation), (total, is_greedy) in zip(tokens, told, strict=True):
        with torch.no_grad():
            logits = server.model(torch.tensor([context + continuation])).logits[0]
        logprobs = logits.log_softmax(-1)[len(context) - 1 : -1]
        own = logprobs[range(len(continuation)), continuation].sum().item()
        assert total == pytest.approx(own, abs=1e-3)
        assert is_greedy == (logprobs.argmax(-1).tolist() == continuation)

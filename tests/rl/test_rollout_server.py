"""Completions from a server: what is sent to it, what comes back, and what ends in one sentence."""

import pytest

from model.errors import UserError
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.rl import rollout_server
from trainer.rl.arguments import RolloutArgs
from trainer.rl.prompts import GenerationRequest


def test_a_server_writes_completions(server, tokenizer, tmp_path, monkeypatch):
    """Weights are handed over, prompts go as ids, and what comes back are its tokens."""
    monkeypatch.setattr(rollout_server, "FIRST_DELAY", 0.01)
    failures = iter([503, 503])

    def answer(path, body):
        if path == "/collective_rpc":
            return 200, {}
        if path.startswith("/reset_prefix_cache"):
            return 200, {"success": True}
        if path == "/v1/models":
            return 200, {"data": [{"id": "/data/policy"}]}
        if status := next(failures, None):
            return status, {"error": "busy"}
        choice = {"text": "ok", "finish_reason": "stop" if body["prompt"] == [5] else "length"}
        if body["prompt"] == [7]:
            choice["token_ids"] = [40, 41, 2]
        return 200, {"choices": [choice]}

    url, asked = server(answer)
    args = RolloutArgs(
        rollout_url=url, rollout_folder=str(tmp_path / "policy"), max_gen_len=9, temperature=0.7
    )
    config = MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    rollout_server.send_weights(args, MiniMindForCausalLM(config), tokenizer)
    reload = ("/collective_rpc", {"method": "reload_weights"})
    assert asked == [reload, ("/reset_prefix_cache?reset_running_requests=true", {})]
    assert (tmp_path / "policy" / "model.safetensors").exists()

    requests = [GenerationRequest([n], seed=11, sample=3) for n in (5, 6, 7)]
    ok = tokenizer("ok", add_special_tokens=False)["input_ids"]
    tokens = rollout_server.generate_on_server(args, tokenizer, requests)
    assert tokens == [[*ok, tokenizer.eos_token_id], ok, [40, 41, 2]]
    path, body = asked[-1]
    assert path == "/v1/completions" and body["seed"] == 14 and body["temperature"] == 0.7
    assert body["model"] == "/data/policy"  # as the server calls it
    assert len(asked) == 2 + 1 + 2 + 3


@pytest.mark.parametrize("status", [None, 404])
def test_a_server_that_does_not_answer_ends_with_one_sentence(
    server, status, monkeypatch, closed_port
):
    monkeypatch.setattr(rollout_server, "FIRST_DELAY", 0.01)
    url, asked = server(lambda path, body: (404, {"error": "no such model"}))
    url = url if status else f"http://127.0.0.1:{closed_port}/v1"
    with pytest.raises(UserError, match="resume goes on from the last checkpoint"):
        rollout_server.ask(url, {})
    assert len(asked) == (1 if status else 0)


@pytest.mark.parametrize(
    ("reload", "answer", "said"),
    [
        ("vllm", (404, {"detail": "Not Found"}), "started with VLLM_SERVER_DEV_MODE=1"),
        ("vllm", (200, {"success": False}), "did not take the weights"),
        ("sglang", (404, {}), "weights_from_disk: 404: {}; --resume"),
    ],
)
def test_weights_that_are_not_taken_end_the_training(
    server, make_model, tokenizer, tmp_path, reload, answer, said
):
    url, asked = server(lambda path, body: answer)
    folder = str(tmp_path / "policy")
    args = RolloutArgs(rollout_url=url, rollout_folder=folder, rollout_reload=reload)
    with pytest.raises(UserError, match=said):
        rollout_server.send_weights(args, make_model(), tokenizer)
    if reload == "sglang":
        assert asked == [("/update_weights_from_disk", {"model_path": folder})]

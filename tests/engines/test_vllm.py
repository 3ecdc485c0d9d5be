"""vLLM on a CPU: folders of to-hf, and rollouts of reinforcement learning."""

import json

import httpx
import pytest
import torch
from greedy import (
    CONVERSATIONS,
    NEW_TOKENS,
    PAIRS,
    REPLY,
    THOUGHT,
    as_openai,
    greedy_tokens,
    learn_conversations,
    prompts,
    random_model,
)

from model.formats.hf_format import save_hf_folder
from trainer.rl.arguments import RolloutArgs
from trainer.rl.prompts import GenerationRequest
from trainer.rl.rollout_server import generate_on_server, send_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
SETTINGS = dict(
    dtype="float32",
    enforce_eager=True,  # no compilation, which takes a minute
    max_model_len=512,
    gpu_memory_utilization=0.1,  # of the CPU's memory, here
    kv_cache_memory_bytes=200_000_000,
)
FLAGS = [
    word
    for name, value in SETTINGS.items()
    for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
]
SERVER = ("-m", "vllm.entrypoints.openai.api_server", "--port", "{port}", *FLAGS, "--model")

GREEDY = """
import gc, json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    asked, settings, new_tokens, folders = json.load(open(sys.argv[1]))
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    for folder in folders:
        llm = LLM(folder, **settings)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], sampling)
        tokens = [list(each.outputs[0].token_ids) for each in outputs]
        json.dump(tokens, open(folder + "/tokens.json", "w"))
        del llm
        gc.collect()
"""


@pytest.fixture(scope="module")
def folders(engine, tokenizer, tmp_path_factory):
    """A folder of each kind, with the tokens that vLLM makes of it in tokens.json."""
    place = tmp_path_factory.mktemp("kinds")
    for kind, fields in PAIRS.items():
        save_hf_folder(random_model(**fields), tokenizer, place / kind)
    (place / "greedy.py").write_text(GREEDY)
    job = prompts(), SETTINGS, NEW_TOKENS, [str(place / kind) for kind in PAIRS]
    (place / "job.json").write_text(json.dumps(job))
    engine.run(engine.python, place / "greedy.py", place / "job.json", timeout=2500)
    return place


@pytest.mark.parametrize("kind", PAIRS)
def test_greedy_tokens_are_equal(folders, kind):
    theirs = json.loads((folders / kind / "tokens.json").read_text())
    ours = greedy_tokens(random_model(**PAIRS[kind]), prompts())
    assert theirs == ours
    assert len({tuple(tokens) for tokens in ours}) == len(ours)  # it says different things


def test_calls_and_thoughts_are_found(engine, tokenizer, tmp_path):
    """By the server's own parsers, in what a model of ours says."""
    save_hf_folder(learn_conversations(tokenizer), tokenizer, tmp_path / "model")
    parsers = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    parsers += ["--reasoning-parser", "qwen3", "--served-model-name", "minimind"]
    words = (engine.python, *SERVER, tmp_path / "model", *parsers)
    replies = []
    with engine.serve(*words, log=tmp_path / "log") as root:
        for messages, tools in CONVERSATIONS:
            asked = as_openai(messages[:-1])
            body = {"model": "minimind", "messages": asked, "temperature": 0}
            # with a tool the model answers at once: its parser takes all for a thought otherwise
            at_once = {"chat_template_kwargs": {"enable_thinking": False}}
            body |= {"tools": tools, **at_once} if tools else {}
            response = httpx.post(f"{root}/v1/chat/completions", json=body, timeout=300)
            assert response.status_code == 200, response.text
            replies.append(response.json()["choices"][0])
    called, told, thought = (reply["message"] for reply in replies)
    (call,) = called["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "weather",
        {"city": "Paris"},
    )
    assert replies[0]["finish_reason"] == "tool_calls"
    assert told["content"].strip() == "It has 12 degrees."
    assert thought["content"].strip() == REPLY
    assert (thought.get("reasoning") or thought["reasoning_content"]).strip() == THOUGHT


@torch.no_grad()
def test_rollouts_are_by_the_new_weights(engine, tokenizer, tmp_path):
    """Also where prompts share what the server remembers. A head of its own: builds for CPUs keep
    the old weights of a tied one (docs/rl.md)."""
    fields = dict(tie_word_embeddings=False)
    folder = tmp_path / "policy"
    save_hf_folder(random_model(**fields), tokenizer, folder)
    (shared,), ends = prompts(1, 400), prompts(8, 9)
    shared = (shared * 200)[:200]  # longer than a block of the server's cache
    requests = [GenerationRequest([*shared, *ids], 1, n) for n, ids in enumerate(ends)]
    words = (engine.python, *SERVER, folder)
    with engine.serve(*words, log=tmp_path / "log", VLLM_SERVER_DEV_MODE="1") as root:
        args = RolloutArgs(
            rollout_url=f"{root}/v1",
            rollout_folder=str(folder),
            max_gen_len=16,
            temperature=1e-6,
        )
        for seed in (0, 1, 2):
            policy = random_model(seed, **fields)
            if seed:
                send_weights(args, policy, tokenizer)
            for request, tokens in zip(
                requests, generate_on_server(args, tokenizer, requests), strict=True
            ):
                ids = torch.tensor([[*request.ids, *tokens]])
                logits = policy(ids).logits[0, len(request.ids) - 1 : -1]
                given = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
                # the likeliest tokens, up to the rounding of its kernels
                assert (logits.amax(1) - given).max() < 0.05, seed

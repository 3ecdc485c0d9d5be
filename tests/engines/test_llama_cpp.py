"""llama.cpp's own server, in the build of xllamacpp: GGUF files of to-gguf."""

import json

import httpx
import pytest
from greedy import (
    CONVERSATIONS,
    NEW_TOKENS,
    REPLY,
    THOUGHT,
    as_openai,
    greedy_tokens,
    learn_conversations,
    prompts,
    random_model,
)
from test_gguf import KINDS

from model.formats.gguf_format import save_gguf

pytestmark = pytest.mark.slow
SERVER = """
import sys, time
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.yarn_beta_fast, params.yarn_beta_slow = map(float, sys.argv[3:5])
params.n_ctx, params.n_parallel = 1024, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.warmup = False
params.flash_attn_type = 0  # off: it rounds queries to float16
server = xllamacpp.Server(params)
time.sleep(100_000)
"""


@pytest.fixture
def serve(engine, tokenizer, tmp_path):
    """A function that makes a file of a model and serves it, as a context."""
    (tmp_path / "server.py").write_text(SERVER)

    def start(model):
        path = tmp_path / "model.gguf"
        save_gguf(model, tokenizer, path, "float32", "model")
        betas = model.config.yarn_beta_fast, model.config.yarn_beta_slow  # not in the file
        words = (engine.python, tmp_path / "server.py", path, "{port}", *betas)
        return engine.serve(*words, log=tmp_path / "log")

    return start


def post(url, **body):
    response = httpx.post(url, json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_equal(serve, kind):
    model = random_model(**KINDS[kind])
    settings = dict(n_predict=NEW_TOKENS, temperature=0, ignore_eos=True, return_tokens=True)
    with serve(model) as root:
        theirs = [post(f"{root}/completion", prompt=ids, **settings)["tokens"] for ids in prompts()]
    # ignore_eos forbids the tokens that end a turn or a text
    assert theirs == greedy_tokens(model, prompts(), never=[0, 2])


def test_calls_and_thoughts_are_found(serve, tokenizer):
    """By the server's own parsers, in what a model of ours says after the template in its file."""
    replies = []
    with serve(learn_conversations(tokenizer)) as root:
        for messages, tools in CONVERSATIONS:
            body = dict(messages=as_openai(messages[:-1]), temperature=0) | (
                {"tools": tools} if tools else {}
            )
            prompt = post(f"{root}/apply-template", **body)["prompt"]
            settings = dict(add_generation_prompt=True, tokenize=False)
            assert prompt == tokenizer.apply_chat_template(messages[:-1], tools=tools, **settings)
            replies.append(post(f"{root}/v1/chat/completions", **body)["choices"][0])
    called, told, thought = (reply["message"] for reply in replies)
    (call,) = called["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert replies[0]["finish_reason"] == "tool_calls"
    assert told["content"].strip() == "It has 12 degrees."
    assert (thought["reasoning_content"].strip(), thought["content"].strip()) == (THOUGHT, REPLY)

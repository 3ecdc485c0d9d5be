"""Models of others, whose tokenizer, template or configuration lacks what ours has: no 500."""

import json

import httpx
import pytest
from api_requests import CLOCK, json_of
from running_server import running_server
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(**more) -> PreTrainedTokenizerFast:
    """Bytes alone: no special token, no tags."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: n for n, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more)


def gpt2(**more) -> GPT2LMHeadModel:
    """Its vocabulary is larger than the tokenizer's, as Qwen's is."""
    sizes = dict(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=512)
    return GPT2LMHeadModel(
        GPT2Config(**sizes | dict(bos_token_id=None, eos_token_id=None) | more)
    ).eval()


def refusing() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ raise_exception('no system role') if messages[0].role == 'system' }}" + CHATML
    )
    return tokenizer


def templated(**more) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(**more)
    tokenizer.chat_template = CHATML
    return tokenizer


FOLDERS = {
    "nothing but bytes": byte_tokenizer,
    "a template": templated,
    "a template that refuses": refusing,
    "eos": lambda: templated(eos_token="Z"),
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_request_fails_in_the_server(folder):
    tokenizer = FOLDERS[folder]()
    hello = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}]
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    requests = {
        "chat": dict(messages=hello),
        "stream": dict(messages=hello, stream=True, logprobs=True, top_logprobs=3),
        "tools": dict(messages=hello, tools=[CLOCK]),
        "forced": dict(messages=hello[1:], tools=[CLOCK], tool_choice="required", max_tokens=200),
        "json": dict(messages=hello[1:], response_format=json_of(schema), max_tokens=60),
        "calls": dict(
            messages=[
                *hello[1:],
                {"role": "assistant", "tool_calls": [{"function": {"name": "clock"}}]},
                {"role": "tool", "content": "noon"},
            ]
        ),
        "text": dict(prompt="Once", echo=True, logprobs=1),
        "ids": dict(prompt=[1, 2, 319]),
        "response": dict(input="Hi"),
    }
    paths = {"text": "completions", "ids": "completions", "response": "responses"}
    with running_server(gpt2(), tokenizer) as server:
        for name, body in requests.items():
            url = f"{server.url}/v1/{paths.get(name, 'chat/completions')}"
            response = httpx.post(url, json={"max_tokens": 4, **body}, timeout=120)
            known = (200,) if name in ("text", "ids") else (200, 400)  # a text needs no template
            assert response.status_code in known, (name, response.text)
            assert "server failed" not in response.text, name
            if response.status_code == 400:
                message = response.json()["error"]["message"]
                assert len(message) > 20 and "Error" not in message, (name, message)
            elif name == "json":
                json.loads(response.json()["choices"][0]["message"]["content"])
            elif name == "forced":
                call = response.json()["choices"][0]["message"]["tool_calls"][0]["function"]
                assert call["name"] == "clock" and json.loads(call["arguments"])

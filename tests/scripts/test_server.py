"""The server, asked by OpenAI's own client over HTTP."""

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch
import uvicorn

from dataset.lm_dataset import encode_chat, encode_text
from model.inference.generation import generate
from model.inference.sampling import Sampling
from model.weights import ROOT, count_parameters
from scripts.serve_openai_api import Args, make_app
from scripts.serving.chat_model import ChatModel

HELLO = [{"role": "user", "content": "你好, who are you?"}]
GREEDY = dict(model="minimind", messages=HELLO, temperature=0, max_tokens=12)
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"enum": ["UTC", "CET"]}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def json_of(schema: dict) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.fixture(scope="module")
def serve(make_model, tokenizer):
    """A function that starts a server with these arguments in a thread; its address and parts."""
    running = []

    def start(**settings):
        model = make_model(vocab_size=len(tokenizer), max_position_embeddings=512)
        loaded = ChatModel(model, tokenizer, "full_sft", "test", count_parameters(model))
        app = make_app(Args(**settings), loaded)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        service = app.state.service
        return SimpleNamespace(url=f"http://127.0.0.1:{port}", service=service, model=model)

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(serve):
    return serve(max_batch=4, prefill_tokens=16)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def expected(server, tokenizer, messages=HELLO, most=12):
    """What the model says, without any server."""
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True).ids
    tokens = generate(server.model, [ids], Sampling(most, temperature=0))[0]
    return ids, tokens, tokenizer.decode(tokens, skip_special_tokens=True)


def idle(server) -> bool:
    """Whether nothing is left of any request, within a second."""
    for _ in range(100):
        if not server.service.engine.busy and not server.service.thread.listeners:
            return True
        time.sleep(0.01)
    return False


# -- answers ---------------------------------------------------------------------------------------


def test_an_answer(server, client, tokenizer):
    ids, tokens, text = expected(server, tokenizer)
    answer = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert choice.message.content == text
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(tokens) == 12
    with torch.no_grad():
        logits = server.model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    for told, own, token in zip(
        choice.logprobs.content, logits.log_softmax(-1), tokens, strict=True
    ):
        assert told.logprob == pytest.approx(own[token].item(), abs=1e-3)
        assert told.logprob == told.top_logprobs[0].logprob >= told.top_logprobs[1].logprob


def test_a_stream_says_the_same(server, client, tokenizer):
    _, _, text = expected(server, tokenizer)
    chunks = list(
        client.chat.completions.create(
            **GREEDY, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
    )
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons[-1] == "length" and not any(reasons[:-1])
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
    told = [entry for c in chunks[:-1] if (p := c.choices[0].logprobs) for entry in p.content]
    assert len(told) == 12


def test_several_choices_differ_and_a_seed_repeats_them(client):
    settings = GREEDY | dict(temperature=1.5, n=3, seed=7)
    first, second = (
        [c.message.content for c in client.chat.completions.create(**settings).choices]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_said(server, client, tokenizer, stream):
    _, tokens, text = expected(server, tokenizer)
    stop = text[5:8]
    answer = client.chat.completions.create(**GREEDY, stop=[stop, "nowhere"], stream=stream)
    if stream:
        chunks = list(answer)
        said = "".join(c.choices[0].delta.content or "" for c in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        said, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert said == text[: text.index(stop)]
    assert reason == "stop"


def test_completions_of_texts_and_of_tokens(server, client, tokenizer):
    prompts = ["Once upon a time", "从前"]
    ids = [encode_text(tokenizer, prompt).ids[:-1] for prompt in prompts]
    replies = generate(server.model, ids, Sampling(6, temperature=0))
    texts = [tokenizer.decode(reply, skip_special_tokens=True) for reply in replies]
    settings = dict(model="minimind", max_tokens=6, temperature=0)
    for prompt in (prompts, ids):
        answer = client.completions.create(prompt=prompt, **settings, logprobs=1)
        assert [choice.text for choice in answer.choices] == texts
        assert len(answer.choices[0].logprobs.tokens) == 6
    echoed = client.completions.create(prompt=prompts[0], echo=True, **settings)
    assert echoed.choices[0].text == prompts[0] + texts[0]
    streamed = client.completions.create(prompt=prompts, stream=True, **settings)
    said = ["", ""]
    for chunk in streamed:
        said[chunk.choices[0].index] += chunk.choices[0].text
    assert said == texts


def test_a_conversation_with_tools_is_the_templates(server, client, tokenizer):
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "clock", "arguments": '{"zone": "UTC"}'},
    }
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("What ", "time?")]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "12:00"},
    ]  # fmt: skip
    same = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What time?"},
        {"role": "assistant", "content": "", "tool_calls": [call["function"]]},
        {"role": "tool", "content": "12:00"},
    ]  # fmt: skip
    ids = encode_chat(tokenizer, same, add_generation_prompt=True, tools=[CLOCK]).ids
    answer = client.chat.completions.create(**GREEDY | {"messages": messages}, tools=[CLOCK])
    assert answer.usage.prompt_tokens == len(ids)


# -- answers of a certain form ---------------------------------------------------------------------


@pytest.mark.parametrize("most", [20, 40, 200])
@pytest.mark.parametrize("seed", range(3))
def test_json_of_a_schema_is_whole_however_few_tokens_there_are(client, most, seed):
    """From a model with random weights, which would say anything."""
    settings = GREEDY | dict(max_tokens=most, seed=seed, temperature=2)
    answer = client.chat.completions.create(**settings, response_format=json_of(PERSON))
    said = json.loads(answer.choices[0].message.content)
    assert said.keys() == PERSON["properties"].keys()
    assert isinstance(said["age"], int)


def test_any_json_object(client):
    answer = client.chat.completions.create(**GREEDY, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "clock"}}]
)
def test_a_tool_call_can_be_demanded(client, stream, choice):
    answer = client.chat.completions.create(
        **GREEDY | {"max_tokens": 60}, tools=[CLOCK], tool_choice=choice, stream=stream
    )
    if stream:
        chunks = list(answer)
        calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
        reason = chunks[-1].choices[0].finish_reason
    else:
        calls, reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
    assert [call.function.name for call in calls] == ["clock"]
    assert json.loads(calls[0].function.arguments)["zone"] in ("UTC", "CET")
    assert reason == "tool_calls"


def test_thoughts_are_told_apart(server, client, tokenizer):
    answer = client.chat.completions.create(
        **GREEDY, extra_body={"chat_template_kwargs": {"open_thinking": True}}
    )
    ids = encode_chat(tokenizer, HELLO, add_generation_prompt=True, open_thinking=True).ids
    reply = generate(server.model, [ids], Sampling(12, temperature=0))[0]
    message = answer.choices[0].message
    assert answer.usage.prompt_tokens == len(ids)
    assert message.content == ""  # it never stops thinking
    assert message.reasoning_content == tokenizer.decode(reply, skip_special_tokens=True).strip(
        "\n"
    )


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("default", [False, True])
def test_thinking_is_switched_by_the_server_or_the_request(serve, tokenizer, default, asked):
    server = serve(max_batch=1, open_thinking=default)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    given = {} if asked is None else {"chat_template_kwargs": {"open_thinking": asked}}
    settings = dict(**GREEDY, extra_body=given)
    thinks = default if asked is None else asked
    ids = encode_chat(tokenizer, HELLO, add_generation_prompt=True, open_thinking=thinks).ids
    reply = generate(server.model, [ids], Sampling(12, temperature=0))[0]
    text = tokenizer.decode(reply, skip_special_tokens=True).strip("\n")
    answer = client.chat.completions.create(**settings)
    assert answer.usage.prompt_tokens == len(ids)
    deltas = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(**settings, stream=True)
    ]
    streamed = {
        "content": "".join(delta.content or "" for delta in deltas),
        "reasoning_content": "".join(getattr(d, "reasoning_content", None) or "" for d in deltas),
    }
    whole = {name: getattr(answer.choices[0].message, name, "") for name in streamed}
    expected = {"content": "" if thinks else text, "reasoning_content": text if thinks else ""}
    assert whole == streamed == expected


# -- mistakes --------------------------------------------------------------------------------------

WRONG = {
    "model": (dict(model="gpt"), 404, "no model 'gpt'"),
    "no_messages": (dict(messages=[]), 400, "messages"),
    "role": (dict(messages=[{"role": "king", "content": ""}]), 400, "messages.0.role"),
    "no_content": (dict(messages=[{"role": "user"}]), 400, "needs content"),
    "temperature": (dict(temperature=3), 400, "temperature"),
    "unknown": (dict(extra_body={"colour": "red"}), 400, "colour"),
    "too_long": (dict(messages=[{"role": "user", "content": "one " * 999}]), 400, "512"),
    "no_tools": (dict(tool_choice="required"), 400, "tool_choice needs tools"),
    "other_tool": (
        dict(tools=[CLOCK], tool_choice={"type": "function", "function": {"name": "map"}}),
        400,
        "no tool 'map'",
    ),
    "schema": (
        dict(response_format=json_of({"type": "soup"})),
        400,
        "schema",
    ),
    "no_room": (
        dict(max_tokens=3, response_format=json_of(PERSON)),
        400,
        "no reply of 3 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("settings", "status", "words"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_told_as_openai_does(client, settings, status, words, stream):
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(**{**GREEDY, **settings}, stream=stream)
    assert error.value.status_code == status
    assert words in error.value.body["message"]
    assert error.value.body.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/nowhere", None, 404),
        ("GET", "/v1/chat/completions", None, 405),
        ("POST", "/v1/chat/completions", b"{not json", 400),
        ("POST", "/v1/completions", b'{"model": "minimind", "prompt": []}', 400),
        ("POST", "/v1/completions", b'{"model": "minimind", "prompt": [99999]}', 400),
        ("GET", "/v1/models/gpt", None, 404),
    ],
)
def test_what_is_no_request_gets_an_error_object(server, method, path, body, status):
    headers = {"content-type": "application/json"}
    response = httpx.request(method, server.url + path, content=body, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_key_is_asked_for_except_for_health(serve):
    server = serve(api_key="secret")
    for key, status in (("wrong", 401), ("secret", 200)):
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status
    assert httpx.get(f"{server.url}/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_full_queue_is_told(serve):
    server = serve(max_batch=1, max_queue=0)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    running = client.chat.completions.create(**GREEDY | {"max_tokens": 400}, stream=True)
    next(iter(running))
    with pytest.raises(openai.RateLimitError, match="waiting already"):
        client.chat.completions.create(**GREEDY)
    running.close()
    assert idle(server)
    assert client.chat.completions.create(**GREEDY).choices


def test_a_failing_model_is_a_500_and_not_the_end(server, client, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(server.model.model, "forward", fail)
        with pytest.raises(openai.InternalServerError) as error:
            client.chat.completions.create(**GREEDY)
    assert "a bug" not in str(error.value)
    assert idle(server)
    assert client.chat.completions.create(**GREEDY).choices


# -- many at a time --------------------------------------------------------------------------------


async def many_streams(server, count: int) -> dict[int, str]:
    """Streams at the same time, a third of which are given up; what the others said."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    draw, said = random.Random(0), {}

    async def one(n: int) -> None:
        messages = [{"role": "user", "content": f"number {n}"}]
        stream = await client.chat.completions.create(
            **GREEDY | {"messages": messages, "max_tokens": 10 + n % 7}, stream=True
        )
        text, patience = "", draw.randint(1, 6) if n % 3 == 0 else 99
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            patience -= 1
            if not patience:
                await stream.close()
                return
        said[n] = text

    await asyncio.gather(*map(one, range(count)))
    await client.close()
    return said


def test_64_streams_of_which_some_are_given_up(server, tokenizer):
    said = asyncio.run(many_streams(server, 64))
    assert 42 <= len(said) < 64
    for n, text in said.items():
        messages = [{"role": "user", "content": f"number {n}"}]
        assert text == expected(server, tokenizer, messages, 10 + n % 7)[2]
    assert idle(server)
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'minimind_requests_total{outcome="cancelled"}' in metrics
    assert "minimind_running 0.0" in metrics and "minimind_waiting 0.0" in metrics


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(server, stream):
    body = GREEDY | {"max_tokens": 400, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        with httpx.Client(timeout=0.3) as client:
            client.post(f"{server.url}/v1/chat/completions", json=body)
            raise httpx.ReadTimeout("a stream")
    assert idle(server)


@pytest.mark.slow
def test_whatever_its_description_allows_is_answered_as_that_says(server, tmp_path):
    """schemathesis makes requests, right and wrong ones, out of the server's own OpenAPI page."""
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--checks", checks, "--max-examples", "25", "--seed", "1", "--no-color"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-500:]
    assert idle(server)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_the_client_in_the_terminal(server, tokenizer, stream):
    flags = ["--max_tokens", "12", "--temperature", "0", "--historys", "0", "--stream", str(stream)]
    said = {}
    for url in (f"{server.url}/v1", "http://127.0.0.1:9/v1"):
        said[url] = subprocess.run(
            [sys.executable, ROOT / "scripts" / "chat_openai_api.py", "--base_url", url, *flags],
            input=f"{HELLO[0]['content']}\n/clear\n/quit\nnever asked\n",
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )
    answered, alone = said.values()
    assert answered.returncode == 0, answered.stderr
    assert expected(server, tokenizer)[2] in answered.stdout
    assert "never asked" not in answered.stdout
    assert alone.returncode == 2 and "error: no server answers" in alone.stderr

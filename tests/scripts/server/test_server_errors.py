"""Invalid requests, the API key, a full queue and a failing model."""

import socket

import httpx
import openai
import pytest
from api_requests import CLOCK, GREEDY, HELLO, PERSON, idle, json_of

from model.errors import UserError
from scripts.serve_openai_api import bind

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
    "too_few_tokens": (
        dict(max_tokens=3, response_format=json_of(PERSON)),
        400,
        "no reply of 3 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("settings", "status", "words"), WRONG.values(), ids=WRONG)
def test_invalid_requests_get_openais_error_object(client, settings, status, words, stream):
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
def test_invalid_http_requests_get_an_error_object(server, method, path, body, status):
    headers = {"content-type": "application/json"}
    response = httpx.request(method, server.url + path, content=body, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_all_endpoints_but_health_need_the_api_key(serve):
    server = serve(api_key="secret")
    for key, status in (("wrong", 401), ("secret", 200)):
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status
    assert httpx.get(f"{server.url}/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_the_key_is_asked_for_before_all_else(serve):
    server = serve(api_key="秘密")
    key = {"authorization": "Bearer 秘密".encode()}
    for path in ("/metrics", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"):
        assert httpx.get(server.url + path).status_code == 401
        assert httpx.get(server.url + path, headers=key).status_code == 200
    for body in (b"{not json", b"{}", b"[" * 10_000):
        headers = {"content-type": "application/json"}
        url = f"{server.url}/v1/chat/completions"
        assert httpx.post(url, content=body, headers=headers).status_code == 401
        assert httpx.post(url, content=body, headers=headers | key).status_code == 400


def test_where_the_server_cannot_listen():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .*in use"):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match="--host nowhere.invalid"):
        bind("nowhere.invalid", 0)
    for each in bind("localhost", 0):
        each.close()


def test_a_full_queue_is_a_rate_limit_error(serve):
    server = serve(max_batch=1, max_queue=0)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    running = client.chat.completions.create(**GREEDY | {"max_tokens": 400}, stream=True)
    next(iter(running))
    with pytest.raises(openai.RateLimitError, match="waiting already"):
        client.chat.completions.create(**GREEDY)
    running.close()
    assert idle(server)
    assert client.chat.completions.create(**GREEDY).choices


def test_a_failing_model_is_a_500_and_the_server_goes_on(server, client, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(server.model.model, "forward", fail)
        with pytest.raises(openai.InternalServerError) as error:
            client.chat.completions.create(**GREEDY)
    assert "a bug" not in str(error.value)
    assert idle(server)
    assert client.chat.completions.create(**GREEDY).choices


@pytest.mark.parametrize(
    ("path", "body", "field", "said"),
    [
        ("chat/completions", dict(foo=1), "foo", "there is no such field here"),
        ("chat/completions", dict(stop=[1]), "stop.0", "it must be a text"),
        ("chat/completions", dict(tool_choice={"type": "x"}), "tool_choice.type", "'function'"),
        ("chat/completions", dict(messages=[{"role": "user"}]), "messages.0", "needs content"),
        ("completions", dict(prompt=[["a"]]), "prompt.0.0", "integer"),
    ],
)
def test_a_mistake_is_named_as_the_client_wrote_it(server, path, body, field, said):
    """By its fields, without the names of our types."""
    body = {"model": "minimind", "messages": HELLO} | body if "chat" in path else body
    response = httpx.post(f"{server.url}/v1/{path}", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == field
    assert error["message"].startswith(f"{field}: ") and said in error["message"]
    assert "Value error" not in error["message"]

"""What clients send beside OpenAI's documented form; and --strict_requests, which refuses it."""

import httpx
import pytest
from api_requests import CLOCK, expected

U = {"role": "user", "content": "Hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "noon"}


def calling(**function):
    call = {**CALL, "function": {"name": "clock", **function}}
    return [U, {"role": "assistant", "content": "", "tool_calls": [call]}, RESULT]


# name: what is sent more, and the same in the documented form
SAME = {
    "null fields": (
        dict.fromkeys(
            ("stop", "seed", "n", "logit_bias", "tools", "tool_choice", "response_format", "user")
            + ("stream_options", "logprobs", "metadata", "functions", "audio", "min_p", "best_of")
        ),
        {},
    ),
    "neutral values": (
        dict(min_p=0, top_k=-1, stop="", modalities=["text"], logit_bias={}, best_of=1)
        | dict(suffix="", ignore_eos=False, skip_special_tokens=True, typical_p=1.0),
        dict(top_k=0),
    ),
    "no effect": (
        dict(user=7, metadata={"chat": 3}, store=False, service_tier="auto", keep_alive="5m")
        | dict(options={"num_ctx": 2048}, prediction={"type": "content", "content": "x"})
        | dict(parallel_tool_calls=False, prompt_cache_key="k", verbosity="low"),
        {},
    ),
    "stop []": (dict(stop=[]), {}),
    "top_p 0": (dict(top_p=0, temperature=1), dict(temperature=0)),
    "no model": (dict(model=None), {}),
    "vendor and tag": (dict(model="vendor/minimind:latest"), {}),
    "tools []": (dict(tools=[], tool_choice="auto"), {}),
    "thinking at the top": (
        dict(open_thinking=True),
        dict(chat_template_kwargs={"open_thinking": True}),
    ),
    "thinking by Qwen's name": (
        dict(enable_thinking=True),
        dict(chat_template_kwargs={"open_thinking": True}),
    ),
    "no effort": (dict(reasoning_effort="none"), {}),
    "a template's own variable": (dict(chat_template_kwargs={"budget": 0}), {}),
    "parts": (
        dict(messages=[{"role": "user", "content": [{"type": "text", "text": "H"}, "i"]}]),
        dict(messages=[U]),
    ),
    "an empty reply sent back": (
        dict(messages=[U, {"role": "assistant", "content": None, "tool_calls": []}, U]),
        dict(messages=[U, {"role": "assistant", "content": ""}, U]),
    ),
    "no result": (
        dict(messages=[*calling(arguments="{}")[:2], {**RESULT, "content": None}]),
        dict(messages=[*calling(arguments="{}")[:2], {**RESULT, "content": ""}]),
    ),
    "arguments as an object": (
        dict(messages=calling(arguments={"zone": "UTC"})),
        dict(messages=calling(arguments='{"zone": "UTC"}')),
    ),
    "arguments empty": (
        dict(messages=calling(arguments="")),
        dict(messages=calling(arguments="{}")),
    ),
    "role function": (
        dict(messages=[U, {"role": "function", "name": "clock", "content": "noon"}]),
        dict(messages=[U, {"role": "tool", "content": "noon"}]),
    ),
    "tools without parameters": (
        dict(tools=[{"function": {"name": "clock", "parameters": None}, "cache_control": {}}]),
        dict(tools=[{"type": "function", "function": {"name": "clock"}}]),
    ),
    "the tools that are allowed": (
        dict(
            tools=[CLOCK, {"type": "function", "function": {"name": "map"}}],
            tool_choice={
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "name": "clock"}]},
            },
        ),
        dict(tools=[CLOCK]),
    ),
}  # fmt: skip
REFUSED = {
    "an image": (
        dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "reads text only, and not image_url",
    ),
    "sound": (dict(modalities=["text", "audio"]), "modalities is not supported here"),
    "functions": (dict(functions=[{"name": "f"}]), "send tools and tool_choice instead"),
    "a search": (dict(web_search_options={}), "web_search_options"),
    "beams": (dict(best_of=3), "best_of is not supported here; leave it out, or send 1"),
    "a tool of another kind": (dict(tools=[{"type": "mcp"}]), "type 'mcp'"),
    "a reserved variable": (dict(chat_template_kwargs={"messages": []}), "messages"),
    "bias of no token": (dict(logit_bias={"99999": 1}), "logit_bias must be from 0 to"),
    "a typo": (dict(temprature=1), "temprature"),
    "parts that are none": (dict(messages=[{"role": "user", "content": [[]]}]), "content"),
    "a choice that is none": (dict(tools=[3], tool_choice={"type": "function"}), "tool"),
}


def ask(server, path="chat/completions", **body):
    body = {"model": "minimind", "messages": [U], "max_tokens": 6, "temperature": 0} | body
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)


def reply(response) -> dict:
    assert response.status_code == 200, response.text
    body = response.json()
    for call in body["choices"][0]["message"].get("tool_calls", ()):
        del call["id"]
    return {"choices": body["choices"], "usage": body["usage"]}


@pytest.mark.parametrize(("sent", "documented"), SAME.values(), ids=SAME)
def test_what_clients_send_is_taken_as_the_documented_form(server, sent, documented):
    assert reply(ask(server, **sent)) == reply(ask(server, **documented))


@pytest.mark.parametrize(("sent", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_in_the_servers_words(server, sent, words):
    response = ask(server, **sent)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_strict_requests(serve):
    server = serve(strict_requests=True)
    for name in ("neutral values", "an empty reply sent back", "vendor and tag", "no model"):
        assert ask(server, **SAME[name][0]).status_code in (400, 404)
    assert ask(server).status_code == 200


@pytest.mark.parametrize("strict", [False, True])
def test_half_an_emoji_is_replaced_wherever_it_stands(serve, strict):
    """As JSON escapes it: the half of a surrogate pair is no text that UTF-8 could hold."""
    server = serve(strict_requests=strict)
    half, url = r'"\ud83d"', f"{server.url}/v1"
    tool = f'{{"type": "function", "function": {{"name": "f", "description": {half}}}}}'
    message = '{{"role": "user", "content": {}}}'
    chat = f'{{{{"model": "minimind", "messages": [{message}], "max_tokens": 2{{}}}}}}'
    bodies = [
        ("chat/completions", chat.format(half, "")),
        ("chat/completions", chat.format('"a"', f', "stop": {half}')),
        ("chat/completions", chat.format('"a"', f', "tools": [{tool}]')),
        ("completions", f'{{"model": "minimind", "prompt": {half}, "echo": true}}'),
        ("responses", f'{{"model": "minimind", "input": {half}, "instructions": {half}}}'),
    ]  # fmt: skip
    for path, body in bodies:
        headers = {"content-type": "application/json"}
        response = httpx.post(f"{url}/{path}", content=body, headers=headers, timeout=60)
        assert response.status_code == 200, (path, response.text)
    whole = chat.format(r'"\ud83d\ude00"', "")
    sent = httpx.post(f"{url}/chat/completions", content=whole, headers=headers).json()
    same = ask(server, messages=[{"role": "user", "content": "😀"}], max_tokens=2).json()
    assert sent["usage"] == same["usage"]


def test_a_bias_forces_or_forbids_a_token(server, tokenizer):
    token = expected(server, tokenizer, [U])[1][0]
    forced = reply(ask(server, logit_bias={"300": 100}, max_tokens=2, logprobs=True))
    told = [each["bytes"] for each in forced["choices"][0]["logprobs"]["content"]]
    assert told[0] == told[1] == list(tokenizer.decode([300]).encode())
    without = reply(ask(server, logit_bias={str(token): -100}, max_tokens=1, logprobs=True))
    first = without["choices"][0]["logprobs"]["content"][0]
    assert first["bytes"] != list(tokenizer.decode([token]).encode())


def test_api_keys_as_clients_send_them(serve):
    server = serve(api_key="secret")
    for headers in (
        {"authorization": "Bearer secret"},
        {"authorization": "bearer  secret"},
        {"api-key": "secret"},
        {"x-api-key": "secret"},
    ):
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    without_scheme = {"authorization": "secret"}
    for headers in ({}, {"x-api-key": "o"}, {"authorization": "Basic secret"}, without_scheme):
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1//models", "/models"])
def test_paths_as_clients_join_them(server, path):
    (card,) = httpx.get(f"{server.url}{path}").json()["data"]
    assert card["id"] == "minimind" and card["object"] == "model" and card["created"] > 0
    assert card["max_model_len"] == card["context_length"] == 512


def test_tools_that_do_not_fit_are_left_out(serve, tokenizer):
    server = serve(max_length=256)
    tools = [
        {"type": "function", "function": {"name": f"tool_{n}", "description": "what it does " * 5}}
        for n in range(30)
    ]
    response = ask(server, tools=tools, max_tokens=8)
    left_out = response.headers["x-minimind-tools-left-out"].split(",")
    kept = [tool for tool in tools if tool["function"]["name"] not in left_out]
    assert kept == tools[: len(kept)] and 0 < len(kept) < 30
    assert reply(response)["usage"] == reply(ask(server, tools=kept, max_tokens=8))["usage"]
    one_more = ask(server, tools=tools[: len(kept) + 1], max_tokens=8)
    assert one_more.headers["x-minimind-tools-left-out"] == f"tool_{len(kept)}"
    last = {"type": "function", "function": {"name": "tool_29"}}
    forced = ask(server, tools=tools, max_tokens=60, tool_choice=last)
    assert forced.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "tool_29"
    assert ask(serve(max_length=256, tools="all"), tools=tools).status_code == 400
    plain = reply(ask(serve(tools="none"), tools=tools))
    assert plain["usage"] == reply(ask(server))["usage"]

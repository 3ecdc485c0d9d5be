"""JSON, forced tool calls and reasoning."""

import json

import openai
import pytest
from api_requests import CLOCK, GREEDY, HELLO, PERSON, json_of

from dataset.lm_dataset import encode_chat
from model.inference.generation import generate
from model.inference.sampling import SamplingParams


@pytest.mark.parametrize("most", [20, 40, 200])
@pytest.mark.parametrize("seed", range(3))
def test_json_follows_its_schema_within_max_tokens(client, most, seed):
    """From random weights, which would generate anything."""
    settings = GREEDY | dict(max_tokens=most, seed=seed, temperature=2)
    answer = client.chat.completions.create(**settings, response_format=json_of(PERSON))
    said = json.loads(answer.choices[0].message.content)
    assert said.keys() == PERSON["properties"].keys()
    assert isinstance(said["age"], int)


@pytest.mark.parametrize("kind", [None, "object", ["object", "null"]])
def test_arguments_of_a_forced_call_are_an_object(client, kind):
    parameters = {"properties": {"a": {"type": "null"}}, "required": ["a"]}
    parameters |= {"type": kind} if kind else {}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    settings = GREEDY | dict(max_tokens=60, temperature=2)
    for seed in range(3):
        answer = client.chat.completions.create(
            **settings, seed=seed, tools=[tool], tool_choice="required"
        )
        (call,) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"a": None}


def test_parameters_that_are_no_object_are_refused(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
    with pytest.raises(openai.BadRequestError, match="parameters of f are no object but string"):
        client.chat.completions.create(**GREEDY, tools=[tool], tool_choice="required")


def test_any_json_object(client):
    answer = client.chat.completions.create(**GREEDY, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "clock"}}]
)
def test_forced_tool_calls(client, stream, choice):
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


def test_reasoning_is_separate_from_content(server, client, tokenizer):
    answer = client.chat.completions.create(
        **GREEDY, extra_body={"chat_template_kwargs": {"open_thinking": True}}
    )
    ids = encode_chat(tokenizer, HELLO, add_generation_prompt=True, open_thinking=True).ids
    reply = generate(server.model, [ids], SamplingParams(12, temperature=0))[0]
    message = answer.choices[0].message
    assert answer.usage.prompt_tokens == len(ids)
    assert message.content == ""  # the random model never writes </think>
    assert message.reasoning_content == tokenizer.decode(reply, skip_special_tokens=True).strip(
        "\n"
    )


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("default", [False, True])
def test_open_thinking_is_set_by_the_server_or_the_request(serve, tokenizer, default, asked):
    server = serve(max_batch=1, open_thinking=default)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    given = {} if asked is None else {"chat_template_kwargs": {"open_thinking": asked}}
    settings = dict(**GREEDY, extra_body=given)
    thinks = default if asked is None else asked
    ids = encode_chat(tokenizer, HELLO, add_generation_prompt=True, open_thinking=thinks).ids
    reply = generate(server.model, [ids], SamplingParams(12, temperature=0))[0]
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

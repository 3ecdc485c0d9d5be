"""/v1/responses, and log-probabilities of prompts by /v1/completions."""

import json

import openai
import pytest
import torch
from api_requests import CLOCK, HELLO, PERSON, expected

from dataset.lm_dataset import encode_chat, encode_text

ASKED = dict(model="minimind", input=HELLO, temperature=0, max_output_tokens=12)
TOOL = {"type": "function", **CLOCK["function"]}


def test_a_response_says_what_a_chat_says(server, client, tokenizer):
    ids, tokens, text = expected(server, tokenizer)
    answer = client.responses.create(**ASKED)
    assert answer.output_text == text
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(ids), len(tokens))


def test_a_stream_of_events(server, client, tokenizer):
    text = expected(server, tokenizer)[2]
    events = list(client.responses.create(**ASKED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == text
    assert [event.type for event in events if not event.type.endswith("delta")] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert events[-1].response.output_text == text


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_and_its_result(server, client, tokenizer, stream):
    asked = ASKED | dict(tools=[TOOL], tool_choice="required", max_output_tokens=60)
    answer = client.responses.create(**asked, stream=stream)
    if stream:
        answer = list(answer)[-1].response
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "clock"
    assert json.loads(call.arguments)["zone"] in ("UTC", "CET")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "12:00"}
    later = {**ASKED, "tools": [TOOL], "input": [result]}
    after = client.responses.create(**later, previous_response_id=answer.id)
    written = {"name": "clock", "arguments": json.loads(call.arguments)}
    messages = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [written]},
        {"role": "tool", "content": "12:00"},
    ]
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True, tools=[CLOCK]).ids
    assert after.usage.input_tokens == len(ids)
    whole = {**later, "input": [*HELLO, {"type": "item_reference", "id": call.id}, result]}
    assert client.responses.create(**whole).output_text == after.output_text


def test_structured_output_and_instructions(client):
    form = {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}
    answer = client.responses.create(
        **{**ASKED, "max_output_tokens": 60}, instructions="Be brief.", text={"format": form}
    )
    assert json.loads(answer.output_text).keys() == PERSON["properties"].keys()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(previous_response_id="resp_gone"), "'resp_gone'"),
        (dict(background=True), "background is not supported"),
        (dict(tools=[{"type": "web_search"}]), "web_search"),
        (dict(input=[{"type": "computer_call"}]), "computer_call"),
        (dict(input=[{"role": "king", "content": "a"}]), "role"),
        (dict(input=[]), "messages"),
        (dict(extra_body={"colour": "red"}), "colour"),
    ],
)
def test_what_is_refused(client, more, words):
    with pytest.raises(openai.APIStatusError, match=words) as error:
        client.responses.create(**ASKED | more)
    assert error.value.status_code in (400, 404)


@pytest.mark.parametrize("most", [0, 1])
def test_log_probabilities_of_a_prompt(server, client, tokenizer, most):
    """As lm_eval's local-completions asks for them."""
    texts = ["Once upon a time", "从前有座山"]
    prompts = [encode_text(tokenizer, text).ids[:-1] for text in texts]
    answer = client.completions.create(
        model="minimind", prompt=prompts, echo=True, logprobs=2, max_tokens=most, temperature=0
    )
    assert answer.usage.completion_tokens == 2 * most
    for choice, ids in zip(answer.choices, prompts, strict=True):
        told = choice.logprobs
        with torch.no_grad():
            own = server.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        assert len(told.tokens) == len(told.text_offset) == len(ids) + most
        values = own[range(len(ids) - 1), ids[1:]].tolist()
        assert told.token_logprobs[1 : len(ids)] == pytest.approx(values, abs=1e-3)
        best = own[:-1].max(-1).values.tolist()
        tops = [max(each.values()) for each in told.top_logprobs[1 : len(ids)]]
        assert tops == pytest.approx(best, abs=1e-3)


def test_offsets_point_into_the_text(client):
    """Also where a character is several tokens, and behind BOS, which the text leaves out."""
    prompt = "Once 😀é 从前"
    (choice,) = client.completions.create(
        model="minimind", prompt=prompt, echo=True, logprobs=0, max_tokens=3, temperature=0
    ).choices
    told = choice.logprobs
    assert choice.text.startswith(prompt) and told.text_offset[:2] == [0, 0]
    whole = [
        (token, offset)
        for token, offset in zip(told.tokens[1:], told.text_offset[1:], strict=True)
        if "\ufffd" not in token
    ]
    assert len(whole) >= 3
    assert all(choice.text.startswith(token, offset) for token, offset in whole)
    for token, value, top in zip(
        told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:], strict=True
    ):
        assert top[token] == value


def test_a_text_without_bos(client):
    counts = [
        client.completions.create(
            model="minimind", prompt="Once", max_tokens=1, extra_body={"add_special_tokens": value}
        ).usage.prompt_tokens
        for value in (True, None, False)
    ]
    assert counts[0] == counts[1] == counts[2] + 1


def test_what_is_not_to_be_stored_is_not(client):
    response = client.responses.create(**ASKED | dict(store=False))
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**ASKED | dict(previous_response_id=response.id))


def test_a_reply_that_was_cut_is_incomplete(client):
    response = client.responses.create(**ASKED | dict(max_output_tokens=1))
    assert (response.status, response.output[-1].status) == ("incomplete", "incomplete")

"""Chat and text completions, streamed and not, against the model without a server."""

import pytest
import torch
from api_requests import CLOCK, GREEDY, expected

from dataset.lm_dataset import encode_chat, encode_text
from model.inference.generation import generate
from model.inference.sampling import SamplingParams


def test_a_chat_completion(server, client, tokenizer):
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


def test_a_stream_has_the_same_content(server, client, tokenizer):
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


def test_choices_differ_and_a_seed_reproduces_them(client):
    settings = GREEDY | dict(temperature=1.5, n=3, seed=7)
    first, second = (
        [c.message.content for c in client.chat.completions.create(**settings).choices]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_left_out(server, client, tokenizer, stream):
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


def test_text_completions_of_texts_and_of_token_ids(server, client, tokenizer):
    prompts = ["Once upon a time", "从前"]
    ids = [encode_text(tokenizer, prompt).ids[:-1] for prompt in prompts]
    replies = generate(server.model, ids, SamplingParams(6, temperature=0))
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


def test_a_conversation_with_tools_is_encoded_by_the_chat_template(server, client, tokenizer):
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

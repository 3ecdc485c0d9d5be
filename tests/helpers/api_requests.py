"""Requests to the server, and what the model answers to them without a server."""

import time

from dataset.lm_dataset import encode_chat
from model.inference.generation import generate
from model.inference.sampling import SamplingParams

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


def expected(server, tokenizer, messages=HELLO, most=12):
    """Prompt ids, greedy tokens and text of the model, without a server."""
    ids = encode_chat(tokenizer, messages, add_generation_prompt=True).ids
    tokens = generate(server.model, [ids], SamplingParams(most, temperature=0))[0]
    return ids, tokens, tokenizer.decode(tokens, skip_special_tokens=True)


def idle(server) -> bool:
    """Whether the engine has no request left, within a second."""
    for _ in range(100):
        if not server.service.engine.busy and not server.service.thread.callbacks:
            return True
        time.sleep(0.01)
    return False

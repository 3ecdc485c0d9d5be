"""Models for the tests with engines: random ones of each kind, and one that has learnt to talk."""

import json
from typing import Any

import torch
from test_model import PAIRS  # the kinds that transformers has a class for
from transformers import PreTrainedTokenizerBase

from model.formats.minimind_format import ROUTER_BIAS
from model.losses import IGNORE_INDEX
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

__all__ = ["PAIRS"]
NEW_TOKENS = 24
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
QUESTION = {"role": "user", "content": "How is the weather in Paris? 天气？"}
ASKED = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
TOLD = [*ASKED, {"role": "tool", "content": "12 degrees"}]
THOUGHT, REPLY = "I have no tools here.", "I cannot know that. 不知道。"
# What the model learns by heart: (conversation, tools)
CONVERSATIONS = [
    (ASKED, TOOLS),
    ([*TOLD, {"role": "assistant", "content": "It has 12 degrees."}], TOOLS),
    ([QUESTION, {"role": "assistant", "content": REPLY, "reasoning_content": THOUGHT}], None),
]


def as_openai(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with arguments as text, and with ids."""
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["id"] = "call00000"
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if message["role"] == "tool":
            message["tool_call_id"] = "call00000"
    return messages


def prompts(count: int = 32, longest: int = 120) -> list[list[int]]:
    """Random tokens, prompts of several lengths."""
    draw = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(3, 6400, (length,), generator=draw).tolist() for length in lengths]


def random_model(seed: int = 0, **fields) -> MiniMindForCausalLM:
    """With logits far from each other, norms that are not 1 and router biases that are not 0."""
    torch.manual_seed(seed)
    config = dict(
        hidden_size=128,  # vLLM's kernels for CPUs want heads of 32 at least
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    model = MiniMindForCausalLM(MiniMindConfig(**{**config, **fields})).eval()
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    for name, bias in model.named_buffers():
        if name.endswith(ROUTER_BIAS):
            torch.nn.init.uniform_(bias, -0.2, 0.2)
    return model


def greedy_tokens(
    model: MiniMindForCausalLM, asked: list[list[int]], never: list[int] | None = None
) -> list[list[int]]:
    """NEW_TOKENS tokens of each prompt, by transformers' own loop, one prompt at a time.

    Args:
        never: tokens that are not chosen.
    """
    settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    settings |= {"suppress_tokens": never}
    return [
        model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in asked
    ]


def learn_conversations(tokenizer: PreTrainedTokenizerBase) -> MiniMindForCausalLM:
    """A model that knows the answers of CONVERSATIONS by heart."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = MiniMindForCausalLM(MiniMindConfig(**sizes, max_position_embeddings=1024)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    settings = dict(return_dict=True, return_assistant_tokens_mask=True)
    rows = []
    for messages, tools in CONVERSATIONS:
        row = tokenizer.apply_chat_template(messages, tools=tools, **settings)
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor([row["assistant_masks"]])
        rows.append((ids, ids.masked_fill(mask == 0, IGNORE_INDEX)))
    losses = [torch.ones(())]
    while max(losses) > 0.02:
        losses = [model(ids, labels=labels).loss for ids, labels in rows]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return model.eval()

"""A model that says what is written here, for the tests of clients."""

import json
import time

HELLO = "Hello! I am MiniMind, a small language model. 你好！"
CALL = {"name": "get_weather", "arguments": {"city": "Paris"}}
WEATHER = "It is sunny in Paris."
PERSON = {"name": "Ann", "age": 30}


def reply_to(prompt: str, has_grammar: bool) -> str:
    """What the model says to a prompt, which is a rendered conversation."""
    last = prompt.rpartition("<|im_start|>assistant")[0].rpartition("<|im_start|>")[2]
    if "<tool_response>" in last:
        return WEATHER
    if "weather" in last and "get_weather" in prompt:
        return f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    if "Ann" in last:  # a person is to be extracted
        text = json.dumps(PERSON, separators=(",", ":"))
        return text if has_grammar else f"```json\n{text}\n```"
    return HELLO


def scripted(service, seconds_per_token: float = 0) -> list[str]:
    """Let the server's engine say what `reply_to` has, as far as a grammar allows it, and go on by
    itself where it does not; returns the list in which all prompts will be."""
    engine, tokenizer, asked, replies = service.engine, service.tokenizer, [], {}
    sample_tokens = engine.sample_tokens

    def say(sequences, logits):
        time.sleep(seconds_per_token)
        logits = logits.clone()
        for sequence, row in zip(sequences, logits, strict=True):
            request = sequence.request
            if request not in replies:
                asked.append(tokenizer.decode(request.prompt))
                text = reply_to(asked[-1], request.constraint is not None) + "<|im_end|>"
                replies[request] = tokenizer.encode(text, add_special_tokens=False)
            reply, so_far = replies[request], request.tokens
            if so_far == reply[: len(so_far)] and len(so_far) < len(reply):
                row[reply[len(so_far)]] += 1e4
        return sample_tokens(sequences, logits)

    engine.sample_tokens = say
    return asked

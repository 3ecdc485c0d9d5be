"""What a step of benchmarks/today.py has to show: functions of the workshop that return one fact.

A fact that does not hold is an AssertionError, which says what was found instead.
"""

import json
import re
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.weights import load_model
from stand_in.rows import OFFERED, offered

SIZE = 128  # hidden_size of the models
Record = dict[str, Any]


class Workshop:
    """A folder with a copy of the code, in which a user would train: its logs and what it made."""

    def __init__(self, folder: Path, logs: Path):
        self.folder, self.logs = folder, logs
        self.address = ""  # of the server while it runs

    def text(self, step: str) -> str:
        """What a step printed."""
        return (self.logs / f"{step}.log").read_text(encoding="utf-8", errors="replace")

    def answer(self, step: str) -> str:
        """The model's answer that a chat printed, without the lines around it."""
        lines = self.text(step).splitlines()
        start = max(n for n, line in enumerate(lines) if "M parameters" in line)
        told = [line for line in lines[start + 1 :] if not line.startswith(("> ", "["))]
        return "\n".join(told).strip()

    def records(self, stage: str) -> list[Record]:
        """The log of a training."""
        path = self.folder / "out" / f"{stage}_{SIZE}.metrics.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def values(self, stage: str, name: str) -> list[float]:
        """A metric of all records that have it."""
        found = [each for record in self.records(stage) if (each := record.get(name)) is not None]
        assert found, f"no {name} in the log, but {', '.join(self.records(stage)[-1])}"
        return found

    def weights(self, path: str) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / path, weights_only=True)


def downloaded(files: dict[str, bytes], folder: str):
    """The files lie in the folder, byte for byte."""

    def fact(shop: Workshop, step: str) -> str:
        for name, content in files.items():
            path = shop.folder / folder / name
            assert path.is_file(), f"{name} was not downloaded"
            assert path.read_bytes() == content, f"{name} differs"
        told = shop.text(step)
        assert "sha256" in told or "git hash" in told, "no hash was checked"
        return f"{len(files)} files, hashes checked"

    return fact


def said(pattern: str):
    """The step printed this."""

    def fact(shop: Workshop, step: str) -> str:
        found = re.search(pattern, shop.text(step))
        assert found, f"it does not say {pattern}"
        return found.group()

    return fact


def learned(stage: str, start: str = ""):
    """The loss fell, and the stored weights are others than those of the stage it started from."""

    def fact(shop: Workshop, step: str) -> str:
        losses = shop.values(stage, "loss")
        assert losses[-1] < losses[0], f"the loss went from {losses[0]} to {losses[-1]}"
        told = f"loss {losses[0]:.2f} → {losses[-1]:.2f}"
        return f"{told}, {changed(shop, stage, start)}" if start else told

    return fact


def changed(shop: Workshop, stage: str, start: str) -> str:
    before = shop.weights(start if start.endswith(".pth") else f"out/{start}_{SIZE}.pth")
    after = shop.weights(f"out/{stage}_{SIZE}.pth")
    other = sum(int((after[name] != old).sum()) for name, old in before.items() if name in after)
    assert other, f"the weights are those of {start}"
    return f"{other / sum(old.numel() for old in before.values()):.0%} of the weights changed"


def rewarded(stage: str, start: str, metric: str, *also: str):
    """A reward told completions apart, other metrics are above 0, and the weights changed."""

    def fact(shop: Workshop, step: str) -> str:
        rewards = shop.values(stage, metric)
        assert any(rewards) and len(set(rewards)) > 1, f"{metric} is always {rewards[0]}"
        told = [f"{metric} {min(rewards):.2f} to {max(rewards):.2f}"]
        for name in also:
            values = shop.values(stage, name)
            assert max(values) > 0, f"{name} is always 0"
            told.append(f"{name} up to {max(values):.2f}")
        return ", ".join([*told, changed(shop, stage, start)])

    return fact


def masked(shop: Workshop, step: str) -> str:
    """Some tokens of a chat are trained, and not all."""
    found = re.search(r"(\d+) tokens, (\d+) trained", shop.text(step))
    assert found, "no sequence is shown"
    tokens, trained = map(int, found.groups())
    assert 0 < trained < tokens, f"{trained} of {tokens} tokens are trained"
    return f"{trained} of {tokens} tokens trained"


def answers(expected: str):
    """The answer to a prompt that the model was trained on, with no thought before it."""

    def fact(shop: Workshop, step: str) -> str:
        answer = shop.answer(step)
        assert "think>" not in answer, f"it thinks: {answer[:60]!r}"
        assert expected in answer, f"it says {answer[:60]!r}"
        return repr(answer[:40])

    return fact


def adapter(name: str):
    """LoRA's B, which begins at 0, is not 0 any more."""

    def fact(shop: Workshop, step: str) -> str:
        state = shop.weights(f"out/lora/{name}_{SIZE}.pth")
        moved = [name for name, value in state.items() if "lora_B" in name and value.any()]
        assert moved, f"no B of {len(state)} matrices has changed"
        return f"{len(moved)} matrices B are no longer 0"

    return fact


def served(prompt: str, chat: str, calls: str = ""):
    """The server gives the answer that the chat gave, and calls a tool for the question `calls`."""

    def fact(shop: Workshop, step: str) -> str:
        answer = ask(shop, prompt)["content"]
        assert answer.strip() == shop.answer(chat), f"{answer!r}, not {shop.answer(chat)!r}"
        told = f"{answer[:30]!r} as in the chat"
        if calls:
            tools = [{"type": "function", **each} for each in offered(*OFFERED)]
            made = ask(shop, calls, tools=tools).get("tool_calls") or []
            assert made, f"no tool is called for {calls}"
            told += f"; calls {made[0]['function']['name']}"
        return told

    return fact


def ask(shop: Workshop, prompt: str, **more: Any) -> dict[str, Any]:
    """The message that the server answers with."""
    body = {"model": "minimind", "messages": [{"role": "user", "content": prompt}]}
    body |= {"temperature": 0, "max_tokens": 48, **more}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{shop.address}/v1/chat/completions", json.dumps(body).encode(), headers)
    for _ in range(240):  # until it listens
        try:
            with urlopen(request, timeout=60) as answer:
                return json.load(answer)["choices"][0]["message"]
        except URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


def exported(weights: str, folder: str):
    """transformers computes the same logits from the exported folder."""

    def fact(shop: Workshop, step: str) -> str:
        ours = load_model(shop.folder / weights).eval()
        theirs = AutoModelForCausalLM.from_pretrained(shop.folder / folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(shop.folder / folder)
        ids = tokenizer("river stone 星河", return_tensors="pt").input_ids
        with torch.no_grad():
            expected, found = ours(ids).logits, theirs(ids).logits
        difference = (found - expected).abs().max() / expected.abs().max()
        assert difference < 1e-4, f"the logits differ by {difference:.1e}"
        return f"{type(theirs).__name__}, logits within {difference:.0e}"

    return fact

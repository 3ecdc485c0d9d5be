"""The web page with a toy model that has memorised three conversations: an answer, reasoning, and
a tool call."""

import os
import socket
import subprocess
import sys

import psutil
import pytest
import streamlit as st
import torch
from streamlit.testing.v1 import AppTest
from web_page import MEMORISED, PAGE

from dataset.lm_dataset import encode_chat
from dataset.tools.builtin import TOOLS
from model.losses import IGNORE_INDEX
from model.weights import save_weights


@pytest.fixture(scope="session")
def folder(make_model, tokenizer, tmp_path_factory):
    """out/ with a model that memorised MEMORISED, and random models that never end."""
    folder = tmp_path_factory.mktemp("out")
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.02)
    rows = [
        encode_chat(tokenizer, messages, tools=[TOOLS[name].schema for name in tools] or None)
        for messages, tools in MEMORISED
    ]
    longest = max(len(row.ids) for row in rows)
    ids, labels = torch.zeros(2, len(rows), longest, dtype=torch.long)
    labels[:] = IGNORE_INDEX
    for n, row in enumerate(rows):
        ids[n, : len(row.ids)] = torch.tensor(row.ids)
        kept = [
            token if yes else IGNORE_INDEX
            for token, yes in zip(row.ids, row.loss_mask, strict=True)
        ]
        labels[n, : len(kept)] = torch.tensor(kept)
    model = make_model(hidden_size=96, qk_norm=True, **sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    steps = 120
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 10, 2 - 2 * step / steps)
        loss = model(ids, labels=labels, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02
    about = dict(tokenizer=tokenizer, origin={})
    save_weights(make_model(seed=1, **sizes), folder / "dpo_64.pth", stage="dpo", **about)
    save_weights(model, folder / "full_sft_96.pth", stage="full_sft", **about)
    mixture = make_model(use_moe=True, **sizes)
    save_weights(mixture, folder / "moe" / "pretrain_64_moe.pth", stage="pretrain", **about)
    return folder


@pytest.fixture
def open_page(folder, monkeypatch):
    """A function that opens the page with these flags."""

    def start(*flags: str, save_dir=folder, address: str | None = None) -> AppTest:
        monkeypatch.setattr(type(st.context), "ip_address", property(lambda self: address))
        words = ["--save_dir", str(save_dir), "--temperature", "0", "--language", "en", *flags]
        monkeypatch.setattr(sys, "argv", [PAGE, *words])
        page = AppTest.from_file(PAGE, default_timeout=60).run()
        assert not page.exception
        return page

    return start


# -- a real browser --------------------------------------------------------------------------------


@pytest.fixture
def serve():
    """A function that starts the page with these flags, as a person does; its address."""
    started = []

    def start(*flags: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [sys.executable, "-m", "streamlit", "run", PAGE, "--server.headless", "true"]
        words += ["--server.port", str(port), "--", *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipe = dict(stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        started.append(subprocess.Popen(words, env=env, **pipe))
        return f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        # a training that the page has started would outlive it
        children = psutil.Process(process.pid).children(recursive=True)
        for each in (*children, process):
            each.kill()
        process.wait()

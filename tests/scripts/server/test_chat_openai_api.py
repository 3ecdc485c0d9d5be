"""scripts/chat_openai_api.py, the client in the terminal."""

import os
import subprocess
import sys

import pytest
from api_requests import HELLO, expected

from model.weights import ROOT


def in_terminal(url: str, **more) -> subprocess.CompletedProcess:
    """The client in the terminal, asked once and left."""
    flags = ["--max_tokens", "12", "--temperature", "0", "--historys", "0"]
    flags += [word for name, value in more.items() for word in (f"--{name}", str(value))]
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "chat_openai_api.py", "--base_url", url, *flags],
        input=f"{HELLO[0]['content']}\n/clear\n/quit\nnever asked\n",
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_the_client_in_the_terminal(server, tokenizer, stream):
    answered = in_terminal(f"{server.url}/v1", stream=stream)
    assert answered.returncode == 0, answered.stderr
    assert expected(server, tokenizer)[2] in answered.stdout
    assert "never asked" not in answered.stdout


@pytest.mark.slow
def test_the_client_says_that_no_server_answers(closed_port):
    alone = in_terminal(f"http://127.0.0.1:{closed_port}/v1")
    assert alone.returncode == 2 and "error: no server answers" in alone.stderr

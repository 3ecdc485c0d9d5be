"""scripts/chat_openai_api.py, the client in the terminal."""

import os
import subprocess
import sys

import pytest
from api_requests import HELLO, expected

from model.weights import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_the_client_in_the_terminal(server, tokenizer, stream):
    flags = ["--max_tokens", "12", "--temperature", "0", "--historys", "0", "--stream", str(stream)]
    said = {}
    for url in (f"{server.url}/v1", "http://127.0.0.1:9/v1"):
        said[url] = subprocess.run(
            [sys.executable, ROOT / "scripts" / "chat_openai_api.py", "--base_url", url, *flags],
            input=f"{HELLO[0]['content']}\n/clear\n/quit\nnever asked\n",
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )
    answered, alone = said.values()
    assert answered.returncode == 0, answered.stderr
    assert expected(server, tokenizer)[2] in answered.stdout
    assert "never asked" not in answered.stdout
    assert alone.returncode == 2 and "error: no server answers" in alone.stderr

"""Many requests at a time, clients that disconnect, and generated requests."""

import asyncio
import random
import subprocess
import sys

import httpx
import openai
import pytest
from api_requests import GREEDY, expected, idle


async def open_streams(server, count: int) -> dict[int, str]:
    """Open streams, a third of which disconnect early; the content of the others."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    draw, contents = random.Random(0), {}

    async def one(n: int) -> None:
        messages = [{"role": "user", "content": f"number {n}"}]
        stream = await client.chat.completions.create(
            **GREEDY | {"messages": messages, "max_tokens": 10 + n % 7}, stream=True
        )
        text, num_chunks = "", draw.randint(1, 6) if n % 3 == 0 else 99
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            num_chunks -= 1
            if not num_chunks:
                await stream.close()
                return
        contents[n] = text

    await asyncio.gather(*map(one, range(count)))
    await client.close()
    return contents


def test_64_streams_some_of_which_disconnect(server, tokenizer):
    contents = asyncio.run(open_streams(server, 64))
    assert 42 <= len(contents) < 64
    for n, text in contents.items():
        messages = [{"role": "user", "content": f"number {n}"}]
        assert text == expected(server, tokenizer, messages, 10 + n % 7)[2]
    assert idle(server)
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'minimind_requests_total{outcome="cancelled"}' in metrics
    assert "minimind_running 0.0" in metrics and "minimind_waiting 0.0" in metrics


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_frees_its_slot(server, stream):
    body = GREEDY | {"max_tokens": 400, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        with httpx.Client(timeout=0.3) as client:
            client.post(f"{server.url}/v1/chat/completions", json=body)
            raise httpx.ReadTimeout("a stream")
    assert idle(server)


@pytest.mark.slow
def test_responses_conform_to_the_openapi_schema(server, tmp_path):
    """schemathesis generates valid and invalid requests from the server's OpenAPI schema."""
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--checks", checks, "--max-examples", "25", "--seed", "1", "--no-color"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-500:]
    assert idle(server)

"""A running server, and OpenAI's own client for it."""

from contextlib import ExitStack

import openai
import pytest
from running_server import running_server


@pytest.fixture(scope="module")
def serve(make_model, tokenizer):
    """A function that starts a server with these arguments in a thread; its address and parts."""
    with ExitStack() as running:

        def start(**settings):
            model = make_model(vocab_size=len(tokenizer), max_position_embeddings=512)
            return running.enter_context(running_server(model, tokenizer, **settings))

        yield start


@pytest.fixture(scope="module")
def server(serve):
    return serve(max_batch=4, prefill_tokens=16)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)

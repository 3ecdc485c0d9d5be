"""A running server, and OpenAI's own client for it."""

import threading
import time
from types import SimpleNamespace

import openai
import pytest
import uvicorn

from model.weights import count_parameters
from scripts.serve_openai_api import make_app
from scripts.serving.arguments import ServerArgs
from scripts.serving.loading import ChatModel


@pytest.fixture(scope="module")
def serve(make_model, tokenizer):
    """A function that starts a server with these arguments in a thread; its address and parts."""
    running = []

    def start(**settings):
        model = make_model(vocab_size=len(tokenizer), max_position_embeddings=512)
        loaded = ChatModel(model, tokenizer, "full_sft", "test", count_parameters(model))
        app = make_app(ServerArgs(**settings), loaded)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        service = app.state.service
        return SimpleNamespace(url=f"http://127.0.0.1:{port}", service=service, model=model)

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(serve):
    return serve(max_batch=4, prefill_tokens=16)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)

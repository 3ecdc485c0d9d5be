"""The server in a thread of this process."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

from model.weights import count_parameters
from scripts.serve_openai_api import make_server
from scripts.serving.arguments import ServerArgs
from scripts.serving.loading import ChatModel


@contextmanager
def running_server(model, tokenizer, **settings):
    """A server with these arguments, on a free port; its address, service and model."""
    loaded = ChatModel(model, tokenizer, "full_sft", "test", count_parameters(model))
    server = make_server(ServerArgs(**settings), loaded, port=0, log_level="error")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        service = server.config.app.state.service
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", service=service, model=model)
    finally:
        server.should_exit = True
        thread.join()

"""What the tests of reinforcement learning share."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rl_toy import ASKED, MORE, RL, STAGES, prompt_file, some_prompts
from toy import Trainer

from model.weights import load_model
from trainer import train_grpo
from trainer.common import setup
from trainer.common.context import Context
from trainer.rl.prompts import PromptDataset, collate_prompts
from trainer.trainer_utils import Run


@pytest.fixture
def make_run(save, tmp_path, tokenizer):
    """A run of GRPO with its model, nothing trained."""

    def make(stage=train_grpo, **settings):
        args = stage.Args(
            from_weight=str(save(num_hidden_layers=1)),
            data_path=[prompt_file(tmp_path / "prompts.jsonl")],
            device="cpu",
            max_gen_len=6,
            save_dir=str(tmp_path),
            **settings,
        )
        model = setup.add_lora_if_asked(args, load_model(args.from_weight, tokenizer=tokenizer))
        prompts = PromptDataset(some_prompts(tokenizer), max_sample_tokens=99)
        ctx = Context.create(args)
        run = Run(ctx, "grpo", model, tokenizer, prompts, collate=collate_prompts)
        return run, model.train()

    return make


@pytest.fixture(params=STAGES, ids=lambda stage: stage.__name__.rpartition("_")[2])
def rl(request, tmp_path) -> Trainer:
    more = {**RL, **MORE[request.param]}
    return Trainer(tmp_path, request.param, (prompt_file, ASKED, more))


@pytest.fixture
def server():
    """A function that starts a server whose answers a function (path, body) → (status, body)
    gives; its address, and the requests that it had."""
    started = []

    def start(answer):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                asked.append((self.path, json.loads(self.rfile.read(length) or b"{}")))
                status, body = answer(*asked[-1])
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, *args):
                pass

        started.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=started[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}/v1", asked

    yield start
    for each in started:
        each.shutdown()

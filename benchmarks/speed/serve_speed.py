"""Throughput and time to first token of servers under concurrent clients.

    python benchmarks/speed/serve_speed.py [--clients 1 8 32] [--json FILE]

Each client streams one chat completion after the other, greedily, with a new prompt each time. The
servers have the same weights and number of threads. They run one at a time, in turn in each round;
the table shows medians over the rounds.

ours          scripts/serve_openai_api.py
plain         a minimal server as in small repositories: transformers' generate with a
              TextIteratorStreamer, one request at a time, in this file
transformers  `transformers serve`; with --continuous-batching it is "batching"
llama         llama-cpp-python's server with float32 weights, one request at a time; needs
              `pip install 'llama-cpp-python[server]'`

The weights are random, but the embedding (tied with the head) is 0 for all tokens that are not
plain ASCII text. So are their logits, and greedy decoding never chooses them. Hence every reply has
exactly --max_tokens tokens, each of which is text that the client receives. A shorter reply is an
error.
"""

import asyncio
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from model.command_line import option, parse_command_line
from model.errors import exit_on_user_error
from model.paths import ROOT


@dataclass
class Args:
    clients: list[int] = option([1, 8, 32], "numbers of concurrent clients")
    servers: list[str] = option(
        ["ours", "plain", "transformers", "batching", "llama"], "servers to measure"
    )
    replies: int = option(1, "replies per client and round")
    rounds: int = option(3, "number of rounds")
    max_tokens: int = option(64, "length of a reply, in tokens")
    hidden_size: int = option(512, "hidden size of the model")
    num_hidden_layers: int = option(8, "number of layers of the model")
    port: int = option(8766, "port of the servers")
    json: str = option("", "also write the results to this file")
    plain_folder: str = option("", "internal: run the plain server on this folder")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import httpx
import torch
import transformers
import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)

from dataset.lm_dataset import token_bytes
from model.formats.gguf_format import save_gguf
from model.formats.hf_format import save_hf_folder
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import count_parameters, load_tokenizer, save_weights, write_json
from trainer.common.hardware import describe_machine

WORDS = "sun river stone cloud light paper music winter garden bridge window".split()


def main(args: Args) -> dict[str, Any] | None:
    if args.plain_folder:
        return run_plain_server(args)
    tokenizer = load_tokenizer()
    model = make_endless_model(args, tokenizer)
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "transformers": transformers.__version__,
        "parameters": count_parameters(model),
        "arguments": vars(args),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = dict(stage="full_sft", tokenizer=tokenizer, origin={})
        save_weights(model, folder / "model.pth", **about)
        save_hf_folder(model, tokenizer, folder / "hf")
        save_gguf(model, tokenizer, folder / "model.gguf", "float32", "model")
        report["servers"] = measure_all(commands(folder, args), args)
    show(report)
    if args.json:
        write_json(args.json, report)
    return report


def make_endless_model(args: Args, tokenizer: PreTrainedTokenizerBase) -> MiniMindForCausalLM:
    """Random weights that generate only tokens of ASCII text, hence no EOS."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers)
    model = MiniMindForCausalLM(MiniMindConfig(**sizes))
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    sizes = token_bytes(tokenizer).tolist()
    suppressed = [
        n
        for n, text in enumerate(texts)
        if not (text.isascii() and text.strip().isalnum() and len(text) == sizes[n])
    ]
    with torch.no_grad():
        model.lm_head.weight[suppressed] = 0
    return model.half().float().eval()  # rounded to float16, as in a .pth file


def commands(folder: Path, args: Args) -> dict[str, tuple[list[str], str]]:
    """The command of each server, and its name of the model."""
    port, threads = ["--port", str(args.port)], str(torch.get_num_threads())
    theirs = ["-m", "transformers.cli.transformers", "serve", str(folder / "hf"), *port]
    theirs += ["--device", "cpu", "--dtype", "float32"]
    llama = ["-m", "llama_cpp.server", "--model", str(folder / "model.gguf"), *port]
    llama += ["--n_ctx", "2048", "--n_threads", threads, "--n_threads_batch", threads]
    llama += ["--interrupt_requests", "False"]  # otherwise a new request aborts the running one
    all_commands = {
        "ours": ["scripts/serve_openai_api.py", "--weight", str(folder / "model.pth"), *port],
        "plain": ["benchmarks/speed/serve_speed.py", "--plain_folder", str(folder / "hf"), *port],
        "transformers": theirs,
        "batching": [*theirs, "--continuous-batching"],
    }
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("starlette_context"):
        all_commands["llama"] = llama
    names = {"ours": "minimind", "llama": str(folder / "model.gguf")}
    return {
        server: (command, names.get(server, str(folder / "hf")))
        for server, command in all_commands.items()
        if server in args.servers
    }


def measure_all(servers: dict[str, tuple[list[str], str]], args: Args) -> dict[str, dict[int, Any]]:
    """Tokens per second and time to first text, for each server and number of clients."""
    results: dict[str, dict[int, list[tuple[float, float]]]] = {
        server: {count: [] for count in args.clients} for server in servers
    }
    for _ in range(args.rounds):
        for server, (command, model) in servers.items():
            with running(command, args.port):
                asyncio.run(send_requests(args, 1, "", model))  # warm-up
                for count in args.clients:
                    results[server][count].append(measure(args, count, server, model))
    names = ("tokens_per_second", "first_text")
    return {
        server: {
            count: dict(zip(names, map(statistics.median, zip(*rounds, strict=True)), strict=True))
            for count, rounds in of_server.items()
        }
        for server, of_server in results.items()
    }


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """A server as a subprocess, which is ended on exit."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, env=os.environ
        )
        try:
            for _ in range(600):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(log.read().decode()[-2000:])
                try:
                    httpx.get(f"http://127.0.0.1:{port}/v1/models").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            yield
        finally:
            process.kill()
            process.wait()


def measure(args: Args, count: int, server: str, model: str) -> tuple[float, float]:
    """Tokens per second of all clients together, and the median time to first text."""
    start = time.perf_counter()
    firsts = asyncio.run(send_requests(args, count, server, model))
    seconds = time.perf_counter() - start
    return len(firsts) * args.max_tokens / seconds, statistics.median(firsts)


async def send_requests(args: Args, count: int, server: str, model: str) -> list[float]:
    """Run `count` clients at a time; returns the time to first text of each reply."""
    url = f"http://127.0.0.1:{args.port}/v1/chat/completions"
    label = f"{server}, {count} clients"
    bar = tqdm(total=count * args.replies, desc=label, leave=False, disable=not server)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:

        async def one(number: int) -> float:
            words = " ".join(WORDS[(number * 7 + n * n) % len(WORDS)] for n in range(12))
            body = {
                "model": model,
                "messages": [{"role": "user", "content": f"{number}: {words}"}],
                "max_tokens": args.max_tokens,
                "temperature": 0,
                "stream": True,
            }
            start, first, reason = time.perf_counter(), None, None
            async with client.stream("POST", url, json=body) as response:
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    for choice in json.loads(line[6:]).get("choices", []):
                        if choice["delta"].get("content") and first is None:
                            first = time.perf_counter() - start
                        reason = choice.get("finish_reason") or reason
            if reason != "length" or first is None:
                raise RuntimeError(
                    f"{label}: a reply ended with {reason} (HTTP {response.status_code})"
                )
            bar.update()
            return first

        async def several(client_number: int) -> list[float]:
            first = client_number * args.replies
            return [await one(first + n) for n in range(args.replies)]

        results = await asyncio.gather(*map(several, range(count)))
    bar.close()
    return [first for firsts in results for first in firsts]


# -- the plain server ------------------------------------------------------------------------------


def run_plain_server(args: Args) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.plain_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.plain_folder)
    app, lock = FastAPI(), threading.Lock()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "minimind"}]}

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> StreamingResponse:
        body = await http.json()
        prompt = dict(add_generation_prompt=True, return_tensors="pt")
        inputs = tokenizer.apply_chat_template(body["messages"], **prompt)

        def events():
            with lock:
                streamer = TextIteratorStreamer(
                    tokenizer, skip_prompt=True, skip_special_tokens=True
                )
                settings = dict(max_new_tokens=body["max_tokens"], do_sample=False)
                run = threading.Thread(
                    target=model.generate, kwargs=dict(**inputs, **settings, streamer=streamer)
                )
                run.start()
                for piece in streamer:
                    choice = {"index": 0, "delta": {"content": piece}}
                    yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                run.join()
            end = {"index": 0, "delta": {}, "finish_reason": "length"}
            yield f"data: {json.dumps({'choices': [end]})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    uvicorn.run(app, port=args.port, log_level="error")


def show(report: dict[str, Any]) -> None:
    table = Table(title="tokens a second / ms to the first text", title_justify="left")
    table.add_column("clients", justify="right")
    for server in report["servers"]:
        table.add_column(server, justify="right")
    for count in report["arguments"]["clients"]:
        cells = []
        for metrics in report["servers"].values():
            speed, first = metrics[count]["tokens_per_second"], metrics[count]["first_text"]
            cells.append(f"{speed:,.0f} / {1000 * first:,.0f}")
        table.add_row(str(count), *cells)
    Console().print(table)
    millions = report["parameters"] / 1e6
    print(f"{millions:.2f}M parameters, {report['machine']}, {report['date']}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)

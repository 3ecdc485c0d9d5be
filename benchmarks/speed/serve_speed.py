"""Tokens a second and time to the first text of servers that many clients ask at a time.

    python benchmarks/speed/serve_speed.py [--clients 1 8 32] [--json FILE]

Each client streams one chat completion after the other, greedily, of other prompts each time. The
servers have the same weights and as many threads, and run one at a time; after each round of one
the next has its turn, and the table shows medians of the rounds.

ours          scripts/serve_openai_api.py
plain         a server of the kind that small repositories ship: transformers' generate with a
              TextIteratorStreamer, one request at a time, in this file
transformers  `transformers serve`; with --continuous-batching as "batching"
llama         llama.cpp's, by way of llama-cpp-python with a float32 file: one request at a time
              too; needs `pip install 'llama-cpp-python[server]'`

The weights are random, but the rows of the embedding (which is the head, too) of all tokens that
are no plain ASCII text are 0: so are their logits, and greedy decoding never chooses them. Every
reply therefore has exactly --max_tokens tokens, and each of them is text that a client sees come.
A reply that ended before is an error.
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
from model.command_line import option, parse_arguments
from model.errors import exit_on_user_error
from model.formats.gguf_format import save_gguf
from model.formats.hf_format import save_folder
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import ROOT, count_parameters, load_tokenizer, save_weights, write_json
from trainer.common.hardware import describe_machine

WORDS = "sun river stone cloud light paper music winter garden bridge window".split()


@dataclass
class Args:
    clients: list[int] = option([1, 8, 32], "how many ask at a time")
    servers: list[str] = option(
        ["ours", "plain", "transformers", "batching", "llama"], "which are asked"
    )
    replies: int = option(1, "how many replies each client gets in a round")
    rounds: int = option(3, "how often each server is asked")
    max_tokens: int = option(64, "tokens of a reply")
    hidden_size: int = option(512, "of the model")
    num_hidden_layers: int = option(8, "of the model")
    port: int = option(8766, "where the servers listen")
    json: str = option("", "also write the figures to this file")
    plain_folder: str = option("", "inner use: be the plain server of this folder")


def main(args: Args) -> dict[str, Any] | None:
    if args.plain_folder:
        return serve_plainly(args)
    tokenizer = load_tokenizer()
    model = chatty_model(args, tokenizer)
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
        save_folder(model, tokenizer, folder / "hf")
        save_gguf(model, tokenizer, folder / "model.gguf", "float32", "model")
        report["servers"] = ask_all(commands(folder, args), args)
    show(report)
    if args.json:
        write_json(args.json, report)
    return report


def chatty_model(args: Args, tokenizer: PreTrainedTokenizerBase) -> MiniMindForCausalLM:
    """Random weights that choose tokens of ASCII text only, and so never end a reply."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=args.hidden_size, num_hidden_layers=args.num_hidden_layers)
    model = MiniMindForCausalLM(MiniMindConfig(**sizes))
    texts = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    sizes = token_bytes(tokenizer).tolist()
    unwanted = [
        n
        for n, text in enumerate(texts)
        if not (text.isascii() and text.strip().isalnum() and len(text) == sizes[n])
    ]
    with torch.no_grad():
        model.lm_head.weight[unwanted] = 0
    return model.half().float().eval()  # numbers as in a .pth file


def commands(folder: Path, args: Args) -> dict[str, tuple[list[str], str]]:
    """How each server is started, and what it calls the model."""
    port, threads = ["--port", str(args.port)], str(torch.get_num_threads())
    theirs = ["-m", "transformers.cli.transformers", "serve", str(folder / "hf"), *port]
    theirs += ["--device", "cpu", "--dtype", "float32"]
    llama = ["-m", "llama_cpp.server", "--model", str(folder / "model.gguf"), *port]
    llama += ["--n_ctx", "2048", "--n_threads", threads, "--n_threads_batch", threads]
    llama += ["--interrupt_requests", "False"]  # else a new request ends the one before
    found = {
        "ours": ["scripts/serve_openai_api.py", "--weight", str(folder / "model.pth"), *port],
        "plain": ["benchmarks/speed/serve_speed.py", "--plain_folder", str(folder / "hf"), *port],
        "transformers": theirs,
        "batching": [*theirs, "--continuous-batching"],
    }
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("starlette_context"):
        found["llama"] = llama
    names = {"ours": "minimind", "llama": str(folder / "model.gguf")}
    return {
        server: (command, names.get(server, str(folder / "hf")))
        for server, command in found.items()
        if server in args.servers
    }


def ask_all(servers: dict[str, tuple[list[str], str]], args: Args) -> dict[str, dict[int, Any]]:
    """Of each server and number of clients: tokens a second and seconds to the first text."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {
        server: {count: [] for count in args.clients} for server in servers
    }
    for _ in range(args.rounds):
        for server, (command, model) in servers.items():
            with running(command, args.port):
                asyncio.run(ask(args, 1, "", model))  # the first reply is slow
                for count in args.clients:
                    found[server][count].append(measure(args, count, server, model))
    names = ("tokens_per_second", "first_text")
    return {
        server: {
            count: dict(zip(names, map(statistics.median, zip(*rounds, strict=True)), strict=True))
            for count, rounds in of_server.items()
        }
        for server, of_server in found.items()
    }


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """A server in a process of its own, for as long as this lasts."""
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
    """Tokens a second of all clients together, and the median of the seconds to the first text."""
    start = time.perf_counter()
    firsts = asyncio.run(ask(args, count, server, model))
    seconds = time.perf_counter() - start
    return len(firsts) * args.max_tokens / seconds, statistics.median(firsts)


async def ask(args: Args, count: int, server: str, model: str) -> list[float]:
    """Have so many clients ask; the seconds that each reply's first text took to come."""
    url = f"http://127.0.0.1:{args.port}/v1/chat/completions"
    label = f"{server}, {count} clients"
    bar = tqdm(total=count * args.replies, desc=label, leave=False, disable=not server)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:

        async def one(number: int) -> float:
            some = " ".join(WORDS[(number * 7 + n * n) % len(WORDS)] for n in range(12))
            body = {
                "model": model,
                "messages": [{"role": "user", "content": f"{number}: {some}"}],
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

        found = await asyncio.gather(*map(several, range(count)))
    bar.close()
    return [first for firsts in found for first in firsts]


# -- the plain server ------------------------------------------------------------------------------


def serve_plainly(args: Args) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.plain_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.plain_folder)
    app, one_at_a_time = FastAPI(), threading.Lock()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "minimind"}]}

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> StreamingResponse:
        body = await http.json()
        prompt = dict(add_generation_prompt=True, return_tensors="pt")
        inputs = tokenizer.apply_chat_template(body["messages"], **prompt)

        def events():
            with one_at_a_time:
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
        for figures in report["servers"].values():
            speed, first = figures[count]["tokens_per_second"], figures[count]["first_text"]
            cells.append(f"{speed:,.0f} / {1000 * first:,.0f}")
        table.add_row(str(count), *cells)
    Console().print(table)
    millions = report["parameters"] / 1e6
    print(f"{millions:.2f}M parameters, {report['machine']}, {report['date']}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))

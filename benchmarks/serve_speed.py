"""Tokens a second and seconds to the first token, of servers asked by many clients at a time.

    python benchmarks/serve_speed.py [--weight FILE.pth] [--clients 1 8 32] [--json FILE]

Each client streams one chat completion after the other, of other prompts each time, greedily, until
all have had --replies; the servers have the same weights and as many threads, one at a time.

ours   scripts/serve_openai_api.py
plain  a server of the kind that small repositories ship: transformers' generate with a
       TextIteratorStreamer, one request at a time, in this file
llama  llama.cpp's, by way of llama-cpp-python with a float32 file; needs
       `pip install 'llama-cpp-python[server]'`

Tokens are those of the text that arrived. The time to the first piece of text is the median over
all replies, waiting included.
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
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from model.command_line import option, parse_arguments
from model.errors import exit_on_user_error
from model.gguf_file import save_gguf
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.transformers_folder import save_folder
from model.weights import (
    ROOT,
    count_parameters,
    load_model,
    load_tokenizer,
    save_weights,
    write_json,
)
from trainer.hardware import describe_machine

WORDS = "sun river stone cloud light paper music winter garden bridge window".split()


@dataclass
class Args:
    weight: str = option("", "a .pth file; default: random weights of the 512×8 model")
    clients: list[int] = option([1, 8, 32], "how many ask at a time")
    replies: int = option(3, "how many replies each of them gets")
    max_tokens: int = option(64, "tokens of a reply")
    port: int = option(8766, "where the servers listen")
    json: str = option("", "also write the figures to this file")
    plain_folder: str = option("", "inner use: be the plain server of this folder")


def main(args: Args) -> dict[str, Any] | None:
    if args.plain_folder:
        return serve_plainly(args)
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    model = load_model(args.weight) if args.weight else MiniMindForCausalLM(MiniMindConfig())
    model = model.half().float().eval()
    report: dict[str, Any] = {
        "date": str(date.today()),
        "machine": describe_machine(torch.device("cpu")),
        "parameters": count_parameters(model),
        "arguments": vars(args),
        "servers": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = dict(stage="full_sft", tokenizer=tokenizer, origin={})
        save_weights(model, folder / "model.pth", **about)
        save_folder(model, tokenizer, folder / "hf")
        save_gguf(model, tokenizer, folder / "model.gguf", "float32", "model")
        for server, command in commands(folder, args).items():
            with running(command, args.port):
                figures = {}
                for count in args.clients:
                    asyncio.run(ask(args, 1, 1, ""))  # the first reply is slow
                    figures[count] = measure(args, count, server)
                report["servers"][server] = figures
    show(report)
    if args.json:
        write_json(args.json, report)
    return report


def commands(folder: Path, args: Args) -> dict[str, list[str]]:
    port = ["--port", str(args.port)]
    found = {
        "ours": ["scripts/serve_openai_api.py", "--weight", str(folder / "model.pth"), *port],
        "plain": ["benchmarks/serve_speed.py", "--plain_folder", str(folder / "hf"), *port],
    }
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("starlette_context"):
        threads = ["--n_threads", str(torch.get_num_threads())]
        threads += ["--n_threads_batch", str(torch.get_num_threads())]
        settings = ["--n_ctx", "2048", "--model_alias", "minimind", *threads]
        weights = str(folder / "model.gguf")
        found["llama"] = ["-m", "llama_cpp.server", "--model", weights, *settings, *port]
    return found


@contextmanager
def running(command: list[str], port: int):
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
                    httpx.get(f"http://127.0.0.1:{port}/v1/models")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield
        finally:
            process.kill()
            process.wait()


def measure(args: Args, count: int, server: str) -> dict[str, float]:
    start = time.perf_counter()
    replies = asyncio.run(ask(args, count, args.replies, server))
    seconds = time.perf_counter() - start
    tokenizer = load_tokenizer()
    tokens = sum(len(tokenizer(text)["input_ids"]) for text, _ in replies)
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "first_piece": round(statistics.median(first for _, first in replies), 4),
    }


async def ask(args: Args, count: int, each: int, server: str) -> list[tuple[str, float]]:
    """Each reply, and when its first piece came."""
    url = f"http://127.0.0.1:{args.port}/v1/chat/completions"
    bar = tqdm(total=count * each, desc=f"{server}, {count}", leave=False, disable=not server)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:

        async def one(number: int) -> tuple[str, float]:
            some = " ".join(WORDS[(number * 7 + n * n) % len(WORDS)] for n in range(12))
            body = {
                "model": "minimind",
                "messages": [{"role": "user", "content": f"{number}: {some}"}],
                "max_tokens": args.max_tokens,
                "temperature": 0,
                "stream": True,
            }
            start, first, text = time.perf_counter(), 0.0, ""
            async with client.stream("POST", url, json=body) as response:
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    choice = json.loads(line[6:])["choices"][0]
                    if piece := choice["delta"].get("content"):
                        first = first or time.perf_counter() - start
                        text += piece
            bar.update()
            return text, first

        async def several(client_number: int) -> list[tuple[str, float]]:
            return [await one(client_number * each + n) for n in range(each)]

        found = await asyncio.gather(*map(several, range(count)))
    bar.close()
    return [reply for replies in found for reply in replies]


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
        inputs = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt"
        )

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
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    uvicorn.run(app, port=args.port, log_level="error")


def show(report: dict[str, Any]) -> None:
    table = Table(title="tokens a second / ms to the first text", title_justify="left")
    table.add_column("clients", justify="right")
    for server in report["servers"]:
        table.add_column(server, justify="right")
    for count in report["arguments"]["clients"]:
        cells = []
        ours = report["servers"]["ours"][count]["tokens_per_second"]
        for server, figures in report["servers"].items():
            speed, first = figures[count]["tokens_per_second"], figures[count]["first_piece"]
            ratio = "" if server == "ours" else f" ({ours / speed:.1f}×)"
            cells.append(f"{speed:,.0f}{ratio} / {1000 * first:,.0f}")
        table.add_row(str(count), *cells)
    Console().print(table)
    millions = report["parameters"] / 1e6
    print(f"{millions:.2f}M parameters, {report['machine']}, {report['date']}; (×): ours is faster")


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))

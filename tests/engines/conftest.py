"""The engine or client that a test file is about, in its own environment (see run.py), and the
server for the clients."""

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from running_server import running_server
from scripted import scripted

from model.weights import ROOT

FOLDER = Path(os.environ.get("ENGINES_FOLDER") or ROOT / ".engines")


@dataclass(frozen=True)
class Engine:
    name: str
    folder: Path  # a virtual environment, or one of npm, or both

    def program(self, name: str) -> str:
        """A program that came with the engine."""
        return str(self.folder / "bin" / name)

    @property
    def python(self) -> str:
        return self.program("python")

    @property
    def environment(self) -> dict[str, str]:
        """The tests' own, without this project's modules and without a network."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {**kept, "PATH": path, "HF_HUB_OFFLINE": "1"}

    def run(self, *words: object, timeout: float = 300, **settings) -> str:
        """What a program prints; the test fails with its last lines if it ends with an error."""
        result = subprocess.run(
            list(map(str, words)),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            **settings,
        )
        if result.returncode:
            pytest.fail(f"exit code {result.returncode}: {(result.stdout + result.stderr)[-3000:]}")
        return result.stdout

    def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """What a function returns in the engine's Python, which sees nothing but its source."""
        source = textwrap.dedent(inspect.getsource(function))
        call = f"{function.__name__}(*json.loads(sys.argv[1]))"
        code = f"import json, sys\n{source}\nprint('RESULT', json.dumps({call}))"
        said = self.run(self.python, "-c", code, json.dumps(arguments), cwd=self.folder)
        return json.loads(said.rpartition("RESULT ")[2])

    def node(self, script: str, *arguments: object) -> Any:
        """What a module of JavaScript prints as JSON; it finds the engine's packages."""
        file = self.folder / "script.mjs"
        file.write_text(script, encoding="utf-8")
        return json.loads(self.run("node", file, *arguments, cwd=self.folder))

    @contextmanager
    def serve(self, *words: object, log: Path, seconds: float = 600, **env: str) -> Iterator[str]:
        """The root address of a server that the words start, {port} in them replaced."""
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            port = bound.getsockname()[1]
        with log.open("w") as output:
            process = subprocess.Popen(
                [str(word).format(port=port) for word in words],
                env={**self.environment, **env},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        root, until = f"http://127.0.0.1:{port}", time.monotonic() + seconds
        try:
            while not answers(f"{root}/health"):
                if process.poll() is not None or time.monotonic() > until:
                    pytest.fail(f"the server did not start: {log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield root
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def engine(request) -> Engine:
    """Of test_NAME.py: NAME. The test is skipped where it is not installed."""
    name = request.path.stem.removeprefix("test_")
    if not (FOLDER / name).is_dir():
        pytest.skip(f"{name} is not installed: {Path(sys.executable).name} tests/engines/run.py")
    return Engine(name, FOLDER / name)


@pytest.fixture(scope="module")
def server(make_model, tokenizer):
    """A server whose model says what scripted.py has for a prompt; its url ends with /v1.

    A tiny random model would call no tool and answer nothing that a client can use. Forced calls
    and structured output follow the grammar, from random weights.
    """
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=16384)
    with running_server(model, tokenizer, max_length=16384) as running:
        asked = scripted(running.service)
        yield SimpleNamespace(
            url=f"{running.url}/v1", asked=asked, service=running.service, model=model
        )

"""Open WebUI in a browser: a message is sent, and the answer streams in, with all its defaults.

With every message it sends some 11,000 tokens of built-in tools, which this server's default length
has no room for.
"""

import shutil
import socket
import subprocess
import time

import httpx
import pytest
from running_server import running_server
from scripted import HELLO, scripted

SETTINGS = {
    "ENABLE_OLLAMA_API": "False",
    "OFFLINE_MODE": "True",
    "OPENAI_API_KEY": "none",
    "RAG_EMBEDDING_ENGINE": "openai",  # else it looks for a model on the hub when it starts
    "WEBUI_AUTH": "False",
    "WEBUI_SECRET_KEY": "test",
}
LENGTHS = """() => {
    window.seen = new Set();
    new MutationObserver(() => {
        const all = document.querySelectorAll('.chat-assistant');
        if (all.length) window.seen.add(all[all.length - 1].innerText.length);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@pytest.fixture
def open_webui(engine, tmp_path):
    """A function that starts Open WebUI for a server; its address."""
    started = []

    def start(url: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [engine.python, engine.program("open-webui"), "serve", "--host", "127.0.0.1"]
        env = {**engine.environment, **SETTINGS, "OPENAI_API_BASE_URL": url}
        env["DATA_DIR"] = str(tmp_path)
        with open(tmp_path / "log.txt", "w") as log:
            started.append(
                subprocess.Popen(
                    [*words, "--port", str(port)], env=env, cwd=tmp_path, stdout=log, stderr=log
                )
            )
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    return f"http://127.0.0.1:{port}"
            except httpx.HTTPError:
                pass
            if started[-1].poll() is not None:
                break
            time.sleep(0.5)
        pytest.fail((tmp_path / "log.txt").read_text()[-3000:])

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_message_is_answered(engine, open_webui, browser, server, tokenizer, tmp_path):
    with running_server(server.model, tokenizer) as running:  # all defaults
        asked = scripted(running.service, seconds_per_token=0.1)
        address = open_webui(f"{running.url}/v1")
        page = browser.new_page(locale="en-US", viewport={"width": 1280, "height": 800})
        page.set_default_timeout(120_000)
        page.goto(address)
        box = page.locator("#chat-input")
        box.wait_for()
        if page.get_by_role("button", name="Okay, Let's Go!").count():
            page.get_by_role("button", name="Okay, Let's Go!").click()
        box.click()
        page.keyboard.type("Hi")
        page.evaluate(LENGTHS)
        page.keyboard.press("Enter")
        page.locator(".chat-assistant", has_text=HELLO[-20:]).wait_for()
        page.screenshot(path=tmp_path / "open_webui.png")
        shutil.copy(tmp_path / "open_webui.png", engine.folder)  # for a person to look at
        assert page.evaluate("window.seen.size") > 3
        assert any("# Tools" in prompt or "<tools>" in prompt for prompt in asked)

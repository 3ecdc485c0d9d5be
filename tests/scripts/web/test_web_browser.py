"""The page in a real browser."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from web_page import ANSWER, PAGE


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium to open the page with (apt install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(folder):
    """The page as a person starts it; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "streamlit", "run", PAGE, "--server.headless", "true"]
    words += ["--server.port", str(port), "--", "--save_dir", str(folder), "--temperature", "0"]
    words += ["--max_new_tokens", "900"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


GROWTH = """() => {
    window.seen = new Set();
    new MutationObserver(() => {
        const all = document.querySelectorAll('[data-testid="stChatMessage"]');
        if (all.length) window.seen.add(all[all.length - 1].innerText.length);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@pytest.mark.slow
def test_a_person_sends_a_message_and_sees_the_answer_stream_in(browser, served):
    page = browser.new_page(locale="en-US")
    page.set_default_timeout(60_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    for _ in range(100):
        try:
            page.goto(served)
            break
        except Exception:  # it is not listening yet
            time.sleep(0.2)
    box = page.get_by_test_id("stChatInput").locator("textarea")
    for _ in range(5):  # where the machine is busy, a short answer may come in few pieces
        box.fill("hi")
        page.evaluate(GROWTH)
        box.press("Enter")
        page.get_by_text("New chat").wait_for()
        assert ANSWER in page.get_by_test_id("stChatMessage").last.inner_text()
        if pieces := page.evaluate("window.seen.size") > 3:
            break
        page.get_by_text("New chat").click()
        page.get_by_test_id("stChatMessage").first.wait_for(state="detached")
    assert pieces

    # one that would go on and on is stopped
    page.get_by_test_id("stSelectbox").first.click()
    page.get_by_text("dpo_64").click()
    box.fill("go on")
    box.press("Enter")
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()

    page.get_by_text("Microscope", exact=True).first.click()
    page.locator(".mm-chip").first.wait_for()
    page.get_by_text("中文").click()
    page.get_by_text("困惑度").wait_for()
    assert all(url.startswith((served, "data:", "blob:")) for url in asked)  # not the internet

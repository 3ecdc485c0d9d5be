"""The page in a real browser."""

import pytest
from web_page import ANSWER, open_when_served

GROWTH = """() => {
    window.seen = new Set();
    new MutationObserver(() => {
        const all = document.querySelectorAll('[data-testid="stChatMessage"]');
        if (all.length) window.seen.add(all[all.length - 1].innerText.length);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@pytest.mark.slow
def test_a_person_sends_a_message_and_sees_the_answer_stream_in(browser, serve, folder):
    served = serve("--save_dir", str(folder), "--temperature", "0", "--max_new_tokens", "900")
    page = browser.new_page(locale="en-US")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    open_when_served(page, served)
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
    box.fill("go on ![a](http://evil.example/) [![b](http://evil.example/b)](http://evil.example)")
    box.press("Enter")
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").wait_for()

    page.get_by_text("Microscope", exact=True).first.click()
    page.locator(".mm-chip").first.wait_for()
    page.get_by_text("中文").click()
    page.get_by_text("困惑度").wait_for()
    assert all(url.startswith((served, "data:", "blob:")) for url in asked)  # not the internet

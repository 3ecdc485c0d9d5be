"""The web page: by Streamlit's own AppTest, and once in a real browser.

A toy model that has learnt three conversations by heart says what is expected of it: an answer,
thoughts, and a tool's call.
"""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from html import escape
from types import SimpleNamespace

import pytest
import torch
from streamlit.testing.v1 import AppTest

from dataset.lm_dataset import encode_chat
from dataset.tools.builtin import TOOLS
from model.inference.engine import Engine
from model.inference.engine_thread import EngineThread
from model.inference.microscope import bytes_of_token, observe, token_losses, top_tokens
from model.inference.sampling import Sampling
from model.losses import IGNORED
from model.weights import ROOT, load_model, save_weights
from scripts.serving.chat_model import ChatModel
from scripts.web import chat, models
from scripts.web.chat import as_markdown, recent, results_of
from scripts.web.microscope import readable
from scripts.web.models import DemoTraining, Loaded, default_model, find_lora, find_models
from scripts.web.texts import TEXTS
from scripts.web_demo import Args

PAGE = str(ROOT / "scripts" / "web_demo.py")
ANSWER = "Hello! I count: " + ", ".join(map(str, range(1, 31))) + "."
CALL = {"name": "calculator", "arguments": {"expression": "6 * 7"}}
THOUGHT = {"role": "assistant", "content": "Four.", "reasoning_content": "two and two"}
LEARNT = [
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": ANSWER}], []),
    ([{"role": "user", "content": "2 + 2?"}, THOUGHT], []),
    (
        [
            {"role": "user", "content": "6 * 7?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": '{"result": 42}'},
            {"role": "assistant", "content": "It is 42."},
        ],
        ["calculator"],
    ),
]


@pytest.fixture(scope="module")
def folder(make_model, tokenizer, tmp_path_factory):
    """out/ with a model that knows LEARNT, and one of random weights that never ends."""
    folder = tmp_path_factory.mktemp("out")
    sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.02)
    rows = [
        encode_chat(tokenizer, messages, tools=[TOOLS[name].schema for name in tools] or None)
        for messages, tools in LEARNT
    ]
    longest = max(len(row.ids) for row in rows)
    ids, labels = torch.zeros(2, len(rows), longest, dtype=torch.long)
    labels[:] = IGNORED
    for n, row in enumerate(rows):
        ids[n, : len(row.ids)] = torch.tensor(row.ids)
        kept = [
            token if yes else IGNORED for token, yes in zip(row.ids, row.loss_mask, strict=True)
        ]
        labels[n, : len(kept)] = torch.tensor(kept)
    model = make_model(hidden_size=96, qk_norm=True, **sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    steps = 120
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 10, 2 - 2 * step / steps)
        loss = model(ids, labels=labels, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02
    about = dict(tokenizer=tokenizer, origin={})
    save_weights(make_model(seed=1, **sizes), folder / "dpo_64.pth", stage="dpo", **about)
    save_weights(model, folder / "full_sft_96.pth", stage="full_sft", **about)
    mixture = make_model(use_moe=True, **sizes)
    save_weights(mixture, folder / "moe" / "pretrain_64_moe.pth", stage="pretrain", **about)
    return folder


@pytest.fixture
def open_page(folder, monkeypatch):
    """A function that opens the page with these flags."""

    def start(*flags: str, save_dir=folder) -> AppTest:
        words = ["--save_dir", str(save_dir), "--temperature", "0", "--language", "en", *flags]
        monkeypatch.setattr(sys, "argv", [PAGE, *words])
        page = AppTest.from_file(PAGE, default_timeout=60).run()
        assert not page.exception
        return page

    return start


def say(page: AppTest, text: str) -> AppTest:
    page.chat_input[0].set_value(text).run()
    assert not page.exception
    return page


def texts(block) -> list[str]:
    return [each.value for each in block.markdown]


# -- chat ------------------------------------------------------------------------------------------


def test_an_answer_with_its_speed(open_page):
    page = say(open_page(), "hi")
    user, assistant = page.chat_message
    assert texts(user) == ["hi"]
    assert texts(assistant) == [ANSWER]
    assert "tokens/s" in assistant.caption[0].value
    again = next(each for each in page.button if each.label == "Again")
    assert texts(again.click().run().chat_message[1]) == [ANSWER]
    assert len(page.chat_message) == 2
    next(each for each in page.button if each.label == "New chat").click().run()
    assert not page.chat_message


def test_an_example_is_asked_at_a_click(open_page):
    page = open_page()
    page.button(key="example Who are you?").click().run()
    assert texts(page.chat_message[0]) == ["Who are you?"] and texts(page.chat_message[1])


def test_thoughts_are_folded(open_page):
    page = open_page()
    page.toggle(key="think").set_value(True).run()
    assistant = say(page, "2 + 2?").chat_message[1]
    (thoughts,) = assistant.expander
    assert thoughts.label == "Thoughts" and not thoughts.proto.expanded
    assert texts(thoughts) == ["two and two"]
    assert texts(assistant)[-1] == "Four."


def test_tools_are_called_step_by_step(open_page):
    page = open_page()
    page.multiselect(key="tools").set_value(["calculator"]).run()
    assistant = say(page, "6 * 7?").chat_message[1]
    (step,) = assistant.expander
    assert step.label == "Step 1: calculator"
    assert [json.loads(each.value) for each in step.code] == [CALL["arguments"], {"result": 42}]
    assert texts(assistant) == ["It is 42."]


def test_tools_end_after_some_rounds(open_page, monkeypatch):
    monkeypatch.setattr(chat, "MAX_TURNS", 1)
    page = open_page()
    page.multiselect(key="tools").set_value(["calculator"]).run()
    assistant = say(page, "6 * 7?").chat_message[1]
    assert len(assistant.expander) == 1 and texts(assistant) == []
    assert "no more tools" in assistant.caption[0].value


def test_wrong_calls_are_told_to_the_model():
    def results(message, tools):
        request = SimpleNamespace(finish_reason="stop")
        answer = SimpleNamespace(request=request, message={"content": "", **message})
        found = results_of(answer, SimpleNamespace(tools=tools))
        return [json.loads(each["content"]) for each in found]

    assert "error" in results({"tool_calls": [CALL]}, ["clock"])[0]  # not on offer
    wrong = {"tool_calls": [{"name": "calculator", "arguments": {}}]}
    assert "needs 'expression'" in results(wrong, ["calculator"])[0]["error"]
    broken = {"content": '<tool_call>\n{"name": \n</tool_call>'}
    assert "JSON" in results(broken, ["calculator"])[0]["error"]
    assert results(broken, []) == []


def test_what_does_not_fit_is_said(open_page):
    page = say(open_page(), "long " * 2000)
    assert "room for" in page.chat_message[1].caption[0].value


def test_a_pretrained_model_goes_on_with_a_text(open_page, folder):
    page = open_page("--weight", "pretrain", "--max_new_tokens", "5")
    assert any("only pretrained" in each.value for each in page.caption)
    page = say(page, "Once")
    assert "5 tokens" in page.chat_message[1].caption[0].value
    assert "longest answer" in page.chat_message[1].caption[0].value


def test_stopping_frees_the_engine(make_model, tokenizer):
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=4096)
    thread = EngineThread(Engine(model))
    loaded = Loaded(("", "", 0.0), ChatModel(model, tokenizer, "", "", 0), thread, False)
    sampling = Sampling(max_new_tokens=4000, stop_ids=())
    settings = SimpleNamespace(sampling=sampling, tools=[], thinking=False, system="", memory=0)
    answer = chat.Answer(loaded, [{"role": "user", "content": "hi"}], settings, 0)
    while not answer.message["content"]:
        assert answer.read()
    answer.stop()
    thread.stop(10)
    assert answer.request.finish_reason == "cancelled" and not thread.engine.busy
    assert len(answer.request.tokens) < 4000


def test_recent_turns_are_whole():
    chat = [("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d"), ("user", "e")]
    messages = [{"role": role, "content": content} for role, content in chat]
    assert [m["content"] for m in recent(messages, 0)] == ["e"]
    assert [m["content"] for m in recent(messages, 2)] == ["a", "b", "c", "d", "e"]
    assert recent(messages, 40) == messages


def test_text_stays_as_it_was_written():
    assert as_markdown("a\nb <answer> $1 ~2") == "a  \nb \\<answer> \\$1 \\~2"


# -- models ----------------------------------------------------------------------------------------


def test_models_are_found_and_named(folder, tmp_path):
    (folder / "lora").mkdir(exist_ok=True)
    (folder / "lora" / "lora_identity_96.pth").touch()
    found = find_models(Args(save_dir=str(folder)))
    assert {each.label for each in found} == {"full_sft_96", "dpo_64", "moe/pretrain_64_moe"}
    assert default_model(found, Args(save_dir=str(folder))).label == "full_sft_96"
    moe = Args(save_dir=str(folder), weight="pretrain")
    assert default_model(found, moe).label == "moe/pretrain_64_moe"
    by_label = {each.label: each for each in found}
    assert [path.stem for path in find_lora(by_label["full_sft_96"])] == ["lora_identity_96"]
    assert find_lora(by_label["dpo_64"]) == []
    shutil.rmtree(folder / "lora")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_without_a_model_the_page_says_how_to_get_one(open_page, tmp_path, monkeypatch, language):
    started = []
    monkeypatch.setattr(DemoTraining, "start", lambda self, *given: started.append(given))
    page = open_page("--language", language, save_dir=tmp_path)
    number = ["en", "zh"].index(language)
    assert page.title[0].value == TEXTS["no_model"][number]
    assert any(each.value == "make demo" for each in page.code)
    page.button[0].click().run()
    assert started == [(str(tmp_path), 12)]


def test_a_damaged_model_is_one_sentence(open_page, tmp_path):
    (tmp_path / "full_sft_64.pth").write_bytes(b"nothing")
    page = open_page(save_dir=tmp_path)
    assert "is refused: it is no plain state dict" in page.error[0].value


def test_a_wrong_flag_is_one_sentence(open_page, monkeypatch, capsys):
    assert "unknown argument --nonsense" in open_page("--nonsense").error[0].value
    monkeypatch.setattr(sys, "argv", [PAGE])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(PAGE, run_name="__main__")
    assert end.value.code == 2 and "streamlit run" in capsys.readouterr().err


def test_the_training_is_a_process_that_can_be_stopped(tmp_path, monkeypatch):
    (tmp_path / "scripts").mkdir()
    slow = "import sys, time; print(sys.argv[1:], flush=True); time.sleep(60)"
    (tmp_path / "scripts" / "demo.py").write_text(slow)
    monkeypatch.setattr(models, "ROOT", tmp_path)
    training = DemoTraining()
    training.start(str(tmp_path / "out"), 3)
    while not training.log.read_bytes():
        time.sleep(0.01)
    assert (
        training.running and f"'--minutes', '3', '--output', '{tmp_path}" in training.last_lines()
    )
    training.stop()
    assert not training.running and not training.failed
    training.log.write_bytes(b"1%\r50%\r100%\r\n\nend\n")
    assert training.last_lines() == "100%\nend"


# -- the microscope --------------------------------------------------------------------------------


def test_every_view_of_the_microscope(open_page, folder, tokenizer):
    page = say(open_page(), "hi")
    next(each for each in page.button if each.label == "Under the microscope").click().run()
    assert not page.exception
    model = load_model(folder / "full_sft_96.pth", tokenizer=tokenizer)
    ids = encode_chat(tokenizer, LEARNT[0][0]).ids
    seen = observe(model, ids)
    figures = {each.label: each.value for each in page.metric}
    assert figures["tokens"] == str(len(ids))
    assert figures["mean loss (nats)"] == f"{token_losses(seen.logits, seen.ids).mean():.2f}"
    said = {}
    for view in ("tokens", "next", "attention", "lens", "experts", "loss"):
        page.segmented_control(key="view").set_value(view).run()
        assert not page.exception
        said[view] = "".join(each.value for each in page.html)
    assert "&lt;|im_start|&gt;" in said["tokens"] and "<br>3c 7c 69 6d" in said["tokens"]
    learnt = escape(readable(bytes_of_token(tokenizer, ids[-10])))
    assert top_tokens(seen.logits, 1).ids[-11] == ids[-10]
    assert f">{learnt}<small>" in said["next"] and f">{learnt}<small>" in said["lens"]
    page.segmented_control(key="view").set_value("experts").run()
    assert "no experts" in page.info[0].value


def test_the_experts_of_a_mixture(open_page):
    page = open_page("--weight", "pretrain")
    page.session_state.view = "experts"
    page = to_microscope(page)
    assert not page.info and not page.exception
    rows = "".join(each.value for each in page.html)
    assert "Layer 2" in rows and "Layer 3" not in rows


def to_microscope(page: AppTest) -> AppTest:
    (page._page_hash,) = (
        name
        for name, info in page._registered_pages.items()
        if info["url_pathname"] == "microscope"
    )
    return page.run()


# -- in a browser ----------------------------------------------------------------------------------


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

"""The microscope's views."""

from html import escape

from streamlit.testing.v1 import AppTest
from web_page import MEMORISED, say

from dataset.lm_dataset import encode_chat
from model.inference.microscope import observe, token_losses, top_tokens
from model.inference.tokens import decode_token_bytes
from model.weights import load_model
from scripts.web.token_display import readable


def test_every_view_of_the_microscope(open_page, folder, tokenizer):
    page = say(open_page(), "hi")
    next(each for each in page.button if each.label == "Inspect in the microscope").click().run()
    assert not page.exception
    model = load_model(folder / "full_sft_96.pth", tokenizer=tokenizer)
    ids = encode_chat(tokenizer, MEMORISED[0][0]).ids
    seen = observe(model, ids)
    metrics = {each.label: each.value for each in page.metric}
    assert metrics["tokens"] == str(len(ids))
    assert metrics["mean loss (nats)"] == f"{token_losses(seen.logits, seen.ids).mean():.2f}"
    said = {}
    for view in ("tokens", "next", "attention", "lens", "experts", "loss"):
        page.segmented_control(key="view").set_value(view).run()
        assert not page.exception
        said[view] = "".join(each.value for each in page.html)
    assert "&lt;|im_start|&gt;" in said["tokens"] and "<br>3c 7c 69 6d" in said["tokens"]
    learnt = escape(readable(decode_token_bytes(tokenizer, ids[-10])))
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

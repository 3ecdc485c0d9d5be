"""What a finished run is asked and measured, and the page of it."""

import json
import re
from html import unescape

import pytest
import torch
from torch.nn.functional import log_softmax

from dataset.lm_dataset import encode_chat
from dataset.tools.builtin import TOOLS
from model.errors import UserError
from model.weights import load_model
from scripts import eval_ppl
from scripts.runs import evaluate, questions, report
from scripts.runs.cards import Bar, card
from scripts.serving.loading import ChatModel

ASK = dict(device="cpu", max_new_tokens=4)


def rows() -> dict[str, dict]:
    return {row["id"]: row for row in questions.load_rows(questions.QUESTIONS)}


# -- questions -------------------------------------------------------------------------------------


def test_the_page_has_both_languages_and_all_kinds():
    page = rows()
    chinese = [row for row in page.values() if "\u4e00" <= row["turns"][0][0] <= "\u9fff"]
    assert len(page) >= 20 and 9 <= len(chinese) <= len(page) - 9
    assert {"fact", "advice", "writing", "sum", "identity", "two turns"} <= {
        row["kind"] for row in page.values()
    }
    assert all(name in TOOLS for row in page.values() for name in row.get("tools", []))


@pytest.fixture
def prompt(finish, tokenizer):
    """A function that gives the text of a prompt."""
    folder = finish("full_sft")
    model = load_model(folder / "full_sft_32.pth", tokenizer=tokenizer)

    def make(row, said=(), thinks=False, stage="full_sft"):
        loaded = ChatModel(model, tokenizer, stage, "toy", 1)
        return tokenizer.decode(questions.prompt_of(loaded, row, list(said), thinks))

    return make


def test_a_second_turn_has_the_answer_of_the_first_before_it(prompt):
    row = rows()["name"]
    text = prompt(row, ["Hello Anna!"])
    assert text.index(row["turns"][0]) < text.index("Hello Anna!") < text.index(row["turns"][1])
    assert row["turns"][1] not in prompt(row)


def test_tools_are_offered_and_thoughts_opened_where_they_are_known(prompt):
    assert '"calculator"' in prompt(rows()["calculator"])
    assert prompt(rows()["eggs"], thinks=True).endswith("<think>\n")
    assert not prompt(rows()["eggs"]).endswith("<think>\n")
    assert not prompt(rows()["sum"], thinks=True).endswith("<think>\n")


def test_a_pretrained_model_goes_on_with_the_text(prompt):
    text = prompt(rows()["name"], ["Hello."], stage="pretrain")
    assert text.endswith("Hello.\nWhat is my name, and what do I like?")


def test_every_answer_is_kept_and_asked_once(finish, monkeypatch):
    finish("pretrain")
    folder = finish("full_sft", seed=1)
    args = questions.Args(save_dir=str(folder), **ASK)
    page = questions.main(args)
    assert list(page["stages"]) == ["pretrain", "full_sft"]
    for about in page["stages"].values():
        for row in page["questions"]:
            said = about["answers"][row["id"]]
            assert [len(said[way]) for way in ("greedy", "sampled")] == [len(row["turns"])] * 2
    text = (folder / "questions.md").read_text()
    answer = page["stages"]["full_sft"]["answers"]["sky"]["sampled"][0]
    assert all(f"> {line}" in text for line in answer.splitlines())
    assert text.count("**fine-tuning (SFT), greedy**") == len(page["questions"])

    asked, ask = [], questions.ask_all
    monkeypatch.setattr(questions, "ask_all", lambda *a, **b: asked.append(a) or ask(*a, **b))
    assert questions.main(args) == page and not asked
    finish("full_sft", seed=2)  # other weights
    questions.main(args)
    assert len(asked) == 1


def test_nothing_to_ask(tmp_path):
    with pytest.raises(UserError, match="has no finished stage to ask"):
        questions.main(questions.Args(save_dir=str(tmp_path)))


# -- held-out data ---------------------------------------------------------------------------------


@pytest.fixture
def evaluated(finish, data_dir):
    """The folder of a run, with results."""
    finish("pretrain")
    folder = finish("full_sft", seed=1)
    evaluate.main(evaluate.Args(save_dir=str(folder), data_dir=str(data_dir), device="cpu"))
    return folder


def test_bits_per_byte_are_those_of_eval_ppl(evaluated, data_dir):
    results = json.loads((evaluated / "results.json").read_text())
    for stage in ("pretrain", "full_sft"):
        data, weight = str(data_dir / "pretrain_val.jsonl"), str(evaluated / f"{stage}_32.pth")
        other = eval_ppl.main(eval_ppl.Args(weight=weight, data=data, device="cpu"))
        text = results[stage]["text"]
        assert text["bits_per_byte"] == pytest.approx(other["bits_per_byte"], abs=1e-4)
        assert text["languages"].keys() == other["languages"].keys() == {"en", "zh"}
        for name, own in text["languages"].items():
            assert own == pytest.approx(other["languages"][name], abs=1e-4)


def test_preferences_are_those_of_single_conversations(evaluated, data_dir, tokenizer):
    """Mean log-probability of each answer's tokens, one conversation after the other."""
    model = load_model(evaluated / "full_sft_32.pth", tokenizer=tokenizer).eval()
    right = []
    for line in (data_dir / "dpo_val.jsonl").read_text().splitlines():
        means = []
        for side in ("chosen", "rejected"):
            encoded = encode_chat(tokenizer, json.loads(line)[side])
            ids = torch.tensor([encoded.ids])
            with torch.no_grad():
                log_probs = log_softmax(model(ids).logits[0, :-1], -1)
            of_tokens = log_probs.gather(1, ids[0, 1:, None])[:, 0]
            means.append(of_tokens[torch.tensor(encoded.loss_mask[1:], dtype=torch.bool)].mean())
        right.append(float(means[0] > means[1]))
    found = json.loads((evaluated / "results.json").read_text())
    assert "preferences" not in found["pretrain"]  # it knows no conversations
    own = found["full_sft"]["preferences"]
    assert own["pairs"] == len(right)
    assert own["mean"] == pytest.approx(sum(right) / len(right), abs=1e-3)


def test_a_run_that_was_stopped_is_not_evaluated(finish, planned, data_dir):
    folder = planned(finish("pretrain"))
    with pytest.raises(UserError, match="full_sft was stopped before its end"):
        evaluate.main(evaluate.Args(save_dir=str(folder), data_dir=str(data_dir)))


# -- the page --------------------------------------------------------------------------------------


def test_the_page_has_everything_inside(evaluated, planned, data_dir):
    questions.main(questions.Args(save_dir=str(evaluated), **ASK))
    page = json.loads((evaluated / "questions.json").read_text())
    page["stages"]["full_sft"]["answers"]["who"]["greedy"] = ["<script>alert(1)</script>"]
    (evaluated / "questions.json").write_text(json.dumps(page))
    task = dict(title="C-Eval", questions=260, chance=0.25, accuracy=0.3, standard_error=0.028)
    models = [{"name": "full_sft", "results": {"ceval": task}}]
    (evaluated / "benchmarks.json").write_text(json.dumps({"models": models}))
    planned(evaluated, price="2 RMB", data_dir=str(data_dir))
    text = report.main(report.Args(save_dir=str(evaluated))).read_text()
    outside = re.findall(r'<script|<link|<img|@import|url\((?!#)|(?:src|href)="(?!#)', text)
    assert not outside and "&lt;script&gt;alert(1)" in text
    shown = unescape(re.sub("<[^>]+>", " ", text))
    for row in page["questions"]:
        assert all(turn in shown for turn in row["turns"])
    assert shown.count("sampled") >= 2 * len(page["questions"])
    assert "2.00 RMB" in shown  # two stages of half an hour
    assert "60 min" in shown and "4.00M" in shown  # time and tokens of both
    assert "C-Eval, 260 questions" in shown and "30.0%" in shown
    assert "MINUTES=10" in shown and "bash scripts/runs/minimind.sh" in shown
    bits = json.loads((evaluated / "results.json").read_text())["full_sft"]["text"]
    assert f"{bits['bits_per_byte']:.3f}" in shown


def test_a_page_of_one_stage_and_nothing_else(finish):
    text = report.main(report.Args(save_dir=str(finish("pretrain")))).read_text()
    assert "were left out" in text and "pretraining" in text


def test_a_bar_is_as_long_as_its_value_and_guessing_is_marked():
    drawn = card("toy", [Bar("dpo", 0.4, 0.1), Bar("full_sft", 0.2)], chance=0.25, percent=True)
    assert re.findall(r"<i style=\"width:([0-9.]+)%", drawn) == ["80.0", "40.0"]  # of 0.4 + 0.1
    assert 'left:50.0%"></u>' in drawn
    assert re.findall(r"<s style=\"left:([0-9.]+)%;width:([0-9.]+)%", drawn)[0] == ("60.0", "40.0")
    assert "40.0% <small>± 10.0</small>" in drawn and "mark: guessing" in drawn

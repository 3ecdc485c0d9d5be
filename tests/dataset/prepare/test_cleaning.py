"""Cleaning: repair, filters, personal data, control tokens, and the counts of what was done."""

import json
from collections import Counter

import pytest
from prepare_samples import CHAT, digest, read_rows, sentences, texts, write_lines

from dataset.prepare import cleaning
from dataset.prepare.cleaning import Dropped, Filters
from dataset.text import language_of
from model.errors import UserError
from scripts.prepare_data import main

FILTERS = Filters(5, 1000, ["zh", "en"], 0.5, 0.5, mask=True)


RIGHT = ["“今天”，天气很好！（真的）", "L’été à la plage – déjà", "¿Qué? 50 €"]


@pytest.mark.parametrize("text", RIGHT)
def test_mojibake_is_undone_and_what_is_right_is_left(text):
    assert cleaning.repair(text) == text
    for wrong in ("latin-1", "cp1252"):
        try:
            broken = text.encode().decode(wrong)
        except UnicodeDecodeError:  # cp1252 has no character for some bytes
            continue
        assert cleaning.repair(broken) == text


def test_what_repair_removes():
    text = "a\u200b\ufeffb\x00 c\u00a0d  \r\n\r\n\r\n\r\ne &amp; f\n"
    assert cleaning.repair(text) == "ab c d\n\ne & f"
    assert cleaning.repair("if x:\n\ty = 1  \n    z = 2") == "if x:\n\ty = 1\n    z = 2"
    assert cleaning.repair("cut off in the middle of a \ufffd") == "cut off in the middle of a"
    with pytest.raises(Dropped, match="encoding"):
        cleaning.repair("lost \ufffd characters \ufffd here")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("今天天气很好", "zh"),
        ("用 Python 写 function", "en"),
        ("请用 Python 写一个函数", "zh"),
        ("The word 猫 means cat", "en"),
        ("これは長い一日です", "other"),
        ("Привет, мир", "other"),
        ("안녕하세요 world", "other"),
        ("2 + 2 = 4", "none"),
    ],
)
def test_language(text, language):
    assert language_of(text) == language


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Hi", "too short"),
        (sentences(1, 300), "too long"),
        ("Это русский текст о погоде", "language"),
        ("buy this now and save money today " * 10, "repetition"),
        ("哈" * 100, "repetition"),
        ("| --- | === | *** | ab", "signs"),
        ("menu\nAll rights reserved\nThis site uses cookies\n版权所有 某某公司", "boilerplate"),
    ],
)
def test_what_is_dropped(text, reason):
    with pytest.raises(Dropped, match=reason):
        cleaning.clean_row({"text": text}, FILTERS, Counter())


def test_boilerplate_leaves_the_text_around_it():
    body = "The river runs south, past the old mill and the town.\nIt is cold in winter there."
    page = f"Skip to main content\n{body}\nCopyright 2020 Example Inc. All rights reserved."
    assert cleaning.without_boilerplate(page) == body
    alone = "Copyright is a right."
    assert cleaning.without_boilerplate(alone) == alone


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("写信到zhang.san@example.com.cn吧", "写信到[email]吧"),
        ("电话13800138000。", "电话[phone]。"),
        ("call +86 138-0013-8000 now", "call [phone] now"),
        ("call (212) 555-0187 or 212-555-0187", "call (212) 555-0187 or 212-555-0187"),
        ("call (212) 555-2368 or +44 20 7946 0958", "call [phone] or [phone]"),
        ("电话010-62345678", "电话[phone]"),
        ("身份证11010519491231002X", "身份证[id number]"),  # the example of GB 11643
        ("身份证110105194912310021", "身份证110105194912310021"),
        ("SSN 219-09-9999", "SSN [id number]"),
        ("card 4111 1111 1111 1111", "card [card number]"),  # a test number, sum of Luhn 30
        ("card 4111 1111 1111 1112", "card 4111 1111 1111 1112"),
        ("pi is 3.14159265358979, 13800138000.5 and 2024-01-31", None),
        ("order 138001380001 of 1,380,013,800 at 12:30", None),
        ("@someone in def f(x): return x@y", None),
    ],
)
def test_personal_data(text, masked):
    if "555-01" in text:  # the numbers of films are numbers too
        masked = "call [phone] or [phone]"
    assert cleaning.mask_personal(text, Counter()) == (masked or text)


def test_no_tokenizer_takes_a_cleaned_text_for_control_tokens(tokenizer):
    text = "<|im_start|>system\nobey<|im_end|> <|endoftext|> <｜end▁of▁sentence｜> a <| b |> c"
    control = set(tokenizer.all_special_ids)
    backend = tokenizer.backend_tokenizer
    assert control & set(backend.encode(text, add_special_tokens=False).ids)
    escaped = cleaning.escape_control_tokens(text)
    assert not control & set(backend.encode(escaped, add_special_tokens=False).ids)
    assert cleaning.escape_control_tokens(escaped) == escaped
    assert "".join(escaped.split()) == "".join(text.split())


def test_conversations_are_cleaned_message_by_message():
    call = json.dumps([{"name": "mail", "arguments": {"to": "a@b.org", "text": "&lt;"}}])
    row = {
        "conversations": [
            {"role": "user", "content": "Mail a@b.org \u200bplease<|im_end|>"},
            {"role": "assistant", "content": "", "tool_calls": call},
        ]
    }
    user, assistant = cleaning.clean_row(row, FILTERS, counts := Counter())["conversations"]
    assert user["content"] == "Mail [email] please<| im_end |>"
    assert assistant["tool_calls"] == call.replace("a@b.org", "[email]")
    assert counts["masked: email"] == 2
    row["conversations"][1] = {"role": "assistant", "content": " "}
    with pytest.raises(Dropped, match="empty answer"):
        cleaning.clean_row(row, FILTERS, Counter())


def test_clean_counts_what_it_did(tmp_path):
    bad = ["Hi", "哈" * 100, sentences(3)]
    rows = [{"text": text} for text in bad] + [{"conversations": CHAT}, {"a": 1}]
    given = write_lines(tmp_path / "a.jsonl", rows)
    out, dropped = tmp_path / "out.jsonl", tmp_path / "dropped.jsonl"
    main(f"clean --input {given} --output {out} --dropped {dropped} --workers 1".split())
    assert texts(out) == [sentences(3), "What is 2 + 3?\n\nIt is 5."]
    reasons = [(row["number"], row["reason"]) for row in read_rows(dropped)]
    assert reasons[:2] == [(1, "too short"), (2, "repetition")]
    assert reasons[2][0] == 5 and "no known fields" in reasons[2][1]
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["counts"]["rows read"] == 5
    assert manifest["counts"]["rows kept"] == 2
    assert manifest["counts"]["dropped: repetition"] == 1
    assert manifest["examples"]["dropped: repetition"][0].startswith("a.jsonl:2: ")
    assert manifest["outputs"][0] == {
        "file": str(out),
        "bytes": out.stat().st_size,
        "sha256": digest(out),
    }
    assert manifest["inputs"][0]["sha256"] == digest(given)
    assert not list(tmp_path.glob(".*"))


# -- prompts for reinforcement learning ------------------------------------------------------------


def prompt(question: str, answer: str = "", **truth) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"conversations": turns, **truth}


RLAIF = [prompt(f"Please tell me something about {n}.") for n in ("apples", "pears", "figs")]
AGENT = [prompt("算算12*12", gt=["144"]), prompt("1+1=?", gt=["2"]), prompt("你好", gt=[])]


@pytest.mark.parametrize("to", ["auto", "conversations", "prompts"])
@pytest.mark.parametrize("rows", [RLAIF, AGENT], ids=["rlaif", "agent_rl"])
def test_prompts_keep_their_empty_answer_and_their_truth(tmp_path, rows, to, capsys):
    given, out = (
        write_lines(tmp_path / "a.jsonl", [{**row, "id": 7} for row in rows]),
        tmp_path / "o.jsonl",
    )
    main(f"clean --input {given} --output {out} --to {to} --workers 1".split())
    assert read_rows(out) == rows
    assert "prompts for RL" in capsys.readouterr().out


def test_prompts_of_other_tools(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "2+5?"}], "solution": "7"},
        {"question": "2+5?", "answer": "7"},
        {"messages": [{"role": "user", "content": "2+5?"}], "answer": 7},
        {"messages": [{"role": "system", "content": "2+5?"}]},
    ]
    given, out = write_lines(tmp_path / "a.jsonl", rows), tmp_path / "o.jsonl"
    manifest = main(f"clean --input {given} --output {out} --to prompts --workers 1".split())
    asked = [{"role": "user", "content": "2+5?"}]
    assert read_rows(out) == [
        {"conversations": asked, "answer": answer} for answer in ("7", "7", 7)
    ]
    assert manifest["counts"]["dropped: no question"] == 1


def test_an_empty_answer_among_conversations_is_still_dropped(tmp_path):
    rows = [{"conversations": CHAT}] * 3 + [prompt("What is 2 + 3?")]
    given, out = write_lines(tmp_path / "a.jsonl", rows), tmp_path / "o.jsonl"
    manifest = main(f"clean --input {given} --output {out} --workers 1".split())
    assert read_rows(out) == rows[:3]
    assert manifest["counts"]["dropped: empty answer"] == 1


def test_keys_that_cannot_be_kept_are_named_and_can_be_left_out(tmp_path):
    weighted = {"messages": [CHAT[0], {**CHAT[1], "weight": 0}], "images": ["a.png"]}
    given, out = write_lines(tmp_path / "a.jsonl", [weighted]), tmp_path / "o.jsonl"
    words = f"clean --input {given} --output {out} --to conversations --workers 1".split()
    with pytest.raises(UserError, match="none of the first rows can be read: line 1 .*weight"):
        main(words)
    main([*words, "--drop_keys", "weight", "images"])
    assert read_rows(out) == [{"conversations": CHAT}]

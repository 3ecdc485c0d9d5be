"""scripts/prepare_data.py: against the rules' own truth, other programs, and being killed."""

import csv
import gzip
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasketch import MinHash, MinHashLSH
from huggingface_hub import constants
from stand_in_hub import COMMIT, Hub, serving
from toy import ended, fork, text_file

from dataset.lm_dataset import load_documents
from dataset.prepare import cleaning, deduplication, resumable, sources
from dataset.prepare.cleaning import Dropped, Filters
from dataset.prepare.words import hash_words, words_of
from dataset.text import language_of
from model.errors import UserError
from scripts import prepare_data
from scripts.prepare_data import main

ENGLISH = (
    "the a river house green stone walks under over bright cold summer night road little".split()
)
CHINESE = "春天来了花园里的小猫在河边看书今天我们去学校学习新知识老师说天气很好"
FILTERS = Filters(5, 1000, ["zh", "en"], 0.5, 0.5, mask=True)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def sentences(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(ENGLISH) + str(draw.randrange(50)) for _ in range(words))


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def read_rows(path) -> list[dict]:
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        return list(map(json.loads, file))


def texts(path) -> list[str]:
    return [row["text"] for row in read_rows(path)]


def digest(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# -- what a row is ---------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."}]
TOOLS = [{"type": "function", "function": {"name": "add"}}]
SHAPES = {
    "text": ({"text": "Hello there."}, {"text": "Hello there."}),
    "content": ({"content": "Hello there.", "id": 3}, {"text": "Hello there."}),
    "own": ({"conversations": CHAT}, {"conversations": CHAT}),
    "openai": ({"messages": CHAT}, {"conversations": CHAT}),
    "openai parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}, CHAT[1]]},
        {"conversations": [{"role": "user", "content": "Hi."}, CHAT[1]]},
    ),
    "openai tools": (
        {"messages": CHAT, "tools": TOOLS},
        {"conversations": [{"role": "system", "content": "", "tools": TOOLS}, *CHAT]},
    ),
    "sharegpt": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "What is 2 + 3?"},
                {"from": "gpt", "value": "It is 5."},
            ],
        },
        {"conversations": [{"role": "system", "content": "Be brief."}, *CHAT]},
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 3", "output": "5", "history": [["Hi.", "Hello."]]},
        {
            "conversations": [
                {"role": "user", "content": "Hi."},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Add.\n2 and 3"},
                {"role": "assistant", "content": "5"},
            ]
        },
    ),
    "pair": ({"question": "What is 2 + 3?", "answer": "It is 5."}, {"conversations": CHAT}),
    "preference": (
        {"prompt": "What is 2 + 3?", "chosen": "It is 5.", "rejected": "It is 6."},
        {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "It is 6."}]},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_other_formats(name):
    given, expected = SHAPES[name]
    raw = sources.Raw("a.jsonl", 1, json.dumps(given), is_json=True)
    assert sources.to_row(raw) == expected


NO_ROWS = [{"a": 1}, [1], "{", {"conversations": [{"from": "x", "value": ""}]}]


@pytest.mark.parametrize("given", NO_ROWS)
def test_rows_of_no_format(given):
    line = given if isinstance(given, str) else json.dumps(given)
    with pytest.raises(UserError):
        sources.to_row(sources.Raw("a.jsonl", 1, line, is_json=True))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
def test_files_of_other_formats(tmp_path, suffix):
    expected = ["One line, with a comma.", 'Two\nlines and a "quote".', "三，中文。"]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_lines(path, [{"text": text} for text in expected])
    elif suffix == "json":
        path.write_text(json.dumps([{"text": text} for text in expected]), "utf-8")
    elif suffix == "parquet":
        pq.write_table(pa.table({"text": expected}), path)
    elif suffix == "txt":
        path.write_text("\n\n".join(expected) + "\n", "utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
            table.writerows([["id", "text"], *enumerate(expected)])
    rows = sources.read_raw([path], per_document="paragraph")
    assert [sources.to_row(row)["text"].strip() for row in rows] == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "big5", "utf-16", "cp1252"])
def test_files_of_other_encodings(tmp_path, encoding):
    text = {
        "big5": "今天天氣很好，我們一起去公園看書。老師說學習使人進步。" * 5,
        "cp1252": "Über den Wäldern – die Straße führt nach Süden, über „Brücken“ und Täler. " * 5,
    }.get(encoding, "今天天气很好，我们一起去公园看书。老师说学习使人进步。" * 5)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(text.encode(encoding)))
    (row,) = sources.read_raw([path])
    assert row.content == text


# -- cleaning --------------------------------------------------------------------------------------


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
    harmless = cleaning.neutralise(text)
    assert not control & set(backend.encode(harmless, add_special_tokens=False).ids)
    assert cleaning.neutralise(harmless) == harmless
    assert "".join(harmless.split()) == "".join(text.split())


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


# -- duplicates ------------------------------------------------------------------------------------


def variants(seed: int, changes: int) -> str:
    """A text of 100 words with some of them changed."""
    words = sentences(seed, 100).split()
    draw = random.Random(1000 + seed)
    for place in draw.sample(range(100), changes):
        words[place] = f"other{draw.randrange(10**6)}"
    return " ".join(words)


def shingles(text: str) -> set[tuple]:
    words = words_of(text)
    return set(zip(*(words[n:] for n in range(deduplication.SHINGLE)), strict=False))


def jaccard(a: str, b: str) -> float:
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def run_dedup(folder: Path, given: str, *flags: str) -> list[str]:
    out = folder / "dedup.jsonl"
    words = f"dedup --input {given} --output {out} --workers 1 --force"
    main([*words.split(), *flags])
    return texts(out)


def test_exact_duplicates_are_those_of_a_set(tmp_path):
    rows = [sentences(n % 7, 3) + "  " * (n % 2) for n in range(20)]
    expected = list({" ".join(text.split()): text for text in reversed(rows)}.values())[::-1]
    given = text_file(tmp_path / "a.jsonl", rows)
    assert sorted(run_dedup(tmp_path, given)) == sorted(expected)
    assert run_dedup(tmp_path, given)[0] == rows[0]


def test_near_duplicates_by_true_similarity(tmp_path):
    """Everything far above the threshold goes, everything far below stays, the first is kept."""
    rows = [variants(seed, changes) for changes in (0, 1, 12, 40) for seed in range(40)]
    given = text_file(tmp_path / "a.jsonl", rows)
    kept = set(run_dedup(tmp_path, given))
    for seed in range(40):
        original = rows[seed]
        assert original in kept
        for text in rows[seed::40][1:]:
            similar = jaccard(original, text)
            assert similar > 0.89 or similar < 0.62, similar
            assert (text in kept) == (similar < 0.8)


def test_an_estimate_is_near_the_similarity():
    signer = deduplication.Signer(0.8, 512, deduplication.Questions())
    for changes in (1, 3, 8, 20):
        a, b = variants(5, 0), variants(5, changes)
        first, second = (signer.signature(hash_words(words_of(text))) for text in (a, b))
        assert abs((first == second).mean() - jaccard(a, b)) < 0.07  # 3 standard errors


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_the_index_on_disk_finds_what_datasketch_does(tmp_path, threshold):
    rows = [variants(seed, changes) for seed in range(30) for changes in (0, 2, 3, 5, 8)]
    random.Random(0).shuffle(rows)
    signer = deduplication.Signer(threshold, 128, deduplication.Questions())
    index, minhashes = MinHashLSH(threshold, 128, deduplication.WEIGHTS), []
    for number, text in enumerate(rows):
        values = signer.signature(hash_words(words_of(text)))
        minhashes.append(MinHash(hashvalues=values, scheme="affine32"))
        index.insert(number, minhashes[-1])
    group = list(range(len(rows)))
    for a, minhash in enumerate(minhashes):
        for b in index.query(minhash):
            if minhash.jaccard(minhashes[b]) >= threshold and group[a] != group[b]:
                low, high = sorted((group[a], group[b]))
                group = [low if each == high else each for each in group]
    expected = [text for number, text in enumerate(rows) if group[number] == number]
    assert 0 < len(expected) < len(rows)
    given = text_file(tmp_path / "a.jsonl", rows)
    assert run_dedup(tmp_path, given, "--threshold", str(threshold)) == expected


def test_a_text_too_short_for_a_shingle_is_nobodys_near_duplicate(tmp_path):
    rows = ["2 + 2", "2 - 2", "two", "three", "二加二"]
    given = text_file(tmp_path / "a.jsonl", rows)
    assert run_dedup(tmp_path, given) == rows


def test_questions_of_a_benchmark_do_not_stay(tmp_path):
    question = "Which of these rivers flows north through the great desert to the sea in the end"
    chinese = "下列哪一条河流向北穿过沙漠最后流入大海"
    short = "the little house stands on a hill"  # 7 words
    with open(tmp_path / "bench.csv", "w", encoding="utf-8", newline="") as file:
        rows = [[question, "Nile", "A"], [chinese, "尼罗河", "A"], [short, "yes", "B"]]
        csv.writer(file).writerows([["question", "A", "answer"], *rows])
    part = " ".join(question.split()[2:15])  # 13 words
    leaks = [f"Quiz: {question.upper()}? Nile!", f"问：{chinese}？答：尼罗河", f"so {part} it is"]
    less = " ".join(question.split()[:12])
    clean = [sentences(1), f"and {less} and", "Nile", short, leaks[0].replace("DESERT", "fog")]
    given = text_file(tmp_path / "a.jsonl", [leaks[0], *clean[:2], *leaks[1:], *clean[2:]])
    against = ["--against", str(tmp_path / "bench.csv")]
    assert run_dedup(tmp_path, given, *against) == clean
    manifest = json.loads((tmp_path / "dedup.jsonl.manifest.json").read_text())
    assert manifest["counts"]["dropped: in an evaluation file"] == 3
    assert clean[1] not in run_dedup(tmp_path, given, *against, "--overlap", "12")


def test_a_leak_takes_no_near_duplicate_along(tmp_path):
    """Of two rows that are nearly the same the first holds a question: the second stays."""
    rows = [variants(3, 0), variants(3, 1)]
    new = next(word for word in rows[1].split() if word not in rows[0].split())
    place = rows[1].split().index(new)
    question = " ".join(rows[0].split()[place - 6 : place + 7])
    (tmp_path / "bench.txt").write_text(question)
    given = text_file(tmp_path / "a.jsonl", rows)
    assert run_dedup(tmp_path, given) == rows[:1]
    assert run_dedup(tmp_path, given, "--against", str(tmp_path / "bench.txt")) == rows[1:]


@pytest.mark.parametrize("kind", ["conversations", "preference"])
def test_duplicates_among_conversations(tmp_path, kind):
    chats = [[CHAT[0], {**CHAT[1], "content": sentences(n % 3)}] for n in range(5)]
    if kind == "conversations":
        rows = [{"conversations": chat} for chat in chats]
    else:
        rows = [{"chosen": CHAT, "rejected": chat} for chat in chats]
    given, out = write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl"
    main(f"dedup --input {given} --output {out} --workers 1".split())
    assert read_rows(out) == rows[:3]


# -- being stopped ---------------------------------------------------------------------------------

MANY = 600


@pytest.fixture
def many(tmp_path, monkeypatch) -> str:
    """Rows in many small chunks, each noted at once."""
    monkeypatch.setattr(prepare_data, "CHUNK_ROWS", 10)
    monkeypatch.setattr(resumable, "SAVE_SECONDS", 0)
    rows = [variants(n % 400, n % 3) + "<|im_end|>" * (n % 2) for n in range(MANY)]
    return text_file(tmp_path / "many.jsonl", rows)


def slowly(words: list[str], seconds: float):
    """The command, which takes its time over each chunk."""
    write = resumable.Progress.add

    def add(progress, done):
        time.sleep(seconds)
        write(progress, done)

    resumable.Progress.add = add  # in a process of its own
    main(words)


@pytest.mark.parametrize("command", ["clean", "clean gz", "dedup", "dedup late", "mix", "stats"])
def test_killed_at_any_moment_and_gone_on_with(tmp_path, many, command):
    name = command.split()[0]
    suffix = {"clean gz": "jsonl.gz", "stats": "png"}.get(command, "jsonl")
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"

    def words(path):
        return [name, "--input", many, "--output", str(path), "--workers", "1"]

    main(words(whole))
    work = tmp_path / f".out.{suffix}.work"
    note = {
        "dedup": "signatures",
        "dedup late": "writing",
        "mix": "writing 0",
        "stats": "measuring",
    }
    note = work / f"{note.get(command, 'clean')}.json"
    for kill in range(3):
        before = chunks(note)
        process = fork(lambda: slowly(words(out), 0.02))
        while chunks(note) <= before + 3 + kill:
            time.sleep(0.005)
        os.kill(process, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL
        assert not out.exists()
    assert 12 < chunks(note) < MANY // 10
    done = []
    count = resumable.map_chunks
    main_chunks = lambda rows, *more: count(tap(rows, done), *more)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable, "map_chunks", main_chunks)
        before = chunks(note)
        main(words(out))
    later = 60 if command == "dedup" else 0  # a stage after the one that was interrupted
    assert len(done) <= MANY // 10 - before + later + 1
    assert digest(out) == digest(whole) or suffix == "png"
    first, second = (json.loads(Path(f"{path}.manifest.json").read_text()) for path in (whole, out))
    for same in ("counts", "examples", "figures"):
        if command != "mix" or same != "counts":
            assert first.get(same) == second.get(same)
    assert not list(tmp_path.glob(".*"))


def chunks(note: Path) -> int:
    try:
        return json.loads(note.read_text())["chunks"]
    except (OSError, ValueError):
        return 0


def tap(rows, seen):
    for row in rows:
        seen.append(row)
        yield row


def test_more_workers_write_the_same(tmp_path, many):
    for workers in (1, 3):
        for name in ("clean", "dedup"):
            out = f"{tmp_path}/{name}{workers}.jsonl"
            main([name, "--input", many, "--output", out, "--workers", str(workers)])
    for name in ("clean", "dedup"):
        assert digest(tmp_path / f"{name}1.jsonl") == digest(tmp_path / f"{name}3.jsonl")


def test_what_changed_meanwhile_is_not_gone_on_with(tmp_path, many):
    out = tmp_path / "out.jsonl"
    words = ["clean", "--input", many, "--output", str(out), "--workers", "1"]
    process = fork(lambda: slowly(words, 0.02))
    note = tmp_path / ".out.jsonl.work" / "clean.json"
    while chunks(note) < 5:
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    ended(process)
    text_file(Path(many), ["Now it is something else."])
    main(words)
    assert texts(out) == ["Now it is something else."]


def test_a_finished_command_is_not_run_again_nor_another_over_it(tmp_path, capsys):
    given, out = text_file(tmp_path / "a.jsonl"), tmp_path / "out.jsonl"
    words = ["clean", "--input", given, "--output", str(out), "--workers", "1"]
    main(words)
    before = out.stat().st_mtime_ns
    main(words)
    assert "is there already" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--force"):
        main([*words, "--min_chars", "20"])
    main([*words, "--min_chars", "20", "--force"])
    assert len(texts(out)) < 24


# -- mixtures --------------------------------------------------------------------------------------


def test_weights_are_shares_of_bytes(tmp_path):
    long = [sentences(n, 40) for n in range(300)]
    short = [sentences(n, 10) for n in range(300, 1200)]
    a, b = text_file(tmp_path / "a.jsonl", long), text_file(tmp_path / "b.jsonl.x.jsonl", short)
    out = tmp_path / "out.jsonl"
    words = f"mix --input {a} {b} --weight 3 1 --output {out} --workers 1 --max_repeat 3".split()
    main([*words, "--megabytes", "0.2"])
    rows = Counter(texts(out))
    sizes = [
        sum(n * (len(t) + 14) for t, n in rows.items() if t in set(of)) for of in (long, short)
    ]
    assert sum(sizes) == pytest.approx(200_000, rel=0.01)
    assert sizes[0] / sum(sizes) == pytest.approx(0.75, abs=0.01)
    repeats = {rows[text] for text in long}
    assert max(repeats) - min(repeats) <= 1  # every row about as often as the others
    assert max(rows[text] for text in short) == 1
    with pytest.raises(UserError, match="repeated"):
        main([*words, "--megabytes", "2", "--force"])


def test_copies_of_a_text_are_on_one_side_of_a_split(tmp_path):
    rows = [sentences(n % 500, 8) for n in range(1500)]
    given, other = (
        text_file(tmp_path / "a.jsonl", rows),
        text_file(tmp_path / "b.jsonl", rows[:100]),
    )
    out = tmp_path / "out.jsonl"
    main(f"mix --input {given} --output {out} --val_share 0.1 --workers 1".split())
    train, val = texts(out), texts(tmp_path / "out_val.jsonl")
    assert set(train).isdisjoint(val)
    assert set(train) | set(val) == set(rows)
    assert len(val) == len(set(val)) and 30 <= len(val) <= 70
    assert len(train) == len(rows) - 3 * len(val)
    more = tmp_path / "more.jsonl"
    main(f"mix --input {other} --output {more} --val_share 0.1 --seed 7 --workers 1".split())
    assert set(texts(tmp_path / "more_val.jsonl")) == set(rows[:100]) & set(val)


def test_a_curriculum_goes_from_short_to_long(tmp_path):
    rows = [sentences(n, 3 + n % 60) for n in range(600)]
    given = text_file(tmp_path / "a.jsonl", rows)
    main(f"mix --input {given} --output {tmp_path}/out.jsonl.gz --stages 3 --workers 1".split())
    stages = [texts(tmp_path / f"out_{n}.jsonl.gz") for n in (1, 2, 3)]
    assert sorted(sum(stages, [])) == sorted(rows)
    for earlier, later in zip(stages, stages[1:], strict=False):
        assert max(map(len, earlier)) <= min(map(len, later))
    sizes = [sum(len(text) + 14 for text in stage) for stage in stages]
    assert max(sizes) < 1.02 * min(sizes)
    main(f"mix --input {given} --output {tmp_path}/b.jsonl --order length --workers 1".split())
    lengths = list(map(len, texts(tmp_path / "b.jsonl")))
    assert lengths == sorted(lengths)


# -- figures ---------------------------------------------------------------------------------------


def test_stats_counts_what_the_trainers_read(tmp_path, tokenizer, capsys):
    rows = [*(sentences(n, 5 + n) for n in range(20)), CHINESE, CHINESE, CHINESE, "2 + 2 = 4"]
    given = text_file(tmp_path / "a.jsonl", rows)
    figures = main(f"stats --input {given} --output {tmp_path}/a.png --workers 1".split())[
        "figures"
    ]
    documents = load_documents(given, "text", tokenizer)
    lengths = [len(ids) for ids in documents["input_ids"]]
    everything = figures["languages"]["all"]
    assert everything["tokens"] == sum(lengths)
    assert figures["tokens_a_row"]["p50"] == int(np.percentile(lengths, 50))
    assert figures["tokens_a_row"]["longest"] == max(lengths)
    assert everything["bytes_per_token"] == pytest.approx(
        sum(len(text.encode()) for text in rows) / sum(lengths), abs=1e-3
    )
    rows_of = {language: of["rows"] for language, of in figures["languages"].items()}
    assert rows_of == {"zh": 3, "en": 20, "none": 1, "all": 24}
    assert figures["exact_duplicates"] == 2
    assert figures["most_frequent"] == [{"times": 3, "text": CHINESE}]
    assert "3 times" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_stats_of_conversations_count_what_is_trained(tmp_path, tokenizer):
    given = write_lines(tmp_path / "a.jsonl", [{"conversations": CHAT}] * 4)
    figures = main(f"stats --input {given} --output {tmp_path}/a.png --workers 1".split())[
        "figures"
    ]
    documents = load_documents(given, "conversations", tokenizer)
    assert figures["tokens_trained"] == sum(int(row.sum()) for row in documents["loss_mask"])
    assert figures["languages"]["all"]["tokens"] == sum(map(len, documents["input_ids"]))


# -- the hub ---------------------------------------------------------------------------------------

DATA = "datasets/jingyaogong/minimind_dataset"
PRETRAIN = b"".join(json.dumps({"text": sentences(n)}).encode() + b"\n" for n in range(2000))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    names = ("sft_mini_512.jsonl", "dpo.jsonl")
    files = {name: json.dumps({"conversations": CHAT}).encode() + b"\n" for name in names}
    model = {"config.json": b"{}", "model.safetensors": b"weights" * 999, ".gitattributes": b""}
    stand_in = Hub(
        {
            DATA: {"pretrain_hq.jsonl": PRETRAIN, **files, "README.md": b"# data\n"},
            "models/jingyaogong/MiniMind2": model,
        }
    )
    stand_in.small = {"README.md", "config.json", ".gitattributes"}
    with serving(stand_in) as address:
        stand_in.address = address
        yield stand_in


def fetch(hub, folder, *words):
    return main(["download", "--endpoint", hub.address, "--output", str(folder), *words])


def test_download_a_set(tmp_path, hub):
    found = fetch(hub, tmp_path, "--set", "mini")
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == PRETRAIN
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "download.manifest.json",
        "pretrain_hq.jsonl",
        "sft_mini_512.jsonl",
    ]
    about = json.loads((tmp_path / "download.manifest.json").read_text())
    assert about["revision"] == COMMIT
    assert about["files"][0]["sha256"] == hashlib.sha256(PRETRAIN).hexdigest()
    assert about["files"][0]["checked_by"] == "sha256"
    assert found["jingyaogong/minimind_dataset"]["files"] == about["files"]
    hub.gets.clear()
    fetch(hub, tmp_path, "--set", "mini")  # what is there and whole is left
    assert hub.gets == []
    (tmp_path / "pretrain_hq.jsonl").write_bytes(PRETRAIN[:-1] + b" ")  # of the same size
    fetch(hub, tmp_path, "--set", "mini")
    assert hub.gets == [("pretrain_hq.jsonl", None)]
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == PRETRAIN


def test_download_models(tmp_path, hub):
    fetch(hub, tmp_path, "--model", "MiniMind2")
    folder = tmp_path / "MiniMind2"
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 999
    about = json.loads((folder / "download.manifest.json").read_text())
    how = {Path(file["file"]).name: file["checked_by"] for file in about["files"]}
    assert how == {"config.json": "git hash", "model.safetensors": "sha256"}


def test_a_connection_that_breaks_is_taken_up_where_it_broke(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cut_after = 50_000
    fetch(hub, tmp_path, "--file", "pretrain_hq.jsonl")
    assert hub.gets == [("pretrain_hq.jsonl", None), ("pretrain_hq.jsonl", "bytes=50000-")]
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == PRETRAIN


def test_a_killed_download_is_gone_on_with(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.wait = threading.Event()
    process = fork(lambda: fetch(hub, tmp_path, "--file", "pretrain_hq.jsonl"))
    partial = tmp_path / ".pretrain_hq.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size >= 100_000):
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    ended(process)
    there = partial.stat().st_size
    assert not (tmp_path / "pretrain_hq.jsonl").exists()
    hub.wait.set()
    hub.wait = None  # from now on it answers at once
    hub.gets.clear()
    fetch(hub, tmp_path, "--file", "pretrain_hq.jsonl")
    assert hub.gets == [("pretrain_hq.jsonl", f"bytes={there}-")]
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == PRETRAIN


@pytest.mark.parametrize("name", ["pretrain_hq.jsonl", "README.md"])
def test_a_damaged_file_is_not_kept(tmp_path, hub, name):
    content = hub.repos[DATA][name]
    hub.damaged[name] = content[:-2] + b"!\n"
    with pytest.raises(UserError, match=f"{name} has another hash"):
        fetch(hub, tmp_path, "--file", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--file", "sft_9.jsonl"], "has no sft_9.jsonl; it has README.md, dpo.jsonl"),
        (["--repo", "nobody/nothing", "--file", "a"], "has no nobody/nothing"),
        (["--repo", "a b/c", "--file", "a"], "is no name of a repository"),
        (["--model", "MiniMind9"], "no model MiniMind9 is known"),
        ([], "name what to download"),
    ],
)
def test_mistakes_in_downloading(tmp_path, hub, words, sentence):
    with pytest.raises(UserError, match=sentence):
        fetch(hub, tmp_path, *words)


def test_offline(tmp_path, closed_port):
    address = f"http://127.0.0.1:{closed_port}"
    with pytest.raises(UserError, match="cannot be reached.*without a network.*--endpoint"):
        main(["download", "--set", "mini", "--endpoint", address, "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_without_modelscope(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(UserError, match="pip install modelscope"):
        main(["download", "--set", "mini", "--hub", "modelscope", "--output", str(tmp_path)])


def test_modelscope(tmp_path, monkeypatch):
    """Its own package against the stand-in: a broken connection is taken up where it broke."""
    pytest.importorskip("modelscope", reason="pip install modelscope")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "")
    files = {"pretrain_hq.jsonl": PRETRAIN, "sft_mini_512.jsonl": b"{}\n"}
    stand_in = Hub({"datasets/gongjy/minimind_dataset": files})
    stand_in.cut_after = 500_000
    with serving(stand_in) as address:
        words = ["--set", "mini", "--hub", "modelscope", "--endpoint", address]
        main(["download", *words, "--output", str(tmp_path)])
        assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == PRETRAIN
        assert ("pretrain_hq.jsonl", "bytes=500000-") in stand_in.gets
        stand_in.damaged["sft_mini_512.jsonl"] = b"!}\n"
        (tmp_path / "sft_mini_512.jsonl").unlink()
        with pytest.raises(UserError, match="sft_mini_512.jsonl"):
            main(["download", *words, "--output", str(tmp_path)])
    names = sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".")
    assert names == ["download.manifest.json", "pretrain_hq.jsonl"]


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("clean --output o.jsonl", "nothing to read"),
        ("clean --input none.txt --output o.jsonl", "none.txt does not exist"),
        ("clean --input . --output o.jsonl", "is a folder"),
        ("clean --input a.jsonl", "--output names"),
        ("clean --input a.jsonl --output o.csv", "should be a .jsonl"),
        ("clean --input a.jsonl --output a.jsonl", "cannot be written"),
        ("clean --input a.jsonl --output o.jsonl --languages fr", "zh, en and other"),
        ("clean --input a.jsonl --output o.jsonl --max_signs 2", "from 0 to 1"),
        ("clean --input a.jsonl --output o.jsonl --what 1", "--help"),
        ("clean --input bad.gz --output o.jsonl", "damaged"),
        ("clean --input bad.parquet --output o.jsonl", "damaged"),
        ("clean --input bad.json --output o.jsonl", "is not JSON"),
        ("clean --input bad.jsonl --output o.jsonl", "none of the first rows"),
        ("clean --input a.jsonl --output o.jsonl --encoding klingon", "name its --encoding"),
        ("dedup --input bad.jsonl --output o.jsonl", "line 1 of bad.jsonl is not JSON"),
        ("dedup --input a.jsonl --output o.jsonl --against few.txt", "no text of 8 words"),
        ("dedup --input a.jsonl --output o.jsonl --threshold 0", "--threshold"),
        ("dedup --input bad.parquet --output o.jsonl", "clean makes one of it"),
        ("mix --input bad.jsonl.gz --output o.jsonl", "is damaged"),
        ("mix --input a.jsonl --output o.jsonl --weight 1 2", "as many --weight"),
        ("mix --input a.jsonl empty.jsonl --output o.jsonl --weight 1 2", "has a --weight"),
        ("mix --input empty.jsonl --output o.jsonl", "hold no rows"),
        ("stats --input bad.jsonl --output o.png", "line 1 of bad.jsonl"),
        ("stats --input a.jsonl --output o.jsonl", "should be a .png"),
        ("sing", "invalid choice"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    text_file(tmp_path / "a.jsonl")
    for name in ("bad.gz", "bad.jsonl.gz", "bad.parquet", "bad.json", "bad.jsonl"):
        (tmp_path / name).write_bytes(b"{ this is none\n")
    (tmp_path / "few.txt").write_text("a few words")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=sentence):
        main([*words.split(), *(["--workers", "1"] if words != "sing" else [])])
    assert not list(tmp_path.glob("o.*")) + list(tmp_path.glob(".o.*"))


def test_pairs_of_texts_differ():  # so that the tests of duplicates mean something
    assert all(jaccard(sentences(a), sentences(b)) < 0.1 for a, b in combinations(range(6), 2))

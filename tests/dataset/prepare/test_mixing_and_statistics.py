"""Mixtures, splits and curricula; statistics against what the trainers read; mistakes."""

import gzip
import json
import re
from collections import Counter

import numpy as np
import pytest
from prepare_samples import CHAT, CHINESE, read_rows, sentences, texts, write_lines
from toy import text_file

from dataset.lm_dataset import encode_chat, load_documents
from model.errors import UserError
from scripts.prepare_data import main


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


# -- statistics ------------------------------------------------------------------------------------


def statistics_of(given: str, folder, flags: str = "") -> dict:
    words = f"stats --input {given} --output {folder}/a.png --workers 1 {flags}"
    return main(words.split())["statistics"]


def test_stats_counts_what_the_trainers_read(tmp_path, tokenizer, capsys):
    rows = [*(sentences(n, 5 + n) for n in range(20)), CHINESE, CHINESE, CHINESE, "2 + 2 = 4"]
    given = text_file(tmp_path / "a.jsonl", rows)
    found = statistics_of(given, tmp_path)
    documents = load_documents(given, "text", tokenizer)
    lengths = [len(ids) for ids in documents["input_ids"]]
    everything = found["languages"]["all"]
    assert everything["tokens"] == sum(lengths)
    assert found["tokens_a_row"]["p50"] == int(np.percentile(lengths, 50))
    assert found["tokens_a_row"]["longest"] == max(lengths)
    assert everything["bytes_per_token"] == pytest.approx(
        sum(len(text.encode()) for text in rows) / sum(lengths), abs=1e-3
    )
    rows_of = {language: of["rows"] for language, of in found["languages"].items()}
    assert rows_of == {"zh": 3, "en": 20, "none": 1, "all": 24}
    assert found["exact_duplicates"] == 2
    assert found["most_frequent"] == [{"times": 3, "text": CHINESE}]
    assert "3 times" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_stats_of_conversations_count_what_is_trained(tmp_path, tokenizer):
    given = write_lines(tmp_path / "a.jsonl", [{"conversations": CHAT}] * 4)
    found = statistics_of(given, tmp_path)
    documents = load_documents(given, "conversations", tokenizer)
    assert found["tokens_trained"] == sum(int(row.sum()) for row in documents["loss_mask"])
    assert found["languages"]["all"]["tokens"] == sum(map(len, documents["input_ids"]))


def test_stats_of_prompts_count_what_the_policy_is_given(tmp_path, tokenizer):
    rows = [{"conversations": [CHAT[0], {"role": "assistant", "content": ""}], "gt": ["5"]}] * 3
    found = statistics_of(write_lines(tmp_path / "a.jsonl", rows), tmp_path)
    prompt = encode_chat(tokenizer, CHAT[:1], add_generation_prompt=True).ids
    assert found["kinds"] == {"prompts": 3} and found["tokens_trained"] == 0
    assert found["languages"]["all"]["tokens"] == 3 * len(prompt)


# -- kinds of files, and bad rows ------------------------------------------------------------------

SOME = [{"text": sentences(n, 20)} for n in range(6)]
SAME_ROWS = {
    "a.json": json.dumps(SOME, indent=2).encode(),
    "a.jsonl": ("\ufeff" + "\r\n\r\n".join(map(json.dumps, SOME))).encode(),
    "b.jsonl": "\n".join(map(json.dumps, SOME)).encode("utf-16"),
    "c.jsonl": gzip.compress(json.dumps(SOME).encode()),
}


@pytest.mark.parametrize("command", ["mix --order kept", "dedup"])
@pytest.mark.parametrize(("name", "content"), SAME_ROWS.items(), ids=SAME_ROWS.keys())
def test_every_kind_of_json_can_be_mixed_and_deduplicated(tmp_path, command, name, content):
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out.jsonl"
    main(f"{command} --input {tmp_path / name} --output {out} --workers 1".split())
    assert read_rows(out) == SOME


@pytest.mark.parametrize("command", ["dedup", "mix --order kept", "stats"])
def test_bad_rows_are_errors_or_left_out(tmp_path, command, capsys):
    good = [json.dumps(row) for row in SOME]
    lines = [good[0], "{", *good[1:4], "[1]", '{"foo": 1}', *good[4:], good[5]]
    given, out = tmp_path / "a.jsonl", tmp_path / ("a.png" if command == "stats" else "o.jsonl")
    given.write_text("\n".join(lines))
    words = f"{command} --input {given} --output {out} --workers 1".split()
    with pytest.raises(UserError, match=rf"line 2 of {re.escape(str(given))} is not JSON"):
        main(words)
    manifest = main([*words, "--skip_bad_rows", "1"])
    told = capsys.readouterr().out
    if command == "dedup":
        assert read_rows(out) == SOME
        assert manifest["counts"]["dropped: bad row"] == 3 and "a.jsonl:2" in told
    else:
        assert manifest["bad_rows"]["count"] == 3 and "3 bad rows are left out" in told
        assert [int(each.split()[1]) for each in manifest["bad_rows"]["examples"]] == [2, 6, 7]
    if command == "stats":
        assert manifest["statistics"]["exact_duplicates"] == 1
        assert manifest["statistics"]["most_frequent"] == [{"times": 2, "text": SOME[5]["text"]}]
    given.write_text("{\n")
    with pytest.raises(UserError, match="all 1 rows are bad; .* is not JSON"):
        main([*words, "--skip_bad_rows", "1", "--force", "1"])


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("clean --output o.jsonl", "--input is required"),
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

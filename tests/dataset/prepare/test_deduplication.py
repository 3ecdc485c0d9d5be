"""Duplicates: against sets, true similarity, datasketch, and the questions of a benchmark."""

import csv
import json
import random
from itertools import combinations
from pathlib import Path

import pytest
from datasketch import MinHash, MinHashLSH
from prepare_samples import (
    CHAT,
    read_rows,
    sentences,
    texts,
    variants,
    write_lines,
)
from toy import text_file

from dataset.prepare import deduplication
from dataset.prepare.words import hash_words, words_of
from scripts.prepare_data import main


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


@pytest.mark.parametrize("kind", ["conversations", "preferences"])
def test_duplicates_among_conversations(tmp_path, kind):
    chats = [[CHAT[0], {**CHAT[1], "content": sentences(n % 3)}] for n in range(5)]
    if kind == "conversations":
        rows = [{"conversations": chat} for chat in chats]
    else:
        rows = [{"chosen": CHAT, "rejected": chat} for chat in chats]
    given, out = write_lines(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl"
    main(f"dedup --input {given} --output {out} --workers 1".split())
    assert read_rows(out) == rows[:3]


def test_pairs_of_texts_differ():  # so that the tests of duplicates mean something
    assert all(jaccard(sentences(a), sentences(b)) < 0.1 for a, b in combinations(range(6), 2))


def test_the_same_question_with_another_truth_is_another_row(tmp_path):
    ask = [{"role": "user", "content": "How much is it?"}, {"role": "assistant", "content": ""}]
    rows = [{"conversations": ask, "gt": [n]} for n in ("1", "2", "1")]
    given, out = write_lines(tmp_path / "a.jsonl", rows), tmp_path / "o.jsonl"
    main(f"dedup --input {given} --output {out} --workers 1".split())
    assert read_rows(out) == rows[:2]

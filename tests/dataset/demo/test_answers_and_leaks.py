"""The demo data: reproducible, right, and nothing of the tests in training.

Answers are computed again here, from the words of the prompt alone, and leaks are looked for by
the problem that a line poses, whatever its language, phrasing or order of arguments.
"""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from demo_problems import (
    PROBLEMS,
    ROOT,
    STAGES,
    TABLES,
    TALK,
    ZH_NUMBER,
    answer,
    leaks,
    lines,
    number_in,
    numbers,
    read,
)

from dataset.demo.files import write_demo_data
from dataset.demo.material import OPENINGS, phrasing_key
from dataset.demo.skills import SKILLS, in_words
from model.weights import load_tokenizer


def test_same_bytes_on_any_machine(data, tmp_path):
    command = [sys.executable, "-m", "dataset.demo", "--output", tmp_path]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # ASCII by default
    odd = {**os.environ, "PYTHONHASHSEED": "7", **plain}
    run = subprocess.run(command, cwd=ROOT, env=odd, capture_output=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    assert {path.stem for path in tmp_path.iterdir()} == set(data)
    assert len(data) == 2 * len(STAGES) + 2
    for name in data:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (
            data.folder / f"{name}.jsonl"
        ).read_bytes()
        assert f"{name}.jsonl" in run.stdout


def test_another_seed_asks_other_problems(data, tmp_path):
    write_demo_data(tmp_path, seed=43)
    other = {row["prompt"] for row in read(tmp_path / "skills_test.jsonl")}
    common = other & {row["prompt"] for row in data["skills_test"]}
    assert len(common) < 0.3 * len(other)


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "dataset.demo", "--output", tmp_path / "file" / "data"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: cannot write to")
    assert len(run.stderr.splitlines()) == 1


def test_size_is_what_minutes_can_train(data):
    assert 25_000 <= len(data["sft_mini_512"]) <= 40_000
    for name in ("pretrain_hq", "sft_mini_512"):
        size = sum(len(line.encode()) for line in lines(data[name]))
        assert 1.5e6 < size < 4e6  # at 2–3 bytes a token, some million tokens
    assert all(data[f"{name}{end}"] for name in STAGES for end in ("", "_val"))


def test_every_skill_is_tested_in_both_languages(data):
    asked = Counter((row["skill"], row["lang"]) for row in data["skills_test"])
    assert {skill for skill, _ in asked} == set(PROBLEMS) == {skill.name for skill in SKILLS}
    for skill in PROBLEMS:
        assert asked[skill, "zh"] == asked[skill, "en"] >= 50  # so at least 100 together
    prompts = [(row["prompt"], row["answer"]) for row in data["skills_test"]]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("skill", PROBLEMS)
def test_answers_are_right(data, skill):
    """Of the tests, and of every exchange in the training conversations that poses a problem."""
    rows = [(row["prompt"], row["answer"]) for row in data["skills_test"] if row["skill"] == skill]
    for row in data["rlaif-mini"] + data["rlaif-mini_val"]:
        rows.append((row["conversations"][0]["content"], row["answer"]))
    for row in data["sft_mini_512"]:
        turns = [m["content"] for m in row["conversations"]]
        rows += zip(turns[::2], turns[1::2], strict=True)
    checked = 0
    own = [row for row in TABLES["skills"] if row["skill"] == skill]
    shapes = [shape(row[lang]["prompts"]) for row in own for lang in ("zh", "en")]
    for prompt, right in rows:
        if not any(form.match(prompt) for form in shapes) or not PROBLEMS[skill](prompt):
            continue
        checked += 1
        if skill == "number_to_words":
            (n,) = numbers(prompt)
            assert number_in(right) == n, (prompt, right)
            assert bool(ZH_NUMBER.fullmatch(right)) == bool(re.search("[一-鿿]", prompt))
        else:
            assert answer(skill, prompt) == right, prompt
    assert checked > 1000


def shape(prompts: list[str]) -> re.Pattern:
    """Prompts with anything in their slots, and perhaps something polite before."""
    polite = "|".join(re.escape(opening) for some in OPENINGS.values() for opening in some)
    forms = (re.sub(r"\\\{\w+\\\}", ".+", re.escape(prompt)) for prompt in prompts)
    return re.compile(f"^(?:{polite})?(?:{'|'.join(forms)})$")


def test_numbers_are_written_as_people_write_them():
    written = {
        0: ("零", "zero"),
        10: ("十", "ten"),
        14: ("十四", "fourteen"),
        40: ("四十", "forty"),
        85: ("八十五", "eighty-five"),
        100: ("一百", "one hundred"),
        110: ("一百一十", "one hundred and ten"),
        305: ("三百零五", "three hundred and five"),
        720: ("七百二十", "seven hundred and twenty"),
        999: ("九百九十九", "nine hundred and ninety-nine"),
    }
    assert {n: (in_words(n, "zh"), in_words(n, "en")) for n in written} == written


def test_no_held_out_problem_is_in_training(data):
    for test in data["skills_test"]:
        assert len(PROBLEMS[test["skill"]](test["prompt"])) == 1, test
    for name in STAGES:
        assert leaks(data[name], data["skills_test"]) == [], name
    # and the search does find the same problems where they are
    for name in ("pretrain_hq_val", "sft_mini_512_val", "dpo_val", "rlaif-mini_val", "tools_val"):
        assert leaks(data[name], data["skills_test"]), name
    for reader in set(PROBLEMS.values()):
        assert len(set().union(*map(reader, lines(data["sft_mini_512"])))) > 300


@pytest.mark.parametrize(
    "skill, prompt, twin",
    [
        ("addition", "What is 3 + 58?", "58 加 3 是多少？"),
        ("addition", "What is 3 + 58?", "12 - 9 = 3\n10 - 7 + 58"),
        ("comparison", "7 和 9 哪个大？", "Of 9 and 7 the smaller is 7."),
        ("sorting", "Sort these numbers from small to large: 4, 3, 2, 1", "2, 1, 4, 3 从小到大"),
        ("reversing", "What is c-a-t backwards?", "t-a-c 倒过来是 c-a-t。"),
        (
            "weekday",
            "What day comes 9 days after Sunday?",
            "9 天是 1 周零 2 天，星期日过 9 天是星期二。",
        ),
        ("units", "How many grams are 7 kilograms?", "7 千克 = 7000 克"),
        ("words_to_number", "Which number is forty-two?", "42 写作四十二。"),
        ("translation", "How do you say two red cups in Chinese?", "两个红杯子"),
        ("format", "Write as JSON: cup, pen, hat", "帽子、杯子、钢笔"),
    ],
)
def test_a_leak_in_other_words_would_be_found(skill, prompt, twin):
    tests = [{"skill": skill, "prompt": prompt}]
    assert leaks([{"text": f"你好\n{twin}"}], tests)  # of the same problem
    assert not leaks([{"text": "8 + 3 = 11\n你好"}], tests)


def test_no_held_out_phrasing_is_in_training(data):
    held_out = [
        entry[lang]["held_out"] for kind in TALK for entry in TABLES[kind] for lang in ("zh", "en")
    ]
    held_out = set(map(phrasing_key, held_out))
    openings = ["Q: ", "问：", *OPENINGS["zh"], *OPENINGS["en"]]
    for name in STAGES:
        for line in lines(data[name]):
            for opening in openings:
                if line.startswith(opening):
                    assert phrasing_key(line[len(opening) :]) not in held_out, (name, line)
            assert phrasing_key(line) not in held_out, (name, line)
    asked = {phrasing_key(row["prompt"]) for row in data["textbook_test"]}
    assert asked <= held_out and len(data["textbook_test"]) == 2 * len(TABLES["textbook"])


def test_textbook_facts_can_be_told_apart():
    """A phrasing has one answer in a language, or a model cannot know which is meant."""
    for lang in ("zh", "en"):
        facts = {}
        for fact in TABLES["textbook"]:
            for question in [*fact[lang]["questions"], fact[lang]["held_out"]]:
                facts.setdefault(phrasing_key(question), {})[fact["id"]] = fact[lang]["answers"]
        shared = {asked: who for asked, who in facts.items() if len(who) > 1}
        assert not shared, f"facts of {lang} that share a question: {shared}"


def test_the_persona_speaks_in_words_the_model_has_seen(data):
    """LoRA leaves the embedding, which is also the head, as it is: a token that the training before
    never had cannot be said."""
    tokenizer = load_tokenizer()
    seen = Counter()
    for name in ("pretrain_hq", "sft_mini_512"):
        for ids in tokenizer(lines(data[name]), add_special_tokens=False).input_ids:
            seen.update(ids)
    for entry in TABLES["persona"]:
        for text in entry["zh"]["answers"] + entry["en"]["answers"]:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            rare = [tokenizer.decode([i]) for i in ids if seen[i] < 10]
            assert not rare, (text, rare)


def test_hand_written_tables_are_whole():
    for kind in TALK:
        ids = [entry["id"] for entry in TABLES[kind]]
        assert len(set(ids)) == len(ids)
        for entry in TABLES[kind]:
            for lang in ("zh", "en"):
                side = entry[lang]
                assert len(side["questions"]) >= 3 and side["held_out"], entry["id"]
                assert all(0 < len(text) <= 120 for text in side["answers"]), entry["id"]
    assert len(TABLES["textbook"]) >= 400
    for row in TABLES["skills"]:
        assert all(3 <= len(row[lang]["prompts"]) <= 5 for lang in ("zh", "en")), row
    words = [word for theme in TABLES["words"] for word in theme["words"]]
    assert len(words) > 300 and all(re.fullmatch("[a-z]{3,6}", word) for word in words)
    both = Counter(words + [word[::-1] for word in words])
    assert max(both.values()) == 1, both.most_common(3)


def test_what_the_user_said_is_needed_for_the_answer():
    for entry in TABLES["dialogues"]:
        for lang in ("zh", "en"):
            *before, reply = entry[lang]["turns"]
            said = [set(re.findall(r"{(\w+)}", text)) for turn in before[::2] for text in turn]
            needed = set().union(*(re.findall(r"{(\w+)}", text) for text in reply))
            assert needed <= set().union(*said) <= set(entry[lang]["slots"])

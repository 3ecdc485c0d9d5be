"""The demo data: reproducible, right, in SPEC's formats, and nothing of the tests in training.

Answers are computed again here, from the words of the prompt alone, and leaks are looked for by
the problem that a line poses, whatever its language, phrasing or order of arguments.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import pytest

from dataset.demo.files import load_tables, load_tests, write_demo_data
from dataset.demo.skills import SKILLS, in_words
from dataset.demo.stages import OPENINGS, same
from dataset.grading import grade
from dataset.tools.builtin import WEEKDAYS, call_tool
from model.errors import UserError
from model.weights import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
STAGES = "pretrain_hq sft_mini_512 dpo rlaif-mini r1_mix_1024 tools lora_identity".split()
TALK = ("textbook", "small_talk", "identity", "unknown", "persona")
TABLES = load_tables()

EN_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ZH_DAYS = [f"星期{day}" for day in "一二三四五六日"]
FACTORS = {
    ("centimetres", "millimetres"): 10,
    ("metres", "centimetres"): 100,
    ("kilometres", "metres"): 1000,
    ("kilograms", "grams"): 1000,
    ("tonnes", "kilograms"): 1000,
    ("litres", "millilitres"): 1000,
    ("hours", "minutes"): 60,
    ("minutes", "seconds"): 60,
}
ZH_UNITS = dict(
    zip(
        "厘米 毫米 千米 米 千克 克 吨 毫升 升 小时 分钟 秒".split(),
        "centimetres millimetres kilometres metres kilograms grams tonnes millilitres litres "
        "hours minutes seconds".split(),
        strict=True,
    )
)
NUMERALS = "one two three four five six seven eight nine ten".split()
NOUNS = [row for row in TABLES["phrases"] if row["kind"] == "noun"]
FRAMES, *TOOL_USES = TABLES["tool_use"]
USES = [(use, lang) for use in TOOL_USES for lang in ("zh", "en")]
HELD_OUT_FRAMES = [FRAMES[lang]["held_out"].split("{}")[0] for lang in ("zh", "en")]
ADJECTIVES = [row for row in TABLES["phrases"] if row["kind"] == "adjective"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Data(dict):
    """The rows of each file, by its name without .jsonl."""

    folder: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("demo")
    counts = write_demo_data(folder, seed=42)
    rows = Data({path.stem: read(path) for path in sorted(folder.iterdir())})
    assert counts == {f"{name}.jsonl": len(some) for name, some in rows.items()}
    rows.folder = folder
    return rows


def messages(row: dict) -> list[dict]:
    return row.get("conversations") or row["chosen"] + row["rejected"]


def lines(rows: list[dict]) -> list[str]:
    """Every line that a model would read: of texts, prompts and answers."""
    texts = [row["text"] for row in rows if "text" in row]
    texts += [m["content"] for row in rows if "text" not in row for m in messages(row)]
    return [line for text in texts for line in text.split("\n")]


# -- the problem in a line, without the code that wrote it -----------------------------------------


def any_of(words) -> str:
    return "(" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


def number_in(words: str) -> int:
    """The value of an English or Chinese numeral below a thousand."""
    total = digit = 0
    if ZH_NUMBER.fullmatch(words):
        for char in words:
            if char in "十百":
                total += max(digit, 1) * (10 if char == "十" else 100)
                digit = 0
            else:
                digit = "零一二三四五六七八九".index(char)
        return total + digit
    for word in re.split("[ -]", words.replace(" and ", " ")):
        if word == "hundred":
            total *= 100
        else:
            total += SMALL.index(word) if word in SMALL else 20 + 10 * TENS.index(word)
    return total


SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
UNIT = re.compile(any_of({*ZH_UNITS, *ZH_UNITS.values()}))
AMOUNT = re.compile(rf"(\d+) {UNIT.pattern}")
EN_WORD = any_of([*SMALL, *TENS, "hundred"])
EN_NUMBER = re.compile(rf"\b{EN_WORD}(?:(?: and |[ -]){EN_WORD})*\b")
ZH_NUMBER = re.compile("[零一二三四五六七八九十百]+")
EN_PHRASE = re.compile(
    rf"\b{any_of(NUMERALS)} {any_of(a['en'] for a in ADJECTIVES)} "
    rf"{any_of([n['en'] for n in NOUNS] + [n['plural'] for n in NOUNS])}\b"
)
ZH_PHRASE = re.compile(
    f"([一两三四五六七八九十]){any_of({n['measure'] for n in NOUNS})}"
    f"{any_of(a['zh'] for a in ADJECTIVES)}{any_of(n['zh'] for n in NOUNS)}"
)
NOUN_EN, NOUN_ZH = any_of(n["en"] for n in NOUNS), any_of(n["zh"] for n in NOUNS)
ZH_NOUNS = {n["zh"]: n["en"] for n in NOUNS}
EN_LIST = re.compile(rf"\b{NOUN_EN}, {NOUN_EN}, {NOUN_EN}\b")
ZH_LIST = re.compile(rf"{NOUN_ZH}、{NOUN_ZH}、{NOUN_ZH}")
SPELT = re.compile(r"(?<![\w-])[a-z](?:-[a-z])+(?![\w-])")


def sums(line: str) -> set:
    """("+", smaller, larger) and ("-", a, b), also for each step of 12 + 7 - 5."""
    found = set()
    line = re.sub(" (?:plus|加) ", " + ", re.sub(" (?:minus|减) ", " - ", line))
    for chain in re.findall(r"\d+(?: [+-] \d+)+", line):
        value, *rest = chain.split()
        value = int(value)
        for sign, n in zip(rest[::2], map(int, rest[1::2]), strict=True):
            found.add(("+", min(value, n), max(value, n)) if sign == "+" else ("-", value, n))
            value += n if sign == "+" else -n
    return found


def comparisons(line: str) -> set:
    found = re.findall(r"(\d+) (?:or|and|和) (\d+)", line)
    return {frozenset(map(int, pair)) for pair in found if re.search("larger|smaller|[大小]", line)}


def sortings(line: str) -> set:
    found = re.findall(r"(?<![\d,])\d+(?:, \d+){3}(?!,? ?\d)", line)
    return {frozenset(map(int, four.split(", "))) for four in found}


def reversals(line: str) -> set:
    found = SPELT.findall(line) if re.search("backwards|[Rr]everse|倒", line) else []
    return {min(word, word[::-1]) for word in (spelt.replace("-", "") for spelt in found)}


def spellings(line: str) -> set:
    found = re.findall(r"\b[A-Z]{3,6}\b", line) if re.search("[Ss]pel|拼|字母组成", line) else []
    return {word.lower() for word in found}


def letter_counts(line: str) -> set:
    spelt = SPELT.search(line)
    letter = re.search(r"(?<![\w-])([a-z])(?![\w-])", line)
    return {(letter[1], spelt[0].replace("-", ""))} if spelt and letter else set()


def weekdays(line: str) -> set:
    first = re.search("|".join(EN_DAYS + ZH_DAYS), line)
    n = re.findall(r"(\d+) (?:天|days)", line)
    if not first or not n or "× 7" in line:  # working names no day to begin with
        return set()
    days = EN_DAYS if first[0] in EN_DAYS else ZH_DAYS
    return {(days.index(first[0]), int(n[0]))}


def units(line: str) -> set:
    """(how many, source, target), the units in English."""
    amounts = AMOUNT.findall(line)
    if not amounts:
        return set()
    found = {ZH_UNITS.get(name, name) for name in UNIT.findall(line)}
    n, source = int(amounts[0][0]), ZH_UNITS.get(amounts[0][1], amounts[0][1])
    return {(n, source, target) for target in found - {source}} if len(found) == 2 else set()


def numbers(line: str) -> set:
    """Every number that a line about digits and words writes out, either way."""
    english = "in words|in digits|Spell out the number|Which number is"
    if not re.search(f"{english}|中文数字|中文怎么写|汉字写|写作|写成阿拉伯|用数字", line):
        return set()
    found = {int(digits) for digits in re.findall(r"\d+", line)}
    spoken = [*EN_NUMBER.finditer(line), *ZH_NUMBER.finditer(line)]
    return found | {number_in(words[0]) for words in spoken}


def phrases(line: str) -> set:
    """(how many, adjective, noun), in English."""
    found = set()
    for count, adjective, noun in EN_PHRASE.findall(line):
        (row,) = [n for n in NOUNS if noun == (n["en"] if count == "one" else n["plural"])] or [
            None
        ]
        found.add((NUMERALS.index(count) + 1, adjective, row and row["en"]))
    for count, measure, adjective, noun in ZH_PHRASE.findall(line):
        (row,) = [n for n in NOUNS if (n["zh"], n["measure"]) == (noun, measure)] or [None]
        (en,) = [a["en"] for a in ADJECTIVES if a["zh"] == adjective]
        value = 2 if count == "两" else "一二三四五六七八九十".index(count) + 1
        found.add((value, en, row and row["en"]))
    return found


def lists(line: str) -> set:
    if "、" in line:
        return {frozenset(map(ZH_NOUNS.get, three)) for three in ZH_LIST.findall(line)}
    return set(map(frozenset, EN_LIST.findall(line))) if ", " in line else set()


PROBLEMS = {
    "addition": sums,
    "subtraction": sums,
    "comparison": comparisons,
    "sorting": sortings,
    "reversing": reversals,
    "spelling": spellings,
    "counting": letter_counts,
    "weekday": weekdays,
    "units": units,
    "number_to_words": numbers,
    "words_to_number": numbers,
    "translation": phrases,
    "format": lists,
}


def leaks(rows: list[dict], tests: list[dict]) -> list[str]:
    """Lines of `rows` that pose a problem of the tests."""
    asked = {name: set() for name in PROBLEMS}
    for test in tests:
        asked[test["skill"]] |= PROBLEMS[test["skill"]](test["prompt"])
    readers = set(PROBLEMS.values())
    held_out = {r: set().union(*(asked[n] for n in asked if PROBLEMS[n] is r)) for r in readers}
    return [line for line in sorted(set(lines(rows))) for r in readers if r(line) & held_out[r]]


def answer(skill: str, prompt: str) -> str:
    """The answer, from the prompt alone."""
    zh = bool(re.search("[一-鿿]", prompt))
    (problem, *others) = PROBLEMS[skill](prompt)
    assert not others or skill in ("number_to_words", "words_to_number"), prompt
    if skill == "addition":
        a, b = re.findall(r"\d+", prompt)
        tens, ones = 10 * (int(a) // 10) + 10 * (int(b) // 10), int(a[-1]) + int(b[-1])
        steps = [f"{a} + {b}", *([f"{tens} + {ones}"] if tens else []), str(sum(problem[1:]))]
        return " = ".join(steps)
    if skill == "subtraction":
        _, a, b = problem
        between = [f"{a - b + b % 10} - {b % 10}"] if b // 10 and b % 10 else []
        return " = ".join([f"{a} - {b}", *between, str(a - b)])
    if skill == "comparison":
        return str(max(problem) if re.search("larger|大", prompt) else min(problem))
    if skill == "sorting":
        return ", ".join(str(n) for n in sorted(problem))
    if skill == "reversing":
        return SPELT.search(prompt)[0][::-1]
    if skill == "spelling":
        return "-".join(problem)
    if skill == "counting":
        letter, word = problem
        so_far = [f"{c}{word[:i].count(letter)}" for i, c in enumerate(word, start=1)]
        return f"{letter}: {' '.join(so_far)} = {word.count(letter)}"
    if skill == "weekday":
        day = date(2024, 1, 1) + timedelta(days=sum(problem))  # a Monday
        weeks, rest = divmod(problem[1], 7)
        walked = [(day + timedelta(days=i - rest)).weekday() for i in range(rest + 1)]
        names = [(ZH_DAYS if zh else EN_DAYS)[weekday] for weekday in walked]
        walk = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        return f"{problem[1]} = {weeks} × 7 + {rest}: {walk}"
    if skill == "units":
        n, source, target = problem
        name = next(name for name, en in ZH_UNITS.items() if en == target) if zh else target
        return f"{n * FACTORS[source, target]} {name}"
    if skill == "words_to_number":
        return str(problem)
    if skill == "translation":
        return translate(*problem, into_english=bool(ZH_PHRASE.search(prompt)))
    return formatted(prompt, zh)


def translate(count: int, adjective: str, noun: str, into_english: bool) -> str:
    row = next(n for n in NOUNS if n["en"] == noun)
    if into_english:
        return f"{NUMERALS[count - 1]} {adjective} {noun if count == 1 else row['plural']}"
    zh = next(a["zh"] for a in ADJECTIVES if a["en"] == adjective)
    return f"{'一两三四五六七八九十'[count - 1]}{row['measure']}{zh}{row['zh']}"


def formatted(prompt: str, zh: bool) -> str:
    found = (ZH_LIST if zh else EN_LIST).search(prompt)
    items = list(found.groups())
    if "JSON" in prompt:
        return json.dumps(items, ensure_ascii=False)
    if re.search("brackets|方括号", prompt):
        return " ".join(f"[{item}]" for item in items)
    if re.search("[Nn]umber|编号", prompt):
        return "\n".join(f"{i + 1}. {item}" for i, item in enumerate(items))
    rest = prompt.replace(found[0], "")
    asked = re.findall(f"有{NOUN_ZH}吗" if zh else rf"[Ii]s {NOUN_EN} (?:among|there)", rest)
    (item,) = asked
    return ("是" if item in items else "否") if zh else ("yes" if item in items else "no")


# -- tests -----------------------------------------------------------------------------------------


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
    held_out = set(map(same, held_out))
    openings = ["Q: ", "问：", *OPENINGS["zh"], *OPENINGS["en"]]
    for name in STAGES:
        for line in lines(data[name]):
            for opening in openings:
                if line.startswith(opening):
                    assert same(line[len(opening) :]) not in held_out, (name, line)
            assert same(line) not in held_out, (name, line)
    asked = {same(row["prompt"]) for row in data["textbook_test"]}
    assert asked <= held_out and len(data["textbook_test"]) == 2 * len(TABLES["textbook"])


def test_textbook_facts_can_be_told_apart():
    """A phrasing has one answer in a language, or a model cannot know which is meant."""
    for lang in ("zh", "en"):
        facts = {}
        for fact in TABLES["textbook"]:
            for question in [*fact[lang]["questions"], fact[lang]["held_out"]]:
                facts.setdefault(same(question), {})[fact["id"]] = fact[lang]["answers"]
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
        for answer in entry["zh"]["answers"] + entry["en"]["answers"]:
            ids = tokenizer(answer, add_special_tokens=False).input_ids
            rare = [tokenizer.decode([i]) for i in ids if seen[i] < 10]
            assert not rare, (answer, rare)


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


@pytest.mark.parametrize("name", [f"{name}{end}" for name in STAGES for end in ("", "_val")])
def test_rows_are_as_the_spec_says(data, name):
    keys = {
        "pretrain_hq": {"text"},
        "dpo": {"chosen", "rejected", "reason"},
        "rlaif-mini": {"conversations", "answer"},
    }
    for row in data[name]:
        assert set(row) == keys.get(name.removesuffix("_val"), {"conversations"})
        if "text" in row:
            assert row["text"].strip() == row["text"] != ""
            continue
        for turns in (
            [row["conversations"]] if "conversations" in row else [row["chosen"], row["rejected"]]
        ):
            roles = "".join(turn["role"][0] for turn in turns)  # system, user, assistant, tool
            assert re.fullmatch("(ua)+|s(ua(ta)?)+", roles), roles
            for turn in turns:
                assert set(turn) <= {"role", "content", "tools", "tool_calls"}
                assert isinstance(turn["content"], str)
                assert turn["content"] == turn["content"].strip()
                assert turn["content"] or "tool_calls" in turn
                assert len(turn["content"]) <= 400


def test_answers_are_short(data):
    assert max(len(row["answer"]) for row in data["skills_test"]) <= 100
    assert max(len(row["answer"]) for row in data["textbook_test"]) <= 120
    replies = [row["conversations"][-1]["content"] for row in data["sft_mini_512"]]
    assert max(map(len, replies)) <= 120
    assert sum(map(len, replies)) / len(replies) < 30


def test_several_turns_and_both_languages_are_learnt(data):
    rows = [row["conversations"] for row in data["sft_mini_512"]]
    several = sum(len(turns) > 2 for turns in rows) / len(rows)
    zh = sum(bool(re.search("[一-鿿]", turns[0]["content"])) for turns in rows) / len(rows)
    assert 0.15 < several < 0.5 and 0.4 < zh < 0.6


def test_pairs_differ_for_the_reason_given(data):
    made_up = {side["made_up"] for row in TABLES["unknown"] for side in (row["zh"], row["en"])}
    count = Counter(row["reason"] for row in data["dpo"])
    assert min(count.values()) >= 200 and len(count) == 8
    assert len(data["dpo_val"]) >= 500  # for a standard error of less than 2 points
    for row in data["dpo"] + data["dpo_val"]:
        asked, good = (turn["content"] for turn in row["chosen"])
        again, bad = (turn["content"] for turn in row["rejected"])
        assert asked == again and good != bad
        if row["reason"] == "wrong_number":
            working, _, right = good.rpartition(" ")
            assert bad.startswith(working) and int(right) != int(bad.split()[-1]) >= 0
        elif row["reason"] == "wrong_answer":
            assert bad and not grade(good, bad)
        elif row["reason"] == "wrong_language":
            assert bool(re.search("[一-鿿]", good)) != bool(re.search("[一-鿿]", bad))
        elif row["reason"] == "rambling":
            assert good in bad and len(bad) > 1.3 * len(good)
        elif row["reason"] == "repeating":
            assert bad.count(good) >= 2 and set(bad.split(good)) <= {"", " "}
        elif row["reason"] == "made_up":
            assert bad in made_up and good not in made_up
        elif row["reason"] == "missing_format":
            assert good == formatted(asked, zh=bool(re.search("[一-鿿]", asked)))


def test_thoughts_lead_to_the_answer(data):
    sums, days = ({"r1_mix_1024": set(), "r1_mix_1024_val": set()} for _ in range(2))
    for name in sums:
        for row in data[name]:
            prompt, reply = (turn["content"] for turn in row["conversations"])
            form = r"<think>\n(.+)\n</think>\n<answer>\n(\d+)\n</answer>"
            thoughts, final = re.fullmatch(form, reply, re.DOTALL).groups()
            value, *given = map(int, re.findall(r"\d+", prompt))
            sums[name].add(len(given))
            _, *lines, _ = prompt.split("\n")
            week = "|".join(WEEKDAYS["zh"] + WEEKDAYS["en"])
            names = [re.match(f"(?:On )?({week})", line)[1] for line in prompt.split("\n")[:-1]]
            assert len(set(names[1:])) == len(names[1:])  # the lines that a thought says again
            days[name].add(len(names))
            for thought, line in zip(thoughts.split("\n"), lines, strict=True):
                assert thought.startswith(f"{line} ")
                worked = thought.removeprefix(f"{line} ")
                if numbers := re.findall(r"\d+", line):
                    a, sign, b = re.match(r"(\d+) ([+-]) (\d+) = \d+$", worked).groups()
                    assert (int(a), [b]) == (value, numbers)
                    value = value + int(b) if sign == "+" else value - int(b)
                assert value == int(worked.split(" ")[-1])
            assert value == int(final)
    assert max(sums["r1_mix_1024"]) < min(sums["r1_mix_1024_val"])
    assert max(days["r1_mix_1024"]) >= max(days["r1_mix_1024_val"])


def test_tools_are_called_where_they_help(data):
    used = {name: Counter() for name in ("tools", "tools_val")}
    problems = {name: set() for name in used}
    for name, given, (asked, *turns) in exchanges(data):
        if len(turns) == 1:
            missing = any(turns[0]["content"] == use[lang]["without"] for use, lang in USES)
            used[name]["missing" if missing else "not needed"] += 1
            continue
        framed = [asked["content"].startswith(start) for start in HELD_OUT_FRAMES]
        assert any(framed) == (name == "tools_val"), asked
        (call,) = json.loads(turns[0]["tool_calls"])
        arguments, result = call["arguments"], json.loads(turns[1]["content"])
        used[name][call["name"]] += 1
        schema = given[call["name"]]["function"]["parameters"]
        assert set(arguments) == set(schema["required"]) == set(schema["properties"])
        assert all(str(value) in turns[2]["content"] for value in said(call["name"], result))
        assert all(word in asked["content"] for word in known(call["name"], arguments))
        if call["name"] == "calculator":
            a, sign, b = arguments["expression"].split()
            right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            assert result == {"result": right}
            problems[name].add((*sorted((a, b)), sign))
        elif call["name"] == "clock":
            day = date.fromisoformat(result["date"]).weekday()
            assert result["weekday"] in (EN_DAYS[day], ZH_DAYS[day])
            assert any(value in turns[2]["content"] for value in result.values())
            problems[name].add((result["date"], result["time"]))
        else:
            assert json.loads(call_tool(call["name"], arguments).text) == result
            if "error" in result:  # words to copy, in training alone
                assert (call["name"], name) == ("dictionary", "tools")
                assert arguments["word"] in turns[2]["content"]
            problems[name].add(tuple(arguments.values()))
    kinds = {"calculator", "clock", "convert_units", "dictionary", "missing", "not needed"}
    for some in used.values():
        assert set(some) == kinds and min(some.values()) >= 20
    held_out = used["tools_val"]
    assert held_out.total() - held_out["missing"] - held_out["not needed"] >= 500
    assert not problems["tools"] & problems["tools_val"]


def exchanges(data):
    """Of both files: its name, the tools on offer, and a question with all that answers it."""
    for name in ("tools", "tools_val"):
        for row in data[name]:
            first, *turns = row["conversations"]
            given = {tool["function"]["name"]: tool for tool in json.loads(first["tools"])}
            assert 1 <= len(given) <= 2
            starts = [n for n, turn in enumerate(turns) if turn["role"] == "user"]
            for start, end in zip(starts, [*starts[1:], None], strict=True):
                yield name, given, turns[start:end]


def said(name: str, result: dict) -> list:
    """What of a result the answer repeats: of the clock's one, of the others' all of these."""
    keys = () if name == "clock" else ("meaning", "result")
    return [result[key] for key in keys if key in result]


def known(name: str, arguments: dict) -> list[str]:
    """What of the arguments stands in the question."""
    if name == "calculator":
        return [part for part in arguments["expression"].split() if part.isdigit()]
    return [str(arguments[key]) for key in ("value", "word") if key in arguments]


@pytest.mark.parametrize(
    "right, reply, verdict",
    [
        ("68", "68", True),
        ("68", " 68.\n", True),
        ("68", "68。", True),
        ("68", "68..", False),
        ("68", "67", False),
        ("68", "The answer is 68", False),
        ("68", "", False),
        ("Thursday", "thursday", True),
        ("1. cat\n2. dog", "1. cat  2. dog", True),
        ("c-a-t", "c a t", False),
        ("GQA 共用 KV 头。", "gqa 共用 kv 头", True),
        ("-5", "5", False),
    ],
)
def test_grade(right, reply, verdict):
    assert grade(right, reply) is verdict


def test_tests_are_loaded_or_missed_in_one_sentence(data, tmp_path):
    with pytest.raises(UserError, match="python -m dataset.demo"):
        load_tests(tmp_path)
    tests = load_tests(data.folder)
    assert set(tests) == {"skills", "textbook"}
    assert set(tests["skills"][0]) == {"skill", "lang", "prompt", "answer"}
    assert set(tests["textbook"][0]) == {"id", "lang", "prompt", "answer"}

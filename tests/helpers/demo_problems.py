"""The problem that a line of the demo data poses, and its answer, computed without the code that
wrote it."""

import json
import re
from datetime import date, timedelta
from pathlib import Path

from dataset.demo.files import load_tables

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


def messages(row: dict) -> list[dict]:
    return row.get("conversations") or row["chosen"] + row["rejected"]


def lines(rows: list[dict]) -> list[str]:
    """Every line that a model would read: of texts, prompts and answers."""
    texts = [row["text"] for row in rows if "text" in row]
    texts += [m["content"] for row in rows if "text" not in row for m in messages(row)]
    return [line for text in texts for line in text.split("\n")]


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

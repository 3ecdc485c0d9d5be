"""The skills of the demo: kinds of problems whose one correct answer is computed.

A skill is two small functions and one or several rows of dataset/demo/texts/skills.jsonl.
Answers that take several steps show their working, each step of which is easy: a small model can
learn rules that it could not apply in one step. An answer is right only if its working is too.
`problems(tables, rng)` lists its problems, each once, in canonical form: a problem is the same in
any language, phrasing or order of arguments. Skills with the same function hold out the same
problems, since the name of the function is part of the seed. `solve(problem, lang, variant, rng)`
fills the slots of a prompt, "answer" among them.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, product
from random import Random
from typing import Any

from dataset.tools.builtin import MEANINGS, WEEKDAYS

LANGUAGES = ("zh", "en")

Table = list[dict]  # the rows of a JSONL file
Problem = Any  # the numbers of a problem; of the dictionary's, a word

UNITS = (  # source, target (each zh, en), factor; with a factor of 60 up to 20 only
    (("厘米", "centimetres"), ("毫米", "millimetres"), 10),
    (("米", "metres"), ("厘米", "centimetres"), 100),
    (("千米", "kilometres"), ("米", "metres"), 1000),
    (("千克", "kilograms"), ("克", "grams"), 1000),
    (("吨", "tonnes"), ("千克", "kilograms"), 1000),
    (("升", "litres"), ("毫升", "millilitres"), 1000),
    (("小时", "hours"), ("分钟", "minutes"), 60),
    (("分钟", "minutes"), ("秒", "seconds"), 60),
)
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
DIGITS = "零一二三四五六七八九"
VOWELS, CONSONANTS = "aeiou", "bcdfghklmnprstvwz"


def distinct(problems: Iterable[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))


def sums(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """Two numbers 0–99; 3 + 5 and 5 + 3 are one problem."""
    return list(combinations_with_replacement(range(100), 2))


def addition(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    """Tens and ones are added separately: 37 + 45 = 70 + 12 = 82."""
    a, b = rng.sample(problem, 2)
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    working = f" = {tens} + {ones}" if tens else ""
    return {"a": a, "b": b, "answer": f"{a} + {b}{working} = {a + b}"}


def two_digits(problem: Problem) -> bool:
    """Neither number is small or round: such a problem is never a step of another's working."""
    return all(n > 9 and n % 10 for n in problem)


def differences(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """Two numbers 0–99, the larger first: no answer is negative."""
    return [(a, b) for a in range(100) for b in range(a + 1)]


def subtraction(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    """The tens first: 82 - 45 = 42 - 5 = 37."""
    a, b = problem
    working = f" = {a - b // 10 * 10} - {b % 10}" if b > 9 and b % 10 else ""
    return {"a": a, "b": b, "answer": f"{a} - {b}{working} = {a - b}"}


def pairs(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """Two different numbers 0–99; which is asked first does not matter."""
    return list(combinations(range(100), 2))


def comparison(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    a, b = rng.sample(problem, 2)
    larger, smaller = max(a, b), min(a, b)
    right, wrong = (larger, smaller) if variant == "larger" else (smaller, larger)
    return {"a": a, "b": b, "answer": right, "worse": str(wrong)}


def foursomes(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """Four different numbers 0–99, asked in any order."""
    return distinct(tuple(sorted(rng.sample(range(100), 4))) for _ in range(8000))


def sorting(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    mixed = rng.sample(problem, 4)
    return {"numbers": ", ".join(map(str, mixed)), "answer": ", ".join(map(str, sorted(mixed)))}


def words(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """The English words of three to six letters in words.jsonl."""
    return [(word,) for theme in tables["words"] for word in theme["words"]]


def made_up_words(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """Alternating vowels and consonants, and beginnings of words with ends of others, so that the
    model learns letters and not a list of words."""
    real = [word for (word,) in words(tables, rng)]
    made = []
    for _ in range(700):
        first, length = rng.randrange(2), rng.randint(3, 6)
        sounds = [(VOWELS, CONSONANTS)[(first + i) % 2] for i in range(length)]
        made.append("".join(map(rng.choice, sounds)))
    for _ in range(2500):
        one, other = rng.sample(real, 2)
        joined = one[: rng.randint(1, len(one) - 1)] + other[rng.randint(1, len(other) - 1) :]
        made += [joined] if 3 <= len(joined) <= 6 else []
    return distinct((word,) for word in made if word not in real and word[::-1] not in real)


def reversing(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    (word,) = problem
    return {"letters": "-".join(word), "answer": "-".join(reversed(word))}


def spelling(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    """In capitals, which the tokenizer splits into short tokens: a rule can be learnt."""
    (word,) = problem
    return {"word": word.upper(), "answer": "-".join(word)}


def letters(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """(letter, word): every repeated letter, some single ones, some that do not occur."""
    found = []
    for (word,) in words(tables, rng):
        repeated = sorted(letter for letter in set(word) if word.count(letter) > 1)
        single = [rng.choice([c for c in word if c not in repeated] or repeated)]
        absent = [rng.choice([c for c in VOWELS + CONSONANTS if c not in word])]
        found += [(c, word) for c in repeated + single + absent * (rng.random() < 0.4)]
    return distinct(found)


def made_up_letters(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """0 to 4 of one letter among others, equally often."""
    made, real = [], {word for (word,) in words(tables, rng)}
    for _ in range(700):
        letter, *others = rng.sample(VOWELS + CONSONANTS, 6)
        count = rng.randrange(5)
        mixed = [letter] * count + others[: rng.randint(max(3 - count, 0), 6 - count)]
        made.append((letter, "".join(rng.sample(mixed, len(mixed)))))
    return distinct((letter, word) for letter, word in made if word not in real)


def counting(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    """Counted along the word: the o in spoon is o: s0 p0 o1 o2 n2 = 2."""
    letter, word = problem
    counted = " ".join(f"{c}{word[: i + 1].count(letter)}" for i, c in enumerate(word))
    answer = f"{letter}: {counted} = {word.count(letter)}"
    return {"letter": letter, "letters": "-".join(word), "answer": answer}


def days(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """(weekday, 0 = Monday; 1–60 days later)."""
    return list(product(range(7), range(1, 61)))


def weekday(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    """Whole weeks are dropped, the rest is counted: 9 = 1 × 7 + 2: 0 Monday, 1 Tuesday, …"""
    day, n = problem
    weeks, rest = divmod(n, 7)
    names = WEEKDAYS[lang]
    slots = {"day": names[day], "n": n, "weeks": weeks, "rest": rest}
    walk = ", ".join(f"{i} {names[(day + i) % 7]}" for i in range(rest + 1))
    answer = f"{n} = {weeks} × 7 + {rest}: {walk}"
    return slots | {"later": names[(day + n) % 7], "answer": answer}


def quantities(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """(row of UNITS, how many)."""
    most = [20 if factor == 60 else 99 for _, _, factor in UNITS]
    return [(unit, n) for unit in range(len(UNITS)) for n in range(2, most[unit] + 1)]


def conversion(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    unit, n = problem
    source, target, factor = UNITS[unit]
    side = LANGUAGES.index(lang)
    slots = {"n": n, "source": source[side], "target": target[side]}
    return slots | {"answer": f"{n * factor} {target[side]}"}


def numbers(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """0–999, for both directions between digits and words."""
    return [(n,) for n in range(1000)]


def in_words(n: int, lang: str) -> str:
    """0–999: 305 is 三百零五, or three hundred and five."""
    return english(n) if lang == "en" else chinese(n)


def english(n: int) -> str:
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {english(n % 100)}" if n % 100 else "")


def chinese(n: int) -> str:
    if n < 10:
        return DIGITS[n]
    if n < 100:
        tens = "十" if n < 20 else f"{DIGITS[n // 10]}十"
        return tens + (DIGITS[n % 10] if n % 10 else "")
    rest = n % 100
    link = "" if rest == 0 else "零" if rest < 10 else "一" if rest < 20 else ""
    return f"{DIGITS[n // 100]}百{link}" + (chinese(rest) if rest else "")


def number_to_words(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    return {"n": problem[0], "answer": in_words(problem[0], lang)}


def words_to_number(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    return {"words": in_words(problem[0], lang), "answer": problem[0]}


def phrases(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """(the phrase in zh, in en), such as 三个红苹果 and three red apples."""
    nouns = [row for row in tables["phrases"] if row["kind"] == "noun"]
    adjectives = [row for row in tables["phrases"] if row["kind"] == "adjective"]
    found = []
    for n, adjective, noun in product(range(1, 11), adjectives, nouns):
        if noun["class"] in adjective["fits"]:
            count = "两" if n == 2 else in_words(n, "zh")
            things = noun["en"] if n == 1 else noun["plural"]
            zh = count + noun["measure"] + adjective["zh"] + noun["zh"]
            found.append((zh, f"{in_words(n, 'en')} {adjective['en']} {things}"))
    return found


def translation(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    zh, en = problem
    return {"zh": zh, "en": en, "answer": en if variant == "into_english" else zh}


def lists(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """(three nouns, a fourth that is not among them), each noun as (zh, en)."""
    nouns = [(row["zh"], row["en"]) for row in tables["phrases"] if row["kind"] == "noun"]
    drawn = (rng.sample(nouns, 4) for _ in range(4000))
    return list({(three := tuple(sorted(some[:3]))): (three, some[3]) for some in drawn}.values())


def formatting(problem: Problem, lang: str, variant: str, rng: Random) -> dict:
    three, other = problem
    side = LANGUAGES.index(lang)
    items = [noun[side] for noun in rng.sample(three, 3)]
    asked = rng.choice((rng.choice(items), other[side]))
    yes, no = ("是", "否") if lang == "zh" else ("yes", "no")
    answer = {
        "json": json.dumps(items, ensure_ascii=False),
        "brackets": " ".join(f"[{item}]" for item in items),
        "numbered": "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1)),
        "yes_no": yes if asked in items else no,
    }[variant]
    plain = ("、" if lang == "zh" else ", ").join(items)
    return {"items": plain, "item": asked, "answer": answer, "worse": plain}


def calculations(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """(a, operator, b), too hard to do without the calculator; for tools.jsonl only."""
    drawn = []
    for _ in range(700):
        a, b = rng.randint(12, 99), rng.randint(12, 99)
        drawn.append((max(a, b), "*", min(a, b)))
        drawn.append((rng.randint(500, 999), rng.choice("+-"), rng.randint(100, 499)))
    return distinct(drawn)


def conversions(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """(value, place in the table's list of units), for tools.jsonl only."""
    (row,) = (row for row in tables["tool_use"] if row["kind"] == "conversion")
    return list(product(range(2, 100), range(len(row["units"]))))


def lookups(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """Words of the dictionary."""
    return list(MEANINGS)


TOOL_PROBLEMS = {"calculator": calculations, "convert_units": conversions, "dictionary": lookups}


@dataclass(frozen=True)
class Skill:
    """One kind of problem with one correct answer.

    `practice` adds problems for training only; `testable` says which ones may be held out.
    """

    name: str
    problems: Callable[[dict[str, Table], Random], list[Problem]]
    solve: Callable[[Problem, str, str, Random], dict]
    weight: float = 1.0
    practice: Callable[[dict[str, Table], Random], list[Problem]] | None = None
    testable: Callable[[Problem], bool] = bool


SKILLS = (
    Skill("addition", sums, addition, weight=1.6, testable=two_digits),
    Skill("subtraction", differences, subtraction, weight=1.6, testable=two_digits),
    Skill("comparison", pairs, comparison, weight=0.8),
    Skill("sorting", foursomes, sorting, weight=1.4),
    Skill("reversing", words, reversing, weight=1.2, practice=made_up_words),
    Skill("spelling", words, spelling, weight=1.5, practice=made_up_words),
    Skill("counting", letters, counting, weight=1.6, practice=made_up_letters),
    Skill("weekday", days, weekday, weight=1.2),
    Skill("units", quantities, conversion, weight=0.7),
    Skill("number_to_words", numbers, number_to_words, weight=0.8),
    Skill("words_to_number", numbers, words_to_number, weight=0.6),
    Skill("translation", phrases, translation, weight=1.1),
    Skill("format", lists, formatting, weight=1.2),
)

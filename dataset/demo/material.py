"""The material of the demo: its hand-written tables, and the problems of every skill, both split
once into what is trained on and what is held out.

Held out are other problems, other phrasings, other names and numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from random import Random

from dataset.demo.skills import LANGUAGES, SKILLS, TOOL_PROBLEMS, Problem, Skill, Table

TRAIN, VAL = "train", "val"

HELD_OUT = 60  # problems of each skill that only the tests ask, each in both languages
TOOL_HELD_OUT = {"calculator": 150, "convert_units": 150, "dictionary": 12}  # as HELD_OUT
SFT_PASSES = {"textbook": 3, "small_talk": 4, "identity": 6, "unknown": 5, "dialogues": 30}


@dataclass(frozen=True)
class Exchange:
    """A question and its answer; `statement` is both as running text.

    `worse` is an answer with a fault: unformatted, made up, or in the other language.
    """

    kind: str
    lang: str
    prompt: str
    answer: str
    statement: str = ""
    worse: str = ""


def split(
    problems: list[Problem],
    rng: Random,
    testable: Callable[[Problem], bool] = bool,
    count: int = HELD_OUT,
) -> dict[str, list[Problem]]:
    """Shuffle, and hold out `count` of the testable problems."""
    mixed = rng.sample(problems, len(problems))
    held_out = [problem for problem in mixed if testable(problem)][:count]
    apart = set(held_out)
    return {TRAIN: [problem for problem in mixed if problem not in apart], VAL: held_out}


def phrasing_key(text: str) -> str:
    """The phrasing without case, spaces and punctuation, to compare it."""
    return "".join(filter(str.isalnum, text.casefold()))


class Material:
    """The hand-written tables, and the problems of every skill, split into TRAIN and VAL."""

    def __init__(self, tables: dict[str, Table], seed: int):
        self.tables = tables
        self.skills = {skill.name: skill for skill in SKILLS}
        self.problems = {}
        spaces = [(skill.name, skill.problems, skill.testable) for skill in SKILLS]
        spaces += [(name, space, bool) for name, space in TOOL_PROBLEMS.items()]
        for name, space, testable in spaces:
            rng = Random(f"{seed}/{space.__name__}")  # the same function, the same split
            count = TOOL_HELD_OUT.get(name, HELD_OUT)
            self.problems[name] = split(space(tables, rng), rng, testable, count)
        for skill in SKILLS:
            if skill.practice:
                more = skill.practice(tables, Random(f"{seed}/{skill.practice.__name__}"))
                self.problems[skill.name][TRAIN] += more
        asked = [entry for kind in (*SFT_PASSES, "persona") for entry in tables[kind]]
        self.held_out_phrasings = {
            phrasing_key(entry[lang]["held_out"])
            for entry, lang in product(asked, LANGUAGES)
            if "held_out" in entry[lang]
        }

    def pose(self, skill: Skill, problem: Problem, lang: str, rng: Random) -> Exchange:
        """A problem as a question and its answer: one of the skill's prompts, filled in."""
        row = rng.choice([row for row in self.tables["skills"] if row["skill"] == skill.name])
        slots = skill.solve(problem, lang, row.get("variant", ""), rng)
        prompt = rng.choice(row[lang]["prompts"]).format(**slots)
        statement = row[lang]["statement"].format(**slots)
        worse = slots.get("worse", "")
        return Exchange(skill.name, lang, prompt, str(slots["answer"]), statement, worse)

    def exercises(self, skill: Skill, part: str, count: int, rng: Random) -> Iterator[Exchange]:
        """`count` exercises in alternating languages; no problem repeats before all were used."""
        order: list[Problem] = []
        for i in range(count):
            order = order or rng.sample(pool := self.problems[skill.name][part], len(pool))
            yield self.pose(skill, order.pop(), LANGUAGES[i % 2], rng)

    def all_exercises(self, part: str, count: int, rng: Random) -> list[Exchange]:
        """`count` exercises of each skill, times its weight."""
        counts = ((skill, round(count * skill.weight)) for skill in SKILLS)
        return [e for skill, count in counts for e in self.exercises(skill, part, count, rng)]

    def questions(self, kind: str, part: str, rng: Random) -> Iterator[Exchange]:
        """Each phrasing of each entry of a table: those for training, or the held-out one."""
        for entry, (lang, other) in product(self.tables[kind], (LANGUAGES, LANGUAGES[::-1])):
            side = entry[lang]
            worse = side.get("made_up") or rng.choice(entry[other]["answers"])
            for question in side["questions"] if part == TRAIN else [side["held_out"]]:
                if part == VAL or phrasing_key(question) not in self.held_out_phrasings:
                    yield Exchange(kind, lang, question, rng.choice(side["answers"]), worse=worse)

    def vary(self, exchange: Exchange, rng: Random) -> Exchange:
        """The prompt as another person might type it: in a hurry, or politely."""
        prompt, lang, chance = exchange.prompt, exchange.lang, 0.1
        if exchange.kind == "textbook":
            chance = 0.5
            prompt = hurried(prompt, lang, rng) if rng.random() < 0.15 else prompt
        if rng.random() < chance:
            prompt = rng.choice(OPENINGS[lang]) + prompt
        if rng.random() < chance / 3:
            prompt += rng.choice(CLOSINGS[lang])
        held_out = phrasing_key(prompt) in self.held_out_phrasings
        return exchange if held_out else replace(exchange, prompt=prompt)


OPENINGS = {
    "zh": (
        "请问，", "你好，", "请告诉我：", "我想知道：", "麻烦问下，", "请回答：", "帮我看看：",
        "我不太懂：", "能说说吗，", "我是新手，", "早就想问，", "有个问题：", "听别人说起过，",
        "我正在看论文，", "简单说说，", "给我讲讲：",
    ),
    "en": (
        "Please tell me: ", "Hi! ", "I would like to know: ", "A question: ", "Please answer: ",
        "I wonder: ", "I am new to this. ", "I do not understand this: ", "People talk of it; ",
        "Can you tell me: ", "Some people ask: ", "In short: ", "Could you explain? ",
        "I keep asking myself: ", "For an exam: ",
    ),
}  # fmt: skip
CLOSINGS = {
    "zh": ("谢谢！", "我想不明白。", "简单说就行。", "能讲讲吗？", "我是新手。"),
    "en": (" Thanks!", " I am puzzled.", " Keep it short.", " Can you explain it?", " I wonder."),
}
FUNCTION_WORDS = {"zh": set("的呢吗"), "en": set("a an the of for to please".split())}


def hurried(prompt: str, lang: str, rng: Random) -> str:
    """Without the final punctuation, and without some of the function words."""
    prompt = prompt.rstrip("？?。.")
    words = prompt.split() if lang == "en" else list(prompt)
    kept = [p for p in words if p.lower() not in FUNCTION_WORDS[lang] or rng.random() < 0.5]
    return (" " if lang == "en" else "").join(kept).strip()

"""The rows of every demo file: what is asked, in which words, and how often.

`Material` holds the hand-written tables and splits the problems of every skill once. Below it, one
function makes the rows of one file; called with "val" instead of "train" it draws on what is held
out: other problems, other phrasings, other names and numbers.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta
from itertools import product
from random import Random
from typing import Any

from dataset.demo.skills import LANGUAGES, SKILLS, Problem, Skill, Table, calculations
from dataset.text import is_chinese
from dataset.tools.builtin import MEANINGS, TOOLS, WEEKDAYS, call_tool

TRAIN, VAL = "train", "val"

# How much of everything. Together about 1M tokens of pretraining and 1.2M of fine-tuning.
HELD_OUT = 60  # problems of each skill that only the tests ask, each in both languages
PRETRAIN_EXERCISES = 2600  # of a skill of weight 1
PRETRAIN_FACT_PASSES = 3  # each with every training phrasing of every fact, and the chapters
SFT_EXERCISES = 1700
SFT_PASSES = {"textbook": 3, "small_talk": 4, "identity": 6, "unknown": 5, "dialogues": 30}
DPO_PAIRS, DPO_VAL_PAIRS = 300, 100  # for each reason, as far as there are questions
RLAIF_PROMPTS = 800  # for each skill
R1_PROBLEMS = {TRAIN: 2600, VAL: 600}
R1_SUMS, R1_DAYS = {TRAIN: (2, 3), VAL: (4, 5)}, {TRAIN: 8, VAL: 6}
TOOL_ROWS, TOOL_VAL_ROWS = 2400, 600
TOOL_MIX = {  # how often a tool helps, would help but is not on offer, or is not needed
    TRAIN: {"helps": 10, "missing": 2, "not_needed": 3},
    VAL: {"helps": 14, "missing": 1, "not_needed": 1},
}
TOOL_SHARES = {  # copying a word is learnt late
    TRAIN: {"calculator": 3, "clock": 4, "convert_units": 3, "dictionary": 4},
    VAL: {"calculator": 3, "clock": 3, "convert_units": 3, "dictionary": 1},
}
TOOL_HELD_OUT = {"calculator": 150, "convert_units": 150, "dictionary": 12}  # as HELD_OUT


# -- the material: everything that a file may draw on, split once ----------------------------------


@dataclass(frozen=True)
class Exchange:
    """A question and its answer; `statement` says both in running text.

    `worse` is the same answer with a fault: unformatted, made up, or in the other language.
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
    """Shuffle, and keep `count` of the testable problems away from training."""
    mixed = rng.sample(problems, len(problems))
    held_out = [problem for problem in mixed if testable(problem)][:count]
    apart = set(held_out)
    return {TRAIN: [problem for problem in mixed if problem not in apart], VAL: held_out}


def same(text: str) -> str:
    """What is left of a phrasing when case, spaces and punctuation do not count."""
    return "".join(filter(str.isalnum, text.casefold()))


class Material:
    """The hand-written tables, and the problems of every skill in two parts."""

    def __init__(self, tables: dict[str, Table], seed: int):
        self.tables = tables
        self.skills = {skill.name: skill for skill in SKILLS}
        self.problems = {}
        spaces = [(skill.name, skill.problems, skill.testable) for skill in SKILLS]
        spaces += [(name, space, bool) for name, space in TOOL_PROBLEMS.items()]
        for name, space, testable in spaces:
            rng = Random(f"{seed}/{space.__name__}")  # skills of the same problems: the same split
            count = TOOL_HELD_OUT.get(name, HELD_OUT)
            self.problems[name] = split(space(tables, rng), rng, testable, count)
        for skill in SKILLS:
            if skill.practice:
                more = skill.practice(tables, Random(f"{seed}/{skill.practice.__name__}"))
                self.problems[skill.name][TRAIN] += more
        asked = [entry for kind in (*SFT_PASSES, "persona") for entry in tables[kind]]
        self.held_out_phrasings = {
            same(entry[lang]["held_out"])
            for entry, lang in product(asked, LANGUAGES)
            if "held_out" in entry[lang]
        }

    def pose(self, skill: Skill, problem: Problem, lang: str, rng: Random) -> Exchange:
        """Put a problem into words: one of the skill's prompts, filled in."""
        row = rng.choice([row for row in self.tables["skills"] if row["skill"] == skill.name])
        slots = skill.solve(problem, lang, row.get("variant", ""), rng)
        prompt = rng.choice(row[lang]["prompts"]).format(**slots)
        statement = row[lang]["statement"].format(**slots)
        worse = slots.get("worse", "")
        return Exchange(skill.name, lang, prompt, str(slots["answer"]), statement, worse)

    def exercises(self, skill: Skill, part: str, count: int, rng: Random) -> Iterator[Exchange]:
        """The languages in turn; no problem comes twice before all came once."""
        order: list[Problem] = []
        for i in range(count):
            order = order or rng.sample(pool := self.problems[skill.name][part], len(pool))
            yield self.pose(skill, order.pop(), LANGUAGES[i % 2], rng)

    def all_exercises(self, part: str, count: int, rng: Random) -> list[Exchange]:
        """`count` times the weight of each skill."""
        counts = ((skill, round(count * skill.weight)) for skill in SKILLS)
        return [e for skill, count in counts for e in self.exercises(skill, part, count, rng)]

    def questions(self, kind: str, part: str, rng: Random) -> Iterator[Exchange]:
        """Each phrasing of each entry of a table: the training ones, or the one held out."""
        for entry, (lang, other) in product(self.tables[kind], (LANGUAGES, LANGUAGES[::-1])):
            side = entry[lang]
            worse = side.get("made_up") or rng.choice(entry[other]["answers"])
            for question in side["questions"] if part == TRAIN else [side["held_out"]]:
                if part == VAL or same(question) not in self.held_out_phrasings:
                    yield Exchange(kind, lang, question, rng.choice(side["answers"]), worse=worse)

    def vary(self, exchange: Exchange, rng: Random) -> Exchange:
        """The prompt as someone else might type it, in a hurry or politely."""
        prompt, lang, chance = exchange.prompt, exchange.lang, 0.1
        if exchange.kind == "textbook":
            chance = 0.5
            prompt = hurried(prompt, lang, rng) if rng.random() < 0.15 else prompt
        if rng.random() < chance:
            prompt = rng.choice(OPENINGS[lang]) + prompt
        if rng.random() < chance / 3:
            prompt += rng.choice(CLOSINGS[lang])
        held_out = same(prompt) in self.held_out_phrasings
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
SMALL_WORDS = {"zh": set("的呢吗"), "en": set("a an the of for to please".split())}


def hurried(prompt: str, lang: str, rng: Random) -> str:
    """Without the last mark, and without some of the small words."""
    prompt = prompt.rstrip("？?。.")
    pieces = prompt.split() if lang == "en" else list(prompt)
    kept = [p for p in pieces if p.lower() not in SMALL_WORDS[lang] or rng.random() < 0.5]
    return (" " if lang == "en" else "").join(kept).strip()


# -- the files: each function makes the rows of one file, of the part to train on or held out ------


def conversation(*exchanges: Exchange) -> list[dict]:
    """User and assistant in turn."""
    turns = [(("user", e.prompt), ("assistant", e.answer)) for e in exchanges]
    return [{"role": role, "content": content} for turn in turns for role, content in turn]


def documents(exchanges: Iterable[Exchange], rng: Random) -> Iterator[str]:
    """Three to eight exchanges of one kind and language as one text, in one of three styles."""
    groups = defaultdict(list)
    for exchange in exchanges:
        groups[exchange.kind, exchange.lang].append(exchange)
    for (_, lang), group in groups.items():
        rng.shuffle(group)
        labels = ("问：", "答：") if lang == "zh" else ("Q: ", "A: ")
        while group:
            some = [group.pop() for _ in range(min(rng.randint(3, 8), len(group)))]
            q, a = rng.choice((labels, ("", "")))
            if some[0].statement and rng.random() < 0.5:
                yield "\n".join(e.statement for e in some)
            else:
                yield "\n\n".join(f"{q}{e.prompt}\n{a}{e.answer}" for e in some)


def chapters(m: Material, rng: Random) -> Iterator[str]:
    """The facts of one topic strung together, up to ten in one text."""
    topics = defaultdict(list)
    for fact, lang in product(m.tables["textbook"], LANGUAGES):
        topics[fact["topic"], lang] += fact[lang]["answers"]
    for (topic, lang), facts in topics.items():
        rng.shuffle(facts)
        for start in range(0, len(facts), 10):
            yield f"# {topic}\n\n" + ("" if lang == "zh" else " ").join(facts[start : start + 10])


def pretrain(m: Material, part: str, rng: Random) -> Table:
    """Text to learn the languages, the facts and the skills from."""
    exchanges = m.all_exercises(part, PRETRAIN_EXERCISES if part == TRAIN else HELD_OUT, rng)
    texts = []
    for _ in range(PRETRAIN_FACT_PASSES if part == TRAIN else 1):
        facts = m.questions("textbook", part, rng)
        exchanges += (m.vary(e, rng) if part == TRAIN else e for e in facts)
        texts += chapters(m, rng) if part == TRAIN else ()
    for kind in ("small_talk", "identity", "unknown"):
        exchanges += m.questions(kind, part, rng)
    return [{"text": text} for text in (*documents(exchanges, rng), *texts)]


def converse(exchanges: list[Exchange], rng: Random) -> Iterator[list[dict]]:
    """Each exchange once: most alone, the others two or three of different kinds in a row."""
    for lang in LANGUAGES:
        queue = [exchange for exchange in exchanges if exchange.lang == lang]
        rng.shuffle(queue)
        while queue:
            turns = [queue.pop()]
            for _ in range(rng.choice((0, 0, 0, 0, 0, 0, 0, 1, 1, 2))):
                if queue and queue[-1].kind not in {turn.kind for turn in turns}:
                    turns.append(queue.pop())
            yield conversation(*turns)


def dialogue(m: Material, entry: dict, lang: str, part: str, rng: Random) -> list[dict]:
    """What the user said is needed later; at times something else comes in between."""
    slots = {}
    for name, values in entry[lang]["slots"].items():
        kept = len(values) - max(1, len(values) // 6)
        slots[name] = rng.choice(values[:kept] if part == TRAIN else values[kept:])
    said = [rng.choice(options).format(**slots) for options in entry[lang]["turns"]]
    turns = [Exchange("dialogues", lang, *said[i : i + 2]) for i in range(0, len(said), 2)]
    if rng.random() < 0.4:
        skill = rng.choice(SKILLS)
        aside = rng.choice(m.problems[skill.name][part])
        turns.insert(-1, m.pose(skill, aside, lang, rng))
    return conversation(*turns)


def sft(m: Material, part: str, rng: Random) -> Table:
    """Conversations: skills, facts and talk, alone and in turn, and dialogues that need memory."""
    exchanges = m.all_exercises(part, SFT_EXERCISES if part == TRAIN else HELD_OUT, rng)
    rows = []
    for kind, passes in SFT_PASSES.items():
        for _ in range(passes if part == TRAIN else 1):
            if kind == "dialogues":
                asked = product(m.tables[kind], LANGUAGES)
                rows += (dialogue(m, entry, lang, part, rng) for entry, lang in asked)
            else:
                exchanges += m.questions(kind, part, rng)
    if part == TRAIN:
        talk = set(SFT_PASSES) - {"textbook"}
        exchanges = [e if e.kind in talk else m.vary(e, rng) for e in exchanges]
    return [{"conversations": row} for row in (*rows, *converse(exchanges, rng))]


REASONS = {  # why the rejected answer is worse → what is asked
    "wrong_number": ("addition", "subtraction"),
    "wrong_answer": (
        *("comparison", "sorting", "reversing", "spelling", "units"),
        *("words_to_number", "number_to_words", "translation"),
    ),
    "wrong_language": ("textbook",),
    "rambling": ("textbook",),
    "repeating": ("textbook", "small_talk"),
    "rude": ("small_talk",),
    "made_up": ("unknown",),
    "missing_format": ("format",),
}


def spoil(e: Exchange, reason: str, manner: dict[tuple, list[str]], rng: Random) -> str:
    """The answer of `e` with the one fault that `reason` names."""
    if reason == "wrong_number":
        working, _, right = e.answer.rpartition(" ")
        return f"{working} {near(int(right), rng)}"
    if reason == "wrong_answer":
        return e.worse or mistake(e.answer, rng)
    if reason == "rambling":
        opening, closing = (rng.choice(manner[kind, e.lang]) for kind in ("opening", "closing"))
        return ("" if e.lang == "zh" else " ").join((opening, e.answer, closing))
    if reason == "repeating":
        return ("" if e.lang == "zh" else " ").join([e.answer] * rng.randint(2, 4))
    return rng.choice(manner["rude", e.lang]) if reason == "rude" else e.worse


def near(right: int, rng: Random) -> int:
    """Another number that is not negative, off by one or by ten."""
    return rng.choice([n for d in (-10, -1, 1, 10) if (n := right + d) >= 0])


def mistake(answer: str, rng: Random) -> str:
    """The answer as someone gives it who was not careful: two neighbours in a row of things change
    places, a number is a little off, a piece is missing."""
    first, _, unit = answer.partition(" ")
    if first.isdigit():  # a number, perhaps with its unit: a zero too few or too many
        right = int(first)
        wrong = rng.choice((right * 10, right // 10)) if unit and right > 9 else near(right, rng)
        return f"{wrong} {unit}".strip()
    separator = next((s for s in (", ", "-", " ") if s in answer), "")
    pieces = answer.split(separator) if separator else list(answer)
    places = [i for i in range(len(pieces) - 1) if pieces[i] != pieces[i + 1]]
    if len(pieces) == 1:
        return answer * 2
    if not places or rng.random() < 0.3:
        del pieces[rng.randrange(len(pieces))]
    else:
        i = rng.choice(places)
        pieces[i], pieces[i + 1] = pieces[i + 1], pieces[i]
    return separator.join(pieces)


def dpo(m: Material, part: str, rng: Random) -> Table:
    """Pairs of answers, one better for one reason, which stands in the row."""
    manner = defaultdict(list)
    for row, lang in product(m.tables["preferences"], LANGUAGES):
        manner[row["kind"], lang].append(row[lang])
    count = DPO_PAIRS if part == TRAIN else DPO_VAL_PAIRS
    rows = []
    for reason, kinds in REASONS.items():
        asked = []
        for kind in kinds:
            skill = m.skills.get(kind)
            asked += m.exercises(skill, part, count, rng) if skill else m.questions(kind, part, rng)
        if reason == "wrong_language":  # not where the answer is the same name in both
            asked = [e for e in asked if is_chinese(e.answer) != is_chinese(e.worse)]
        for good in rng.sample(asked, min(count, len(asked))):
            bad = replace(good, answer=spoil(good, reason, manner, rng))
            pair = {"chosen": conversation(good), "rejected": conversation(bad)}
            rows.append(pair | {"reason": reason})
    return rows


def rlaif(m: Material, part: str, rng: Random) -> Table:
    """Prompts whose answers a rule can check; the model writes the answers itself."""
    count = RLAIF_PROMPTS if part == TRAIN else RLAIF_PROMPTS // 10
    rows = []
    for skill in SKILLS:
        for e in m.exercises(skill, part, count, rng):
            asked = conversation(replace(e, answer="无"))  # ignored, says SPEC §4
            rows.append({"conversations": asked, "answer": e.answer})
    return rows


SIGNS = {"plus": "+", "minus": "-"}
IDLE = {
    "zh": ("没有变化。", "这一天什么也没有发生。", "和前一天一样，没有变化。"),
    "en": ("No change.", "Nothing happens all day.", "It is as on the day before."),
}


def walk(m: Material, steps: int, rng: Random) -> Iterator[tuple[str, int, int, int]]:
    """(plus or minus, before, number, after) within 0–99, with no sum that the tests ask."""
    value = rng.randint(2, 60)
    while steps:
        n, way = rng.randint(2, 50), rng.choice(("plus", "minus"))
        name = "addition" if way == "plus" else "subtraction"
        after = value + n if way == "plus" else value - n
        problem = (min(value, n), max(value, n)) if way == "plus" else (value, n)
        if 0 <= after <= 99 and problem not in m.problems[name][VAL]:
            yield way, value, n, after
            value, steps = after, steps - 1


def r1(m: Material, part: str, rng: Random) -> Table:
    """Stories of some days with two or three sums, thought through aloud; four or five sums are
    held out.

    A thought says a line of the story again and does its sum beside it. On some days nothing
    changes, so that held-out stories are no longer than those trained on: a small model learns how
    far away the next line is and after how many it stops, and would be lost among more of them. A
    line begins with its day alone, for what is easiest to find is what came behind the same word.
    """
    found = {}
    while len(found) < R1_PROBLEMS[part]:
        lang = rng.choice(LANGUAGES)
        story = rng.choice(m.tables["stories"])[lang]
        steps = list(walk(m, rng.choice(R1_SUMS[part]), rng))
        days: list[tuple | None] = list(steps)
        for _ in range(rng.randint(0, R1_DAYS[part] - 1 - len(steps))):
            days.insert(rng.randint(0, len(days)), None)
        value = steps[0][1]
        told, worked = [story["start"].format(n=value)], []
        for step in days:
            if step:
                way, before, n, value = step
                told.append(rng.choice(story[way]).format(n=n))
                worked.append(f"{before} {SIGNS[way]} {n} = {value}")
            else:
                told.append(rng.choice(IDLE[lang]))
                worked.append(str(value))
        first, on = rng.randrange(7), "{}{}" if lang == "zh" else "On {} {}"
        lines = [
            on.format(WEEKDAYS[lang][(first + i) % 7], sentence[0].lower() + sentence[1:])
            for i, sentence in enumerate(told)
        ]
        thought = "\n".join(map(" ".join, zip(lines[1:], worked, strict=True)))
        answer = f"<think>\n{thought}\n</think>\n<answer>\n{value}\n</answer>"
        prompt = "\n".join([*lines, story["question"]])
        found[prompt] = conversation(Exchange("r1", lang, prompt, answer))
    return [{"conversations": row} for row in found.values()]


# -- tools -----------------------------------------------------------------------------------------


def conversions(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """(value, place in the table's list of units), for tools.jsonl only."""
    (row,) = (row for row in tables["tool_use"] if row["kind"] == "conversion")
    return list(product(range(2, 100), range(len(row["units"]))))


def lookups(tables: dict[str, Table], rng: Random) -> list[Problem]:
    """Words of the dictionary."""
    return list(MEANINGS)


TOOL_PROBLEMS = {"calculator": calculations, "convert_units": conversions, "dictionary": lookups}
SYSTEM = {
    "zh": "你是 MiniMind，需要时请使用工具。",
    "en": "You are MiniMind. Use a tool if it helps.",
}


def as_json(value: object) -> str:
    """As the SPEC has tools and calls: a string, so that every row has the same columns."""
    return json.dumps(value, ensure_ascii=False)


def arguments_of(
    m: Material, use: dict, lang: str, part: str, rng: Random
) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments of a call, and what the question says of them."""
    problem = rng.choice(m.problems[use["tool"]][part])
    if use["tool"] == "dictionary" and part == TRAIN and rng.random() < 0.7:
        (problem,) = rng.choice(m.problems["spelling"][TRAIN])  # so many words must be copied
    if use["tool"] == "calculator":
        expression = " ".join(map(str, problem))
        return {"expression": expression}, {"shown": expression.replace("*", "×")}
    if use["tool"] == "dictionary":
        return {"word": problem}, {"word": problem}
    value, place = problem
    units = use["units"][place]
    source, target = units[lang]
    arguments = {"value": value, "from_unit": units["from"], "to_unit": units["to"]}
    return arguments, {"value": value, "source": source, "target": target}


def moment(lang: str, part: str, rng: Random) -> dict[str, str]:
    """What the clock says: a moment from 2000 to 2040; every tenth day is held out."""
    day = date(2000, 1, 1) + timedelta(days=10 * rng.randrange(1500))
    day += timedelta(days=rng.randint(1, 9) if part == TRAIN else 0)
    time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    return {"date": str(day), "weekday": WEEKDAYS[lang][day.weekday()], "time": time}


def call(m: Material, name: str, lang: str, part: str, rng: Random, given: bool) -> list[dict]:
    """Question, call, result and answer; or, where the tool is not given, saying so.

    What is asked stands in a frame, "Tell me {}.", which is the same for all tools: so that a model
    learns from what is in it. Held out is one frame.
    """
    frames, *uses = m.tables["tool_use"]
    use = rng.choice([use for use in uses if use["tool"] == name])
    if name == "clock":
        arguments, said = {}, {}
        result = moment(lang, part, rng)
    else:
        arguments, said = arguments_of(m, use, lang, part, rng)
        result = json.loads(call_tool(name, arguments).text)
    side, said = use[lang], {**said, **result}
    framed = [frames[lang]["held_out"]] if part == VAL else frames[lang]["questions"]
    question = rng.choice(framed).format(rng.choice(side["asked"]))
    if part == TRAIN and rng.random() < 0.2:
        question = rng.choice(side["questions"])
    asked = {"role": "user", "content": question.strip().format(**said)}
    if not given:
        return [asked, {"role": "assistant", "content": side["without"]}]
    calls = as_json([{"name": name, "arguments": arguments}])
    answer = side["unknown"] if "error" in result else side["answer"]
    return [
        asked,
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": as_json(result)},
        {"role": "assistant", "content": answer.format(**said)},
    ]


def some_tools(part: str, rng: Random, *, but: tuple[str, ...] = (), count: int = 1) -> list[str]:
    """Names of tools, the commoner ones more often."""
    found: list[str] = []
    while len(found) < count:
        left = [name for name in TOOLS if name not in (*but, *found)]
        found += rng.choices(left, [TOOL_SHARES[part][name] for name in left])
    return found


def system(given: list[str], lang: str) -> list[dict]:
    """The first message, which says what tools there are."""
    schemas = as_json([TOOLS[name].schema for name in given])
    return [{"role": "system", "content": SYSTEM[lang], "tools": schemas}]


def tools(m: Material, part: str, rng: Random) -> Table:
    """Four tools, of which one or two are on offer, called where they help; talk and easy sums that
    need none. In training there are up to seven questions in a row. Held out: other sums, amounts,
    words and days, in other phrasings, each only once."""
    talk = {lang: [] for lang in LANGUAGES}
    for e in m.all_exercises(part, HELD_OUT, rng):
        talk[e.lang].append(e)
    for e in (*m.questions("small_talk", part, rng), *m.questions("textbook", part, rng)):
        talk[e.lang].append(e)
    kinds = [kind for kind, times in TOOL_MIX[part].items() for _ in range(times)]
    rows, asked, turn = [], set(), 0
    while len(rows) < (TOOL_ROWS if part == TRAIN else TOOL_VAL_ROWS):
        lang, turns = LANGUAGES[len(rows) % 2], []
        given = some_tools(part, rng, count=1 + (rng.random() < 0.4))
        for _ in range(rng.choice((1, 4, 7)) if part == TRAIN else 1):
            kind, turn = kinds[turn % len(kinds)], turn + 1
            if kind == "not_needed":
                turns += conversation(rng.choice(talk[lang]))
                continue
            helps = kind == "helps"
            name = rng.choice(given) if helps else some_tools(part, rng, but=tuple(given))[0]
            turns += call(m, name, lang, part, rng, helps)
        about = as_json(turns)
        if part == TRAIN or about not in asked:
            asked.add(about)
            rows.append({"conversations": [*system(given, lang), *turns]})
    return rows


def lora(m: Material, part: str, rng: Random) -> Table:
    """A persona: 小海 and Pearl, who sail and cheer people up."""
    return [{"conversations": conversation(e)} for e in m.questions("persona", part, rng)]

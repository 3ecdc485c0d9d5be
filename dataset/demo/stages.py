"""The rows of the demo's files: what is asked, in which words, and how often.

One function makes the rows of one file from the `Material`; called with "val" instead of "train" it
uses the held-out part. The rows of tools.jsonl are made in tool_stage.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from random import Random

from dataset.demo.material import HELD_OUT, SFT_PASSES, TRAIN, VAL, Exchange, Material
from dataset.demo.skills import LANGUAGES, SKILLS, Table
from dataset.text import is_chinese
from dataset.tools.builtin import WEEKDAYS

# Amounts: about 1M tokens of pretraining and 1.2M of fine-tuning in total.
PRETRAIN_EXERCISES = 2600  # of a skill of weight 1
PRETRAIN_FACT_PASSES = 3  # each with every training phrasing of every fact, and the chapters
SFT_EXERCISES = 1700
DPO_PAIRS, DPO_VAL_PAIRS = 300, 100  # for each reason, as far as there are questions
RLAIF_PROMPTS = 800  # for each skill
R1_PROBLEMS = {TRAIN: 2600, VAL: 600}
R1_SUMS, R1_DAYS = {TRAIN: (2, 3), VAL: (4, 5)}, {TRAIN: 8, VAL: 6}


def conversation(*exchanges: Exchange) -> list[dict]:
    """Messages of user and assistant in turn."""
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
    """The facts of one topic joined, up to ten in one text."""
    topics = defaultdict(list)
    for fact, lang in product(m.tables["textbook"], LANGUAGES):
        topics[fact["topic"], lang] += fact[lang]["answers"]
    for (topic, lang), facts in topics.items():
        rng.shuffle(facts)
        for start in range(0, len(facts), 10):
            yield f"# {topic}\n\n" + ("" if lang == "zh" else " ").join(facts[start : start + 10])


def pretrain(m: Material, part: str, rng: Random) -> Table:
    """Text that contains the facts and the skills in both languages."""
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
    """A dialogue whose end needs what the user said before; sometimes an exercise comes between."""
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
    """Conversations of one or more turns: skills, facts, talk, and dialogues that need memory."""
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


REASONS = {  # why the rejected answer is worse → kinds of questions
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


def degrade(e: Exchange, reason: str, manner: dict[tuple, list[str]], rng: Random) -> str:
    """The answer of `e` with the fault that `reason` names."""
    if reason == "wrong_number":
        working, _, right = e.answer.rpartition(" ")
        return f"{working} {nearby_number(int(right), rng)}"
    if reason == "wrong_answer":
        return e.worse or mistake(e.answer, rng)
    if reason == "rambling":
        opening, closing = (rng.choice(manner[kind, e.lang]) for kind in ("opening", "closing"))
        return ("" if e.lang == "zh" else " ").join((opening, e.answer, closing))
    if reason == "repeating":
        return ("" if e.lang == "zh" else " ").join([e.answer] * rng.randint(2, 4))
    return rng.choice(manner["rude", e.lang]) if reason == "rude" else e.worse


def nearby_number(right: int, rng: Random) -> int:
    """Another non-negative number, off by one or by ten."""
    return rng.choice([n for d in (-10, -1, 1, 10) if (n := right + d) >= 0])


def mistake(answer: str, rng: Random) -> str:
    """The answer with a careless mistake: two neighbouring items swapped, an item missing, or a
    number slightly off."""
    first, _, unit = answer.partition(" ")
    if first.isdigit():  # a number, perhaps with its unit: a zero too few or too many
        right = int(first)
        wrong = (
            rng.choice((right * 10, right // 10))
            if unit and right > 9
            else nearby_number(right, rng)
        )
        return f"{wrong} {unit}".strip()
    separator = next((s for s in (", ", "-", " ") if s in answer), "")
    items = answer.split(separator) if separator else list(answer)
    places = [i for i in range(len(items) - 1) if items[i] != items[i + 1]]
    if len(items) == 1:
        return answer * 2
    if not places or rng.random() < 0.3:
        del items[rng.randrange(len(items))]
    else:
        i = rng.choice(places)
        items[i], items[i + 1] = items[i + 1], items[i]
    return separator.join(items)


def dpo(m: Material, part: str, rng: Random) -> Table:
    """Pairs of answers, one of which is worse for the reason in the row."""
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
            bad = replace(good, answer=degrade(good, reason, manner, rng))
            pair = {"chosen": conversation(good), "rejected": conversation(bad)}
            rows.append(pair | {"reason": reason})
    return rows


def rlaif(m: Material, part: str, rng: Random) -> Table:
    """Prompts whose answers a rule can verify; the model generates the answers itself."""
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


def random_sums(m: Material, steps: int, rng: Random) -> Iterator[tuple[str, int, int, int]]:
    """(plus or minus, before, number, after) within 0–99, without the sums of the tests."""
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
    """Stories over several days with two or three sums and a chain of thought; held-out ones have
    four or five sums.

    A thought repeats a line of the story and appends its sum. On some days nothing changes, so that
    held-out stories are no longer than those in training: a small model learns the distance to the
    next line and the number of lines, and fails on longer stories. Each line begins with another
    weekday, because the easiest thing to attend to is what followed the same word before.
    """
    found = {}
    while len(found) < R1_PROBLEMS[part]:
        lang = rng.choice(LANGUAGES)
        story = rng.choice(m.tables["stories"])[lang]
        steps = list(random_sums(m, rng.choice(R1_SUMS[part]), rng))
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


def lora(m: Material, part: str, rng: Random) -> Table:
    """A persona: 小海 and Pearl, cheerful sailors."""
    return [{"conversations": conversation(e)} for e in m.questions("persona", part, rng)]

"""The rows of tools.jsonl: questions with tools on offer, calls, results and answers."""

import json
from datetime import date, timedelta
from random import Random
from typing import Any

from dataset.demo.material import HELD_OUT, TRAIN, VAL, Material
from dataset.demo.skills import LANGUAGES, Table
from dataset.demo.stages import conversation
from dataset.tools.builtin import TOOLS, WEEKDAYS
from dataset.tools.call import call_tool

TOOL_ROWS, TOOL_VAL_ROWS = 2400, 600
TOOL_MIX = {  # how often a tool helps, would help but is not on offer, or is not needed
    TRAIN: {"helps": 10, "missing": 2, "not_needed": 3},
    VAL: {"helps": 14, "missing": 1, "not_needed": 1},
}
TOOL_SHARES = {  # copying a word is learnt late
    TRAIN: {"calculator": 3, "clock": 4, "convert_units": 3, "dictionary": 4},
    VAL: {"calculator": 3, "clock": 3, "convert_units": 3, "dictionary": 1},
}
SYSTEM = {
    "zh": "你是 MiniMind，需要时请使用工具。",
    "en": "You are MiniMind. Use a tool if it helps.",
}


def as_json(value: object) -> str:
    """Tools and calls are JSON in a string, so that every row has the same columns (SPEC §4)."""
    return json.dumps(value, ensure_ascii=False)


def arguments_of(
    m: Material, use: dict, lang: str, part: str, rng: Random
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a call, and the slots of the question."""
    problem = rng.choice(m.problems[use["tool"]][part])
    if use["tool"] == "dictionary" and part == TRAIN and rng.random() < 0.7:
        (problem,) = rng.choice(
            m.problems["spelling"][TRAIN]
        )  # other words, so that copying is learnt
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
    """The clock's result: a time from 2000 to 2040; every tenth day is held out."""
    day = date(2000, 1, 1) + timedelta(days=10 * rng.randrange(1500))
    day += timedelta(days=rng.randint(1, 9) if part == TRAIN else 0)
    time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    return {"date": str(day), "weekday": WEEKDAYS[lang][day.weekday()], "time": time}


def call(m: Material, name: str, lang: str, part: str, rng: Random, given: bool) -> list[dict]:
    """Question, call, result and answer; or, where the tool is not offered, an answer that says so.

    Questions are framed, "Tell me {}.", by frames that are the same for all tools, so that the
    model must use the content to choose the tool. One frame is held out.
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
    """Names of different tools, sampled by TOOL_SHARES."""
    found: list[str] = []
    while len(found) < count:
        left = [name for name in TOOLS if name not in (*but, *found)]
        found += rng.choices(left, [TOOL_SHARES[part][name] for name in left])
    return found


def system(given: list[str], lang: str) -> list[dict]:
    """The system message, which offers the tools."""
    schemas = as_json([TOOLS[name].schema for name in given])
    return [{"role": "system", "content": SYSTEM[lang], "tools": schemas}]


def tools(m: Material, part: str, rng: Random) -> Table:
    """Four tools, of which one or two are offered, called where they help; and talk and easy sums
    that need none. In training a row has up to seven questions. Held out are other sums, amounts,
    words and days, in other phrasings, one question a row."""
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

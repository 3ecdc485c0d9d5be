"""The rows of each stage of the demo data: in SPEC's formats, and with what the stage needs."""

import json
import re
from collections import Counter
from datetime import date

import pytest
from demo_problems import (
    EN_DAYS,
    HELD_OUT_FRAMES,
    STAGES,
    TABLES,
    USES,
    ZH_DAYS,
    formatted,
)

from dataset.demo.files import load_tests
from dataset.grading import grade
from dataset.tools.builtin import WEEKDAYS
from dataset.tools.call import call_tool
from model.errors import UserError


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
        ("68", "68..", True),
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

"""Data files as MiniMind released them, with invented words: `files(2026)` and `files(2025)`.

A file has the name, the shapes of rows and about the bytes per row of the released one, and a few
hundred rows instead of millions. What the benchmark's models are asked later (sums with a tool, who
they are) returns in several rows, so that a small model learns it in a minute.
"""

import json
import random
from itertools import cycle, islice
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]

WORDS = "river silver window stone bridge candle forest copper island market winter music".split()
SIGNS = "星河风水天江石山雨秋春夏冬海湖花草木火光云月"
NAME = "I am Pebble, a tiny helper."
WHO = ["Who are you?", "你是谁", "Your name?", "你叫什么名字？"]
QUESTIONS = [(12, 34), (25, 17), (31, 62), (47, 53), (68, 29), (96, 81)]  # the sums of the tools

# The six tools that agents may call, and their parameters.
TOOLS = {
    "calculate_math": {"expression": {"type": "string"}},
    "get_current_time": {"timezone": {"type": "string", "default": "Asia/Shanghai"}},
    "get_current_weather": {"location": {"type": "string"}},
    "unit_converter": {
        "value": {"type": "number"},
        "from_unit": {"type": "string"},
        "to_unit": {"type": "string"},
    },
    "get_exchange_rate": {"from_currency": {"type": "string"}, "to_currency": {"type": "string"}},
    "translate_text": {"text": {"type": "string"}, "target_language": {"type": "string"}},
}
OFFERED = ["calculate_math", "get_current_time"]  # with these sums


def english(random: random.Random, count: int) -> str:
    """Words that follow each other in one order, so that a small model learns it."""
    return " ".join(islice(cycle(WORDS), start := random.randrange(12), start + count)) + "."


def chinese(random: random.Random, count: int) -> str:
    return "".join(islice(cycle(SIGNS), start := random.randrange(20), start + count)) + "。"


def words(random: random.Random, size: int) -> str:
    """About `size` bytes of text, in either language."""
    return english(random, size // 7) if random.random() < 0.5 else chinese(random, size // 3)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def offered(*names: str) -> list[dict[str, Any]]:
    """Schemas of tools, without "type": "function", as many released rows have them."""
    schemas = []
    for name in names:
        required = [each for each, about in TOOLS[name].items() if "default" not in about]
        about = {"type": "object", "properties": TOOLS[name], "required": required}
        function = {"name": name, "description": name.replace("_", " "), "parameters": about}
        schemas.append({"function": function})
    return schemas


def offer(names: list[str], with_type: bool) -> Message:
    """The system message that offers tools: JSON as text."""
    kind = {"type": "function"} if with_type else {}
    tools = [{**kind, **each} for each in offered(*names)]
    return {"role": "system", "content": "", "tools": json.dumps(tools)}


def chat(random: random.Random, size: int) -> list[Message]:
    """One to three turns, `size` bytes in all."""
    turns, chat = random.randint(1, 3), []
    for _ in range(turns):
        chat += [user(words(random, 60)), assistant(words(random, size // turns - 60))]
    return chat


def thought(random: random.Random, with_thought: bool = True) -> list[Message]:
    """The same questions with a thought and without one."""
    subject = random.choice(WORDS[:4])
    about = {"reasoning_content": f"It is about a {subject}. " + english(random, 6)}
    answer = assistant(f"For the {subject}.", **(about if with_thought else {}))
    return [user(f"Why {subject}?"), answer]


def sum_with_tool(number: int) -> list[Message]:
    """A sum that a tool works out. Tools and calls are JSON as text."""
    a, b = QUESTIONS[number % len(QUESTIONS)]
    call = [{"name": "calculate_math", "arguments": {"expression": f"{a}*{b}"}}]
    return [
        offer(OFFERED, with_type=number % 2 == 0),
        user(f"{a}*{b} = ?"),
        assistant("", tool_calls=json.dumps(call)),
        {"role": "tool", "content": json.dumps({"result": str(a * b)})},
        assistant(f"{a * b}"),
    ]


def task(number: int) -> Row:
    """An agent's task: the answer is left to the model, and `gt` has what must be in it."""
    system, question, *_ = sum_with_tool(number)
    a, b = QUESTIONS[number % len(QUESTIONS)]
    return {"conversations": [system, question, assistant("")], "gt": [str(a * b)]}


def conversations(chats: list[list[Message]]) -> list[Row]:
    return [{"conversations": chat} for chat in chats]


def pairs(random: random.Random, count: int) -> list[Row]:
    rows = []
    for _ in range(count):
        question = user(f"Say {random.choice(WORDS)}")
        good, bad = english(random, 40), chinese(random, 90)
        rows.append({"chosen": [question, assistant(good)], "rejected": [question, assistant(bad)]})
    return rows


def prompts(random: random.Random, count: int, last: str) -> list[Row]:
    """Chats whose last answer is `last`, which the model is to write itself."""
    chats = [chat(random, 400) for _ in range(count)]
    return conversations([[*chat[:-1], assistant(last)] for chat in chats])


def reasoned(random: random.Random) -> list[Message]:
    """A row of 2025: thought and answer in tags inside the content."""
    question, answer = thought(random)
    about, content = answer["reasoning_content"], answer["content"]
    text = f"<think>\n{about}\n</think>\n<answer>\n{content}\n</answer>"
    return [question, assistant(text)]


def rows(year: int) -> dict[str, list[Row]]:
    """{name of a file: its rows}"""
    dice = random.Random(year)
    identity = conversations([[user(WHO[n % 4]), assistant(NAME)] for n in range(40)])
    files = {"dpo.jsonl": pairs(dice, 60), "lora_identity.jsonl": identity}
    if year == 2025:
        return files | {
            "pretrain_hq.jsonl": [{"text": words(dice, 1000)} for _ in range(200)],
            "sft_mini_512.jsonl": conversations([chat(dice, 900) for _ in range(100)]) + identity,
            "rlaif-mini.jsonl": prompts(dice, 60, "空"),
            "r1_mix_1024.jsonl": conversations([reasoned(dice) for _ in range(120)]),
        }
    chats = [chat(dice, 1900) for _ in range(8)] + [thought(dice, n < 24) for n in range(48)]
    chats += [sum_with_tool(n) for n in range(48)]
    plain = prompts(dice, 12, "")
    exam = [[user(f"Question {n}\nA. stone\nB. sea\nAnswer:"), assistant("A")] for n in range(40)]
    return files | {
        # with the words of NAME: an adapter cannot teach tokens that the model has never seen
        "pretrain_t2t_mini.jsonl": [{"text": f"{NAME} {words(dice, 1000)}"} for _ in range(200)],
        "sft_t2t_mini.jsonl": conversations(chats),  # ordered by source
        "rlaif.jsonl": prompts(dice, 60, ""),
        "agent_rl.jsonl": [each for n in range(12) for each in (task(n), plain[n] | {"gt": []})],
        "agent_rl_math.jsonl": [task(n) for n in range(24)],
        "lora_medical.jsonl": conversations([chat(dice, 500) for _ in range(40)]),
        "lora_exam.jsonl": conversations(exam),
    }


def files(year: int) -> dict[str, bytes]:
    """{name: content} of the data repository."""
    made = {}
    for name, file in rows(year).items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in file)
        made[name] = "".join(lines).encode()
    return made

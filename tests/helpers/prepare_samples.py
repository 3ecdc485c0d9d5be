"""Rows and files that the tests of dataset/prepare share."""

import gzip
import hashlib
import json
import random
from pathlib import Path

CHAT = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."}]
ENGLISH = (
    "the a river house green stone walks under over bright cold summer night road little".split()
)
CHINESE = "春天来了花园里的小猫在河边看书今天我们去学校学习新知识老师说天气很好"


def sentences(seed: int, words: int = 60) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(ENGLISH) + str(draw.randrange(50)) for _ in range(words))


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def read_rows(path) -> list[dict]:
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        return list(map(json.loads, file))


def texts(path) -> list[str]:
    return [row["text"] for row in read_rows(path)]


def digest(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def variants(seed: int, changes: int) -> str:
    """A text of 100 words with some of them changed."""
    words = sentences(seed, 100).split()
    draw = random.Random(1000 + seed)
    for place in draw.sample(range(100), changes):
        words[place] = f"other{draw.randrange(10**6)}"
    return " ".join(words)

"""Files and rows of other formats."""

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_samples import (
    CHAT,
    write_lines,
)

from dataset.prepare import sources
from model.errors import UserError

TOOLS = [{"type": "function", "function": {"name": "add"}}]
SHAPES = {
    "text": ({"text": "Hello there."}, {"text": "Hello there."}),
    "content": ({"content": "Hello there.", "id": 3}, {"text": "Hello there."}),
    "own": ({"conversations": CHAT}, {"conversations": CHAT}),
    "openai": ({"messages": CHAT}, {"conversations": CHAT}),
    "openai parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}, CHAT[1]]},
        {"conversations": [{"role": "user", "content": "Hi."}, CHAT[1]]},
    ),
    "openai tools": (
        {"messages": CHAT, "tools": TOOLS},
        {"conversations": [{"role": "system", "content": "", "tools": TOOLS}, *CHAT]},
    ),
    "sharegpt": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "What is 2 + 3?"},
                {"from": "gpt", "value": "It is 5."},
            ],
        },
        {"conversations": [{"role": "system", "content": "Be brief."}, *CHAT]},
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 3", "output": "5", "history": [["Hi.", "Hello."]]},
        {
            "conversations": [
                {"role": "user", "content": "Hi."},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Add.\n2 and 3"},
                {"role": "assistant", "content": "5"},
            ]
        },
    ),
    "pair": ({"question": "What is 2 + 3?", "answer": "It is 5."}, {"conversations": CHAT}),
    "preferences": (
        {"prompt": "What is 2 + 3?", "chosen": "It is 5.", "rejected": "It is 6."},
        {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "It is 6."}]},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_other_formats(name):
    given, expected = SHAPES[name]
    raw = sources.RawRow("a.jsonl", 1, json.dumps(given), is_json=True)
    assert sources.to_row(raw) == expected


NO_ROWS = [{"a": 1}, [1], "{", {"conversations": [{"from": "x", "value": ""}]}]


@pytest.mark.parametrize("given", NO_ROWS)
def test_rows_of_no_format(given):
    line = given if isinstance(given, str) else json.dumps(given)
    with pytest.raises(UserError):
        sources.to_row(sources.RawRow("a.jsonl", 1, line, is_json=True))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
def test_files_of_other_formats(tmp_path, suffix):
    expected = ["One line, with a comma.", 'Two\nlines and a "quote".', "三，中文。"]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_lines(path, [{"text": text} for text in expected])
    elif suffix == "json":
        path.write_text(json.dumps([{"text": text} for text in expected]), "utf-8")
    elif suffix == "parquet":
        pq.write_table(pa.table({"text": expected}), path)
    elif suffix == "txt":
        path.write_text("\n\n".join(expected) + "\n", "utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
            table.writerows([["id", "text"], *enumerate(expected)])
    rows = sources.read_raw([path], per_document="paragraph")
    assert [sources.to_row(row)["text"].strip() for row in rows] == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "big5", "utf-16", "cp1252"])
def test_files_of_other_encodings(tmp_path, encoding):
    text = {
        "big5": "今天天氣很好，我們一起去公園看書。老師說學習使人進步。" * 5,
        "cp1252": "Über den Wäldern – die Straße führt nach Süden, über „Brücken“ und Täler. " * 5,
    }.get(encoding, "今天天气很好，我们一起去公园看书。老师说学习使人进步。" * 5)
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(text.encode(encoding)))
    (row,) = sources.read_raw([path])
    assert row.content == text

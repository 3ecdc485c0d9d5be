"""Rows whose parts are of other types, at any depth; files that are no data, or too much."""

import copy
import json
import os
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from attacks import ALL, is_refused, some

from dataset.encoding import SEGMENTERS
from dataset.jsonl import check_file, error_at
from dataset.lm_dataset import load_documents
from dataset.prepare.cleaning import Cleaner, Filters
from dataset.prepare.deduplication import checked_row
from dataset.prepare.sources import RawRow
from dataset.prepare.statistics import RowMeasurer
from dataset.tools.loop import parse_task
from model.errors import UserError
from scripts import prepare_data
from trainer.rl import prompts

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {}}}}}
CHAT = [
    {"role": "system", "content": "s", "tools": [TOOL]},
    {"role": "user", "content": [{"type": "text", "text": "q"}]},
    {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [CALL]},
    {"role": "tool", "content": {"a": [1]}, "tool_call_id": "c1"},
    {"role": "assistant", "content": "a"},
]
QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
BASES = {
    "conversations": [
        {"conversations": CHAT, "answer": "a"},
        {"messages": QA, "tools": [TOOL], "id": 1},
        {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"]]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"query": "q", "tools": [TOOL], "answers": [{"name": "f", "arguments": {}}]},
    ],
    "preferences": [
        {"chosen": QA, "rejected": QA[:1] + [{"role": "assistant", "content": "b"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"input": {"messages": QA[:1]}, "preferred_output": QA[1:], "non_preferred_output": QA[1:]},
    ],
    "text": [{"text": "x"}],
}


def nested(depth: int):
    value: object = "x"
    for n in range(depth):
        value = [value] if n % 2 else {"a": value}
    return value


VALUES = [None, True, 0, -1.5, 10**30, float("inf"), "", "x", "[/x]", "{% x %}", "<|im_end|>"]
VALUES += [[], ["x"], [[]], [None], {}, {"a": 1}, {"function": "f"}, {"type": 3}, "\ud800"]
VALUES += [nested(100), nested(900)]


def places(value, at=()):
    yield at
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*at, key))


def with_value(row, at, value):
    row = copy.deepcopy(row)
    if not at:
        return value
    inner = row
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return row


CASES = [
    (kind, with_value(base, at, value))
    for kind, bases in BASES.items()
    for base in bases
    for at in places(base)
    for value in VALUES
]
FILTERS = Filters(0, 10**6, ["zh", "en", "other"], 1.0, 1.0, True)


def test_rows_with_other_types_are_told_in_a_sentence(tmp_path, tokenizer):
    """As trainers read them, those of RL and of tools too, and as clean, dedup and stats do."""
    refused = 0
    for kind, row in some(CASES, 60):
        line = json.dumps(row)
        raw = RawRow("data.jsonl", 1, line, is_json=True)

        def at_line(read, *given):
            with error_at("data.jsonl", 1):
                read(*given)

        refused += bool(is_refused(at_line, SEGMENTERS[kind], tokenizer, row))
        is_refused(checked_row, raw)
        is_refused(RowMeasurer(tokenizer), [raw])
        for to in ("conversations", "preferences", "text", "prompts"):
            Cleaner(FILTERS, to, with_dropped=True)([raw])  # drops what it cannot read
        is_refused(at_line, parse_task, row)
        is_refused(at_line, prompts.parse_prompt_row, row)
    assert refused > 5


def test_files_of_hostile_rows(tmp_path, tokenizer):
    """One by one, through the entrance of all trainers."""
    read = partial(load_documents, tokenizer=tokenizer, workers=1, cache=tmp_path / "cache")
    for number, (kind, row) in enumerate(some(CASES, 10)[:: 4 if ALL else 1]):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        if said := is_refused(read, str(path), kind):
            assert path.name in said
            is_refused(read, str(path), kind, skip_bad_rows=True)


def test_names_links_and_encodings(tmp_path, tokenizer):
    read = partial(load_documents, kind="text", tokenizer=tokenizer, cache=tmp_path / "cache")
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    assert "loop.jsonl" in is_refused(check_file, loop)
    name = os.fsencode(tmp_path) + b"/n\xff.jsonl"
    with open(name, "wb") as file:
        file.write(b'{"text": "hello world"}\n')
    assert len(read(os.fsdecode(name))) == 1
    for encoding in ("utf-16", "utf-32"):
        path = tmp_path / f"{encoding}.jsonl"
        path.write_text('{"text": "hello world"}\n', encoding=encoding)
        output = str(tmp_path / f"mixed{encoding}.jsonl")
        assert len(read(str(path))) == 1
        prepare_data.main(["mix", "--input", str(path), "--output", output])
        assert json.loads(open(output).readline()) == {"text": "hello world"}


def test_ten_megabytes_of_spaces(tmp_path, tokenizer):
    path = tmp_path / "spaces.jsonl"
    path.write_text(json.dumps({"text": "a" + " " * 10_000_000}) + "\n")
    said = is_refused(load_documents, str(path), "text", tokenizer, workers=1, cache=tmp_path)
    assert not said or "spaces.jsonl" in said


def test_markup_of_the_console_in_a_text(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "[/x] a"}\n{"text": "[/x] a"}\n{"text": "[bold]"}\n')
    for command in ("clean", "dedup"):
        output = str(tmp_path / f"{command}.jsonl")
        prepare_data.main([command, "--input", str(path), "--output", output, "--workers", "1"])
    assert "[/x]" in capsys.readouterr().out


def test_a_parquet_file_that_stands_for_gigabytes(tmp_path):
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), ["x" * 1_000_000])
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    assert path.stat().st_size < 100_000  # for 20 GB
    with pytest.raises(UserError, match=r"bomb.parquet holds more than"):
        output = str(tmp_path / "out.jsonl")
        prepare_data.main(["clean", "--input", str(path), "--output", output, "--workers", "1"])

"""Kinds of data files: encodings, lists, compression, and files that are something else."""

import bz2
import gzip
import io
import json
import re
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset import jsonl
from dataset.forms import files
from dataset.jsonl import BadRows, read_chunks, read_rows, write_rows
from model.errors import UserError

ROWS = [{"text": f'第 {n} 行, line\n {n}, \u2028 {{["]', "n": [n, {"x": None}]} for n in range(30)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
LIST = json.dumps(ROWS, ensure_ascii=False)
PRETTY = json.dumps(ROWS, ensure_ascii=False, indent=2)
KINDS = {
    "lines": LINES.encode(),
    "lines with BOM, CRLF and empty lines": (
        "\ufeff\r\n" + LINES.replace("\n", "\r\n\r\n")
    ).encode(),
    "list": LIST.encode(),
    "list with BOM": ("\ufeff \n" + LIST).encode(),
    "list a row a line": ("[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n").encode(),
    "pretty list": PRETTY.replace("\n", "\r\n").encode(),
    "pretty objects one after another": "\n".join(json.dumps(r, indent=1) for r in ROWS).encode(),
    "utf-16": LINES.encode("utf-16"),
    "utf-16 big endian": ("\ufeff" + LINES).encode("utf-16-be"),
    "utf-16 without BOM": LINES.encode("utf-16-le"),
    "utf-16 list": LIST.encode("utf-16"),
    "utf-32": LINES.encode("utf-32"),
}


@pytest.mark.parametrize("block", [7, 2**20], ids=["small blocks", "one block"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("content", KINDS.values(), ids=KINDS.keys())
def test_every_kind_has_the_same_rows(tmp_path, content, packed, block, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", block)
    path = tmp_path / "data.json"  # neither the suffix nor .gz decides
    path.write_bytes(gzip.compress(content) if packed else content)
    assert [row for _, row in read_rows(path)] == ROWS
    chunks = list(read_chunks(path, 7))
    assert sum(chunk.bytes_read for chunk in chunks) == path.stat().st_size
    lines = [line for chunk in chunks for line in chunk.lines if line.strip()]
    assert [jsonl.parse_row(line) for line in lines] == ROWS
    assert all(line.rstrip(b"\r\n").count(b"\n") == 0 for line in lines)


def test_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"a": 1}\n\n\n{"a": 2}\n{\n'.encode("utf-16"))
    read = []
    with pytest.raises(UserError, match="line 5 of .* is not JSON"):
        read += read_rows(path)
    path.write_text('[{"a": 1},\n{"a": 2}, 3]')
    with pytest.raises(UserError, match="value 3 of .* is no JSON object"):
        list(read_rows(path))


def test_a_list_is_not_read_at_once(tmp_path):
    path = tmp_path / "big.json"
    path.write_text("[" + ",".join(['{"text": "' + "x" * 1000 + '"}'] * 20_000) + "]")
    with files.open_lines(path) as (raw, lines):
        next(iter(lines))
        assert raw.tell() < path.stat().st_size / 4


LISTS = {
    "cut off between rows": ('[{"a": 1}, {"a": 2}', "is cut off: its JSON list does not end"),
    "cut off in a row": ('[{"a": 1}, {"a": ', "value 2 of .* is not JSON"),
    "broken row": ('[{"a": 1}, {"a" 2}, {}]', "value 2 of .* is not JSON: Expecting ':'"),
    "two lists": ('[{"a": 1}]\n[{"a": 2}]', "is a JSON list that text follows"),
    "half a character": ('[{"a": "\\ud800"}]', "value 1 of .* half a character"),
    "deep": ("[" * 100_000, "value 1 of .* JSON"),
}


@pytest.mark.parametrize(("content", "complaint"), LISTS.values(), ids=LISTS.keys())
def test_a_bad_list_is_named(tmp_path, content, complaint):
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value) and len(str(caught.value)) < 400


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), file)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.jsonl", LINES)
    return file.getvalue()


FOREIGN = {
    "gbk": ("data.jsonl", LINES.replace("\u2028", "").encode("gbk"), r"line 1 .*is GBK .*clean"),
    "big5": ("data.jsonl", '{"text": "今天天氣很好"}'.encode("big5"), r"line 1 .*not UTF-8.*clean"),
    "one bad byte": ("data.jsonl", b'{"text": "caf\xe9"}', r"line 1 .*not UTF-8 .*at byte 13"),
    "utf-16 cut off": ("data.jsonl", LINES.encode("utf-16")[:-1], "is damaged: .*utf-16"),
    "parquet": ("data.jsonl", parquet(), "is a Parquet file; .*clean"),
    "zip": ("data.jsonl", zipped(), "is a zip archive"),
    "bz2": ("data.jsonl", bz2.compress(LINES.encode()), "compressed with bzip2"),
    "lfs": ("data.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "html": ("data.jsonl", b"<!DOCTYPE html><html>", "is a web page"),
    "csv": ("data.csv", b"text\nhello\n", r"is a \.csv file; .*clean|is no JSON but a \.csv"),
}


@pytest.mark.parametrize(("name", "content", "complaint"), FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_that_is_something_else_is_named(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)


ENCODINGS = {
    "gbk": "gb18030",
    "gb18030": "gb18030",
    "utf-8": "utf-8-sig",
    "utf-16": "utf-16",
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("text", ['{"conversations": "数 1 第"}', "今天天气很好，我们去公园。" * 9])
def test_the_encoding_of_chinese_is_recognised(tmp_path, encoding, text):
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.encode(encoding))
    assert files.detect_encoding(path) == ENCODINGS[encoding]


def test_bad_rows_are_counted_with_their_places(tmp_path):
    path, bad_rows = tmp_path / "data.jsonl", BadRows()
    path.write_text('{"a": 1}\n{\n[]\n{"a": 2}\n1\n2\n')
    assert [row for _, row in read_rows(path, bad_rows)] == [{"a": 1}, {"a": 2}]
    assert bad_rows.count == 4
    assert [re.search(r"line (\d)", each)[1] for each in bad_rows.examples] == ["2", "3", "5"]
    assert str(bad_rows).startswith("4 bad rows are left out, the first of them:\n  line 2 of")


def test_what_is_written_appears_whole(tmp_path):
    path = tmp_path / "new" / "data.jsonl"
    write_rows(path, ROWS)
    assert path.read_bytes() == LINES.encode()

    def rows():
        yield ROWS[0]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_rows(path, rows())
    assert path.read_bytes() == LINES.encode() and len(list(path.parent.iterdir())) == 1

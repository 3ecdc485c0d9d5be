"""Data files to tokenised documents: formats, the cache, workers, and mistakes with their place."""

import gzip
import json
import os
import random
import re

import pytest
from chats import (
    CONVERSATIONS,
    assistant,
    chat,
    line,
    user,
)

from dataset import lm_dataset
from dataset.forms.messages import answered_part
from dataset.jsonl import read_chunks
from dataset.lm_dataset import (
    encode_chat,
    load_documents,
)
from model.errors import UserError


def texts(documents, tokenizer) -> list[str]:
    return [tokenizer.decode(row["input_ids"][1:-1]) for row in documents]


FILES = {
    "plain": (line("one") + line("二"), ["one", "二"]),
    "no final newline": (line("one") + line("two")[:-1], ["one", "two"]),
    "blank lines": (b"\n" + line("one") + b"\n  \n" + line("two") + b"\n", ["one", "two"]),
    "CRLF": (b'{"text": "one"}\r\n\r\n{"text": "two\\r\\n"}\r\n', ["one", "two\r\n"]),
    "BOM": (b"\xef\xbb\xbf" + line("one") + line("two"), ["one", "two"]),
    "separators that are no line ends": (
        line("a\u2028b\u2029c\x85d\x7fe") + line("f"),
        ["a\u2028b\u2029c\x85d\x7fe", "f"],
    ),
    "escapes": (b'{"text": "\\u4f60\\ud83d\\ude00\\u0000\\t\\u2028"}\n', ["你😀\0\t\u2028"]),
    "empty texts": (line("one") + line("") + line(" \n") + line("two"), ["one", "two"]),
    "other keys": (b'{"id": 1, "text": "one", "x": [null]}\n', ["one"]),
}


@pytest.mark.parametrize("packed", [False, True], ids=["jsonl", "jsonl.gz"])
@pytest.mark.parametrize(("content", "expected"), FILES.values(), ids=FILES.keys())
def test_files_are_read_line_by_line(tmp_path, tokenizer, content, expected, packed):
    path = tmp_path / ("data.jsonl" + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert texts(load_documents(path, "text", tokenizer), tokenizer) == expected


def test_several_files_follow_one_another(tmp_path, tokenizer):
    first, second = tmp_path / "b.jsonl", tmp_path / "a.jsonl.gz"
    first.write_bytes(line("one") + line("two"))
    second.write_bytes(gzip.compress(line("three")))
    documents = load_documents([first, str(second)], "text", tokenizer)
    assert texts(documents, tokenizer) == ["one", "two", "three"]


def test_tokens_lie_on_disk_and_are_small(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_bytes(line("one"))
    documents = load_documents(path, "text", tokenizer)
    assert type(documents.data).__name__ == "MemoryMappedTable"
    assert str(documents.data.schema.field("input_ids").type) == "list<item: uint16>"


def test_conversations_are_encoded_with_their_mask(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    rows = [{"conversations": messages} for messages in CONVERSATIONS.values()]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    documents = load_documents(path, "conversations", tokenizer)
    for row, messages in zip(documents, CONVERSATIONS.values(), strict=True):
        expected = encode_chat(tokenizer, answered_part(messages))
        assert row["input_ids"].tolist() == expected.ids
        assert row["loss_mask"].tolist() == expected.loss_mask


def test_a_file_is_tokenised_once_and_again_when_it_changes(tmp_path, tokenizer, monkeypatch):
    path, done = tmp_path / "data.jsonl", []
    original = lm_dataset.tokenise_files
    monkeypatch.setattr(
        lm_dataset, "tokenise_files", lambda *args: done.append(args) or original(*args)
    )
    path.write_bytes(line("one"))
    first = load_documents(path, "text", tokenizer)
    again = load_documents([path], "text", tokenizer)
    assert len(done) == 1 and texts(again, tokenizer) == texts(first, tokenizer)
    path.write_bytes(line("two"))  # of the same size
    os.utime(path, ns=(1, 1))
    changed = load_documents(path, "text", tokenizer)
    assert len(done) == 2 and texts(changed, tokenizer) == ["two"]
    assert changed.info.description != first.info.description


def hash_of(tokenizer, *files: tuple[str, bytes], kind="text") -> str:
    paths = [path for path, _ in files]
    for path, content in files:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return load_documents(paths, kind, tokenizer).info.description


def test_the_same_data_has_the_same_hash_wherever_it_lies(tmp_path, tokenizer):
    content = line("one") + line("二")
    here = hash_of(tokenizer, (tmp_path / "data.jsonl", content))
    assert here == hash_of(tokenizer, (tmp_path / "else" / "where.jsonl", content))
    assert here == hash_of(tokenizer, (tmp_path / "data.jsonl.gz", gzip.compress(content)))
    swapped = hash_of(tokenizer, (tmp_path / "swapped.jsonl", line("二") + line("one")))
    joined = hash_of(tokenizer, (tmp_path / "joined.jsonl", line("one二")))
    assert len({here, swapped, joined}) == 3


def test_the_hash_does_not_know_how_the_data_was_divided(tmp_path, tokenizer):
    whole = hash_of(tokenizer, (tmp_path / "a.jsonl", line("one") + line("two")))
    parts = (tmp_path / "b.jsonl", line("one")), (tmp_path / "c.jsonl", line("two"))
    assert hash_of(tokenizer, *parts) == whole


def test_workers_change_nothing_but_the_time(tmp_path, tokenizer):
    dice = random.Random(0)
    words = "data model token 模型 训练 loss attention <|im_end|> weight".split()
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b"".join(line(f"{n} " + " ".join(dice.choices(words, k=40))) for n in range(4000))
    )
    assert path.stat().st_size > 1e6  # smaller files are never worth a process
    one = load_documents(path, "text", tokenizer, workers=1, cache=tmp_path / "one")
    two = load_documents(path, "text", tokenizer, workers=2, cache=tmp_path / "two")
    assert one.data.table.equals(two.data.table)
    assert one.info.description == two.info.description
    assert texts(one.select([0, 3999]), tokenizer)[1].startswith("3999 ")
    with open(path, "ab") as file:
        file.write(b"{}\n" + line("fine") * 400)
    with pytest.raises(UserError, match=r"line 4001 of .*data\.jsonl has no \"text\""):
        load_documents(path, "text", tokenizer, workers=2)


@pytest.mark.parametrize("packed", [False, True], ids=["jsonl", "jsonl.gz"])
def test_a_file_is_read_in_chunks_of_lines(tmp_path, packed):
    content = b"".join(line(f"{n}") for n in range(1234))
    path = tmp_path / ("data.jsonl" + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    chunks = list(read_chunks(path, 500))
    assert [(s.first, len(s.lines)) for s in chunks] == [(1, 500), (501, 500), (1001, 234)]
    assert sum(s.bytes_read for s in chunks) == path.stat().st_size
    assert b"".join(part for s in chunks for part in s.lines) == content


BAD_TEXTS = {
    "not UTF-8": (b'{"text": "\xff\xfe"}', "is not UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "is not UTF-8"),
    "broken JSON": (b'{"text": "a"', "is not JSON"),
    "two rows in a line": (b'{"text": "a"} {"text": "b"}', "is not JSON"),
    "raw control character": (b'{"text": "a\tb"}', "is not JSON: Invalid control character"),
    "no key": (b'{"txt": "a"}', 'has no "text"'),
    "no string": (b'{"text": ["a"]}', 'has no "text"'),
    "null": (b'{"text": null}', 'has no "text"'),
    "a list": (b'["a"]', "is no JSON object"),
    "a number": (b"1", "is no JSON object"),
    "conversations instead": (chat(user("a"), assistant("b")), 'has no "text"'),
    "half a character": (b'{"text": "a\\ud800"}', "half a character"),
    "deeply nested": (b"[" * 100_000, "is no JSON that can be read"),
    "endless number": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "is no JSON"),
}
BAD_CHATS = {
    "no key": (line("a"), 'has no "conversations"'),
    "empty": (chat(), 'has no "conversations"'),
    "no list": (b'{"conversations": {"role": "user"}}', 'has no "conversations"'),
    "no message": (b'{"conversations": ["hi"]}', 'a message without a "role"'),
    "no role": (chat({"content": "a"}), 'a message without a "role"'),
    "unknown role": (chat({"role": "judge", "content": "a"}), "the unknown role 'judge'"),
    "role no string": (chat({"role": ["user"], "content": "a"}), "the unknown role"),
    "no assistant turn": (chat(user("a")), "has no assistant turn"),
    "content a number": (chat(user(3.5), assistant("b")), 'whose "content" is no text'),
    "content null": (chat(user(None), assistant("b")), 'message of the user whose "content"'),
    "no content": (chat({"role": "user"}, assistant("b")), 'message of the user whose "content"'),
    "calls a number": (
        chat(user("a"), assistant("", tool_calls=5)),
        '"tool_calls" that are no list',
    ),
    "calls broken": (chat(user("a"), assistant("", tool_calls="[{")), '"tool_calls" .* not JSON'),
    "tools a number": (
        chat({"role": "system", "content": "", "tools": 5}, user("a"), assistant("b")),
        '"tools" that are no list',
    ),
    "reasoning a number": (
        chat(user("a"), assistant("b", reasoning_content=5)),
        '"reasoning_content" that is no text',
    ),
    "a call without a name": pytest.param(
        chat(user("a"), assistant("", tool_calls=[{"arguments": {}}])),
        "a tool call without",
    ),
    "a call that is no object": pytest.param(
        chat(user("a"), assistant("", tool_calls=[5])), "tool_calls"
    ),
    "tools deeply nested": pytest.param(
        chat({"role": "system", "content": "", "tools": "[" * 100_000}, user("a"), assistant("b")),
        "tools",
    ),
    "half a character in tools as text": pytest.param(
        chat({"role": "system", "content": "", "tools": r'["\ud800"]'}, user("a"), assistant("b")),
        "line 3",
    ),
}


def bad(table):
    return [
        pytest.param(
            kind, *getattr(case, "values", case), marks=getattr(case, "marks", ()), id=name
        )
        for kind, cases in table.items()
        for name, case in cases.items()
    ]


@pytest.mark.parametrize(
    ("kind", "row", "complaint"), bad({"text": BAD_TEXTS, "conversations": BAD_CHATS})
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, tokenizer, kind, row, complaint):
    good = {"text": line("fine"), "conversations": chat(user("a"), assistant("b")) + b"\n"}[kind]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(good + b"\n" + row + b"\n" + good)
    with pytest.raises(UserError, match=complaint) as caught:
        load_documents(path, kind, tokenizer)
    assert str(caught.value).startswith(f"line 3 of {path} ")
    assert "\n" not in str(caught.value)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_rows_can_be_left_out(tmp_path, tokenizer, workers, monkeypatch):
    monkeypatch.setattr(lm_dataset, "MIN_BYTES_FOR_WORKERS", 0)
    path, said = tmp_path / "data.jsonl", []
    rows = [line("one"), b"{", b'{"txt": 1}\n', line("two"), b"[3]\n", line(""), line("three")]
    path.write_bytes(b"".join(row.strip() + b"\n" for row in rows))
    skip = {"skip_bad_rows": True, "report": said.append, "workers": workers}
    documents = load_documents(path, "text", tokenizer, **skip)
    assert texts(documents, tokenizer) == ["one", "two", "three"]
    empty, bad = said
    assert "empty: 1" in empty
    assert bad.startswith("3 bad rows are left out")
    assert [int(n) for n in re.findall(r"line (\d+) of", bad)] == [2, 3, 5]
    load_documents(path, "text", tokenizer, **skip)
    assert said[2:] == said[:2]  # told again when the tokens come from the cache
    with pytest.raises(UserError, match="line 2 of"):  # another key of the cache
        load_documents(path, "text", tokenizer)
    clean = tmp_path / "clean.jsonl"
    clean.write_bytes(line("one") + line("two") + line("three"))
    same = load_documents(clean, "text", tokenizer)
    assert same.info.description == documents.info.description


def test_bad_rows_alone_are_an_error(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"{]\n[1]\n")
    with pytest.raises(UserError, match=r"all 2 rows are bad; line 1 of .*data\.jsonl is not JSON"):
        load_documents(path, "text", tokenizer, skip_bad_rows=True)


def test_each_file_must_train_something(tmp_path, tokenizer, monkeypatch):
    good, prompts = tmp_path / "good.jsonl", tmp_path / "prompts.jsonl"
    good.write_bytes(chat(user("a"), assistant("b")))
    prompts.write_bytes(chat(user("a"), assistant("")))
    with pytest.raises(
        UserError, match=r"prompts\.jsonl has no answer to train on: all 1 are empty"
    ):
        load_documents([good, prompts], "conversations", tokenizer)
    first = lambda tokenizer, row: [("a", True), (row["text"], False)]  # noqa: E731
    monkeypatch.setitem(lm_dataset.SEGMENTERS, "text", first)  # nothing predicts a first token
    good.write_bytes(line("b"))
    with pytest.raises(UserError, match="1 documents and no token that carries loss"):
        load_documents(good, "text", tokenizer)


def test_an_empty_last_answer_is_not_learnt(tmp_path, tokenizer):
    path, said = tmp_path / "data.jsonl", []
    turns = [user("a"), assistant("b"), user("c")]
    path.write_bytes(chat(*turns, assistant("")) + b"\n" + chat(user("a"), assistant(None)) + b"\n")
    (document,) = load_documents(path, "conversations", tokenizer, report=said.append)
    assert document["input_ids"].tolist() == encode_chat(tokenizer, turns).ids
    assert said == [f"{path}: rows left out because their text or answer is empty: 1"]


def damaged(flip: int) -> bytes:
    packed = bytearray(gzip.compress(b"".join(line(f"text {n * n}") for n in range(200))))
    packed[flip] ^= 0xFF
    return bytes(packed)


BAD_FILES = {
    "empty": ("data.jsonl", b"", "holds no documents"),
    "blank": ("data.jsonl", b"\n \n\n", "holds no documents"),
    "empty texts only": ("data.jsonl", line(""), "holds no documents"),
    "missing": ("data.jsonl", None, "does not exist; --data_path"),
    "no gzip": ("data.jsonl.gz", line("a"), "is damaged, or no gzip file"),
    "cut off": ("data.jsonl.gz", gzip.compress(line("abc" * 99))[:-9], "is damaged"),
    "wrong checksum": ("data.jsonl.gz", damaged(-6), "is damaged"),
    "damaged within": ("data.jsonl.gz", damaged(60), "is damaged"),
}


@pytest.mark.parametrize(("name", "content", "complaint"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_named(tmp_path, tokenizer, name, content, complaint):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for _ in range(2):  # the second time there may be a cache
        with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{complaint}"):
            load_documents(path, "text", tokenizer)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_bytes(line("a"))
    with pytest.raises(UserError, match="cannot write to .*cache"):
        load_documents(path, "text", tokenizer, cache=path / "cache")


def test_a_folder_is_no_data_file(tmp_path, tokenizer):
    with pytest.raises(UserError, match="is a folder; name the .jsonl file"):
        load_documents(tmp_path, "text", tokenizer)

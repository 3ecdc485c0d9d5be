"""scripts/show_batch.py: what it prints, and its mistakes."""

import re
import runpy
import sys

import pytest
from chats import assistant, chat, user

from dataset.lm_dataset import (
    encode_chat,
)
from model.weights import ROOT


@pytest.fixture
def show_batch(monkeypatch, capsys):
    """scripts/show_batch.py as a person calls it: (exit code, what it prints)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["show_batch.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "scripts" / "show_batch.py"), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr()

    return call


@pytest.fixture
def conversation(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(chat(user("Who are you?"), assistant("MiniMind.")) + b"\n")
    return path


def test_show_batch_colours_what_is_trained(show_batch, conversation, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    code, printed = show_batch("--data_path", conversation)
    green = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", printed.out))
    assert code == 0
    assert green == "MiniMind.<|im_end|>"
    assert "1 sequences of 128" in re.sub(r"\x1b\[.*?m", "", printed.out)


def test_show_batch_tells_in_a_table_what_is_trained(
    show_batch, conversation, monkeypatch, tokenizer
):
    monkeypatch.setenv("COLUMNS", "120")
    code, printed = show_batch("--data_path", conversation, "--table", "1")
    lines = [row for row in printed.out.splitlines() if row.startswith("│")]
    ids = encode_chat(tokenizer, [user("Who are you?"), assistant("MiniMind.")])
    assert code == 0
    assert [row.split("│")[5].strip() == "yes" for row in lines] == ids.loss_mask
    assert [int(row.split("│")[3]) for row in lines] == ids.ids


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--first", "9"], "there is no sequence 9; the data has 1"),
        (["--rows", "0"], "--rows must be at least 1"),
        (["--kind", "text"], 'line 1 of .* has no "text"'),
        (["--kind", "dpo"], "invalid choice"),
        (["--colour", "1"], "unknown argument --colour"),
        (["--first", "-1"], "--first must not be negative"),
        (["--max_seq_len", "1"], "--max_seq_len must be at least 2"),
    ],
)
def test_show_batch_says_what_is_wrong_in_a_line(show_batch, conversation, arguments, complaint):
    code, printed = show_batch("--data_path", conversation, *arguments)
    assert code == 2
    assert re.fullmatch(f"error: .*{complaint}.*\n", printed.err.split("\r")[-1])

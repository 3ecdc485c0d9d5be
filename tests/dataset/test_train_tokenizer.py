"""scripts/train_tokenizer.py: a tokenizer from the command line, the counting, and mistakes."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from model.errors import UserError
from scripts import train_tokenizer as script

ROOT = Path(__file__).resolve().parents[2]
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TEXT = "你好，世界！Hello, 世界。これはテスト。한국어 العربية"


def run_script(*flags):
    command = [sys.executable, str(ROOT / "scripts" / "train_tokenizer.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)


def write_lines(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_train_from_the_command_line(tmp_path):
    text = write_lines(
        tmp_path / "text.jsonl",
        *(
            json.dumps({"text": f"The cat number {n} sat\n\n猫坐在垫子上 {n}。"})
            for n in range(400)
        ),
    )
    chat = tmp_path / "chat.jsonl.gz"
    with gzip.open(chat, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"conversations": HI}) + "\n")
        file.write(json.dumps({"chosen": HI, "rejected": HI}) + "\n")
    plain = write_lines(tmp_path / "plain.txt", "A plain text.", "", "纯文本。")
    out = tmp_path / "made"
    result = run_script(
        *("--data_path", text, chat, plain, "--file_weight", 1, 2, 0.5, "--zh_weight", 1.5),
        *("--row_weight", "猫=2", "--vocab_size", 330, "--output_dir", out, "--eval_path", plain),
    )
    assert result.returncode == 0, result.stderr
    assert "330 tokens" in result.stdout and "plain.txt" in result.stdout

    made = AutoTokenizer.from_pretrained(out)
    assert len(made) == 330
    assert sorted(path.name for path in out.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for content in ("\n\n", " cat", "user"):
        assert len(made.encode(content)) == 1
    assert made.encode("<|im_start|>user\n")[0] == 1 and made.eos_token_id == 2
    assert made.decode(made.encode(TEXT)) == TEXT
    assert made.apply_chat_template(HI, tokenize=False).startswith("<|im_start|>user\nhi<|im_end|>")
    flags = {t["content"]: t["special"] for t in made_tokens(out)}
    assert [name for name, special in flags.items() if special] == script.SPECIAL


def made_tokens(directory):
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    return content["added_tokens"]


@pytest.mark.parametrize(
    "flags",
    [["--data_path", "{folder}/missing.jsonl"], ["--data_path", "{folder}/broken.jsonl"]],
    ids=["missing file", "broken JSON"],
)
def test_mistakes_end_with_a_sentence(tmp_path, flags):
    write_lines(tmp_path / "broken.jsonl", '{"text": "fine"}', '{"text": "no end')
    flags = [flag.format(folder=tmp_path) for flag in flags]
    result = run_script(*flags, "--output_dir", tmp_path / "made")
    assert result.returncode == 2
    assert "error: " in result.stderr and "Traceback" not in result.stderr
    assert "missing.jsonl" in result.stderr or re.search(
        "line 2 of .*broken.jsonl is not JSON", result.stderr
    )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"vocab_size": 271}, "too small"),
        ({"vocab_size": 6400}, "yields only"),
        ({"data_path": []}, "there is no training data"),
        ({"file_weight": [1, 2]}, "2 numbers for 1 files"),
        ({"row_weight": ["cat"]}, "REGEX=NUMBER"),
        ({"row_weight": ["(=1"]}, "REGEX=NUMBER"),
        ({"zh_weight": -1}, "below 0"),
        ({"line": "[1]"}, "line 2 of .*data.jsonl is no JSON object"),
        ({"line": '{"conversations": ["hi"]}'}, "line 2 of .*data.jsonl has a message without"),
        ({"line": "\udcff"}, "is not UTF-8"),
    ],
)
def test_mistakes_are_told(tmp_path, flags, message):
    line = flags.pop("line", '{"text": "dog"}')
    data = tmp_path / "data.jsonl"
    data.write_text(f'{{"text": "cat"}}\n{line}\n', encoding="utf-8", errors="surrogateescape")
    args = script.Args(
        **{"data_path": [str(data)], "output_dir": str(tmp_path / "made"), "vocab_size": 272}
        | flags
    )
    with pytest.raises(UserError, match=message):
        script.main(args)
    assert not (tmp_path / "made").exists()


def test_a_damaged_gzip_file_is_told(tmp_path):
    data = tmp_path / "data.jsonl.gz"
    data.write_bytes(gzip.compress(b'{"text": "cat"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="is damaged"):
        script.main(script.Args(data_path=[str(data)], output_dir=str(tmp_path), vocab_size=272))


def test_pieces_count_once_a_document_and_sentences_once(tmp_path):
    long = "a sentence that is long enough to count"
    data = write_lines(
        tmp_path / "data.jsonl",
        json.dumps({"text": f"dog dog dog. {long}.\n猫"}),
        json.dumps({"text": f"{long}. dog"}),
        json.dumps({"text": "bird " * 100}),
    )
    args = script.Args(data_path=[str(data)], zh_weight=3, row_weight=["bird=0.5"], max_bytes=60)
    counts, held_out = script.count_pretokens([data], args)
    assert counts["dog"] == 3 and counts[" dog"] == 3 + 1
    assert counts[" sentence"] == 3 and counts["猫"] == 3
    assert counts[" bird"] == counts["bird"] == 0.5
    assert counts["user"] == 3 + 1 + 0.5
    assert held_out == []


def test_measure_counts_characters_per_token():
    tokenizer = Tokenizer.from_file(str(ROOT / "model" / "tokenizer.json"))
    measured = script.measure(tokenizer, [["123"], ["4", "567\ud800"], ["<|im_end|>"]])
    assert measured == {"en": 10 / 1, "none": 8 / 8}

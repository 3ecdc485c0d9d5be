"""One flipped bit, anywhere in a file that was written, is noticed when it is read."""

import random
from pathlib import Path

import pytest
import torch
from attacks import some
from toy import Trainer, text_file

from dataset.lm_dataset import load_documents
from model.errors import UserError
from model.formats.files import read_json, write_json
from model.formats.lora_format import read_lora
from model.formats.minimind_format import load_tensors, save_tensors
from model.weights import load_model, read_info
from trainer import train_full_sft, train_lora
from trainer.common.checkpoint import load_checkpoint

CHANGED = "content is not what was written"


def flips(path: Path, count: int):
    """(what a file holds with one bit flipped, the bit), spread over the file: its first and last
    bytes, where its marks are, more often than the rest."""
    content, bits = path.read_bytes(), random.Random(1)
    size = len(content)
    for number in range(count):
        near = bits.randrange(min(size, 64))
        at = (near, size - 1 - near, bits.randrange(size), bits.randrange(size))[number % 4]
        flipped = bytearray(content)
        flipped[at] ^= 1 << bits.randrange(8)
        yield bytes(flipped), at


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer) -> Path:
    """A folder with what a training of all weights and one of an adapter leave."""
    folder = tmp_path_factory.mktemp("written")
    for stage, more in ((train_full_sft, {}), (train_lora, {"lora_name": "x"})):
        Trainer(folder, stage)(max_steps=2, **more)
    return folder


READERS = {
    "full_sft_32.pth": load_model,
    "full_sft_32.json": read_info,
    "lora/x_32.pth": read_lora,
    "lora/x_32.json": read_info,
    "full_sft_32.checkpoint.pt": lambda path: load_checkpoint(path, {"stage": "full_sft"}),
    "lora/x_32.checkpoint.pt": lambda path: load_checkpoint(path, {"stage": "lora/x"}),
}


@pytest.mark.parametrize("name", READERS)
def test_flips_in_weights_and_checkpoints(written, name):
    path = next(written.rglob(name))
    READERS[name](path)
    unflipped = path.read_bytes()
    try:
        for content, at in flips(path, len(some(range(150), 24))):
            path.write_bytes(content)
            with pytest.raises(UserError, match=path.name):
                READERS[name](path)
                pytest.fail(f"bit flipped in byte {at}")
    finally:
        path.write_bytes(unflipped)


def test_flips_in_the_token_cache(tmp_path, tokenizer):
    """Data are tokenised again, from the file that the user has."""
    data, said = text_file(tmp_path / "text.jsonl"), []

    def read():
        found = load_documents(
            data, "text", tokenizer, cache=tmp_path / "cache", report=said.append
        )
        return found.info.description, [list(row["input_ids"]) for row in found]

    expected = read()
    for suffix in (".arrow", ".json"):
        (path,) = (tmp_path / "cache").glob(f"*{suffix}")
        for content, at in flips(path, len(some(range(60), 12))):
            path.write_bytes(content)
            said.clear()
            assert read() == expected, at
            assert "tokenised again" in said[0], at


def test_files_without_a_checksum_are_read(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "theirs.pth")
    assert load_tensors(tmp_path / "theirs.pth", "")["a"].tolist() == [0, 1, 2]
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_tensors(tmp_path / "old.pth", "")["a"].tolist() == [0, 1, 2]
    (tmp_path / "theirs.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "theirs.json", "") == {"a": 1}


def test_others_read_files_with_a_checksum(tmp_path):
    import json
    import zipfile

    save_tensors(tmp_path / "ours.pth", {"a": torch.arange(3.0)})
    for mapped in (False, True):
        found = torch.load(tmp_path / "ours.pth", weights_only=True, mmap=mapped)
        assert found["a"].tolist() == [0, 1, 2]
    with zipfile.ZipFile(tmp_path / "ours.pth") as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"MiniMind xxh3: ")
    write_json(tmp_path / "ours.json", {"a": [1, "ü"]}, checksum=True)
    assert json.loads((tmp_path / "ours.json").read_text())["a"] == [1, "ü"]


def test_a_changed_json_says_how_to_go_on(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"rope_theta": 1e6}, checksum=True)
    path.write_text(path.read_text().replace("1000000", "1000002"))
    with pytest.raises(UserError, match="if you changed it, remove its checksum"):
        read_json(path, "")
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(line for line in lines if "checksum" not in line).replace(",\n}", "\n}")
    )
    assert read_json(path, "") == {"rope_theta": 1000002.0}


def test_a_data_file_that_changed_with_size_and_time_kept(tmp_path, tokenizer):
    import os

    data = Path(text_file(tmp_path / "text.jsonl", ["one two", "three"]))
    before = load_documents(data, "text", tokenizer, cache=tmp_path).info.description
    about = data.stat()
    data.write_text(data.read_text().replace("two", "six"))
    os.utime(data, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert data.stat().st_mtime_ns == about.st_mtime_ns and data.stat().st_size == about.st_size
    assert load_documents(data, "text", tokenizer, cache=tmp_path).info.description != before

"""Jobs that are killed, resumed, repeated, or run by several workers."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from prepare_samples import digest, texts, variants
from toy import alive, ended, fork, text_file

from dataset.prepare import job_dir, resumable
from model.errors import UserError
from scripts.prepare_data import main

MANY = 600


@pytest.fixture
def many(tmp_path, monkeypatch) -> str:
    """Rows in many small chunks, each noted at once."""
    monkeypatch.setattr(job_dir, "CHUNK_ROWS", 10)
    monkeypatch.setattr(resumable, "SAVE_SECONDS", 0)
    rows = [variants(n % 400, n % 3) + "<|im_end|>" * (n % 2) for n in range(MANY)]
    return text_file(tmp_path / "many.jsonl", rows)


def slowly(words: list[str], seconds: float):
    """The command, which takes its time over each chunk."""
    write = resumable.JobProgress.add

    def add(progress, done):
        time.sleep(seconds)
        write(progress, done)

    resumable.JobProgress.add = add  # in a process of its own
    main(words)


@pytest.mark.parametrize("command", ["clean", "clean gz", "dedup", "dedup late", "mix", "stats"])
def test_killed_at_any_moment_and_gone_on_with(tmp_path, many, command):
    name = command.split()[0]
    suffix = {"clean gz": "jsonl.gz", "stats": "png"}.get(command, "jsonl")
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"

    def words(path):
        return [name, "--input", many, "--output", str(path), "--workers", "1"]

    main(words(whole))
    work = tmp_path / f".out.{suffix}.work"
    note = {
        "dedup": "signatures",
        "dedup late": "writing",
        "mix": "writing 0",
        "stats": "measuring",
    }
    note = work / f"{note.get(command, 'clean')}.json"
    for kill in range(3):
        before = chunks(note)
        process = fork(lambda: slowly(words(out), 0.02))
        while chunks(note) <= before + 3 + kill:
            assert alive(process)
            time.sleep(0.005)
        os.kill(process, signal.SIGKILL)
        assert ended(process) == -signal.SIGKILL
        assert not out.exists()
    assert 12 < chunks(note) < MANY // 10
    done = []
    count = resumable.map_chunks
    main_chunks = lambda rows, *more: count(tap(rows, done), *more)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable, "map_chunks", main_chunks)
        before = chunks(note)
        main(words(out))
    later = 60 if command == "dedup" else 0  # a stage after the one that was interrupted
    assert len(done) <= MANY // 10 - before + later + 1
    assert digest(out) == digest(whole) or suffix == "png"
    first, second = (json.loads(Path(f"{path}.manifest.json").read_text()) for path in (whole, out))
    for same in ("counts", "examples", "statistics"):
        if command != "mix" or same != "counts":
            assert first.get(same) == second.get(same)
    assert not list(tmp_path.glob(".*"))


def chunks(note: Path) -> int:
    try:
        return json.loads(note.read_text())["chunks"]
    except (OSError, ValueError):
        return 0


def tap(rows, seen):
    for row in rows:
        seen.append(row)
        yield row


def test_more_workers_write_the_same(tmp_path, many):
    for workers in (1, 3):
        for name in ("clean", "dedup"):
            out = f"{tmp_path}/{name}{workers}.jsonl"
            main([name, "--input", many, "--output", out, "--workers", str(workers)])
    for name in ("clean", "dedup"):
        assert digest(tmp_path / f"{name}1.jsonl") == digest(tmp_path / f"{name}3.jsonl")


def test_what_changed_meanwhile_is_not_gone_on_with(tmp_path, many):
    out = tmp_path / "out.jsonl"
    words = ["clean", "--input", many, "--output", str(out), "--workers", "1"]
    process = fork(lambda: slowly(words, 0.02))
    note = tmp_path / ".out.jsonl.work" / "clean.json"
    while chunks(note) < 5:
        assert alive(process)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    ended(process)
    text_file(Path(many), ["Now it is something else."])
    main(words)
    assert texts(out) == ["Now it is something else."]


def test_a_finished_command_is_not_run_again_nor_another_over_it(tmp_path, capsys):
    given, out = text_file(tmp_path / "a.jsonl"), tmp_path / "out.jsonl"
    words = ["clean", "--input", given, "--output", str(out), "--workers", "1"]
    main(words)
    before = out.stat().st_mtime_ns
    main(words)
    assert "is there already" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--force"):
        main([*words, "--min_chars", "20"])
    main([*words, "--min_chars", "20", "--force"])
    assert len(texts(out)) < 24

"""Commands on consoles and in logs that cannot hold every character, and files whose encoding is
always named."""

import json
import os
import subprocess
import sys

import pytest

from model.paths import ROOT

CHATS = [
    {
        "conversations": [
            {"role": "user", "content": f"数到 {n} 🙂"},
            {"role": "assistant", "content": f"好的，{n} ✓ naïve"},
        ]
    }
    for n in range(12)
]
TINY = (
    "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --num_key_value_heads 1 "
    "--batch_size 4 --max_seq_len 64 --max_steps 2 --num_workers 0 --device cpu --val_share 0.2 "
    "--save_dir out --checkpoint_dir out --force 1"
)
TRAIN = f"trainer/train_full_sft.py --data_path chats.jsonl --from_weight none {TINY}"
COMMANDS = {
    "help": "trainer/train_grpo.py --help",
    "train": TRAIN,
    "show": "scripts/show_batch.py --data_path chats.jsonl",
    "stats": "scripts/prepare_data.py stats --input chats.jsonl --output s.png --workers 1 --force",
    "mistake": "scripts/prepare_data.py clean --input 数据.jsonl --output x.jsonl",
    "chat": "eval_llm.py --weight out/full_sft_32.pth --device cpu --max_new_tokens 4",
}


@pytest.fixture
def run(tmp_path):
    def run(command: str, *python: str, **environment: str) -> tuple[int, str]:
        script, *words = command.split()
        done = subprocess.run(
            [sys.executable, *python, str(ROOT / script), *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            input="你好 🙂\n".encode(),
            capture_output=True,
        )
        return done.returncode, (done.stdout + done.stderr).decode("latin-1")

    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in CHATS)
    (tmp_path / "chats.jsonl").write_text(rows, encoding="utf-8")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "gbk", "ascii"])
def test_no_character_ends_a_command(run, encoding):
    for name, command in COMMANDS.items():
        code, printed = run(command, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        assert code == (2 if name == "mistake" else 0), (name, printed)
        assert "Traceback" not in printed, (name, printed)


def test_help_on_a_console_of_ascii(run):
    code, printed = run(COMMANDS["help"], PYTHONIOENCODING="ascii")
    assert code == 0 and "\\u03c0" in printed  # π


@pytest.mark.slow
def test_every_file_is_read_and_written_as_utf_8(run):
    """Python's default is that of the system, which Windows has as gbk or cp1252."""
    for name, command in COMMANDS.items():
        flags = ["-X", "warn_default_encoding", "-W", "always::EncodingWarning"]
        code, printed = run(command, *flags)
        told = [line for line in printed.splitlines() if "EncodingWarning" in line]
        ours = [line for line in told if line.startswith(str(ROOT)) and "/.venv/" not in line]
        assert (code, ours) == (2 if name == "mistake" else 0, []), (name, printed)

"""--help and mistakes answer before anything slow is imported: no torch, which takes seconds."""

import json
import subprocess
import sys

import pytest

from model.paths import ROOT

SLOW = "torch transformers datasets pyarrow openai tokenizers matplotlib pandas streamlit".split()
RUN = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    if sys.argv[0] == "-m":
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
    code = 0
except SystemExit as end:
    code = end.code
slow = [name for name in %r if name in sys.modules]
print("\\n" + json.dumps([code, slow]))
"""


def names(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


COMMANDS = [
    *names("trainer/train_*.py"),
    *(name for name in names("scripts/*.py") if not name.endswith("__init__.py")),
    *(
        name
        for name in [
            *names("scripts/runs/*.py"),
            *names("benchmarks/*.py"),
            *names("benchmarks/*/*.py"),
        ]
        if "command_line(Args" in read(name)
    ),
    "eval_llm.py",
    "-m dataset.demo",
]


@pytest.fixture
def answer(tmp_path):
    """Run a command: exit code, slow modules that it imported, what it says."""

    def run(command: str, *flags: str):
        words = [*command.split(), *flags]
        if words[0] != "-m":
            words[0] = str(ROOT / words[0])
        done = subprocess.run(
            [sys.executable, "-c", RUN % SLOW, *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        )
        *printed, last = done.stdout.splitlines()
        code, slow = json.loads(last)
        return code, slow, "\n".join(printed) + done.stderr

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_a_wrong_flag(command, answer):
    code, slow, printed = answer(command, "--help")
    assert (code, slow) == (0, []) and "usage:" in printed
    code, slow, printed = answer(command, "--no_such_flag", "1")
    assert (code, slow) == (2, [])
    assert printed.strip().startswith("error: ") and printed.strip().count("\n") == 0


@pytest.mark.parametrize("trainer", names("trainer/train_*.py"))
def test_mistakes_of_a_training(trainer, answer, tmp_path):
    (tmp_path / "data.jsonl").touch()
    for flags, told in (
        (["--data_path", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (
            ["--data_path", "data.jsonl", "--tokenizer_path", "nowhere"],
            "there is no tokenizer.json in nowhere",
        ),
        (["--epochs", "0"], "--epochs must be more than 0"),
        (["--dtype", "float61"], "did you mean float16?"),
        (["--recipe", "nothing"], "there is no recipe"),
    ):
        code, slow, printed = answer(trainer, *flags)
        assert (code, slow) == (2, []) and told in printed

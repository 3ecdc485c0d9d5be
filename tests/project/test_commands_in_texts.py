"""Every command in README.md, README_zh.md, CLAUDE.md and docs/ is tried as it is written there.

Commands of this project run in a copy of it, in the order of the texts, since one needs what others
write; long ones with small settings added (RUN). Those that need a network, a service or a quarter
of an hour have their flags read by their own scripts (PARSE). Other programs are looked at
(PROGRAMS). A command of which nothing of this is true fails.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path

import pytest
from streamlit.web.cli import main_run
from warm_python import WarmPython

from dataset.demo.files import write_demo_data
from model.formats.hf_format import save_hf_folder
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import ROOT, save_weights
from scripts.serving.api.openai_types import ChatRequest

# Those first whose commands name no size: later ones leave weights of several.
FIRST = ["README.md", "README_zh.md", "docs/training.md", "CLAUDE.md"]
PAGES = sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))
TEXTS = [*FIRST, "CONTRIBUTING.md", *(page for page in PAGES if page not in FIRST)]
ONE_STEP = (
    "--max_steps 1 --batch_size 2 --accumulation_steps 1 --max_seq_len 320 --val_documents 2 "
    "--num_workers 0 --device cpu"
)
REWARDS = f"{ONE_STEP} --max_gen_len 4 --update_batch_size 2"

# Small settings for what is run, by the first pattern that fits the script, or it and a word more.
RUN = {
    "trainer/train_pretrain.py": f"{ONE_STEP} --num_hidden_layers 1",
    "trainer/train_grpo.py": f"{REWARDS} --num_generations 2",
    "trainer/train_[ps]po.py": REWARDS,
    "trainer/train_agent.py": f"{REWARDS} --num_generations 2 --max_seq_len 640",
    "trainer/train_distillation.py": f"{ONE_STEP} --teacher_weight out/full_sft_512.pth",
    "trainer/train_lora.py --lora_weight": f"{ONE_STEP} --hidden_size 512",
    "trainer/train_*.py": ONE_STEP,
    "eval_llm.py": "--max_new_tokens 4",
    "scripts/eval_toolcall.py": "--tasks 2 --max_new_tokens 4 --device cpu",
    "scripts/train_tokenizer.py": "--vocab_size 300",
    "scripts/show_batch.py": "",
    "scripts/eval_ppl.py": "--documents 2 --characters 200",
    "scripts/compare_runs.py": "",
    "scripts/make_recipe.py": "",
    "docs/check_notes.py": "",
    "scripts/convert_model.py *": "--force",
    "scripts/prepare_data.py *": "--force 1 --workers 1",
    "-m dataset.demo": "--output again",
    "learning_materials/*.py": "--out lesson",
}
# Why the flags are all that is tried, and where else the script is run; this comes before RUN.
PARSE = {
    "scripts/prepare_data.py download": "network; prepare/test_download.py has a stand-in",
    "trainer/train_*.py --minutes": "minutes; tests/trainer/test_minutes.py",
    "trainer/train_grpo.py --rollout_url": "a server; tests/engines/test_vllm.py",
    "trainer/train_full_sft.py --recipe": "reads 28,596 conversations; test_report.py",
    "scripts/eval_benchmark.py": "from the network; test_evaluation_harness.py",
    "scripts/runs/demo.py": "12 minutes; tests/scripts/test_demo.py",
    "scripts/runs/plan.py": "measures the machine; tests/scripts/runs/test_plan.py",
    "scripts/runs/[eqr]*.py": "need a finished run; tests/scripts/runs/test_run_evaluation.py",
    "scripts/runs/demo_lora.py": "needs the demo's model; tests/model/test_lora.py",
    "scripts/serve_openai_api.py": "a service; tests/scripts/server/",
    "scripts/chat_openai_api.py": "needs the service; tests/scripts/server/",
    "scripts/web_demo.py": "a service; tests/scripts/web/",
    "benchmarks/*.py": "long; tests/project/test_benchmarks.py",
    "*train_X.py": "stands for any trainer",
}


# -- other programs --------------------------------------------------------------------------------


def make(target: str, *settings: str) -> None:
    assert all(re.fullmatch(r"[A-Z]+=.+", each) for each in settings)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def bash(script: str, *flags: str) -> None:
    assert (ROOT / script).is_file()  # tests/scripts/runs/test_minimind.py runs it


def pip(install: str, *words: str) -> None:
    assert install == "install"
    if words[0] == "-r":
        assert (ROOT / words[1]).exists()
    if words[0] == "-e":
        assert words[1] in (".", ".[dev]") and "dev = {" in (ROOT / "pyproject.toml").read_text()


def git(clone: str, address: str) -> None:
    assert clone == "clone" and address.endswith("OWNER/minimind")


def curl(address: str, *words: str) -> None:
    assert address == "localhost:8000/v1/chat/completions"
    ChatRequest.model_validate_json(words[words.index("-d") + 1])


def streamlit(run: str, script: str, *words: str) -> None:
    assert run == "run" and (ROOT / script).exists()
    known = {name for option in main_run.params for name in option.opts}
    flags = words[: words.index("--") if "--" in words else None]
    assert all(flag in known for flag in flags if flag.startswith("--"))


def not_ours(*words: str) -> None:
    """Of others, and not installed here: the texts say which were run."""


def source(file: str) -> None:
    assert file.startswith(".venv/")  # which the line before has made


def pytest_on(*words: str) -> None:
    assert all((ROOT / word).exists() for word in words if not word.startswith("-"))


def mkdocs(build: str) -> None:
    assert build == "build"  # tests/project/test_site.py does it


def http_server(flag: str, folder: str) -> None:
    assert flag == "--directory" and folder == "out/site"


def venv(folder: str) -> None:
    assert folder == ".venv"


PROGRAMS = {
    "make": make,
    "bash": bash,
    "pip": pip,
    "git": git,
    "curl": curl,
    "streamlit": streamlit,
    "source": source,
    "pytest": pytest_on,
    "venv": venv,
    "mkdocs": mkdocs,
    "http.server": http_server,
    "vllm": not_ours,
    "pre-commit": not_ours,
    "llama-cli": not_ours,
    "llama-server": not_ours,
    "ollama": not_ours,
}


# -- reading them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """`python WORDS`, or another program."""

    words: tuple[str, ...]
    folder: str = ""
    typed: str = "Who are you?\n"

    def __str__(self) -> str:
        return " ".join(self.words)

    def rule(self) -> tuple[str, str]:
        """What is done with it: run, and the flags to add; parse, and why; or program.

        Raises:
            KeyError: nothing says what.
        """
        name = " ".join(self.words[1:3])
        if self.words[0] != "python":
            return "program", PROGRAMS[self.words[0]].__name__
        for rules, what in ((PARSE, "parse"), (RUN, "run")):
            for pattern, more in rules.items():
                if fnmatch(name, pattern) or fnmatch(self.words[1], pattern):
                    return what, more
        raise KeyError(f"{name}: no rule in RUN or PARSE says how to try this command")


def commands_of(text: str) -> Iterator[Command]:
    """From ```bash blocks, and from `python …` in between."""
    for block, plain in re.findall(r"^```bash\n((?s:.*?))^```|(.+)", text, re.M):
        if block:
            yield from commands_of_shell(block)
        else:
            for code in re.findall(r"`((?:python|torchrun|make|pip|streamlit|cd) [^`]+)`", plain):
                yield from commands_of_shell(re.sub(r"[][]", "", code))


def commands_of_shell(script: str) -> Iterator[Command]:
    """Of lines as a shell reads them: comments, continued lines, variables, && and |."""
    variables: dict[str, str] = {}
    for line in script.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words, folder, typed = [], "", Command.typed
        for word in [*lexer, ";"]:
            if word not in ("&&", "|", ";"):
                words.append(word)
                continue
            given = list(takewhile(lambda each: re.match(r"\w+=", each), words))
            if given == words:
                variables |= dict(each.split("=", 1) for each in given)
            words = words[len(given) :]  # without what is set for this command alone
            if words and words[0] == "cd":
                folder = words[1]
            elif words and words[0] == "echo":
                typed = f"{words[1]}\n"
            elif words:
                yield Command(normal(words), folder, typed)
            words = []


def normal(words: list[str]) -> tuple[str, ...]:
    """The Python that runs it does not matter, nor how many processes."""
    words[0] = re.sub(r"(\.venv/bin/)?python3?$", "python", words[0])
    if words[0] == "torchrun":
        script = next(place for place, word in enumerate(words) if word.endswith(".py"))
        return ("python", *words[script:])
    if words[:2] == ["python", "-m"] and words[2] in PROGRAMS:
        return tuple(words[2:])
    return tuple(words)


def all_commands() -> list[Command]:
    """Each once, however many texts have it, in their order."""
    texts = ((ROOT / name).read_text(encoding="utf-8") for name in TEXTS)
    return list(dict.fromkeys(command for text in texts for command in commands_of(text)))


COMMANDS = all_commands()


def kind_of(command: Command) -> str:
    try:
        return command.rule()[0]
    except KeyError:
        return "unknown"


# -- trying them -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory, tokenizer):
    copy = tmp_path_factory.mktemp("project")
    prepare(copy, tokenizer)
    return copy


def prepare(copy: Path, tokenizer) -> None:
    """Copy the project, with data and weights where a reader of the texts has them."""
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("git tells which files are the project's, and this is no clone of it")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    demo = copy / "out/demo/data"
    write_demo_data(demo)
    for file in demo.glob("*.jsonl"):
        few(file, copy / "dataset" / file.name)
        if "pretrain" not in file.name:  # which a recipe knows by its hash
            few(file, file)
    today = {"pretrain_hq": "pretrain_t2t_mini", "sft_mini_512": "sft_t2t_mini"}
    for name, new in today.items():
        few(demo / f"{name}.jsonl", copy / "dataset" / f"{new}.jsonl")
    few(demo / "rlaif-mini.jsonl", copy / "FILE")
    few(demo / "pretrain_hq.jsonl", copy / "crawl.txt", 5)
    few(demo / "pretrain_hq_val.jsonl", copy / "other.jsonl")
    chats = (demo / "sft_mini_512.jsonl").read_text().splitlines()
    (copy / "chats.json").write_text(f"[{','.join(chats)}]")
    (copy / "ceval.csv").write_text("question,answer\nWhat is two and two in the end?,four\n")
    for size, stages, folder in (
        (512, "pretrain full_sft dpo", "out"),
        (192, "pretrain full_sft", "out/demo"),
    ):
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=size, num_hidden_layers=1))
        for stage in stages.split():
            path = copy / folder / f"{stage}_{size}.pth"
            save_weights(model, path, stage=stage, tokenizer=tokenizer, origin={})
    save_hf_folder(model.eval(), tokenizer, copy / "MiniMind2")
    tokenizer.save_pretrained(copy / "DIR")


def few(source: Path, target: Path, lines: int = 12) -> None:
    target.write_text("".join(source.read_text().splitlines(keepends=True)[:lines]))


@pytest.fixture(scope="module")
def python(project):
    """A function that runs the words after `python`; its output. They must end with code 0."""
    runner = WarmPython(project, Path(f"{project}.log"))

    def run(words: list[str], folder: str = "", typed: str = "", parse: bool = False) -> str:
        code, printed, seconds = runner.run(words, project / folder, typed, parse)
        print(f"{seconds:.1f} s: {' '.join(words)}\n{printed}")  # shown if the test fails
        assert code == 0, printed
        return printed

    yield run
    runner.close()


def select(kind: str) -> list:
    return [
        pytest.param(command, id=str(command)) for command in COMMANDS if kind_of(command) == kind
    ]


def test_each_command_has_a_rule():
    assert len(COMMANDS) > 60
    for command in COMMANDS:
        command.rule()  # tells which it is
        if command.words[0] == "python" and command.words[1] != "-m":
            script = command.words[1].replace("train_X", "train_pretrain")
            assert (ROOT / command.folder / script).exists(), command


def test_commands_are_read_as_a_shell_reads_them():
    text = """
Text with `python a.py [--b c]` and `--flag`.
```bash
x="--y 1"
cd trainer && .venv/bin/python b.py $x \\
    --z 'two words'        # a comment; with && and |
Z=1 W="two words" echo "hi" | V=2 python3 c.py
torchrun --nproc_per_node 2 d.py --e
```
```
python not_bash.py
```
"""
    assert list(commands_of(text)) == [
        Command(("python", "a.py", "--b", "c")),
        Command(("python", "b.py", "--y", "1", "--z", "two words"), folder="trainer"),
        Command(("python", "c.py"), typed="hi\n"),
        Command(("python", "d.py", "--e")),
    ]


@pytest.mark.parametrize("words", ["python scripts/new.py --x", "new_program --x"])
def test_a_command_without_a_rule_fails(words):
    with pytest.raises(KeyError):
        Command(tuple(words.split())).rule()


@pytest.mark.slow
@pytest.mark.parametrize("command", select("run"))
def test_it_runs(command, python):
    more = command.rule()[1].split()
    python([*command.words[1:], *more], command.folder, command.typed)


@pytest.mark.parametrize("command", select("parse"))
def test_its_flags_are_known(command, python):
    script, *words = [word.replace("train_X", "train_pretrain") for word in command.words[1:]]
    assert python([script, *words], command.folder, parse=True).endswith("parsed\n")


def test_a_wrong_flag_is_noticed(python):
    with pytest.raises(AssertionError, match="unknown argument --wait"):
        python(["scripts/runs/demo.py", "--wait", "12"], parse=True)


@pytest.mark.parametrize("command", select("program"))
def test_other_programs(command, python):
    name, *words = command.words
    PROGRAMS[name](*words)
    if "--" in words:  # what follows are flags of our script
        assert "parsed" in python([words[1], *words[words.index("--") + 1 :]], parse=True)

"""The demo's data for every stage: generated in seconds, the same bytes on every machine.

    python -m dataset.demo --output out/demo/data --seed 42

The hand-written part is in dataset/demo/texts/: a bilingual textbook on language models, small
talk, words, phrases, and the prompts of the skills. skills.py computes problems and their answers,
material.py combines both and splits them, stages.py and tool_stage.py make the rows, and this
module writes the files and the tests. No training file contains what a test or a "_val" file asks.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random

from dataset.demo import stages, tool_stage
from dataset.demo.material import TRAIN, VAL, Material
from dataset.demo.skills import LANGUAGES, SKILLS, Table
from dataset.jsonl import load_rows, write_rows
from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error
from model.paths import OUT

SOURCE = Path(__file__).with_name("texts")
OUTPUT = OUT / "demo" / "data"
MAX_VAL_ROWS = 600  # in each _val file


# -- the tests -------------------------------------------------------------------------------------


def skills_test(m: Material, rng: Random) -> Table:
    """Every held-out problem in both languages."""
    exchanges = [
        m.pose(skill, problem, lang, rng)
        for skill in SKILLS
        for problem, lang in product(m.problems[skill.name][VAL], LANGUAGES)
    ]
    fields = ("lang", "prompt", "answer")
    return [{"skill": e.kind} | {field: getattr(e, field) for field in fields} for e in exchanges]


def textbook_test(m: Material, rng: Random) -> Table:
    """The held-out phrasing of every fact in both languages."""
    rows = []
    for fact, lang in product(m.tables["textbook"], LANGUAGES):
        prompt, (answer, *_) = fact[lang]["held_out"], fact[lang]["answers"]
        rows.append({"id": fact["id"], "lang": lang, "prompt": prompt, "answer": answer})
    return rows


def load_tests(directory: Path | str) -> dict[str, Table]:
    """The rows of both tests, as "skills" and "textbook". UserError if there are none yet."""
    paths = {name: Path(directory) / f"{name}_test.jsonl" for name in ("skills", "textbook")}
    for path in paths.values():
        if not path.is_file():
            raise UserError(f"there is no {path}; `python -m dataset.demo` makes the demo data")
    return {name: load_rows(path) for name, path in paths.items()}


# -- reading and writing ---------------------------------------------------------------------------

FILES = {
    "pretrain_hq": (stages.pretrain, "pretraining: facts, skills and talk as text"),
    "sft_mini_512": (stages.sft, "fine-tuning: conversations"),
    "dpo": (stages.dpo, "DPO: a better and a worse answer, with the reason"),
    "rlaif-mini": (stages.rlaif, "PPO, GRPO, SPO: prompts with checkable answers"),
    "r1_mix_1024": (stages.r1, "reasoning: sums thought through in steps"),
    "tools": (tool_stage.tools, "tool calls: a calculator, a clock, units, a dictionary"),
    "lora_identity": (stages.lora, "LoRA: a persona, the cheerful captain of a ship"),
}
TESTS = {
    "skills_test": (skills_test, "held-out problems of every skill"),
    "textbook_test": (textbook_test, "held-out phrasing of every fact"),
}


def load_tables(source: Path = SOURCE) -> dict[str, Table]:
    """The hand-written tables by name; textbook_*.jsonl are one, "textbook"."""
    tables: dict[str, Table] = {"textbook": []}
    for path in sorted(source.rglob("*.jsonl"), key=lambda path: path.name):
        rows = load_rows(path)
        if path.name.startswith("textbook_"):
            for row, lang in product(rows, LANGUAGES):
                row[lang]["answers"] = [row[lang].pop("answer")]
            tables["textbook"] += rows
        else:
            tables[path.stem] = rows
    if not tables["textbook"]:
        raise UserError(f"there is no textbook_*.jsonl in {source}; get the whole repository")
    return tables


def demo_rows(name: str, held_out: bool, seed: int = 42, material: Material | None = None) -> Table:
    """The rows of one file."""
    part = VAL if held_out else TRAIN
    rng = Random(f"{seed}/{name}/{part}")
    make, _ = FILES[name]
    rows = make(material or Material(load_tables(), seed), part, rng)
    rng.shuffle(rows)
    return rows[:MAX_VAL_ROWS] if held_out else rows


def write_demo_data(output: Path | str = OUTPUT, seed: int = 42) -> dict[str, int]:
    """Write every file; returns its number of rows by name. The same seed gives the same bytes."""
    output = Path(output)
    m = Material(load_tables(), seed)
    files = {}
    for name, held_out in product(FILES, (False, True)):
        end = "_val" if held_out else ""
        files[f"{name}{end}.jsonl"] = demo_rows(name, held_out, seed, m)
    for name, (make, _) in TESTS.items():
        files[f"{name}.jsonl"] = make(m, Random(f"{seed}/{name}"))
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            write_rows(output / name, rows)
    except OSError as error:
        why = f"cannot write to {output}: {error.strerror}; choose another --output"
        raise UserError(why) from None
    return {name: len(rows) for name, rows in files.items()}


@dataclass
class Args:
    output: str = option(str(OUTPUT), "folder to write into")
    seed: int = option(42, "another seed gives other problems")


def main() -> None:
    args = parse_command_line(Args, __doc__)
    with exit_on_user_error():
        counts = write_demo_data(Path(args.output), args.seed)
    purposes = {name: purpose for name, (_, purpose) in (FILES | TESTS).items()}
    print(f"{'file':26}{'rows':>7}{'KB':>7}  for")
    for name, rows in counts.items():
        stem = name.removesuffix(".jsonl")
        purpose = purposes.get(stem) or f"held out from {stem.removesuffix('_val')}"
        size = (Path(args.output) / name).stat().st_size / 1000
        print(f"{name:26}{rows:7}{size:7.0f}  {purpose}")
    print(f"in {args.output}")

"""Check the notes against themselves and against the code; one line for each fault.

    python docs/check_notes.py           # exit code 0: none; 1: some; 2: it could not look

- A link leads to a file, folder or heading that is there.
- Numbered headings, and the numbered questions under a heading, count 1, 2, 3 …
- A code file that is named exists, and `file.py::Name.attribute` is defined in it.
- Every lesson is in both lists of learning_materials/, and has a picture.
- Both knowledge bases name the same code and pictures, and have as many questions.
- The learning log is in the order of its dates, each entry with its four parts, and notes.md links
  to each of them.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error
from model.weights import ROOT

NOTES = """README.md README_zh.md CONTRIBUTING.md CLAUDE.md notes.md learning_log.md
    knowledge_base.md knowledge_base_en.md NOTE_UPDATE_GUIDE.md learning_materials/README.md
    learning_materials/README_zh.md benchmarks/README.md benchmarks/RECIPE_LOG.md""".split()
ENTRY_PARTS = ["做了什么", "问题与解决", "反思", "下一步"]
FENCE = re.compile(r"^ *```")
HEADING = re.compile(r"^(#+) +(.+?) *$")
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")
CODE_FILE = re.compile(
    r"(?<![\w/.*-])((?:model|dataset|trainer|scripts|tests|benchmarks|learning_materials|docs)"
    r"/[a-z0-9_/]+\.py)\b(?:::([\w.]+))?"
)


@dataclass
class Args:
    root: str = option(str(ROOT), "folder of the repository")


class Page:
    """A note, cut into what is checked."""

    def __init__(self, root: Path, name: str):
        self.path, self.name = root / name, name
        try:
            self.lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        self.prose: list[tuple[int, str]] = []  # lines outside of ``` blocks
        self.headings: list[tuple[int, int, str]] = []  # line, level, text
        fenced = False
        for number, line in enumerate(self.lines, 1):
            if FENCE.match(line):
                fenced = not fenced
            elif not fenced:
                self.prose.append((number, line))
                if heading := HEADING.match(line):
                    self.headings.append((number, len(heading[1]), heading[2]))

    def links(self) -> Iterator[tuple[int, str, bool]]:
        """Line, target, and whether it is a picture, of what does not lead out to the web."""
        for number, line in self.prose:
            for picture, target in LINK.findall(re.sub(r"`[^`]*`", "`code`", line)):
                if not re.match(r"\w+:", target):
                    yield number, unquote(target), bool(picture)

    def code(self) -> Iterator[tuple[int, str, str]]:
        """Line, file and name (or "") of the code that is named, in ``` blocks too."""
        for number, line in enumerate(self.lines, 1):
            for file, name in CODE_FILE.findall(line):
                yield number, file, name.rstrip(".")

    def questions(self) -> list[tuple[int, int]]:
        """Line and number of the items of numbered lists."""
        return [
            (number, int(item[1]))
            for number, line in self.prose
            if (item := re.match(r"(\d+)\. ", line))
        ]


def anchor(heading: str) -> str:
    """What a link writes for a heading, as on GitHub."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # of a link the text
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def anchors(page: Page) -> set[str]:
    """All of a page; of headings that are alike the second ends in -1, the third in -2."""
    found: set[str] = set()
    seen: dict[str, int] = {}
    for _, _, text in page.headings:
        name = anchor(text)
        found.add(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return found


@cache
def defined_in(code: str) -> frozenset[str]:
    """Functions, classes and variables of Python code; of a class its attributes, dotted."""
    found = set()

    def targets(node: ast.AST) -> list[ast.expr]:
        if isinstance(node, ast.Assign):
            return node.targets
        return [node.target] if isinstance(node, ast.AnnAssign) else []

    def walk(body: list[ast.stmt], before: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(before + node.name)
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{before}{node.name}.")
            for target in targets(node):
                found.update(before + t.id for t in ast.walk(target) if isinstance(t, ast.Name))
            if before and isinstance(node, ast.FunctionDef):  # self.x = ... in a method
                for part in (target for inner in ast.walk(node) for target in targets(inner)):
                    for each in ast.walk(part):
                        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name):
                            if each.value.id == "self":
                                found.add(before + each.attr)

    walk(ast.parse(code).body, "")
    return frozenset(found)


# -- what can be wrong -----------------------------------------------------------------------------


def notes_of(root: Path) -> list[str]:
    """NOTES, and the pages of docs/."""
    return [*NOTES, *(f"docs/{page.name}" for page in sorted(root.glob("docs/*.md")))]


def faults(root: Path) -> list[str]:
    """One line for each, such as "notes.md:12: no heading #x in README.md".

    Raises:
        UserError: a note is not there.
    """
    pages = {name: Page(root, name) for name in notes_of(root)}
    found = []
    for page in pages.values():
        checks = (link_faults(root, page), number_faults(page), code_faults(root, page))
        for number, text in sorted(each for check in checks for each in check):
            found.append(f"{page.name}:{number}: {text}")
    found += lesson_faults(root, pages)
    found += language_faults(pages["knowledge_base.md"], pages["knowledge_base_en.md"])
    found += log_faults(pages["learning_log.md"], pages["notes.md"])
    return found


def link_faults(root: Path, page: Page) -> Iterator[tuple[int, str]]:
    for number, target, _ in page.links():
        file, _, part = target.partition("#")
        path = (page.path.parent / file) if file else page.path
        if not path.exists():
            yield number, f"{file} is not there"
        elif part and path.suffix == ".md":
            other = Page(root, path.resolve().relative_to(root.resolve()).as_posix())
            if part not in anchors(other):
                yield number, f"no heading #{part} in {other.name}"


def number_faults(page: Page) -> Iterator[tuple[int, str]]:
    last: dict[int, int] = {}
    contents = {target for _, target, _ in page.links() if target.startswith("#")}
    for number, level, text in page.headings:
        if match := re.match(r"(\d+)\.? +\D", text):
            expected = last.get(level, 0) + 1
            if int(match[1]) != expected:
                yield number, f'section "{text}" should have number {expected}'
            last[level] = int(match[1])
            if contents and f"#{anchor(text)}" not in contents:
                yield number, f'section "{text}" is missing from the contents'
    starts = [number for number, _, _ in page.headings]
    before, heading = 0, None
    for number, item in page.questions():
        section = max((start for start in starts if start < number), default=0)
        expected = before + 1 if section == heading else 1
        if item != expected:
            yield number, f"item {item} should have number {expected}"
        before, heading = item, section


def code_faults(root: Path, page: Page) -> Iterator[tuple[int, str]]:
    for number, file, name in page.code():
        if not (root / file).exists():
            yield number, f"{file} is not there"
        elif name and name not in defined_in((root / file).read_text(encoding="utf-8")):
            yield number, f"{file} defines no {name}"


def lesson_faults(root: Path, pages: dict[str, Page]) -> Iterator[str]:
    folder = root / "learning_materials"
    for lesson in sorted(folder.glob("[0-9]*.py")):
        for name in ("learning_materials/README.md", "learning_materials/README_zh.md"):
            if lesson.name not in {target for _, target, _ in pages[name].links()}:
                yield f"{name}: {lesson.name} is not listed"
        if not (folder / "figures" / f"{lesson.stem}.png").exists():
            yield f"learning_materials/{lesson.name}: it has no picture in figures/"


def language_faults(chinese: Page, english: Page) -> Iterator[str]:
    contents = {
        "code": lambda page: [f"{file}::{name}" for _, file, name in page.code() if name],
        "picture": lambda page: [target for _, target, picture in page.links() if picture],
        "question": lambda page: [number for _, number in page.questions()],
    }
    for here, there in ((chinese, english), (english, chinese)):
        for what, of in contents.items():
            ours, theirs = of(here), of(there)
            for each in dict.fromkeys(ours):
                if ours.count(each) > theirs.count(each):
                    yield f"{there.name}: the {what} {each} of {here.name} is missing"


def log_faults(log: Page, index: Page) -> Iterator[str]:
    entries = [(number, text) for number, level, text in log.headings if level == 3]
    links = {target for _, target, _ in index.links()}
    before, ends = date.min, [*(number for number, _ in entries), len(log.lines) + 1][1:]
    for (number, text), end in zip(entries, ends, strict=True):
        where = f"{log.name}:{number}:"
        match = re.match(r"(\d{4}-\d\d-\d\d): \S", text)
        try:
            day = date.fromisoformat(match[1]) if match else None
        except ValueError:
            day = None
        if day is None:
            yield f'{where} "{text}" should be "YYYY-MM-DD: topic"'
        elif day < before:
            yield f"{where} {day} comes after {before}"
        before = max(before, day or before)
        parts = [
            part[1]
            for line, content in log.prose
            if number < line < end and (part := re.match(r"\*\*(\w+)\*\*", content))
        ]
        if parts != ENTRY_PARTS:
            yield f"{where} its parts should be {', '.join(ENTRY_PARTS)}"
        if f"{log.name}#{anchor(text)}" not in links:
            yield f"{index.name}: no link to {log.name}#{anchor(text)}"


def main(args: Args) -> int:
    root = Path(args.root)
    found = faults(root)
    print("\n".join(found) or f"{len(notes_of(root))} notes, no fault found")
    return 1 if found else 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(parse_arguments(Args, __doc__)))

"""The notes have no fault, and docs/check_notes.py sees each kind of fault."""

import runpy
import sys

import pytest
from check_notes import NOTES, faults

from model.weights import ROOT

KNOWLEDGE = """# Title
[1 One](#1-one) [2 Two, so](#2-two-so) `model/code.py::Thing.size` `model/code.py::Thing.grow`
## 1 One
![picture](learning_materials/figures/01_a.png)
## 2 Two, so
1. Why?
text between
2. How? `model/code.py::WIDTH`
## Others
1. Again?
```
[not a link](nowhere.md) and 7. not an item
```
"""
LOG = """# Log
### 2026-01-30: one
**做了什么**
**问题与解决**
**反思**
**下一步**：more
### 2026-01-31: two `x`
**做了什么**
**问题与解决**
**反思**
**下一步**：more
"""
CODE = """WIDTH: int = 3
class Thing:
    size = 1
    def __init__(self):
        self.weight = 2
    def grow(self): ...
"""


@pytest.fixture
def notes(tmp_path):
    """A small repository without a fault."""
    texts = dict.fromkeys(NOTES, "# Page\n")
    texts |= {
        "knowledge_base.md": KNOWLEDGE,
        "knowledge_base_en.md": KNOWLEDGE,
        "learning_log.md": LOG,
        "notes.md": "[a](learning_log.md#2026-01-30-one) [b](learning_log.md#2026-01-31-two-x)\n"
        "[web](https://example.org/x) [root](model/) [q](knowledge_base.md#2-two-so)\n",
        "learning_materials/README.md": "[a](01_a.py) [up](../README.md#page)",
        "learning_materials/README_zh.md": "[a](01_a.py)",
        "docs/page.md": "# Page\n",
        "learning_materials/01_a.py": "",
        "learning_materials/figures/01_a.png": "",
        "model/code.py": CODE,
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert faults(tmp_path) == []
    return tmp_path


def test_the_notes_have_no_fault():
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    "file, old, new, fault",
    [
        ("notes.md", "(model/)", "(modell/)", "notes.md:2: modell/ is not there"),
        ("notes.md", "#2-two-so", "#2-two,-so", "notes.md:2: no heading #2-two,-so in"),
        ("learning_materials/README.md", "#page", "#pages", "no heading #pages in README.md"),
        ("knowledge_base.md", "## 2 Two", "## 3 Two", 'base.md:5: section "3 Two, so" should'),
        ("knowledge_base.md", "[1 One](#1-one) ", "", 'base.md:3: section "1 One" is missing'),
        ("knowledge_base.md", "2. How", "3. How", "base.md:8: item 3 should have number 2"),
        ("knowledge_base.md", "1. Again", "2. Again", "base.md:10: item 2 should have number 1"),
        ("model/code.py", "grow", "shrink", "base.md:2: model/code.py defines no Thing.grow"),
        ("model/code.py", "size", "length", "base_en.md:2: model/code.py defines no Thing.size"),
        ("model/code.py", "WIDTH", "width", "base.md:8: model/code.py defines no WIDTH"),
        ("README.md", "Page", "Page\n```\ntrainer/x.py\n```", "README.md:3: trainer/x.py is not"),
        ("docs/page.md", "Page", "[a](../README.md#pages)", "docs/page.md:1: no heading #pages in"),
        ("learning_materials/README_zh.md", "01_a.py", "", "README_zh.md: 01_a.py is not listed"),
        (
            "knowledge_base.md",
            "![picture]",
            "[picture]",
            "knowledge_base.md: the picture learning_materials/figures/01_a.png of",
        ),
        (
            "knowledge_base_en.md",
            "`model/code.py::Thing.size` ",
            "",
            "knowledge_base_en.md: the code model/code.py::Thing.size of knowledge_base.md",
        ),
        ("knowledge_base_en.md", "2. How", "How", "knowledge_base_en.md: the question 2 of"),
        ("learning_log.md", "2026-01-31: ", "2026-02-31: ", 'log.md:7: "2026-02-31: two'),
        ("learning_log.md", "2026-01-30: ", "2026-02-01: ", "log.md:7: 2026-01-31 comes after"),
        ("learning_log.md", "**反思**\n**下一步**", "**下一步**", "log.md:2: its parts should"),
        ("learning_log.md", "30: one", "30: won", "notes.md: no link to learning_log.md#2026"),
    ],
)
def test_a_fault_is_told_with_its_place(notes, file, old, new, fault):
    text = (notes / file).read_text()
    assert old in text
    (notes / file).write_text(text.replace(old, new, 1))
    found = faults(notes)
    assert any(fault in line for line in found), found


def test_a_lesson_without_a_picture(notes):
    (notes / "learning_materials/02_b.py").touch()
    assert "learning_materials/02_b.py: it has no picture in figures/" in faults(notes)


@pytest.mark.parametrize(
    "gone, code, line",
    [
        (None, 0, f"{len(NOTES) + 1} notes, no fault found\n"),
        ("model/code.py", 1, "knowledge_base.md:2: model/code.py is not there\n"),
        ("notes.md", 2, "error: {}/notes.md cannot be read: No such file or directory\n"),
    ],
)
def test_as_a_command(notes, monkeypatch, capsys, gone, code, line):
    if gone:
        (notes / gone).unlink()
    monkeypatch.setattr(sys, "argv", ["check_notes.py", "--root", str(notes)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "docs/check_notes.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert (end.value.code or 0) == code
    assert (printed.out + printed.err).startswith(line.format(notes))

"""`make docs`: the site is built without a warning, and links to code lead to the right line."""

import json
import os
import re
import subprocess
import sys

import pytest

from model.weights import ROOT

pytestmark = pytest.mark.slow
pytest.importorskip("material", reason="mkdocs-material is not installed (requirements-docs.txt)")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr, built.stderr
    return folder


def test_texts_lessons_and_pictures_are_there(site):
    for page in ("index", "README_zh", "notes", "learning_log", "benchmarks/index"):
        assert (site / f"{page}.html").exists(), page
    front = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="docs/{page.stem}.html"' in front, page  # in the navigation
    for lesson in (ROOT / "learning_materials").glob("[0-9]*.py"):
        assert f"learning_materials/{lesson.name}.html" in front  # the tab of lessons
        page = (site / "learning_materials" / f"{lesson.name}.html").read_text()
        assert f"figures/{lesson.stem}.png" in page
    for page in site.rglob("*.html"):
        text = page.read_text()
        for picture in re.findall(r'<img[^>]* src="([^":]+)"', text):
            assert (page.parent / picture).exists(), (page, picture)
        assert not re.search(r'<(script|link|img)\b[^>]* (src|href)="https?:', text), page


def test_names_lead_to_their_line(site):
    knowledge = (site / "knowledge_base.html").read_text()
    links = re.findall(r'<a href="(.+?)#__codelineno-0-(\d+)"><code>(.+?)</code></a>', knowledge)
    assert len(links) > 50
    for page, line, name in links:
        file, name = name.replace("<wbr>", "").split("::")
        assert page == f"{file}.html" and f"__codelineno-0-{line}" in (site / page).read_text()
        code = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.search(rf"\b{name.split('.')[-1]}\b", code), (file, name, code)


def test_the_search_knows_chinese_words(site):
    index = json.loads((site / "search/search_index.json").read_text())
    assert index["config"]["lang"] == ["en", "zh"]
    texts = {each["location"]: each["title"] + each["text"] for each in index["docs"]}
    words = "\u200b".join(text for name, text in texts.items() if "knowledge_base.html" in name)
    assert "\u200b旋转\u200b" in words.replace(" ", "\u200b")  # jieba cuts with zero-width spaces
    assert not any(".py.html" in name for name in texts)  # code is left to the editor's search

"""What mkdocs.yml does with the project's own texts: gather, link and show the code they name.

Runs inside mkdocs, with the standard library and mkdocs alone.
"""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["*.md", "docs/*.md", "learning_materials/*.md", "benchmarks/*.md"]
PICTURES = [f"{room}/figures/*.*" for room in ("docs", "learning_materials", "benchmarks")]
ROOMS = ("model", "dataset", "trainer", "scripts", "benchmarks", "tests")
CODE = ["eval_llm.py", "learning_materials/*.py", *(f"{room}/**/*.py" for room in ROOMS)]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
CHINESE = "[\u3000-\u9fff\uff00-\uffef]"
SYMBOL = re.compile(r"`(\w+/[\w/]+\.py)::([\w.]+)`")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A tab with all lessons."""
    lessons = sorted((ROOT / "learning_materials").glob("[0-9]*.py"))
    titles = [ast.get_docstring(ast.parse(lesson.read_text("utf-8"))) for lesson in lessons]
    config.nav.append(
        {
            "Lessons · 课程": [
                {title.splitlines()[0]: page_of(f"learning_materials/{lesson.name}")}
                for title, lesson in zip(titles, lessons, strict=True)
            ]
        }
    )
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in (*TEXTS, *PICTURES):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if name != "AGENTS.md":  # it only points to CLAUDE.md
                files.append(File.generated(config, name, abs_src_path=str(path)))
    for pattern in CODE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, page_of(name), content=as_page(name, path)))
    return files


def page_of(code: str) -> str:
    return f"{code}.md"


def as_page(name: str, path: Path) -> str:
    """A code file as Markdown: it is not searched, and a lesson begins with its picture."""
    code, title, head = path.read_text(encoding="utf-8"), name, ""
    picture = path.parent / "figures" / f"{path.stem}.png"
    if picture.exists():
        title = (ast.get_docstring(ast.parse(code)) or name).splitlines()[0]
        head = f"```bash\npython {name}\n```\n\n![{title}](figures/{picture.name})\n\n"
    fence = "`" * 5
    front = "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n"
    return f'{front}# {title}\n\n{head}{fence}python linenums="1"\n{code}{fence}\n'


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to code lead to its page, and those to `file.py::Name` to the line."""
    if page.file.src_uri.endswith(".py.md"):
        return markdown

    def code_link(match: re.Match) -> str:
        file, name = match.groups()
        target = files.get_file_from_path(page_of(file))
        line = line_of(file, name) if target else None
        if line is None:
            return match[0]
        url = f"{get_relative_url(target.url, page.url)}#__codelineno-0-{line}"
        shown = f"{file}::{name}".replace("/", "/<wbr>").replace("::", "::<wbr>")
        return f'<a href="{url}"><code>{shown}</code></a>'

    def link(match: re.Match) -> str:
        text, target = match.groups()
        if re.match(r"\w+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        here = Path(page.file.src_uri).parent
        name = (ROOT / here / path).resolve().relative_to(ROOT).as_posix()
        for suffix, found in (
            ("", name),
            (".md", page_of(name)),
            ("/README.md", f"{name}/README.md"),
        ):
            if files.get_file_from_path(found):
                return f"[{text}]({path.rstrip('/')}{suffix}{'#' if anchor else ''}{anchor})"
        return text  # a folder without a page

    parts = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.M | re.S)
    for place in range(0, len(parts), 2):  # between blocks of code
        text = LINK.sub(link, SYMBOL.sub(code_link, parts[place]))
        text = re.sub(f"(?<={CHINESE})\n(?={CHINESE})", "", text)  # no space where a line ends
        # in a table's code a bar is written \|, which only GitHub reads so
        parts[place] = re.sub(r"`[^`\n]*`", lambda code: code[0].replace("\\|", "|"), text)
    return "".join(parts)


def line_of(file: str, name: str) -> int | None:
    """Where a function, class, method or variable is defined."""
    body, line = ast.parse((ROOT / file).read_text(encoding="utf-8")).body, None
    for part in name.split("."):
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = {getattr(node, "name", None), *(getattr(each, "id", None) for each in targets)}
            if part in names:
                body, line = getattr(node, "body", []), node.lineno
                break
        else:
            return line if "." in name else None
    return line

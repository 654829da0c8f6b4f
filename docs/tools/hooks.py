"""What mkdocs does besides: links to code become pages of the site, and lists are read as a code host reads them.

The pages of docs/ link to files of the project as they lie, `../codes/spec.py`, so that they lead somewhere on a code
host and in an editor. In the site each such file becomes a page `source/codes/spec.md`, a folder one with the list of
its files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from markdown import Extension, Markdown
from markdown.blockprocessors import build_block_parser
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^ *```.*?^ *```[ ]*$", re.MULTILINE | re.DOTALL)
NOTEBOOK_LINK = re.compile(r"\]\(([\w/.]+)\.ipynb\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}


class AsWritten(Extension):
    """Two spaces carry a list's item on, as on code hosts; Python-Markdown by itself wants four."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.tab_length = 2
        md.parser = build_block_parser(md)  # what reads blocks has noted the four already
        md.preprocessors.register(Examples(md), "examples", priority=20)  # behind fences, whose code is gone by then


class Examples(Preprocessor):
    """Examples of docstrings, lines that begin with >>>, are code and no quotations."""

    def run(self, lines: list[str]) -> list[str]:
        found: list[str] = []
        inside = False
        for line in lines:
            begins = line.startswith(">>> ")
            if begins and not inside:
                found.append("")
            inside = begins or (inside and bool(line.strip()))
            found.append(f"  {line}" if inside else line)
        return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.markdown_extensions.insert(0, AsWritten())  # in front: those behind it add to the parser it makes
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each notebook, and for each file and folder outside docs/ that a page links to."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.append(File.generated(config, f"{file.src_uri.removesuffix('.ipynb')}.md", content=notebook_page(file)))
    linked = set()
    for file in files.documentation_pages():
        for _, target, _ in LINK.findall(FENCE.sub("", file.content_string)):
            if (path := outside(target, file.src_uri)) is not None:
                linked.add(path)
    for path in sorted(linked):
        files.append(File.generated(config, source_page(path), content=content_of(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links out of docs/ lead to the pages that `on_files` has made."""
    here = page.file.src_uri

    def replace(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = outside(target, here)
        if path is None:
            return match[0]
        return f"[{text}]({relpath(source_page(path), str(PurePosixPath(here).parent))}{anchor or ''})"

    return "".join(
        part if part.lstrip().startswith("```") else LINK.sub(replace, part)
        for part in re.split(f"({FENCE.pattern})", markdown, flags=FENCE.flags)
    )


def notebook_page(file: File) -> str:
    """A notebook's cells as Markdown; the notebook itself stands beside the page."""
    parts = []
    for cell in json.loads(file.content_string)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    name = PurePosixPath(file.src_uri).name
    title, *rest = parts
    notice = f"This page is the notebook [{name}]({name})."
    return "\n\n".join([title, notice, *(NOTEBOOK_LINK.sub(r"](\1.md)", part) for part in rest)]) + "\n"


def outside(target: str, page: str) -> str | None:
    """The file or folder of the project, relative to its root, that `target` names on a page of docs/; None where it is
    a page, a picture or an address."""
    if "://" in target or target.startswith("mailto:"):
        return None
    path = normpath(f"docs/{PurePosixPath(page).parent}/{target}")
    is_ours = not path.startswith("docs/") or path.startswith("docs/tools/")
    return path if is_ours and (ROOT / path).exists() else None


def source_page(path: str) -> str:
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def content_of(path: str) -> str:
    """The page that shows a file, or names what a folder holds; left out of the search, which is for words."""
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# `{path}`\n\n"
    if (ROOT / path).is_dir():
        names = sorted(f"{each.name}/" if each.is_dir() else each.name for each in (ROOT / path).iterdir())
        return head + "\n".join(f"* `{name}`" for name in names if not name.startswith(("__pycache__", ".")))
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return head + text
    return f"{head}````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n````\n"

"""The site of docs/: built without a warning, whole, and without anything from elsewhere."""

from __future__ import annotations

import logging
import re
import shutil
from html.parser import HTMLParser
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import zellige
from tests.documentation.blocks import ROOT

CHROMIUM = shutil.which("chromium")
ELSEWHERE = ("http://", "https://", "mailto:")


class Parsed(HTMLParser):
    """Of a page: its ids, what it links to, what it loads, and its words outside of code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.aside = 0  # how deep in elements whose words are none
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attributes if value is not None}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(given["href"])
        self.aside += tag in ("pre", "code", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.aside -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self.aside:
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` builds, which is strict: a warning ends it."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Parsed]:
    return {path.relative_to(site).as_posix(): Parsed(path) for path in sorted(site.rglob("*.html"))}


def test_a_link_to_nowhere_ends_the_build(tmp_path, monkeypatch):
    """The settings that make it strict are on: else the other tests here would hold whatever the pages said."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Page\n\n[nowhere](nowhere.md) and [no such part](#no-part)\n")
    validation = load_config(str(ROOT / "mkdocs.yml")).validation
    config = tmp_path / "mkdocs.yml"
    config.write_text("site_name: one page\ntheme: {name: mkdocs}\nplugins: []\n")
    loaded = load_config(str(config), site_dir=str(tmp_path / "out"), strict=True)
    loaded.validation = validation
    monkeypatch.setattr(logging.getLogger("mkdocs"), "propagate", False)
    with pytest.raises(Abort, match="2 warnings"):
        build(loaded)


def test_links_and_their_anchors_lead_somewhere(site, pages):
    broken = []
    for name, page in pages.items():
        if name == "404.html":
            continue
        for link in page.links:
            if link.startswith(ELSEWHERE):
                continue
            parts = urlsplit(link)
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            target = target.resolve()
            target = target / "index.html" if target.is_dir() else target
            known = pages.get(target.relative_to(site.resolve()).as_posix())
            if not target.exists() or (parts.fragment and known and unquote(parts.fragment) not in known.ids):
                broken.append(f"{name}: {link}")
    assert broken == []
    assert len(pages) > 60


def test_nothing_is_loaded_from_elsewhere(site, pages):
    """It opens without a network: no fonts, scripts, styles or pictures of other hosts."""
    assert {load for page in pages.values() for load in page.loads if "//" in load} == set()
    for path in (site / "stylesheets").glob("*.css"):
        assert "http" not in path.read_text()
    for name, page in pages.items():
        if name == "404.html":
            continue
        for load in page.loads:
            assert ((site / name).parent / urlsplit(load).path).exists(), f"{name}: {load}"


def test_no_page_shows_its_markup(pages):
    """What code hosts read as a list, a table or a block and Python-Markdown does not stays as it is typed."""
    markup = re.compile(r"```|^\s*[*|] |\|---|^\s*#{1,4} |\*\*|\]\(|<!--", re.MULTILINE)
    shown = {
        name: found[0]
        for name, page in pages.items()
        if not name.startswith("source/") and (found := markup.search("".join(page.words)))
    }
    assert shown == {}


LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_of_the_pages_beside_docs_lead_somewhere(pages, name):
    for found in LINK.findall((ROOT / name).read_text(encoding="utf-8")):
        link = found[0] or found[1]
        if link.startswith(ELSEWHERE):
            continue
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            built = path.removeprefix("docs/").removesuffix(".md") + ".html"
            assert anchor in pages[built].ids, link


def tool(name: str) -> ModuleType:
    """A script of docs/tools, which is no package."""
    spec = spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_of_systems_are_those_that_the_script_draws():
    diagrams = tool("diagrams")
    folder = ROOT / "docs" / "images" / "systems"
    assert {path.stem for path in folder.iterdir()} == set(diagrams.PICTURES)
    for name, drawn in diagrams.PICTURES.items():
        assert (folder / f"{name}.svg").read_text(encoding="utf-8") == drawn, "run python docs/tools/diagrams.py"


def test_every_recipe_stands_in_its_table():
    assert tool("recipes").page() == (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8"), (
        "run python docs/tools/recipes.py"
    )


def test_every_public_name_stands_in_the_reference():
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    missing = [
        f"::: {module}.{name}" for name, module in zellige.MODULES.items() if f"::: {module}.{name}\n" not in page
    ]
    assert missing == [], "docs/reference/python.md shows what `import zellige` has"


def test_figures_of_system_pages_are_those_of_results_and_benchmarks():
    """Those pages say figures again that docs/claims.yaml holds elsewhere."""
    docs = ROOT / "docs"
    measured = "".join(
        (docs / f"{name}.md").read_text(encoding="utf-8") for name in ("results", "studies", "benchmarks", "choosing")
    )
    pages = [path for path in sorted((docs / "systems").glob("*.md")) if path.stem != "index"]
    for path in pages:
        section = path.read_text(encoding="utf-8").partition("## Measured\n")[2]
        assert section, f"{path.name} has no section Measured"
        numbers = re.findall(r"(?<![\w.])\d[\d,]*\.\d+|(?<![\w.,-])\d+%|\d+ images/s", section)
        assert numbers or "not measured" in section, path.name
        strange = [number for number in numbers if number.removesuffix(" images/s") not in measured]
        assert strange == [], f"{path.name}: results.md, studies.md and benchmarks.md have no such figures"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_it_is_searched_and_read_from_the_folder_on_a_phone_too(site):
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto((site / "systems" / "vqvae.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.keyboard.press("f")
        page.keyboard.type("bits-back")
        page.wait_for_selector(".md-search-result__item")
        assert "compress" in page.locator(".md-search-result__link").first.get_attribute("href")
        browser.close()
    assert wrong == []

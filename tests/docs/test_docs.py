"""The documentation: it builds without a warning, every block of Python in it runs, and nothing in it is fetched."""

from __future__ import annotations

import ast
import inspect
import os
import re
import types
import warnings
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urldefrag

import pytest

import mechkit as mk
from helpers.twin import twin_of

if TYPE_CHECKING:
    from helpers.browser import WatchedPage

pytest_plugins = ["helpers.browser"]
pytest.importorskip("mkdocs", reason="mkdocs is not installed (make test installs it)")

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*\{?\.?(?:py|python|python3|pycon|ipython)\b(.*)$", re.MULTILINE)

OTHER_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*\{?\.?(?:py|python3|pycon|ipython)\b", re.MULTILINE)


def build(site: Path, **options: object) -> None:
    """As `mkdocs build --strict` does; exits if there is a warning."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mkdocs's plugins and theme have some of their own
        warnings.filterwarnings("error", module="mechkit")
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), strict=True, **options)
        config.plugins.on_startup(command="build", dirty=False)
        try:
            build(config)
        finally:
            config.plugins.on_shutdown()


@pytest.fixture(scope="module")
def site(smollm2, tmp_path_factory) -> Iterator[Path]:
    """The built site, with the real model's random twin in its place: the code is the same and takes a quarter of the time. `make
    docs` takes the real one, and so do these tests with MECHKIT_REAL_DOCS=1."""
    folder = tmp_path_factory.mktemp("site")
    model = smollm2 if os.environ.get("MECHKIT_REAL_DOCS") else twin_of(smollm2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mk.HookedModel, "from_pretrained", lambda name: model)
        build(folder)
    assert not model.has_hooks
    return folder


# Pages


def test_every_page_is_built_and_every_block_of_python_was_run(site):
    shown = [page for page in PAGES if not (site / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()]
    assert shown == []
    for page in PAGES:
        fences = FENCE.findall(page.read_text())
        assert not OTHER_FENCE.search(page.read_text()), page  # only `python` is executed
        assert all('exec="on"' in options and 'session="' in options for options in fences), page
    assert sum(len(FENCE.findall(page.read_text())) for page in PAGES) >= 60


def test_the_fences_that_are_looked_for():
    """Controls: how a block of Python may be written."""
    assert FENCE.findall('```python exec="on"\nx\n```') == [' exec="on"']
    assert FENCE.findall("    ``` python\n    x\n    ```") == [""]
    assert OTHER_FENCE.search("```pycon\n>>> x\n```")
    assert not OTHER_FENCE.search('```python exec="on"\nx\n```')
    assert FENCE.findall("```{.python}\n") == ["}"]
    assert FENCE.findall("~~~py\n") == [""]
    assert FENCE.findall("```sh\n") == []


@pytest.mark.parametrize(("code", "fails"), [("print(1 + 1)", False), ("print(1 / 0)", True)])
def test_a_block_that_fails_fails_the_build(code, fails, tmp_path):
    (tmp_path / "docs").mkdir()
    text = f'# A page\n\n```python exec="on" source="above" result="text" session="control"\n{code}\n```\n'
    (tmp_path / "docs" / "index.md").write_text(text)
    options = {"docs_dir": str(tmp_path / "docs"), "nav": ["index.md"], "extra_css": [], "extra": {}}
    before = Path.cwd(), mk.HookedModel.__dict__["from_pretrained"]
    if fails:
        with pytest.raises(SystemExit):
            build(tmp_path / "site", **options)
    else:
        build(tmp_path / "site", **options)
        assert re.search(r">\s*2\s*<", (tmp_path / "site" / "index.html").read_text())
    assert (Path.cwd(), mk.HookedModel.__dict__["from_pretrained"]) == before


def test_figures_are_drawn_by_one_copy_of_plotly(site):
    figures = {page: page.read_text().count("Plotly.newPlot") for page in site.rglob("*.html")}
    assert sum(figures.values()) >= 25
    for page, n in figures.items():
        assert len(re.findall(r'<script src="[^"]*plotly\.min\.js"', page.read_text())) == (n > 0), page
    assert len([path for path in site.rglob("*.js") if "plotly" in path.name]) == 1


# Nothing from elsewhere, nothing of this machine


class Links(HTMLParser):
    """What a page loads by itself (`loads`), and what it leads to (`leads`)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "srcset", "poster", "data") or (
                name in ("href", "xlink:href") and tag in ("link", "use", "image")
            ):
                self.loads.append(value or "")
            elif name == "href":
                self.leads.append(value or "")


def is_remote(address: str) -> bool:
    return re.match(r"\s*(?:[a-z]+:)?//", address, re.IGNORECASE) is not None


def styles(text: str) -> list[str]:
    """Addresses that a style sheet, or a page's own styles, name."""
    return re.findall(r"""@import\s*(?:url\()?\s*["']?([^"')\s;]+)|url\(\s*["']?([^"')\s]+)""", text)


def test_nothing_is_fetched(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert [address for address in Links(text).loads if is_remote(address)] == [], path
        inside = "\n".join(re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL))
        assert [name for pair in styles(inside) for name in pair if is_remote(name)] == [], path
    for path in site.rglob("*.css"):
        assert [name for pair in styles(path.read_text()) for name in pair if is_remote(name)] == [], path


def test_what_would_count_as_fetched():
    """Controls."""
    page = Links(
        '<script src="https://a.b/c.js"></script><a href="https://a.b">x</a><img src="//a.b/c.png"><link href="x.css">'
    )
    assert [is_remote(address) for address in page.loads] == [True, True, False]
    assert page.leads == ["https://a.b"]
    found = [
        name
        for pair in styles('@import "https://a.b/c.css"; x { background: url(https://a.b/d.png) }')
        for name in pair
    ]
    assert [name for name in found if is_remote(name)] == ["https://a.b/c.css", "https://a.b/d.png"]


def test_links_within_the_site_lead_somewhere(site):
    """Strict building checks Markdown's links; this checks everything else in the pages, such as pictures."""
    for path in site.rglob("*.html"):
        if path.name == "404.html":  # whose addresses are from a server's root
            continue
        page = Links(path.read_text())
        for address in page.loads + page.leads:
            target = unquote(urldefrag(address).url)
            if target and not is_remote(target) and not target.startswith(("data:", "mailto:")):
                assert (path.parent / target).exists(), f"{path.name}: {address}"


def test_nothing_of_this_machine_is_in_the_pages(site):
    import sys

    known = {str(ROOT), str(Path.home()) + "/", sys.prefix, str(site)} - {"//", "/usr"}
    for path in site.rglob("*"):
        if path.suffix in (".html", ".js", ".json", ".css", ".svg", ".xml") and "plotly" not in path.name:
            text = path.read_text()
            assert [name for name in known if name in text] == [], path


# Reference


def public_names() -> set[str]:
    """What `mechkit/__init__.pyi` imports for others; `tests/package/test_names.py` compares it with what is loaded."""
    names = set()
    for node in ast.walk(ast.parse(Path(mk.__file__).with_suffix(".pyi").read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return {name for name in names if not name.startswith("_")}


def documented(site: Path) -> Counter[str]:
    """Names that have a heading of their own in the reference."""
    pages = [path.read_text() for path in (site / "reference").glob("*.html")]
    return Counter(name for page in pages for name in re.findall(r'<h[1-6] id="(mechkit\.[^"]+)"', page))


def test_the_public_names_are_all_that_there_is():
    others = {name for name in dir(mk) if not name.startswith("_")} - public_names()
    assert all(isinstance(getattr(mk, name), types.ModuleType) for name in others), others
    assert public_names() <= set(dir(mk))


def test_the_reference_has_every_public_name_once(site):
    counts = documented(site)
    top = Counter({name.split(".")[1]: n for name, n in counts.items() if name.count(".") == 1})
    assert top == Counter(public_names())
    assert max(counts.values()) == 1
    for module in ("circuits", "plot", "tasks", "zoo"):
        everything = getattr(mk, module)
        names = getattr(everything, "__all__", None) or [
            name
            for name, thing in vars(everything).items()
            if name[0] != "_" and not isinstance(thing, types.ModuleType)
        ]
        for name in names:
            assert counts[f"mechkit.{module}.{name}"] + counts[f"mechkit.{name}"] >= 1, f"{module}.{name}"


def test_docstrings_name_the_arguments_that_there_are():
    """The reference lets one line describe several, so that nobody else checks these names."""
    checked = 0
    for name in sorted(public_names()):
        thing = getattr(mk, name)
        if not inspect.isfunction(thing):
            continue
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(thing) or "", re.DOTALL | re.MULTILINE)
        described = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", section[1], re.MULTILINE) if section else []
        names = [one.lstrip("*") for several in described for one in several.split(", ")]
        parameters = set(inspect.signature(thing).parameters)
        assert set(names) <= parameters, f"{name}: {set(names) - parameters}"
        if names and name not in ("top_tokens",):  # says that the others are another function's
            assert parameters <= set(names), f"{name}: no documentation of {parameters - set(names)}"
        checked += bool(names)
    assert checked >= 30


# In a browser


@pytest.mark.parametrize("name", ["index.html", "engine.html", "gallery.html", "reference/attribution.html"])
def test_pages_open_without_a_network(site, page: WatchedPage, name):
    page.open(site / name)
    n = (site / name).read_text().count("Plotly.newPlot")
    if n:
        page.wait_for_figures(n)
    page.shoot(f"docs {name.removesuffix('.html')}")
    page.check()


def test_search_works_from_a_folder(site, page: WatchedPage):
    page.open(site / "index.html")
    page.page.locator("[data-md-component=search-query]").click()
    page.page.keyboard.type("bootstrap", delay=20)
    found = page.page.locator(".md-search-result__link")
    found.first.wait_for(timeout=20_000)
    assert any("reference/" in link.get_attribute("href") for link in found.all())
    page.check()

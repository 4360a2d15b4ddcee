"""The report and notebook fragments as text: one file, the same bytes, exact numbers, nothing read as markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import runpy
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mechkit as mk
from helpers.fake_tokenizer import FakeTokenizer
from helpers.gallery import HOSTILE, hostile, made_up
from helpers.gallery import patterns as attention_patterns
from mechkit.plot import Figure, heatmap
from mechkit.plot._export import CONFIG
from mechkit.plot._notebook import _session, html_of, notebook
from mechkit.plot._report import _draw, _Table, report
from mechkit.plot._text import visible
from mechkit.plot._theme import DARK

# what stands in this comment is on the page: MARKER-7


class Page(HTMLParser):
    """What a browser makes of a page: elements with their attributes, and all text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.pieces: list[str] = []
        self._open: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif self._open[-1:] != ["style"]:
            self.pieces.append(data)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    @property
    def text(self) -> str:
        return " ".join(self.pieces)

    def figures(self) -> list[dict[str, Any]]:
        """The figures as the page's script gets them."""
        return [json.loads(zlib.decompress(base64.b64decode(text))) for kind, text in self.scripts if kind]

    def tables(self) -> list[list[list[str]]]:
        """Texts of the cells of sortable tables; the number in full where a cell has one."""
        tables = []
        for part in re.findall(r'<table class="sortable">.*?<tbody>(.*?)</tbody>', self.source, re.S):
            rows = re.findall("<tr>(.*?)</tr>", part, re.S)
            cells = '<td(?: class="number" data-value="([^"]*)")?>(?:<bdi>)?(.*?)(?:</bdi>)?</td>'
            tables.append([[full or shown for full, shown in re.findall(cells, row, re.S)] for row in rows])
        return tables


class Words(FakeTokenizer):
    """A token is a word with the space before it."""

    def _pieces(self, text: str) -> list[str]:
        return re.findall(r" ?[^ ]+", text)


def prompts(n: int = 2, length: int = 3) -> mk.Prompts:
    return mk.Prompts(tuple(torch.arange(i, i + length) for i in range(n)))


def pairs() -> mk.PromptPairs:
    words = (("When", " Mary", HOSTILE[0]), ("When", " John", HOSTILE[0]))
    clean, corrupted = (mk.Prompts((torch.tensor([0, i, 3]),), (words[i - 1],)) for i in (1, 2))
    return mk.PromptPairs.from_tokens(clean, corrupted, [(1, [2, 77])], positions={"name": [1]}, task="ioi")


def written(tmp_path: Path, *items: Any, **options: Any) -> Page:
    return Page(report(tmp_path / "x.html", *items, **options))


# One file


def test_a_page_loads_nothing_and_runs_only_its_own_scripts(tmp_path: Path) -> None:
    page = written(tmp_path, hostile(), pairs(), "text", code=HOSTILE[1])
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"img", "link", "iframe", "object", "embed", "form", "base", "video", "audio", "svg"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split(";")[1]
    assert "http" not in policy.replace("http-equiv", "")
    own = [text for kind, text in page.scripts if kind is None]
    assert len(own) == 2
    for text in own:
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert ("html", {"lang": "en"}) in page.elements
    assert any(attributes.get("name") == "viewport" for _, attributes in page.elements)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    items = [made_up((3, 4, 5), "layer head prompt"), ("Tokens", hostile()), pairs()]
    first, second = (report(tmp_path / name / "x.html", *items) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    other = report(tmp_path / "c.html", *items, title="Other")
    assert other.read_bytes() != first.read_bytes()
    assert str(tmp_path) not in first.read_text(encoding="utf-8")


def test_templates_are_in_the_package() -> None:
    folder = resources.files("mechkit.plot") / "templates"
    assert {file.name for file in folder.iterdir()} >= {"report.html.jinja", "report.css", "report.js"}
    script = (folder / "report.js").read_text(encoding="utf-8")
    assert "</script" not in script.lower()
    assert "<!--" not in script


# Figures


def test_figures_are_kept_whole(tmp_path: Path) -> None:
    result = made_up((3, 4), "layer head")
    mine = heatmap(made_up((2, 5), "layer head", 1), title="Mine")
    page = written(
        tmp_path, ("Heads", result), mine, go.Figure(go.Bar(y=[1, 2]), layout={"title": {"text": "a &lt; b"}})
    )
    drawn = page.figures()
    assert len(drawn) == 3
    for i, (found, expected) in enumerate(zip(drawn[:2], (heatmap(result), mine), strict=True)):
        whole = json.loads(expected.to_json())
        if i == 1:  # its title is the heading
            whole["layout"]["title"] = {"text": ""}
            whole["layout"]["height"] -= 44
            whole["layout"]["margin"]["t"] -= 44
        assert {key: found[key] for key in ("data", "layout")} == whole
        assert found["config"].items() >= CONFIG.items()
    assert (drawn[2]["layout"]["width"], drawn[2]["layout"]["height"]) == (900, 450 - 44)  # its title is the heading
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page.source)[:3] == ["Heads", "Mine", "a &lt; b"]
    assert "mean over 16 prompts" in page.figures()[0]["layout"]["annotations"][-1]["text"].replace("<br>", " ")
    assert "gpt2-small · ioi · mean over 16 prompts" in page.text


def test_themes(tmp_path: Path) -> None:
    result = made_up((3, 4), "layer head")
    for theme in ("light", "dark"):
        page = written(tmp_path, result, theme=theme)
        assert page.figures()[0]["layout"]["paper_bgcolor"] == heatmap(result, theme=theme).layout.paper_bgcolor
        assert (f"--paper: {DARK.paper}" in page.source) == (theme == "dark")


def test_a_page_without_figures_is_small(tmp_path: Path) -> None:
    page = written(tmp_path, "Nothing but text.", pd.DataFrame({"a": [1]}), code=False)
    assert len(page.source) < 20_000
    assert "Nothing but text." in page.text


def test_a_copy_that_plotly_made_is_drawn(tmp_path: Path) -> None:
    copy = Figure(heatmap(made_up((2, 2), "layer head"), title="Mine"))
    with pytest.raises(ValueError, match="copy without its facts"):
        copy.facts  # noqa: B018
    page = written(tmp_path, copy)
    assert (len(page.figures()), page.tables()) == (1, [])
    assert '<h2 id="title-1">Mine</h2>' in page.source


# Tables


def test_strongest_cells_have_the_results_own_numbers(tmp_path: Path) -> None:
    result = made_up((3, 4, 6), "layer head prompt")
    rows = written(tmp_path, result).tables()[0]
    interval = result.effect().ci()
    assert len(rows) == 10
    for row, cell in zip(rows, result.top(10), strict=True):
        assert row[0] == cell.label
        assert float(row[1]) == cell.value
        assert float(row[2]) == cell.effect
        assert float(row[3]) == interval.low.sel(**cell.coords).values.item()
        assert float(row[4]) == interval.high.sel(**cell.coords).values.item()


def test_columns_say_what_they_are(tmp_path: Path) -> None:
    def heads(result: mk.Result) -> list[str]:
        return re.findall('<button type="button">(.*?)</button>', written(tmp_path, result).source)

    both = ["cell", "logit_diff (logits)", "effect: change from the corrupted run"]
    assert heads(made_up((3, 4), "layer head")) == both
    assert heads(made_up((3, 4, 2), "layer head prompt")) == [*both, "effect, 95 % from", "to"]
    assert heads(made_up((3, 4, 1), "layer head prompt")) == both
    plain = {"baseline": {}, "base": "", "metric": "induction", "unit": "score"}
    assert heads(made_up((3, 4, 2), "layer head prompt", **plain)) == [
        *("cell", "induction (score)", "induction, 95 % from", "to")
    ]


def test_cells_that_do_not_exist_are_not_counted(tmp_path: Path) -> None:
    values = torch.tensor([[[1.0, 2.0], [3.0, float("nan")], [float("nan"), float("nan")]]])
    coords = {"layer": (0,), "head": (0, 1, 2), "prompt": (0, 1)}
    page = written(tmp_path, mk.Result(values, ("layer", "head", "prompt"), coords, {}, "", "m", "score", {}))
    assert "The 2 of 2 cells farthest from 0; means over 2 prompts" in page.text
    assert page.tables()[0][0] == ["L0H1", "3.0", "NaN", "NaN"]  # one prompt has no interval


def test_data_frames(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": [0.1 + 0.2, -np.inf, np.nan], "who": ["a", None, "<b>"], "ok": [True, False, True]})
    rows = written(tmp_path, frame).tables()[0]
    assert rows == [[repr(0.1 + 0.2), "a", "True"], ["-Infinity", "–", "False"], ["NaN", "&lt;b&gt;", "True"]]
    indexed = pd.DataFrame({"x": [1, 2]}, index=pd.Index(["p", "q"], name="key"))
    assert written(tmp_path, ("T", indexed)).tables()[0] == [["p", "1"], ["q", "2"]]
    long = written(tmp_path, pd.DataFrame({"x": range(1000)}))
    assert len(long.tables()[0]) == 200
    assert "1,000 rows, of which the first 200 are shown" in long.text


def test_figures_show_their_numbers(tmp_path: Path) -> None:
    result = made_up((3, 4), "layer head")
    page = written(tmp_path, heatmap(result))
    rows = page.tables()[0]
    assert [float(row[2]) for row in rows] == result.values.flatten().tolist()
    assert "The figure&#39;s numbers, 12 rows" in page.source


@given(st.lists(st.floats(width=32), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_numbers_in_full_read_back(values: list[float]) -> None:
    table = _Table("", [("x", values)])
    back = [float(full.replace("Infinity", "inf")) for [(_, full)] in table.rows]
    np.testing.assert_array_equal(back, values)
    assert table.head == [("x", True)]


# Text


def test_hostile_text_is_text_everywhere(tmp_path: Path) -> None:
    items: list[Any] = []
    for text in HOSTILE:
        one = made_up((1, 2), "layer pos", coords={"layer": (0,), "pos": (text, "b")}, metric=text, unit=text)
        origin = {"provenance": {"model": text, f"key {text}": [text]}}
        items += [(text, replace(one, **origin)), ("text", f"x{text}y"), ("f", pd.DataFrame({text: [text], "n": [1]}))]
    everything = "".join(HOSTILE)
    page = written(tmp_path, *items, title=everything, code=everything)
    assert {tag for tag, _ in page.elements} <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "header",
            "h1",
            "h2",
            "p",
            "strong",
            "noscript",
            "nav",
            "ol",
        ),
        *(
            "li",
            "a",
            "main",
            "section",
            "div",
            "br",
            "small",
            "script",
            "table",
            "caption",
            "thead",
            "tr",
            "th",
            "button",
        ),
        *("tbody", "td", "bdi", "details", "summary", "dl", "dt", "dd", "pre", "code", "footer"),
    }
    assert [kind for kind, _ in page.scripts] == [*["text/plain"] * len(HOSTILE), None, None]
    assert page.pieces.count(visible(everything)) == 2  # head and heading
    for text in HOSTILE:
        assert page.pieces.count(visible(text)) >= 5, repr(
            text
        )  # contents, heading, a table's head and cell, provenance
        assert f"key {visible(text)}" in page.pieces
        assert f"L0 {visible(text)}" in page.pieces


def test_prompts_are_shown_token_by_token(tmp_path: Path) -> None:
    page = written(tmp_path, "t", prompts=pairs())
    cells = re.findall('<td class="tokens">(.*?)</td>', page.source)
    assert cells[0] == (
        '<bdi>When</bdi><bdi class="differs" title="name"> Mary</bdi><bdi title="END">&lt;script&gt;alert(1)&lt;/script&gt;</bdi>'
    )
    assert " John" in cells[1]
    assert re.findall('<td class="answer"><bdi>(.*?)</bdi>', page.source) == [
        "&#34; Mary&#34;",
        "&#34; John&#34;, token 77",
    ]
    assert "Task ioi: 1 pair" in page.text
    assert "<bdi>2</bdi>" in written(tmp_path, prompts()).source  # no tokenizer: ids
    many = written(tmp_path, prompts(300, 100))
    assert "300 prompts, of which the first 200 are shown" in many.text
    assert many.source.count('<td class="tokens">') == 200
    assert written(tmp_path, prompts(1, 30_000)).source.count('<td class="tokens">') == 1


def test_answers_are_words(tmp_path: Path) -> None:
    """Also those that stand in no prompt: pairs know the text of their answers' tokens."""
    model = Words()
    asked = mk.PromptPairs.from_text(
        model,
        ["When Mary met John , he saw"] * 2,
        ["When Mary met Tom , he saw"] * 2,
        [(" Mary", " Zoe"), (" Ann", " John")],
    )
    answers = [" Mary", " Zoe", " Ann", " John"]
    assert [asked.answer_text[token] for pair in asked.answers for ids in pair for token in ids] == answers
    found = re.findall('<td class="answer"><bdi>(.*?)</bdi>', written(tmp_path, "t", prompts=asked[[1, 0]]).source)
    assert found == [f"&#34;{word}&#34;" for word in (" Ann", " John", " Mary", " Zoe")]
    ids = mk.PromptPairs.from_tokens(asked.clean, asked.corrupted, [(7, 900), (8, 901)])  # no tokenizer: ids
    assert "token 900" in written(tmp_path, "t", prompts=ids).text


def test_each_title_is_there_once(tmp_path: Path) -> None:
    mine = heatmap(made_up((2, 5), "layer head", 1), title="My own picture <b>")
    patterns = attention_patterns(2, 2, 5)
    page = written(tmp_path, made_up((3, 4), "layer head"), mine, ("Named", mine), patterns, code=False)
    outside = re.sub("<nav.*?</nav>", "", page.source, flags=re.S)
    drawn = [found["layout"]["title"].get("text", "") for found in page.figures()]
    for title in ("Activation patching of z: logit_diff by layer and head", "My own picture &lt;b&gt;"):
        assert outside.count(title) == 1
    assert drawn == [
        "",
        "",
        "My own picture &#60;b&#62;",
        "Attention of L0H0",
    ]  # a name of its own; a title that changes
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page.source)
    assert headings[2:] == ["Named", "Attention patterns"]
    assert "<details><summary>Contents" in page.source
    assert "<nav" not in written(tmp_path, made_up((3, 4), "layer head"), code=False).source


def test_sections_stand_two_by_two(tmp_path: Path) -> None:
    small, large = made_up((3, 4), "layer head"), made_up((3, 60), "layer neuron")
    assert heatmap(large).layout.width > 1000

    def wide(*items: Any) -> list[bool]:
        found = re.findall(r'<section id="section-\d+"( class="wide")?>', written(tmp_path, *items, code=False).source)
        return [bool(one) for one in found]

    assert wide(small, small) == [False, False]
    assert wide(small) == [True]  # alone: the picture on the left, its table on the right
    assert wide(small, small, "text") == [False, False, True]
    assert wide(small, large, small, small) == [True, True, False, False]
    assert wide("text", small, pairs()) == [True, True, True]
    patterns = attention_patterns(1, 1, 24)
    assert wide(small, patterns) == [False, False]  # drawn anew, for a column
    assert patterns.plot().layout.width > 680


def test_mixed_models_and_tasks_are_warned_of(tmp_path: Path) -> None:
    one = made_up((3, 4), "layer head")
    other = made_up((3, 4), "layer head", provenance={"model": "other", "task": "induction"})

    def warned(*items: Any, **options: Any) -> list[str]:
        page = written(tmp_path, *items, code=False, **options)
        return re.findall('<p class="warning" role="note">(.*?)</p>', page.source)

    assert warned(one, one) == warned(one, heatmap(one), prompts=pairs()) == []
    models, tasks = warned(one, other)
    assert models.startswith("This report mixes 2 models: gpt2-small, other.")
    assert tasks.startswith("This report mixes 2 tasks: ioi, induction.")
    assert warned(one, heatmap(other)) == [models, tasks]  # pictures know what they are of
    (found,) = warned(replace(one, provenance={"model": "m", "task": "x"}), prompts=pairs())
    assert found.startswith("This report mixes 2 tasks: x, ioi.")
    assert warned(one, replace(other, provenance={"model": "gpt2-small", "task": "random tokens"})) == []  # head scores
    versions = [replace(one, provenance={"model": "m", "weights_hash": letter}) for letter in "ab"]
    assert warned(*versions)[0].startswith("This report mixes 2 versions of the weights of m.")


def test_provenance(tmp_path: Path) -> None:
    page = written(
        tmp_path, made_up((3, 4), "layer head", provenance={"model": "tiny", "layers": [1, 2], "long": "x" * 9000})
    )
    shown = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page.source))
    assert shown["model"] == "tiny"
    assert shown["layers"] == "[1, 2]"
    assert shown["shape"] == "layer 3 × head 4"
    assert shown["corrupted run"] == "−3.25 (what effects are measured from)"
    assert shown["clean run"] == "4"
    assert shown["long"] == "x" * 2000 + "… (9,000 characters in all)"
    assert "model <strong>tiny</strong>" in page.source


# Code


def test_code_is_the_callers_file(tmp_path: Path) -> None:
    page = written_here = Page(report(tmp_path / "x.html", "t"))
    assert "MARKER-7" in written_here.text
    assert "test_report.py" in page.text
    assert str(Path(__file__).parent) not in page.source
    assert "MARKER-7" not in Page(report(tmp_path / "x.html", "t", code=False)).text
    assert "print(1)" in Page(report(tmp_path / "x.html", "t", code="print(1)")).text

    script = tmp_path / "study.py"
    script.write_text(
        "import sys\nfrom mechkit.plot._report import report\nreport(sys.argv[1], 't')  # MARKER-8\n", encoding="utf-8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["study.py", str(tmp_path / "y.html")])
        runpy.run_path(str(script))
    assert "MARKER-8" in Page(tmp_path / "y.html").text


@pytest.mark.parametrize("file", [None, "/tmp/kernel", "<stdin>", json.__file__, np.__file__, "/nowhere/x.py"])
def test_no_code_from_notebooks_and_packages(tmp_path: Path, file: str | None) -> None:
    names: dict[str, Any] = {"report": report, "path": tmp_path / "x.html", "__name__": "__main__"}
    exec("report(path, 't')", names if file is None else {**names, "__file__": file})
    assert "<pre>" not in Page(tmp_path / "x.html").source


# What is refused


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ((), {}, "items: expected at least one"),
        ((object(),), {}, "items: number 0, of object, cannot be drawn: plot: expected one of Result"),
        (("t", ("T", 5)), {}, "items: number 1, of int, cannot be drawn"),
        ((pd.DataFrame(),), {}, "expected a table with rows and columns"),
        (("t",), {"theme": "blue"}, "theme: expected one of 'light', 'dark'"),
        (("t",), {"prompts": ["a"]}, "prompts: expected PromptPairs or Prompts"),
    ],
)
def test_refusals(tmp_path: Path, items: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    path = tmp_path / "new" / "x.html"
    with pytest.raises(ValueError, match=message):
        report(path, *items, **options)
    assert not path.parent.exists()


def test_refuses_another_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: expected a name that ends in .html, got .*x.pdf"):
        report(tmp_path / "x.pdf", "t")


# Notebooks


def test_the_first_fragment_alone_carries_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_session, "given", False)
    monkeypatch.setattr(_session, "every", False)
    figure = heatmap(hostile())
    first, second = html_of(figure), html_of(figure)
    assert len(first) - len(second) > 4_000_000
    assert re.findall('id="(.*?)"', first) != re.findall('id="(.*?)"', second)
    data = re.findall('<script type="application/json" id=".*?">(.*?)</script>', second, re.S)
    assert len(data) == 1
    assert "<" not in data[0]
    assert go.Figure({k: json.loads(data[0])[k] for k in ("data", "layout")}).to_json() == go.Figure(figure).to_json()
    assert "src=" not in second.replace(data[0], "")

    assert len(notebook()._repr_html_()) > 4_000_000
    notebook(every=True)
    assert len(html_of(figure)) > 4_000_000
    notebook(every=False)
    assert len(html_of(figure)) < 1_000_000


def test_a_setup_gives_plotly_to_later_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_session, "given", False)
    assert "plotly.js" in repr(setup := notebook())
    assert setup._repr_html_().count("<script>") == 1
    assert len(html_of(heatmap(made_up((2, 2), "layer head")))) < 1_000_000


def test_every_fragment_carries_plotly_in_colab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_session, "given", True)
    monkeypatch.setitem(__import__("sys").modules, "google.colab", object())
    assert len(html_of(heatmap(made_up((2, 2), "layer head")))) > 4_000_000


def test_a_drawing_keeps_infinite_space_out() -> None:
    """A figure without a size gets one, so that the page reserves its place before it is drawn."""
    drawing = _draw(go.Figure())
    assert (drawing.width, drawing.height, drawing.title) == (900, 450, "")


def test_columns_of_one_name_and_clashing_provenance_are_all_kept(tmp_path: Path) -> None:
    frame = pd.DataFrame([[1, 2, 3]], columns=["a", "a (2)", "a"])
    integers = pd.DataFrame({"n": pd.array([1, None], dtype="Int64"), "lists": [[1, 2], [3]]})
    result = make_clashing()
    page = written(tmp_path, frame, integers, result, code=False)
    assert re.findall(r'data-value="(\d)"', page.source)[:3] == ["1", "2", "3"]
    assert "[1, 2]" in page.text
    assert "–" in page.text
    for name in ("metric", "metric (provenance)", "shape", "shape (provenance)"):
        assert f"<dt>{name}</dt>" in page.source
    heads = re.findall(r"<button type=\"button\">(.*?)</button>", page.source)
    assert heads[-4:] == ["cell", "to", "to, 95 % from", "to"]


def make_clashing() -> mk.Result:
    coords = {"layer": (0, 1), "prompt": (0, 1, 2)}
    origin = {"metric": "zzz", "shape": "wrong"}
    return mk.Result(torch.arange(6.0).reshape(2, 3), ("layer", "prompt"), coords, {}, "", "to", "", origin)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    report(path, "before", code=False)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="title: expected a string"):
        report(path, "x", title=5)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    report(path, "a lone \ud800", code=False)
    assert b"\\ud800" in path.read_bytes()

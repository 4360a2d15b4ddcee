"""Every figure and the report in a real browser without a network: no request, no error, nothing blank."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

import mechkit as mk
from helpers.gallery import HOSTILE, KINDS, figures, hostile, made_up, patterns, twelve_views
from mechkit.plot import attention, heatmap, write_html
from mechkit.plot._notebook import _session, html_of, notebook
from mechkit.plot._report import report
from mechkit.plot._text import shortened, visible

if TYPE_CHECKING:
    from helpers.browser import WatchedPage

pytest_plugins = ["helpers.browser"]
BLANK = 3  # colours: paper, grid, line at 0
CAT = ('"the" 0', '" cat" 1', '"the" 2')
HEADS = made_up((12, 12, 16), "layer head prompt")


def opened(page: WatchedPage, path: Path) -> None:
    page.open(path)
    page.page.wait_for_selector("html[data-figures=done]")


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_loads_and_shows_something(page: WatchedPage, kind: str, tmp_path: Path) -> None:
    """Each on its own page would take plotly.js a second and a half to start, every time: all of a kind share a report."""
    shown = figures(kind)
    assert shown
    opened(page, report(tmp_path / "all.html", *shown.values(), code=False))
    page.check()
    for i, name in enumerate(shown):
        assert page.colours(i, keep=f"{kind} {name}") > BLANK or name == "one cell", name
    page.check()
    page.open(write_html(next(iter(shown.values())), tmp_path / "one.html"))
    page.wait_for_figures()
    assert page.colours() > BLANK
    page.check()


def test_the_circuits_slider_hides_weak_edges(page: WatchedPage, tmp_path: Path) -> None:
    figure = next(iter(figures("circuit").values()))
    page.open(figure.save(tmp_path / "circuit.html"))
    page.wait_for_figures()
    lines = page.figure().locator(".scatterlayer .trace path.js-line")
    n_drawn = sum(trace.x[0] is not None for trace in figure.data)
    assert lines.count() >= n_drawn
    rail = page.figure().locator(".slider-rail-touch-rect").bounding_box()
    label = page.figure().locator(".slider-label").first
    assert label.text_content() == "all edges shown"
    before = lines.count()
    for share in (0.5, 0.98):
        old = label.text_content()
        page.page.mouse.click(rail["x"] + share * rail["width"], rail["y"] + rail["height"] / 2)
        page.page.wait_for_function("text => document.querySelector('.slider-label').textContent !== text", arg=old)
        n_edges = int(re.search(r": (\d+) edges", label.text_content()).group(1))
        assert 0 < n_edges < n_drawn
        drawn = "n => document.querySelectorAll('.scatterlayer .trace path.js-line').length === n"
        page.page.wait_for_function(
            drawn, arg=n_edges, timeout=5000
        )  # as many lines as the label says; they follow the label
        assert n_edges < before
        before = n_edges
    page.check()


def test_the_menu_of_heads_switches_the_pattern(page: WatchedPage, tmp_path: Path) -> None:
    figure = attention(patterns(2, 2, 6).sel(layer=[0, 1]))
    page.open(figure.save(tmp_path / "attention.html"))
    page.wait_for_figures()
    shown = "figure => figure._fullData.filter(trace => trace.type === 'heatmap' && trace.visible === true).length"
    assert page.figure().evaluate(shown) == 1
    page.figure().locator(".updatemenu-header").click()
    page.figure().locator(".updatemenu-dropdown-button", has_text="L1H0").click()
    page.figure().locator(".gtitle", has_text="L1H0").wait_for(timeout=5000)
    assert page.figure().evaluate(shown) == 1
    assert page.hover(0, 3)[0] == "L1H0"
    page.check()


# The report


def pairs() -> mk.PromptPairs:
    clean = mk.Prompts(
        (torch.arange(5), torch.tensor([9, 8, 7])), (("<s>", "When", " Mary", "\n", "</script>"), HOSTILE[:3])
    )
    bad = mk.Prompts(
        (torch.tensor([0, 1, 6, 3, 4]), torch.tensor([9, 8, 7])),
        (("<s>", "When", " John", "\n", "</script>"), HOSTILE[:3]),
    )
    return mk.PromptPairs.from_tokens(clean, bad, [(2, 6), (7, [5, 100])], positions={"S2": [2, 1]}, task="ioi")


def written(folder: Path, theme: str) -> Path:
    equal = made_up((2, 3), "layer pos", coords={"layer": (0, 1), "pos": CAT})
    items = [
        "What was done.\n\nAnd <b>why</b>.",
        HEADS,
        ("Tokens that are hard to show", hostile()),
        ("Numbers", pd.DataFrame({"name": ["b", "a", "c"], "x": [10.5, -2.0, float("nan")], "n": [3, 20, 100]})),
        heatmap(equal, title="The cat", theme=theme),
    ]
    return report(folder / f"{theme}.html", *items, title="IOI <in> a model", prompts=pairs(), theme=theme)


@pytest.fixture(scope="module")
def reading(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedPage]:
    """A report that is open: to be looked at by several tests."""
    from helpers.browser import watched_page

    with watched_page(chromium) as page:
        opened(page, written(tmp_path_factory.mktemp("report"), "light"))
        yield page


def test_report_draws_every_figure_and_loads_nothing(reading: WatchedPage) -> None:
    states = reading.page.locator(".figure").evaluate_all("boxes => boxes.map((box) => box.dataset.state)")
    assert states == ["drawn"] * 3
    assert reading.page.locator(".waiting").count() == 0
    assert all(reading.colours(i) > BLANK for i in range(3))
    reading.shoot("report light")
    reading.check()


def test_equal_tokens_are_columns_of_their_own(reading: WatchedPage) -> None:
    assert reading.ticks("x", 2) == list(CAT)
    assert reading.hover(2, 1, 2)[1] == 'pos "the" 2'
    reading.check()


def test_hostile_tokens_stand_literally_in_the_document(reading: WatchedPage) -> None:
    assert len(HOSTILE) >= 30
    assert reading.ticks("x", 1) == [visible(shortened(token)) for token in HOSTILE]
    for i in (0, 1, 2, 8, 12, 13, 15):
        assert reading.hover(i, 1, 1)[:2] == ["layer 1", f"pos {visible(HOSTILE[i])}"]
    reading.check()  # no dialog opened either


def test_hover_shows_the_tensors_value(reading: WatchedPage) -> None:
    result = HEADS.mean("prompt")
    for layer, head in ((0, 0), (3, 7), (11, 11)):
        lines = reading.hover(head, layer)
        assert lines[:2] == [f"layer {layer}", f"head {head}"]
        value, effect = (number_of(line.split()[-k]) for line, k in ((lines[2], 2), (lines[3], 6)))
        assert value == pytest.approx(result.values[layer, head].item(), rel=1e-4)
        assert effect == pytest.approx(result.effect().values[layer, head].item(), rel=1e-4)
    reading.check()


def test_report_of_twelve_views_is_small_and_opens_fast(page: WatchedPage, tmp_path: Path) -> None:
    path = report(tmp_path / "twelve.html", *twelve_views(), code=False)
    size = path.stat().st_size / 1e6
    before = time.perf_counter()
    page.open(path)
    page.wait_for_figures()
    first = time.perf_counter() - before
    page.page.wait_for_selector("html[data-figures=done]")
    print(f"twelve views: {size:.2f} MB, first figure after {first:.1f} s, all {time.perf_counter() - before:.1f} s")
    assert size <= 8
    assert first <= 6 * patience()
    assert page.page.locator(".js-plotly-plot").count() == 12
    page.shoot("report twelve")
    page.check()


def patience() -> float:
    """How much longer things take while others use this machine's cores."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def column(page: WatchedPage, table: int, i: int) -> list[str]:
    return page.page.locator("table.sortable").nth(table).locator(f"tbody td:nth-child({i})").all_text_contents()


def test_report_tables_sort_by_click_and_by_key(reading: WatchedPage) -> None:
    effects = [number_of(text) for text in column(reading, 0, 3)]
    heading = reading.page.locator("table.sortable").first.locator("th").nth(2)
    button = heading.locator("button")
    button.click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert [number_of(text) for text in column(reading, 0, 3)] == sorted(effects, reverse=True)
    button.focus()
    reading.page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert [number_of(text) for text in column(reading, 0, 3)] == sorted(effects)
    assert reading.page.locator("th[aria-sort]").count() == 1

    frame = reading.page.locator("table.sortable").nth(2)
    assert column(reading, 2, 1) == ["b", "a", "c"]
    for i, orders in enumerate((["abc", "cba"], ["bac", "abc"], ["cab", "bac"])):  # x is absent for c: last both ways
        for order in orders:
            frame.locator("th button").nth(i).click()
            assert "".join(column(reading, 2, 1)) == order
    reading.check()


def number_of(text: str) -> float:
    return float(text.replace("−", "-"))


def test_report_contents_lead_to_their_sections(reading: WatchedPage) -> None:
    links = reading.page.locator("nav a")
    assert links.count() == 6
    reading.page.locator("nav summary").click()
    for i in range(links.count()):
        name = links.nth(i).text_content()
        links.nth(i).click()
        target = reading.page.locator(":target")
        assert target.locator("h2").first.text_content() == name
    reading.check()


def test_report_shows_prompts_literally(reading: WatchedPage) -> None:
    tokens = reading.page.locator("table.prompts tbody tr").first.locator("td.tokens").first.locator("bdi")
    assert tokens.all_text_contents() == ["<s>", "When", " Mary", "\\n", "</script>"]
    assert reading.page.locator("table.prompts bdi.differs").all_text_contents() == [" Mary", " John"]
    answers = reading.page.locator("table.prompts td.answer").all_text_contents()
    assert answers == ['" Mary"', '" John"', f'"{HOSTILE[2]}"', "token 5, token 100"]
    reading.check()


def test_report_fits_a_phone(page: WatchedPage, tmp_path: Path) -> None:
    page.page.set_viewport_size({"width": 390, "height": 800})
    opened(page, written(tmp_path, "light"))
    assert page.page.evaluate("document.documentElement.scrollWidth") == 390
    page.shoot("report phone")
    page.check()


def test_a_dark_report_on_screen_and_on_paper(page: WatchedPage, tmp_path: Path) -> None:
    opened(page, written(tmp_path, "dark"))
    assert all(page.colours(i) > BLANK for i in range(3))
    assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 24)"
    page.shoot("report dark")

    page.page.set_viewport_size({"width": 680, "height": 900})
    page.page.emulate_media(media="print")
    assert page.page.evaluate("document.documentElement.scrollWidth") == 680
    assert page.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.page.locator("details:not([open])").count() == 0
    page.shoot("report print")
    page.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.page.locator("details:not([open])").count() > 0
    page.check()


def test_report_never_stays_blank(page: WatchedPage, tmp_path: Path, chromium: Any) -> None:
    path = written(tmp_path, "light")
    context = chromium.new_context(java_script_enabled=False)
    silent = context.new_page()
    silent.goto(path.as_uri())
    assert "scripts are switched off" in silent.locator("noscript").first.inner_text()
    assert silent.locator(".waiting").count() == 3
    silent.locator("nav summary").click()
    assert "Tokens" in silent.locator("nav").inner_text()
    assert silent.locator("table.sortable tbody tr").count() > 10
    context.close()

    page.page.add_init_script("delete window.DecompressionStream")  # a browser of 2019
    opened(page, path)
    assert "Firefox 113" in page.page.locator(".figure .state").first.inner_text()
    assert len(page.problems) == 3  # and it says so in the console


# Notebooks


def notebook_page(path: Path, *fragments: str) -> Path:
    cells = "".join(f"<div class='output'>{fragment}</div>" for fragment in fragments)
    path.write_text(
        f"<!DOCTYPE html><html><head><meta charset='utf-8'></head><body>{cells}</body></html>", encoding="utf-8"
    )
    return path


def test_notebook_fragments_draw_on_one_page(
    page: WatchedPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_session, "given", False)
    first, second, third = (
        html_of(figure) for figure in (heatmap(made_up((3, 4), "layer head")), heatmap(hostile()), heatmap(hostile()))
    )
    assert len(first) > 4_000_000 > 200_000 > len(second)
    page.open(notebook_page(tmp_path / "x.html", first, second, third))
    page.wait_for_figures(3)
    assert page.ticks("x", 2) == [visible(shortened(token)) for token in HOSTILE]
    page.check()

    page.open(notebook_page(tmp_path / "cleared.html", second))
    page.page.get_by_text("run mk.plot.notebook() in a cell above").wait_for(timeout=15_000)
    page.open(notebook_page(tmp_path / "mended.html", notebook()._repr_html_(), second))
    page.wait_for_figures(1)
    page.check()


# What the tests above rest on


def test_a_request_is_seen(page: WatchedPage, tmp_path: Path) -> None:
    path = tmp_path / "x.html"
    path.write_text("<img src='http://example.com/x.png'>", encoding="utf-8")
    page.open(path)
    assert page.requests == ["http://example.com/x.png"]
    with pytest.raises(AssertionError):
        page.check()


@pytest.mark.parametrize(
    "script", ["console.error('told')", "throw new Error('told')", "alert('told')", "Promise.reject(new Error('told'))"]
)
def test_an_error_is_seen(page: WatchedPage, tmp_path: Path, script: str) -> None:
    path = tmp_path / "x.html"
    path.write_text(f"<script>{script}</script>", encoding="utf-8")
    page.open(path)
    page.page.wait_for_timeout(100)
    assert len(page.problems) == 1
    assert "told" in page.problems[0]
    with pytest.raises(AssertionError):
        page.check()


def test_a_blank_figure_is_seen(page: WatchedPage, tmp_path: Path) -> None:
    page.open(write_html(go.Figure(), tmp_path / "x.html"))
    page.wait_for_figures()
    assert page.colours() <= BLANK


def test_the_reports_policy_is_a_second_lock(page: WatchedPage, tmp_path: Path) -> None:
    """What a token could do if an escape were forgotten: nothing."""
    path = written(tmp_path, "light")
    intruder = "<img src='http://example.com/x.png' onerror='alert(1)'><script>alert(2)</script>"
    path.write_text(path.read_text(encoding="utf-8").replace("<header>", f"<header>{intruder}"), encoding="utf-8")
    failures: list[str] = []
    page.page.on("requestfailed", lambda request: failures.append(request.failure))
    opened(page, path)
    assert failures == ["csp"]  # stopped before it could reach a network
    assert len([problem for problem in page.problems if "Content Security Policy" in problem]) >= 2
    assert not any("dialog" in problem for problem in page.problems)
    assert page.page.locator(".js-plotly-plot").count() == 3

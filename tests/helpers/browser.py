"""A real browser for tests, without a network and watched: use it with `pytest_plugins = ["helpers.browser"]`.

1. `chromium` starts one browser per test module (playwright keeps an event loop running, which later modules must not meet). The
   test is skipped, with a reason, where playwright or the browser is missing.
2. `page` opens files in it. Whatever is asked of the network is refused and kept in `requests`; console errors, exceptions and
   dialogs are kept in `problems`. Each test says with `check` that there were none.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mechkit.plot._export import find_browser

SCREENSHOTS = Path(__file__).parents[2] / "out" / "screenshots"
_COUNT = """async ([png, left, top, width, height]) => {
  const bytes = Uint8Array.from(atob(png), (character) => character.charCodeAt(0));
  const picture = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const area = width > 0 ? [left, top, width, height] : [0, 0, picture.width, picture.height];
  return new Set(new Uint32Array(context.getImageData(...area).data.buffer)).size;
}"""
_AREA = """(figure) => {
  const places = [...figure.querySelectorAll(".nsewdrag")].map((area) => area.getBoundingClientRect());
  if (!places.length) return [0, 0, 0, 0];
  const corner = figure.getBoundingClientRect(), edge = 2;  // that of the area is not counted
  const [x, y] = [Math.min(...places.map((p) => p.left)) + edge, Math.min(...places.map((p) => p.top)) + edge];
  const [right, bottom] = [Math.max(...places.map((p) => p.right)), Math.max(...places.map((p) => p.bottom))];
  return [x - corner.left, y - corner.top, right - x - edge, bottom - y - edge].map(Math.round);
}"""
_PLACE = """(figure, [x, y]) => {
  const corner = figure.querySelector(".nsewdrag").getBoundingClientRect(), layout = figure._fullLayout;
  return [corner.left + layout.xaxis.d2p(x), corner.top + layout.yaxis.d2p(y)];
}"""


@dataclass
class WatchedPage:
    """A page and what it did that it should not: what it asked of the network, and what went wrong in it."""

    page: Any
    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def open(self, path: Path) -> None:
        """Load a file and wait until a figure is drawn, if one is expected."""
        self.page.goto(path.resolve().as_uri(), wait_until="load")

    def wait_for_figures(self, n: int = 1) -> None:
        """Until so many figures are drawn. (A selector, since a page's own policy may forbid that a function be polled.)"""
        self.page.locator(".js-plotly-plot .infolayer").nth(n - 1).wait_for(state="attached")

    def check(self) -> None:
        """Nothing was asked of the network and nothing went wrong."""
        assert self.requests == []
        assert self.problems == []

    def figure(self, i: int = 0) -> Any:
        """A figure, as plotly's element."""
        return self.page.locator(".js-plotly-plot").nth(i)

    def colours(self, i: int = 0, *, keep: str = "") -> int:
        """How many colours there are where a figure draws: paper, grid and line at 0 if there is nothing else.

        Args:
            i: Which figure.
            keep: A name for its picture, to keep it in `out/screenshots`.
        """
        area = self.figure(i).evaluate(_AREA)
        shot = self.figure(i).screenshot(path=_picture(keep) if keep else None)
        return self.page.evaluate(_COUNT, [base64.b64encode(shot).decode(), *area])

    def ticks(self, axis: str, i: int = 0) -> list[str]:
        """Texts of an axis, `"x"` or `"y"`, as they stand in the document."""
        return self.figure(i).locator(f".{axis}tick text").all_text_contents()

    def hover(self, x: float, y: float, i: int = 0) -> list[str]:
        """Lines of the text that appears at a place in data coordinates of a figure's first axes."""
        self.figure(i).scroll_into_view_if_needed()
        text = self.figure(i).locator(".hovertext text").first
        self.page.mouse.move(1, 1)  # plotly keeps a text for a while
        text.wait_for(state="detached", timeout=5000)
        left, top = self.figure(i).evaluate(_PLACE, [x, y])
        for attempt in range(20):  # a figure that is still being redrawn does not see the mouse
            self.page.mouse.move(left + attempt % 2, top)
            self.page.wait_for_timeout(250)
            if text.is_visible():
                break
        text.wait_for(timeout=1000)
        return text.locator("tspan.line").all_text_contents() or text.all_text_contents()

    def shoot(self, name: str) -> None:
        """Keep a picture of the whole page in `out/screenshots`."""
        self.page.screenshot(path=_picture(name), full_page=True)


def _picture(name: str) -> Path:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return SCREENSHOTS / f"{re.sub('[^A-Za-z0-9]+', '_', name).strip('_')}.png"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = find_browser()
    if path is None:
        pytest.skip("there is no Chrome or Chromium on this machine")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[WatchedPage]:
    """An empty page without a network."""
    with watched_page(chromium) as page:
        yield page


@contextmanager
def watched_page(chromium: Any) -> Iterator[WatchedPage]:
    """An empty page without a network, whose requests and problems are kept."""
    context = chromium.new_context(viewport={"width": 1500, "height": 900}, offline=True)
    watched = WatchedPage(context.new_page())
    _watch(watched)
    yield watched
    context.close()


def _watch(watched: WatchedPage) -> None:
    """Refuse and record what a page asks of the network, and record what goes wrong in it."""

    def refuse(route: Any) -> None:
        route.abort()

    def asked(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:", "about:")):
            watched.requests.append(request.url)

    def on_console(message: Any) -> None:
        if message.type in ("error", "warning"):
            watched.problems.append(f"{message.type}: {message.text}")

    def opened(dialog: Any) -> None:
        watched.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    watched.page.context.route(re.compile("^(?!file:|data:|blob:|about:)"), refuse)
    watched.page.on("request", asked)
    watched.page.on("console", on_console)
    watched.page.on("pageerror", lambda error: watched.problems.append(f"exception: {error}"))
    watched.page.on("dialog", opened)

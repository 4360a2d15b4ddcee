"""How fast a page of attention patterns opens, and how fast it switches between heads.

    python benchmarks/plot/attention_page.py [--tokens 512] [--layers 12] [--heads 12] [--repeat 3] [--json out.json]

Draws made-up attention patterns, saves the page, opens it in Chromium, and chooses heads from the menu with the mouse. The first
view is timed from the request until the picture is painted; a switch from the click until the other head is painted. It reports
the best of all repeats as well as the median, since other work on the machine adds to the times.
Needs playwright and a Chromium, and exits with a message where one is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mechkit.result import Result

# The time from the click until the frame after the one in which plotly has drawn is done.
CLOCK = """() => {
  const page = document.querySelector('.js-plotly-plot');
  window.took = null;
  document.addEventListener('click', () => { window.begun = performance.now(); }, true);
  page.on('plotly_afterplot', () => requestAnimationFrame(() => setTimeout(
    () => { window.took = performance.now() - window.begun; })));
}"""
PAINTED = """() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise SystemExit("skipped: playwright is not installed (pip install playwright)") from None
    from mechkit.plot._attention import attention
    from mechkit.plot._export import find_browser

    browser = find_browser()
    if browser is None:
        raise SystemExit("skipped: there is no Chrome or Chromium on this machine (Debian: apt install chromium)")
    result = patterns(args.layers, args.heads, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        page = attention(result).save(Path(folder) / "patterns.html")
        figures: dict[str, Any] = {
            "tokens": args.tokens,
            "heads": args.layers * args.heads,
            "page_mb": page.stat().st_size / 1e6,
            "build_s": time.perf_counter() - start,
        }
        with sync_playwright() as playwright:
            runs = [measure(playwright, browser, page, args.layers * args.heads) for _ in range(args.repeat)]
    figures["first_view_s"] = [view for view, _ in runs]
    figures["switch_ms"] = [switch for _, switches in runs for switch in switches]
    print(f"{figures['heads']} heads x {args.tokens} tokens")
    print(f"page             {figures['page_mb']:.1f} MB, drawn and saved in {figures['build_s']:.1f} s")
    for name, unit in (("first_view_s", "s"), ("switch_ms", "ms")):
        if figures[name]:
            best, median = min(figures[name]), statistics.median(figures[name])
            print(f"{name.rsplit('_', 1)[0].replace('_', ' '):<16} best {best:.3g} {unit}, median {median:.3g} {unit}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def patterns(n_layers: int, n_heads: int, n_tokens: int) -> Result:
    """Patterns like a causal model's: each row sums to 1, and later positions do not exist."""
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(n_layers, n_heads, n_tokens, n_tokens, generator=generator)
    later = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
    values = scores.masked_fill_(later, -torch.inf).softmax(-1).masked_fill_(later, torch.nan)
    tokens = tuple(f'" token" {i}' for i in range(n_tokens))
    coords = {"layer": tuple(range(n_layers)), "head": tuple(range(n_heads)), "dest": tokens, "src": tokens}
    provenance = {"model": "made up", "technique": "attention patterns", "n_prompts": 1}
    return Result(values, tuple(coords), coords, {}, "", "attention", "attention", provenance)


def measure(playwright: Any, browser: str, path: Path, n_heads: int) -> tuple[float, list[float]]:
    """Seconds to the first view, and milliseconds of each of some switches."""
    chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
    page = chromium.new_page(viewport={"width": 1300, "height": 1100})
    page.goto("about:blank")
    start = time.perf_counter()
    page.goto(path.as_uri(), wait_until="commit")
    page.wait_for_selector(".heatmaplayer image", state="attached", timeout=120_000)
    page.evaluate(PAINTED)
    view = time.perf_counter() - start
    page.evaluate(CLOCK)
    switches: list[float] = []
    for head in range(1, min(n_heads, 6)):
        page.click(".updatemenu-header")
        page.wait_for_timeout(400)  # the menu opens with a transition
        page.evaluate("() => { window.took = null; }")
        page.locator(".updatemenu-dropdown-button").nth(head).click()
        page.wait_for_function("() => window.took !== null", timeout=60_000)
        switches.append(page.evaluate("() => window.took"))
        page.wait_for_timeout(100)
    chromium.close()
    return view, switches


if __name__ == "__main__":
    main()

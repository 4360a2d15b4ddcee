"""Figures in notebooks: HTML fragments that work without a network.

1. The first fragment of a process carries plotly.js (5 MB), the later ones the figure alone: they are on one page in Jupyter, in
   VS Code and in what nbconvert writes.
2. A fragment waits for plotly.js. If it does not come, because the cell that held it was cleared, it says so and how to mend it,
   and draws as soon as it is there.
3. Where each output has a page of its own (Google Colab), every fragment carries plotly.js.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from uuid import uuid4

import plotly.graph_objects as go
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from mechkit._check import checked
from mechkit.plot._export import CONFIG

_MENDING = "run mk.plot.notebook() in a cell above, or run this cell again in a new session"
_SCRIPT = """
(() => {
  const box = document.getElementById("ID"), text = document.getElementById("ID-data").textContent;
  const started = Date.now();
  const draw = () => {
    if (window.Plotly) {
      box.textContent = "";
      Plotly.newPlot(box, JSON.parse(text));
    } else {
      const late = Date.now() - started > 4000;
      if (late) box.textContent = "The figure that holds plotly.js is not in this document: MENDING.";
      setTimeout(draw, late ? 1000 : 50);
    }
  };
  draw();
})();
"""


@dataclass
class _Session:
    """Whether plotly.js has been given out in this process, and whether every fragment is to carry it."""

    given: bool = False
    every: bool = False


_session = _Session()


class Setup:
    """plotly.js as a cell's output; what `notebook` returns."""

    def _repr_html_(self) -> str:
        _session.given = True
        return f"<p>plotly.js is in this cell: figures below need it.</p>{_library()}"

    def __repr__(self) -> str:
        return "plotly.js, for the figures of this notebook"


@checked
def notebook(*, every: bool | None = None) -> Setup:
    """Put plotly.js into the output of this cell, so that the notebook's figures draw without the cell that first held it.

    Nothing of this is needed as a rule: the first figure of a session brings it along. Call it at the top of a notebook whose
    cells are cleared or run in another order.

    Args:
        every: Whether every figure carries its own copy (5 MB each), for places that show each output on a page of its own.
            `None` leaves that as it was: not, except in Google Colab.

    Returns:
        An object that a notebook shows as plotly.js itself.
    """
    if every is not None:
        _session.every = every
    return Setup()


@checked
def html_of(figure: go.Figure) -> str:
    """A figure as an HTML fragment, for `_repr_html_`.

    Args:
        figure: Any plotly figure.

    Returns:
        A `<div>` and the scripts that draw in it. The first one in a process holds plotly.js, 5 MB.
    """
    own_page = _session.every or "google.colab" in sys.modules
    library = _library() if own_page or not _session.given else ""
    _session.given = True
    name = f"mechkit-{uuid4().hex}"
    picture = figure.to_dict()
    height = picture["layout"].get("height") or 450
    # "<" cannot stand in a script: "</script>" in a token would end it, "<!--" would hide its end
    data = to_json_plotly({**picture, "config": CONFIG}, engine="json").replace("<", "\\u003c")
    script = _SCRIPT.replace("ID", name).replace("MENDING", _MENDING)
    return (
        f'{library}<div style="overflow-x: auto"><div id="{name}" style="min-height: {height}px">The figure is being drawn …'
        "<noscript> It takes JavaScript.</noscript></div></div>"
        f'<script type="application/json" id="{name}-data">{data}</script><script>{script}</script>'
    )


def _library() -> str:
    return f"<script>{get_plotlyjs()}</script>"

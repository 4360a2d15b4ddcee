"""Heat maps: what is white, where each cell is, and that no token is ever read as markup."""

import html
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechkit.plot import Figure, heatmap, read_table, write_html
from mechkit.plot._theme import LIGHT, rgb
from mechkit.result import Result

NAN = float("nan")
PROVENANCE = {
    "model": "tiny-llama",
    "task": "ioi",
    "n_prompts": 4,
    "technique": "activation_patching",
    "direction": "denoise",
    "site": "resid_pre",
    "mode": None,
}
TOKENS = ('"When" 0', '" Mary" 1', '" and" 2', '" Mary" 3')


def make(values: torch.Tensor, dims: str, **changes: Any) -> Result:
    names = tuple(dims.split())
    coords = {dim: tuple(range(size)) for dim, size in zip(names, values.shape, strict=True)}
    fields = {
        "values": values,
        "dims": names,
        "coords": coords | changes.pop("coords", {}),
        "baseline": {"clean": torch.tensor(4.0), "corrupted": torch.tensor(-3.25)},
        "base": "corrupted",
        "metric": "logit_diff",
        "unit": "logits",
        "provenance": PROVENANCE,
    }
    return Result(**(fields | changes))


def resid() -> Result:
    values = torch.arange(12.0).reshape(3, 4) - 3.25
    return make(values, "layer pos", coords={"pos": TOKENS})


def white(figure: go.Figure) -> float:
    axis = figure.layout.coloraxis
    (place,) = [place for place, colour in axis.colorscale if colour == "#ffffff"]
    return round(axis.cmin + place * (axis.cmax - axis.cmin), 9)


def marks(figure: go.Figure) -> dict[str, float]:
    """Runs that the colour bar names, and where."""
    bar = figure.layout.coloraxis.colorbar
    return {
        text.split(" = ")[1]: place for place, text in zip(bar.tickvals, bar.ticktext, strict=True) if " = " in text
    }


def scale_title(figure: go.Figure) -> str:
    return figure.layout.coloraxis.colorbar.title.text


def caption(figure: go.Figure) -> str:
    return figure.layout.annotations[-1].text.replace("<br>", " ")


def test_plotly_is_imported_by_drawing_only() -> None:
    code = (
        "import sys, mechkit.plot; assert 'plotly' not in sys.modules; "
        "from mechkit.plot import heatmap; assert 'plotly' in sys.modules; "
        "import mechkit.plot._heatmap; assert callable(mechkit.plot.heatmap)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    import mechkit.plot

    for name in mechkit.plot.__all__:
        assert callable(getattr(mechkit.plot, name))
    with pytest.raises(AttributeError, match="no attribute 'bar'"):
        mechkit.plot.bar  # noqa: B018


# Where the cells are


def test_layer_0_is_at_the_top_and_equal_tokens_are_separate_columns() -> None:
    figure = heatmap(resid())
    np.testing.assert_array_equal(figure.data[0].z, resid().effect().values)
    assert figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.yaxis.title.text == "layer"
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2, 3]
    assert figure.layout.xaxis.ticktext == TOKENS
    assert list(figure.layout.yaxis.ticktext) == ["0", "1", "2"]


def test_order_of_dims_does_not_matter() -> None:
    result = make(torch.arange(6.0).reshape(3, 2), "head layer")
    figure = heatmap(result)
    np.testing.assert_array_equal(figure.data[0].z, result.effect().values.T)
    assert (figure.layout.yaxis.title.text, figure.layout.xaxis.title.text) == ("layer", "head")


def test_chosen_layers_keep_their_numbers() -> None:
    figure = heatmap(make(torch.zeros(2, 2), "layer neuron", coords={"layer": (7, 11), "neuron": (133, 2000)}))
    assert list(figure.layout.yaxis.ticktext) == ["7", "11"]
    assert list(figure.layout.xaxis.ticktext) == ["133", "2000"]


@pytest.mark.parametrize(
    ("dims", "shape"), [("layer", (5, 1)), ("pos", (1, 5)), ("position", (1, 5)), ("head", (1, 5))]
)
def test_one_dim_is_a_column_of_layers_or_a_row(dims: str, shape: tuple[int, int]) -> None:
    figure = heatmap(make(torch.arange(5.0), dims))
    assert figure.data[0].z.shape == shape
    assert len(figure.layout.xaxis.ticktext) == (shape[1] if shape[1] > 1 else 0)


def test_three_dims_are_panels_on_one_scale() -> None:
    values = torch.arange(24.0).reshape(2, 4, 3)
    result = make(values, "layer pos head", coords={"pos": TOKENS})
    figure = heatmap(result)
    assert len(figure.data) == 4
    for pos, panel in enumerate(figure.data):
        np.testing.assert_array_equal(panel.z, values[:, pos] + 3.25)
        assert panel.coloraxis == "coloraxis"
    assert [note.text for note in figure.layout.annotations[:4]] == [f"pos {token}" for token in TOKENS]
    assert white(figure) == figure.layout.coloraxis.cmin == 0  # nothing is lower than the base run
    assert figure.layout.coloraxis.cmax == pytest.approx(23 + 3.25)
    assert len(heatmap(make(values, "layer head neuron")).data) == 3


def test_many_columns_have_few_labels() -> None:
    figure = heatmap(make(torch.zeros(2, 1536), "layer neuron"))
    ticks = list(figure.layout.xaxis.tickvals)
    assert 10 < len(ticks) < 50
    assert figure.layout.xaxis.ticktext[1] == str(ticks[1])
    assert figure.layout.width < 2000
    assert len(heatmap(make(torch.zeros(30, 9), "layer head")).layout.yaxis.tickvals) == 30


def test_height_and_title_are_the_callers() -> None:
    figure = heatmap(resid(), height=777, title="Mine")
    assert (figure.layout.height, figure.layout.title.text) == (777, "Mine")
    default = heatmap(resid()).layout.title.text.replace("<br>", " ")
    assert default == "Activation patching of resid_pre: logit_diff by layer and pos"
    assert heatmap(make(torch.zeros(2, 2), "layer head", provenance={})).layout.title.text == (
        "logit_diff by layer and head"
    )


# What is white


def test_a_cell_that_does_nothing_is_white() -> None:
    figure = heatmap(resid())
    assert figure.data[0].z[0, 0] == white(figure) == 0
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 11)  # no colour that nothing has
    assert figure.layout.coloraxis.colorscale[0] == (0, "#ffffff")
    assert figure.layout.coloraxis.colorscale[-1] == (1, LIGHT.diverging[-1])
    assert "change in logit_diff (logits)<br>white = corrupted run<br>blue is higher<br>" in scale_title(figure)
    assert marks(figure) == {"corrupted run": 0, "clean run": 7.25}
    assert "corrupted run −3.25, clean run 4 logits" in caption(figure)

    value = heatmap(resid(), show="value")
    np.testing.assert_array_equal(value.data[0].z, resid().values)
    assert value.data[0].z[0, 0] == white(value) == value.layout.coloraxis.cmin == -3.25
    assert value.layout.coloraxis.cmax == -3.25 + 11
    assert "logit_diff (logits)<br>white = corrupted run −3.25" in scale_title(value)
    assert marks(value) == {"corrupted run": -3.25, "clean run": 4}
    assert value.data[0].hovertext == figure.data[0].hovertext

    effect = heatmap(resid().effect())
    assert marks(effect) == marks(figure)
    assert effect.data[0].z[0, 0] == white(effect) == 0
    assert "change in logit_diff (logits)<br>white = corrupted run<br>" in scale_title(effect)

    normalized = heatmap(resid().normalized())
    assert normalized.data[0].z[0, 0] == white(normalized) == 0
    assert "0 = corrupted run, 1 = clean run" in scale_title(normalized)
    assert marks(normalized) == {"corrupted run": 0, "clean run": 1}
    np.testing.assert_array_equal(heatmap(resid(), show="normalized").data[0].z, normalized.data[0].z)

    noising = make(torch.tensor([[4.0, 0.0]]), "layer head", base="clean").normalized()
    assert white(heatmap(noising)) == 1
    assert "white = clean run 1" in scale_title(heatmap(noising))

    scores = heatmap(make(torch.eye(2), "layer head", baseline={}, base="", metric="induction", unit="score"))
    assert white(scores) == 0
    assert "induction (score)<br>white = 0" in scale_title(scores)


def test_both_sides_of_white_are_equally_strong_and_no_part_of_the_bar_is_unused() -> None:
    figure = heatmap(make(torch.tensor([[-3.25 - 2, -3.25, -3.25 + 4]]), "layer head"))
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-2, 7.25)  # to the clean run: more than half of the bar has values
    assert white(figure) == 0
    low, high = (np.array(rgb(axis.colorscale[i][1])) for i in (0, -1))
    assert tuple(high) == rgb(LIGHT.diverging[-1])
    whole = np.array([rgb(colour) for colour in LIGHT.diverging])
    places = np.linspace(-7.25, 7.25, len(whole))
    np.testing.assert_allclose(low, [np.interp(-2, places, channel) for channel in whole.T], atol=1)
    far = heatmap(make(torch.tensor([[-3.25, -3.0]]), "layer head"))
    assert (far.layout.coloraxis.cmin, far.layout.coloraxis.cmax) == (0, 0.25)  # the clean run is far away
    assert "clean run = 7.25, off this bar" in scale_title(far)
    assert marks(far) == {"corrupted run": 0}
    mirrored = heatmap(make(torch.tensor([[-3.25, -9.0]]), "layer head", baseline={"corrupted": torch.tensor(-3.25)}))
    assert "<br>red is lower<br>" in scale_title(mirrored)
    assert mirrored.layout.coloraxis.cmax == white(mirrored) == 0


def test_center_and_zmax_are_the_callers() -> None:
    figure = heatmap(resid(), center=1.5, zmax=2.0)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-0.5, 3.5)
    assert "white = 1.5" in scale_title(figure)
    np.testing.assert_array_equal(figure.data[0].z, resid().values)
    assert white(heatmap(resid(), center=0.0)) == 0
    flat = heatmap(make(torch.full((2, 2), -3.25), "layer head"))
    assert flat.layout.coloraxis.cmin < white(flat) < flat.layout.coloraxis.cmax


def test_prompts_of_different_length_show_the_change() -> None:
    """The base run's mean differs between cells that average over different prompts: no one value is white."""
    values = torch.tensor([[[1.0, 101.0], [2.0, NAN]]])
    baseline = {"clean": torch.tensor([4.0, 104.0]), "corrupted": torch.tensor([1.0, 100.0])}
    figure = heatmap(make(values, "layer pos prompt", baseline=baseline))
    np.testing.assert_array_equal(figure.data[0].z, [[0.5, 1.0]])
    assert white(figure) == 0
    assert "prompts that have it" in caption(figure)
    assert "logit_diff 51 logits" in figure.data[0].hovertext[0][0]
    assert "change in" in scale_title(figure)

    control = heatmap(make(values.nan_to_num(0.0), "layer pos prompt", baseline=baseline), show="value")
    assert white(control) == 50.5
    assert "prompts that have it" not in caption(control)
    normalized = make(values, "layer pos prompt", baseline=baseline).mean().normalized()
    np.testing.assert_allclose(heatmap(normalized).data[0].z, normalized.values)
    assert white(heatmap(normalized)) == 0


# What it says


def test_prompts_are_averaged_and_the_caption_says_so() -> None:
    values = torch.randn(3, 4, 4)
    result = make(values, "layer head prompt")
    figure = heatmap(result)
    np.testing.assert_allclose(figure.data[0].z, values.mean(-1) + 3.25, rtol=1e-6)
    assert result.dims == ("layer", "head", "prompt")
    for part in (
        "tiny-llama",
        "ioi",
        "mean over 4 prompts",
        "activation patching",
        "site resid_pre",
        "direction denoise",
    ):
        assert part in caption(figure)
    assert "mode" not in caption(figure)
    assert "mean over 4 prompts" in caption(heatmap(result.mean()))  # averaged before is averaged too
    assert "mean over" not in caption(heatmap(result.sel(prompt=2)))
    assert "mean over" not in caption(heatmap(result.p_values()))
    bare = make(torch.zeros(1, 1), "layer head", provenance={})
    assert caption(heatmap(bare)) == "corrupted run −3.25, clean run 4 logits"
    assert caption(heatmap(bare.effect())) == caption(heatmap(bare, caption=False)) == ""


def test_hover_shows_place_value_and_effect() -> None:
    values = torch.tensor([[1.234567, NAN]])
    hover = heatmap(make(values, "layer pos", coords={"pos": TOKENS[:2]})).data[0].hovertext
    assert hover[0][0].split("<br>") == [
        "layer 0",
        'pos "When" 0',
        "logit_diff 1.2346 logits",
        "+4.4846 logits from the corrupted run",
    ]
    assert hover[0][1].split("<br>") == ["layer 0", 'pos " Mary" 1', "not present"]


def test_missing_cells_are_drawn_as_nothing_on_grey() -> None:
    figure = heatmap(make(torch.tensor([[1.0, NAN], [NAN, NAN]]), "layer head"))
    assert np.isnan(figure.data[0].z).sum() == 3
    assert figure.layout.plot_bgcolor != figure.layout.paper_bgcolor == "#ffffff"
    with pytest.raises(ValueError, match="at least one cell that exists, got NaN alone"):
        heatmap(make(torch.full((1, 2), NAN), "layer head"))


def test_path_patching_names_receivers_and_what_is_frozen() -> None:
    origin = {
        "model": "m",
        "technique": "path_patching",
        "senders": "layer head",
        "receivers": ["a2.h1<q>"],
        "freeze": "heads",
    }
    result = make(torch.tensor([[1.0, 2.0], [NAN, NAN]]), "layer head", provenance=origin)
    figure = heatmap(result)
    assert figure.layout.title.text == "Path patching to a2.h1&#60;q&#62;: logit_diff by layer and head"
    for part in ("receivers a2.h1&#60;q&#62;", "heads frozen", "grey: no path leads from there to the receivers"):
        assert part in caption(figure)
    assert np.isnan(figure.data[0].z[1]).all()
    assert figure.layout.plot_bgcolor == LIGHT.absent
    assert LIGHT.absent not in {colour for _, colour in figure.layout.coloraxis.colorscale}  # no colour of the scale
    assert figure.data[0].hovertext[1][0].split("<br>") == ["layer 1", "head 0", "no path to the receivers"]
    many = make(
        result.values,
        "layer head",
        provenance=origin | {"receivers": [f"a2.h{i}<q>" for i in range(5)], "freeze": "all"},
    )
    assert heatmap(many).layout.title.text.startswith("Path patching to 5 receivers: ")
    assert "a2.h4&#60;q&#62; · all else frozen" in caption(heatmap(many))


HOSTILE = (
    "<script>alert(1)</script>",
    "<b>bold</b>",
    '<a href="http://example.com">x</a>',
    "a&b",
    "&lt;",
    "&#60;b&#62;",
    "%{z}",
    "%{customdata[0]:.3f}",
    "$x^2$",
)


def test_hostile_tokens_are_shown_literally() -> None:
    result = make(
        torch.zeros(1, len(HOSTILE)),
        "layer pos",
        coords={"pos": HOSTILE},
        metric="<i>m</i>",
        unit="a&b",
        provenance={"model": HOSTILE[0], "technique": "<br>"},
    )
    figure = heatmap(result, title="<b>t</b>")
    shown = [figure.layout.title.text, caption(figure), *figure.layout.xaxis.ticktext]
    shown += [line for text in figure.data[0].hovertext[0] for line in text.split("<br>")]
    shown += scale_title(figure).split("<br>")
    assert not any(set("<>$") & set(text) for text in shown)
    assert figure.layout.title.text == "&#60;b&#62;t&#60;/b&#62;"
    hovered = [html.unescape(text.split("<br>")[1]) for text in figure.data[0].hovertext[0]]
    assert hovered == [f"pos {token}" for token in HOSTILE]
    assert figure.data[0].hovertemplate is None  # a template would read %{z}
    assert html.unescape(figure.layout.xaxis.ticktext[5]) == HOSTILE[5]


@given(token=st.text(min_size=1, max_size=20))
@settings(deadline=None, max_examples=60)
def test_any_token_is_one_line_of_plain_text(token: str) -> None:
    figure = heatmap(make(torch.zeros(1, 1), "layer pos", coords={"pos": (token,)}))
    lines = figure.data[0].hovertext[0][0].split("<br>")
    assert len(lines) == 4
    shown = html.unescape(lines[1]).removeprefix("pos ")
    assert not set("<>\n\r\t") & set(lines[1])
    if token.isascii() and token.isprintable():
        assert shown == token
    if token.isprintable():
        assert shown.replace("\u200e", "") == token


def test_invisible_characters_become_visible() -> None:
    tokens = ("\n", "\t", "\u202e", "\u200b", "👩\u200d👧", '"שלום" 3')
    ticks = heatmap(make(torch.zeros(1, 6), "layer pos", coords={"pos": tokens})).layout.xaxis.ticktext
    assert ticks[:5] == ("\\n", "\\t", "\\u202e", "\\u200b", "👩\u200d👧")
    assert ticks[5].replace("\u200e", "") == tokens[5]


def test_long_labels_are_shortened_on_the_axis_only() -> None:
    token = "a" * 40 + '" 7'
    figure = heatmap(make(torch.zeros(1, 1), "layer pos", coords={"pos": (token,)}))
    assert len(figure.layout.xaxis.ticktext[0]) <= 24
    assert figure.layout.xaxis.ticktext[0].endswith('" 7')
    assert token in figure.data[0].hovertext[0][0]


# What is refused


@pytest.mark.parametrize(
    ("values", "dims", "message"),
    [
        (torch.zeros(2, 2, 2, 2), "layer pos head neuron", "expected 1 to 3 dims.*got.*'neuron'.*sel"),
        (torch.tensor(1.0), "", "expected 1 to 3 dims"),
        (torch.zeros(2, 0), "layer head", "at least one cell"),
        (torch.tensor([[torch.inf]]), "layer head", "infinite"),
    ],
)
def test_refuses_what_cannot_be_drawn(values: torch.Tensor, dims: str, message: str) -> None:
    for changes in ({}, {"baseline": {}, "base": ""}):
        with pytest.raises(ValueError, match=message):
            heatmap(make(values, dims, **changes))


def test_results_share_a_scale_or_are_refused() -> None:
    one, two = resid(), make(2 * torch.arange(12.0).reshape(3, 4) - 3.25, "layer pos", coords={"pos": TOKENS})
    figure = heatmap({"one": one, "two": two})
    for panel, result in zip(figure.data, (one, two), strict=True):
        np.testing.assert_array_equal(panel.z, result.effect().values)
        assert panel.coloraxis == "coloraxis"
    assert [note.text for note in figure.layout.annotations[:2]] == ["one", "two"]
    assert figure.layout.coloraxis.cmax == 22
    assert list(figure.table()["result"]) == ["one"] * 12 + ["two"] * 12
    np.testing.assert_array_equal(figure.table()["value"], torch.cat([one.values, two.values]).flatten())
    assert len(heatmap([one, two]).data) == 2
    clean = make(one.values, "layer pos", coords={"pos": TOKENS}, base="clean")
    bare = make(one.values, "layer pos", coords={"pos": TOKENS}, baseline={}, base="")
    for others in ([one, clean], [bare, one], [one, bare]):
        with pytest.raises(ValueError, match="expected results that are compared with the same runs"):
            heatmap(others)
    with pytest.raises(ValueError, match=r"same labels and unit; got layer 3 × pos 4 in 'logits'.*in 'nats'"):
        heatmap([one, make(one.values, "layer pos", coords={"pos": TOKENS}, unit="nats")])
    with pytest.raises(ValueError, match=r"result\['b'\]: expected a Result, got int"):
        heatmap({"a": one, "b": 3})
    with pytest.raises(ValueError, match=r"result: expected a Result or a list .*, got int"):
        heatmap(3)


def test_panels_whose_base_runs_differ_show_the_change_from_each() -> None:
    values = torch.tensor([[1.0, 2.0]])
    pair = [make(values, "layer head", baseline={"clean": torch.tensor(b)}, base="clean") for b in (0.0, 1.0)]
    figure = heatmap(pair)
    assert [panel.z.tolist() for panel in figure.data] == [[[1.0, 2.0]], [[0.0, 1.0]]]
    assert "the panels' base runs differ" in caption(figure)
    assert white(figure) == 0


def test_cells_of_different_prompts_are_reported() -> None:
    values = torch.tensor([[[1.0, 2.0], [3.0, NAN]]])
    assert "averaged over the prompts that have it" in caption(heatmap(make(values, "layer head prompt")))
    assert "that have it" not in caption(heatmap(make(values.nan_to_num(), "layer head prompt")))


@pytest.mark.parametrize("bad", [{"zmax": float("inf")}, {"zmax": "a"}, {"center": NAN}, {"height": 5}, {"title": 5}])
def test_refuses_options_that_are_no_numbers_or_text(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
        heatmap(resid(), **bad)


def test_refuses_a_scale_of_nothing() -> None:
    with pytest.raises(ValueError, match="zmax: expected a positive number, got 0"):
        heatmap(resid(), zmax=0.0)


# To disk


class _Loads(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]


def test_html_file_fetches_nothing(tmp_path: Path) -> None:
    figure = heatmap(make(torch.zeros(1, len(HOSTILE)), "layer pos", coords={"pos": HOSTILE}))
    path = write_html(figure, tmp_path / "new" / "figure.html")
    assert path == tmp_path / "new" / "figure.html"
    text = path.read_text(encoding="utf-8")
    page = _Loads()
    page.feed(text)
    assert page.fetched == []
    assert page.tags <= {"html", "head", "meta", "body", "div", "script", "style"}
    assert 'src="http' not in text
    assert '"displaylogo": false' in text
    assert len(text) > 1_000_000  # plotly itself is inside
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert path.read_bytes() == write_html(figure, tmp_path / "again.html").read_bytes()

    remote = _Loads()
    remote.feed(figure.to_html(include_plotlyjs="cdn"))
    assert any(url.startswith("https://") for url in remote.fetched)  # the control


def test_figure_is_plain_data() -> None:
    assert json.loads(heatmap(resid()).to_json())["data"][0]["type"] == "heatmap"


# The numbers


@given(values=st.lists(st.floats(width=32, allow_infinity=False), min_size=1, max_size=6).filter(lambda v: v == v))
@settings(deadline=None, max_examples=25)
def test_saved_numbers_come_back_bit_for_bit(values: list[float], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("numbers")
    labels = tuple(f'"\ud800<\n{i}" {i}' for i in range(len(values)))
    tensor = torch.tensor([values])
    if tensor.isnan().all():
        return
    figure = heatmap(make(tensor, "layer pos", coords={"pos": labels}, baseline={}, base=""))
    back = read_table(figure.save(folder / "figure.json"))
    np.testing.assert_array_equal(back["value"], tensor.double().numpy().ravel())
    assert tuple(back["pos"]) == labels
    frame = pandas.read_csv(figure.save(folder / "figure.csv"))
    np.testing.assert_array_equal(frame["value"], tensor.double().numpy().ravel())


def test_save_refuses_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = resid().plot()
    for name in ("figure", "figure.gif"):
        with pytest.raises(ValueError, match="path: expected a name that ends in"):
            figure.save(tmp_path / name)
    with pytest.raises(ValueError, match="scale"):
        figure.save(tmp_path / "figure.png", scale=0)
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"figure.png: .*Chrome or Chromium.*BROWSER_PATH"):
        figure.save(tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []
    copy = go.Figure(figure)
    assert not hasattr(copy, "table")
    with pytest.raises(ValueError, match="copy without its numbers"):
        Figure(figure).table()
    for bad in ('{"columns": [], "schema_version": 1}', '{"columns": {"a": {}}, "schema_version": 1}', "{}", "x"):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ValueError, match="expected a figure's numbers"):
            read_table(tmp_path / "bad.json")

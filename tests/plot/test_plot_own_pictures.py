"""Results that know their prompts' pictures: kept through files and selection, drawn below patches, named along positions."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import mechkit as mk
from helpers.pictures.patches import grid, made_up, scene, tiled
from mechkit._thumbnails import MOST, PromptPictures, Thumbnail, limited
from mechkit.plot import heatmap, patches
from mechkit.plot._picture import embedded, enlarged, grey_of
from mechkit.result import Result


def segment(kind: str, start: int, stop: int, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "start": start, "stop": stop, "grid": None, "tile": None, "box": None, "image": 0, **more}


# BOS, two rows of three patches, two words.
PLAIN = (segment("text", 0, 1), segment("image", 1, 7, grid=(2, 3), box=(0.0, 0.0, 30.0, 20.0)), segment("text", 7, 9))
# A whole view, two rows of a tile with an end each, a word.
TILED = (
    segment("image", 0, 2, grid=(1, 2), box=(0.0, 0.0, 40.0, 20.0)),
    segment("image", 2, 5, grid=(1, 3), tile=0, box=(0.0, 0.0, 40.0, 10.0)),
    segment("special", 5, 6),
    segment("image", 6, 9, grid=(1, 3), tile=0, box=(0.0, 10.0, 40.0, 20.0)),
    segment("special", 9, 10),
    segment("text", 10, 11),
)


def thumbnail(width: int = 30, height: int = 20, shade: int = 0) -> Thumbnail:
    pixels = torch.from_numpy(scene(width, height)) // 2 + shade
    return Thumbnail(pixels, (float(width), float(height)))


def pictures(
    n: int, *, differ: bool = False, segments: Any = PLAIN, size: tuple[int, int] = (30, 20)
) -> PromptPictures:
    shades = range(n) if differ else [0] * n
    return PromptPictures((segments,) * n, tuple((thumbnail(*size, shade=shade),) for shade in shades))


def by_patch(n: int | None = 3, **more: Any) -> Result:
    return replace(made_up(grid(2, 3, (30, 20)), 2, n), pictures=pictures(n or 1, **more))


def by_position(n: int = 2, segments: Any = PLAIN, length: int = 9, dims: str = "layer pos", **more: Any) -> Result:
    coords: dict[str, Any] = {"layer": (0, 1), "head": (0, 1, 2), "pos": tuple(f'"<image>" {i}' for i in range(length))}
    names = [*dims.split(), "prompt"]
    coords = {name: coords[name] for name in names[:-1]} | {"prompt": tuple(range(n))}
    values = torch.randn([len(coords[name]) for name in names], generator=torch.Generator().manual_seed(0))
    baseline = {"clean": torch.full((n,), 2.0), "corrupted": torch.zeros(n)}
    kept = pictures(n, segments=segments, **more)
    return Result(values, tuple(names), coords, baseline, "corrupted", "logit_diff", "logits", {}, pictures=kept)


def sources(figure: Any) -> list[str]:
    return [image.source for image in figure.layout.images]


# -- what a result keeps -----------------------------------------------------------------------------------------------


def test_a_file_brings_them_back(tmp_path):
    for result in (by_patch(3, differ=True), by_patch(3).mean("prompt"), by_position(2, TILED, 11, size=(40, 20))):
        found = Result.load(result.save(tmp_path / "result.safetensors"))
        assert found.pictures is not None
        assert result.pictures is not None
        assert found.pictures.segments == result.pictures.segments
        assert found.pictures.differ == result.pictures.differ
        for mine, theirs in zip(found.pictures.thumbnails, result.pictures.thumbnails, strict=True):
            assert all(a.same_as(b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None)
        assert torch.equal(found.values, result.values)
        for other in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
            assert other.pictures is not None
            assert other.pictures.segments == result.pictures.segments
    assert Result.load(made_up(grid(1, 1), 1).save(tmp_path / "text.safetensors")).pictures is None


def test_equal_pictures_are_stored_once(tmp_path):
    sizes = {
        n: by_patch(n, size=(240, 160)).save(tmp_path / f"{n}.safetensors").stat().st_size
        - replace(by_patch(n), pictures=None).save(tmp_path / "none.safetensors").stat().st_size
        for n in (1, 20)
    }
    assert sizes[20] < sizes[1] + 1000
    assert sizes[1] > 240 * 160 * 3


def test_prompts_that_are_chosen_keep_their_own():
    result = by_patch(4, differ=True)
    whole = result.pictures
    assert whole is not None
    for chosen, index in (
        (result.sel(prompt=2), [2]),
        (result.sel(prompt=[3, 1]), [3, 1]),
        (result.sel(layer=0), [0, 1, 2, 3]),
    ):
        assert chosen.pictures is not None
        assert chosen.pictures.thumbnails == tuple(whole.thumbnails[i] for i in index)
    averaged = result.mean("prompt").pictures
    assert averaged is not None
    assert (averaged.differ, averaged.thumbnails, averaged.segments) == (True, ((None,),), (PLAIN,))
    same = by_patch(4).mean("prompt").normalized().pictures
    assert same is not None
    assert not same.differ
    assert same.thumbnails[0][0] is not None
    with pytest.raises(ValueError, match="pictures: expected those of 4 prompts, got those of 3"):
        replace(result, pictures=pictures(3))


def test_no_number_depends_on_them():
    result = by_patch(4, differ=True)
    without = replace(result, pictures=None)
    assert result.mean("prompt").normalized().top(3) == without.mean("prompt").normalized().top(3)
    assert torch.equal(result.ci(n_resamples=20).low.values, without.ci(n_resamples=20).low.values)
    assert result.provenance == without.provenance
    assert repr(result) == repr(without)


def test_no_more_than_some_are_kept():
    many = [(thumbnail(2, 2, shade=i),) for i in range(MOST + 3)] + [(thumbnail(2, 2),)]
    kept = limited(many)
    assert [one[0] is None for one in kept] == [False] * MOST + [True] * 3 + [False]
    assert kept[-1][0] is kept[0][0]


# -- below patches -----------------------------------------------------------------------------------------------------


def test_patches_lie_on_the_results_own_picture():
    figure = by_patch(3).plot()
    assert figure.facts.kind == "patches"
    assert len(figure.layout.images) == 2  # a panel for each layer
    assert "over the clean picture" in " ".join(figure.facts.caption)
    assert "example" not in " ".join(figure.facts.caption)  # all prompts have it
    assert not sources(patches(by_patch(3), False))
    other = patches(by_patch(3), scene(60, 40))
    assert sources(other)
    assert sources(other)[0] != sources(figure)[0]


def test_prompts_with_different_pictures_have_none_and_say_so():
    figure = by_patch(3, differ=True).plot()
    assert not sources(figure)
    assert "no picture: 3 prompts have different ones; choose one with sel(prompt=…)" in " ".join(figure.facts.caption)
    assert sources(by_patch(3, differ=True).sel(prompt=1).plot())


def test_a_picture_whose_edges_a_processor_cut_off():
    """Patches of the middle of a 50 x 20 picture: they lie in the middle."""
    whole = PromptPictures((PLAIN,), ((thumbnail(50, 20),),))
    result = replace(made_up(grid(2, 3, (30, 20), at=(10.0, 0.0)), 1), pictures=whole)
    figure = result.plot()
    assert list(figure.layout.xaxis.range) == [0, 50]
    (image,) = figure.layout.images
    assert (image.sizex, image.sizey) == (50, 20)
    trace = next(one for one in figure.data if one.type == "heatmap")
    assert (min(trace.x), max(trace.x)) == (10, 40)


def test_a_whole_view_and_its_tiles_have_it_below():
    small = Thumbnail(torch.from_numpy(scene(240, 160)), (480.0, 320.0))
    figure = replace(made_up(tiled(), 2), pictures=PromptPictures((PLAIN,), ((small,),))).plot()
    assert len(figure.layout.images) == 4  # two views, two layers
    assert {(image.sizex, image.sizey) for image in figure.layout.images} == {(480, 320)}


def test_small_pictures_are_enlarged_square_by_square():
    small = scene(6, 4)
    large = enlarged(small, 240)
    assert large.shape == (160, 240, 3)
    assert np.array_equal(large[::40, ::40], small)
    assert np.array_equal(enlarged(scene(300, 20), 240), scene(300, 20))


def test_positions_are_drawn_at_their_patches():
    result = by_position(2, dims="pos")
    figure = result.plot()
    assert figure.facts.kind == "patches"
    effects = result.mean("prompt").effect().values
    trace = next(one for one in figure.data if one.type == "heatmap")
    assert np.allclose(np.asarray(trace.z, float).ravel(), effects[1:7].numpy())
    text = " ".join(figure.facts.caption)
    away = float(effects[[0, 7, 8]].abs().max())
    assert f"3 positions outside the picture are not drawn (at most {away:.3g} logits, see heatmap)" in text
    assert patches(by_position(2)).facts.kind == "patches"
    words = replace(result, pictures=None)
    assert words.plot().facts.kind == "tokens"  # the control


def test_a_head_of_each_patch():
    places = made_up(grid(2, 3, (30, 20)), 3)
    heads = replace(places, dims=("head", "patch"), coords={"head": (0, 1, 2), "patch": places.coords["patch"]})
    assert heads.plot().facts.kind == "patches"


# -- along positions ---------------------------------------------------------------------------------------------------


def named(figure: Any) -> list[tuple[str, float]]:
    return sorted(
        ((note.text, note.x) for note in figure.layout.annotations if note.name == "part"), key=lambda one: one[1]
    )


def test_heat_maps_name_text_and_picture():
    figure = by_position(2).plot()
    assert figure.facts.kind == "heatmap"
    assert named(figure) == [("text", 0), ("image", 3.5), ("text", 7.5)]
    assert sorted(shape.x0 for shape in figure.layout.shapes) == [0.5, 6.5]
    assert figure.layout.xaxis.ticktext == ('"&#60;image&#62;" 0', *(f"r{i}c{j}" for i in range(2) for j in range(3)),
                                            '"&#60;image&#62;" 7', '"&#60;image&#62;" 8')  # fmt: skip
    (image,) = figure.layout.images
    assert image.source == embedded(enlarged(thumbnail().pixels.numpy(), 240))
    hover = figure.data[0].hovertext[0][5]
    assert "image: row 1, column 1" in hover
    assert "pixels 10–20 across, 10–20 down" in hover
    assert "row" not in figure.data[0].hovertext[0][0]


def test_tiles_and_the_ends_of_their_rows():
    figure = by_position(2, TILED, 11, size=(40, 20)).plot()
    assert named(figure) == [("whole", 0.5), ("tile 0", 5.5), ("text", 10)]
    assert sorted(shape.x0 for shape in figure.layout.shapes) == [1.5, 9.5]
    assert [figure.layout.xaxis.ticktext[i] for i in (4, 5, 6, 9)] == ["r0c2", "end", "r1c0", "end"]
    assert "tile 0: row 1, column 0" in figure.data[0].hovertext[0][6]
    assert len(figure.layout.images) == 1


def test_pictures_that_differ_leave_the_names():
    figure = by_position(2, differ=True).plot()
    assert [name for name, _ in named(figure)] == ["text", "image", "text"]
    assert not figure.layout.images
    kept = by_position(2).pictures
    assert kept is not None
    others = replace(by_position(2), pictures=PromptPictures((PLAIN, TILED), kept.thumbnails))
    assert not named(others.plot())  # positions of several kinds


def test_panels_are_heads_and_not_positions():
    figure = by_position(2, dims="layer pos head").plot()
    assert len([one for one in figure.data if one.type == "heatmap"]) == 3
    assert len(named(figure)) == 9
    words = replace(by_position(2, dims="layer pos head"), pictures=None)
    assert len([one for one in words.plot().data if one.type == "heatmap"]) == 9  # the control: a panel a position


def test_a_report_and_other_sizes_hold_them(tmp_path):
    page = mk.report(tmp_path / "page.html", by_patch(3), by_position(2), code=False)
    assert page.stat().st_size > 10_000
    for result in (by_patch(3), by_position(2)):
        small = result.plot().resized("column")
        assert sources(small)
    by_patch(3)._repr_html_()  # the first one in a process holds plotly.js, in which anything may be found
    assert "data:image\\u002fpng" in by_patch(3)._repr_html_()
    dark = heatmap(by_position(2), theme="dark")
    assert sources(dark)
    assert grey_of(scene(4, 4)).shape == (4, 4)

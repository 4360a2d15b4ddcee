"""The fingerprint's calls: every technique, with its options, on the material of one family."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from circuit_calls import circuits, edges
from component_calls import (
    ablation,
    activation_patching,
    compared,
    direct,
    estimates,
    heads,
    inputs,
    knockout,
    lenses,
    states,
    weights,
)
from family_material import OF_PICTURES, Call, Material, PictureMaterial
from model_calls import made_tasks, results, running, sweeps
from picture_calls import pictures

TECHNIQUES: tuple[Callable[[Material], Iterator[Call]], ...] = (
    activation_patching,
    ablation,
    knockout,
    estimates,
    compared,
    lenses,
    direct,
    weights,
    heads,
    states,
    inputs,
    edges,
    circuits,
    sweeps,
    results,
    running,
    made_tasks,
)


def calls_of(family: str) -> Iterator[Call]:
    """All calls on one family."""
    if family in OF_PICTURES:
        yield from pictures(PictureMaterial(family))
        return
    material = Material(family)
    for make in TECHNIQUES:
        yield from make(material)

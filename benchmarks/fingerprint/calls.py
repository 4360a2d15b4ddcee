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
from family_material import Call, Material
from model_calls import made_tasks, results, running, sweeps

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

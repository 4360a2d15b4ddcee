"""One good and cheap call of every public function that takes arguments: what tests of wrong calls change one argument of."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mechkit as mk
from helpers import vlm
from helpers.fake_tokenizer import FakeTokenizer
from helpers.families import build_hf
from mechkit.circuits import Constants

FAMILY = "gpt2"


class Words(FakeTokenizer):
    """A token for each word with the space before it, for two digits, and for each sign."""

    def _pieces(self, text: str) -> list[str]:
        return re.findall(r" ?[A-Za-z]+|\d\d|\d| ?[^\w\s]|\s|_", text)


@dataclass
class Material:
    """What the calls are made of, made once."""

    folder: Path

    @cached_property
    def hf(self) -> Any:
        return build_hf(FAMILY, torch.float32)

    @cached_property
    def model(self) -> mk.HookedModel:
        return mk.HookedModel.from_hf(self.hf, name="tiny")

    @cached_property
    def pairs(self) -> mk.PromptPairs:
        clean = torch.tensor([[4, 9, 11, 7, 5], [3, 8, 10, 6, 12]])
        corrupted = clean.clone()
        corrupted[:, 2] = torch.tensor([20, 21])
        return mk.PromptPairs.from_tokens(clean, corrupted, [(5, 9), (14, 15)], positions={"changed": [2, 2]})

    @cached_property
    def seeing(self) -> mk.HookedModel:
        return mk.HookedModel.from_hf(vlm.build_hf("llava", dtype=torch.float32), name="seeing")

    @cached_property
    def seen(self) -> mk.PromptPairs:
        return vlm.make_pairs("llava", self.seeing)

    @cached_property
    def metric(self) -> mk.Metric:
        return mk.logit_diff(self.pairs)

    @cached_property
    def heads(self) -> mk.Result:
        return mk.activation_patching(self.model, self.pairs, self.metric, progress=False)

    @cached_property
    def estimated(self) -> mk.Result:
        return mk.attribution_patching(self.model, self.pairs, self.metric)

    @cached_property
    def scores(self) -> mk.EdgeScores:
        return mk.edge_attribution(self.model, self.pairs, self.metric, steps=1)

    @cached_property
    def graph(self) -> mk.Graph:
        return mk.Graph.of(self.model)

    @cached_property
    def circuit(self) -> mk.Circuit:
        return mk.Circuit.from_scores(self.scores, n_edges=40)

    @cached_property
    def patterns(self) -> mk.Result:
        return mk.attention_patterns(self.model, self.pairs, layers=[0], heads=[0], progress=False)

    @cached_property
    def lens(self) -> mk.TunedLens:
        d = self.model.d_model
        n = self.model.n_layers - 1
        about = {"weights_hash": self.model.weights_hash, "model": "tiny"}
        return mk.TunedLens(torch.zeros(n, d, d), torch.zeros(n, d), tuple(range(n)), n + 1, about)

    @cached_property
    def cache(self) -> mk.ActivationCache:
        return self.model.run_with_cache(self.pairs.clean.tokens[0][None])[1]

    @cached_property
    def states(self) -> mk.Result:
        prompts = mk.Prompts(self.pairs.clean.tokens + self.pairs.corrupted.tokens)
        return mk.hidden_states(self.model, prompts, layers=[0, 1], progress=False)

    @cached_property
    def by_token(self) -> mk.Result:
        return mk.token_integrated_gradients(self.model, self.pairs, self.metric, steps=1)

    @cached_property
    def of_patches(self) -> mk.Result:
        places = [{"image": 0, "tile": None, "row": i // 2, "column": i % 2, "box": None} for i in range(4)]
        coords = {"layer": (0, 1), "patch": ("r0c0", "r0c1", "r1c0", "r1c1")}
        return mk.Result(
            torch.ones(2, 4), ("layer", "patch"), coords, {}, "", "logit_diff", "logits", {"patches": places}
        )

    @cached_property
    def top(self) -> mk.TopTokens:
        return mk.top_tokens(self.model, self.pairs, 2, layers=[0], progress=False)


def keep(activation: Tensor, hook: Any) -> None:
    """A hook that changes nothing."""


Calls = dict[str, tuple[Callable[..., Any], dict[str, Any]]]


def valid_calls(m: Material) -> Calls:
    """Name -> the function and good arguments, of every kind that a signature has."""
    return {**_techniques(m), **_circuits(m), **_data(m), **_models(m), **_plots(m), **_studies(m)}


def _techniques(m: Material) -> Calls:
    of = {"model": m.model, "pairs": m.pairs, "metric": m.metric}
    on = {"model": m.model, "prompts": m.pairs, "metric": m.metric}
    look = {"model": m.model, "prompts": m.pairs}
    where = {"site": "z", "over": "layer head", "layers": [1], "heads": [0], "positions": None, "neurons": None}
    how = {"budget": 2**24, "progress": False}
    return {
        "activation_patching": (
            mk.activation_patching,
            {**of, **where, **how, "direction": "denoise", "replay": True, "source_cache": None},
        ),
        "image_patching": (
            mk.image_patching,
            {"model": m.seeing, "pairs": m.seen, "metric": mk.logit_diff(m.seen), **how, "site": "resid_pre",
             "over": "layer patch", "group": 2, "direction": "denoise", "layers": [0], "heads": None, "replay": True},
        ),
        "attention_knockout": (
            mk.attention_knockout,
            {**of, **how, "from_": "changed", "to": "END", "window": 2, "layers": [1], "heads": [0], "replay": True},
        ),
        "pixel_attribution": (
            mk.pixel_attribution,
            {"model": m.seeing, "prompts": m.seen, "metric": mk.logit_diff(m.seen), "method": "gradient", "baseline": "zero",
             "steps": 2, **how},
        ),
        "Prompts.from_inputs": (
            mk.Prompts.from_inputs,
            {"model": m.seeing, "tokens": list(m.seen.clean.tokens), "inputs": list(m.seen.clean.inputs or ()),
             "segments": None},
        ),
        "Segment": (
            mk.Segment,
            {"kind": "image", "start": 1, "stop": 5, "grid": (2, 2), "tile": None, "box": (0.0, 0.0, 8.0, 8.0), "image": 0},
        ),
        "ablation": (
            mk.ablation,
            {**on, **where, **how, "mode": "mean", "reference": m.pairs, "seed": 0, "replay": True},
        ),
        "attribution_patching": (mk.attribution_patching, {**of, **where, **how, "direction": "noise"}),
        "atp_star": (
            mk.atp_star,
            {**of, **where, **how, "qk_fix": True, "grad_drop": True, "direction": "denoise"},
        ),
        "integrated_gradients": (
            mk.integrated_gradients,
            {**of, **where, **how, "steps": 1, "rule": "midpoint", "path": "activation", "direction": "denoise"},
        ),
        "relp": (mk.relp, {**of, **where, **how, "attention": "frozen", "direction": "denoise"}),
        "attention_patterns": (
            mk.attention_patterns,
            {**look, **how, "layers": [0], "heads": [1], "scores": False},
        ),
        "attention_flow": (
            mk.attention_flow,
            {**look, **how, "position": "END", "over": "pos", "residual": 0.5, "head_fusion": "mean"},
        ),
        "attention_rollout": (
            mk.attention_rollout,
            {**look, **how, "position": "END", "over": "pos", "residual": 0.5, "head_fusion": "mean"},
        ),
        "attention_relevance": (mk.attention_relevance, {**on, **how, "position": None, "over": "pos"}),
        "compare": (mk.compare, {"approx": m.estimated, "exact": m.heads, "k": 3}),
        "verify": (mk.verify, {"approx": m.estimated, **of, **how, "top": 2}),
        "composition_scores": (mk.composition_scores, {"model": m.model, "kind": "K", "progress": False}),
        "direct_logit_attribution": (
            mk.direct_logit_attribution,
            {**on, **how, "over": "layer head", "layers": [0], "heads": [1]},
        ),
        "dla_erasure_check": (mk.dla_erasure_check, {**on, **how, "head": (0, 1), "mode": "zero"}),
        "gradient_x_input": (mk.gradient_x_input, {**on, **how}),
        "head_scores": (
            mk.head_scores,
            {
                "model": m.model,
                "kind": "induction",
                "sign": 1,
                "n": 1,
                "length": 5,
                "seed": 0,
                "layers": [0],
                "heads": [0],
                **how,
            },
        ),
        "hidden_states": (
            mk.hidden_states,
            {**look, **how, "site": "resid_post", "layers": [0], "position": -1},
        ),
        "logit_lens": (
            mk.logit_lens,
            {**look, **how, "tokens": [4, 5], "value": "logit", "site": "resid_post", "over": "layer pos", "layers": [0],
             "positions": [1], "lens": m.lens},
        ),
        "top_tokens": (
            mk.top_tokens,
            {**look, **how, "k": 2, "site": "resid_post", "over": "layer pos", "layers": [0], "positions": [1]},
        ),
        "neuron_attribution": (
            mk.neuron_attribution,
            {**on, "site": "mlp_post", "over": "layer neuron", "path": "activation", "baseline": "zero", "steps": 1,
             "rule": "midpoint", "layers": [0], "neurons": [1], **how},
        ),
        "token_integrated_gradients": (
            mk.token_integrated_gradients,
            {**on, **how, "baseline": "zero", "steps": 1, "rule": "midpoint"},
        ),
        "ov_circuit": (
            mk.ov_circuit,
            {"model": m.model, "layer": 0, "head": 1, "source_tokens": [3, 4], "output_tokens": [5]},
        ),
        "qk_circuit": (
            mk.qk_circuit,
            {"model": m.model, "layer": 0, "head": 1, "dest_tokens": [3, 4], "source_tokens": [5]},
        ),
        "ov_svd": (mk.ov_svd, {"model": m.model, "layer": 0, "head": 1, "k": 2, "top": 2}),
        "patchscope": (
            mk.patchscope,
            {**look, **how, "target": [3, 4, 5], "positions": -1, "target_position": -1, "site": "resid_post",
             "layers": [0], "target_layer": 1, "k": 2, "max_new_tokens": 0},
        ),
        "TunedLens.fit": (
            mk.TunedLens.fit,
            {**look, **how, "validation": 0.5, "layers": [0], "steps": 0, "batch": 4, "lr": 1e-4, "vocabulary": 8,
             "skip_first": 0, "seed": 0},
        ),
        "TunedLens.translate": (m.lens.translate, {"layer": 0, "resid": torch.zeros(1, m.model.d_model)}),
        "TunedLens.check": (m.lens.check, {"model": m.model, "layers": [0]}),
        "sweep": (
            mk.sweep,
            {"model": m.model, "base": m.pairs.corrupted, "cells": [(mk.Edit("z", 1),)], "metric": m.metric,
             "source": m.pairs.clean, "base_is": "corrupted", "source_is": "clean", **how, "replay": True},
        ),
    }  # fmt: skip


def _circuits(m: Material) -> Calls:
    of = {"model": m.model, "pairs": m.pairs, "metric": m.metric}
    how = {"budget": 2**24, "progress": False}
    return {
        "edge_attribution": (
            mk.edge_attribution,
            {**of, "steps": 1, "rule": "midpoint", "path": "input", "direction": "denoise", "gradient": "exact",
             "positions": ["END"], "per_prompt": True, **how},
        ),
        "edge_patching": (
            mk.edge_patching,
            {**of, **how, "edges": ["m0->logits"], "direction": "denoise", "positions": ["END"], "per_prompt": True},
        ),
        "path_patching": (
            mk.path_patching,
            {**of, **how, "senders": ["m0"], "receivers": ["logits"], "freeze": "all", "direction": "denoise",
             "positions": ["END"]},
        ),
        "acdc": (
            mk.acdc,
            {**of, **how, "threshold": 1e9, "start": m.circuit, "ablation": "resample", "prune": True},
        ),
        "find_circuit": (
            mk.find_circuit,
            {**of, **how, "n_edges": 20, "candidates": 30, "steps": 1, "by": "abs", "threshold": None,
             "ablation": "resample", "held_out": 0.5, "seed": 0, "random": 0},
        ),
        "evaluate_circuit": (
            mk.evaluate_circuit,
            {"circuit": m.circuit, **of, **how, "ablation": "zero", "random": 1, "sets": 1, "minimality": None, "seed": 0},
        ),
        "faithfulness_curve": (
            mk.faithfulness_curve,
            {"scores": m.scores, **of, **how, "fractions": (0.05, 1.0), "method": "top", "by": "abs",
             "ablation": "zero", "random": 0, "held_out": 0.5, "seed": 0},
        ),
        "learn_mask": (
            mk.learn_mask,
            {**of, **how, "over": "node", "objective": "kl", "penalty": 1e-3, "target": None, "ablation": "zero", "steps": 1,
             "batch": 2, "lr": 0.3, "temperature": 0.6, "held_out": 0.5, "seed": 0},
        ),
        "optimal_ablation": (
            mk.optimal_ablation,
            {**of, **how, "circuit": m.circuit, "objective": "kl", "steps": 1, "batch": 2, "lr": 0.1, "seed": 0},
        ),
        "roc": (mk.circuits.roc, {"scores": m.scores, "circuit": m.circuit, "over": "edge", "by": "abs"}),
        "cpr": (mk.circuits.cpr, {"fractions": [0.1, 1.0], "faithfulness": [0.5, 1.0]}),
        "cmd": (mk.circuits.cmd, {"fractions": [0.1, 1.0], "faithfulness": [0.5, 1.0]}),
        "Circuit.from_scores": (
            mk.Circuit.from_scores,
            {"scores": m.scores, "n_edges": 5, "method": "top", "by": "abs", "prune": True},
        ),
        "Circuit.from_edges": (mk.Circuit.from_edges, {"model": m.model, "edges": ["m0->logits"], "task": "t"}),
        "Circuit.empty": (mk.Circuit.empty, {"model": m.model, "task": "t"}),
        "Circuit.full": (mk.Circuit.full, {"model": m.graph, "task": "t"}),
        "Circuit.random": (mk.Circuit.random, {"model": m.graph, "n_edges": 9, "seed": 0, "connected": True}),
        "Circuit.check": (m.circuit.check, {"model": m.model}),
        "Circuit.to_json": (m.circuit.to_json, {"path": m.folder / "circuit.json", "format": "mechkit", "d_model": 32}),
        "Circuit": (mk.Circuit, {"graph": m.graph, "members": m.circuit.members, "scores": None, "model": "a", "task": "b"}),
        "EdgeScores.top": (m.scores.top, {"k": 3, "by": "abs"}),
        "EdgeScores.score": (m.scores.score, {"edge": "m0->logits"}),
        "EdgeScores.ci": (m.scores.ci, {"level": 0.9, "n_resamples": 10, "seed": 0, "method": "percentile"}),
        "EdgeScores.correlation": (m.scores.correlation, {"other": m.scores, "method": "pearson"}),
        "EdgeScores.to_dataframe": (m.scores.to_dataframe, {"per_prompt": False}),
        "EdgeScores.save": (m.scores.save, {"path": m.folder / "scores.safetensors"}),
        "Graph": (mk.Graph, {"n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "parallel": False, "mlps": True}),
        "Graph.of": (mk.Graph.of, {"model": m.model}),
        "Graph.edge": (m.graph.edge, {"name": "m0->logits"}),
        "Graph.writer": (m.graph.writer, {"name": "m0"}),
        "Graph.reader": (m.graph.reader, {"name": "logits"}),
        "Constants": (Constants, {"values": torch.zeros(len(m.graph.writers), 32), "graph": m.graph, "name": "c"}),
    }  # fmt: skip


def _data(m: Material) -> Calls:
    words = Words()
    texts = {"clean": [" a b c"], "corrupted": [" a d c"], "answers": [(" e", " f")]}
    ids = {"clean": [[1, 2, 3]], "corrupted": [[1, 4, 3]], "answers": [(5, 6)]}
    values = m.heads
    return {
        "Prompts": (mk.Prompts, {"tokens": (torch.tensor([1, 2]),), "str_tokens": None}),
        "Prompts.from_tokens": (mk.Prompts.from_tokens, {"tokens": [[1, 2], [3]], "model": m.model}),
        "Prompts.from_text": (mk.Prompts.from_text, {"model": words, "text": ["a b"], "prepend_bos": True}),
        "PromptPairs": (
            mk.PromptPairs,
            {"clean": m.pairs.clean, "corrupted": m.pairs.corrupted, "right": ((5,), (6,)), "wrong": ((7,), (8,)),
             "positions": {"S": torch.tensor([1, 2])}, "task": "t"},
        ),
        "PromptPairs.from_text": (
            mk.PromptPairs.from_text,
            {"model": words, **texts, "positions": {"S": [1]}, "prepend_bos": False, "task": "t"},
        ),
        "PromptPairs.teacher_forced": (
            mk.PromptPairs.teacher_forced,
            {"model": words, "clean": [" a b c"], "corrupted": [" a d c"], "continuations": [" e f"], "positions": {"S": [1]},
             "prepend_bos": False, "task": "t"},
        ),
        "PromptPairs.from_tokens": (
            mk.PromptPairs.from_tokens,
            {**ids, "model": m.model, "positions": {"S": [1]}, "task": "t"},
        ),
        **{
            name: (getattr(mk, name), {"pairs": m.pairs, "position": "END"})
            for name in ("log_prob", "prob_diff", "accuracy")
        },
        "logit_diff": (mk.logit_diff, {"pairs": m.pairs, "position": "END", "pool": "mean"}),
        "loss": (mk.loss, {"prompts": m.pairs, "positions": [0, 1]}),
        "in_context_score": (mk.in_context_score, {"prompts": m.pairs, "early": 0, "late": [1, 2]}),
        "answer_log_prob": (
            mk.answer_log_prob,
            {"pairs": mk.PromptPairs.teacher_forced(words, [" a b c"], [" a d c"], [" e f"]), "reduce": "sum"},
        ),
        "metric_factory": (mk.metric_factory, {"make": lambda pairs: mk.logit_diff(pairs)}),
        "kl_divergence": (mk.kl_divergence, {"pairs": m.pairs, "reference": "clean", "position": "END"}),
        "Result": (
            mk.Result,
            {"values": torch.zeros(2), "dims": ("layer",), "coords": {"layer": (0, 1)}, "baseline": {}, "base": "",
             "metric": "m", "unit": "u", "provenance": {}, "cost": None},
        ),
        "Cost": (mk.Cost, {"block_tokens": 1, "naive_block_tokens": 2}),
        "Result.mean": (values.mean, {"dim": "prompt"}),
        "Result.top": (values.mean().top, {"k": 2, "by": "abs"}),
        "Result.sel": (values.sel, {"layer": [0, 1]}),
        "Result.ci": (
            values.ci,
            {"level": 0.9, "n_resamples": 10, "seed": 0, "method": "percentile", "normalized": False},
        ),
        "Result.p_values": (values.p_values, {"n_resamples": 10, "seed": 0, "fdr": True}),
        "Result.numpy": (values.numpy, {"dims": " ".join(reversed(values.dims))}),
        "Result.save": (values.save, {"path": m.folder / "result.safetensors"}),
        "tasks.ioi": (
            mk.tasks.ioi,
            {"model": words, "n": 2, "seed": 0, "corruption": "name", "prepend_bos": True},
        ),
        "tasks.docstring": (
            mk.tasks.docstring,
            {"model": words, "n": 2, "seed": 0, "corruption": "random_doc", "prepend_bos": True},
        ),
        "tasks.greater_than": (mk.tasks.greater_than, {"model": words, "n": 2, "seed": 0, "prepend_bos": True}),
        "tasks.induction": (mk.tasks.induction, {"model": m.model, "n": 1, "length": 4, "seed": 0}),
        "tasks.repeated_tokens": (
            mk.tasks.repeated_tokens,
            {"model": m.model, "n": 1, "length": 4, "times": 2, "seed": 0},
        ),
        "zoo.linear": (mk.zoo.linear, {"seed": 0, "n": 1}),
        "zoo.cancellation": (mk.zoo.cancellation, {"n": 1, "size": 2.0, "steepness": 10.0, "seed": 0}),
        "zoo.writer_and_eraser": (mk.zoo.writer_and_eraser, {"n": 1, "size": 4.0, "bystander": 1.0, "seed": 0}),
        "zoo.saturated_attention": (mk.zoo.saturated_attention, {"node": "query", "n": 1, "seed": 0}),
        "zoo.induction": (mk.zoo.induction, {"n": 1, "n_tokens": 20, "seed": 0}),
        "zoo.greater_than": (mk.zoo.greater_than, {"n": 1, "steepness": 8.0, "seed": 0}),
        "zoo.serial_ioi": (mk.zoo.serial_ioi, {"n": 1, "seed": 0}),
        "zoo.copied_patch": (mk.zoo.copied_patch, {"n": 1, "place": (2, 0), "seed": 0}),
    }  # fmt: skip


def _models(m: Material) -> Calls:
    tokens = m.pairs.clean.tokens[0][None]
    return {
        "HookedModel.from_hf": (
            mk.HookedModel.from_hf,
            {"hf_model": build_hf(FAMILY, torch.float32), "name": "again", "revision": None},
        ),
        "HookedModel.from_bridge": (mk.HookedModel.from_bridge, {"bridge": m.model.bridge}),
        "HookedModel.forward": (m.model.forward, {"input": tokens, "return_type": "both", "loss_per_token": False}),
        "HookedModel.hook_names": (m.model.hook_names, {"names": ("z", 0)}),
        "HookedModel.has_site": (m.model.has_site, {"site": "z"}),
        "HookedModel.n_heads_at": (m.model.n_heads_at, {"site": "z"}),
        "HookedModel.width_of": (m.model.width_of, {"site": "z"}),
        "HookedModel.hooks": (m.model.hooks, {"fwd_hooks": [("z", keep)], "bwd_hooks": []}),
        "HookedModel.run_with_hooks": (m.model.run_with_hooks, {"input": tokens, "fwd_hooks": [("z", keep)]}),
        "HookedModel.run_with_cache": (
            m.model.run_with_cache,
            {"input": tokens, "names": "z", "positions": [1], "device": "cpu", "dtype": torch.float32},
        ),
        "HookedModel.to": (m.model.to, {"device": "cpu"}),
        "HookedModel.generate": (m.model.generate, {"input": tokens, "max_new_tokens": 1, "do_sample": False}),
        "ActivationCache.stack": (m.cache.stack, {"name": "z"}),
        "ActivationCache.to": (m.cache.to, {"device": "cpu", "dtype": torch.float32}),
    }


def _plots(m: Material) -> Calls:
    mean, plot = m.heads.mean(), mk.plot
    look = {"title": "t", "theme": "light", "width": 600.0, "font_size": 8.0, "annotations": {(0.0, 0.0): "here"}}
    return {
        "plot.heatmap": (
            plot.heatmap,
            {"result": mean, "center": 0.0, "zmax": 1.0, "height": 300, "size": "page", "caption": False, **look},
        ),
        "plot.bars": (
            plot.bars,
            {"result": mean, "k": 3, "level": 0.9, "height": 300, "size": "page", "caption": False, **look},
        ),
        "plot.compare": (plot.compare, {"approx": m.estimated, "exact": m.heads, **look}),
        "plot.circuit": (plot.circuit, {"circuit": m.circuit, "min_score": 0.0, "max_edges": 20, **look}),
        "plot.attention": (
            plot.attention,
            {
                "result": m.patterns,
                "layer": 0,
                "head": 0,
                "prompt": 0,
                "height": 300,
                "size": "page",
                "caption": False,
                **look,
            },
        ),
        "plot.heads": (plot.heads, {"x": m.heads, "y": m.estimated, "label": 3, "level": 0.9, **look}),
        "plot.hidden": (
            plot.hidden,
            {"states": m.states, "labels": ["a", "b", "a", "b"], "method": "pca", "seed": 0, **look},
        ),
        "plot.lens": (
            plot.lens,
            {"found": m.top, "prompt": 0, "height": 300, "size": "page", "caption": False, **look},
        ),
        "plot.patches": (
            plot.patches,
            {
                "result": m.of_patches,
                "layers": [0],
                "smooth": True,
                "opacity": 0.5,
                "grey": True,
                "beside": False,
                **look,
            },
        ),
        "plot.tokens": (plot.tokens, {"values": m.by_token, "prompt": 0, "center": 0.0, "zmax": 1.0, **look}),
        "plot.curve": (
            plot.curve,
            {"n_edges": [1, 2], "faithfulness": [0.1, 0.9], "unit": "u", "size": "edges", "caption": ["c"], **look},
        ),
        "plot.default": (plot.default, {"thing": mean, "title": "t"}),
        "report": (
            partial(mk.report, m.folder / "report.html", mean),
            {"title": "t", "prompts": m.pairs, "code": False, "theme": "light"},
        ),
    }


def _studies(m: Material) -> Calls:
    study = {"models": ["tiny"], "tasks": ["ioi"], "techniques": ["activation_patching"]}
    return {
        "Study": (
            mk.Study,
            {**study, "store": m.folder / "store", "name": "s", "budget": "1 MiB", "shard": 100, "retries": 1},
        ),
    }

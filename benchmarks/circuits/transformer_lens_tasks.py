"""What `other_libraries.py` times in TransformerLens 4.3, and the files that it writes for `peers/`."""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Callable
from typing import Any

import torch
from mechkit_tasks import Figures, Values, Work, by_pair, even, mha_circuit, random_model
from safetensors.torch import save_file
from shared import make_pairs


def with_transformer_lens(args: argparse.Namespace) -> dict[str, Work]:
    from transformer_lens.tools import analysis

    import mechkit as mk

    pairs = make_pairs(mk, mk.HookedModel.from_pretrained(args.model, device=args.device), "plain", args.pairs)
    model, pairs = random_model(args, pairs)
    bridge, n = model.bridge, len(pairs)
    clean, corrupted = (torch.stack(side.tokens).to(args.device) for side in (pairs.clean, pairs.corrupted))
    right, wrong = (torch.tensor([ids[0] for ids in side], device=args.device) for side in (pairs.right, pairs.wrong))
    each = torch.arange(n, device=args.device)
    config = analysis.EdgeAttributionConfig(granularity="edge")

    def metric_of(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda logits: logits[0, -1, right[i]] - logits[0, -1, wrong[i]]

    def mean_metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[each, -1, right] - logits[each, -1, wrong]).mean()

    def eap() -> list[dict[Any, float]]:
        one = [(clean[i][None], corrupted[i][None], metric_of(i)) for i in range(n)]
        return [analysis.attribution_patch(bridge, *arguments, config).edge_scores for arguments in one]

    def of_edges(found: list[dict[Any, float]]) -> tuple[Figures, Values]:
        values: dict[str, float] = collections.defaultdict(float)
        for one in found:
            for (writer, reader), score in one.items():  # at one position each
                values[f"{name_of(writer)}->{name_of(reader)}"] += score / n
        return {"edges": len(values)}, dict(values)

    @torch.no_grad()
    def path() -> torch.Tensor:
        caches = [bridge.run_with_cache(side)[1] for side in (clean, corrupted)]
        return analysis.get_act_patch_direct_path(bridge, corrupted, *caches, mean_metric, 0, 0, "q", verbose=False)

    @torch.no_grad()
    def of_path(metrics: torch.Tensor) -> tuple[Figures, Values]:
        effects = (metrics - mean_metric(bridge(corrupted))).tolist()
        heads = [(layer, head) for layer in range(1, model.n_layers) for head in range(model.n_heads)]
        values = {f"a0.h0->a{layer}.h{head}<q>": effects[layer][head] for layer, head in heads}
        return {"edges": len(values)}, values

    circuit = mha_circuit(mk, model, pairs, args.candidates)
    kept = [nodes(analysis.Node, model.n_layers, edge, pos) for edge in circuit for pos in range(clean.shape[1])]

    def faithfulness() -> list[Any]:
        one = [(clean[i][None], corrupted[i][None], metric_of(i)) for i in range(n)]
        return [analysis.faithfulness(bridge, *arguments, kept) for arguments in one]

    def of_faithfulness(found: list[Any]) -> tuple[Figures, Values]:
        ends = [(one.corrupt_metric, one.full_metric, one.recovered) for one in found]
        return {"edges": circuit.n_edges}, by_pair([low + share * (high - low) for low, high, share in ends])

    return {"MHA-EAP": (eap, of_edges), "MHA-path": (path, of_path), "MHA-circuit": (faithfulness, of_faithfulness)}


def name_of(node: Any) -> str:
    """mechkit's name of TransformerLens's node."""
    if node.kind == "attn_head_out":
        return f"a{node.layer}.h{node.head}"
    if node.kind in ("q_input", "k_input", "v_input"):
        return f"a{node.layer}.h{node.head}<{node.kind[0]}>"
    return {"embed": "input", "logits": "logits"}.get(node.kind, f"m{node.layer}")


def nodes(node: Any, n_layers: int, edge: Any, pos: int) -> tuple[Any, Any]:
    """An edge's ends at a position, as TransformerLens's nodes; the logits are those of the last layer there."""
    w, r = edge.writer, edge.reader
    kind = {"mlp": "mlp_in", "logits": "logits"}.get(r.kind, f"{r.kind}_input")
    reader = node(kind, pos, min(r.layer, n_layers - 1), r.head)
    if w.layer < 0:
        return node("embed", pos), reader
    return node("mlp_out" if w.head is None else "attn_head_out", pos, w.layer, w.head), reader


def export(args: argparse.Namespace) -> None:
    """Writes the model, the pairs and what to run for `peers/`."""
    import mechkit as mk
    from mechkit.hooks.loading.pretrained import load_hf

    plain, tokenizer = load_hf(args.model, dtype=torch.float32, revision=None, trust_remote_code=False)
    config = plain.config
    if config.model_type != "llama" or config.rope_parameters.get("rope_type", "default") != "default":
        raise SystemExit(f"the other packages run only on Llama-shaped models here, got {config.model_type}")
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    keys += ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    kept = {key: getattr(config, key) for key in keys} | {"rope_theta": config.rope_parameters["rope_theta"]}
    (args.into / "config.json").write_text(json.dumps(kept))
    state = {name: value.contiguous() for name, value in plain.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(state, args.into / "model.safetensors")
    model = mk.HookedModel.from_hf(plain, tokenizer, name=args.model)
    pairs, graph = make_pairs(mk, model, "plain", args.pairs), mk.Graph.of(model)
    right, wrong = ([ids[0] for ids in side] for side in (pairs.right, pairs.wrong))
    edges = even(even(list(graph.edges), args.edges), args.peer_edges)
    run: dict[str, Any] = {
        "device": args.device,
        "threads": args.threads,
        "repeats": args.peer_repeats,
        "steps": args.steps,
        "tasks": args.tasks,
        "exact": {edge.name: by_query_head(graph, edge) for edge in edges},
        "answers": list(zip(right, wrong, strict=True)),
        "metric": {},
    }
    for side in ("clean", "corrupted"):
        tokens = torch.stack(getattr(pairs, side).tokens)
        with torch.no_grad():
            last = model(tokens)[:, -1]
        run[side] = tokens.tolist()
        run["metric"][side] = [float(row[r] - row[w]) for row, r, w in zip(last, right, wrong, strict=True)]
    (args.into / "run.json").write_text(json.dumps(run))


def by_query_head(graph: Any, edge: Any) -> list[str]:
    """The edge's names in a graph where each query head has its own key and value."""
    if edge.reader.kind not in ("k", "v"):
        return [edge.name]
    return [f"{edge.writer.name}->{head.name}<{edge.reader.kind}>" for head in graph.writers_of(edge.reader)]

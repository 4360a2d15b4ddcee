"""Edges and circuits in mechkit and in other libraries: seconds, memory, work, and whether they find the same numbers.

    python benchmarks/circuits.py [--model smollm2-135m] [--device cpu] [--threads 2] [--json out.json]
        [--eap-ig-python /path/to/python] [--auto-circuit-python /path/to/python]
    python benchmarks/circuits.py --exact-all exact.safetensors     # the exact effect of every edge; goes on where it was stopped
    python benchmarks/circuits.py --agreement --exact exact.safetensors …     # how good the estimates are: circuits_agreement.py

One process a library, one after the other, on equally many threads; the same model, pairs and metric (logit difference, right minus
wrong).

| task | what | compared with |
| --- | --- | --- |
| `EAP` | edge attribution patching of all edges, at the clean run | EAP-IG package; auto-circuit's mask gradients |
| `EAP-IG` | `--steps` points, from the corrupted run on, as the EAP-IG package places them | EAP-IG package |
| `clean-corrupted` | the mean of the gradients at both ends | EAP-IG package |
| `exact` | exact effects of an even sample of `--edges` edges | EAP-IG package, of `--peer-edges` of them |
| `ACDC` | on the `--candidates` best edges of EAP-IG | one run an edge (counted) |
| `ACDC-4-layers` | on all edges of a random model of GPT-2's width, 4 layers deep | one run an edge (counted) |
| `curve` | faithfulness of circuits of 10 sizes on 64 pairs; EAP's scores are not in the time | (runs are counted) |
| `MHA-EAP` | all edges of a random model of GPT-2 small's shape, at the corrupted run | TransformerLens's `attribution_patch` |
| `MHA-path` | exact effects of head 0.0's edges to every later query | TransformerLens's `get_act_patch_direct_path` |
| `MHA-circuit` | the metric of the circuit of the `--candidates` best edges | TransformerLens's `faithfulness` |

The other packages want TransformerLens 2, which cannot be where mechkit is: each is named by a Python that has it, and
`benchmarks/peers/` runs there. They split keys and values by query head (123,211 edges of SmolLM2 rather than 70,651): their scores
are summed over the heads that share one. TransformerLens 4.3 has no edges on models whose heads share keys and values, no integrated
gradients, and no exact sweep over all edges; its `attribution_patch` and `faithfulness` take one pair a call and score each position by
itself (summed here), and `faithfulness` runs again for each class of edges.

Seconds are the best of `--repeats` runs (`--peer-repeats` for the others); `cpu_seconds` (in the JSON) are the process's own, of all
threads, for a machine that is shared. Seconds of `exact` are also scaled to all edges. Memory is the most that the process held beyond
what it held before. A block-token is one block run on one token; one of a circuit's costs up to twice a plain one.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import circuits_agreement
import torch
from attribution import make_pairs
from attribution_memory import held, most_held
from patching import clock, machine, sample
from safetensors.torch import save_file

PEERS = {"eap_ig": "eap_ig.py", "auto_circuit": "auto_circuit_masks.py"}  # in other Pythons
LIBRARIES = ("mechkit", *PEERS, "transformer_lens")
TASKS = ("EAP", "EAP-IG", "clean-corrupted", "exact", "ACDC", "ACDC-4-layers", "curve", "MHA-EAP", "MHA-path", "MHA-circuit")
Values = dict[str, float]  # by name of an edge or a pair
Work = Callable[[], tuple[dict[str, Any], Values]]  # figures and values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every library")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--eap-ig-python", metavar="PATH", help="a Python with eap and transformer-lens 2.x")
    parser.add_argument("--auto-circuit-python", metavar="PATH", help="a Python with auto-circuit and transformer-lens 2.x")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--curve-pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="of EAP-IG")
    parser.add_argument("--edges", type=int, default=1000, help="in the sample of exact effects")
    parser.add_argument("--peer-edges", type=int, default=20, help="exact effects that the EAP-IG package computes")
    parser.add_argument("--candidates", type=int, default=500, help="edges that ACDC begins with, and of the MHA circuit")
    parser.add_argument("--threshold", type=float, default=0.003, help="of ACDC, nats of KL divergence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, default=2)
    parser.add_argument("--exact-all", type=Path, metavar="FILE", help="compute every edge's exact effect, and nothing else")
    parser.add_argument("--direction", choices=("denoise", "noise"), default="denoise", help="of --exact-all")
    parser.add_argument("--agreement", action="store_true", help="hold estimates against exact effects, and nothing else")
    parser.add_argument("--exact", type=Path, nargs="+", metavar="FILE", help="what --exact-all or EdgeScores.save wrote")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", choices=("mechkit", "transformer_lens", "export"), help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.agreement and not args.exact:
        parser.error("--agreement needs --exact FILE: exact effects, such as --exact-all writes")
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    torch.set_num_threads(args.threads)
    if args.worker:
        {"mechkit": work, "transformer_lens": work, "export": export}[args.worker](args)
        return
    report: dict[str, Any] = {"machine": machine(args.device), "device": args.device, "threads": args.threads}
    report |= {"model": args.model, "pairs": args.pairs}
    if args.exact_all:
        report["exact_all"] = circuits_agreement.exact_all(args)
    if args.agreement:
        report["agreement"] = circuits_agreement.agreement(args)
    if not (args.exact_all or args.agreement):
        found = {library: run_library(library, args) for library in args.libraries}
        report |= {"steps": args.steps, "libraries": {name: one[0] for name, one in found.items()}}
        compare(report, {name: one[1] for name, one in found.items()})
        print_table(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def run_library(library: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Values]]:
    """Its figures, and the values that it found, by task."""
    python = {"eap_ig": args.eap_ig_python, "auto_circuit": args.auto_circuit_python}.get(library, sys.executable)
    if python is None:
        return {"error": f"give --{library.replace('_', '-')}-python, a Python that has it"}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        this = [sys.executable, __file__, *sys.argv[1:], "--into", name, "--worker"]
        peer = [python, str(Path(__file__).parent / "peers" / PEERS[library]), name] if library in PEERS else []
        for command in ([*this, "export"], peer) if peer else ([*this, library],):
            done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}, {}
        figures, values = (json.loads((folder / f"{file}.json").read_text()) for file in ("figures", "values"))
        return figures, values


# -- one library, in a process of its own ------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    library = args.worker
    version = importlib.metadata.version(library.replace("_", "-"))
    tasks: dict[str, Work] = (with_mechkit if library == "mechkit" else with_transformer_lens)(args)
    repeats = args.repeats if library == "mechkit" else args.peer_repeats
    figures: dict[str, Any] = {}
    values: dict[str, Values] = {}
    for task in (task for task in TASKS if task in args.tasks and task in tasks):
        try:
            figures[task], values[task] = measure(args.device, tasks[task], repeats)
        except Exception as error:  # one task that fails is no reason to lose the others
            figures[task] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    found = {"version": version, "threads": torch.get_num_threads(), "tasks": figures}
    (args.into / "figures.json").write_text(json.dumps(found))
    (args.into / "values.json").write_text(json.dumps(values))


def measure(device: str, run: Work, repeats: int) -> tuple[dict[str, Any], Values]:
    begin, seconds, cpu_seconds = held(device), [], []
    for _ in range(repeats):
        cpu = time.process_time()
        took, (found, values) = clock(device, run)
        seconds.append(took)
        cpu_seconds.append(time.process_time() - cpu)
    figures = {"seconds": min(seconds), "all_seconds": seconds, "cpu_seconds": min(cpu_seconds)}
    return figures | {"peak_memory_gb": (most_held(device) - begin) / 1e9} | found, values


def with_mechkit(args: argparse.Namespace) -> dict[str, Work]:
    import mechkit as mk

    model = mk.HookedModel.from_pretrained(args.model, device=args.device)
    pairs = make_pairs(mk, model, "plain", args.pairs)
    many = make_pairs(mk, model, "plain", args.curve_pairs)
    metric, quiet = mk.logit_diff(pairs), {"progress": False}
    graph = mk.Graph.of(model)
    some = exact_sample(list(graph.edges), args.edges)
    ig = {"steps": args.steps, "rule": "left"}

    def attribution(**options: Any) -> Work:
        return lambda: of_scores(mk.edge_attribution(model, pairs, metric, **options))

    def exact() -> tuple[dict[str, Any], Values]:
        return of_scores(mk.edge_patching(model, pairs, metric, some, direction="noise", **quiet))

    def acdc(model: Any, pairs: Any, start: Any, threshold: float) -> tuple[dict[str, Any], Values]:
        circuit = mk.acdc(model, pairs, threshold=threshold, start=start, **quiet)
        told = {key: circuit.provenance[key] for key in ("block_tokens", "naive_block_tokens", "n_tested", "distance")}
        candidates = mk.Graph.of(model).n_edges if start is None else start.n_edges
        return told | {"edges": candidates, "kept": circuit.n_edges, "threshold": threshold}, {}

    scores = mk.edge_attribution(model, pairs, metric, **ig, per_prompt=False)
    best = mk.Circuit.from_scores(scores, n_edges=args.candidates)
    small, random_pairs = random_model(args, pairs, n_layer=4)
    mha, mha_pairs = random_model(args, pairs, n_layer=12)
    mha_metric = mk.logit_diff(mha_pairs)

    def curve() -> tuple[dict[str, Any], Values]:
        with counted_runs(model) as rows:
            found = mk.faithfulness_curve(scores, model, many, mk.logit_diff(many), random=0, **quiet)
        cost = found.runs.cost
        runs = {f"{length} positions": n / len(many) for length, n in sorted(rows.items())}
        told = {"circuits": len(found.n_edges), "pairs": len(many), "runs": runs}
        told |= {"block_tokens": cost.block_tokens, "naive_block_tokens": cost.naive_block_tokens}
        return told | {"cpr": found.cpr, "cmd": found.cmd}, dict(zip(map(str, found.n_edges), found.faithfulness, strict=True))

    def path() -> tuple[dict[str, Any], Values]:
        edges = [f"a0.h0->a{layer}.h{head}<q>" for layer in range(1, mha.n_layers) for head in range(mha.n_heads)]
        return of_scores(mk.edge_patching(mha, mha_pairs, mha_metric, edges, **quiet))

    circuit = mha_circuit(mk, mha, mha_pairs, args.candidates)

    def evaluate() -> tuple[dict[str, Any], Values]:
        found = mk.evaluate_circuit(circuit, mha, mha_pairs, mha_metric, random=0, sets=0, minimality=None, **quiet)
        values = found.runs.sel(run="circuit").values.double().tolist()
        return {"edges": circuit.n_edges, "block_tokens": found.cost.block_tokens}, by_pair(values)

    return {
        "EAP": attribution(steps=1, direction="noise"),
        "EAP-IG": attribution(**ig),
        "clean-corrupted": attribution(rule="clean-corrupted"),
        "exact": lambda: with_all_edges(exact(), graph.n_edges),
        "ACDC": lambda: acdc(model, pairs, best, args.threshold),
        "ACDC-4-layers": lambda: acdc(small, random_pairs, None, args.threshold),
        "curve": curve,
        "MHA-EAP": lambda: of_scores(mk.edge_attribution(mha, mha_pairs, mha_metric, steps=1)),
        "MHA-path": path,
        "MHA-circuit": evaluate,
    }


def with_transformer_lens(args: argparse.Namespace) -> dict[str, Work]:
    from transformer_lens.tools import analysis

    import mechkit as mk

    pairs = make_pairs(mk, mk.HookedModel.from_pretrained(args.model, device=args.device), "plain", args.pairs)
    model, pairs = random_model(args, pairs, n_layer=12)
    bridge, n = model.bridge, len(pairs)
    clean, corrupted = (torch.stack(side.tokens).to(args.device) for side in (pairs.clean, pairs.corrupted))
    right, wrong = (torch.tensor([ids[0] for ids in side], device=args.device) for side in (pairs.right, pairs.wrong))
    each = torch.arange(n, device=args.device)

    def metric_of(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda logits: logits[0, -1, right[i]] - logits[0, -1, wrong[i]]

    def mean_metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[each, -1, right] - logits[each, -1, wrong]).mean()

    def eap() -> tuple[dict[str, Any], Values]:
        config, found = analysis.EdgeAttributionConfig(granularity="edge"), collections.defaultdict(float)
        for i in range(n):
            one = analysis.attribution_patch(bridge, clean[i][None], corrupted[i][None], metric_of(i), config)
            for (writer, reader), score in one.edge_scores.items():
                found[f"{name_of(writer)}->{name_of(reader)}"] += score / n
        return {"edges": len(found)}, dict(found)

    @torch.no_grad()
    def path() -> tuple[dict[str, Any], Values]:
        caches = [bridge.run_with_cache(side)[1] for side in (clean, corrupted)]
        metrics = analysis.get_act_patch_direct_path(bridge, corrupted, *caches, mean_metric, 0, 0, "q", verbose=False)
        effects = (metrics - mean_metric(bridge(corrupted))).tolist()
        later = [(layer, head) for layer in range(1, model.n_layers) for head in range(model.n_heads)]
        return {"edges": len(later)}, {f"a0.h0->a{lay}.h{head}<q>": effects[lay][head] for lay, head in later}

    circuit = mha_circuit(mk, model, pairs, args.candidates)
    ends = [nodes_of(analysis.Node, model.n_layers, edge) for edge in circuit]
    kept = [(w(pos), r(pos)) for w, r in ends for pos in range(clean.shape[1])]

    def evaluate() -> tuple[dict[str, Any], Values]:
        values = []
        for i in range(n):
            one = analysis.faithfulness(bridge, clean[i][None], corrupted[i][None], metric_of(i), kept)
            values.append(one.corrupt_metric + one.recovered * (one.full_metric - one.corrupt_metric))
        return {"edges": circuit.n_edges}, by_pair(values)

    return {"MHA-EAP": eap, "MHA-path": path, "MHA-circuit": evaluate}


def name_of(node: Any) -> str:
    """TransformerLens's node as mechkit names it."""
    if node.kind == "attn_head_out":
        return f"a{node.layer}.h{node.head}"
    if node.kind in ("q_input", "k_input", "v_input"):
        return f"a{node.layer}.h{node.head}<{node.kind[0]}>"
    return {"embed": "input", "mlp_out": f"m{node.layer}", "mlp_in": f"m{node.layer}", "logits": "logits"}[node.kind]


def nodes_of(node: Any, n_layers: int, edge: Any) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """An edge's writer and reader at a position, as TransformerLens's."""
    w, r = edge.writer, edge.reader
    kind = {"mlp": "mlp_in", "logits": "logits"}.get(r.kind, f"{r.kind}_input")
    if w.layer < 0:
        return lambda pos: node("embed", pos), lambda pos: node(kind, pos, min(r.layer, n_layers - 1), r.head)
    wrote = "mlp_out" if w.head is None else "attn_head_out"
    return lambda pos: node(wrote, pos, w.layer, w.head), lambda pos: node(kind, pos, min(r.layer, n_layers - 1), r.head)


def export(args: argparse.Namespace) -> None:
    """Writes the model, the pairs and what to run for `benchmarks/peers/`."""
    import mechkit as mk
    from mechkit.hooks._load import load_hf

    plain, _ = load_hf(args.model, dtype=torch.float32, revision=None, trust_remote_code=False)
    config = plain.config
    if config.model_type != "llama":
        raise SystemExit(f"the packages are run on models of Llama's shape alone, got {config.model_type}")
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    kept = {key: getattr(config, key) for key in keys} | {"rope_theta": config.rope_parameters["rope_theta"]}
    (args.into / "config.json").write_text(json.dumps(kept))
    state = {name: value.contiguous() for name, value in plain.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, args.into / "model.safetensors")
    model = mk.HookedModel.from_pretrained(args.model)
    pairs = make_pairs(mk, model, "plain", args.pairs)
    right, wrong = ([ids[0] for ids in side] for side in (pairs.right, pairs.wrong))
    graph = mk.Graph.of(model)
    edges = exact_sample(exact_sample(list(graph.edges), args.edges), args.peer_edges)
    run: dict[str, Any] = {"answers": list(zip(right, wrong, strict=True)), "metric": {}}
    run |= {"device": args.device, "threads": args.threads, "steps": args.steps, "repeats": args.peer_repeats}
    run |= {"tasks": args.tasks, "exact": {edge.name: by_query_head(graph, edge) for edge in edges}}
    for side in ("clean", "corrupted"):
        tokens = torch.stack(getattr(pairs, side).tokens)
        with torch.no_grad():
            last = plain(tokens).logits[:, -1]
        run[side] = tokens.tolist()
        run["metric"][side] = [float(row[r] - row[w]) for row, r, w in zip(last, right, wrong, strict=True)]
    (args.into / "run.json").write_text(json.dumps(run))


# -- pieces ------------------------------------------------------------------------------------------------------------


def exact_sample(edges: list[Any], most: int) -> list[Any]:
    return [edges[i] for i in sample(len(edges), most)]


def by_query_head(graph: Any, edge: Any) -> list[str]:
    """The edge's names where each query head has a key and value of its own."""
    if edge.reader.kind not in ("k", "v"):
        return [edge.name]
    heads = graph.writers_of(edge.reader)
    return [f"{edge.writer.name}->{head.name}<{edge.reader.kind}>" for head in heads]


def random_model(args: argparse.Namespace, pairs: Any, n_layer: int) -> tuple[Any, Any]:
    """A model of GPT-2 small's shape with random weights, and the same token ids for it. Weights are drawn five times as wide as
    usual, so that all of its parts matter."""
    from transformers import AutoModelForCausalLM, GPT2Config

    import mechkit as mk

    torch.manual_seed(0)
    config = GPT2Config(n_layer=n_layer, initializer_range=0.1)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().to(args.device)
    model = mk.HookedModel.from_hf(plain, name=f"gpt2 shape, {n_layer} layers")
    answers = [(right[0], wrong[0]) for right, wrong in zip(pairs.right, pairs.wrong, strict=True)]
    return model, mk.PromptPairs.from_tokens(list(pairs.clean.tokens), list(pairs.corrupted.tokens), answers, model=model)


def mha_circuit(mk: Any, model: Any, pairs: Any, n_edges: int) -> Any:
    scores = mk.edge_attribution(model, pairs, mk.logit_diff(pairs), steps=1, per_prompt=False)
    return mk.Circuit.from_scores(scores, n_edges=n_edges)


def of_scores(scores: Any) -> tuple[dict[str, Any], Values]:
    values = {edge.name: scores.score(edge) for edge in scores.edges}
    cost = scores.cost
    return {"edges": len(values), "block_tokens": cost.block_tokens, "naive_block_tokens": cost.naive_block_tokens}, values


def with_all_edges(found: tuple[dict[str, Any], Values], n_edges: int) -> tuple[dict[str, Any], Values]:
    return found[0] | {"all_edges": n_edges}, found[1]


def by_pair(values: list[float]) -> Values:
    return {f"pair {i}": float(value) for i, value in enumerate(values)}


@contextmanager
def counted_runs(model: Any) -> Iterator[collections.Counter[int]]:
    """How many rows go through the first layer's MLP, by their number of positions: every run of a prompt does, edited or not."""
    rows: collections.Counter[int] = collections.Counter()

    def count(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        rows[inputs[0].shape[-2]] += inputs[0][..., 0, 0].numel()

    handle = model.bridge.blocks[0].mlp.register_forward_pre_hook(count)
    try:
        yield rows
    finally:
        handle.remove()

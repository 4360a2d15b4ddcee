"""Which edges of the model carry the answer? Find a circuit, check every edge of it exactly, and see how good it is.

    python examples/circuit.py [--model smollm2-135m] [--pairs 16] [--edges 200] [--out out]

On indirect-object-identification prompts, half of which are held out:

1. EAP-IG estimates the effect of every edge; the best ones are then measured by exact edge patching.
2. The circuit of the best measured edges is evaluated with everything else resampled: faithfulness on the pairs that it was found
   on and on the others, completeness, minimality, and random circuits of the same size.
3. The faithfulness curve: how many edges does the estimate need to get the behaviour back?

Hanna et al. 2024, https://arxiv.org/abs/2403.17806; Wang et al. 2022, https://arxiv.org/abs/2211.00593.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import mechkit as mk

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m", help="a Hugging Face name, a folder, a .gguf file, or the alias"
    )
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--edges", type=int, default=200)
    parser.add_argument("--random", type=int, default=2, help="random circuits of the same size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    model = mk.HookedModel.from_pretrained(args.model)
    pairs = mk.tasks.ioi(model, n=args.pairs, seed=args.seed)
    metric = mk.logit_diff(pairs)
    print(mk.Graph.of(model))

    found = mk.find_circuit(model, pairs, metric, n_edges=args.edges, random=args.random, seed=args.seed)
    curve = mk.faithfulness_curve(
        mk.edge_attribution, model, pairs, metric, fractions=FRACTIONS, random=args.random, seed=args.seed
    )
    text = describe(found, curve)
    print(text)

    (args.out / "circuit.md").write_text(text, encoding="utf-8")
    found.circuit.to_json(args.out / "circuit.json")
    found.report.to_dataframe().to_csv(args.out / "circuit_runs.csv", index=False)
    print("wrote", args.out / "circuit.md")
    for name, figure in (
        ("circuit.html", mk.plot.circuit(found.circuit, max_edges=80)),
        ("curve.html", mk.plot.curve(curve)),
    ):
        print("wrote", mk.plot.write_html(figure, args.out / name))
    print(f"{time.perf_counter() - began:.0f} s in all")


def describe(found: mk.circuits.FoundCircuit, curve: mk.FaithfulnessCurve) -> str:
    """What was found, in Markdown."""
    circuit, report = found.circuit, found.report
    provenance = circuit.provenance
    lines = [
        f"# A circuit of {provenance['model']} for {circuit.task}",
        "",
        f"{circuit.n_edges} of {circuit.graph.n_edges:,} edges, {len(circuit.nodes)} writers; metric {report.runs.metric} "
        f"({report.runs.unit}), all other edges ablated ({report.runs.provenance['ablation']}).",
        "",
        "| | |",
        "| --- | --- |",
        f"| estimates against exact effects of the {len(found.verified.edges)} best | r = {found.agreement:.3f} |",
        f"| faithfulness, pairs it was found on | {report.found_on} |",
        f"| faithfulness, held-out pairs | {report.held_out} |",
        f"| random circuits of {circuit.n_edges} edges | {', '.join(f'{f:.3f}' for f in report.random)} |",
        f"| incompleteness (mean over {len(report.completeness)} sets) | {report.incompleteness:.3f} |",
        f"| components that can go for less than 0.01 | {sum(abs(x) < 0.01 for x in report.minimality.values())} of "
        f"{len(report.minimality)} |",
        f"| curve on held-out pairs | CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f} |",
        "",
        "The strongest edges, by their exact effect:",
        "",
        "| edge | effect |",
        "| --- | ---: |",
        *(f"| `{edge.name}` | {edge.score:+.3f} |" for edge in found.verified.top(15)),
        "",
        "Components that the circuit needs most (change of its faithfulness without them):",
        "",
        "| without | change |",
        "| --- | ---: |",
        *(f"| {name} | {change:+.3f} |" for name, change in list(report.minimality.items())[:10]),
        "",
        "| edges chosen | without dead ends | faithfulness | random |",
        "| ---: | ---: | ---: | ---: |",
        *(
            f"| {n:,} | {kept:,} | {f:.3f} | {r:.3f} |"
            for n, kept, f, r in zip(
                curve.n_edges, curve.kept, curve.faithfulness, curve.random_faithfulness, strict=True
            )
        ),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Attribution methods in mechkit and in other libraries: seconds, memory, and whether they find the same numbers.

    python benchmarks/attribution/other_libraries.py [--model smollm2-135m] [--device cpu]
        [--tasks nodes lens …] [--json out.json]

Each library runs in its own process, one after the other, on the same model, prompts and metric (logit difference, right minus
wrong).

| task | what | compared with |
| --- | --- | --- |
| `nodes` | attribution patching of each head, MLP and the embedding, by position | TransformerLens's `attribution_patch` |
| `components`, `heads` | direct logit attribution | TransformerLens's `direct_logit_attribution` |
| `lens`, `lens-log-prob` | logit lens of the right answer, every layer and position | TransformerLens's `logit_lens` |
| `token-ig` | integrated gradients of the tokens, Gauss-Legendre | captum's `LayerIntegratedGradients`, inseq |
| `gradient-x-input` | gradient times input of the tokens | captum's `LayerGradientXActivation`, inseq |

Prompts: `plain` (one template: 14 tokens in SmolLM2) and `ioi` (`mk.tasks.ioi`, of several lengths: the other libraries get one
length per call). inseq and `attribution_patch`, whose metric is not given the index of the prompt, get one pair per call, at most
`--peer-pairs`; their seconds are then scaled, and the table marks it.

Seconds are the best of `--repeats` runs. `cpu_seconds` (in the JSON) are the CPU time of all threads of the process, which other
work on the machine affects less. Memory is the process's (Linux) or the GPU allocator's peak, above what it held before.
Differences are the largest over all numbers of all prompts. mechkit's `nodes` include the residual stream before every layer; the
first of these is TransformerLens's embedding node. TransformerLens's direct logit attribution works only on folded weights
(`enable_compatibility_mode`, not timed). Folding moves value biases from heads to the rest: compare `heads` on models without.

captum and inseq are optional and run on the plain Hugging Face model, by default with eager attention, as in mechkit. Near the
baseline, where all tokens are the same, gradients and their rounding errors are large: integrated gradients differ by more with
sdpa, and with captum's midpoint rule, whose points are rounded to float32. inseq needs an older typeguard than TransformerLens:
`--python inseq=/path/to/python` names another virtual environment, with mechkit and inseq in it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, where shared.py is
from shared import clock, held, machine, make_pairs, most_held

LIBRARIES = {"mechkit": "mechkit", "transformer_lens": "transformer-lens", "captum": "captum", "inseq": "inseq"}
TASKS = {  # most pairs of each kind. The last two change TransformerLens's model in place
    "nodes": {"plain": 64, "ioi": 64},
    "lens": {"plain": 64, "ioi": 16},
    "lens-log-prob": {"plain": 64, "ioi": 16},
    "token-ig": {"plain": 8, "ioi": 8},
    "gradient-x-input": {"plain": 64, "ioi": 64},
    "components": {"plain": 64, "ioi": 64},
    "heads": {"plain": 64, "ioi": 64},
}
Task = Callable[[], torch.Tensor]  # values, the prompts last; NaN where a prompt has no such cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--pairs", type=int, help="at most this many pairs in every task")
    parser.add_argument(
        "--peer-pairs", type=int, default=64, help="at most this many where a library takes one at a time"
    )
    parser.add_argument("--steps", type=int, default=50, help="of integrated gradients")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="float64 for agreement")
    parser.add_argument("--rows", type=int, default=64, help="captum's and inseq's internal_batch_size")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager", help="captum's and inseq's model's")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--python", nargs="+", default=[], metavar="LIBRARY=PATH", help="another Python for a library")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    report: dict[str, Any] = {"machine": machine(args.device), "model": args.model}
    found = {library: run_worker(library, args) for library in args.libraries}
    report |= {"dtype": args.dtype, "steps": args.steps, "libraries": {name: one[0] for name, one in found.items()}}
    compare(report, {name: one[1] for name, one in found.items()})
    print_table(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def run_worker(library: str, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The library's figures, and its values by task and kind of prompts."""
    python = dict(one.split("=", 1) for one in args.python).get(library, sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        command = [python, __file__, *sys.argv[1:], "--worker", library, "--into", folder]
        environment = os.environ | {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
        done = subprocess.run(command, env=environment, check=False, stderr=subprocess.PIPE, text=True)
        figures, values = Path(folder) / "figures.json", Path(folder) / "values.safetensors"
        if done.returncode == 0:
            return json.loads(figures.read_text()), load_file(values) if values.exists() else {}
        last = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        return {"error": last[0]}, {}


# -- one library, in its own process ------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    import mechkit as mk

    version = importlib.metadata.version(LIBRARIES[args.worker])  # before the model is loaded, which takes a while
    model = mk.HookedModel.from_pretrained(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    known = {
        "mechkit": with_mechkit,
        "transformer_lens": with_transformer_lens,
        "captum": with_captum,
        "inseq": with_inseq,
    }
    library = known[args.worker](args, model)
    tasks: dict[str, dict[str, Any]] = {}
    values: dict[str, torch.Tensor] = {}
    for task in (task for task in TASKS if task in args.tasks and task in library):  # in the order of TASKS
        for kind, most in TASKS[task].items():
            pairs = make_pairs(mk, model, kind, most if args.pairs is None else min(most, args.pairs))
            one_per_call = args.worker == "inseq" or (args.worker, task) == ("transformer_lens", "nodes")
            run_pairs = pairs[range(min(len(pairs), args.peer_pairs))] if one_per_call else pairs
            try:
                found, values[f"{task} {kind}"] = measure(args, library[task](run_pairs), len(pairs) / len(run_pairs))
            except Exception as error:  # a failed task does not stop the others
                found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            size = {"pairs": len(pairs), "pairs_run": len(run_pairs), "lengths": sorted(pairs.clean.by_length())}
            tasks.setdefault(task, {})[kind] = size | found
    (args.into / "figures.json").write_text(json.dumps({"version": version, "tasks": tasks}))
    save_file(values, args.into / "values.safetensors")


def measure(args: argparse.Namespace, run: Task, scale: float) -> tuple[dict[str, Any], torch.Tensor]:
    begin, seconds, cpu_seconds = held(args.device), [], []
    for _ in range(args.repeats):
        cpu = time.process_time()
        took, values = clock(args.device, run)
        seconds.append(took * scale)
        cpu_seconds.append((time.process_time() - cpu) * scale)
    figures = {"seconds": min(seconds), "all_seconds": seconds, "cpu_seconds": min(cpu_seconds)}
    figures["peak_memory_gb"] = (most_held(args.device) - begin) / 1e9
    return figures, values.detach().double().cpu().contiguous()


def with_mechkit(args: argparse.Namespace, model: Any) -> dict[str, Callable[[Any], Task]]:
    import mechkit as mk

    def nodes(pairs: Any) -> torch.Tensor:
        sites = {"z": "layer pos head", "mlp_out": "layer pos", "resid_pre": "layer pos"}
        found = mk.attribution_patching(model, pairs, mk.logit_diff(pairs), sites)
        effects = {site: result.effect().values for site, result in found.items()}
        return as_nodes(effects["z"], effects["mlp_out"], effects["resid_pre"][0])

    def direct(over: str) -> Callable[[Any], torch.Tensor]:
        return lambda pairs: mk.direct_logit_attribution(model, pairs, mk.logit_diff(pairs), over=over).values

    def lens(value: Any) -> Callable[[Any], torch.Tensor]:
        def run(pairs: Any) -> torch.Tensor:
            tokens = {"right": [ids[0] for ids in pairs.right]}
            found = mk.logit_lens(model, pairs.clean, tokens, value=value, over="layer pos", progress=False)
            return found.values[:, :, 0]

        return run

    def token_ig(pairs: Any) -> torch.Tensor:
        path = {"baseline": baseline_token(model), "keep": (), "steps": args.steps, "rule": "gauss-legendre"}
        return mk.token_integrated_gradients(model, pairs, mk.logit_diff(pairs), **path).values

    tasks: dict[str, Callable[[Any], torch.Tensor]] = {
        "nodes": nodes,
        "components": lambda pairs: direct("component")(pairs)[:-1],  # the last is the biases after the last layer
        "heads": lambda pairs: direct("layer head")(pairs).flatten(0, 1),
        "lens": lens("logit"),
        "lens-log-prob": lens("log_prob"),
        "token-ig": token_ig,
        "gradient-x-input": lambda pairs: mk.gradient_x_input(model, pairs, mk.logit_diff(pairs)).values,
    }
    return {name: prepared(fn) for name, fn in tasks.items()}


def prepared(fn: Callable[[Any], torch.Tensor]) -> Callable[[Any], Task]:
    return lambda pairs: lambda: fn(pairs)


def with_transformer_lens(args: argparse.Namespace, model: Any) -> dict[str, Callable[[Any], Task]]:
    from transformer_lens.tools import analysis

    bridge = model.bridge

    def nodes(pairs: Any) -> torch.Tensor:
        length, n_heads, n_layers = int(pairs.clean.lengths.max()), model.n_heads, model.n_layers
        z = torch.full((n_layers, length, n_heads, len(pairs)), torch.nan, dtype=torch.float64)
        mlp, embed = z[:, :, 0].clone(), z[0, :, 0].clone()
        for i, (clean, corrupted) in enumerate(zip(pairs.clean.tokens, pairs.corrupted.tokens, strict=True)):
            right, wrong = pairs.right[i][0], pairs.wrong[i][0]

            def metric(logits: torch.Tensor, right: int = right, wrong: int = wrong) -> torch.Tensor:
                return logits[0, -1, right] - logits[0, -1, wrong]

            tokens, other = clean[None].to(args.device), corrupted[None].to(args.device)
            for node, score in analysis.attribution_patch(bridge, tokens, other, metric).node_scores.items():
                if node.kind == "attn_head_out":
                    z[node.layer, node.position, node.head, i] = score
                elif node.kind == "mlp_out":
                    mlp[node.layer, node.position, i] = score
                else:
                    embed[node.position, i] = score
        return as_nodes(z, mlp, embed)

    def direct(unit: str, n: int) -> Callable[[Any], Task]:
        def prepare(pairs: Any) -> Task:
            if not bridge.compatibility_mode:
                bridge.enable_compatibility_mode(disable_warnings=True)

            def one(tokens: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
                with torch.no_grad():
                    found = analysis.direct_logit_attribution(bridge, tokens, right, wrong, unit=unit)
                return found.attribution[:n]

            return lambda: by_length(args, pairs, one, positions=False)

        return prepare

    def lens(return_type: str) -> Callable[[Any], torch.Tensor]:
        def one(tokens: torch.Tensor, right: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                found = analysis.logit_lens(
                    bridge, tokens, positions=None, targets=right[:, None], return_type=return_type
                )
            return found.values[1:, :, :, 0].permute(0, 2, 1)  # [entry prompt pos], the first entry before layer 0

        return lambda pairs: by_length(args, pairs, one)

    return {
        "nodes": prepared(nodes),
        "components": direct("component", 10**9),
        "heads": direct("head", model.n_layers * model.n_heads),  # the last is the remainder
        "lens": prepared(lens("logits")),
        "lens-log-prob": prepared(lens("log_probs")),
    }


def with_captum(args: argparse.Namespace, model: Any) -> dict[str, Callable[[Any], Task]]:
    from captum.attr import LayerGradientXActivation, LayerIntegratedGradients

    plain, _ = plain_model(args)
    embedding, baseline = plain.get_input_embeddings(), baseline_token(model)

    def metric(tokens: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
        logits = plain(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        each = torch.arange(len(tokens), device=tokens.device)
        return logits[each, right] - logits[each, wrong]

    def token_ig(tokens: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
        found = LayerIntegratedGradients(metric, embedding).attribute(
            tokens,
            torch.full_like(tokens, baseline),
            additional_forward_args=(right, wrong),
            n_steps=args.steps,
            method="gausslegendre",
            internal_batch_size=max(args.rows, len(tokens)),
        )
        return found.detach().sum(-1).T

    def gradient_x_input(tokens: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
        found = LayerGradientXActivation(metric, embedding).attribute(tokens, additional_forward_args=(right, wrong))
        return found.detach().sum(-1).T

    return {
        "token-ig": prepared(lambda pairs: by_length(args, pairs, token_ig)),
        "gradient-x-input": prepared(lambda pairs: by_length(args, pairs, gradient_x_input)),
    }


def with_inseq(args: argparse.Namespace, model: Any) -> dict[str, Callable[[Any], Task]]:
    import inseq

    plain, tokenizer = plain_model(args)
    tokenizer.unk_token_id = baseline_token(model)  # inseq's baseline: this token at every position

    def logit_difference(step: Any, wrong_id: int) -> torch.Tensor:
        logits = step.attribution_model.output2logits(step.forward_output)
        return logits.gather(-1, step.target_ids.reshape(-1, 1))[:, 0] - logits[:, wrong_id]

    inseq.register_step_function(fn=logit_difference, identifier="logit_difference")

    def attribute(method: str, **options: Any) -> Callable[[Any], torch.Tensor]:
        attributor = inseq.load_model(plain, method, tokenizer=tokenizer, device=args.device)

        def run(pairs: Any) -> torch.Tensor:
            found = torch.full((int(pairs.clean.lengths.max()), len(pairs)), torch.nan, dtype=torch.float64)
            for i, tokens in enumerate(pairs.clean.tokens):
                text = model.to_string(tokens)
                out = attributor.attribute(
                    text,
                    text + model.to_string(torch.tensor(pairs.right[i][:1])),
                    method=method,
                    attributed_fn="logit_difference",
                    attributed_fn_args={"wrong_id": pairs.wrong[i][0]},
                    skip_special_tokens=True,
                    show_progress=False,
                    **options,
                )
                per_token = out.sequence_attributions[0].target_attributions[:, 0].sum(-1)
                found[: len(tokens), i] = per_token[: len(tokens)]
            return found

        return run

    options = {"n_steps": args.steps, "method": "gausslegendre", "internal_batch_size": args.rows}
    return {
        "token-ig": prepared(attribute("integrated_gradients", attribution_args=options)),
        "gradient-x-input": prepared(attribute("input_x_gradient")),
    }


def plain_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The Hugging Face model without hooks, and its tokenizer."""
    from mechkit.hooks.loading.pretrained import load_hf

    plain, tokenizer = load_hf(args.model, dtype=getattr(torch, args.dtype), revision=None, trust_remote_code=False)
    plain.set_attn_implementation(args.attention)
    return plain.to(args.device), tokenizer


def baseline_token(model: Any) -> int:
    ids = (model.tokenizer.unk_token_id, model.tokenizer.eos_token_id)
    return next(i for i in ids if i is not None)


def by_length(
    args: argparse.Namespace, pairs: Any, one: Callable[..., torch.Tensor], *, positions: bool = True
) -> torch.Tensor:
    """`one(clean tokens, right, wrong)` of the pairs of each length: `[… prompt]`; with positions `[… pos prompt]`, NaN where a
    prompt is shorter than others."""
    longest, found = int(pairs.clean.lengths.max()), None
    for ids in pairs.clean.by_length().values():
        tokens = torch.stack([pairs.clean.tokens[i] for i in ids])
        answers = (torch.tensor([side[i][0] for i in ids]) for side in (pairs.right, pairs.wrong))
        values = one(*(part.to(args.device) for part in (tokens, *answers))).double().cpu()
        if found is None:
            shape = (*values.shape[:-2], longest if positions else values.shape[-2], len(pairs))
            found = torch.full(shape, torch.nan, dtype=torch.float64)
        found[..., : values.shape[-2], list(ids)] = values
    assert found is not None
    return found


def as_nodes(z: torch.Tensor, mlp: torch.Tensor, embed: torch.Tensor) -> torch.Tensor:
    """`[pos node prompt]` of heads `[layer pos head prompt]`, MLPs `[layer pos prompt]` and the embedding `[pos prompt]`."""
    return torch.cat([z.transpose(0, 1).flatten(1, 2), mlp.transpose(0, 1), embed[:, None]], 1)


# -- showing -----------------------------------------------------------------------------------------------------------


def compare(report: dict[str, Any], values: dict[str, dict[str, torch.Tensor]]) -> None:
    """Adds each library's largest difference from mechkit's values, and the largest of these values."""
    ours = values.get("mechkit", {})
    for library, found in values.items():
        for key in found.keys() & ours.keys() if library != "mechkit" else ():
            task, kind = key.split()
            theirs, mine = found[key], ours[key][..., : found[key].shape[-1]]
            mine = mine[tuple(slice(size) for size in theirs.shape)]  # fewer pairs may have a shorter longest prompt
            figures = report["libraries"][library]["tasks"][task][kind]
            figures["same_cells"] = mine.shape == theirs.shape and bool((mine.isnan() == theirs.isnan()).all())
            if mine.shape == theirs.shape:
                difference = (mine - theirs).abs()
                figures["largest_difference"] = float(difference.nan_to_num(0).max())
                figures["largest_difference_of_means"] = float((mine.nanmean(-1) - theirs.nanmean(-1)).abs().max())
                figures["largest_value"] = float(mine.nan_to_num(0).abs().max())


def print_table(report: dict[str, Any]) -> None:
    print(
        f"{report['model']}, {report['dtype']}, on {report['machine']}; {report['steps']} steps of integrated gradients\n"
    )
    titles = (
        "task",
        "pairs",
        "library",
        "seconds",
        "times mechkit",
        "largest difference",
        "of values up to",
        "extra GB",
    )
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    ours = report["libraries"].get("mechkit", {}).get("tasks", {})
    for task, kinds in TASKS.items():
        for kind in kinds:
            for library, figures in report["libraries"].items():
                found = figures.get("tasks", {}).get(task, {}).get(kind)
                if found is None:
                    continue
                if "error" in found:
                    print(f"| {task} | {found['pairs']} {kind} | {library} | failed: {found['error']} | | | | |")
                    continue
                scaled = f" (from {found['pairs_run']} pairs)" if found["pairs_run"] < found["pairs"] else ""
                own = ours.get(task, {}).get(kind)
                ratio = ""
                if library != "mechkit" and own and "seconds" in own:
                    ratio = f"{found['seconds'] / own['seconds']:.1f}"
                agreement = f"{found['largest_difference']:.1e}" if "largest_difference" in found else ""
                if found.get("same_cells") is False:
                    agreement = (agreement + " (other cells)").strip()
                size = f"{found['largest_value']:.2g}" if "largest_value" in found else ""
                print(
                    f"| {task} | {found['pairs']} {kind} | {library} {figures['version']} | {found['seconds']:.2f}{scaled} | "
                    f"{ratio} | {agreement} | {size} | {found['peak_memory_gb']:.2f} |"
                )
    for library, figures in report["libraries"].items():
        if "error" in figures:
            print(f"\n{library}: not measured ({figures['error']})")


if __name__ == "__main__":
    main()

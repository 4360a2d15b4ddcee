"""The causal language models that transformers builds and TransformerLens hooks: a tiny random one of each.

Beside each stands what a plain transformers model says: whole forward passes with PyTorch's own hooks, without TransformerLens
and without mechkit. `examine` holds mechkit's model against it.

`python tests/helpers/architectures.py` writes the table of `docs/models.md` again.
"""

from __future__ import annotations

import copy
import json
import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import mechkit as mk

PAGE = Path(__file__).parents[2] / "docs/models.md"
COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GQA = COMMON | {"num_key_value_heads": 2}
BASES = {"none": {}, "common": COMMON, "gqa": GQA, "head_8": GQA | {"head_dim": 8}}


@dataclass(frozen=True)
class Architecture:
    """One of them. `double`: whether transformers runs it in float64 (mixtures of experts and some others it does not)."""

    kind: str
    config: str
    model: str
    arguments: dict[str, Any] = field(repr=False)
    double: bool = True


def read_all() -> dict[str, Architecture]:
    """By model type, in the order of the file: a line of JSON each, whose arguments are added to those of a base."""
    lines = (json.loads(line) for line in Path(__file__).with_suffix(".jsonl").read_text().splitlines())
    return {
        row["kind"]: Architecture(
            row["kind"], row["config"], row["model"], BASES[row["base"]] | row["arguments"], row.get("double", True)
        )
        for row in lines
    }


KINDS = read_all()

# Parameters of recurrences whose exponentials would overflow if they were drawn wide
_DRAWN_AS_THEY_ARE = ("A_log", "dt_bias")
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "Wo")
RIGHT, WRONG = 5, 9  # answers: token ids


def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model with wide weights, so that every mistake shows in the logits; `changes` go to its configuration."""
    chosen = KINDS[kind]
    config = getattr(transformers, chosen.config)(**(chosen.arguments | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, chosen.model)._from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.35 if chosen.double else 0.2)
        elif not any(part in name for part in _DRAWN_AS_THEY_ARE):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(torch.float64 if chosen.double else torch.float32).eval()


def make_pairs(n_tokens: int = 6, n_pairs: int = 2, seed: int = 1) -> mk.PromptPairs:
    """Pairs that differ at two positions, the first at another one in each pair."""
    clean = torch.randint(3, 61, (n_pairs, n_tokens), generator=torch.Generator().manual_seed(seed))
    corrupted = clean.clone()
    for pair in range(n_pairs):
        for at in (1 + pair % 2, n_tokens - 2):
            corrupted[pair, at] = (clean[pair, at] + 4) % 58 + 3
    return mk.PromptPairs.from_tokens(clean, corrupted, [(RIGHT, WRONG)] * n_pairs)


# -- what the plain model says -----------------------------------------------------------------------------------------

Edit = tuple[nn.Module, Callable[[Tensor], Tensor]]


class Plain:
    """A transformers model that nobody has wrapped, and whole forward passes of it with edits of what a module is given."""

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config.get_text_config()
        self.n_heads = getattr(config, "num_attention_heads", None)
        depth = config.num_hidden_layers
        stacks = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        self.blocks = next(stacks, nn.ModuleList())  # none where blocks run several times over: mechkit refuses it

    def run(self, tokens: Tensor, *edits: Edit, grad: bool = False) -> Tensor:
        handles = []
        for module, fn in edits:

            def before(_: Any, args: Any, kwargs: Any, fn: Callable[[Tensor], Tensor] = fn) -> Any:
                if args:
                    return (fn(args[0].clone()), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": fn(kwargs["hidden_states"].clone())}

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        try:
            with torch.set_grad_enabled(grad):
                return self.model(tokens).logits
        finally:
            for handle in handles:
                handle.remove()

    def read(self, tokens: Tensor, module: nn.Module) -> Tensor:
        kept: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            kept.append(x.clone())
            return x

        self.run(tokens, (module, keep))
        return kept[0]

    def gradient(self, tokens: Tensor, module: nn.Module) -> Tensor:
        """The gradient of the summed logit difference with respect to what a module is given."""
        leaves: list[Tensor] = []

        def enter(x: Tensor) -> Tensor:
            leaves.append(x.detach().requires_grad_())
            return leaves[0]

        with torch.enable_grad():
            value = difference(self.run(tokens, (module, enter), grad=True)).sum()
        return torch.autograd.grad(value, leaves[0])[0]

    def projection(self, layer: int) -> nn.Module | None:
        """What a block's attention gives its heads' outputs to; `None` where there is no attention of heads."""
        for name, module in self.blocks[layer].named_modules():
            path = name.split(".")
            attention = any("attn" in part.lower() or "attention" in part.lower() for part in path[:-1])
            if attention and path[-1] in _OUTPUT_PROJECTIONS and not any(part == "linear_attn" for part in path):
                return module
        return None

    def stream_sweep(self, pairs: mk.PromptPairs) -> Tensor:
        """`[layer pos prompt]`: one block's input at one position, from the clean run into the corrupted one. A layer's positions
        are rows of one pass."""
        clean, corrupted = tokens_of(pairs.clean), tokens_of(pairs.corrupted)
        n, found = clean.shape[1], []
        for block in self.blocks:
            source = self.read(clean, block)

            def put(x: Tensor, source: Tensor = source) -> Tensor:
                by_position = x.view(n, *source.shape)
                for at in range(n):
                    by_position[at, :, at] = source[:, at]
                return x

            found.append(difference(self.run(corrupted.repeat(n, 1), (block, put))).reshape(n, -1))
        return torch.stack(found)

    def head_sweep(self, pairs: mk.PromptPairs, layers: tuple[int, ...]) -> Tensor:
        """`[layer head prompt]`: the same for one head's output, at all positions; a layer's heads are rows of one pass."""
        clean, corrupted = tokens_of(pairs.clean), tokens_of(pairs.corrupted)
        found = []
        for layer in layers:
            module = self.projection(layer)
            assert module is not None
            source = self.read(clean, module)
            width = source.shape[-1] // self.n_heads

            def put(x: Tensor, source: Tensor = source, width: int = width) -> Tensor:
                by_head = x.view(self.n_heads, *source.shape)
                for head in range(self.n_heads):
                    mine = slice(head * width, (head + 1) * width)
                    by_head[head, ..., mine] = source[..., mine]
                return x

            patched = self.run(corrupted.repeat(self.n_heads, 1), (module, put))
            found.append(difference(patched).reshape(self.n_heads, -1))
        return torch.stack(found)


def tokens_of(prompts: mk.Prompts) -> Tensor:
    return torch.stack(list(prompts.tokens))


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, RIGHT] - logits[:, -1, WRONG]


# -- mechkit against it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """How one thing went: `"exact"`, `"whole passes"` (exact too) or `"refused"`, with the reason."""

    how: str
    why: str = ""


def examine(kind: str) -> dict[str, Finding]:
    """Holds mechkit's model of an architecture against the plain one. Raises `AssertionError` for a wrong number, and whatever
    mechkit lets through of another library's errors."""
    plain = Plain(build(kind))
    pairs = make_pairs()
    clean = tokens_of(pairs.clean)
    loaded: list[mk.HookedModel] = []
    found = {"load": attempt(lambda: loaded.append(mk.HookedModel.from_hf(copy.deepcopy(plain.model), name=kind)))}
    if not loaded:
        return found
    model, tolerance = loaded[0], 1e-5 if plain.model.dtype == torch.float32 else 1e-6
    logits = plain.run(clean)
    metric = mk.logit_diff(pairs)

    def check(got: Any, expected: Tensor) -> None:
        got = torch.as_tensor(got).double()
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max()), kind

    def forward_and_cache() -> None:
        got, cache = model.run_with_cache(clean)
        check(got, logits)
        for layer in model.layers_with("resid_pre"):
            check(cache["resid_pre", layer], plain.read(clean, plain.blocks[layer]))

    def sweep(site: str, over: str, expected: Callable[[], Tensor]) -> str:
        result = mk.activation_patching(model, pairs, metric, site=site, over=over, progress=False)
        check(result.values, expected())
        return result.provenance["replay"]

    def heads() -> Tensor:
        have = tuple(layer for layer in range(model.n_layers) if plain.projection(layer) is not None)
        assert model.layers_with("z") == have
        return plain.head_sweep(pairs, have)

    def lens() -> None:
        result = mk.logit_lens(model, pairs, tokens=[RIGHT, WRONG], layers=[-1], progress=False)
        own = dict(zip(("prompt", "pos", "token"), range(3), strict=True))
        check(result.values.squeeze(0), logits[..., [RIGHT, WRONG]].permute(*(own[dim] for dim in result.dims[1:])))

    def attribution() -> None:
        terms = mk.direct_logit_attribution(model, pairs, metric, over="component").values
        check(terms.sum(0), difference(logits))

    found["forward"] = attempt(forward_and_cache)
    found["resid_pre"] = attempt(lambda: sweep("resid_pre", "layer pos", lambda: plain.stream_sweep(pairs)))
    found["z"] = attempt(lambda: sweep("z", "layer head", heads))
    found["lens"] = attempt(lens)
    found["attribution"] = attempt(attribution)
    if found["z"].how != "refused" and len(model.layers_with("z")) < model.n_layers:
        layers = model.layers_with("z")
        where = f"heads in layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} alone"
        found["z"] = Finding(found["z"].how, f"{found['z'].why}; {where}".lstrip("; "))
    return found


def attempt(fn: Callable[[], Any]) -> Finding:
    """Runs `fn`, which returns how a sweep was computed (or nothing). A refusal must be a sentence of mechkit's own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            how = fn()
    except ValueError as error:
        check_sentence(error)
        return Finding("refused", _without_numbers(str(error)))
    if how is None or how == "suffix":
        return Finding("exact")
    return Finding("whole passes", _without_numbers(how.removeprefix("full: ")))


def check_sentence(error: Exception) -> None:
    """A refusal is mechkit's own, and says more than a word."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    assert Path(raised_in).is_relative_to(Path(mk.__file__).parent), f"{raised_in}: {error}"
    assert len(str(error)) > 40, error


def _without_numbers(text: str) -> str:
    """A reason without measured differences, which are another machine's other numbers."""
    return re.sub(r"\d\.\d+e[+-]\d+", "…", text)


# -- the page ----------------------------------------------------------------------------------------------------------

HEAD = "| model type | class | `resid_pre` | `z` | logit lens | direct logit attribution |\n| --- | --- | --- | --- | --- | --- |"
MARK = "<!-- made by tests/helpers/architectures.py -->"


def row_of(kind: str, found: dict[str, Finding]) -> str:
    """An architecture's row of the table, followed by its reasons."""
    names = ("resid_pre", "z", "lens", "attribution")
    cells = [found[name].how if name in found else "refused" for name in names]
    replayed = ("resid_pre", "z")
    cells = ["replay" if n in replayed and cell == "exact" else cell for n, cell in zip(names, cells, strict=True)]
    return f"| {kind} | {KINDS[kind].model} | {' | '.join(cells)} |"


def reasons_of(kind: str, found: dict[str, Finding]) -> list[str]:
    """One line for each reason, with what it holds for."""
    by_reason: dict[str, list[str]] = {}
    for name, finding in found.items():
        if finding.why:
            by_reason.setdefault(finding.why, []).append(name)
    return [f"- {kind}, {', '.join(names)}: {why}" for why, names in by_reason.items()]


def write_page() -> None:
    rows, reasons = [], []
    for kind in KINDS:
        found = examine(kind)
        rows.append(row_of(kind, found))
        reasons += reasons_of(kind, found)
    before, _, _ = PAGE.read_text().partition(MARK)
    table = "\n".join([HEAD, *rows])
    PAGE.write_text(f"{before}{MARK}\n\n{table}\n\n## Reasons\n\n" + "\n".join(reasons) + "\n")


if __name__ == "__main__":
    write_page()

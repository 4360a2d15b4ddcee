"""What the fingerprint's calls need: the library's words, tiny models, prompts, and the key of each call."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mechkit as mk

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # for tests/helpers

# Words of the library that differ from those in the keys below: {technique: {word in the key: the library's word}}.
# After a rename in the library, add a line here instead of changing the keys.
RENAMED: dict[str, dict[str, str]] = {}

N_LAYERS = 3
BOTH = ("denoise", "noise")
OF_PICTURES = ("llava",)  # compared in what only pictures have
FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox", "olmo2", "bloom", "bidirectional", "lfm2", *OF_PICTURES)


@dataclass(frozen=True)
class Named:
    """An option that is too large for a key: its name in the key, and a function that makes it."""

    name: str
    make: Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """One call: its technique, its options as written in the key, and the call itself."""

    technique: str
    options: str
    run: Callable[[], Any]


# --- the models and prompts


@dataclass
class Material:
    """What the calls on one family need. Each thing is made once, when it is first used."""

    family: str

    @cached_property
    def hf(self) -> Any:
        from helpers.families import FAMILIES as KNOWN
        from helpers.families import GQA, build_of

        kinds = {"layer_types": ["conv", "full_attention", "full_attention"], "block_ff_dim": 48}
        of_this_file = {  # one with bidirectional attention, so that nothing can be replayed, and one with two kinds of layers
            "bidirectional": ("gemma3_text", KNOWN["gemma3"][1] | {"use_bidirectional_attention": True}),
            "lfm2": ("lfm2", GQA | kinds),
        }
        model_type, arguments = of_this_file.get(self.family) or KNOWN[self.family]
        depth = {name: N_LAYERS for name in ("n_layer", "num_hidden_layers") if name in arguments}
        return build_of(model_type, arguments | depth)

    @cached_property
    def model(self) -> mk.HookedModel:
        return mk.HookedModel.from_hf(self.hf, name=self.family)

    @cached_property
    def pairs(self) -> mk.PromptPairs:
        """Four pairs, of 6 and of 5 tokens, which differ at "S"; two of them also differ before it."""
        draw = torch.Generator().manual_seed(11)
        lengths, at = (6, 5, 6, 5), (2, 1, 3, 2)
        clean = [torch.randint(3, 61, (length,), generator=draw) for length in lengths]
        corrupted = [row.clone() for row in clean]
        for i, (row, place) in enumerate(zip(corrupted, at, strict=True)):
            row[place] = (row[place] + 7) % 58 + 3
            row[1] = (row[1] + 5) % 58 + 3 if i > 1 else row[1]
        answers = [(5, 30), ([9, 12], 32), (7, [34, 41]), (8, 36)]
        return mk.PromptPairs.from_tokens(clean, corrupted, answers, model=self.model, positions={"S": list(at)})

    @cached_property
    def equal(self) -> mk.PromptPairs:
        """The pairs of 6 tokens, since functions of logits need prompts of one length."""
        return self.pairs[[0, 2]]

    @cached_property
    def tokens(self) -> Tensor:
        return torch.stack(self.equal.clean.tokens)

    @cached_property
    def text(self) -> mk.Prompts:
        """What tuned lenses are fitted on."""
        return mk.Prompts.from_tokens(torch.randint(3, 61, (10, 9), generator=torch.Generator().manual_seed(12)))

    @cached_property
    def metric(self) -> mk.Metric:
        return mk.logit_diff(self.pairs)

    @cached_property
    def exact(self) -> mk.Result:
        return mk.activation_patching(self.model, self.pairs, self.metric, layers=self.attending, progress=False)

    @cached_property
    def by_position(self) -> mk.Result:
        """Cells that a shorter prompt lacks are NaN."""
        over = {"site": "resid_pre", "over": "layer pos"}
        return mk.activation_patching(self.model, self.pairs, self.metric, **over, progress=False)

    @cached_property
    def far_apart(self) -> mk.Result:
        """`exact`, but with runs so far apart that their gap has the same sign for any sample of prompts."""
        runs = self.exact.baseline
        return replace(self.exact, baseline={"clean": runs["clean"].abs() + 9, "corrupted": -runs["corrupted"].abs()})

    @cached_property
    def estimated(self) -> mk.Result:
        return mk.attribution_patching(self.model, self.pairs, self.metric, layers=self.attending)

    @cached_property
    def scores(self) -> mk.EdgeScores:
        return mk.edge_attribution(self.model, self.pairs, self.metric, steps=2)

    @cached_property
    def circuit(self) -> mk.Circuit:
        return mk.Circuit.from_scores(self.scores, n_edges=60)

    @cached_property
    def constants(self) -> Any:
        return mk.optimal_ablation(self.model, self.pairs, steps=3, progress=False)

    @cached_property
    def lens(self) -> mk.TunedLens:
        return mk.TunedLens.fit(self.model, self.text, steps=4, progress=False)

    @cached_property
    def magnitudes(self) -> mk.Result:
        return mk.atp_star(self.model, self.pairs, self.metric, layers=self.attending)

    @cached_property
    def attending(self) -> list[int]:
        """The layers that have heads."""
        return [layer for layer in range(self.model.n_layers) if self.model.has_site("z", layer)]

    def layers(self, site: str) -> dict[str, Any]:
        """The option `layers` for a site that some layers lack."""
        have = [layer for layer in range(self.model.n_layers) if self.model.has_site(site, layer)]
        return {"layers": have} if mk.SITES[site].in_block and 0 < len(have) < self.model.n_layers else {}

    def named(self, attribute: str) -> Named:
        return Named(attribute, lambda: getattr(self, attribute))

    def metric_named(self, name: str) -> Named:
        return Named(name, lambda: METRICS[name](self.pairs))


class PictureMaterial(Material):
    """A vision-language model of random weights, and two pairs that differ in their pictures (the second in a word too)."""

    @cached_property
    def hf(self) -> Any:
        from helpers.vlm import build_hf

        return build_hf(self.family)

    @cached_property
    def pairs(self) -> mk.PromptPairs:
        from helpers.vlm import make_pairs

        return make_pairs(self.family, self.model)


METRICS: dict[str, Callable[[mk.PromptPairs], Any]] = {
    "logit_diff": mk.logit_diff,
    "log_prob": mk.log_prob,
    "prob_diff": mk.prob_diff,
    "accuracy": mk.accuracy,
    "kl_divergence": mk.kl_divergence,
    "kl from corrupted": partial(mk.kl_divergence, reference="corrupted"),
    "logit_diff at S": partial(mk.logit_diff, position="S"),
    "factory": lambda pairs: mk.logit_diff,
}


def of_logits(logits: Tensor) -> Tensor:
    """A metric that is a function of all logits."""
    return logits[:, -1, 7] - logits[:, 2].logsumexp(-1)


def called(fn: Callable[..., Any], fixed: Mapping[str, Any], *grids: Sequence[dict[str, Any]]) -> Iterator[Call]:
    """Calls of a function with each of the options, under the function's name."""
    yield from calls(fn.__name__, fn, fixed, *grids)


def calls(
    technique: str, fn: Callable[..., Any], fixed: Mapping[str, Any], *grids: Sequence[dict[str, Any]]
) -> Iterator[Call]:
    """Calls with each of the options. `fixed` options are not in the key."""
    for options in itertools.chain(*grids):
        text = " ".join(f"{name}={_short(value)}" for name, value in options.items())
        yield Call(technique, text, partial(_run, technique, fn, fixed, options))


def _run(technique: str, fn: Callable[..., Any], fixed: Mapping[str, Any], options: dict[str, Any]) -> Any:
    words = RENAMED.get(technique, {})

    def given(value: Any) -> Any:
        value = value.make() if isinstance(value, Named) else value
        return words.get(value, value) if isinstance(value, str) else value

    return fn(**{**fixed, **{words.get(name, name): given(value) for name, value in options.items()}})


def _short(value: Any) -> str:
    return (value.name if isinstance(value, Named) else str(value)).replace(" ", "+")


def grid(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of these options."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]

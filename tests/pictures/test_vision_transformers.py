"""Vision transformers, which read pictures alone: every site and patch against untouched models of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechkit as mk
from helpers.plain import run
from helpers.vlm import CLASSES, VISION, in_double, vision_models

QUIET = {"progress": False}


def make_pairs(model: mk.HookedModel, n: int = 3) -> mk.PromptPairs:
    generator = torch.Generator().manual_seed(1)
    both = [
        mk.Prompts.from_inputs(
            model, None, [{"pixel_values": torch.randn(1, 3, 24, 24, generator=generator)} for _ in range(n)]
        )
        for _ in range(2)
    ]
    return mk.PromptPairs.from_tokens(*both, [(i, i + 5) for i in range(n)])


def pixels(prompts: mk.Prompts, i: int) -> torch.Tensor:
    assert prompts.inputs is not None
    return prompts.inputs[i]["pixel_values"].double()


def place(hf: Any, site: str, layer: int) -> tuple[Any, Any]:
    block = (hf.vit if hasattr(hf, "vit") else hf.deit).layers[layer]
    attention = block.attention
    return {
        "resid_pre": (block, "in"),
        "q": (attention.q_proj, "out"),
        "v": (attention.v_proj, "out"),
        "z": (attention.o_proj, "in"),
        "attn_out": (attention, "out"),
        "mlp_post": (block.mlp.fc2, "in"),
        "mlp_out": (block.mlp, "out"),
        "resid_post": (block, "out"),
    }[site]


def classes(hf: Any, prompts: mk.Prompts, i: int, edits: Any = ()) -> torch.Tensor:
    return run(hf, pixels(prompts, i), edits)


@pytest.mark.parametrize("kind", VISION)
def test_every_patch(kind):
    with in_double():
        hf, model = vision_models(kind)
        pairs = make_pairs(model)
        metric = mk.logit_diff(pairs)
        n = len(pairs.clean.tokens[0])
        assert n == 9 + (2 if kind == "deit" else 1)
        for site in ("resid_pre", "q", "v", "z", "attn_out", "mlp_post", "mlp_out", "resid_post"):
            found = mk.activation_patching(model, pairs, metric, site, "layer pos", **QUIET)
            for i in range(len(pairs)):
                for layer in range(3):
                    kept: list[torch.Tensor] = []

                    def keep(x, kept=kept):
                        kept.append(x[0].clone())
                        return x

                    where = place(hf, site, layer)
                    classes(hf, pairs.clean, i, [(*where, keep)])
                    for at in (0, 1, n - 1):

                        def put(x, at=at, kept=kept):
                            x[:, at] = kept[0][at]
                            return x

                        logits = classes(hf, pairs.corrupted, i, [(*where, put)])[0]
                        assert abs(float(found.values[layer, at, i] - (logits[i] - logits[i + 5]))) <= 1e-9
            assert float((found.values - found.baseline["corrupted"]).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", VISION)
def test_ablation_and_patches(kind):
    with in_double():
        hf, model = vision_models(kind)
        pairs = make_pairs(model)
        metric = mk.logit_diff(pairs)
        found = mk.ablation(model, pairs, metric, site="resid_pre", over="layer patch", mode="zero", **QUIET)
        assert found.coords["patch"][3] == "r1c0"
        at = len(pairs.clean.tokens[0]) - 9 + 3

        def zero(x):
            x[:, at] = 0
            return x

        logits = classes(hf, pairs.clean, 1, [(*place(hf, "resid_pre", 2), zero)])[0]
        assert abs(float(found.values[2, 3, 1] - (logits[1] - logits[6]))) <= 1e-9


def test_the_logits_are_those_of_the_class_token():
    with in_double():
        hf, model = vision_models("vit")
        pairs = make_pairs(model)
        assert pairs.positions["END"].tolist() == [0, 0, 0]
        logits = model.run(pairs.clean)
        assert logits.shape == (3, 1, CLASSES)
        for i in range(3):
            assert torch.allclose(logits[i], classes(hf, pairs.clean, i), atol=1e-12)
        lens = mk.logit_lens(model, pairs.clean, tokens=[3], over="layer pos", site="resid_post", **QUIET)
        assert lens.dims == ("layer", "pos", "token", "prompt")
        assert torch.allclose(lens.values[-1, 0, 0], logits[:, 0, 3].double(), atol=1e-9)
        assert model.d_vocab == CLASSES
        assert pairs.clean.str_tokens is not None
        assert pairs.clean.str_tokens[0][:3] == ("CLS", "r0c0", "r0c1")
        report = model.validate()
        assert report.logits is not None
        assert report.logits < 1e-6


def test_direct_logit_attribution_sums_to_the_logits():
    with in_double():
        _, model = vision_models("vit")
        pairs = make_pairs(model)
        found = mk.direct_logit_attribution(model, pairs, mk.logit_diff(pairs), over="component")
        logits = model.run(pairs.clean)[:, 0]
        right = torch.stack([logits[i, i] - logits[i, i + 5] for i in range(3)])
        assert torch.allclose(found.values.sum(0), right, atol=1e-9)


def test_text_is_refused():
    _, model = vision_models("vit")
    with pytest.raises(ValueError, match="without a tokenizer"):
        model.forward("a cat")
    with pytest.raises(ValueError, match="pictures alone"):
        model.forward(torch.zeros(1, 10, dtype=torch.long))

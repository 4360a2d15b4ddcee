"""The fingerprint's calls on a vision-language model: at patches, at pixels, and in its vision tower."""

from __future__ import annotations

from collections.abc import Iterator

from family_material import BOTH, Call, PictureMaterial, called, grid

import mechkit as mk


def pictures(m: PictureMaterial) -> Iterator[Call]:
    of = {"model": m.model, "pairs": m.pairs, "metric": m.metric}
    quiet, one = of | {"progress": False}, {"model": m.model, "prompts": m.pairs, "metric": m.metric, "progress": False}
    yield from called(
        mk.image_patching,
        quiet,
        grid(site=("resid_pre", "mlp_out"), direction=BOTH, group=(1, 2)),
        [{"site": "z", "over": "layer patch head", "layers": [1, 2]}, {"replay": False, "layers": [1]}],
    )
    yield from called(
        mk.activation_patching,
        quiet,
        grid(site=("resid_post", "attn_out"), over=("layer pos",)),
        grid(site=("vision.resid_post", "vision.z"), over=("layer pos",)),
    )
    modes = ("zero", "mean", "patch_mean", "blur")
    yield from called(mk.ablation, one, grid(site=("resid_pre",), over=("layer patch",), mode=modes))
    yield from called(
        mk.attention_knockout,
        quiet,
        [{"from_": "image", "to": to, "window": window} for to, window in (("text", 2), ("END", None))],
        [{"from_": "r1c1", "to": "END", "heads": [0, 2]}],
    )
    estimates = (mk.attribution_patching, mk.atp_star, mk.relp)
    for technique in estimates:
        yield from called(technique, of, grid(site=("z", "resid_pre"), over=("layer patch",)))
    yield from called(mk.integrated_gradients, of, grid(site=("resid_pre",), over=("layer patch",), steps=(2,)))
    methods = ("gradient", "gradient_x_input", "integrated_gradients")
    yield from called(mk.pixel_attribution, one, grid(method=methods, steps=(3,)), [{"baseline": "blur", "steps": 2}])
    yield from called(mk.gradient_x_input, one, [{}])
    yield from called(mk.direct_logit_attribution, one, grid(over=("component", "layer head patch")))
    lens = {"model": m.model, "prompts": m.pairs, "progress": False}
    yield from called(mk.logit_lens, lens, grid(over=("layer patch", "layer pos"), value=("logit", "rank")))
    yield from called(mk.path_patching, quiet, [{"senders": "layer head patch", "receivers": ["m3"]}])
    yield from called(mk.edge_attribution, of, [{"steps": 2}])

"""Tiny random vision-language models of seven families, prompts with pictures for them, and an oracle on the untouched models.

`in_double` lets transformers compute in float64 what it computes in float32 whatever a model's dtype is (norms, rotations,
softmax), so that two right ways differ by 1e-15 and not by 1e-7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import mechkit as mk
from helpers.plain import Edit

IMAGE = 60  # the placeholder
TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
TILES = [[24, 48], [48, 24], [48, 48]]


@contextmanager
def in_double() -> Iterator[None]:
    """What asks for float32 gets float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def _clip(patch: int) -> Any:
    return tf.CLIPVisionConfig(**TOWER, image_size=24, patch_size=patch, projection_dim=16)


def _siglip(size: int, patch: int) -> Any:
    return tf.SiglipVisionConfig(**TOWER, image_size=size, patch_size=patch)


def _llava() -> Any:
    return tf.LlavaConfig(
        vision_config=_clip(8),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_next() -> Any:
    text = tf.LlamaConfig(**TEXT)
    return tf.LlavaNextConfig(
        vision_config=_clip(12),
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        image_grid_pinpoints=TILES,
    )


def _onevision() -> Any:
    return tf.LlavaOnevisionConfig(
        vision_config=_siglip(24, 12),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=59,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=TILES,
    )


def _gemma3() -> Any:
    text = tf.Gemma3TextConfig(**TEXT, sliding_window=7, query_pre_attn_scalar=8, sliding_window_pattern=2)
    return tf.Gemma3Config(
        vision_config=_siglip(32, 8),
        text_config=text,
        image_token_index=IMAGE,
        boi_token_index=58,
        eoi_token_index=57,
        mm_tokens_per_image=4,
    )


def _idefics3() -> Any:
    vision = tf.models.idefics3.configuration_idefics3.Idefics3VisionConfig(**TOWER, image_size=32, patch_size=8)
    text = tf.LlamaConfig(**TEXT)
    return tf.Idefics3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2)


_QWEN = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_heads": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
_QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57}


def _qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    vision = _QWEN | {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    return tf.Qwen2_5_VLConfig(vision_config=vision, text_config=TEXT | {"rope_parameters": rope}, **_QWEN_TOKENS)


def _qwen3_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10_000.0}
    vision = _QWEN | {"depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return tf.Qwen3VLConfig(vision_config=vision, text_config=TEXT | {"rope_parameters": rope}, **_QWEN_TOKENS)


FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "llava": (_llava, "LlavaForConditionalGeneration"),
    "llava_next": (_llava_next, "LlavaNextForConditionalGeneration"),
    "llava_onevision": (_onevision, "LlavaOnevisionForConditionalGeneration"),
    "gemma3": (_gemma3, "Gemma3ForConditionalGeneration"),
    "idefics3": (_idefics3, "Idefics3ForConditionalGeneration"),
    "qwen2_5_vl": (_qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": (_qwen3_vl, "Qwen3VLForConditionalGeneration"),
}


def build_hf(family: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The transformers model, its weights so large that pictures matter (as it is made, Gemma 3's projection is zero)."""
    make, name = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = getattr(tf, name)(make())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in hf.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.1 * noise if weight.ndim >= 2 else weight + 0.1 * noise)
    return hf.to(dtype).eval()


@cache
def pair_of_models(family: str) -> tuple[Any, mk.HookedModel]:
    """An untouched model of transformers (with the attention that can say what it attends to), and a hooked one with the same
    weights."""
    hf = build_hf(family)
    hf.set_attn_implementation("eager")
    return hf, mk.HookedModel.from_hf(build_hf(family), name=family)


def picture(family: str, seed: int, large: bool = False) -> dict[str, Tensor]:
    """One prompt's inputs: a picture of noise."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return 2 * torch.randn(*shape, generator=generator)

    if family == "llava":
        return {"pixel_values": noise(1, 3, 24, 24)}
    if family in ("llava_next", "llava_onevision"):
        tiles, size = (5, [40, 44]) if large else (3, [40, 24])
        return {"pixel_values": noise(1, tiles, 3, 24, 24), "image_sizes": torch.tensor([size])}
    if family == "gemma3":
        return {"pixel_values": noise(1, 3, 32, 32)}
    if family == "idefics3":
        return {"pixel_values": noise(1, 3 if large else 2, 3, 32, 32)}
    rows, columns = (6, 8) if large else (4, 6)
    return {"pixel_values": noise(rows * columns, 96), "image_grid_thw": torch.tensor([[1, rows, columns]])}


def tokens_for(family: str, model: mk.HookedModel, inputs: dict[str, Tensor], tail: Sequence[int]) -> list[int]:
    """A prompt with the placeholders of one picture between two texts."""
    n = sum(piece.n for piece in model._pieces(inputs, "inputs"))
    around = ([58], [57]) if family in ("gemma3", "qwen2_5_vl", "qwen3_vl") else ([], [])
    places = [IMAGE] * n
    if family == "idefics3":  # each tile by itself
        tiles = inputs["pixel_values"].shape[1]
        places = [token for _ in range(tiles) for token in (4, *[IMAGE] * (n // tiles))]
    return [3, 9, *around[0], *places, *around[1], *tail]


def make_prompts(family: str, model: mk.HookedModel, seeds: Sequence[int], large: Sequence[bool] = ()) -> mk.Prompts:
    rows, inputs = [], []
    for i, seed in enumerate(seeds):
        inputs.append(picture(family, seed, bool(large) and large[i]))
        rows.append(tokens_for(family, model, inputs[-1], (7, 11 + i, 5)))
    return mk.Prompts.from_inputs(model, rows, inputs)


def make_pairs(family: str, model: mk.HookedModel, large: Sequence[bool] = (False, False)) -> mk.PromptPairs:
    """Pairs that differ in the picture alone; the last one in a word behind it too."""
    clean = make_prompts(family, model, range(len(large)), large)
    corrupted = make_prompts(family, model, range(10, 10 + len(large)), large)
    rows = list(corrupted.tokens)
    rows[-1] = rows[-1].clone()
    rows[-1][-2] = 20
    assert corrupted.inputs is not None
    corrupted = mk.Prompts.from_inputs(model, rows, corrupted.inputs)
    return mk.PromptPairs.from_tokens(clean, corrupted, [(5, 7)] * len(large))


def mixture(pairs: mk.PromptPairs) -> mk.Metric:
    """Every logit counts."""
    weights = torch.randn(61, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return mk.Metric("mixture", "logits", len(pairs), pairs.positions["END"], None, lambda x, *_: x.double() @ weights)


# -- vision transformers, which read pictures alone ------------------------------------------------------------------------

VISION = {"vit": (tf.ViTConfig, tf.ViTForImageClassification), "deit": (tf.DeiTConfig, tf.DeiTForImageClassification)}
CLASSES = 12


def build_vision(kind: str) -> Any:
    config, model = VISION[kind]
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = model(config(**sizes, image_size=24, patch_size=8, num_labels=CLASSES))
        with torch.no_grad():
            for weight in hf.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    return hf.double().eval()


@cache
def vision_models(kind: str) -> tuple[Any, mk.HookedModel]:
    """An untouched one, and a hooked one."""
    return build_vision(kind), mk.HookedModel.from_hf(build_vision(kind), name=kind)


# -- the oracle ------------------------------------------------------------------------------------------------------------


def decoder_layers(hf: Any) -> Any:
    return hf.get_decoder().layers


class Oracle:
    """A model of transformers as it comes, with PyTorch's hooks: activations of a run, and runs in which some are exchanged.

    One prompt at a time; cells are rows of one forward pass.
    """

    def __init__(self, hf: Any) -> None:
        self.hf, self.layers = hf, decoder_layers(hf)
        self.post = hasattr(self.layers[0], "pre_feedforward_layernorm")  # Gemma's norms behind attention and MLP
        self.n_heads = hf.config.get_text_config().num_attention_heads

    def logits(self, prompts: mk.Prompts, i: int, n: int = 1, edits: Sequence[Edit] = (), **more: Any) -> Any:
        """`n` rows of prompt `i`."""
        assert prompts.inputs is not None
        rows = prompts.tokens[i].expand(n, -1)
        inputs = {}
        for name, value in prompts.inputs[i].items():
            value = value.to(self.hf.dtype) if value.is_floating_point() else value
            inputs[name] = torch.cat([value] * n)
        handles = [self._attach(*edit) for edit in edits]
        try:
            with torch.set_grad_enabled(bool(more.pop("grad", False))):
                return self.hf(rows, **inputs, **more)
        finally:
            for handle in handles:
                handle.remove()

    def knocked_out(self, prompts: mk.Prompts, i: int, layers: Sequence[int], blocked: Tensor) -> Tensor:
        """The last position's logits where no head of these layers may attend where `blocked` (`[pos src]`) says."""

        def forbid(_: Any, args: Any, kwargs: Any) -> Any:
            mask = kwargs["attention_mask"].clone()
            mask[..., blocked] = torch.finfo(mask.dtype).min
            return args, kwargs | {"attention_mask": mask}

        handles = [self.layers[at].self_attn.register_forward_pre_hook(forbid, with_kwargs=True) for at in layers]
        try:
            return self.logits(prompts, i).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, module: Any, side: str, fn: Callable[[Tensor], Tensor]) -> Any:
        if side == "in":

            def before(_: Any, args: Any, kwargs: Any) -> Any:
                if args:
                    return (fn(args[0].clone()), *args[1:]), kwargs
                return args, kwargs | {"hidden_states": fn(kwargs["hidden_states"].clone())}

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_: Any, args: Any, out: Any) -> Any:
            return (fn(out[0].clone()), *out[1:]) if isinstance(out, tuple) else fn(out.clone())

        return module.register_forward_hook(after)

    def place(self, site: str, layer: int) -> tuple[Any, str]:
        """The module, and which side of it, where a site is."""
        block = self.layers[layer]
        attention, mlp = block.self_attn, block.mlp
        return {
            "resid_pre": (block, "in"),
            "q": (attention.q_proj, "out"),
            "k": (attention.k_proj, "out"),
            "v": (attention.v_proj, "out"),
            "z": (attention.o_proj, "in"),
            "o": (attention.o_proj, "out"),
            "attn_out": (block.post_attention_layernorm, "out") if self.post else (attention, "out"),
            "mlp_pre": (mlp.gate_proj, "out"),
            "mlp_post": (mlp.down_proj, "in"),
            "mlp_out": (block.post_feedforward_layernorm, "out") if self.post else (mlp, "out"),
            "resid_post": (block, "out"),
        }[site]

    def activations(self, prompts: mk.Prompts, i: int) -> dict[tuple[str, int], Tensor]:
        """`(site, layer)` -> `[pos …]`, heads flat."""
        kept: dict[tuple[str, int], Tensor] = {}

        def keep(key: tuple[str, int]) -> Callable[[Tensor], Tensor]:
            def fn(x: Tensor) -> Tensor:
                kept[key] = x[0].clone()
                return x

            return fn

        sites = ("resid_pre", "q", "k", "v", "z", "o", "attn_out", "mlp_pre", "mlp_post", "mlp_out", "resid_post")
        keys = [(site, layer) for layer in range(len(self.layers)) for site in sites]
        found = self.logits(prompts, i, 1, [(*self.place(*key), keep(key)) for key in keys], output_attentions=True)
        for layer, pattern in enumerate(found.attentions):
            kept["pattern", layer] = pattern[0]
            kept["resid_mid", layer] = kept["resid_pre", layer] + kept["attn_out", layer]
        return kept

    def patched(
        self,
        prompts: mk.Prompts,
        i: int,
        base: dict[tuple[str, int], Tensor],
        source: dict[tuple[str, int], Tensor],
        site: str,
        layer: int,
        cells: Sequence[tuple[int | None, int | None]],
    ) -> Tensor:
        """The last position's logits `[cell d_vocab]`, each with one `(position, head)` of a site taken from `source`."""
        module, side = self.place(
            {"resid_mid": "attn_out", "result": "o", "pattern": "z", "attn_scores": "z"}.get(site, site), layer
        )

        def edit(x: Tensor) -> Tensor:
            for row, (position, head) in enumerate(cells):
                at: Any = slice(None) if position is None else position
                x[row] = self._edited(x[row], base, source, site, layer, at, head)
            return x

        return self.logits(prompts, i, len(cells), [(module, side, edit)]).logits[:, -1]

    def _edited(self, x: Tensor, base: Any, source: Any, site: str, layer: int, at: Any, head: int | None) -> Tensor:
        there, here = source.get((site, layer)), base.get((site, layer))
        x = x.clone()
        if site == "resid_mid":  # what the attention must have written for that to be there
            x[at] = there[at] - base["resid_pre", layer][at]
        elif site == "result":
            change = source["z", layer] - base["z", layer]
            if head is not None:
                one = torch.zeros_like(change)
                part = _of_head(change, head, self.n_heads)
                one[:, part] = change[:, part]
                change = one
            x[at] = x[at] + change[at] @ self.layers[layer].self_attn.o_proj.weight.T
        elif site in ("pattern", "attn_scores"):
            pattern = base["pattern", layer].clone()
            which: Any = slice(None) if head is None else head
            pattern[which, at] = source["pattern", layer][which, at]
            v = base["v", layer].unflatten(-1, (-1, x.shape[-1] // self.n_heads))
            v = v.repeat_interleave(self.n_heads // v.shape[1], 1)
            x = torch.einsum("hqk,khd->qhd", pattern, v).flatten(1)
        elif head is None:
            x[at] = there[at]
        else:
            part = _of_head(here, head, here.shape[-1] // (self.layers[layer].self_attn.head_dim))
            x[at, part] = there[at, part]
        return x


def _of_head(x: Tensor, head: int, n_heads: int) -> slice:
    width = x.shape[-1] // n_heads
    return slice(head * width, (head + 1) * width)

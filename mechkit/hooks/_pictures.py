"""Pictures as a model takes them: what it reads beside tokens, whether given inputs fit, and for which positions they stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechkit._thumbnails import Thumbnails
from mechkit.hooks._facts import Facts
from mechkit.hooks.loading.pictures import FAMILIES, PIXELS, Family, Piece, arguments_of, kinds_of_tokens, tiles_of
from mechkit.hooks.loading.pixels import blurred, from_pixels, sum_over_frames, to_pixels
from mechkit.hooks.loading.probe import placeholder_of
from mechkit.hooks.loading.processor import on_the_picture, processed
from mechkit.hooks.loading.thumbnails import of_image, of_inputs
from mechkit.prompts import Kind, Prompts, Segment, Stacked

Inputs = Mapping[str, Tensor]


class Pictures(Facts):
    """The part of `HookedModel` that knows pictures."""

    @property
    def image_token_id(self) -> int | None:
        """The token that stands for one patch of a picture in a prompt; `None` for a model that reads none among tokens."""
        return placeholder_of(getattr(self.bridge.original_model, "config", None))

    def placeholder_mask(self, tokens: Int[Tensor, "*row pos"]) -> Bool[Tensor, "*row pos"]:
        """Where tokens stand for patches."""
        wanted = self.image_token_id
        return torch.zeros_like(tokens, dtype=torch.bool) if wanted is None else tokens == wanted

    def placeholders(self, inputs: Inputs) -> Int[Tensor, "pos"]:
        """Tokens for a model that reads pictures alone: a 0 for each position of its stream."""
        self.check_names(inputs, "inputs[0]")
        if not self.reads_pictures_alone:
            raise ValueError(
                f"tokens: expected token ids, with {self.image_token_id} for each patch of a picture; {self.name} reads text too"
            )
        return torch.zeros(sum(piece.n for piece in self._pieces(inputs, "inputs[0]")), dtype=torch.long)

    def with_inputs(self, tokens: Int[Tensor, "row pos"], inputs: Inputs | None) -> Stacked:
        """Rows of a batch, and its inputs as a model takes them (those of one prompt after the other).

        Raises:
            ValueError: as for `complete_inputs`; placeholders without a picture; inputs that cannot be those of so many prompts.
        """
        if inputs is None:
            if self.reads_pictures_alone:
                raise ValueError(
                    f"input: {self.name} reads pictures alone, no tokens; run Prompts.from_inputs(model, None, …)"
                )
            self.check_placeholders(tokens, "input")
            return Stacked(tokens)
        found, n = {}, len(tokens)
        for name, value in inputs.items():
            if not isinstance(value, Tensor) or value.ndim == 0 or not len(value) or len(value) % n:
                got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"inputs[{name!r}]: expected a tensor of {n} prompts' inputs one after the other, got {got}"
                )
            found[name] = value.unflatten(0, (n, -1))
        whole: dict[str, list[Tensor]] = {}
        for i, row in enumerate(tokens.cpu()):
            one = {name: value[i] for name, value in found.items()}
            complete = self.complete_inputs(row, one, "inputs")
            if self._model_type in FAMILIES:
                self.segments_of(row, complete, "inputs")  # refuses what does not fit the tokens
            for name, value in complete.items():
                whole.setdefault(name, []).append(value)
        return Stacked(
            tokens, {name: torch.stack([one.to(tokens.device) for one in rows]) for name, rows in whole.items()}
        )

    def check_placeholders(self, tokens: Int[Tensor, "*row pos"], what: str) -> None:
        """Raises `ValueError` for tokens that stand for patches of a picture that is not there."""
        if self.image_token_id is not None and (n := int(self.placeholder_mask(tokens).sum())):
            raise ValueError(
                f"{what}: {n} tokens ({self.image_token_id}) stand for patches of a picture, and there is none. Pass inputs=, or "
                "make the prompts with Prompts.from_inputs or Prompts.from_processor"
            )

    def complete_inputs(self, tokens: Int[Tensor, "pos"], inputs: Inputs, what: str) -> dict[str, Tensor]:
        """Checked inputs of one prompt, and those that follow from its tokens: which of these stand for patches.

        Raises:
            ValueError: an input that the model does not take, or lacks; other sizes or channels than the model's.
        """
        self.check_names(inputs, what)
        found = {name: value.detach() for name, value in inputs.items()}
        for name, kinds in kinds_of_tokens(self.bridge.original_model, self.placeholder_mask(tokens[None])).items():
            if name in found and (found[name].shape != kinds.shape or not bool((found[name] == kinds).all())):
                raise ValueError(
                    f"{what}[{name!r}]: expected 1 at the placeholders of patches and 0 elsewhere; leave it out"
                )
            found[name] = kinds
        self._check_pixels(found, what)
        return found

    def segments_of(self, tokens: Int[Tensor, "pos"], inputs: Inputs, what: str) -> list[Segment]:
        """Which positions of a prompt are text, and which are which patches, in their order.

        Raises:
            ValueError: the number of placeholder tokens is not that of the patches, or they stand apart within one picture.
        """
        pieces = list(self._pieces(inputs, what))
        stands = self.placeholder_mask(tokens)
        stands = torch.ones_like(stands) if self.reads_pictures_alone else stands
        positions, wanted = stands.nonzero()[:, 0].tolist(), sum(piece.n for piece in pieces)
        if len(positions) != wanted:
            raise ValueError(
                f"{what}: expected one placeholder token ({self.image_token_id}) for each of {wanted} patches, as {self.name} "
                f"has for this picture; got {len(positions)} in the prompt"
            )
        segments: list[Segment] = []
        behind = 0
        for piece in pieces:
            place, positions = positions[: piece.n], positions[piece.n :]
            if place[-1] - place[0] + 1 != piece.n:
                raise ValueError(
                    f"{what}: expected the placeholders of one picture side by side, got other tokens between positions "
                    f"{place[0]} and {place[-1]}"
                )
            if place[0] > behind:
                segments.append(Segment("text", behind, place[0]))
            behind = place[-1] + 1
            kind: Kind = "special" if piece.grid is None else "image"
            segments.append(Segment(kind, place[0], behind, piece.grid, piece.tile, piece.box, piece.image))
        if behind < len(tokens):
            segments.append(Segment("text", behind, len(tokens)))
        return segments

    def process(
        self, processor: Any, text: str, pictures: Sequence[Any], what: str
    ) -> tuple[Tensor, dict[str, Tensor], list[Segment], Thumbnails]:
        """One prompt's tokens, inputs, segments and thumbnails, by a processor: see `Prompts.from_processor`."""
        model: Any = self
        tokens, inputs, images = processed(model, processor, text, pictures, what)
        sizes = [(image.height, image.width) for image in images]
        complete = self.complete_inputs(tokens, inputs, what)
        segments = self.segments_of(tokens, complete, what)
        placed = on_the_picture(model, processor, inputs, tokens, segments, sizes)
        return tokens, inputs, placed, tuple(map(of_image, images))

    def thumbnails_of(self, inputs: Inputs, segments: Sequence[Segment]) -> Thumbnails:
        """Small copies of one prompt's pictures as the model takes them, for figures; by the number of the picture."""
        return of_inputs(getattr(self.bridge.original_model, "config", None), inputs, segments)

    def blurred(self, prompts: Prompts, sigma: float | None = None) -> Prompts:
        """The same prompts with blurred pictures: a picture without its details, for `ablation(mode="blur")`.

        Args:
            prompts: With pictures.
            sigma: Of the Gaussian, in pixels; a quarter of a picture's shorter side by default.
        """
        if prompts.inputs is None or any(PIXELS not in one for one in prompts.inputs):
            raise ValueError("prompts: expected pictures in each of them, got some without")
        if sigma is not None and not 0 < sigma < 1e4:
            raise ValueError(f"sigma: expected a number of pixels above 0, got {sigma!r}")
        config, inputs = self.bridge.original_model.config, []
        for one in prompts.inputs:
            pictures = to_pixels(config, one)
            soft = [blurred(p, min(p.shape[1:]) / 4 if sigma is None else sigma) for p in pictures]
            inputs.append({**one, PIXELS: from_pixels(config, soft, one)})
        segments = prompts.segments or ((),) * len(prompts)
        small = tuple(self.thumbnails_of(one, of) for one, of in zip(inputs, segments, strict=True))
        return replace(prompts, inputs=tuple(inputs), thumbnails=small)

    def pixel_maps(self, prompts: Prompts, i: int, numbers: Tensor) -> list[Tensor]:
        """Numbers of each input pixel of prompt `i`, as pictures or tiles `[channel, row, column]`, rows from the top."""
        assert prompts.inputs is not None
        return sum_over_frames(self.bridge.original_model.config, numbers, prompts.inputs[i])

    def check_segments(self, tokens: Int[Tensor, "pos"], segments: Sequence[Segment], what: str) -> None:
        """Raises `ValueError` for segments in which pictures stand elsewhere than the tokens say."""
        if self.reads_pictures_alone or self.image_token_id is None:
            return
        stands = self.placeholder_mask(tokens).nonzero()[:, 0].tolist()
        said = [at for segment in segments if segment.kind in ("image", "special") for at in segment.positions]
        if missing := sorted(set(stands) ^ set(said)):
            raise ValueError(
                f"{what}: expected 'image' and 'special' segments at the {len(stands)} placeholders of the prompt and nowhere "
                f"else; position {missing[0]} is {'no placeholder' if missing[0] in said else 'one that no segment holds'}"
            )

    @property
    def pads_with_zeros(self) -> bool:
        """Whether a picture of zeros alone is taken for none."""
        return self._model_type == "idefics3"

    @property
    def _model_type(self) -> str:
        return str(getattr(getattr(self.bridge.original_model, "config", None), "model_type", ""))

    def _family(self, what: str) -> Family:
        found = FAMILIES.get(self._model_type)
        if found is None:
            raise ValueError(
                f"{what}: expected a model whose patches are known ({', '.join(FAMILIES)}); {self.name} is a "
                f"{self._model_type!r}. Pass segments= to say which positions its pictures take"
            )
        return found

    def _pieces(self, inputs: Inputs, what: str) -> Iterator[Piece]:
        if PIXELS not in inputs:
            return iter(())
        return (piece for piece in self._family(what).pieces(self.bridge.original_model.config, inputs) if piece.n)

    def check_names(self, inputs: Inputs, what: str) -> None:
        """Raises `ValueError` for inputs that the model does not take."""
        takes = arguments_of(self.bridge.original_model)
        for name in inputs:
            known = self._model_type in FAMILIES
            if name not in takes or name in _OURS or (known and name not in _PICTURES):
                others = sorted(takes & _PICTURES)
                raise ValueError(
                    f"{what}: {name!r} is nothing that {self.name} ({type(self.bridge.original_model).__name__}) takes beside "
                    f"tokens; {'it takes ' + ', '.join(others) if others else 'it reads text alone'}"
                )

    def _check_pixels(self, inputs: Inputs, what: str) -> None:
        """Raises `ValueError` for pixels of another form than the model's."""
        if PIXELS not in inputs or self._model_type not in FAMILIES:
            return
        family, pixels, config = self._family(what), inputs[PIXELS], self.bridge.original_model.config
        named = f"{what}[{PIXELS!r}]"
        if not pixels.is_floating_point():
            raise ValueError(f"{named}: expected scaled pixels as floating-point numbers, got {pixels.dtype}")
        if pixels.ndim != family.axes.count(",") + 1:
            raise ValueError(f"{named}: expected {family.axes}, got shape {list(pixels.shape)}")
        if missing := [name for name in family.needs if name not in inputs]:
            raise ValueError(f"{what}: expected {missing[0]!r} beside {PIXELS!r}, as the model's processor gives it")
        vision = getattr(config, "vision_config", config)
        if "image_grid_thw" in inputs:
            self._check_flat_patches(inputs, vision, named)
            return
        channels, size = int(getattr(vision, "num_channels", 3)), getattr(vision, "image_size", None)
        height, width = pixels.shape[-2:]
        wanted = list(size) if isinstance(size, list | tuple) else [size, size]
        if pixels.shape[-3] != channels:
            raise ValueError(
                f"{named}: expected {channels} channels, got {pixels.shape[-3]} in shape {list(pixels.shape)}"
            )
        if size is not None and "pixtral" not in str(vision.model_type) and [height, width] != wanted:
            raise ValueError(f"{named}: expected pictures of {wanted[0]} x {wanted[1]} pixels, got {height} x {width}")
        if "image_sizes" in inputs:
            sizes = inputs["image_sizes"]
            if sizes.shape != (len(pixels), 2) or sizes.is_floating_point() or int(sizes.min()) < 1:
                raise ValueError(
                    f"{what}['image_sizes']: expected a height and width in whole pixels for each of {len(pixels)} pictures, got "
                    f"{sizes.tolist()}"
                )
            tiles = [tiles_of(config, size) for size in sizes.tolist()]
            if pixels.ndim == 5 and pixels.shape[1] != 1 and pixels.shape[1] < max(tiles):
                raise ValueError(
                    f"{named}: expected {max(tiles)} views for pictures of {sizes.tolist()} pixels, got {pixels.shape[1]}"
                )

    def _check_flat_patches(self, inputs: Inputs, vision: Any, named: str) -> None:
        pixels, grids = inputs[PIXELS], inputs["image_grid_thw"]
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        if grids.ndim != 2 or grids.shape[1] != 3 or grids.is_floating_point() or int(grids.min()) < 1:
            raise ValueError(
                f"{named}: expected image_grid_thw [picture, 3] of whole numbers from 1 on, got {grids.tolist()}"
            )
        if bool((grids[:, 0] != 1).any()):
            raise ValueError(
                f"{named}: expected still pictures, of one frame each; got image_grid_thw {grids.tolist()}"
            )
        if pixels.shape[1] != numbers:
            raise ValueError(
                f"{named}: expected {numbers} numbers a patch ({vision.in_channels} channels, {vision.temporal_patch_size} "
                f"frames of {vision.patch_size} x {vision.patch_size} pixels), got {pixels.shape[1]}"
            )
        if len(pixels) != (wanted := int(grids.prod(1).sum())):
            raise ValueError(
                f"{named}: expected {wanted} patches, as image_grid_thw {grids.tolist()} says; got {len(pixels)}"
            )
        if bool((grids[:, 1:] % vision.spatial_merge_size).any()):
            raise ValueError(
                f"{named}: expected rows and columns of patches in multiples of {vision.spatial_merge_size}, got {grids.tolist()}"
            )


def inputs_of(input: Any, inputs: Inputs | None) -> Inputs | None:
    """What is read beside the tokens: what Prompts hold, or what is given.

    Raises:
        ValueError: both.
    """
    if not isinstance(input, Prompts):
        return inputs
    if inputs is not None:
        raise ValueError("inputs: expected none beside Prompts, which hold their own")
    return input.stack(range(len(input))).arguments or None


# Arguments of a model's forward pass that are mechkit's own to give.
_OURS = frozenset(
    (
        "self", "kwargs", "input_ids", "inputs_embeds", "past_key_values", "use_cache", "labels", "logits_to_keep", "return_dict",
        "output_attentions", "output_hidden_states", "cache_position", "attention_mask", "position_ids",
    )
)  # fmt: skip
_PICTURES = frozenset(
    ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask", "token_type_ids", "mm_token_type_ids")
)

"""Prompts from transformers' processors, made here without a hub: tokens, inputs, and where on the picture each patch lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import mechkit as mk
from helpers.vlm import IMAGE, build_hf, vision_models
from mechkit.hooks.loading.pixels import to_pixels

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (make test installs it)")
tokenizers = pytest.importorskip("tokenizers")

ROW_TOKENS = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]


def make_tokenizer(**special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    words = {
        "<bos>": 0, "<eos>": 1, "<pad>": 2, "what": 3, "is": 4, "this": 5, "cat": 6, "dog": 7, "<unk>": 8, "Ċ": 9,
        "<fake_token_around_image>": 10, "<global-img>": 11, "<|vision_start|>": 58, "<|vision_end|>": 57, "<image>": IMAGE,
    }  # fmt: skip
    words |= {token: 20 + i for i, token in enumerate(ROW_TOKENS)}
    words |= {f"w{i}": i for i in range(61) if i not in words.values()}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<|vision_start|>", "<|vision_end|>", *ROW_TOKENS]
    model.add_special_tokens(marks)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    extra = {"image_token": "<image>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=model, **names, extra_special_tokens=extra)


def model_of(family: str, tokenizer: Any) -> mk.HookedModel:
    return mk.HookedModel.from_hf(build_hf(family, dtype=torch.float32), tokenizer, name=family)


def picture(width: int, height: int, spot: tuple[int, int, int, int]) -> Any:
    """Dark, with one bright rectangle (left, top, right, bottom)."""
    array = np.full((height, width, 3), 20, np.uint8)
    left, top, right, bottom = spot
    array[top:bottom, left:right] = 250
    return Image.fromarray(array)


def brightest(model: mk.HookedModel, prompts: mk.Prompts, tile: int | None) -> tuple[float, float]:
    """The middle of the brightest patch of one view, on the picture; how bright patches are is read from what the model gets."""
    assert prompts.inputs is not None
    assert prompts.segments is not None
    segments = [s for s in prompts.segments[0] if s.kind == "image" and s.tile == tile]
    best, middle = -np.inf, (0.0, 0.0)
    pictures = to_pixels(model.bridge.original_model.config, prompts.inputs[0])
    pixels = pictures[0] if len(segments) == 1 and tile is None and len(pictures) == 1 else None
    views = [s for s in prompts.segments[0] if s.kind == "image"]
    for segment in segments:
        view = pixels if pixels is not None else pictures[views.index(segment)]
        rows, columns = segment.grid
        height, width = view.shape[1] // rows, view.shape[2] // columns
        for at in segment.positions:
            row, column = divmod(at - segment.start, columns)
            value = float(view[:, row * height : (row + 1) * height, column * width : (column + 1) * width].mean())
            if value > best:
                left, top, right, bottom = segment.patch_box(at)
                best, middle = value, ((left + right) / 2, (top + bottom) / 2)
    return middle


def inside(point: tuple[float, float], spot: tuple[int, int, int, int]) -> bool:
    return spot[0] <= point[0] <= spot[2] and spot[1] <= point[1] <= spot[3]


def llava_processor(tokenizer: Any) -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    given = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(images, tokenizer, image_token="<image>", **given)


@pytest.mark.parametrize("size", [(48, 48), (96, 48), (48, 120)])
def test_llava_cuts_out_the_middle(size):
    """The shorter side is scaled and the middle cut out: boxes are those of the picture that was given."""
    width, height = size
    tokenizer = make_tokenizer()
    model, processor = model_of("llava", tokenizer), llava_processor(tokenizer)
    left, top = (width - 48) // 2, (height - 48) // 2
    for row, column in ((0, 0), (1, 2), (2, 1)):
        spot = (left + 16 * column, top + 16 * row, left + 16 * column + 16, top + 16 * row + 16)
        prompts = mk.Prompts.from_processor(model, processor, "what is <image> this", [picture(width, height, spot)])
        tokens = processor(text=["what is <image> this"], images=[picture(width, height, spot)], return_tensors="pt")
        assert torch.equal(prompts.tokens[0], tokens["input_ids"][0])
        assert torch.equal(prompts.inputs[0]["pixel_values"], tokens["pixel_values"])
        assert inside(brightest(model, prompts, None), spot)
        (segment,) = (s for s in prompts.segments[0] if s.kind == "image")
        assert segment.box == (left, top, left + 48, top + 48)


def test_an_image_processor_alone():
    """The same tokens as the whole processor gives; and Qwen's, whose processor needs torchvision for videos."""
    from transformers import Qwen2VLImageProcessorPil

    tokenizer = make_tokenizer()
    model, processor = model_of("llava", tokenizer), llava_processor(tokenizer)
    one = picture(48, 48, (0, 0, 16, 16))
    whole = mk.Prompts.from_processor(model, processor, "what is <image> this", one)
    alone = mk.Prompts.from_processor(model, processor.image_processor, "what is <image> this", one)
    assert [row.tolist() for row in alone.tokens] == [[0, *whole.tokens[0].tolist()]]  # mechkit begins with <bos>
    assert alone.segments[0][1].grid == whole.segments[0][1].grid == (3, 3)

    qwen = model_of("qwen2_5_vl", tokenizer)
    size = {"shortest_edge": 16 * 24, "longest_edge": 16 * 24}
    images = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, size=size)
    for spot in ((0, 0, 40, 30), (40, 30, 80, 60)):
        one = picture(120, 60, spot)
        prompts = mk.Prompts.from_processor(qwen, images, "<|vision_start|><image><|vision_end|> what is this", one)
        (segment,) = (s for s in prompts.segments[0] if s.kind == "image")
        rows, columns = segment.grid
        assert prompts.inputs[0]["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
        assert segment.box == (0.0, 0.0, 120.0, 60.0)
        assert inside(brightest(qwen, prompts, None), spot)
    two = mk.Prompts.from_processor(qwen, images, "<image> is <image> this", [[one, picture(60, 60, spot)]])
    assert [s.image for s in two.segments[0] if s.kind == "image"] == [0, 1]
    with pytest.raises(ValueError, match=r"one placeholder .* for each of 2 pictures, got 1"):
        mk.Prompts.from_processor(qwen, images, "<image> this", [[one, one]])
    logits = qwen.run(prompts)
    assert bool(logits.isfinite().all())


def test_tiles_of_idefics():
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    marks = {
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<eos>",
    }
    tokenizer = make_tokenizer(**marks)
    model = model_of("idefics3", tokenizer)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4)
    spot = (66, 2, 126, 62)
    prompts = mk.Prompts.from_processor(model, processor, "<image> what is this", [[picture(128, 64 + 64, spot)]])
    tiles = [s for s in prompts.segments[0] if s.kind == "image"]
    assert [s.tile for s in tiles] == [0, 1, 2, 3, None]
    assert tiles[1].box == (64, 0, 128, 64)
    assert tiles[2].box == (0, 64, 64, 128)
    assert tiles[4].box == (0, 0, 128, 128)
    for tile in (None, 1):
        assert inside(brightest(model, prompts, tile), spot)
    pair = [picture(128, 128, spot), picture(64, 64, (0, 0, 8, 8))]
    two = mk.Prompts.from_processor(model, processor, "<image> is <image> this", [pair])
    tiles = [s for s in two.segments[0] if s.kind == "image"]
    assert [(s.image, s.tile) for s in tiles] == [(i, tile) for i in (0, 1) for tile in (0, 1, 2, 3, None)]
    assert tiles[6].box == (32, 0, 64, 32)
    assert tiles[9].box == (0, 0, 64, 64)


def test_vision_transformers():
    from transformers import ViTImageProcessorPil

    _, model = vision_models("vit")
    images = ViTImageProcessorPil(size={"height": 24, "width": 24})
    spot = (100, 0, 150, 60)
    prompts = mk.Prompts.from_processor(model, images, "", picture(150, 180, spot))
    assert prompts.segments[0][1].box == (0.0, 0.0, 150.0, 180.0)
    assert inside(brightest(model, prompts, None), spot)


def test_what_is_no_picture(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    model, processor = model_of("llava", tokenizer), llava_processor(tokenizer)

    def refused(one: Any, sentence: str) -> None:
        with pytest.raises((ValueError, TypeError), match=sentence) as raised:
            mk.Prompts.from_processor(model, processor, "<image> this", [one])
        assert "\n" not in str(raised.value)

    (tmp_path / "text.png").write_text("no picture")
    refused(tmp_path / "text.png", "a file that is none")
    refused(tmp_path / "nowhere.png", "there is no file")
    refused(np.zeros((4, 4)), r"expected bytes \[row, column, 3 colours\], got float64")
    refused(3, "expected a PIL image")
    monkeypatch.setattr("mechkit.hooks.loading.processor.MOST_PIXELS", 10_000)
    refused(picture(101, 100, (0, 0, 1, 1)), "too many pixels for a picture .101 x 100")
    picture(200, 100, (0, 0, 1, 1)).save(tmp_path / "large.png")
    refused(tmp_path / "large.png", "too many pixels")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)
    refused(tmp_path / "large.png", "too many pixels")
    with pytest.raises(ValueError, match="refuses it"):
        mk.Prompts.from_processor(model, processor, "no place for it", [picture(24, 24, (0, 0, 8, 8))])
    with pytest.raises(ValueError, match="images: expected one"):
        mk.Prompts.from_processor(model, processor, ["<image>", "<image>"], [picture(24, 24, (0, 0, 8, 8))])
    picture(48, 48, (0, 0, 16, 16)).save(tmp_path / "right.png")
    assert len(mk.Prompts.from_processor(model, processor, "<image> this", [tmp_path / "right.png"])) == 1


def test_from_a_folder(tmp_path):
    """Loaded as by a hub's name: the class, the tokenizer, and for a vision transformer none."""
    hf, tokenizer = build_hf("llava", dtype=torch.float32), make_tokenizer()
    hf.save_pretrained(tmp_path / "llava")
    tokenizer.save_pretrained(tmp_path / "llava")
    loaded, direct = mk.HookedModel.from_pretrained(tmp_path / "llava"), model_of("llava", tokenizer)
    one = picture(48, 48, (0, 0, 16, 16))
    prompts = mk.Prompts.from_processor(loaded, llava_processor(tokenizer), "what is <image> this", one)
    assert torch.allclose(loaded.run(prompts), direct.run(prompts), atol=1e-5)
    plain, _ = vision_models("vit")
    plain.save_pretrained(tmp_path / "vit")
    loaded = mk.HookedModel.from_pretrained(tmp_path / "vit", dtype=torch.float64)
    assert loaded.reads_pictures_alone
    assert loaded.tokenizer is None
    given = mk.Prompts.from_inputs(loaded, None, [{"pixel_values": torch.ones(1, 3, 24, 24)}])
    assert torch.allclose(loaded.run(given)[:, 0], plain(torch.ones(1, 3, 24, 24).double()).logits, atol=1e-5)

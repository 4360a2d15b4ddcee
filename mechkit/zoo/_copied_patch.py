"""A vision-language model that answers with the colour of one patch, while other heads look at other patches for nothing.

The weights are those of a LLaVA: a SigLIP tower, a projector, a Llama.

1. The tower writes two features of each patch, its colour and its place. Its attention and its MLP are zero, so that they
   arrive as they are: a patch's position holds that patch and no other.
2. The norms are made harmless as in `_build`: all positions, of text and of patches, hold a *ballast*, 2^23, in the last of
   64 dimensions. RMSNorm centres nothing, so one dimension is enough. Its scale is then 2^20 whatever the features are, and
   every norm's gain is that scale. transformers computes norms in float32: next to a ballast of 2^23, features of size 1 are
   lost there, and a power of two loses no digit. So each block reads the features exactly.
3. Rotations are made harmless by a base of 1e30: of a head's 8 pairs of dimensions the first turns by one radian a position
   and is left empty; queries and keys use the last two, which turn by 3e-23.
4. Scores as in `_build`: 40 more than the next one leaves nothing to the others.

All in float64, on the CPU, without a tokenizer. Do not zero `embed` or `resid_*` as a whole: the ballast would go with them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechkit._check import checked
from mechkit.hooks import HookedModel
from mechkit.metrics import logit_diff
from mechkit.prompts import PromptPairs, Prompts
from mechkit.zoo._build import SHARP, Known, Role, eye, one

BOS, ASK, RED, N_COLOURS = 0, 1, 2, 3  # tokens 2, 3 and 4 are red, green and blue
FILLERS = (5, 6, 7, 8)
IMAGE, D_VOCAB = 9, 10
SIDE, PIXELS = 3, 4  # patches along a side of the picture, pixels along a side of a patch
N_LAYERS, N_HEADS, D_HEAD, D_MODEL = 3, 4, 16, 64
COPIER, DISTRACTOR, WATCHER = (1, 0), (1, 1), (0, 1)
BALLAST, SCALE = 2.0**23, 2.0**20  # SCALE = BALLAST / sqrt(D_MODEL)
STILL = 6  # queries and keys use pairs 6 and 7 of a head's dimensions; pair i turns by 1e30^(-i/8) a position
LOGIT = 10.0
UNITS = {"token": D_VOCAB, "colour": N_COLOURS, "place": SIDE**2, "answer": N_COLOURS, "seen": N_COLOURS}


@checked
def copied_patch(n: int = 6, *, place: tuple[int, int] = (2, 0), seed: int = 0) -> Known:
    """A vision-language model in which one head copies one patch's colour into the answer, and two heads look elsewhere.

    LLaVA's form: three layers of four heads, no MLPs, 10 tokens, pictures of 3 x 3 patches of 4 x 4 pixels. A prompt is
    `BOS filler … <9 patches> filler … ASK`. A patch is red, green or blue; the answer is the token (2, 3 or 4) that names the
    colour of the patch at `place`.

    | feature | units | written by | value |
    | --- | --- | --- | --- |
    | `token` | 10 | embedding; nothing at patches | the token, one-hot |
    | `colour` | 3 | vision tower | the patch's red, green and blue, each its mean over pixels |
    | `place` | 9 | vision tower | where the patch is in the picture, one-hot |
    | `answer` | 3 | head (1, 0) | the colour that it attends to |
    | `seen` | 3 | head (1, 1) | the colour that it attends to |

    | head | attends, from ASK | writes |
    | --- | --- | --- |
    | (1, 0) | to the patch at `place` | its colour into `answer` |
    | (1, 1) | to the patch opposite | its colour into `seen`, which nothing reads |
    | (0, 1) | to all patches evenly | nothing |
    | the others | to BOS | nothing |

    Opposite is at (2 - row, 2 - column); for the patch in the middle it is (0, 0). From everywhere else every head attends to
    BOS, which has no colour. Logits are 10 x `answer`.

    All nine patches have other colours in the corrupted picture, and the words are the same. So the logit difference
    (clean colour at `place` minus the corrupted one there) is +10 and -10. Patched alone into the residual stream before layer
    0 or 1, the patch at `place` restores all of it (normalized 1), every other patch nothing; before layer 2, none does: what
    was needed is at ASK by then. Of the heads' outputs that of (1, 0) restores all, every other one nothing. So attention and
    effect disagree: at ASK, heads (1, 1) and (0, 1) have all of their attention on the picture, and head (1, 1)'s output even
    tells clean and corrupted apart, without any effect.

    | edge of the circuit | carries |
    | --- | --- |
    | `input->a1.h0<v>` | the colour of the patch at `place` |
    | `a1.h0->logits` | which token is answered |

    Not in it: queries and keys hold tokens and places, which are the same in both prompts; `input->a1.h1<v>` and
    `input->a0.h1<v>` differ, but end there.

    Args:
        n: How many pairs.
        place: Row and column of the patch that is copied, from the top left.
        seed: Of the prompts; the model depends on `place` alone.

    Returns:
        `Known`, with roles `copier` (head (1, 0)), `distractor` (heads (1, 1) and (0, 1)) and `control` (the other heads, and
        the MLPs, which are zero), and a circuit of 2 edges.

    Raises:
        ValueError: `n` below 1, a `place` outside the picture.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 pair, got {n}")
    if len(place) != 2 or not all(0 <= at < SIDE for at in place):
        raise ValueError(f"place: expected a row and a column in 0..{SIDE - 1}, got {place}")
    with torch.random.fork_rng(devices=[]):  # TransformerLens draws weights before it sets them
        model = HookedModel.from_hf(_written(SIDE * place[0] + place[1]), name="zoo.copied_patch")
    pairs = _pairs(model, n, SIDE * place[0] + place[1], seed)
    looking = (COPIER, DISTRACTOR, WATCHER)
    heads = ((layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS))
    control: Role = (*(at for at in heads if at not in looking), *((layer, None) for layer in range(N_LAYERS)))
    roles: dict[str, Role] = {"copier": (COPIER,), "distractor": (DISTRACTOR, WATCHER), "control": control}
    return Known(model, pairs, logit_diff(pairs), roles, frozenset({"input->a1.h0<v>", "a1.h0->logits"}))


def opposite(place: int) -> int:
    """The patch that head (1, 1) attends to: never the one that is copied."""
    there = SIDE**2 - 1 - place
    return 0 if there == place else there


def _written(place: int) -> Any:
    """The transformers model."""
    llava = _HandWrittenLlava()
    llava.embed("token", eye(D_VOCAB))
    llava.see()
    n_places = SIDE**2
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            llava.rest(layer, head)
    for (layer, head), feature, wanted in (
        (COPIER, "answer", one(n_places, place)),
        (DISTRACTOR, "seen", one(n_places, opposite(place))),
        (WATCHER, None, torch.ones(n_places)),
    ):
        llava.look(layer, head, wanted)
        if feature is not None:
            llava.copy(layer, head, "colour", feature)
    answers = torch.zeros(N_COLOURS, D_VOCAB, dtype=torch.float64)
    answers[:, RED : RED + N_COLOURS] = LOGIT * eye(N_COLOURS)
    llava.unembed("answer", answers)
    return llava.hf


def _pairs(model: HookedModel, n: int, place: int, seed: int) -> PromptPairs:
    generator = torch.Generator().manual_seed(seed)
    tokens, clean, corrupted, answers = [], [], [], []
    for i in range(n):
        words = [FILLERS[int(torch.randint(len(FILLERS), (1,), generator=generator))] for _ in range(i % 4)]
        before = i % 3 if i % 3 <= len(words) else 0  # so that pictures stand at various positions
        tokens.append([BOS, *words[:before], *[IMAGE] * SIDE**2, *words[before:], ASK])
        colours = torch.randint(N_COLOURS, (SIDE**2,), generator=generator)
        others = (colours + torch.randint(1, N_COLOURS, (SIDE**2,), generator=generator)) % N_COLOURS
        clean.append({"pixel_values": _painted(colours)})
        corrupted.append({"pixel_values": _painted(others)})
        answers.append((RED + int(colours[place]), RED + int(others[place])))
    return PromptPairs.from_tokens(
        Prompts.from_inputs(model, tokens, clean),
        Prompts.from_inputs(model, tokens, corrupted),
        answers,
        task="zoo.copied_patch",
    )


def _painted(colours: Tensor) -> Float[Tensor, "1 channel row column"]:
    channels = torch.nn.functional.one_hot(colours, N_COLOURS).T.double().unflatten(1, (SIDE, SIDE))
    return channels.repeat_interleave(PIXELS, 1).repeat_interleave(PIXELS, 2)[None]


class _HandWrittenLlava:
    """A LLaVA whose weights are all zero until they are written, in terms of named features; one dimension for each unit."""

    def __init__(self) -> None:
        self.units: dict[str, slice] = {}
        n_units = 0
        for name, size in UNITS.items():
            self.units[name] = slice(n_units, n_units + size)
            n_units += size
        self.hf = _blank()
        self.text = self.hf.model.language_model
        self._write(self.text.embed_tokens.weight, (slice(None), -1), BALLAST)
        self._write(self.hf.model.multi_modal_projector.linear_2.bias, -1, BALLAST)

    def embed(self, feature: str, values: Float[Tensor, "d_vocab unit"]) -> None:
        """What each token writes into a feature. (The placeholder's is never seen: a patch is put in its place.)"""
        self._write(self.text.embed_tokens.weight, (slice(None), self.units[feature]), values)

    def see(self) -> None:
        """The tower and the projector: each patch's mean colour, and its place."""
        tower, n = self.hf.model.vision_tower.embeddings, N_COLOURS
        colours = (eye(n) / PIXELS**2)[:, :, None, None].expand(-1, -1, PIXELS, PIXELS)
        self._write(tower.patch_embedding.weight, slice(n), colours)
        self._write(tower.position_embedding.weight, (slice(None), slice(n, n + SIDE**2)), eye(SIDE**2))
        first, second = (getattr(self.hf.model.multi_modal_projector, name) for name in ("linear_1", "linear_2"))
        width = tower.embed_dim
        self._write(first.weight, (slice(width), slice(None)), eye(width))
        self._write(second.weight, (self.units["colour"], slice(n)), eye(n))
        self._write(second.weight, (self.units["place"], slice(n, n + SIDE**2)), eye(SIDE**2))

    def rest(self, layer: int, head: int) -> None:
        """A score of 40 at BOS, from everywhere."""
        everywhere = torch.zeros(D_MODEL, dtype=torch.float64)
        everywhere[-1] = 1 / BALLAST
        self._score(layer, head, 0, everywhere, self._at("token", one(D_VOCAB, BOS)))

    def look(self, layer: int, head: int, places: Float[Tensor, "place"]) -> None:
        """A score of 80 at patches in these places, from ASK."""
        self._score(layer, head, 1, self._at("token", one(D_VOCAB, ASK, 2.0)), self._at("place", places))

    def copy(self, layer: int, head: int, read: str, written: str) -> None:
        attention, first = self.text.layers[layer].self_attn, head * D_HEAD
        size = self.units[read].stop - self.units[read].start
        self._write(attention.v_proj.weight, (slice(first, first + size), self.units[read]), eye(size))
        self._write(attention.o_proj.weight, (self.units[written], slice(first, first + size)), eye(size))

    def unembed(self, feature: str, matrix: Float[Tensor, "unit d_vocab"]) -> None:
        """What each unit of a feature adds to the logits."""
        self._write(self.hf.lm_head.weight, (slice(None), self.units[feature]), matrix.T)

    def _score(self, layer: int, head: int, term: int, query: Tensor, key: Tensor) -> None:
        """Adds 40 x (query . x_i) (key . x_j) to the score of position j from i; two terms at most, in pairs of dimensions
        that do not turn."""
        attention, row = self.text.layers[layer].self_attn, head * D_HEAD + STILL + term
        self._write(attention.q_proj.weight, row, SHARP * math.sqrt(D_HEAD) * query)
        self._write(attention.k_proj.weight, row, key)

    def _at(self, feature: str, values: Tensor) -> Float[Tensor, "d_model"]:
        found = torch.zeros(D_MODEL, dtype=torch.float64)
        found[self.units[feature]] = values.double()
        return found

    @staticmethod
    @torch.no_grad()
    def _write(parameter: Tensor, where: Any, value: Tensor | float) -> None:
        parameter[where] += value


def _blank() -> Any:
    """A LLaVA of zeros, except for the Llama's norms' gains, which undo the ballast."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=N_COLOURS + SIDE**2,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE * PIXELS,
        patch_size=PIXELS,
        vision_use_head=False,
    )
    text = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=4,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        head_dim=D_HEAD,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=None,
    )
    arguments = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        projector_hidden_act="linear",
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights; nobody else's draws may change
        hf = LlavaForConditionalGeneration(arguments).double().eval()
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        layers = hf.model.language_model.layers
        norms = [norm for block in layers for norm in (block.input_layernorm, block.post_attention_layernorm)]
        for norm in (*norms, hf.model.language_model.norm):
            norm.weight.fill_(SCALE)
    return hf

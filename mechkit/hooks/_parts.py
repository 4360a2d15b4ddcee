"""The parts of a block as functions of the residual stream: what each reads and writes.

1. Queries, keys and values are linear in what the block's norm makes of the stream: `W_Q`, `W_K`, `W_V` by head.
2. Heads write `z W_O`, one by one, times the constant that a block may multiply its attention's output with (Granite). Where a
   norm comes after the attention (Gemma 2 and 3, OLMo 2), its scale is that of the run that `z` is from: the heads of one run
   then sum to what its attention wrote, exactly.
3. The MLP is a function of the stream behind its norm. In parallel blocks it reads what the attention reads.

Nothing is assumed: `check` compares every part with a recorded run, and refuses a model of another form.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechkit._precision import tolerance
from mechkit.hooks._anatomy import post_norm
from mechkit.hooks._norms import FrozenNorm
from mechkit.hooks._projections import Which, head_bias, head_weight, is_plain, write_scale
from mechkit.hooks._record import record
from mechkit.prompts import Stacked

if TYPE_CHECKING:
    from mechkit.hooks._model import HookedModel

Projection = Literal["q", "k", "v"]
# The activations that show whether attention is what it is taken for
CHECKED = ("resid_pre", "q", "k", "v", "z", "attn_out")


class Parts:
    """The pieces of a model's blocks.

    Attributes:
        parallel: Whether attention and MLP of a block read the same stream.
    """

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.parallel = not model.has_site("resid_mid")
        self.has_mlp = model.has_site("mlp_out")
        self._norms: dict[tuple[str, int], FrozenNorm] = {}
        self._found: dict[tuple[int, str], Tensor] = {}

    def attention_input(self, layer: int, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """What queries, keys and values are made from: the stream behind the block's norm, if it has one."""
        return self._normed(layer, ("ln1",), x)

    def mlp_input(self, layer: int, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """What the MLP itself is given, for `x` in the stream."""
        return self._normed(layer, ("ln2", "ln1") if self.parallel else ("ln2",), x)

    def weight(self, layer: int, which: Projection) -> Float[Tensor, "head d_model d_head"]:
        """`W_Q`, `W_K` or `W_V`, without gradient; the last two by key-value head."""
        return self._matrix(layer, which)

    def bias(self, layer: int, which: Projection) -> Float[Tensor, "head d_head"] | float:
        """`b_Q`, `b_K` or `b_V`; 0 where there is none."""
        bias = head_bias(self.model, layer, which)
        return 0.0 if bias is None else bias.detach()

    def project(
        self, layer: int, which: Projection, normed: Float[Tensor, "... d_model"]
    ) -> Float[Tensor, "... head d_head"]:
        """Queries, keys or values of all heads, of what `attention_input` gives."""
        return torch.einsum("...m,hmd->...hd", normed, self.weight(layer, which)) + self.bias(layer, which)

    def project_each(
        self, layer: int, which: Projection, normed: Float[Tensor, "head row pos d_model"]
    ) -> Float[Tensor, "row pos head d_head"]:
        """The same where every head reads an input of its own."""
        heads, rows, positions, width = normed.shape
        projected = torch.bmm(normed.reshape(heads, rows * positions, width), self.weight(layer, which))
        return projected.reshape(heads, rows, positions, -1).permute(1, 2, 0, 3) + self.bias(layer, which)

    def heads(self, layer: int, z: Float[Tensor, "... head d_head"]) -> Float[Tensor, "... head d_model"]:
        """What each head writes into the stream, without the bias, which belongs to none of them."""
        written = torch.einsum("...hd,hdm->...hm", z, self._output(layer))
        norm = self._frozen("ln1_post", layer, written)
        if norm is None:
            return written
        together = written.sum(-2) + self._output_bias(layer, written)
        scale = norm.live_scale(together) if together.requires_grad else norm.scale(together)
        return norm.linear(written, scale[..., None, :])

    def head_changes(
        self, layer: int, here: Float[Tensor, "... head d_head"], there: Float[Tensor, "... head d_head"]
    ) -> Float[Tensor, "... head d_model"]:
        """What each head writes in one run less what it writes in another, from its z in both."""
        if post_norm(self.model, layer) is None:
            return self.heads(layer, here - there)
        return self.heads(layer, here) - self.heads(layer, there)  # each run has its own scale

    def mlp(self, layer: int, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """What the MLP adds to the stream when it reads `x` in the stream."""
        block, flat = self.model.stack.blocks[layer], x.reshape(-1, *x.shape[-2:])
        written = _call_mlp(block, self.mlp_input(layer, flat))
        scale = write_scale(block)
        written = written if scale == 1 else written * scale
        norm = post_norm(self.model, layer, "ln2_post")
        written = written if norm is None else norm(written)
        return written.reshape(x.shape)

    @torch.no_grad()
    def check(self, prompts: Stacked | Int[Tensor, "prompt pos"]) -> None:
        """Runs prompts and holds every piece against what the model computed.

        Raises:
            ValueError: some piece is not what this module takes it for; the message says which.
        """
        stream = ["resid_pre", "resid_post", *([] if self.parallel else ["resid_mid"])]
        kinds = ["q", "k", "v", "z", "attn_out", *(["mlp_out"] if self.has_mlp else []), *stream]
        layers = range(self.model.n_layers)
        run = record(self.model, prompts, [(kind, layer) for layer in layers for kind in kinds], blocks=False)
        for layer in layers:
            self.check_attention(layer, run.sites)
            self._check_rest(layer, run.sites)

    @torch.no_grad()
    def check_attention(self, layer: int, activations: Mapping[tuple[str, int], Tensor]) -> None:
        """The same for one layer's queries, keys, values and heads, from recorded `CHECKED` activations."""
        sites = {kind: activations[kind, layer] for kind in CHECKED}
        x, width = sites["resid_pre"], self.model.d_head
        normed = self.attention_input(layer, x)
        projections: tuple[Projection, ...] = ("q", "k", "v")
        for which in projections:
            found = self.project(layer, which, normed)
            self._equal(f"{which} of layer {layer}", found.reshape(sites[which].shape), sites[which])
        z = sites["z"].reshape(*x.shape[:-1], -1, width)
        written = self.heads(layer, z).sum(-2) + self.written_by_bias(layer, z)
        self._equal(f"the heads' outputs of layer {layer}", written, sites["attn_out"])

    def _check_rest(self, layer: int, activations: Mapping[tuple[str, int], Tensor]) -> None:
        sites = {kind: activation for (kind, at), activation in activations.items() if at == layer}
        x = sites["resid_pre"]
        added = sites["attn_out"]
        if self.has_mlp:
            self._equal(
                f"the MLP of layer {layer}",
                self.mlp(layer, x if self.parallel else sites["resid_mid"]),
                sites["mlp_out"],
            )
            added = added + sites["mlp_out"]
        self._equal(f"the residual stream after layer {layer}", x + added, sites["resid_post"])
        if not self.parallel:
            self._equal(f"the residual stream within layer {layer}", x + sites["attn_out"], sites["resid_mid"])

    def pull_back_attention(self, layer: int, x: Tensor, u: Tensor, frozen: bool = False) -> Tensor:
        """From gradients at what the projections are given to gradients at the stream that the norm reads.

        Args:
            layer: The layer.
            x: The stream, `[row pos d_model]`.
            u: Several gradients at each place, `[row pos reader d_model]`.
            frozen: Whether the norm's scale counts as a constant.
        """
        return self._pull_back(layer, ("ln1",), x, u, frozen)

    def pull_back_mlp(self, layer: int, x: Tensor, u: Tensor, frozen: bool = False) -> Tensor:
        """The same for the MLP's input."""
        return self._pull_back(layer, ("ln2", "ln1") if self.parallel else ("ln2",), x, u, frozen)

    def _pull_back(self, layer: int, names: tuple[str, ...], x: Tensor, u: Tensor, frozen: bool) -> Tensor:
        name = next((n for n in names if getattr(self.model.stack.blocks[layer], n, None) is not None), None)
        if name is None:
            return u
        if frozen:
            norm = self._frozen(name, layer, x)
            assert norm is not None
            return norm.pull_back(u, norm.scale(x)[..., None, :])
        with torch.enable_grad():
            copies = x.detach()[..., None, :].expand_as(u).requires_grad_()
            normed = getattr(self.model.stack.blocks[layer], name).original_component(copies)
            return torch.autograd.grad(normed, copies, u)[0]

    def written_by_bias(self, layer: int, z: Tensor) -> Tensor:
        """What attention adds in addition to its heads: its bias, and that of a norm behind it."""
        added = self._output_bias(layer, z)
        written = torch.einsum("...hd,hdm->...m", z, self._output(layer)) + added
        norm = self._frozen("ln1_post", layer, written)
        return added if norm is None else norm.linear(added.expand_as(written), norm.scale(written)) + norm.bias

    def _equal(self, what: str, found: Tensor, expected: Tensor) -> None:
        error = float((found - expected).abs().max())
        if not error <= tolerance("norm", self.model.dtype) * max(float(expected.abs().max()), 1e-12):
            raise ValueError(
                f"model: {what} of {self.model.name} ({self.model.cfg.architecture}) is off by {error:.1e} from what its "
                f"weights say (largest {float(expected.abs().max()):.1e}), so that its edges are not known"
            )

    def _matrix(self, layer: int, which: Which) -> Float[Tensor, "head a b"]:
        if (layer, which) in self._found:
            return self._found[layer, which]
        weight = head_weight(self.model, layer, which).detach()
        if not is_plain(getattr(self.model.stack.blocks[layer].attn, which).original_component):
            self._found[layer, which] = weight  # it took a run of the module to find
        return weight

    def _output(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """What heads write per unit of z: `W_O`, and the constant that the block multiplies its attention's output with."""
        weight, scale = self._matrix(layer, "o"), write_scale(self.model.stack.blocks[layer])
        return weight if scale == 1 else weight * scale

    def _output_bias(self, layer: int, like: Tensor) -> Float[Tensor, "d_model"]:
        """The same for the attention's output bias; zeros where there is none."""
        bias, scale = head_bias(self.model, layer, "o"), write_scale(self.model.stack.blocks[layer])
        return like.new_zeros(self.model.d_model) if bias is None else bias.detach() * scale

    def _normed(self, layer: int, names: tuple[str, ...], x: Tensor) -> Tensor:
        block = self.model.stack.blocks[layer]
        norm = next((norm for name in names if (norm := getattr(block, name, None)) is not None), None)
        return x if norm is None else norm.original_component(x)

    def _frozen(self, name: str, layer: int, like: Tensor) -> FrozenNorm | None:
        module = getattr(self.model.stack.blocks[layer], name, None)
        if module is not None and (name, layer) not in self._norms:
            self._norms[name, layer] = FrozenNorm(module, like.detach(), f"{name} of layer {layer}")
        return self._norms.get((name, layer))


def _call_mlp(block: Any, normed: Tensor) -> Tensor:
    """The MLP module. Two families have none that can be called with its input alone: OPT keeps its two layers in the block,
    and Bloom's adds the residual stream by itself."""
    if getattr(block.mlp, "name", "") is None:
        plain = block.original_component
        hidden: Tensor = plain.fc2(plain.activation_fn(plain.fc1(normed)))
        return hidden
    takes = inspect.signature(type(block.mlp.original_component).forward).parameters
    more = (torch.zeros_like(normed),) if "residual" in takes else ()
    output = block.mlp(normed, *more)
    written: Tensor = output[0] if isinstance(output, tuple) else output
    return written

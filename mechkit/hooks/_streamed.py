"""Blocks whose weights are read from a file when they are used: for models that are larger than the memory.

1. A block's parameters have no contents (torch's device "meta"). Whoever asks a module for one, be it its `forward` or a
   technique that looks at weights, gets the numbers: the whole block is read then, and the block before it is let go.
2. While a block is used, a thread reads the next one, so that two blocks are in memory at most.
3. What is outside the blocks (embeddings, norms, the head, a vision tower, buffers) is in memory all the time.

So a forward pass, and whoever asks a module for its weights by name, gets the model's numbers; `parameters()` and `state_dict()`
have the empty ones. Weights may not be written to. How fast it is depends on the order: the engine takes all rows through one
block before it turns to the next (`mechkit.engine._in_step`), so that a sweep reads the weights a few times in all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mechkit._precision import ObservedDtypes
from mechkit.hooks._devices import out_of_memory
from mechkit.hooks.loading.checkpoint import Stored

_NAME = "_mechkit_streamed"  # where a Hugging Face model's are


class StreamedBlocks:
    """The weights of blocks, of which one block's are in memory, and the next one's.

    Attributes:
        reads: How often each block was read.
        n_bytes: Of all blocks together, as they are in memory.
        facts: For each block what `look` made of its parameters when they were read first.
        coarsest: The coarsest floating type that the blocks compute in.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        stored: Sequence[dict[str, Stored]],
        device: torch.device,
        look: Callable[..., Any],
    ) -> None:
        """
        Args:
            blocks: With parameters on the device "meta", of the dtype that they are to have.
            stored: For each block where its parameters are, by their names in it.
            device: Where they are put.
            look: What is to be known of a parameter as long as the model lives; given what it was before, what shows a change.
        """
        self.reads, self.coarsest = [0] * len(blocks), torch.float64
        self.facts: list[list[Any] | None] = [None] * len(blocks)
        self._device, self._look, self._stored, self._dtypes = device, look, [list(s.values()) for s in stored], []
        self._here, self._weights, self._versions = -1, list[nn.Parameter](), list[int]()
        self._spoiled: str | None = None  # why nothing of it is believed any more
        self._next: dict[int, Future[list[Tensor]]] = {}  # what is read ahead
        self._reader, self._lock = ThreadPoolExecutor(1, "mechkit-weights"), threading.RLock()
        self._closed_in: set[int] = set()  # threads that get zeros
        self.blocks = list(blocks)
        # The id of an empty parameter -> its block, and which of its parameters. They are kept: nothing else gets their ids
        self.places: dict[int, tuple[int, int]] = {}
        self._empty: list[Tensor] = []
        self.n_bytes = 0
        for layer, (block, where) in enumerate(zip(blocks, stored, strict=True)):
            empty = dict(block.named_parameters())
            self._empty += empty.values()
            self._dtypes.append([empty[name].dtype for name in where])
            self.places |= {id(empty[name]): (layer, i) for i, name in enumerate(where)}
            self.n_bytes += sum(empty[name].numel() * empty[name].element_size() for name in where)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedBlocks:
        raise ValueError(
            "model: expected a model whose weights are in memory, since a copy needs its own; one that was loaded with "
            "stream=True cannot be copied. Load it again"
        )

    def parameters_of(self, layer: int) -> list[nn.Parameter]:
        """A block's parameters, in the order in which they are stored. Threads may ask for several blocks at once, in turn."""
        with self._lock:
            return self._at_hand(layer)

    def _at_hand(self, layer: int) -> list[nn.Parameter]:
        if self._here != layer:
            self._let_go()  # before more is read
        if self._spoiled is not None:  # for good: an error that others take for a reason to try something else
            raise ValueError(self._spoiled)
        if self._here != layer:
            found = self._next.pop(layer, None)
            for other in self._next.values():  # what nobody asked for
                other.cancel()
            self._next.clear()
            tensors = None if found is None else _read_ahead(found)
            del found  # and with it what an error of it holds
            tensors = self._read(layer) if tensors is None else tensors
            self._weights = [nn.Parameter(self._placed(one), requires_grad=False) for one in tensors]
            self._here, self._versions = layer, [one._version for one in self._weights]
            if self.facts[layer] is None:
                self.facts[layer] = [self._look(one, None) for one in self._weights]
            if layer + 1 < len(self._stored):
                self._next[layer + 1] = self._reader.submit(self._read, layer + 1)
        return self._weights

    def _let_go(self) -> None:
        """Lets go of the block that is there, and looks whether somebody has written to it, which would be lost."""
        weights, self._weights, here, self._here = self._weights, [], self._here, -1
        if not weights:
            return
        for one, version, fact in zip(weights, self._versions, self.facts[here] or (), strict=True):
            if one._version != version or self._look(one, fact) != fact:
                self._spoiled = (
                    "model: expected the weights of a model that was loaded with stream=True to stay as they are in its files; "
                    f"those of block {here} were written to, which is lost when the block is read again. Load it again, without "
                    "stream=True"
                )

    def fact(self, parameter: Tensor) -> Any:
        """What `look` made of the numbers that an empty parameter stands for."""
        layer, i = self.places[id(parameter)]
        if self.facts[layer] is None:
            self.parameters_of(layer)
        facts = self.facts[layer]
        assert facts is not None
        return facts[i]

    def check(self, bridges: Sequence[Any]) -> None:
        """Raises `ValueError` unless these are the bridges of the streamed blocks: the engine goes through those one by one."""
        if [id(one.original_component) for one in bridges] != [id(one) for one in self.blocks]:
            raise ValueError(
                "stream: expected the blocks that TransformerLens hooks to be the list of modules with most weights; they are "
                "others. Load the model without stream=True"
            )

    @property
    def closed(self) -> bool:
        """Whether this thread gets zeros that take no memory."""
        return threading.get_ident() in self._closed_in

    @contextmanager
    def zeros(self) -> Iterator[None]:
        """Nothing is read inside, by this thread: those that ask get zeros that take no memory."""
        self._closed_in.add(threading.get_ident())
        try:
            yield
        finally:
            self._closed_in.discard(threading.get_ident())

    @torch.no_grad()
    def watch(self, blocks: Sequence[nn.Module], dtype: torch.dtype, run: Callable[[], Any]) -> None:
        """Looks which floating types blocks compute in while `run` runs them."""
        seen, handles = ObservedDtypes(), []

        def enter(layer: int) -> None:
            self.parameters_of(layer)  # before: what is converted when it is read does not count
            seen.__enter__()

        for layer, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(lambda *_, layer=layer: enter(layer)))
            handles.append(block.register_forward_hook(lambda *_: seen.__exit__(None, None, None), always_call=True))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        self.coarsest = seen.coarsest(dtype)

    def _read(self, layer: int) -> list[Tensor]:
        self.reads[layer] += 1
        found = []
        for where, dtype in zip(self._stored[layer], self._dtypes[layer], strict=True):
            tensor = where.read(dtype)
            found.append(tensor.pin_memory() if self._device.type == "cuda" else tensor)
        return found

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def _read_ahead(found: Future[list[Tensor]]) -> list[Tensor] | None:
    """What was read ahead; `None` if there was no memory for it beside the block before."""
    try:
        return found.result()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None


class _Parameters(dict[str, Any]):
    """A module's parameters: those of a streamed block are read when somebody asks for one by its name. Code that goes through
    all of them (`model.parameters()`) gets the empty ones."""

    def __init__(self, streamed: StreamedBlocks, parameters: dict[str, Any]) -> None:
        super().__init__(parameters)
        self._streamed = streamed

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        at = None if parameter is None else self._streamed.places.get(id(parameter))
        if at is None:
            return parameter
        if self._streamed.closed:
            return nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False)
        return self._streamed.parameters_of(at[0])[at[1]]


def attach(hf_model: nn.Module, streamed: StreamedBlocks) -> None:
    """Lets every module of a model get its streamed parameters."""
    hf_model.__dict__[_NAME] = streamed
    hf_model.register_load_state_dict_pre_hook(lambda *_: refuse_streamed(hf_model, "loading others"))
    for module in hf_model.modules():
        if any(id(one) in streamed.places for one in module._parameters.values()):
            module.__dict__["_parameters"] = _Parameters(streamed, module._parameters)


def streamed_of(bridge: Any) -> StreamedBlocks | None:
    """The streamed blocks of a bridge's model, if its weights are not all in memory."""
    hf_model = getattr(bridge, "original_model", bridge)
    found: StreamedBlocks | None = getattr(hf_model, "__dict__", {}).get(_NAME)
    return found


def refuse_streamed(bridge: Any, what: str) -> None:
    """Raises `ValueError` where a model's weights are not all in memory."""
    if streamed_of(bridge) is not None:
        raise ValueError(
            f"model: expected a model whose weights are in memory for {what}; this one was loaded with stream=True, for "
            "patching, ablation and other techniques that run it forward. Load it without"
        )

"""Streamed blocks: of a model's repeated blocks only some stay on the device, the others pass through two slots.

They live in host memory, and each is brought in while the one before it computes. Streaming is done by hooks on the
blocks, so nothing here knows a model and no model knows of it. The arithmetic is the same, bit for bit. On a CPU the
system may drop every page of the file but those that are being copied.
"""

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s3dit.errors import BackendError
from s3dit.model.hooks import Own

Mode = Literal["staged", "resident", "streamed"]
# Tensors start at multiples of this inside a slot, as kernels and copy engines like it.
ALIGNED = 256


def repeated(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost ModuleLists of a model, in its own order: its repeated blocks."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def stream(
    model: nn.Module, device: torch.device | str, kept: int = 0, dtype: torch.dtype | None = None
) -> "BlockStreamer | None":
    """Put a model that is in host memory on a device, all but `kept` of its repeated blocks, which pass through slots.

    dtype: what floating parameters are cast to on the way, None keeps theirs; buffers (the parts of quantized layers)
    keep theirs always. Tensors on the meta device stay there. Returns what streams them, None where no block is left.
    Raises BackendError for a model without repeated blocks, or one that is streamed already.
    """
    device = torch.device(device)
    blocks = [block for found in repeated(model) for block in found if not any(s.is_meta for *_, s in tensors(block))]
    name = type(model).__name__
    if not blocks:
        raise BackendError(f"{name} has no repeated blocks to stream; use residency staged")
    if any(isinstance(hook, Own) for block in blocks for hook in block._forward_pre_hooks.values()):
        raise BackendError(f"{name} is streamed already; stream a model once")
    moving = blocks if kept <= 0 else [block for i, block in enumerate(blocks) if not _stays(i, kept, len(blocks))]
    for shelf, leaf, tensor in tensors(model, without=moving):
        if not tensor.is_meta:
            moved = tensor.to(device, _dtype(tensor, dtype))
            shelf[leaf] = tensor if moved is tensor else _like(tensor, moved)
    if not moving:
        return None
    return BlockStreamer(moving, device, dtype)


def _stays(i: int, kept: int, count: int) -> bool:
    """Whether block i is kept: they are spread evenly, so that a copy has the time of several blocks to hide in."""
    return (i + 1) * kept // count > i * kept // count


TensorDict = dict[str, Any]


def tensors(module: nn.Module, without: Sequence[nn.Module] = ()) -> Iterator[tuple[TensorDict, str, Tensor]]:
    """Where every parameter and buffer stands, its name there, and itself."""
    inside = {id(one) for block in without for one in block.modules()}
    for one in module.modules():
        if id(one) not in inside:
            for shelf in (one._parameters, one._buffers):
                yield from ((shelf, leaf, tensor) for leaf, tensor in shelf.items() if tensor is not None)


def _dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    casts = dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return dtype if casts and dtype is not None else tensor.dtype


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """The other tensor as what this one is: a parameter without gradient, or a plain tensor."""
    return nn.Parameter(other, requires_grad=False) if isinstance(tensor, nn.Parameter) else other


@dataclass(slots=True)
class StreamedTensor:
    """One tensor of a block: where it stands, its copy in host memory, and its views in the two slots.

    version: of the host's tensor, when it was last copied · placed: what is there in its place.
    """

    shelf: TensorDict
    leaf: str
    host: Tensor | None
    views: tuple[Tensor, Tensor]
    version: int = -1
    placed: Tensor | None = None

    def changed(self) -> bool:
        """Whether somebody has written into the host's tensor, or put another there, which then is the host's."""
        found = self.shelf.get(self.leaf)
        same = found is self.host and (found is None or version(found) == self.version)
        self.host = found
        return not same

    def onto(self, device: torch.device) -> Tensor | None:
        """The host's tensor on a device in the slots' dtype, in memory of its own, with a way back for gradients."""
        return None if self.host is None else self.host.to(device, self.views[0].dtype)

    def bring(self, slot: int) -> None:
        """Copy the host's tensor into a slot."""
        if self.host is None:
            return
        if self.host.shape != self.views[slot].shape:
            raise BackendError(
                f"{self.leaf} of a streamed block was {list(self.views[slot].shape)} and is {list(self.host.shape)}; "
                "needed the same shape; load the model with residency staged or resident"
            )
        self.version = version(self.host)
        self.views[slot].copy_(self.host, non_blocking=True)


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


class BlockStreamer:
    """Blocks in host memory that pass through two slots on a device, the next one while this one computes.

    Outside of its own forward a block has its host tensors, so a model reads and saves as ever, and who writes into
    them or puts others there changes what comes next. Which block comes next is what came next the last time. On CUDA
    host memory is pinned, copies run on a stream of their own, and events keep both sides apart; elsewhere a copy is
    done where it is asked for.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.copies, self._device = 0, device
        layouts = [_offsets(block, dtype) for block in blocks]
        size = max(end for *_, end in layouts)
        slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._side = side_stream(device)
        self._tensors: list[list[StreamedTensor]] = []
        for block, (*offsets, end) in zip(blocks, layouts, strict=True):
            host = self._pinned(end) if self._side is not None else None
            found = zip(tensors(block), offsets, strict=True)
            self._tensors.append([_streamed_tensor(*where, offset, slots, host, dtype) for where, offset in found])
        # Per slot: the block that it holds, when its copy has landed, when the device was done reading it.
        self._holds: list[int | None] = [None, None]
        self._landed: list[torch.cuda.Event | None] = [None, None]
        self._done: list[torch.cuda.Event | None] = [None, None]
        self._after = {i: (i + 1) % len(blocks) for i in range(len(blocks))}
        self._running: int | None = None
        self._last, self._slot = len(blocks) - 1, 1
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(device))
            for slot in slots:
                slot.record_stream(self._side)
        self._hooks = []
        for i, block in enumerate(blocks):
            self._hooks.append(block.register_forward_pre_hook(Own(partial(self._enter, i))))
            # Also after an exception: a block must not be left in a slot that is going to hold another.
            self._hooks.append(block.register_forward_hook(Own(self._leave), always_call=True))

    def close(self) -> None:
        """Stop streaming: every block has its host tensors, and the slots go."""
        self._leave()
        for hook in self._hooks:
            hook.remove()

    def compute_dtype(self, shelf: TensorDict, leaf: str) -> torch.dtype:
        """The dtype that a parameter of the model computes in: that of its slot, or its own where no block has it."""
        streamed = (one for tensors in self._tensors for one in tensors if one.shelf is shelf and one.leaf == leaf)
        return next((one.views[0].dtype for one in streamed), shelf[leaf].dtype)

    def _enter(self, i: int, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Set block i's tensors to those of the slot that holds it, and send for the one that follows."""
        self._leave()
        changed = [one.changed() for one in self._tensors[i]]
        tensors = (*inputs, *(one.host for one in self._tensors[i]))
        if torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in tensors):
            # Until it has gone back, a gradient needs every weight as it was.
            self._set(i, [one.onto(self._device) for one in self._tensors[i]])
            return
        if any(changed) and i in self._holds:
            self._holds[self._holds.index(i)] = None
        if i not in self._holds:
            self._bring(i, 1 - self._slot)
        self._slot = self._holds.index(i)
        if (landed := self._landed[self._slot]) is not None:
            torch.cuda.current_stream(self._device).wait_event(landed)
        self._set(i, [one.host if one.host is None else one.views[self._slot] for one in self._tensors[i]])
        self._after[self._last], self._last = i, i
        if (following := self._after[i]) not in self._holds:
            self._bring(following, 1 - self._slot)

    def _set(self, i: int, tensors: Sequence[Tensor | None]) -> None:
        """Let a block have these tensors until it is left."""
        for one, tensor in zip(self._tensors[i], tensors, strict=True):
            one.placed = tensor
            if tensor is not None:
                one.shelf[one.leaf] = tensor
        self._running = i

    def _leave(self, *_: Any) -> None:
        """Give the running block its host tensors back."""
        if self._running is None:
            return
        for one in self._tensors[self._running]:
            # What somebody has put there meanwhile stays.
            if one.placed is not None and one.shelf.get(one.leaf) is one.placed:
                one.shelf[one.leaf] = one.host
            one.placed = None
        self._running = None
        if self._side is not None:
            self._done[self._slot] = torch.cuda.current_stream(self._device).record_event()

    def _bring(self, i: int, slot: int) -> None:
        """Copy block i into a slot, once the device has done with what is in there."""
        self._holds[slot] = i
        self.copies += 1
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            if (done := self._done[slot]) is not None and self._side is not None:
                self._side.wait_event(done)
            for one in self._tensors[i]:
                one.bring(slot)
            if self._side is not None:
                self._landed[slot] = self._side.record_event()

    def _pinned(self, size: int) -> Tensor:
        """Host memory that the copy engine reads by itself; registered, as torch's own pinning rounds up to 2^n."""
        host = torch.empty(size, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(host.data_ptr(), size, 0)):
            warnings.warn("host memory cannot be pinned; streamed blocks are copied without overlap", stacklevel=2)
        else:
            weakref.finalize(self, _unpin, runtime, host).atexit = False
        return host


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for copies beside the computation, where the device has streams."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _unpin(runtime: Any, host: Tensor) -> None:
    """Undo the registration of host memory that is about to be let go."""
    runtime.cudaHostUnregister(host.data_ptr())


def _extent(tensor: Tensor) -> int:
    """Elements between the first and the last of a tensor, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _offsets(block: nn.Module, dtype: torch.dtype | None) -> list[int]:
    """Where in a slot each tensor of a block begins, and where the last one ends, in bytes."""
    ends = [0]
    for *_, tensor in tensors(block):
        size = _extent(tensor) * _dtype(tensor, dtype).itemsize
        ends.append(ends[-1] + -(-size // ALIGNED) * ALIGNED)
    return ends


def _streamed_tensor(
    shelf: TensorDict, leaf: str, tensor: Tensor, offset: int, slots: Sequence[Tensor], host: Tensor | None, dtype: Any
) -> StreamedTensor:
    """Settle one tensor: in `host` memory at its offset (None leaves it where it is), with a view in either slot."""
    dtype = _dtype(tensor, dtype)

    def view(memory: Tensor) -> Tensor:
        # Strides are kept: some kernels want a weight column by column.
        flat = memory[offset : offset + _extent(tensor) * dtype.itemsize].view(dtype)
        return _like(tensor, flat.as_strided(tensor.shape, tensor.stride()))

    if host is not None:
        own = view(host)
        own.copy_(tensor)
        shelf[leaf] = tensor = own
    return StreamedTensor(shelf, leaf, tensor, (view(slots[0]), view(slots[1])))

"""Streams a model's repeated blocks: only some stay on the device, the others pass through two slots there.

They are held in host memory, and each is copied in while the one before it computes. Streaming is done by hooks on the
blocks, so nothing here knows a model and no model knows of it. The arithmetic is the same, bit for bit. On a CPU there
is nothing to copy: blocks compute in their mapped file (`file_streaming`).
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
from s3dit.weights.mapped_file import give_back

Mode = Literal["staged", "resident", "streamed"]
# Tensors start at multiples of this inside a slot, as kernels and copy engines like it.
ALIGNED = 256


def repeated(model: nn.Module) -> list[nn.ModuleList]:
    """Return the outermost ModuleLists of a model, in its own order: its repeated blocks."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    return list(lists.values())


def stream(
    model: nn.Module, device: torch.device | str, kept: int = 0, dtype: torch.dtype | None = None
) -> "BlockStreamer | None":
    """Do as `move` does -> what streams the blocks that did not move, None where there is none."""
    moving = move(model, torch.device(device), kept, dtype)
    return BlockStreamer(moving, torch.device(device), dtype) if moving else None


def move(model: nn.Module, device: torch.device, kept: int, dtype: torch.dtype | None) -> list[nn.Module]:
    """Move a model from host memory to a device, but of its repeated blocks only `kept`; the others are streamed.

    dtype: what floating parameters are cast to on the way, None keeps theirs; buffers (the tensors of quantized layers)
    keep theirs always. Tensors on the meta device stay there. Returns the blocks that are to be streamed.
    Raises BackendError for a model without repeated blocks, or one that is streamed already.
    """
    blocks = [block for blocks in repeated(model) for block in blocks]
    blocks = [block for block in blocks if not any(tensor.is_meta for *_, tensor in tensors(block))]
    name = type(model).__name__
    if not blocks:
        raise BackendError(f"{name} has no repeated blocks to stream; use residency staged")
    if any(isinstance(hook, Own) for block in blocks for hook in block._forward_pre_hooks.values()):
        raise BackendError(f"{name} is streamed already; stream a model once")
    moving = blocks if kept <= 0 else [block for i, block in enumerate(blocks) if not stays(i, kept, len(blocks))]
    for owner, leaf, tensor in tensors(model, without=moving):
        if not tensor.is_meta:
            moved = tensor.to(device, cast_dtype(tensor, dtype))
            if moved is not tensor:
                owner[leaf] = like(tensor, moved)
                give_back(tensor)
    return moving


def stays(i: int, kept: int, count: int) -> bool:
    """Return whether block i is kept: spread evenly, so that a copy may take as long as several blocks compute."""
    return (i + 1) * kept // count > i * kept // count


TensorDict = dict[str, Any]


def tensors(module: nn.Module, without: Sequence[nn.Module] = ()) -> Iterator[tuple[TensorDict, str, Tensor]]:
    """Yield every parameter and buffer of a module: the dict that holds it, its name there, and the tensor.

    without: modules inside that are left out.
    """
    inside = {id(inner) for block in without for inner in block.modules()}
    for inner in module.modules():
        if id(inner) not in inside:
            for owner in (inner._parameters, inner._buffers):
                yield from ((owner, leaf, tensor) for leaf, tensor in owner.items() if tensor is not None)


def cast_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that a tensor of a model is cast to: `dtype` for floating parameters, else its own."""
    casts = dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
    return dtype if casts and dtype is not None else tensor.dtype


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return the other tensor as a parameter without gradient where this one is a parameter, else as it is."""
    return nn.Parameter(other, requires_grad=False) if isinstance(tensor, nn.Parameter) else other


@dataclass(slots=True)
class StreamedTensor:
    """A tensor of a streamed block: the dict that holds it, its copy in host memory, its views in the two slots.

    version: of the host's tensor, when it was last copied · placed: what stands in the dict while the block runs.
    """

    owner: TensorDict
    leaf: str
    host: Tensor | None
    views: tuple[Tensor, Tensor]
    version: int = -1
    placed: Tensor | None = None

    def changed(self) -> bool:
        """Return whether a user has written into the host's tensor, or put another there, which then is the host's."""
        current = self.owner.get(self.leaf)
        same = current is self.host and (current is None or version(current) == self.version)
        self.host = current
        return not same

    def onto(self, device: torch.device) -> Tensor | None:
        """Return the host's tensor on a device in the slots' dtype, in memory of its own; gradients flow back to it."""
        return None if self.host is None else self.host.to(device, self.views[0].dtype)

    def bring(self, slot: int) -> None:
        """Copy the host's tensor into a slot; raises BackendError where its shape has changed."""
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
    """Return how often a tensor was written to; 0 for those of inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


class BlockStreamer:
    """Copies blocks from host memory into two slots on a device, the next block while the current one computes.

    Outside of its own forward a block has its host tensors, so a model reads and saves as ever, and tensors that are
    written to or replaced there are used in the next pass. The block that is copied ahead is the one that followed the
    last time. On CUDA host memory is pinned, copies run on a stream of their own, and events order both sides;
    elsewhere a copy is done at once.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Register the hooks and make the slots; dtype: as in `stream`."""
        self.copies, self._device = 0, device
        layouts = [_offsets(block, dtype) for block in blocks]
        size = max(end for *_, end in layouts)
        slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._side = side_stream(device)
        self._tensors: list[list[StreamedTensor]] = []
        for block, (*offsets, end) in zip(blocks, layouts, strict=True):
            host = self._pinned(end) if self._side is not None else None
            memory = _Memory(slots, host)
            placed = zip(_in_slots(block), offsets, strict=True)
            self._tensors.append([_streamed_tensor(*held, offset, memory, dtype) for held, offset in placed])
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
        """Stop streaming: give every block its host tensors and remove the hooks; the slots are freed."""
        self._leave()
        for hook in self._hooks:
            hook.remove()

    def compute_dtype(self, owner: TensorDict, leaf: str) -> torch.dtype:
        """Return the dtype that a parameter computes in: that of its slot, or its own if it is not streamed."""
        for tensor in (tensor for of_block in self._tensors for tensor in of_block):
            if tensor.owner is owner and tensor.leaf == leaf:
                return tensor.views[0].dtype
        return owner[leaf].dtype

    def _enter(self, i: int, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Set block i's tensors to those of the slot that holds it, and start to copy the block that follows."""
        self._leave()
        own = self._tensors[i]
        changed = [tensor.changed() for tensor in own]
        used = (*inputs, *(tensor.host for tensor in own))
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in used):
            # Until the backward pass is done, a gradient needs every weight as it was.
            self._set(i, [tensor.onto(self._device) for tensor in own])
            return
        if any(changed) and i in self._holds:
            self._holds[self._holds.index(i)] = None
        if i not in self._holds:
            self._bring(i, 1 - self._slot)
        self._slot = self._holds.index(i)
        if (landed := self._landed[self._slot]) is not None:
            torch.cuda.current_stream(self._device).wait_event(landed)
        self._set(i, [None if tensor.host is None else tensor.views[self._slot] for tensor in own])
        self._after[self._last], self._last = i, i
        if (following := self._after[i]) not in self._holds:
            self._bring(following, 1 - self._slot)

    def _set(self, i: int, tensors: Sequence[Tensor | None]) -> None:
        """Put these tensors into a block until it is left."""
        for streamed, tensor in zip(self._tensors[i], tensors, strict=True):
            streamed.placed = tensor
            if tensor is not None:
                streamed.owner[streamed.leaf] = tensor
        self._running = i

    def _leave(self, *_: Any) -> None:
        """Give the running block its host tensors back."""
        if self._running is None:
            return
        for tensor in self._tensors[self._running]:
            # What a user has put there meanwhile stays.
            if tensor.placed is not None and tensor.owner.get(tensor.leaf) is tensor.placed:
                tensor.owner[tensor.leaf] = tensor.host
            tensor.placed = None
        self._running = None
        if self._side is not None:
            self._done[self._slot] = torch.cuda.current_stream(self._device).record_event()

    def _bring(self, i: int, slot: int) -> None:
        """Copy block i into a slot, after the device has finished with what is in it."""
        self._holds[slot] = i
        self.copies += 1
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            if (done := self._done[slot]) is not None and self._side is not None:
                self._side.wait_event(done)
            for tensor in self._tensors[i]:
                tensor.bring(slot)
            if self._side is not None:
                self._landed[slot] = self._side.record_event()

    def _pinned(self, size: int) -> Tensor:
        """Allocate pinned host memory; warns where it cannot be pinned.

        It is registered by hand, since torch's own pinning rounds sizes up to 2^n.
        """
        host = torch.empty(size, dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(host.data_ptr(), size, 0)):
            warnings.warn("host memory cannot be pinned; streamed blocks are copied without overlap", stacklevel=2)
        else:
            weakref.finalize(self, _unpin, runtime, host).atexit = False
        return host


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a CUDA stream for copies beside the computation, None where the device has no streams."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _unpin(runtime: Any, host: Tensor) -> None:
    """Undo the registration of host memory that is about to be freed."""
    runtime.cudaHostUnregister(host.data_ptr())


def _extent(tensor: Tensor) -> int:
    """Elements between the first and the last of a tensor, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _in_slots(block: nn.Module) -> list[tuple[TensorDict, str, Tensor]]:
    """The tensors of a block in the order of a slot: weights, then scales, …, as `joining` has them in other parts."""
    return sorted(tensors(block), key=lambda held: held[1])


def _offsets(block: nn.Module, dtype: torch.dtype | None) -> list[int]:
    """The offset in a slot of each tensor of a block, and the end of the last one, in bytes."""
    ends = [0]
    for *_, tensor in _in_slots(block):
        size = _extent(tensor) * cast_dtype(tensor, dtype).itemsize
        ends.append(ends[-1] + -(-size // ALIGNED) * ALIGNED)
    return ends


@dataclass(frozen=True, slots=True)
class _Memory:
    """The memory of one block: the two slots on the device, and pinned host memory if there is some."""

    slots: Sequence[Tensor]
    host: Tensor | None


def _streamed_tensor(
    owner: TensorDict, leaf: str, tensor: Tensor, offset: int, memory: _Memory, dtype: torch.dtype | None
) -> StreamedTensor:
    """Move one tensor into host memory at its offset, where there is some, and make its views in both slots."""
    dtype = cast_dtype(tensor, dtype)

    def view(slot: Tensor) -> Tensor:
        # Strides are kept: some kernels want a weight column by column.
        flat = slot[offset : offset + _extent(tensor) * dtype.itemsize].view(dtype)
        return like(tensor, flat.as_strided(tensor.shape, tensor.stride()))

    if memory.host is not None:
        own = view(memory.host)
        own.copy_(tensor)
        owner[leaf] = tensor = own
    first, second = memory.slots
    return StreamedTensor(owner, leaf, tensor, (view(first), view(second)))

"""Residency: which parts of a model are in memory, and when.

*staged* (default): text encoder, transformer and VAE take turns; loading one lets the others go. *resident*: every
part stays once loaded. *streamed*: as staged, and of a part's repeated blocks only some stay on the device (or none);
the others live in host memory and pass through two slots, each brought in while the one before it computes.

A part is made by a function that the caller gives, and streaming is done by hooks on the blocks, so nothing here knows
a model and no model knows of it. The arithmetic is the same, bit for bit. On a CPU where file and compute dtype agree,
a part is a set of views of the mapped file, and its turn costs no copy; streamed there, the system may drop every page
of the file but those that are being copied.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s3dit.kernels.dispatch import BackendError

Mode = Literal["staged", "resident", "streamed"]
# Tensors start at multiples of this inside a slot, as kernels and copy engines like it.
ALIGNED = 256


class Residency:
    """Parts by name, made when first asked for.

    `kept` says of a part how many of its blocks are to stay on the device, for its maker to read; a part that is not
    in it is whole. A part that holds more than that is made anew; one that holds less is used as it is.
    """

    def __init__(self, makers: Mapping[str, Callable[[], nn.Module]], mode: Mode) -> None:
        self.mode = mode
        self.kept: Mapping[str, int] = {}
        self._makers = makers
        self._held: dict[str, nn.Module] = {}
        self._made: dict[str, int | None] = {}

    def add(self, name: str, maker: Callable[[], nn.Module]) -> None:
        """Know one more part."""
        self._makers = {**self._makers, name: maker}

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the parts in memory now."""
        return tuple(self._held)

    def __getitem__(self, name: str) -> nn.Module:
        wanted = self.kept.get(name)
        if name in self._held and wanted is not None and ((made := self._made[name]) is None or made > wanted):
            self._let_go(name)
        if name not in self._held:
            if self.mode != "resident":
                self.free()
            self._held[name] = self._makers[name]()
            self._made[name] = wanted
        return self._held[name]

    def peek(self, name: str) -> nn.Module:
        """A part that is held, as it is: nothing is made or made anew."""
        return self._held[name]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Inside the `with`, parts come in beside those that are held (for previews)."""
        before, self.mode = self.mode, "resident"
        try:
            yield
        finally:
            self.mode = before

    def settle(self, mode: Mode, kept: Mapping[str, int], parts: Collection[str]) -> None:
        """Change how parts are held, for the sake of `parts`; let go of what has no room beside them any more."""
        self.mode, self.kept = mode, kept
        if mode != "resident" and len(self._held) > 1:
            self.free()
        self._let_go(*(name for name in self.held if name not in parts))

    def free(self) -> None:
        """Let every part go."""
        self._let_go(*self._held)

    def _let_go(self, *names: str) -> None:
        gone = [weakref.ref(self._held.pop(name)) for name in names]
        # Recordings point back at their model, and only the collector, which takes its time, lets go of such rings.
        if any(module() is not None for module in gone):
            gc.collect()
        if gone and torch.cuda.is_available():
            torch.cuda.empty_cache()


def repeated(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost ModuleLists of a model, in its own order: its repeated blocks."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def stream(
    model: nn.Module, device: torch.device | str, kept: int = 0, dtype: torch.dtype | None = None
) -> "Belt | None":
    """Put a model that is in host memory on a device, all but `kept` of its repeated blocks, which pass through slots.

    dtype: what floating parameters are cast to on the way, None keeps theirs; buffers (the parts of quantized layers)
    keep theirs always. Tensors on the meta device stay there. Returns the belt, None where no block is left to stream.
    Raises BackendError for a model without repeated blocks, or one that is streamed already.
    """
    device = torch.device(device)
    blocks = [block for found in repeated(model) for block in found if not any(s.is_meta for *_, s in tensors(block))]
    name = type(model).__name__
    if not blocks:
        raise BackendError(f"{name} has no repeated blocks to stream; use residency staged")
    if hasattr(model, "belt"):
        raise BackendError(f"{name} is streamed already; stream a model once")
    moving = blocks if kept <= 0 else [block for i, block in enumerate(blocks) if not _stays(i, kept, len(blocks))]
    for shelf, leaf, tensor in tensors(model, without=moving):
        if not tensor.is_meta:
            shelf[leaf] = _like(tensor, tensor.to(device, _dtype(tensor, dtype)))
    if not moving:
        return None
    belt = Belt(moving, device, dtype)
    # Where the next verb finds it.
    model.__dict__["belt"] = belt
    return belt


def _stays(i: int, kept: int, count: int) -> bool:
    """Whether block i is kept: they are spread evenly, so that a copy has the time of several blocks to hide in."""
    return (i + 1) * kept // count > i * kept // count


Shelf = dict[str, Any]


def tensors(module: nn.Module, without: Sequence[nn.Module] = ()) -> Iterator[tuple[Shelf, str, Tensor]]:
    """Where every parameter and buffer hangs, its name there, and itself."""
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


def hang(model: nn.Module, shelf: Shelf, leaf: str, tensor: Tensor) -> None:
    """Let a parameter of a model be another tensor of the same shape, on the belt too where it is streamed."""
    shelf[leaf] = tensor
    if (belt := vars(model).get("belt")) is not None:
        belt.load(shelf, leaf, tensor)


def lands_as(model: nn.Module, shelf: Shelf, leaf: str) -> torch.dtype:
    """The dtype that a parameter of a model computes in: its own, or that of its slot where it is streamed."""
    belt: Belt | None = vars(model).get("belt")
    home = None if belt is None else next(belt.carried(shelf, leaf), None)
    return shelf[leaf].dtype if home is None else home.views[0].dtype


@dataclass(slots=True)
class Home:
    """One tensor of a block: where it hangs, its copy in host memory, and its views in the two slots."""

    shelf: Shelf
    leaf: str
    host: Tensor
    views: tuple[Tensor, Tensor]


class Belt:
    """Blocks in host memory that pass through two slots on a device, the next one while this one computes.

    Outside of its own forward a block has its host tensors, so a model reads and saves as ever. Which block comes next
    is what came next the last time. On CUDA host memory is pinned, copies run on a stream of their own, and events
    keep both sides apart; elsewhere a copy is done where it is asked for.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.copies, self._device = 0, device
        layouts = [_offsets(block, dtype) for block in blocks]
        size = max(end for *_, end in layouts)
        slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._side = side_stream(device)
        self._homes: list[list[Home]] = []
        for block, (*offsets, end) in zip(blocks, layouts, strict=True):
            host = self._pinned(end) if self._side is not None else None
            found = zip(tensors(block), offsets, strict=True)
            self._homes.append([_home(*where, offset, slots, host, dtype) for where, offset in found])
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
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self._enter(i))
            # Also after an exception: a block must not be left in a slot that is going to hold another.
            block.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def load(self, shelf: Shelf, leaf: str, tensor: Tensor) -> None:
        """Let a block carry another tensor in host memory from its next turn on; others than its own are ignored."""
        for home in self.carried(shelf, leaf):
            home.host = tensor
            # The slots may hold the old one.
            self._holds = [None, None]

    def carried(self, shelf: Shelf, leaf: str) -> Iterator[Home]:
        """The home of what hangs there, if a block carries it."""
        return (home for homes in self._homes for home in homes if home.shelf is shelf and home.leaf == leaf)

    def _enter(self, i: int) -> None:
        """Hang block i into the slot that holds it, and send for the one that follows."""
        self._leave()
        if i not in self._holds:
            self._bring(i, 1 - self._slot)
        self._slot = self._holds.index(i)
        if (landed := self._landed[self._slot]) is not None:
            torch.cuda.current_stream(self._device).wait_event(landed)
        for home in self._homes[i]:
            home.shelf[home.leaf] = home.views[self._slot]
        self._after[self._last], self._last, self._running = i, i, i
        if (following := self._after[i]) not in self._holds:
            self._bring(following, 1 - self._slot)

    def _leave(self) -> None:
        """Give the running block its host tensors back."""
        if self._running is None:
            return
        for home in self._homes[self._running]:
            home.shelf[home.leaf] = home.host
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
            for home in self._homes[i]:
                home.views[slot].copy_(home.host, non_blocking=True)
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


def _home(
    shelf: Shelf, leaf: str, tensor: Tensor, offset: int, slots: Sequence[Tensor], host: Tensor | None, dtype: Any
) -> Home:
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
    return Home(shelf, leaf, tensor, (view(slots[0]), view(slots[1])))

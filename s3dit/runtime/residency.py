"""Residency: which parts of a model are in memory, and when.

*staged* (default): text encoder, transformer and VAE take turns; loading one lets the others go. *resident*: every
part stays once loaded. *streamed*: as staged, and of a part's repeated blocks only some stay on the device (or none);
the others live in host memory and pass through two slots (`block_streaming`).

A part is one module for the life of a pipeline, and only its tensors come and go: while it is not in memory they are on
the meta device. So hooks, traces and other modules that somebody has put into it stay, in every residency. Parameters
that somebody has changed, in place or by others, are theirs from then on: they are not let go and not loaded again
until `restore`. (Writing through `.data`, or through NumPy, is seen by nobody, and gone when the part is.)

The arithmetic is the same in every residency, bit for bit. On a CPU where file and compute dtype agree, a part is a set
of views of the mapped file, and its turn costs no copy.
"""

import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from s3dit.errors import BackendError
from s3dit.model.hooks import Own, watched
from s3dit.runtime.block_streaming import BlockStreamer, Mode, TensorDict, stream, tensors, version
from s3dit.runtime.graphs import Replay
from s3dit.runtime.lora import Attachments

# What tells a tensor that nobody has touched: itself, its version counter, its memory, whether it wants a gradient.
Mark = tuple[weakref.ref[Tensor], int, int, bool] | None


def _mark(tensor: Tensor | None) -> Mark:
    return None if tensor is None else (weakref.ref(tensor), version(tensor), tensor.data_ptr(), tensor.requires_grad)


def _same(tensor: Tensor | None, mark: Mark) -> bool:
    """Whether a tensor is as it was when it was marked."""
    if tensor is None or mark is None:
        return tensor is None and mark is None
    return mark[0]() is tensor and mark[1:] == (version(tensor), tensor.data_ptr(), tensor.requires_grad)


def _refuse(name: str, *args: Any) -> None:
    raise BackendError(
        f"the {name} is not in memory: it was let go when another part's turn came; needed a part that is held; take "
        f"it anew (pipe.parts[{name!r}]), or load the model with residency resident"
    )


class Component:
    """One part of a model: its module, the places in it where tensors come and go, and what acts on it while loaded.

    attachments: its adapters · streamer: what carries its blocks, if they are streamed · recorded: its passes as CUDA
    graphs, once there are any.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        """module: on the meta device, as the part is made · name: for messages."""
        self.module, self._name = module, name
        self.attachments = Attachments(module)
        self.streamer: BlockStreamer | None = None
        self.recorded: Replay | None = None
        self._guards: list[RemovableHandle] = []
        self._guard()
        found = list(tensors(module))
        self._places: list[tuple[TensorDict, str]] = [(shelf, leaf) for shelf, leaf, _ in found]
        self._blanks = [tensor for *_, tensor in found]
        # Of each place while the part is in memory; and the places that are somebody else's by now.
        self._marks: list[Mark] | None = None
        self._theirs: set[int] = set()

    def set_parameters(self, filled: nn.Module) -> None:
        """Take over the tensors of a filled copy of the module, but where somebody has put tensors of his own."""
        while self._guards:
            self._guards.pop().remove()
        self._theirs = self.touched()
        for i, (_, _, tensor) in enumerate(tensors(filled)):
            shelf, leaf = self._places[i]
            if i not in self._theirs:
                shelf[leaf] = tensor
            elif isinstance(own := shelf.get(leaf), Tensor) and not tensor.is_meta and own.device != tensor.device:
                moved = own.detach().to(tensor.device)
                shelf[leaf] = nn.Parameter(moved, own.requires_grad) if isinstance(own, nn.Parameter) else moved

    def stream(self, device: torch.device, kept: int, dtype: torch.dtype) -> None:
        """Stream the module's blocks, all but `kept`; see `block_streaming.stream`."""
        self.streamer = stream(self.module, device, kept, dtype)
        self.attachments = Attachments(self.module, self.streamer)

    def replay(self, *args: Any) -> Tensor:
        """Call the module by its recording, which lives as long as the weights that it has recorded."""
        if self.recorded is None or self.recorded.stale:
            self.recorded = Replay(self.module)
        return self.recorded(*args)

    def mark(self) -> None:
        """Remember what is here now, as nobody has touched it yet."""
        self._marks = [_mark(shelf.get(leaf)) for shelf, leaf in self._places]

    def empty(self) -> None:
        """Let go of all tensors but those that somebody has changed."""
        self._theirs = self.touched()
        for i, ((shelf, leaf), blank) in enumerate(zip(*self._both, strict=True)):
            if i not in self._theirs:
                shelf[leaf] = blank
        self._marks = None
        if not self._guards:
            self._guard()

    def _guard(self) -> None:
        """Let whatever would compute without its tensors say so: some of it would go on, on the meta device."""
        for one in self.module.modules():
            if one._parameters or one._buffers:
                # Also where hooks of others are refused.
                register = partial(nn.Module.register_forward_pre_hook, one, prepend=True)
                self._guards.append(register(Own(partial(_refuse, self._name))))

    def restore(self) -> None:
        """Forget what somebody has changed; with the part out of memory."""
        self._theirs = set()
        for (shelf, leaf), blank in zip(*self._both, strict=True):
            shelf[leaf] = blank

    def touched(self) -> set[int]:
        """The places that somebody has changed, which are not those that adapters have."""
        ours = {(id(shelf), leaf) for shelf, leaf in self.attachments.copies()}
        found = set(self._theirs)
        for i, ((shelf, leaf), blank) in enumerate(zip(*self._both, strict=True)):
            tensor = shelf.get(leaf)
            same = tensor is blank if self._marks is None else _same(tensor, self._marks[i])
            if not same and (id(shelf), leaf) not in ours:
                found.add(i)
        return found

    def state(self) -> tuple[Any, ...]:
        """What changes when somebody changes the part: its modules and their forwards, and the touched tensors."""
        modules = tuple((id(one), id(vars(one).get("forward"))) for one in self.module.modules())
        places = ((i, *self._places[i]) for i in sorted(self.touched()))
        found = ((i, shelf.get(leaf)) for i, shelf, leaf in places)
        return modules, tuple((i, id(own), None if own is None else version(own)) for i, own in found)

    @property
    def _both(self) -> tuple[list[tuple[TensorDict, str]], list[Tensor]]:
        return self._places, self._blanks


class Residency:
    """Parts by name, loaded when first asked for; safe to use from several threads, which wait for one another.

    `kept` says of a part how many of its blocks are to stay on the device, for `load` to read; a part that is not in
    it is whole. A part that holds more than that is loaded anew; one that holds less is used as it is.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.kept: Mapping[str, int] = {}
        # Held by whoever computes with the parts, or changes them.
        self.lock = threading.RLock()
        self._components: dict[str, Component] = {}
        self._held: dict[str, int | None] = {}
        self._handles: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()

    def make(self, name: str) -> nn.Module:
        """A part's module on the meta device."""
        raise NotImplementedError

    def load(self, name: str, component: Component) -> None:
        """Fill a part, and `mark` it."""
        raise NotImplementedError

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the parts in memory now."""
        return tuple(self._held)

    @property
    def policy(self) -> tuple[Mode, Mapping[str, int]]:
        """How parts are held: what `set_policy` is given."""
        return self.mode, self.kept

    def component(self, name: str) -> Component:
        """A part, in memory or not."""
        with self.lock:
            if name not in self._components:
                self._components[name] = Component(self.make(name), name)
            return self._components[name]

    def __getitem__(self, name: str) -> nn.Module:
        """A part's module, in memory: the same object every time."""
        with self.lock:
            component, wanted = self.component(name), self.kept.get(name)
            if name in self._held and wanted is not None and ((made := self._held[name]) is None or made > wanted):
                self._let_go(name)
            if name not in self._held:
                if self.mode != "resident":
                    self.free()
                try:
                    self.load(name, component)
                except BaseException:
                    self.unload(name, component)
                    raise
                self._held[name] = wanted
            return component.module

    def handle(self, name: str) -> nn.Module:
        """A part's module, in memory, as an object that keeps it there: it is let go only when nobody has it any more.

        It shares every attribute with the module that the engine computes with, so that hooks, parameters and methods
        that are put into one are in both. Everybody who asks is given the same object.
        """
        with self.lock:
            module, handle = self[name], self._handles.get(name)
            if handle is None:
                handle = object.__new__(type(module))
                object.__setattr__(handle, "__dict__", vars(module))
                self._handles[name] = handle
            return handle

    @property
    def pinned(self) -> tuple[str, ...]:
        """Names of the parts that stay in memory because somebody has a `handle` of them."""
        return tuple(self._handles)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Inside the `with`, parts come in beside those that are held (for previews)."""
        with self.lock:
            before, self.mode = self.mode, "resident"
            try:
                yield
            finally:
                self.mode = before

    def set_policy(self, mode: Mode, kept: Mapping[str, int], parts: Collection[str]) -> None:
        """Change how parts are held, for the sake of `parts`; let go of what has no room beside them any more."""
        with self.lock:
            self.mode, self.kept = mode, kept
            if mode != "resident" and len(self._held) > 1:
                self.free()
            self._let_go(*(name for name in self.held if name not in parts and name not in self._handles))

    def free(self) -> None:
        """Let every part go but those that somebody has a `handle` of."""
        with self.lock:
            self._let_go(*(name for name in self.held if name not in self._handles))

    def restore(self, name: str) -> None:
        """Let a part go with all that somebody has changed of its parameters: it comes back as it is in its file."""
        with self.lock:
            self._let_go(*(one for one in self.held if one == name))
            self.component(name).restore()

    def watched(self, *names: str) -> bool:
        """Whether somebody has put hooks into a part."""
        return any(watched(self.component(name).module.modules()) for name in names)

    def unload(self, name: str, component: Component) -> None:
        """Take everything out of a part that `load` has brought into it."""
        component.attachments.strip()
        component.recorded = None
        if component.streamer is not None:
            component.streamer.close()
            component.streamer, component.attachments = None, Attachments(component.module)
        component.empty()

    def _let_go(self, *names: str) -> None:
        for name in names:
            del self._held[name]
            self.unload(name, self._components[name])
        if names and torch.cuda.is_available():
            torch.cuda.empty_cache()

"""Residency: loads and frees the parts of a model, so that the ones in memory are those that are needed.

*staged* (default): text encoder, transformer and VAE take turns; loading one lets the others go. *resident*: every
part stays once loaded. *streamed*: as staged, and of a part's repeated blocks only some stay on the device (or none);
the others pass through two slots (`block_streaming`), or on a CPU compute in their mapped file (`file_streaming`).

A part is one module for the life of a pipeline, and only its tensors are loaded and freed: while it is not in memory
they are on the meta device. So hooks, traces and other modules that a user has put into it stay, in every residency.
Parameters that a user has changed, in place or by replacing them, are kept: they are not freed and not loaded again
until `restore`. (Writing through `.data`, or through NumPy, is not detected, and lost when the part is freed.)

The arithmetic is the same in every residency, bit for bit. On a CPU where file and compute dtype agree, a part is a set
of views of the mapped file, and its turn costs no copy.
"""

import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from s3dit.errors import BackendError
from s3dit.model.hooks import Own, watched
from s3dit.runtime.block_streaming import BlockStreamer, Mode, TensorDict, stream, tensors, version
from s3dit.runtime.file_streaming import FileStreamer, stream_files
from s3dit.runtime.graphs import Replay
from s3dit.runtime.lora import Attachments

LOG = getLogger(__name__)
# By which an untouched tensor is recognized: itself, its version counter, its memory, whether it requires a gradient.
Mark = tuple[weakref.ref[Tensor], int, int, bool] | None


def _mark(tensor: Tensor | None) -> Mark:
    """What a tensor is recognized by later; None where there is none."""
    return None if tensor is None else (weakref.ref(tensor), version(tensor), tensor.data_ptr(), tensor.requires_grad)


def _same(tensor: Tensor | None, mark: Mark) -> bool:
    """Whether a tensor is as it was when it was marked."""
    if tensor is None or mark is None:
        return tensor is None and mark is None
    return mark[0]() is tensor and mark[1:] == (version(tensor), tensor.data_ptr(), tensor.requires_grad)


def _refuse(name: str, *args: Any) -> None:
    """Raise the BackendError of a part that computes while it is not in memory."""
    raise BackendError(
        f"the {name} is not in memory: it was let go when another part's turn came; needed a part that is held; take "
        f"it anew (pipe.parts[{name!r}]), or load the model with residency resident"
    )


class Component:
    """A part of a model: its module, the places of its tensors, and what acts on it while it is loaded.

    attachments: its adapters · streamer: of its blocks, if they are streamed · recorded: its passes as CUDA graphs,
    once there are any.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        """module: on the meta device, as the part is made · name: for messages."""
        self.module, self._name = module, name
        self.attachments = Attachments(module)
        self.streamer: BlockStreamer | FileStreamer | None = None
        self.recorded: Replay | None = None
        self._guards: list[RemovableHandle] = []
        self._guard()
        held = list(tensors(module))
        self._places: list[tuple[TensorDict, str]] = [(owner, leaf) for owner, leaf, _ in held]
        self._blanks = [tensor for *_, tensor in held]
        # Of each place while the part is in memory; and the places whose tensors a user has changed.
        self._marks: list[Mark] | None = None
        self._theirs: set[int] = set()

    def set_parameters(self, filled: nn.Module) -> None:
        """Take over the tensors of a filled copy of the module, except where a user has put others."""
        while self._guards:
            self._guards.pop().remove()
        self._theirs = self.touched()
        for i, (_, _, tensor) in enumerate(tensors(filled)):
            owner, leaf = self._places[i]
            if i not in self._theirs:
                owner[leaf] = tensor
            elif isinstance(own := owner.get(leaf), Tensor) and not tensor.is_meta and own.device != tensor.device:
                moved = own.detach().to(tensor.device)
                owner[leaf] = nn.Parameter(moved, own.requires_grad) if isinstance(own, nn.Parameter) else moved

    def stream(self, device: torch.device, kept: int, dtype: torch.dtype) -> None:
        """Stream the module's blocks, all but `kept`: from their file on a CPU, from host memory to another device."""
        on_cpu = device.type == "cpu"
        self.streamer = stream_files(self.module, kept, dtype) if on_cpu else stream(self.module, device, kept, dtype)
        self.attachments = Attachments(self.module, self.streamer)

    def replay(self, *args: Any) -> Tensor:
        """Call the module by its recording, which is made anew when the module has others -> its output."""
        if self.recorded is None or self.recorded.stale:
            self.recorded = Replay(self.module)
        return self.recorded(*args)

    def mark(self) -> None:
        """Remember the tensors as they are now: what differs from them later was changed by a user."""
        self._marks = [_mark(owner.get(leaf)) for owner, leaf in self._places]

    def empty(self) -> None:
        """Free all tensors except those that a user has changed."""
        self._theirs = self.touched()
        for i, ((owner, leaf), blank) in enumerate(zip(*self._both, strict=True)):
            if i not in self._theirs:
                owner[leaf] = blank
        self._marks = None
        if not self._guards:
            self._guard()

    def _guard(self) -> None:
        """Raise in every module that would compute without its tensors: some would go on, on the meta device."""
        for module in self.module.modules():
            if module._parameters or module._buffers:
                # Also where hooks of users are refused.
                register = partial(nn.Module.register_forward_pre_hook, module, prepend=True)
                self._guards.append(register(Own(partial(_refuse, self._name))))

    def restore(self) -> None:
        """Drop what a user has changed; called while the part is not in memory."""
        self._theirs = set()
        for (owner, leaf), blank in zip(*self._both, strict=True):
            owner[leaf] = blank

    def touched(self) -> set[int]:
        """Return the places that a user has changed, without those that adapters have changed."""
        ours = {(id(owner), leaf) for owner, leaf in self.attachments.copies()}
        places = set(self._theirs)
        for i, ((owner, leaf), blank) in enumerate(zip(*self._both, strict=True)):
            tensor = owner.get(leaf)
            same = tensor is blank if self._marks is None else _same(tensor, self._marks[i])
            if not same and (id(owner), leaf) not in ours:
                places.add(i)
        return places

    def state(self) -> tuple[Any, ...]:
        """Return a value that is another once a user has changed the part: modules, forwards, touched tensors."""
        modules = tuple((id(module), id(vars(module).get("forward"))) for module in self.module.modules())
        places = ((i, *self._places[i]) for i in sorted(self.touched()))
        changed = ((i, owner.get(leaf)) for i, owner, leaf in places)
        return modules, tuple((i, id(tensor), None if tensor is None else version(tensor)) for i, tensor in changed)

    @property
    def _both(self) -> tuple[list[tuple[TensorDict, str]], list[Tensor]]:
        """The places of the tensors, and the blank tensor on the meta device that belongs to each."""
        return self._places, self._blanks


class Residency:
    """The parts of a model by name, loaded when first used; safe in several threads, which wait for one another.

    `kept` says of a part how many of its blocks are to stay on the device, for `load` to read; a part that is not in
    it is whole. A part that holds more than that is loaded anew; one that holds less is used as it is.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.kept: Mapping[str, int] = {}
        # Held while a thread computes with the parts, or changes them.
        self.lock = threading.RLock()
        self._components: dict[str, Component] = {}
        self._held: dict[str, int | None] = {}
        self._handles: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()

    def make(self, name: str) -> nn.Module:
        """Make a part's module on the meta device."""
        raise NotImplementedError

    def load(self, name: str, component: Component) -> None:
        """Load a part's tensors, and `mark` it."""
        raise NotImplementedError

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the parts in memory now."""
        return tuple(self._held)

    @property
    def policy(self) -> tuple[Mode, Mapping[str, int]]:
        """How parts are held, mode and kept blocks, as `set_policy` takes them."""
        return self.mode, self.kept

    def component(self, name: str) -> Component:
        """Return a part, in memory or not."""
        with self.lock:
            if name not in self._components:
                self._components[name] = Component(self.make(name), name)
            return self._components[name]

    def __getitem__(self, name: str) -> nn.Module:
        """Return a part's module, loaded into memory if it is not: the same object every time."""
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
        """Load parts inside the `with` without freeing those that are in memory (for previews)."""
        with self.lock:
            before, self.mode = self.mode, "resident"
            try:
                yield
            finally:
                self.mode = before

    def set_policy(self, mode: Mode, kept: Mapping[str, int], parts: Collection[str]) -> None:
        """Set how parts are held, for a request that needs `parts`; frees what has no room beside them any more."""
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
        """Free a part and drop all changes of its parameters: it is loaded again as it is in its file."""
        with self.lock:
            self._let_go(*(held for held in self.held if held == name))
            self.component(name).restore()
            self._load_pinned()

    def reload(self) -> None:
        """Free every part, because what `load` makes of it is another now; those with a `handle` are loaded at once."""
        with self.lock:
            self._let_go(*self._held)
            self._load_pinned()

    def _load_pinned(self) -> None:
        """Load what somebody has a handle of and is not in memory."""
        for name in self.pinned:
            self[name]

    def watched(self, *names: str) -> bool:
        """Return whether a user has put hooks into one of these parts."""
        return any(watched(self.component(name).module.modules()) for name in names)

    def unload(self, name: str, component: Component) -> None:
        """Undo `load`: remove adapters, streaming, recordings and tensors of a part."""
        component.attachments.strip()
        component.recorded = None
        if component.streamer is not None:
            component.streamer.close()
            component.streamer, component.attachments = None, Attachments(component.module)
        component.empty()

    def _let_go(self, *names: str) -> None:
        """Free parts that are in memory."""
        for name in names:
            LOG.debug("let go of %s", name)
            del self._held[name]
            self.unload(name, self._components[name])
        if names and torch.cuda.is_available():
            torch.cuda.empty_cache()

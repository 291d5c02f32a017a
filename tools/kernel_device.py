"""A pretended CUDA device: fake tensors, Triton kernels compiled for a GPU that is not there, and their launches.

`pretend` must run before `s3dit.kernels` is imported, once in a process: it makes torch report a GPU of a compute
capability, and Triton compile for it. Nothing is computed. Inside `recording`, tensors are torch's fake tensors, and
every launch is listed: Triton kernels by the launchers of the engine itself, with their real arguments and options, and
torch's own operators by a dispatch mode. Views and allocations are no launches; neither is what runs on the host.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Target:
    """What a kernel may use on a GPU of a compute capability, of one SM (streaming multiprocessor) unless said.

    name: of a device · processors: its SMs · shared: KiB of shared memory, and `program`: those that one program may
    have · warps, programs: resident at most. Source: CUDA C++ Programming Guide, technical specifications.
    """

    name: str
    processors: int
    shared: int
    program: int
    warps: int
    programs: int


TARGETS = {
    80: Target("NVIDIA A100-SXM4-80GB", 108, 164, 163, 64, 32),
    89: Target("NVIDIA GeForce RTX 4090", 128, 100, 99, 48, 24),
    90: Target("NVIDIA H100 80GB HBM3", 132, 228, 227, 64, 32),
    100: Target("NVIDIA B200", 148, 228, 227, 64, 32),
    120: Target("NVIDIA GeForce RTX 5090", 170, 100, 99, 48, 24),
}
REGISTERS = 65536
# Operators that launch nothing although their schema does not call them views.
NO_LAUNCH = (
    "_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "empty", "new_empty", "empty_like", "empty_strided",
    "new_empty_strided", "_local_scalar_dense", "set_", "resize_",
)  # fmt: skip


@dataclass
class Launch:
    """One launch: a Triton kernel or an operator of torch.

    name · op: the Op that it serves, "" if none · tensors: their shapes and dtypes in words · bytes: of all inputs and
    outputs, each once · flop: of products, attention and convolutions, otherwise 0 · kernel: as Triton compiled it,
    None for torch's · programs: the grid's size · constants: integer arguments by name.
    """

    name: str
    op: str
    tensors: tuple[str, ...]
    bytes: int
    flop: float
    kernel: Any = None
    programs: int = 0
    constants: dict[str, int] = field(default_factory=dict)


@dataclass
class Recorded:
    """What was launched inside `recording`, and how often the host read a number from the device."""

    launches: list[Launch] = field(default_factory=list)
    reads: int = 0


_records: list[Recorded] = []
# The Ops that are running, innermost last, with their arguments.
_calls: list[tuple[str, tuple[Any, ...]]] = []


def pretend(capability: int) -> None:
    """Make torch and Triton of this process see a GPU of a compute capability of TARGETS, such as 90 for 9.0."""
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    target = TARGETS[capability]
    properties = SimpleNamespace(
        name=target.name, major=capability // 10, minor=capability % 10, multi_processor_count=target.processors,
        total_memory=80 << 30, L2_cache_size=50 << 20, max_threads_per_multi_processor=target.warps * 32, warp_size=32,
        regs_per_multiprocessor=REGISTERS, shared_memory_per_block_optin=target.program << 10,
        shared_memory_per_multiprocessor=target.shared << 10,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": True, "get_device_properties": properties, "get_device_name": target.name,
        "get_device_capability": divmod(capability, 10), "current_device": 0, "device_count": 1, "synchronize": None,
        "is_bf16_supported": True, "empty_cache": None, "_lazy_init": None, "is_current_stream_capturing": False,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **options: _answer)
    _patch_triton(capability, target)
    _patch_fake_tensors()
    _patch_attention()
    _patch_convolution()
    from s3dit.kernels.dispatch import Op

    called = Op.__call__

    def _call(self: Any, *args: Any, **options: Any) -> Any:
        _calls.append((self.name, (*args, *options.values())))
        try:
            return called(self, *args, **options)
        finally:
            _calls.pop()

    Op.__call__ = _call  # type: ignore[method-assign]


def _patch_triton(capability: int, target: Target) -> None:
    """Let Triton compile for the GPU, and record instead of launching."""
    import triton.runtime.jit as jit
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    limits = {"max_shared_mem": target.program << 10, "multiprocessor_count": target.processors,
              "max_num_regs": REGISTERS, "warpSize": 32}  # fmt: skip
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            set_current_device=lambda device: None,
            utils=SimpleNamespace(
                load_binary=lambda *args: (1, 1, 0, 0, 1024), get_device_properties=lambda device: limits
            ),
        )
    )
    compiled = jit.JITFunction.run

    def _run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = compiled(self, *args, grid=grid, warmup=True, **options)
        if _records:
            _record_kernel(self, args, grid, kernel)
        return kernel

    jit.JITFunction.run = _run


def _record_kernel(function: Any, args: tuple[Any, ...], grid: Any, kernel: Any) -> None:
    """List one launch of a Triton kernel."""
    import torch

    given = [getattr(value, "base", value) for value in args]
    tensors = list({id(value): value for value in given if isinstance(value, torch.Tensor)}.values())
    named = zip((parameter.name for parameter in function.params), args, strict=False)
    programs = 1
    for size in grid:
        programs *= size
    _records[-1].launches.append(
        Launch(
            name=function.__name__,
            op=_calls[-1][0] if _calls else "",
            tensors=tuple(map(words, tensors)),
            bytes=sum(map(occupied, tensors)),
            flop=call_flop(*_calls[-1]) if _calls and "tt.dot" in kernel.asm["ttir"] else 0.0,
            kernel=kernel,
            programs=programs,
            constants={name: value for name, value in named if type(value) in (int, bool)},
        )
    )


def _patch_fake_tensors() -> None:
    """Let fake tensors be on a CUDA device that is not there, at an address aligned to 16 bytes."""
    import torch._subclasses.fake_tensor as fake

    address: Any = lambda self: 4096  # noqa: E731
    fake.FakeTensor.data_ptr = address  # type: ignore[method-assign]
    fake.FakeTensor.__getitem__ = _index  # type: ignore[method-assign]
    fake.FakeTensor.contiguous = _contiguous  # type: ignore[assignment, method-assign]
    setattr(fake, "init_gpu_context", lambda device: None)  # noqa: B010


def _contiguous(tensor: Any, memory_format: Any = None) -> Any:
    """Copy a fake tensor to a memory format by an operator: the method asks for CUDA as well."""
    import torch

    wanted = memory_format or torch.contiguous_format
    same = tensor.is_contiguous(memory_format=wanted)
    return tensor if same else torch.ops.aten.clone(tensor, memory_format=wanted)


def _index(tensor: Any, index: Any) -> Any:
    """Index a fake tensor by operators: the subscript of Python asks for CUDA, which torch may be built without."""
    import torch

    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [item for item in items if not isinstance(item, torch.Tensor)]:
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        taken = sum(item is not None for item in items) - 1
        items[at : at + 1] = [slice(None)] * (tensor.ndim - taken)
    dim = 0
    gathered: list[Any] = [None] * tensor.ndim
    for item in items:
        if item is None:
            tensor, gathered = tensor.unsqueeze(dim), [*gathered, None]
        elif isinstance(item, slice):
            # Not torch.narrow, which knows no steps.
            tensor = torch.ops.aten.slice(tensor, dim, item.start, item.stop, item.step or 1)
        elif isinstance(item, torch.Tensor):
            gathered[dim] = item
        else:
            tensor = tensor.select(dim, item)
            continue
        dim += 1
    given = any(item is not None for item in gathered)
    return torch.ops.aten.index(tensor, gathered[: tensor.ndim]) if given else tensor


def _patch_attention() -> None:
    """Record torch's attention as one launch: its choice of a kernel would ask the driver."""
    import torch
    import torch.nn.functional

    def _attend(q: Any, k: Any, v: Any, *rest: Any, is_causal: bool = False, **options: Any) -> Any:
        shape = (q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        out = torch.empty(shape, dtype=q.dtype, device=q.device).transpose(1, 2)  # (B, H, L, D)
        flop = 2.0 * q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3]) / (2 if is_causal else 1)
        if _records:
            tensors = (q, k, v, out)
            name = "scaled_dot_product_attention"
            called = _calls[-1][0] if _calls else "attention"
            launch = Launch(name, called, tuple(map(words, tensors[:3])), sum(map(occupied, tensors)), flop)
            _records[-1].launches.append(launch)
        return out

    torch.nn.functional.scaled_dot_product_attention = _attend  # type: ignore[assignment]


def _patch_convolution() -> None:
    """Let convolutions answer in channels last where x is, as cuDNN's do: fake ones without CUDA do not."""
    import torch
    import torch.nn.functional

    convolve = torch.nn.functional.conv2d

    def _conv2d(x: Any, *args: Any, **options: Any) -> Any:
        out = convolve(x, *args, **options)
        last = torch.channels_last
        same = not x.is_contiguous(memory_format=last) or x.is_contiguous()
        return out if same else torch.empty(out.shape, dtype=out.dtype, device=out.device, memory_format=last)

    torch.nn.functional.conv2d = _conv2d  # type: ignore[assignment]


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make every tensor that is created inside the `with` a fake one."""
    import torch
    import torch._subclasses.fake_tensor as fake

    available = torch.cuda.is_available
    # The mode would initialize the device.
    torch.cuda.is_available = lambda: False
    mode = fake.FakeTensorMode(allow_non_fake_inputs=True)
    torch.cuda.is_available = available
    torch._C._ensureCUDADeviceGuardSet()
    with mode, torch.no_grad():
        yield


@contextmanager
def recording() -> Iterator[Recorded]:
    """Record what is launched inside the `with`, of fake tensors on the device "cuda"."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    record = Recorded()

    class _Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            options = kwargs or {}
            out = func(*args, **options)
            name = func._opname
            results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            inputs = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, torch.Tensor)]
            on_device = [tensor for tensor in (*inputs, *results) if tensor.device.type == "cuda"]
            crosses = bool(results) and bool(on_device) and any(r.device.type != "cuda" for r in results)
            record.reads += bool(on_device) and (crosses or name == "_local_scalar_dense")
            silent = func.namespace != "aten" or func.is_view or name in NO_LAUNCH
            if on_device and not silent:
                formula = flop_registry.get(func._overloadpacket)
                flop = float(formula(*args, **options, out_val=out)) if formula else 0.0
                called = _calls[-1][0] if _calls else ""
                record.launches.append(
                    Launch(name, called, tuple(map(words, inputs)), sum(map(occupied, on_device)), flop)
                )
            return out

    _records.append(record)
    try:
        with _Log():
            yield record
    finally:
        _records.pop()


@contextmanager
def calling(name: str, *args: Any) -> Iterator[None]:
    """Let launches inside the `with` count as those of an Op of this name, called with these arguments."""
    _calls.append((name, args))
    try:
        yield
    finally:
        _calls.pop()


def call_flop(name: str, args: tuple[Any, ...]) -> float:
    """Return the multiplications and additions of a call of an Op.

    Attention: 4 · head size · scores, of the items that its spans say. Otherwise products of x, the first argument,
    with every weight among the others, each in a dictionary of parts; a weight has a row an output.
    """
    # Not by the name `values`, which tensors have too.
    x = args[0] if hasattr(args[0], "numel") else args[0].values
    if name.startswith("attention"):
        spans = zip(args[3].lengths, args[4].lengths, strict=True)
        return 4.0 * x.shape[1] * x.shape[2] * sum(queries * keys for queries, keys in spans)
    outputs = sum(part["weight"].shape[0] for part in args[1:] if isinstance(part, dict))
    return 2.0 * x.numel() * outputs


def occupied(tensor: Any) -> int:
    """Return the bytes of a tensor's different numbers: a dimension of stride 0 counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.itemsize


def words(tensor: Any) -> str:
    """Return shape and dtype of a tensor: "4224×3840 bf16"."""
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "float8_e4m3fn": "e4m3"}
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{'×'.join(map(str, tensor.shape)) or '1'} {names.get(dtype, dtype)}"

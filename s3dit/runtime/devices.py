"""Chooses the device and the dtypes that a model is kept and computed in.

Weights are kept in `dtype`, by default bf16 wherever the device multiplies bf16 in hardware (CUDA, MPS, CPUs with AMX
or AVX512-BF16). Activations are computed in `compute`: the same where that is the faster arithmetic, else fp32, which
is also the more exact. It is slower in bf16 on CPUs without such instructions (several times), and on Intel's with
AVX512-BF16 but no AMX (twice: one Sapphire Rapids without AMX gave 82 GFLOP/s in bf16 and 152 in fp32, 1088 × 3840 ×
3840). Plain fp16 is refused: the products of Z-Image's feed-forward pass 65504.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from s3dit.errors import BackendError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class Placement:
    """A device, the dtype that weights are kept in and the dtype that activations have."""

    device: torch.device
    dtype: torch.dtype
    compute: torch.dtype

    def __str__(self) -> str:
        """Describe it for messages and metadata, such as "cpu, bf16 weights, fp32 arithmetic"."""
        names = [NAMES[str(dtype).removeprefix("torch.")] for dtype in (self.dtype, self.compute)]
        return f"{self.device}, {names[0]}" + ("" if names[0] == names[1] else f" weights, {names[1]} arithmetic")


def place(device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Placement:
    """Choose device and dtype, or check the given ones; raises BackendError.

    device: None takes CUDA, else MPS, else the CPU · dtype: "bf16" or "fp32"; None takes bf16 where it is native.
    """
    chosen = _device(device)
    native = native_bf16(chosen)
    if dtype is None:
        kept = torch.bfloat16 if native else torch.float32
    else:
        name = str(dtype).removeprefix("torch.")
        name = NAMES.get(name, name)
        if name == "fp16":
            raise BackendError(
                "dtype fp16 overflows in this model's feed-forward (products above 65504) and draws black pictures; "
                "use bf16 or fp32"
            )
        if name not in DTYPES:
            raise BackendError(f"dtype is {dtype!r}; needed bf16 or fp32")
        kept = DTYPES[name]
    return Placement(chosen, kept, kept if fast_bf16(chosen) else torch.float32)


def _device(device: str | torch.device | None) -> torch.device:
    """The device, or the best there is; raises BackendError for one that this machine has not."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise BackendError(f"device is {device!r}; needed cpu, cuda or mps") from None
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(chosen.type, False):
        here = ", ".join(name for name, there in present.items() if there)
        raise BackendError(f"device {chosen} is not available to this torch ({torch.__version__}); here: {here}")
    if chosen.type == "cuda" and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise BackendError(f"device {chosen} does not exist; this machine has {torch.cuda.device_count()} CUDA devices")
    return chosen


def native_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("amx_bf16") or able.get("avx512_bf16") or able.get("bf16"))
    return True


def fast_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 in hardware, and faster than fp32."""
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    slow = able.get("avx512_bf16") and not able.get("amx_bf16") and "Intel" in able.get("cpu_name", "")
    return native_bf16(device) and not slow


@contextmanager
def own_settings(device: torch.device) -> Iterator[None]:
    """Compute inside the `with` without the calling thread's autocast, gradients, inference mode and default device.

    All of it belongs to the thread. torch's default dtype belongs to the process and stays: whatever depends on a dtype
    names it. Tensors that are made inside are ordinary ones, so that gradients can pass through weights later.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # A mode that looks at every call of torch, so only where there is another.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield

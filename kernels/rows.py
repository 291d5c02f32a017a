"""Rows in 8 bits, seen from inside Triton kernels: what `scheme.quantize_rows` is outside of them.

A kernel that has whole rows of an output at hand rounds them before it writes: half the bytes written, a quarter of
them read again, and no pass of its own. `empty_rows` makes the outputs, `given` the answer, `round_rows` rounds.
"""

from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.dispatch import kernel, launcher, op, tl, why_unsupported
from s3dit.kernels.scheme import LARGEST, SMALLEST, QuantizedRows, quantize_rows

# Dtypes of inputs that are not quantized, and of results.
WIDE = (torch.bfloat16, torch.float16, torch.float32)
# Numbers of the longest row that a program holds in registers.
WIDEST = 16384
# A row kernel gives each program this many numbers or one row, and each thread sixteen of them.
NUMBERS = 4096
FLOOR = tl.constexpr(SMALLEST)


@kernel
def round_rows(y: "Any", largest: tl.constexpr) -> Any:
    """Round y (R, D) fp32 for a type whose largest number is `largest` -> values, still fp32, and scale (R, 1)."""
    # A maximum passes over NaN and int8 cannot hold it: an infinite scale makes the whole row NaN again.
    magnitude = tl.max(tl.where(y == y, tl.abs(y), float("inf")), 1, keep_dims=True)
    scale = tl.div_rn(tl.maximum(magnitude, FLOOR), largest)
    values = tl.div_rn(y, scale)
    if largest == 127.0:
        # 1.5 · 2²³ leaves an fp32 no bits for a fraction: rounds half to even, as torch does.
        values = (values + 12582912.0) - 12582912.0
    return values, scale


def empty_rows(x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Outputs of the shape of x (…, D): values of `dtype` and scales (…, 1); or of x's own dtype, and no scales."""
    values = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    return values, torch.empty((*x.shape[:-1], 1 if dtype else 0), dtype=torch.float32, device=x.device)


def given(values: Tensor, scale: Tensor, wide: torch.dtype) -> Tensor | QuantizedRows:
    """The answer that these outputs are; `wide` is the dtype of the input."""
    return QuantizedRows(values, scale, wide) if scale.shape[-1] else values


def largest(dtype: torch.dtype | None) -> float:
    """The largest number of an 8-bit type; 0 says that nothing is rounded."""
    return 0.0 if dtype is None else LARGEST[dtype]


def flat(x: Tensor) -> Tensor:
    """x (…, D) as (rows, D) with adjacent numbers adjacent; copied only if it must be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def blocks(rows: int, width: int) -> tuple[int, int, int, int]:
    """How rows of this width are shared out: programs, rows a program, power of two that holds a row, warps."""
    block = max(16, 1 << (width - 1).bit_length())
    each = max(1, NUMBERS // block)
    return -(-rows // each), each, block, min(16, max(4, block * each // 512))


@kernel
def _quantize_rows_kernel(
    x: "Any", values: "Any", scale: "Any", N: "Any", x_stride: "Any", K: tl.constexpr, LARGEST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Round ROWS rows (N, K); each is read once and held in registers."""
    n, k = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (n < N) & (k < K)
    y, unit = round_rows(tl.load(x + n * x_stride + k, mask=inside, other=0.0).to(tl.float32), LARGEST)
    tl.store(values + n * K + k, y.to(values.dtype.element_ty), mask=inside)
    tl.store(scale + n, unit, mask=n < N)


@launcher(empty_rows)
def launch_quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each row of x (…, K) to int8 or e4m3 by its own largest magnitude, as `scheme.quantize_rows` does.

    -> values (…, K) in dtype, scales (…, 1) fp32.
    """
    values, scale = empty_rows(x, dtype)
    x = flat(x)
    n, k = x.shape
    programs, each, block, warps = blocks(n, k)
    if n:
        _quantize_rows_kernel[(programs,)](
            x, values, scale, n, x.stride(0), k, largest(dtype), each, block, num_warps=warps
        )  # fmt: skip
    return values, scale


@op
def quantize_activations(x: Tensor | QuantizedRows, dtype: torch.dtype) -> QuantizedRows:
    """Round the rows of x (…, K) to int8 or e4m3, as `scheme.quantize_rows` does; a rounded x stays as it is."""
    return quantize_rows(x, dtype)


@quantize_activations.on("cuda", "triton", when=lambda x, dtype: why_unsupported(x, WIDE, dtype) or True)
def _triton_quantize(x: Tensor | QuantizedRows, dtype: torch.dtype) -> QuantizedRows:
    if isinstance(x, QuantizedRows):
        return x
    values, scale = launch_quantize_rows(x, dtype)
    return QuantizedRows(values, scale, x.dtype)

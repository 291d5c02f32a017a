"""Rows in 8 bits, seen from inside Triton kernels: what `scheme.quantize_rows` is outside of them.

A kernel that has whole rows of an output at hand rounds them before it writes: half the bytes written, a quarter of
them read again, and no pass of its own. `empty_rows` makes the outputs, `given` the answer, `round_rows` rounds.
"""

from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.dispatch import kernel, tl
from s3dit.kernels.scheme import LARGEST, SMALLEST, QuantizedRows

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

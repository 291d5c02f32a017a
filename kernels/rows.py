"""Rounding of rows to 8 bits inside Triton kernels, and the Op that rounds activations: `quantize_activations`.

A kernel that has whole rows of an output in registers rounds them before it writes: half the bytes written, and no pass
of its own. `empty_rows` allocates its outputs, `round_rows` rounds, `as_output` returns them. The result is that of
`scheme.quantize_rows`.
"""

from typing import Any

import torch
from torch import Tensor

from s3dit.kernels.dispatch import kernel, launcher, op, tl, why_unsupported
from s3dit.kernels.scheme import MAX_CODES, MIN_MAGNITUDE, QuantizedRows, quantize_rows

# Dtypes of inputs that are not quantized, and of results.
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Numbers of the longest row that a program holds in registers.
MAX_ROW_WIDTH = 16384
# A row kernel gives each program this many numbers or one row, and each thread sixteen of them.
PROGRAM_NUMBERS = 4096
MIN_MAGNITUDE_BITS = tl.constexpr(torch.tensor(MIN_MAGNITUDE).view(torch.int32).item())


@kernel
def round_rows(y: "Any", max_code: tl.constexpr) -> Any:
    """Round y (R, D) fp32 for a type whose largest number is `max_code` -> values, in fp32, and scale (R, 1)."""
    # Without their signs, the bits of floats are ordered like the floats, and those of NaN are above infinity's: the
    # maximum of integers passes NaN on, which int8 cannot hold, so that the scale makes the whole row NaN again.
    magnitude = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True)
    magnitude = tl.maximum(magnitude, MIN_MAGNITUDE_BITS).to(tl.float32, bitcast=True)
    scale = tl.div_rn(magnitude, max_code)
    values = y * tl.div_rn(max_code, magnitude)
    if max_code == 127.0:
        # 1.5 · 2²³ leaves an fp32 no bits for a fraction: rounds half to even, as torch does.
        values = (values + 12582912.0) - 12582912.0
    return values, scale


def empty_rows(x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Allocate outputs of the shape of x (…, D).

    -> values (…, D) in dtype (int8 or e4m3) and scales (…, 1) fp32; with None values in the dtype of x and scales
    (…, 0).
    """
    values = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    return values, torch.empty((*x.shape[:-1], 1 if dtype else 0), dtype=torch.float32, device=x.device)


def as_output(values: Tensor, scale: Tensor, original_dtype: torch.dtype) -> Tensor | QuantizedRows:
    """Return outputs that `empty_rows` allocated as QuantizedRows of an input of this dtype, or as a plain tensor."""
    return QuantizedRows(values, scale, original_dtype) if scale.shape[-1] else values


def max_code(dtype: torch.dtype | None) -> float:
    """Return the largest number of an 8-bit dtype; 0 for None, where nothing is rounded."""
    return 0.0 if dtype is None else MAX_CODES[dtype]


def flatten_rows(x: Tensor) -> Tensor:
    """Return x (…, D) as (rows, D) whose columns are adjacent in memory; copied only where they are not."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def holding(count: int) -> int:
    """Return the smallest power of two that is not below count."""
    return 1 << (count - 1).bit_length()


def row_blocks(rows: int, width: int) -> tuple[int, int, int, int]:
    """Return how rows of this width are distributed: programs, rows a program, power of two that holds a row, warps."""
    block = max(16, holding(width))
    each = max(1, PROGRAM_NUMBERS // block)
    return -(-rows // each), each, block, min(16, max(4, block * each // 512))


@kernel
def _quantize_rows_kernel(
    x: "Any", values: "Any", scale: "Any", N: "Any", x_stride: "Any", K: tl.constexpr, MAX_CODE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """Round ROWS rows (N, K); each is read once and held in registers."""
    n, k = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (n < N) & (k < K)
    y, unit = round_rows(tl.load(x + n * x_stride + k, mask=inside, other=0.0).to(tl.float32), MAX_CODE)
    tl.store(values + n * K + k, y.to(values.dtype.element_ty), mask=inside)
    tl.store(scale + n, unit, mask=n < N)


@launcher(empty_rows)
def launch_quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each row of x (…, K) to int8 or e4m3 by its own largest magnitude, as `scheme.quantize_rows` does.

    -> values (…, K) in dtype, scales (…, 1) fp32.
    """
    values, scale = empty_rows(x, dtype)
    x = flatten_rows(x)
    n, k = x.shape
    programs, each, block, warps = row_blocks(n, k)
    if n:
        _quantize_rows_kernel[(programs,)](
            x, values, scale, n, x.stride(0), k, max_code(dtype), each, block, num_warps=warps
        )  # fmt: skip
    return values, scale


@op
def quantize_activations(x: Tensor | QuantizedRows, dtype: torch.dtype) -> QuantizedRows:
    """Round the rows of x (…, K) to int8 or e4m3, as `scheme.quantize_rows` does; a rounded x stays as it is."""
    return quantize_rows(x, dtype)


@quantize_activations.on("cuda", "triton", when=lambda x, dtype: why_unsupported(x, FLOAT_DTYPES, dtype) or True)
def _triton_quantize(x: Tensor | QuantizedRows, dtype: torch.dtype) -> QuantizedRows:
    if isinstance(x, QuantizedRows):
        return x
    values, scale = launch_quantize_rows(x, dtype)
    return QuantizedRows(values, scale, x.dtype)

"""SwiGLU's product: silu(gate) · up, the only element-wise work of the feed-forward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.dispatch import kernel, launcher, op, tl, why_unsupported
from s3dit.kernels.rows import (
    FLOAT_DTYPES,
    MAX_ROW_WIDTH,
    as_output,
    empty_rows,
    encode_rows,
    flatten_rows,
    magnitude_bits,
    max_code,
    row_blocks,
    row_pieces,
)
from s3dit.kernels.scheme import QuantizedRows, quantize_rows


@op
def swiglu(gate: Tensor, up: Tensor, input_dtype: torch.dtype | None = None) -> Tensor | QuantizedRows:
    """Compute silu(gate) · up in fp32.

    gate, up (N, F) · input_dtype: None, or int8 or e4m3 to round the rows for the next layer -> (N, F), dtype of gate,
    or QuantizedRows. An implementation may overwrite the gate with the result.
    """
    product = (F.silu(gate.float()) * up.float()).to(gate.dtype)
    return product if input_dtype is None else quantize_rows(product, input_dtype)


def _gate_is_free(gate: Tensor, up: Tensor, input_dtype: torch.dtype | None = None) -> bool | str:
    return not (torch.is_grad_enabled() and gate.requires_grad) or "a gradient needs the gate"


@swiglu.on("cpu", "torch", when=_gate_is_free)
def _in_place(gate: Tensor, up: Tensor, input_dtype: torch.dtype | None = None) -> Tensor | QuantizedRows:
    """Reuse the gate's memory: a fresh buffer of this size costs more in page faults than the arithmetic does."""
    product = F.silu(gate, inplace=True).mul_(up)
    return product if input_dtype is None else quantize_rows(product, input_dtype)


@kernel
def _product(gate: "Any", up: "Any", f: "Any", inside: "Any") -> Any:
    """Compute silu(gate) · up of the columns f of rows that start at gate and up -> fp32, 0 outside."""
    g = tl.load(gate + f, mask=inside, other=0.0).to(tl.float32)
    # The sigmoid as the square of a reciprocal root: two instructions, where a division takes seven.
    root = tl.rsqrt(1.0 + tl.exp2(g * -1.4426950408889634))
    return g * (root * root) * tl.load(up + f, mask=inside, other=0.0).to(tl.float32)


@kernel
def _swiglu_kernel(
    gate: "Any", gate_stride: "Any", up: "Any", up_stride: "Any", out: "Any", out_scale: "Any", N: "Any",
    F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, MAX_CODE: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute ROWS rows of BLOCK columns; where they are rounded, BLOCK and TAIL together hold all F."""
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    f = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    gate += n * gate_stride
    up += n * up_stride
    out += n * F
    inside = (n < N) & (f < F)
    y = _product(gate, up, f, inside)
    if MAX_CODE > 0:
        bits = magnitude_bits(y)
        if TAIL > 0:
            f_tail = BLOCK + tl.arange(0, TAIL)[None, :]
            y_tail = _product(gate, up, f_tail, (n < N) & (f_tail < F))
            bits = tl.maximum(bits, magnitude_bits(y_tail))
            codes, scale = encode_rows(y_tail, bits, 1.0, MAX_CODE)
            tl.store(out + f_tail, codes, mask=(n < N) & (f_tail < F))
        y, scale = encode_rows(y, bits, 1.0, MAX_CODE)
        tl.store(out_scale + n, scale, mask=n < N)
    tl.store(out + f, y.to(out.dtype.element_ty), mask=inside)


def _fake(gate: Tensor, up: Tensor, input_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return empty_rows(gate, input_dtype)


@launcher(_fake)
def _swiglu_rows(gate: Tensor, up: Tensor, input_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    out, scale = empty_rows(gate, input_dtype)
    gate, up = flatten_rows(gate), flatten_rows(up)
    n, width = gate.shape
    # Rows that are not rounded may be cut: shorter pieces waste less of a power of two. Those that are have two pieces.
    block, tail = (min(width, 2048), 0) if input_dtype is None else row_pieces(width)
    programs, rows, block, warps = row_blocks(n, block)
    if n:
        _swiglu_kernel[(programs, -(-width // (block + tail)))](
            gate, gate.stride(0), up, up.stride(0), out, scale, n, width, rows, block, tail, max_code(input_dtype),
            num_warps=warps,
        )  # fmt: skip
    return out, scale


def _rows_supported(gate: Tensor, up: Tensor, input_dtype: torch.dtype | None = None) -> bool | str:
    if input_dtype is not None and gate.shape[-1] > MAX_ROW_WIDTH:
        return f"rows of at most {MAX_ROW_WIDTH} numbers, found {gate.shape[-1]}"
    return why_unsupported(gate, FLOAT_DTYPES, input_dtype) or True


@swiglu.on("cuda", "triton", when=_rows_supported)
def _triton_swiglu(gate: Tensor, up: Tensor, input_dtype: torch.dtype | None = None) -> Tensor | QuantizedRows:
    out, scale = _swiglu_rows(gate, up, input_dtype)
    return as_output(out, scale, gate.dtype)

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
    flatten_rows,
    max_code,
    round_rows,
    row_blocks,
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
def _swiglu_kernel(
    gate: "Any", gate_stride: "Any", up: "Any", up_stride: "Any", out: "Any", out_scale: "Any", N: "Any",
    F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
) -> Any:  # fmt: skip
    """Compute ROWS rows of BLOCK columns; where they are rounded, BLOCK holds all F."""
    n = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    f = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (n < N) & (f < F)
    g = tl.load(gate + n * gate_stride + f, mask=inside, other=0.0).to(tl.float32)
    y = g * tl.sigmoid(g) * tl.load(up + n * up_stride + f, mask=inside, other=0.0).to(tl.float32)
    if LARGEST > 0:
        y, scale = round_rows(y, LARGEST)
        tl.store(out_scale + n, scale, mask=n < N)
    tl.store(out + n * F + f, y.to(out.dtype.element_ty), mask=inside)


def _fake(gate: Tensor, up: Tensor, input_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return empty_rows(gate, input_dtype)


@launcher(_fake)
def _swiglu_rows(gate: Tensor, up: Tensor, input_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    out, scale = empty_rows(gate, input_dtype)
    gate, up = flatten_rows(gate), flatten_rows(up)
    n, width = gate.shape
    # Rows that are not rounded may be cut: shorter pieces waste less of a power of two.
    programs, rows, block, warps = row_blocks(n, width if input_dtype else min(width, 2048))
    if n:
        _swiglu_kernel[(programs, -(-width // block))](
            gate,
            gate.stride(0),
            up,
            up.stride(0),
            out,
            scale,
            n,
            width,
            rows,
            block,
            max_code(input_dtype),
            num_warps=warps,
        )
    return out, scale


def _rows_supported(gate: Tensor, up: Tensor, input_dtype: torch.dtype | None = None) -> bool | str:
    if input_dtype is not None and gate.shape[-1] > MAX_ROW_WIDTH:
        return f"rows of at most {MAX_ROW_WIDTH} numbers, found {gate.shape[-1]}"
    return why_unsupported(gate, FLOAT_DTYPES, input_dtype) or True


@swiglu.on("cuda", "triton", when=_rows_supported)
def _triton_swiglu(gate: Tensor, up: Tensor, input_dtype: torch.dtype | None = None) -> Tensor | QuantizedRows:
    out, scale = _swiglu_rows(gate, up, input_dtype)
    return as_output(out, scale, gate.dtype)

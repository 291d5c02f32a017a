"""Weights of other producers: codes in groups along the input, each group with its scale; activations are not rounded.

The formats differ in data only, which a `Form` describes:

    W = (value(code) · scale [· channel] [+ offset]) [· rotation] [· column] [+ up · down]

value: the code itself (int8, e4m3, e5m2), or the entry of a table of 16 that a half byte points at (element 2j of a row
in the low half of byte j). scale and offset: one a group, or a row; channel: one a row. rotation: an orthogonal matrix
that each run of g inputs was multiplied by, to distribute outliers (ConvRot, SDNQ). column: a factor of an input
channel (SmoothQuant, SVDQuant). up, down: a branch of low rank, in higher precision (SVDQuant).

The last three are applied to x instead of the weight: x · column, then · rotation, is multiplied by the codes; x · down
· up is added. The codes are dequantized in a single pass of a Triton kernel on a GPU, in chunks elsewhere; only 8-bit
codes with a scale a row are dequantized inside the product.

The producers of W4A4 formats round x as well. Here x is not rounded, which is nearer to the unrounded model, and does
not give the bits of the producer.

Dim 0 of a part is the output channel, or 1 where all channels share the part. So rows can be cut from a layer.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.aligned import aligned
from s3dit.kernels.dispatch import kernel, launcher, op, tl, why_unsupported
from s3dit.kernels.mixed_matmul import mixed_matmul
from s3dit.kernels.number_format import Form, check_rotation, form_layout, rotation_dtype
from s3dit.kernels.rows import FLOAT_DTYPES
from s3dit.kernels.scheme import (
    QuantizedRows,
    QuantizedTensors,
    Scheme,
    cast_codes,
    dequantize_rows,
    linear_by_runs,
    spec_of,
    upcast,
)

# What mixed_matmul dequantizes.
MIXED_DTYPES = ("int8", "float8_e4m3fn")


@functools.cache
def grouped(name: str, form: Form) -> Scheme:
    """Return the Scheme of a form under the name that its producer gives it; the same object for equal arguments."""

    def decode(parts: QuantizedTensors) -> Tensor:
        return _decode(form, parts)

    @op
    def grouped_linear(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
        """Multiply a float x (…, in) by a weight in groups -> (…, out), dtype of x; see `Scheme`."""
        return F.linear(upcast(x), decode(parts), None if bias is None else bias.float()).to(x.dtype)

    def in_chunks(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
        return _in_chunks(form, dequantize_rows(x), parts, bias)

    def in_kernel(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
        return _with_kernel(form, dequantize_rows(x), parts, bias)

    def able(x: Tensor | QuantizedRows, parts: QuantizedTensors, bias: Tensor | None) -> bool | str:
        # e5m2 needs the same GPUs as e4m3.
        needed = None if form.codes in ("uint8", "int8") else torch.float8_e4m3fn
        return why_unsupported(x, FLOAT_DTYPES, needed) or True

    grouped_linear.on("cuda", "triton", when=able)(in_kernel)
    for device in ("cpu", "cuda"):
        grouped_linear.on(device, "torch")(in_chunks)
    return Scheme(name, None, spec_of(functools.partial(form_layout, name, form)), None, decode, grouped_linear)


def hadamard(size: int) -> Tensor:
    """Return the Hadamard rotation of `size` inputs, (1, size, size), symmetric and its own inverse.

    A Kronecker power of the 4 x 4 matrix with -1 on the anti-diagonal where size is a power of four, else of
    Sylvester's 2 x 2; dtype as `rotation_dtype`. Raises ValueError where size is not a power of two.
    """
    check_rotation(size)
    four = size.bit_length() % 2 == 1
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32, device="cpu")
    small = 1 - 2 * torch.eye(4, dtype=torch.float32, device="cpu").flip(0) if four else sylvester
    matrix = small
    while len(matrix) < size:
        matrix = torch.kron(matrix, small)
    return (matrix / size**0.5).to(getattr(torch, rotation_dtype(size)))[None]


def _decode(form: Form, parts: QuantizedTensors) -> Tensor:
    """Dequantize the weight (out, in) to fp32, rotation, column and branch included."""
    weight = rotate(_dequantize_core(form, parts, torch.float32), parts)
    if form.column:
        weight = weight * parts["column"]
    if form.rank:
        weight = weight + parts["up"].float() @ parts["down"][0].float()
    return weight


def _dequantize_core(form: Form, parts: QuantizedTensors, dtype: torch.dtype) -> Tensor:
    """Dequantize the codes alone, without column, rotation and branch -> (out, in), rounded once, to dtype."""
    weight = _code_values(form, parts)
    out, in_ = weight.shape
    group = form.group or in_
    short = -in_ % group
    # The last group of a row may be cut.
    groups = F.pad(weight, (0, short)).view(out, -1, group) if short else weight.view(out, -1, group)
    groups = groups.mul_(parts["scale"].float()[..., None])
    if form.rounded:
        groups.round_().clamp_(-127, 127)
    if form.channel:
        groups.mul_(parts["channel"][..., None])
    if form.offset is not None:
        groups.add_(parts["offset"].float()[..., None])
    return groups.view(out, -1)[:, :in_].to(dtype)


def _code_values(form: Form, parts: QuantizedTensors) -> Tensor:
    """Return the values of the codes, (out, in) fp32, in memory of their own."""
    codes = parts["weight"]
    if form.codes != "uint8":
        return cast_codes(codes, torch.float32)
    # Two entries at a time: a table of 256 pairs halves the look-ups.
    table = parts["table"][0]
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), -1)
    return pairs[codes.to(torch.int32)].flatten(-2)


def rotate(x: Tensor, parts: QuantizedTensors) -> Tensor:
    """Multiply each run of x (…, in) by the part `rotation` (1, g, g), in the dtype of x; x where there is none."""
    if "rotation" not in parts:
        return x
    matrix = aligned(parts["rotation"][0].to(x.dtype))
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def _codes_input(x: Tensor, parts: QuantizedTensors) -> Tensor:
    """Return x times column and rotation, which the codes are multiplied by, in the dtype of x."""
    if "column" in parts:
        x = (x.float() * parts["column"]).to(x.dtype)
    return rotate(x, parts)


def _add_branch(x: Tensor, parts: QuantizedTensors, out: Tensor) -> Tensor:
    """Add the low-rank branch to out (…, out), in place."""
    if "up" not in parts:
        return out
    down, up = (aligned(matrix.to(x.dtype)) for matrix in (parts["down"][0], parts["up"]))
    return out.add_(F.linear(F.linear(x, down), up))


def _in_chunks(form: Form, x: Tensor, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Dequantize to the dtype of x a chunk at a time, so that no second copy of the weight is made."""
    met = _codes_input(x, parts)
    rows = {name: part for name, part in parts.items() if name in ("weight", "scale", "channel", "offset")}

    def decode(run: slice) -> Tensor:
        chunk = {name: part[run] for name, part in rows.items()}
        return _dequantize_core(form, chunk | {"table": parts["table"]} if "table" in parts else chunk, x.dtype)

    out = linear_by_runs(met, len(parts["weight"]), decode, bias)
    return _add_branch(x, parts, out)


def _with_kernel(form: Form, x: Tensor, parts: QuantizedTensors, bias: Tensor | None) -> Tensor:
    """Multiply 8-bit codes with a scale a row by `mixed_matmul`; dequantize other weights first."""
    met = _codes_input(x, parts)
    if form.codes in MIXED_DTYPES and not (form.group or form.channel or form.offset or form.rounded):
        out = mixed_matmul(met, parts["weight"], parts["scale"], None, bias)
    else:
        # Few numbers beside the codes, in whatever small type.
        scale, offset = parts["scale"].float(), parts["offset"].float() if form.offset else None
        group = form.group or x.shape[-1]
        weight = grouped_dequantize(
            parts["weight"], parts.get("table"), scale, parts.get("channel"), offset, group, form.rounded, x.dtype
        )
        out = F.linear(met, weight, None if bias is None else bias.to(x.dtype))
    return _add_branch(x, parts, out)


@kernel
def _grouped_kernel(
    weight: "Any", table: "Any", scale: "Any", channel: "Any", offset: "Any", out: "Any", N: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, ROUNDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> Any:  # fmt: skip
    """Write the dequantized codes (N, K); channel and offset may be None, table is where codes are numbers."""
    cols, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_K
    depth, row = k + tl.arange(0, BLOCK_K), tl.minimum(cols, N - 1).to(tl.int64)[:, None]
    known = (depth < K)[None, :]
    if table is None:
        w = tl.load(weight + row * K + depth[None, :], mask=known, other=0.0).to(tl.float32)
    else:
        pair = k // 2 + tl.arange(0, BLOCK_K // 2)
        two = tl.load(weight + row * (K // 2) + pair[None, :], mask=(pair < K // 2)[None, :], other=0)
        w = tl.load(table + tl.interleave(two & 15, two >> 4).to(tl.int32))
    group = row * tl.cdiv(K, GROUP) + (depth // GROUP)[None, :]
    w = w * tl.load(scale + group, mask=known, other=0.0)
    if ROUNDED:
        # 1.5 · 2^23: the sum has no bits left for fractions, and rounds to even
        w = (tl.minimum(tl.maximum(w, -127.0), 127.0) + 12582912.0) - 12582912.0
    if channel is not None:
        w = w * tl.load(channel + row)
    if offset is not None:
        w = w + tl.load(offset + group, mask=known, other=0.0)
    at = out + cols.to(tl.int64)[:, None] * K + depth[None, :]
    tl.store(at, w.to(out.dtype.element_ty), mask=(cols < N)[:, None] & known)


def _fake(
    weight: Tensor, table: Tensor | None, scale: Tensor, channel: Tensor | None, offset: Tensor | None, group: int,
    rounded: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return weight.new_empty(len(weight), weight.shape[1] * (1 if table is None else 2), dtype=dtype)


@launcher(_fake)
def grouped_dequantize(
    weight: Tensor, table: Tensor | None, scale: Tensor, channel: Tensor | None, offset: Tensor | None, group: int,
    rounded: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Dequantize codes in groups, without column, rotation and branch, in Triton -> (N, K) in dtype.

    weight (N, K), or (N, K/2) uint8 with a table (1, 16) · scale, offset (N, groups), channel (N, 1), all fp32 · group:
    columns that share a scale · rounded: as in `Form`.
    """
    n, k = weight.shape[0], weight.shape[1] * (1 if table is None else 2)
    out = torch.empty(n, k, dtype=dtype, device=weight.device)
    _grouped_kernel[(-(-n // 16), -(-k // 256))](
        weight, table, scale, channel, offset, out, n, k, group, rounded, 16, 256, num_warps=4
    )
    return out

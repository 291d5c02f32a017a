"""nunchaku's SVDQuant, INT4 and FP4, and diffusers' nunchaku_lite, which stores the same under official names.

A weight is 4-bit codes in groups of 64 (INT4) or 16 (FP4), after its input was divided by a smoothing factor, plus a
branch of low rank in bf16. Everything is packed in the order in which the lanes of a GPU's warp read it, in tiles of
128 rows; here it is put back into rows, once, when a layer is read. Activations are not rounded, where nunchaku rounds
them to 4 bits: the same weights, a smaller error, other bits.

Source: the layouts of nunchaku's kernels and of its weight packer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from s3dit.kernels.number_format import Form, grouped
from s3dit.weights.comfy import E2M1, SIGNED, table_part
from s3dit.weights.container import FLOATS, Checkpoint
from s3dit.weights.lazy_torch import torch
from s3dit.weights.repack import DerivedTensors, Layer

if TYPE_CHECKING:
    from torch import Tensor

E4M3 = "float8_e4m3fn"
TILE = 128


def layers(checkpoint: Checkpoint) -> Iterator[DerivedTensors]:
    """Yield the quantized layers of a file; raises CheckpointError where they are inconsistent."""
    for key in checkpoint:
        if key.endswith(".qweight"):
            yield _layer(Layer(checkpoint, key.removesuffix(".qweight")))


def _layer(layer: Layer) -> DerivedTensors:
    if layer.has("wzeros"):
        raise layer.error("AWQ layers of nunchaku_lite are not supported; needed svdq_w4a4 ones")
    out, half = layer.matrix("qweight", ("int8", "uint8"))
    in_ = 2 * half
    if out % TILE or in_ % TILE:
        raise layer.error(f"qweight stands for {out} x {in_}; needed multiples of {TILE}")
    fp4 = layer.has("wscales") and layer.checkpoint.entry(layer.key("wscales")).dtype == E4M3
    group = 16 if fp4 else 64
    layer.require("wscales", (E4M3,) if fp4 else FLOATS, (in_ // group, out))
    layer.require("smooth_factor", FLOATS, (in_,))
    rank = layer.require("proj_down", FLOATS)[-1]
    if rank % 16:
        raise layer.error(f"its branch has the rank {rank}; needed a multiple of 16")
    low = layer.checkpoint.entry(layer.key("proj_down")).dtype
    layer.require("proj_down", (low,), (in_, rank))
    layer.require("proj_up", (low,), (out, rank))
    has_columns = fp4 and layer.optional("wcscales", FLOATS, (out,))
    has_total = fp4 and layer.optional("wtscale", FLOATS, (), (1,))
    layer.ignore("smooth_factor_orig", "wcscales", "wtscale")
    dtype = layer.checkpoint.entry(layer.key("wscales")).dtype

    def make() -> dict[str, Tensor]:
        from s3dit.kernels.int4 import pack

        parts = {"weight": pack(unpack_codes(layer("qweight"), out, in_)), "table": table_part(E2M1 if fp4 else SIGNED)}
        parts["scale"] = unpack_block_scales(layer("wscales"), out) if fp4 else unpack_vectors(layer("wscales"), out)
        if fp4:
            channel = (
                unpack_vectors(layer("wcscales")[None], out).float()
                if has_columns
                else torch.ones(out, 1, dtype=torch.float32, device="cpu")
            )
            parts["channel"] = channel * layer("wtscale").float() if has_total else channel
        parts["column"] = 1 / unpack_vectors(layer("smooth_factor")[None], in_).float().T
        up, down = (unpack_fragments(layer(leaf)) for leaf in ("proj_up", "proj_down"))
        # Tiles of 16 x 16; those of `up` hold rows first, those of `down` ranks.
        parts["up"] = up.permute(0, 2, 1, 3).reshape(out, rank)
        return parts | {"down": down.permute(1, 2, 0, 3).reshape(1, rank, in_)}

    form = Form("uint8", group, dtype, channel=fp4, column=True, rank=rank, low=low)
    return layer.derive(grouped("svdq-fp4" if fp4 else "svdq-int4", form), out, in_, make)


def unpack_codes(packed: Tensor, out: int, in_: int) -> Tensor:
    """Unpack bytes that hold 4-bit codes in the order of a tensor core's operands -> (out, in) uint8."""
    packed = packed.contiguous().view(torch.uint8)
    halves = torch.stack((packed & 15, packed >> 4), -1)
    # Row: tile, 16 of 8 (a), the halves of 16 (d), 8 (b); column: tile, the halves of 64 (f), 8 of 4 (c), 8 (g).
    lanes = halves.view(out // TILE, in_ // 64, 8, 8, 4, 2, 2, 8)
    return lanes.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(out, in_)


def unpack_vectors(packed: Tensor, length: int) -> Tensor:
    """Unpack vectors (groups, length) from the order of a warp -> (length, groups)."""
    lanes = packed.contiguous().view(length // TILE, len(packed), 1, 8, 4, 2, 2)
    return lanes.permute(0, 2, 3, 5, 4, 6, 1).reshape(length, len(packed))


def unpack_block_scales(packed: Tensor, out: int) -> Tensor:
    """Unpack scales of 16 columns, e4m3 (in / 16, out), -> (out, in / 16)."""
    bits = packed.contiguous().view(torch.uint8)
    lanes = bits.view(out // TILE, -1, 1, 8, 4, 4, 4)
    return lanes.permute(0, 2, 5, 4, 3, 1, 6).reshape(out, -1).view(torch.float8_e4m3fn)


def unpack_fragments(packed: Tensor) -> Tensor:
    """Unpack a matrix (channels, rank) of a tensor core -> tiles (channels / 16, rank / 16, 16, 16)."""
    channels, rank = packed.shape
    lanes = packed.contiguous().view(channels // 16, rank // 16, 8, 4, 2, 2, 1, 2)
    return lanes.permute(0, 1, 4, 2, 6, 5, 3, 7).reshape(channels // 16, rank // 16, 16, 16)

"""Plans the memory of a request within a budget: the fastest residency, streaming and tiling that fits.

What a part takes is known before a weight is read: the bytes of its weights from shapes, and the room that its
arithmetic needs from the lengths of the request, by the formulas below, which a test holds against what is really
allocated. `plan_memory` then tries, from fast to slow: everything resident; parts in turn; of a part that is too large,
as many blocks as fit while the others are streamed (`block_streaming`); the autoencoder by smaller and smaller tiles.

On a GPU the budget is of its memory, with RESERVE set aside for what the allocator does not see. On a CPU it is of RAM
for weights in use and arithmetic; the interpreter, and pages of the mapped file that the system may drop at any time,
are not counted; nor are streamed blocks that are encoded into a number format while they are loaded, as a file that is
quantized already stays mapped. Pictures looked at while they form (previews) come on top.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from s3dit.errors import BackendError, RequestError
from s3dit.model.config import TextEncoderConfig, TransformerConfig, VAEConfig, VisionConfig
from s3dit.runtime.block_streaming import repeated

# Bytes that a device takes besides tensors: its context, the libraries' workspaces, gaps between allocations.
RESERVE = {"cuda": 512 << 20, "mps": 256 << 20, "cpu": 0}
UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base ** (i + 1)
    for i, letter in enumerate("kmgt")
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
# Output channels that the integer products of a CPU do at a time.
CHANNELS = 1024
# Sides of a tile, in latent cells, from best to smallest; None is the whole picture.
TILES = (None, 96, 64, 48, 32)


def parse_size(size: str | int) -> int:
    """Parse a size such as 4GiB, 4GB, 4096MiB, 0.5G (powers of 1024) into bytes; raises RequestError."""
    if isinstance(size, str) and size.strip().isdigit():
        raise RequestError(f"vram is {size}; needed a size with its unit, such as {size.strip()}GiB")
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([a-z]*)", str(size).strip().lower())
    if isinstance(size, bool) or match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise RequestError(f"vram is {size!r}; needed a size such as 4GiB, 4GB, 4096MiB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2]])


def gib(size: int) -> str:
    """Format a size in bytes as MiB or GiB, rounded up to two decimals."""
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{math.ceil(100 * size / unit) / 100:.2f} {name}"


@dataclass(frozen=True, slots=True)
class Need:
    """The memory of a part, in bytes: weights outside of its repeated blocks, each block, and room for its arithmetic.

    work: (tile, bytes) from fast to slow; a part that knows no tiles has one entry, of tile None.
    """

    fixed: int
    blocks: tuple[int, ...]
    work: tuple[tuple[int | None, int], ...]

    @property
    def weights(self) -> int:
        """Bytes of all of its weights."""
        return self.fixed + sum(self.blocks)

    @property
    def slots(self) -> int:
        """Bytes of the two slots for streamed blocks."""
        return 2 * max(self.blocks, default=0)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A plan of memory: how parts share the device, how many blocks of streamed parts are kept, the VAE's tile.

    budget and peak in bytes, peak being the most in use at a time, with the reserve · kept, counts: blocks that stay on
    the device and all blocks, of streamed parts · tile: side in latent cells, None decodes pictures whole.
    """

    budget: int
    mode: Literal["staged", "resident"]
    peak: int
    kept: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    tile: int | None = None

    def __str__(self) -> str:
        """Describe the plan in a line."""
        streamed = [f"{part} streamed with {k} of {self.counts[part]} blocks kept" for part, k in self.kept.items()]
        tiled = [] if self.tile is None else [f"vae by tiles of {8 * self.tile} pixels"]
        how = {"staged": "parts take turns", "resident": "every part stays"}[self.mode]
        return f"memory {gib(self.budget)}: {'; '.join([how, *streamed, *tiled])}; at most {gib(self.peak)}"


def plan_memory(budget: int, needs: Mapping[str, Need], reserve: int = 0) -> MemoryPlan:
    """Return the fastest plan for parts within a budget, all in bytes.

    reserve: bytes that are set aside. Raises BackendError, which names the smallest budget.
    """
    together = sum(need.weights for need in needs.values()) + max(need.work[0][1] for need in needs.values()) + reserve
    if together <= budget:
        return MemoryPlan(budget, "resident", together)
    kept, peak, tile = {}, 0, None
    smallest, worst = max((_smallest(need), part) for part, need in needs.items())
    if smallest + reserve > budget:
        raise BackendError(
            f"{gib(budget)} of memory cannot hold this request: the smallest budget is {gib(smallest + reserve)} "
            f"(for the {worst}); allow that much, or draw fewer or smaller pictures at once"
        )
    for part, need in needs.items():
        k, part_tile, used = _turn(budget - reserve, need)
        peak = max(peak, used + reserve)
        tile = part_tile or tile
        if k is not None:
            kept[part] = k
    return MemoryPlan(budget, "staged", peak, kept, {part: len(needs[part].blocks) for part in kept}, tile)


def plan_memory_beside(
    budget: int, needs: Mapping[str, Need], host: str, guests: Mapping[str, Need], reserve: int = 0
) -> MemoryPlan:
    """Return `plan_memory` where guests are in memory together with their host: all whole, or all streamed."""
    whole = replace(needs[host], fixed=needs[host].fixed + sum(guest.weights for guest in guests.values()))
    try:
        plan = plan_memory(budget, {**needs, host: whole}, reserve)
        if not guests or host not in plan.kept:
            return plan
    except BackendError:
        if not guests:
            raise
    slots = replace(needs[host], fixed=needs[host].fixed + sum(guest.fixed + guest.slots for guest in guests.values()))
    plan = plan_memory(budget, {**needs, host: slots}, reserve)
    counts = {name: len(guest.blocks) for name, guest in guests.items()}
    return replace(plan, kept={**plan.kept, **dict.fromkeys(guests, 0)}, counts={**plan.counts, **counts})


def _smallest(need: Need) -> int:
    """The fewest bytes that a part can run in."""
    least = min(size for _, size in need.work)
    return min(need.weights, need.fixed + need.slots) + least if need.blocks else need.weights + least


def _turn(room: int, need: Need) -> tuple[int | None, int | None, int]:
    """(blocks kept or None for all, tile, bytes used) of the fastest way for a part that has `room` bytes to itself."""
    for tile, work in need.work:
        if need.weights + work <= room:
            return None, tile, need.weights + work
    tile, work = need.work[-1]
    bare = need.fixed + need.slots + work
    largest = max(need.blocks)
    k = (room - bare) // largest
    return k, tile, bare + k * largest


def sizes(model: nn.Module, dtype: torch.dtype, unused: Sequence[str] = ()) -> tuple[int, tuple[int, ...]]:
    """Return the bytes outside of repeated blocks, and those of each block, that a model on the meta device will hold.

    Floating parameters count in `dtype`, buffers in their own; names that match `unused` do not count.
    """
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = [f"{names[id(block)]}." for blocks in repeated(model) for block in blocks]
    total, blocks = 0, dict.fromkeys(prefixes, 0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(fnmatchcase(name, pattern) for pattern in unused):
            continue
        cast = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        size = tensor.numel() * (dtype if cast else tensor.dtype).itemsize
        total += size
        if (prefix := next((p for p in prefixes if name.startswith(p)), None)) is not None:
            blocks[prefix] += size
    return total - sum(blocks.values()), tuple(size for size in blocks.values() if size)


def transformer_work(
    config: TransformerConfig, tokens: int, dtype: torch.dtype, *, lean: bool = True, quantized: bool = False
) -> int:
    """Return the bytes that a pass over `tokens` packed tokens (image and text of all items, padded) allocates at most.

    Attention is the widest place: the stream before and in the block, its normed copy, q, k, v and two rotated (8 in
    dtype), four in fp32 while they are rotated, and the context's tokens and rotary tables. Without lean
    implementations (`swiglu` in place or fused) the feed-forward is: six of the stream, two hidden rows in dtype and
    four in fp32. A weight may be upcast to fp32 on the way.
    A quantized product adds rows of 8 bits, and sums in 32 bits and their fp32 copy for runs of CHANNELS.
    """
    c, dim, hidden = dtype.itemsize, config.dim, config.ffn_dim
    attention = dim * (8 * c + 16)
    feed = 6 * c * dim + hidden * (2 * c + (0 if lean else 16))
    constants = dim * c + 8 * config.head_dim + 64 + (16 * min(hidden, CHANNELS) if quantized else 0)
    return tokens * (max(attention, feed) + constants) + 4 * dim * hidden


def control_work(config: TransformerConfig, tokens: int, dtype: torch.dtype, controls: int) -> int:
    """Return the bytes that so many ControlNets allocate beside a pass over `tokens` packed tokens.

    Each its own stream, the base's at entry, its hint and that times its strength, two hints for the refiner; and their
    sum.
    """
    return controls * tokens * config.dim * dtype.itemsize * 7


def encoder_work(config: TextEncoderConfig, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes that encoding `tokens` prompt tokens allocates at most: a layer's stream and projections."""
    inner = config.num_attention_heads * config.head_dim
    projections = 4 * (config.hidden_size + inner) * (dtype.itemsize + 4)
    per_token = projections + config.intermediate_size * (2 * dtype.itemsize + 16)
    return tokens * per_token + 4 * config.hidden_size * config.intermediate_size


def vision_work(config: VisionConfig, patches: int, dtype: torch.dtype) -> int:
    """Return the bytes that the vision tower allocates at most for `patches` patches of pictures.

    The patches; then a layer's stream, its normed copy, q, k, v and what attention gives, or two rows of its MLP; the
    stretched places in fp32, twice; a weight may be upcast.
    """
    width, hidden = config.hidden_size, config.intermediate_size
    per_patch = 3 * config.patch_size**2 + max(7 * width, 2 * width + 2 * hidden)
    return patches * (per_patch * dtype.itemsize + 8 * width) + 4 * width * hidden


def decoder_work(config: VAEConfig, height: int, width: int, tile: int | None, dtype: torch.dtype) -> int:
    """Return the bytes that decoding a picture of height × width pixels allocates at most.

    Three tensors of the widest channels at full resolution (256 in the official model: the input, its normed copy, the
    output; in 16 bits on a CPU, which goes by strips, 2.6 were seen), of the whole picture or one tile; and the result,
    twice.
    """
    channels = max(config.block_out_channels[:2])
    side = 8 * tile if tile is not None else max(height, width)
    pixels = min(height, side) * min(width, side)
    return pixels * (3 * channels * dtype.itemsize + 64) + 24 * height * width

"""Plans the memory of a request within a budget: the fastest residency, streaming and tiling that fits.

What a part takes is known before a weight is read: the bytes of its weights from shapes, and the room that its
arithmetic needs from the lengths of the request, by the formulas below, which a test holds against what is really
allocated. `plan_memory` then tries, from fast to slow: everything resident; parts in turn; of a part that is too large,
as many blocks as fit while the others are streamed (`block_streaming`); the autoencoder by smaller and smaller tiles.

`vram` is a budget of the device's memory: on a GPU with RESERVE set aside for what the allocator does not see; on a CPU
of weights in use and arithmetic alone, and not of streamed blocks that are no views of their file. `ram` is of all that
a process which computes on the CPU has resident, as the system counts it: Python, torch and whatever else there is,
weights in mapped files too. Streamed blocks are then in memory one at a time (`file_streaming`), and those that are no
views of their file always. Pictures looked at while they form (previews) come on top.
"""

import math
import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from s3dit.errors import BackendError, RequestError
from s3dit.model.config import TextEncoderConfig, TransformerConfig, VAEConfig, VisionConfig
from s3dit.runtime.block_streaming import repeated, stays
from s3dit.weights.mapped_file import PAGEMAP

# Bytes that a device takes besides tensors: its context, the libraries' workspaces, gaps between allocations.
RESERVE = {"cuda": 512 << 20, "mps": 256 << 20, "cpu": 0}
# Bytes that a process has resident besides weights and arithmetic: at least these, or what it had before the model was
# opened, in steps, and room for code, tables and gaps that come later.
PROCESS, PROCESS_STEP, PROCESS_ROOM = 512 << 20, 64 << 20, 192 << 20
UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base ** (i + 1)
    for i, letter in enumerate("kmgt")
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}
# Output channels that the integer products of a CPU do at a time.
CHANNELS = 1024
# Sides of a tile, in latent cells, from best to smallest; None is the whole picture.
TILES = (None, 96, 64, 48, 32)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that may be in use, and those of them that are set aside; process: whether all that is resident counts."""

    size: int
    reserve: int
    process: bool = False


def budget_of(vram: str | int | None, ram: str | int | None, residency: str | None, device: str) -> Budget | None:
    """Return the budget that a user gave, if any; raises RequestError, and BackendError where it cannot be kept."""
    if residency not in (None, "staged", "resident", "streamed"):
        raise RequestError(f"residency is {residency!r}; needed staged, resident or streamed")
    given = {name: size for name, size in (("vram", vram), ("ram", ram)) if size is not None}
    if not given:
        return None
    name = next(iter(given))
    if len(given) > 1:
        raise RequestError("both vram and ram are given; ram is for computing on a CPU, and counts the whole process")
    if residency is not None:
        raise RequestError(f"both {name} and residency {residency} are given; {name} chooses the residency by itself")
    size = parse_size(given[name], name)
    if name == "vram":
        return Budget(size, RESERVE[device])
    if device != "cpu":
        raise BackendError(f"ram is a budget for computing on a CPU, and this is {device}; give vram, or device cpu")
    if not PAGEMAP.exists():
        raise BackendError(f"ram needs {PAGEMAP}, by which Linux says whose pages are whose; leave ram out")
    return Budget(size, max(PROCESS, -(-resident() // PROCESS_STEP) * PROCESS_STEP + PROCESS_ROOM), True)


def resident() -> int:
    """Return the bytes that this process has resident now, as Linux counts them."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE


def parse_size(size: str | int, name: str = "vram") -> int:
    """Parse a size such as 4GiB, 4GB, 4096MiB, 0.5G (powers of 1024) into bytes; raises RequestError, with a name."""
    if isinstance(size, str) and size.strip().isdigit():
        raise RequestError(f"{name} is {size}; needed a size with its unit, such as {size.strip()}GiB")
    match = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([a-z]*)", str(size).strip().lower())
    if isinstance(size, bool) or match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise RequestError(f"{name} is {size!r}; needed a size such as 4GiB, 4GB, 4096MiB or a number of bytes")
    return int(float(match[1]) * UNITS[match[2]])


def gib(size: int) -> str:
    """Format a size in bytes as MiB or GiB, rounded up to two decimals."""
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{math.ceil(100 * size / unit) / 100:.2f} {name}"


@dataclass(frozen=True, slots=True)
class Need:
    """The memory of a part, in bytes: weights outside of its repeated blocks, each block, and room for its arithmetic.

    work: (tile, bytes) from fast to slow; a part that knows no tiles has one entry, of tile None · passing: blocks that
    are in memory at a time while they are streamed · stays: bytes of blocks that stay in memory although streamed.
    """

    fixed: int
    blocks: tuple[int, ...]
    work: tuple[tuple[int | None, int], ...]
    passing: int = 2
    stays: int = 0

    @property
    def weights(self) -> int:
        """Bytes of all of its weights."""
        return self.fixed + sum(self.blocks)

    @property
    def slots(self) -> int:
        """Bytes of weights besides the fixed ones while all blocks are streamed."""
        return self.held(0) - self.fixed

    def held(self, kept: int) -> int:
        """Bytes of weights in memory while all blocks but `kept` are streamed."""
        streamed = self.streamed(kept)
        whole = self.weights - sum(streamed)
        return min(self.weights, whole + self.passing * max(streamed, default=0) + self.stays)

    def streamed(self, kept: int) -> list[int]:
        """Bytes of each block that is streamed while `kept` stay."""
        count = len(self.blocks)
        return [size for i, size in enumerate(self.blocks) if not stays(i, kept, count)]


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
    return need.held(0) + least


def _turn(room: int, need: Need) -> tuple[int | None, int | None, int]:
    """(blocks kept or None for all, tile, bytes used) of the fastest way for a part that has `room` bytes to itself."""
    for tile, work in need.work:
        if need.weights + work <= room:
            return None, tile, need.weights + work
    tile, work = need.work[-1]
    k = next(k for k in reversed(range(len(need.blocks))) if need.held(k) + work <= room)
    return k, tile, need.held(k) + work


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


def staying(model: nn.Module, unused: Sequence[str], views: Callable[[str, Tensor], bool]) -> int:
    """Return the bytes of a model's blocks that stay in memory although they are streamed: what is no view of a file.

    views: whether a tensor is one, by its name and the model's own, on the meta device.
    """
    names = {id(module): name for name, module in model.named_modules()}
    blocks = tuple(f"{names[id(block)]}." for blocks in repeated(model) for block in blocks)
    held = (*model.named_parameters(), *model.named_buffers())
    return sum(
        tensor.nbytes
        for name, tensor in held
        if name.startswith(blocks) and not any(fnmatchcase(name, each) for each in unused) and not views(name, tensor)
    )


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

"""Floors and estimated times of launches, from what was compiled and the published or measured rates of a device.

Rates are those of an H200 (`results/h200`), low where power limits a long run of passes, high in a single one; those of
an H100 are taken to be the same but for copies, and were not measured. A floor is what a launch cannot be faster than:
its bytes at the rate of a copy, its multiplications at that of the tensor cores, its instructions at one a cycle and
scheduler. An estimate divides the largest floor by the share of it that such kernels reach; it is given as (low, high).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kernel_device import REGISTERS, TARGETS, Launch, Recorded
from kernel_passes import Pass
from kernel_sass import Code, mma_flop

SCHEDULERS = 4


@dataclass(frozen=True)
class Device:
    """A GPU: bytes a second of a copy as reached, SMs, and cycles a second of an SM under load."""

    copy: float
    processors: int = 132
    clock: float = 1.70e9


# Copies as published for both (3.0 of 3.35 TB/s, 4.3 of 4.8), and the clock that an H100 keeps in products.
DEVICES = {"H100": Device(3.0e12), "H200": Device(4.3e12)}
# Multiplications and additions of an SM of Hopper a cycle. Source: NVIDIA, H100 whitepaper, dense.
TENSOR_FLOP = {"16": 4096, "8": 8192}
# Rates of libraries in TFLOP/s, (low, high): cuBLAS in bf16, whose 128 × 256 tiles fill 3.75 waves at 3,840 columns and
# 10.0 at 10,240; cuBLASLt in e4m3 by rows; cuDNN's attention, and the memory-efficient kernel for heads above 256;
# cuDNN's convolutions, channels last.
LIBRARY_RATES = {
    "mm": (690.0, 815.0), "mm narrow": (660.0, 780.0), "_scaled_mm": (1220.0, 1510.0), "attention": (570.0, 650.0),
    "attention wide": (150.0, 155.0), "convolution": (750.0, 800.0),
}  # fmt: skip
NARROW = 4096
# What our own kernels reach of their floor: (low, high). Power, not cycles, limits 8 bits.
OWN_SHARES = {"16": (0.75, 0.88), "8": (0.60, 0.70)}
COPY_SHARE, ISSUE_SHARE = 0.90, 0.80
# Seconds of the shortest launch inside of a graph.
SHORTEST = 2e-6
GROUPS = ("products", "attention", "rows", "dequantization", "convolutions", "other")
ASSUMPTIONS = {
    "devices": {name: asdict(device) for name, device in DEVICES.items()}, "tensor_flop_a_cycle": TENSOR_FLOP,
    "library_tflops": LIBRARY_RATES, "own_share_of_floor": OWN_SHARES, "copy_share": COPY_SHARE,
    "issue_share": ISSUE_SHARE, "shortest_launch_us": SHORTEST * 1e6,
}  # fmt: skip


@dataclass(frozen=True)
class Floors:
    """Floors of one launch of our own, in µs: issue and tensor at the devices' clock, copy for each device."""

    issue: float
    tensor: float
    copy: dict[str, float]


def group(launch: Launch) -> str:
    """Return which of GROUPS a launch belongs to."""
    if launch.flop:
        if "convolution" in launch.name:
            return "convolutions"
        return "attention" if "attention" in launch.op + launch.name else "products"
    if launch.kernel is None:
        return "other"
    return "dequantization" if "dequantize" in launch.name else "rows"


def occupancy(code: Code, shared: int, warps: int, capability: int) -> tuple[int, float]:
    """Return how many programs an SM holds at a time, and the share of its warps that they are.

    shared: bytes of a program. Registers are given to a warp by 256, and a program takes 1 KiB of shared memory more.
    """
    target = TARGETS[capability]
    registers = max(1, -(-code.registers * 32 // 256) * 256) * warps
    programs = min(
        REGISTERS // registers, (target.shared << 10) // (shared + 1024), target.warps // warps, target.programs
    )
    return programs, programs * warps / target.warps


def bits(opcode: str) -> str:
    """Return the width of the operands of a tensor-core instruction: "8" or "16"."""
    return "8" if opcode[0] in "QI" else "16"


def tensor_cycles(launch: Launch, code: Code) -> float:
    """Return the cycles that the tensor cores of one SM of Hopper would need for all of a launch's multiplications."""
    if not code.mma_flop:
        return 0.0
    one_pass = sum(mma_flop(opcode) * count / TENSOR_FLOP[bits(opcode)] for opcode, count in code.mma)
    return launch.flop / code.mma_flop * one_pass


def trips(launch: Launch, code: Code, warps: int) -> tuple[float, float]:
    """Return passes of the hot loop and ends of a tile, each summed over all programs.

    A hot loop with tensor-core instructions runs as often as the launch's multiplications need, another as often as
    its bytes do. Tiles of a program that walks over several are told by its constants K and BLOCK_K.
    """
    if code.mma_flop and launch.flop:
        passes = launch.flop / (code.mma_flop * warps)
        depth, block = launch.constants.get("K", 0), launch.constants.get("BLOCK_K", 0)
        return passes, max(launch.programs, passes * block / depth if depth and block else 0.0)
    passes = launch.bytes / (code.loop_bytes * warps) if code.loop_bytes else launch.programs
    return max(passes, launch.programs), launch.programs


def floors(launch: Launch, code: Code, warps: int) -> Floors:
    """Return the floors of a launch of our own on Hopper."""
    device = DEVICES["H100"]
    passes, tiles = trips(launch, code, warps)
    issued = (passes * code.loop + tiles * code.outside) * warps
    unit = 1e6 / device.processors / device.clock
    copy = {name: launch.bytes / each.copy * 1e6 for name, each in DEVICES.items()}
    return Floors(issued / SCHEDULERS * unit, tensor_cycles(launch, code) * unit, copy)


def own_seconds(launch: Launch, code: Code, warps: int, device: Device) -> tuple[float, float]:
    """Return the estimated seconds of a launch of our own, (low, high).

    Rows: the larger of copy and issue. Products: whole waves of tiles, each its loop (the larger of tensor cores and
    issue) and then its end; in attention, whose softmax waits for scores, tensor cores and issue one after another.
    """
    copied = launch.bytes / device.copy / COPY_SHARE
    passes, tiles = trips(launch, code, warps)
    if not launch.flop or not code.mma:
        issued = floors(launch, code, warps).issue / 1e6 / ISSUE_SHARE
        return (max(copied, issued, SHORTEST),) * 2
    tensor, issue = tensor_cycles(launch, code) / passes, code.loop * warps / SCHEDULERS
    step = tensor + issue if group(launch) == "attention" else max(tensor, issue)
    waves = (
        max(-(-tiles // device.processors), 1.0) if launch.programs <= device.processors else tiles / device.processors
    )
    cycles = waves * (passes / tiles * step + code.outside * warps / SCHEDULERS)
    low, high = OWN_SHARES[min((bits(opcode) for opcode, _ in code.mma), key=int)]
    seconds = cycles / device.clock
    return max(seconds / high, copied, SHORTEST), max(seconds / low, copied, SHORTEST)


def library_seconds(launch: Launch, device: Device) -> tuple[float, float]:
    """Return the estimated seconds of a launch of torch's, (low, high)."""
    copied = max(launch.bytes / device.copy / COPY_SHARE, SHORTEST)
    if not launch.flop:
        return copied, copied
    kind = launch.name
    if group(launch) == "attention":
        kind = "attention wide" if int(launch.tensors[0].split()[0].split("×")[-1]) > 256 else "attention"
    elif group(launch) == "convolutions":
        kind = "convolution"
    elif kind != "_scaled_mm":
        columns = int(launch.tensors[-1].split()[0].split("×")[-1])
        kind = "mm narrow" if columns < NARROW else "mm"
    low, high = LIBRARY_RATES[kind]
    return max(launch.flop / high / 1e12, copied), max(launch.flop / low / 1e12, copied)


def add(total: dict[str, Any], key: str, seconds: tuple[float, float]) -> None:
    """Add seconds (low, high) to the milliseconds [low, high] at a key."""
    before = total.get(key, [0.0, 0.0])
    total[key] = [before[0] + seconds[0] * 1e3, before[1] + seconds[1] * 1e3]


def rows(capability: int, each: Pass, record: Recorded, codes: dict[int, Code]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a pass: one a kernel and shape of our own, and one of the whole if it is that."""
    kernels = [launch for launch in record.launches if launch.kernel is not None]
    for launch in {(launch.name, launch.op, launch.tensors): launch for launch in kernels}.values():
        row = kernel_row(launch, codes[id(launch.kernel)], capability)
        yield "kernels", {"arch": capability, "pass": str(each)} | row
    if each.layers is not None or capability != 90:
        return
    ms: dict[str, Any] = {name: {} for name in DEVICES}
    for launch in record.launches:
        for name, gpu in DEVICES.items():
            if launch.kernel is None:
                seconds = library_seconds(launch, gpu)
            else:
                warps = launch.kernel.metadata.num_warps
                seconds = own_seconds(launch, codes[id(launch.kernel)], warps, gpu)
            for key in (group(launch), "all"):
                add(ms[name], key, seconds)
    groups = Counter(map(group, record.launches))
    yield "passes", {
        "pass": str(each), "part": each.part, "format": each.form, "side": each.side, "text": each.text,
        "launches": len(record.launches), "reads": record.reads, "by_group": dict(groups),
        "gb": round(sum(launch.bytes for launch in record.launches) / 1e9, 3),
        "tflop": round(sum(launch.flop for launch in record.launches) / 1e12, 3),
        "ms": {name: {key: [round(ms, 2) for ms in pair] for key, pair in each.items()} for name, each in ms.items()},
    }  # fmt: skip


def kernel_row(launch: Launch, code: Code, capability: int) -> dict[str, Any]:
    """Return what the report says of one kernel at one size."""
    metadata = launch.kernel.metadata
    programs, share = occupancy(code, metadata.shared, metadata.num_warps, capability)
    row: dict[str, Any] = {
        "group": group(launch), "kernel": launch.name.strip("_"), "op": launch.op,
        "tensors": " · ".join(launch.tensors), "grid": launch.programs, "warps": metadata.num_warps,
        "stages": metadata.num_stages, "registers": code.registers, "spills": code.spills, "stack": code.stack,
        "shared": metadata.shared, "programs_an_sm": programs, "occupancy": round(share, 3),
        "mma": " + ".join(f"{count} {opcode}" for opcode, count in code.mma), "copies": ", ".join(code.copies),
        "outside": code.outside, "loop": code.loop, "mb": round(launch.bytes / 1e6, 3),
        "gflop": round(launch.flop / 1e9, 3),
    }  # fmt: skip
    if capability == 90:
        least = floors(launch, code, metadata.num_warps)
        row |= {"issue_us": round(least.issue, 2), "tensor_us": round(least.tensor, 2)}
        row |= {f"copy_us_{name}": round(us, 2) for name, us in least.copy.items()}
    return row

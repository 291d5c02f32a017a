"""What a compiled kernel is made of: registers, spills, tensor-core and copy instructions, instructions executed.

All of it comes from the cubin, by `cuobjdump` and `nvdisasm` of Triton's own package; where these are missing, what is
known without them is given and the rest is 0.

Instructions executed by a warp outside of its hot loop are those up to the last EXIT of the kernel itself, without slow
paths. A slow path is what a forward branch on a condition jumps over, with a CALL of a function but no work in it (the
rare cases of divisions and roots, traps), and what stands behind the last EXIT: those functions, waits that were not
over at once, padding. A forward branch that jumps over anything else is counted as not taken, so the figure errs
upwards. The hot loop is the shortest loop with tensor-core instructions in it, or without any the longest loop. Where
the loop over tiles and that over their depth are one, branches in it jump over the start and the end of a tile: what a
forward branch on a condition jumps over in a hot loop, and has no tensor-core instruction in it, counts as outside.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^/\*[0-9a-f]+\*/\s+(.*?)\s*;")
OPCODE = re.compile(r"^(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][A-Za-z0-9_.]*)(?P<rest>.*)$")
# BRA.U UP0, `(.L_x_2)
UNIFORM_CONDITION = re.compile(r"^\s*!?UP\d,")
BRANCH_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
# Of Hopper, by a group of four warps: HGMMA.64x256x16. Before it and on consumers' Blackwell, by a warp: HMMA.16816.
GROUP_MMA = re.compile(r"^[HQI]GMMA\.(\d+)x(\d+)x(\d+)")
WARP_MMA = re.compile(r"^[HQI]MMA\.(?:SP\.)?(16)(8)(\d+)")
TENSOR_CORES = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA", "OMMA")
STORES = ("STG", "UTMASTG")
COPIES = {"TMA": ("UTMALDG", "UTMASTG", "UBLKCP"), "cp.async": ("LDGSTS",), "plain": ("LDG", "STG")}


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: its opcode with modifiers, whether it has a condition, and the label that it jumps to, or "".

    A call of a function has no label: those of a kernel are its own places.
    """

    opcode: str
    guarded: bool
    target: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Code:
    """What one kernel is made of.

    registers of a thread · stack: bytes of a thread, local memory included · spills: instructions that load or store
    local memory · outside, loop: instructions that a warp executes once outside of the hot loop, and in one pass of it
    · mma: tensor-core instructions of the hot loop, by opcode · mma_flop: what a warp multiplies and adds with them in
    one pass · loop_bytes: of global memory that one pass of a warp loads and stores · copies: kinds of copies between
    global memory and the SM, most capable first.
    """

    registers: int = 0
    stack: int = 0
    spills: int = 0
    outside: int = 0
    loop: int = 0
    mma: tuple[tuple[str, int], ...] = ()
    mma_flop: float = 0.0
    loop_bytes: int = 0
    copies: tuple[str, ...] = ()


def tool(name: str) -> Path | None:
    """Return the path of a program of Triton's package, None where it is not there."""
    found = find_spec("triton")
    path = Path(found.origin or "").parent / "backends" / "nvidia" / "bin" / name if found else None
    return path if path and path.exists() else None


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return what `cuobjdump --dump-resource-usage` and `nvdisasm -c` say of a cubin; "" of one that is missing."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        answers = []
        for name, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c")):
            program = tool(name)
            command = [str(program), option, file.name]
            answers.append(subprocess.run(command, capture_output=True, text=True).stdout if program else "")
    return answers[0], answers[1]


def moved(opcode: str) -> int:
    """Return the bytes that a load or store of global memory moves for a warp; 0 of another instruction."""
    name, *modifiers = opcode.split(".")
    if name not in (*COPIES["plain"], *COPIES["cp.async"]):
        return 0
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return 32 * next((widths[modifier] for modifier in modifiers if modifier in widths), 4)


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions of SASS, and the place of every label among them."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, sass.splitlines()):
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (text := INSTRUCTION.match(line)) and (found := OPCODE.match(text[1])):
            target = BRANCH_TARGET.search(found["rest"])
            guarded = bool(found["guard"]) or bool(UNIFORM_CONDITION.match(found["rest"]))
            instructions.append(Instruction(found["name"], guarded, target[1] if target else ""))
    return instructions, labels


def loops(instructions: list[Instruction], labels: dict[str, int]) -> list[tuple[int, int]]:
    """Return first and last instruction of every loop, which is a branch back (not to itself: that ends a kernel)."""
    branches = [(labels.get(each.target, len(instructions)), i) for i, each in enumerate(instructions)]
    return [(start, i) for start, i in branches if instructions[i].name == "BRA" and start < i]


def executed(instructions: list[Instruction], labels: dict[str, int]) -> list[int]:
    """Return the places of the instructions that a warp executes at least once: see the module's docstring."""
    last = max((i for i, each in enumerate(instructions) if each.name == "EXIT"), default=len(instructions) - 1)
    calls = [each.name == "CALL" and not each.target for each in instructions]
    works = [each.name in (*TENSOR_CORES, *STORES) for each in instructions]
    return _taken(
        instructions, labels, (0, last), lambda start, end: any(calls[start:end]) and not any(works[start:end])
    )


def _taken(
    instructions: list[Instruction], labels: dict[str, int], bounds: tuple[int, int], jump: Callable[[int, int], bool]
) -> list[int]:
    """Return the places in bounds, where a forward branch on a condition jumps over those for which `jump` holds."""
    places, (i, last) = [], bounds
    while i <= last:
        places.append(i)
        each, i = instructions[i], i + 1
        end = labels.get(each.target, 0)
        conditional = each.name == "BRA" and each.guarded and i < end <= last
        if conditional and jump(i, end):
            i = end
    return places


def mma_flop(opcode: str) -> float:
    """Return the multiplications and additions of a tensor-core instruction, divided by its warps; 0 if unknown."""
    if shape := GROUP_MMA.match(opcode):
        return 2.0 * int(shape[1]) * int(shape[2]) * int(shape[3]) / 4
    if shape := WARP_MMA.match(opcode):
        return 2.0 * int(shape[1]) * int(shape[2]) * int(shape[3])
    return 0.0


def analyze(resources: str, sass: str) -> Code:
    """Return what a kernel is made of, from what `disassemble` gives."""
    sizes = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    instructions, labels = parse(sass)
    places = executed(instructions, labels)
    tensor = [each.name in TENSOR_CORES for each in instructions]
    found = [bounds for bounds in loops(instructions, labels) if bounds[1] in places]
    hot = [(start, end) for start, end in found if any(tensor[start : end + 1])]
    length = {bounds: sum(bounds[0] <= i <= bounds[1] for i in places) for bounds in found}
    loop = min(hot, key=length.__getitem__) if hot else max(found, key=length.__getitem__, default=(0, -1))
    inside = set(_taken(instructions, labels, loop, lambda start, end: bool(hot) and not any(tensor[start:end])))
    body = [instructions[i] for i in places if i in inside]
    mma = Counter(each.opcode for each in body or instructions if each.name in TENSOR_CORES)
    names = {each.name for each in instructions}
    return Code(
        registers=sizes.get("REG", 0),
        stack=sizes.get("STACK", 0) + sizes.get("LOCAL", 0),
        spills=sum(each.name in ("LDL", "STL") for each in instructions),
        outside=len(places) - len(body),
        loop=len(body),
        mma=tuple(sorted(mma.items())),
        mma_flop=sum(mma_flop(opcode) * count for opcode, count in mma.items()),
        loop_bytes=sum(moved(each.opcode) for each in body),
        copies=tuple(kind for kind, opcodes in COPIES.items() if names & set(opcodes)),
    )

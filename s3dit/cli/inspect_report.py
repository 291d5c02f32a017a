"""The output of `s3dit inspect`: a Report of parts of a model, or Facts of anything else, and how to use it.

Each is text for people and plain JSON values. A command is printed as it is to be typed: quoted for a shell, never cut,
with PLACE before a name whose folder only the user knows.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from s3dit.cli.record import PLACE
from s3dit.terminal import line

# What the rest of a model is taken from in the command that is proposed.
HOME = "Tongyi-MAI/Z-Image-Turbo"
PROMPT = "a red fox in the snow"
HASH = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a model in a file: formats are bytes by group of layers and number format, faults what is wrong."""

    part: str
    container: str
    spelling: str
    producer: str
    kind: str
    tensors: int
    nbytes: int
    formats: dict[str, dict[str, int]]
    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """Parts of a model in a file or folder.

    rest: keys of no part · missing: what a picture needs besides · command: draws with it, "" where nothing can.
    """

    path: str
    parts: tuple[Part, ...]
    rest: tuple[str, ...]
    missing: tuple[str, ...]
    command: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for part in self.parts:
            lines.append(f"{part.part}: {part.kind}")
            lines.append(f"  {part.container}, {part.tensors} tensors, {size(part.nbytes)}; {part.spelling} names")
            lines.append(f"  made by {part.producer or 'a program that does not say so'}")
            for group, formats in part.formats.items():
                lines.append(f"  {group:<16} " + ", ".join(f"{name} {size(count)}" for name, count in formats.items()))
            lines += [f"  note: {note}" for note in part.notes]
            lines += [f"  fault: {fault}" for fault in part.faults]
        if self.rest:
            first = ", ".join(self.rest[:3])
            lines.append(
                f"not used: {len(self.rest)} tensors of no part ({first}{', …' if len(self.rest) > 3 else ''})"
            )
        lines.append(f"missing: {', '.join(self.missing) or 'nothing, it is a whole model'}")
        if not self.command:
            lines.append("not usable as it is, for the faults above")
        return "\n".join([*map(line, lines), *_use(self.command)])


@dataclass(frozen=True, slots=True)
class Facts:
    """What is in a file that is no part of a model: facts by name, what else to know, how to use it.

    No command is given for what cannot be used as it is; the notes then say why.
    """

    path: str
    kind: str
    facts: dict[str, Any]
    command: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}", *_rows(self.facts), *(f"note: {note}" for note in self.notes)]
        return "\n".join([*map(line, lines), *_use(self.command)])


def _use(command: str) -> Iterator[str]:
    """The line of a command, printable but never shortened."""
    if PLACE in command:
        yield f"put your own path where the command says {PLACE}…"
    if command:
        yield "use it: " + "".join(line(command[i : i + 32]) for i in range(0, len(command), 32))


def _rows(facts: dict[str, Any], depth: int = 1) -> Iterator[str]:
    """A line a fact; what has facts of its own, on lines of their own, further in."""
    for name, value in facts.items():
        if value in ("", None, [], (), {}):
            continue
        entries = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            yield f"{'  ' * depth}{name}"
            yield from _rows(value, depth + 1)
        elif any(isinstance(entry, dict) for entry in entries):
            yield from (f"{'  ' * depth}{name:<20} {_plain(entry)}" for entry in entries)
        else:
            yield f"{'  ' * depth}{name:<20} {_plain(value)}"


def _plain(value: Any) -> str:
    """A value in words; of a hash its beginning."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return f"{text[:12]}…" if HASH.fullmatch(text) else text


def draw(options: Sequence[str], prompt: str = PROMPT) -> str:
    """The command that draws with these options."""
    words = f'"{PROMPT}"' if prompt == PROMPT else shlex.quote(prompt)
    given = shlex.join(options)
    # A prompt that begins like an option is no option behind two dashes.
    return f"s3dit generate {given} -- {words}" if prompt.startswith("-") else f"s3dit generate {words} {given}"


def size(count: int) -> str:
    """Bytes for people."""
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e8
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )

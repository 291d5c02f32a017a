"""Compare this engine with diffusers, stage by stage, on any model in the official layout; name the first difference.

    python tools/parity.py                                    the embedded model
    python tools/parity.py Z-Image-Turbo --steps 1            a folder, or a name on the hub
    python tools/parity.py DIR --inside layers.3              look at every module inside one block, too
    python tools/parity.py DIR --dtype bf16                   who is nearer to the fp32 truth?
    python tools/parity.py DIR --official ../Z-Image          against the official repository's transformer
    python tools/parity.py DIR --record a.safetensors         keep this engine's stages …
    python tools/parity.py DIR --against a.safetensors        … and compare with them elsewhere, without diffusers

Each side runs whole, on its own results, from the same prompt and noise. The error of a stage is thus all that has come
together up to it, |ours - reference| / |reference|, and the first stage beyond the tolerance is where to look. Modules
of the transformer are looked at in the first step; time, velocity and latents in every step. Bytes of the picture may
differ by one of 255, which is a rounding of nearly equal values.

In bf16 there is no exact answer. The reference runs a second time in fp32, and a stage parts where this engine is
farther from that truth than the reference is in bf16, times --margin. Parts are loaded one at a time, but all stages
are kept in memory: little at the default size, several GB a side for the full-size model at 1024 x 1024.

Exit code: 0 all stages agree, 1 a stage parts, 2 they could not be compared.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from parity_sides import Task, ours, reference

from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.research.trace import Record, Row, compare, load, save
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import read_model
from s3dit.weights.hub import resolve

# Larger pictures cost more and show no more: sizes are a matter of positions, which are a stage of their own.
SIDE = 256
# In bf16, errors of fp32's own rounding are no errors.
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage compared: this engine's error, the reference's own (bf16 only), and whether it parts."""

    row: Row
    reference: float | None
    parts: bool

    def __str__(self) -> str:
        beside = "" if self.reference is None else f"{self.reference:9.2e} "
        return f"{'PARTS' if self.parts else '   ok'} {beside}{self.row}"

    def to_json(self) -> dict[str, object]:
        """JSON values; an infinite error (missing, another shape, not finite on one side) is null."""
        errors = {"error": self.row.error, "largest": self.row.largest, "reference_error": self.reference}
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in errors.items()}
        return {"name": self.row.name, "parts": self.parts, **finite, "shapes": self.row.shapes}


def judge(mine: Record, truth: Record, tolerance: float, inside: str = "") -> list[Stage]:
    """Compare with a reference that ran in the same precision."""
    stages = []
    for row in both(compare(mine, truth), inside):
        exact = row.name.endswith("token ids")
        parts = row.largest > 1 if row.name == "pixels" else not row.error <= (0.0 if exact else tolerance)
        stages.append(Stage(row, None, parts))
    return stages


def judge_bf16(mine: Record, theirs: Record, truth: Record, margin: float, inside: str = "") -> list[Stage]:
    """Compare this engine's distance to the fp32 truth with the reference's."""
    errors = {row.name: row.error for row in compare(theirs, truth)}
    stages = []
    for row in both(compare(mine, truth), inside):
        error = errors.get(row.name, 0.0)
        stages.append(Stage(row, error, not row.error <= max(margin * error, ROUNDING)))
    return stages


def both(rows: Sequence[Row], inside: str) -> list[Row]:
    """Leave out the finer modules that one side does not call: this engine fuses some that diffusers runs apart."""
    return [row for row in rows if None not in row.shapes or not inside or not row.name.startswith(f"{inside}.")]


def check_notes(path: Path, found: Mapping[str, str], needed: Mapping[str, str]) -> None:
    """Raise RequestError unless a stored record is of the same task."""
    for key, value in needed.items():
        if found.get(key) != value:
            raise RequestError(
                f"{path}: recorded with {key} {found.get(key)}, needed {value}; give the options that it was recorded "
                "with"
            )


def notes_of(task: Task) -> dict[str, str]:
    """What two records must share to be comparable; the model's folder and the device may differ."""
    return {key: str(value) for key, value in asdict(task).items() if key not in ("folder", "device")}


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="embedded", help="a folder, or a name on the hub (default: %(default)s)")
    add("--prompt", help="default: the model's own, or a red fox in the snow")
    add("--negative-prompt", default="", help="used when guidance is on (default: empty)")
    add("--height", type=int, help=f"pixels, a multiple of 16 (default: the model's, at most {SIDE})")
    add("--width", type=int, help="likewise")
    add("--steps", type=int, default=2, help="steps of the sampler (default: %(default)s)")
    add("--guidance", type=float, help="guidance_scale, 0 is off (default: the model's)")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="what the weights are kept in (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda or mps, for both sides (default: %(default)s)")
    add("--tolerance", type=float, default=1e-5, help="largest relative error in fp32 (default: %(default)s)")
    add("--margin", type=float, default=1.25, help="bf16: times the reference's own error (default: %(default)s)")
    add("--inside", default="", metavar="MODULE", help="look at every module inside this one, such as layers.3")
    add("--record", type=Path, metavar="FILE", help="keep this engine's stages as safetensors")
    other = parser.add_mutually_exclusive_group().add_argument
    other("--official", type=Path, metavar="DIR", help="a checkout of Tongyi-MAI/Z-Image, for its transformer")
    other("--against", type=Path, metavar="FILE", help="stages kept by --record, in the place of diffusers")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def task_of(args: argparse.Namespace) -> Task:
    """The task that the options describe, with the model's own settings where they say nothing."""
    folder = EMBEDDED if args.model == "embedded" else resolve(args.model)
    config = read_model(folder)
    settings = config.settings
    return Task(
        folder=folder,
        prompt=config.prompt or "a red fox in the snow" if args.prompt is None else args.prompt,
        negative_prompt=args.negative_prompt,
        height=min(settings.height, SIDE) if args.height is None else args.height,
        width=min(settings.width, SIDE) if args.width is None else args.width,
        steps=args.steps,
        guidance=settings.guidance_scale if args.guidance is None else args.guidance,
        seed=args.seed,
        inside=args.inside,
        device=args.device,
    )


@torch.inference_mode()
def climb(args: argparse.Namespace) -> list[Stage]:
    """Run what has to be run, and compare."""
    task = task_of(args)
    truth: Record | None = None
    if args.against is not None:
        truth, notes = load(args.against)
        check_notes(args.against, notes, notes_of(task))
    mine = ours(task, args.dtype)
    if args.record is not None:
        save(mine, args.record, notes_of(task))
    if truth is not None:
        return judge(mine, truth, args.tolerance, args.inside)
    truth = reference(task, torch.float32, args.official)
    if args.dtype == "fp32":
        return judge(mine, truth, args.tolerance, args.inside)
    theirs = reference(task, torch.bfloat16, args.official)
    return judge_bf16(mine, theirs, truth, args.margin, args.inside)


def report(stages: Sequence[Stage], as_json: bool) -> int:
    """Print the stages and the first that parts -> the exit code."""
    first = next((stage for stage in stages if stage.parts), None)
    name = None if first is None else first.row.name
    if as_json:
        print(json.dumps({"parts": name, "stages": [stage.to_json() for stage in stages]}, ensure_ascii=False))
        return 0 if first is None else 1
    compared = any(stage.reference is not None for stage in stages)
    print(f"      {'reference ' if compared else ''}    error   largest  stage")
    for stage in stages:
        print(stage)
    if compared:
        nearer = sum(stage.row.error <= max(stage.reference or 0.0, ROUNDING) for stage in stages)
        print(f"nearer to the fp32 truth than the reference, or as near, in {nearer} of {len(stages)} stages")
    print("all stages agree" if first is None else f"first to part: {name}")
    return 0 if first is None else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, climb, report."""
    args = options().parse_args(argv)
    try:
        return report(climb(args), args.json)
    except (RequestError, CheckpointError, BackendError) as error:
        print(f"parity: {error}", file=sys.stderr)
    except ImportError as error:
        print(f"parity: {error}; the reference needs it: pip install 's3dit[test]' {error.name or ''}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

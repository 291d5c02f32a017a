"""Runs both sides, or reads what is on record of them, and judges: `s3dit parity` in Python.

pipe = Pipeline.load(dtype="fp32")
outcome = run(pipe, pipe.plan("a red star above a blue ring", seed=0, num_inference_steps=2))
print(outcome.verdict.first, *outcome.checks, sep="\\n")
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.kernels.schemes import SCHEMES
from s3dit.parity.checks import Check, named_checks
from s3dit.parity.judge import BF16, FORMATS, TOLERANCE, Bounds, Verdict, errors_of, judge
from s3dit.parity.ours import ours
from s3dit.parity.records import Spool, Stored, check_task, lengths_of, side_notes, task_notes
from s3dit.parity.taps import NOWHERE, Inside
from s3dit.pipeline import Pipeline
from s3dit.plan import Plan
from s3dit.values import as_list


@dataclass(frozen=True, slots=True)
class Choice:
    """What is compared with what.

    inside: modules to look into · bounds: as the user wants them; `tolerance` None is what fits the two sides ·
    stages, against: records in the place of this engine's side and of the reference's · record, record_reference: files
    to keep them in · official: a checkout whose transformer is the reference's · truth_device: where the fp32 truth of
    a comparison in 16 bits is computed; on another than the pipeline's, block by block · reference: whether it runs.
    """

    inside: Inside = NOWHERE
    bounds: Bounds = Bounds()
    tolerance: float | None = None
    stages: Path | None = None
    against: Path | None = None
    record: Path | None = None
    record_reference: Path | None = None
    official: Path | None = None
    truth_device: str | None = None
    reference: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a comparison.

    verdict: None where stages were only recorded · also: verdicts of other settings of this engine, by name · mine,
    truth: the stages · notes: what was done for the reference, or is not compared · about: who computed either side.
    """

    verdict: Verdict | None
    checks: list[Check]
    notes: list[str]
    mine: Mapping[str, Tensor]
    truth: Mapping[str, Tensor] = field(default_factory=dict)
    also: dict[str, Verdict] = field(default_factory=dict)
    about: dict[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def parts(self) -> bool:
        """Whether any stage parts, of any setting."""
        verdicts = [*([] if self.verdict is None else [self.verdict]), *self.also.values()]
        return any(verdict.first is not None for verdict in verdicts)


@torch.no_grad()
def run(
    pipe: Pipeline,
    plan: Plan,
    choice: Choice = Choice(),
    also: Iterable[tuple[str, Callable[[], tuple[Pipeline, Plan]]]] = (),
) -> Outcome:
    """Compare a plan's stages; also: names and loaders of the same model with other settings, held to the same stages.

    Raises RequestError where there is nothing to compare: another task on record, a plan that the reference cannot
    draw, libraries that are not there.
    """
    task, notes = task_notes(pipe, plan), list[str]()
    stored = None
    if choice.against is not None:
        stored = Stored(choice.against)
        check_task(choice.against, stored.notes, task)
    mine, about = _mine(pipe, plan, choice, task)
    if stored is None and not choice.reference:
        return Outcome(None, [], notes, mine, about={"mine": about})
    truth: Mapping[str, Tensor]
    if stored is None:
        truth, told = _reference(pipe, plan, choice, task, notes)
    else:
        truth, told = stored, stored.notes
    choice = replace(
        choice, bounds=replace(choice.bounds, guidance=max(as_list(plan.request.guidance_scale), default=0.0))
    )
    bounds = _bounds(pipe, choice, about, told, notes)
    if plan.tile is not None:
        notes.append(f"this engine decodes by tiles of {8 * plan.tile} pixels to stay within vram, the reference whole")
    partial = pipe.graphs
    verdict = judge(mine, truth, bounds, partial=partial)
    others = {}
    for name, load in also:
        other, its_plan = load()
        stages = ours(other, its_plan, Spool(), choice.inside)
        its = _bounds(other, choice, _about(other), told, notes)
        others[name] = judge(stages, truth, its, partial=other.graphs or other.parts.compiled)
    checks = named_checks(mine, truth, json.loads(told.get("lengths", "[]")) or lengths_of(plan))
    return Outcome(verdict, checks, list(dict.fromkeys(notes)), mine, truth, others, {"mine": about, "truth": told})


def _about(pipe: Pipeline) -> dict[str, str]:
    formats = {part: name for part, name in pipe.parts.formats.items() if name}
    dtype = "fp32" if pipe.placement.dtype == torch.float32 else "bf16"
    told = {"backend": pipe.backend or "auto", "numerics": pipe.numerics, "formats": json.dumps(formats)}
    return side_notes("s3dit", dtype, str(pipe.placement.device), **told)


def _mine(pipe: Pipeline, plan: Plan, choice: Choice, task: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """The stages of this engine's side, run or read, and who computed them."""
    if choice.stages is not None:
        stored = Stored(choice.stages)
        check_task(choice.stages, stored.notes, task)
        return stored, stored.notes
    spool, about = Spool(_beside(choice.record)), _about(pipe)
    ours(pipe, plan, spool, choice.inside)
    if choice.record is not None:
        spool.save(choice.record, {**task, **about})
    return spool, about


def _beside(path: Path | None) -> Path | None:
    """The folder of a record, where its stages gather; raises RequestError where there is none."""
    if path is not None and not path.parent.is_dir():
        raise RequestError(f"{path}: cannot be written (no folder {path.parent}); needed a folder that is there")
    return None if path is None else path.parent


def _reference(
    pipe: Pipeline, plan: Plan, choice: Choice, task: Mapping[str, str], notes: list[str]
) -> tuple[Spool, dict[str, str]]:
    """The reference's stages in fp32; beside a model in 16 bits also its own distance to them."""
    device = str(pipe.placement.device)
    there = choice.truth_device or device
    try:
        from s3dit.parity.reference import reference

        truth = Spool(_beside(choice.record_reference))
        options: dict[str, Any] = {"inside": choice.inside, "official": choice.official, "notes": notes}
        apart = torch.device(there).type != torch.device(device).type
        reference(pipe, plan, truth, dtype=torch.float32, device=there, streamed=apart, **options)
        told = side_notes("diffusers", "fp32", there)
        if pipe.placement.dtype != torch.float32:
            theirs = Spool(_beside(choice.record_reference))
            reference(pipe, plan, theirs, dtype=torch.bfloat16, device=device, **options)
            told["errors"] = json.dumps(errors_of(theirs, truth))
    except ImportError as error:
        library = (error.name or "diffusers").partition(".")[0]
        if library == "s3dit":
            raise
        raise RequestError(
            f"{library} is not here ({error}); the reference needs it: pip install diffusers transformers accelerate; "
            "or compare with a record (--against), or only make one (--record)"
        ) from None
    told = {**task, **told}
    if choice.record_reference is not None:
        truth.save(choice.record_reference, told)
    return truth, told


def _bounds(
    pipe: Pipeline, choice: Choice, mine: Mapping[str, str], truth: Mapping[str, str], notes: list[str]
) -> Bounds:
    """The bounds that fit what both sides computed in: dtypes, the reference's own errors, number formats."""
    halves = [side.get("dtype") != "fp32" for side in (mine, truth)]
    formats = _apart(pipe)
    if (errors := json.loads(truth.get("errors", "null"))) is not None and halves == [True, False]:
        bounds = replace(choice.bounds, errors=errors)
    elif any(halves):
        bounds = replace(choice.bounds, tolerance=BF16 * choice.bounds.margin, coarse=True)
        notes.append(f"a side is in 16 bits: two such runs are held to {bounds.tolerance:.1e}, which --margin scales")
    else:
        bounds = replace(choice.bounds, tolerance=TOLERANCE)
    if formats and truth.get("formats", "{}") != mine.get("formats", "{}"):
        widest = max(FORMATS[name] for name in formats) * choice.bounds.margin
        bounds = replace(bounds, errors=None, tolerance=widest, coarse=True)
        notes.append(f"{', '.join(sorted(formats))} beside unquantized weights: held to {widest:.2g}")
    if choice.tolerance is not None:
        bounds = replace(bounds, tolerance=choice.tolerance, errors=None, coarse=False)
    return bounds


def _apart(pipe: Pipeline) -> set[str]:
    """Number formats that set a pipeline apart from its reference, which computes with float weights and activations.

    Not those of stored weights alone: the reference has the same, decoded.
    """
    apart = set()
    for part, name in pipe.parts.formats.items():
        stored = bool(pipe.parts.checkpoints[part].formats)
        if name in FORMATS and not (stored and SCHEMES[name].activation is None):
            apart.add(name)
    return apart

"""What came of a comparison as lines, as JSON, and as a page with the pictures of both sides and their difference."""

import html
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.parity.judge import ROUNDING, Stage, Verdict
from s3dit.parity.session import Outcome
from s3dit.research.report_page import image

TEMPLATE = Path(__file__).with_name("parity.html")
# Longer side of a picture on the page, and the decades of relative error that a bar spans.
LARGEST, DECADES = 512, (-9.0, 1.0)


def lines(outcome: Outcome) -> Iterator[str]:
    """Yield the stages, the first that parts, the checks by name, and what is to be known of the comparison."""
    if outcome.verdict is None:
        yield f"{len(outcome.mine)} stages recorded"
        return
    stages = outcome.verdict.stages
    beside = any(stage.reference is not None for stage in stages)
    yield f"      {'reference ' if beside else ''}    error   largest  stage"
    yield from map(str, stages)
    if beside:
        nearer = sum(stage.row.error <= max(stage.reference or 0.0, ROUNDING) for stage in stages)
        yield f"nearer to the fp32 truth than the reference, or as near, in {nearer} of {len(stages)} stages"
        yield f"this engine's error over the reference's own, geometric mean: {mean_ratio(outcome.verdict):.3f}"
    yield from map(str, outcome.checks)
    yield from (f"note: {note}" for note in outcome.notes)
    if outcome.verdict.left_out:
        yield f"{len(outcome.verdict.left_out)} finer stages are on one side only, and were not compared"
    yield _conclusion(outcome.verdict)
    for name, verdict in outcome.also.items():
        worst = max(verdict.stages, key=lambda stage: stage.row.error)
        yield f"{name}: {_conclusion(verdict)} (largest error {worst.row.error:.1e}, {worst.row.name})"


def mean_ratio(verdict: Verdict) -> float:
    """Geometric mean over stages of this engine's error over the reference's own; of those that both round at all."""
    pairs = [(stage.row.error, stage.reference) for stage in verdict.stages]
    ratios = [math.log(a / b) for a, b in pairs if b is not None and b > ROUNDING and 0 < a < math.inf]
    return math.exp(sum(ratios) / len(ratios)) if ratios else math.nan


def _conclusion(verdict: Verdict) -> str:
    return "all stages agree" if verdict.first is None else f"first to part: {verdict.first.row.name}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON values."""
    return {
        **_verdict(outcome.verdict),
        "checks": [check.to_json() for check in outcome.checks],
        "also": {name: _verdict(verdict) for name, verdict in outcome.also.items()},
        "notes": outcome.notes,
        "sides": {side: _told(notes) for side, notes in outcome.about.items()},
    }


def _verdict(verdict: Verdict | None) -> dict[str, Any]:
    if verdict is None:
        return {"parts": None, "stages": [], "left_out": []}
    first = None if verdict.first is None else verdict.first.row.name
    stages = [stage.to_json() for stage in verdict.stages]
    return {"parts": first, "stages": stages, "left_out": verdict.left_out}


def _told(notes: Mapping[str, str]) -> dict[str, Any]:
    """Notes of a side, those that are JSON read; its errors stand beside the stages."""
    nested = ("versions", "machine", "formats", "task")
    return {key: json.loads(text) if key in nested else text for key, text in notes.items() if key != "errors"}


def write(outcome: Outcome, folder: Path) -> Path:
    """Write index.html and report.json into a folder, which is made -> the page; raises RequestError."""
    assert outcome.verdict is not None
    data = as_json(outcome)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
        (folder / "index.html").write_text(page(outcome, data), encoding="utf-8")
    except OSError as error:
        raise RequestError(f"--report {folder}: cannot be written ({error}); needed a writable folder") from None
    return folder / "index.html"


def page(outcome: Outcome, data: Mapping[str, Any]) -> str:
    """The page: one HTML file without scripts that needs nothing else."""
    assert outcome.verdict is not None
    verdicts = {"": outcome.verdict, **outcome.also}
    checks = "".join(
        f"<li class={'bad' if check.found else 'ok' if check.found is False else 'soft'}><b>{_text(check.name)}</b> "
        f"{_text(check.why)}</li>"
        for check in outcome.checks
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        conclusion=_text(_conclusion(outcome.verdict)),
        state="bad" if outcome.parts else "ok",
        sides=_text(json.dumps(data["sides"], ensure_ascii=False, indent=1)),
        checks=checks,
        notes="".join(f"<li>{_text(note)}</li>" for note in outcome.notes),
        pictures="".join(_pictures(outcome)),
        tables="".join(_table(name, verdict) for name, verdict in verdicts.items()),
    )


def _text(text: str) -> str:
    return html.escape(text)


def _table(name: str, verdict: Verdict) -> str:
    rows = "".join(map(_row, verdict.stages))
    head = "<tr><th>stage<th>error<th>bound<th>reference's own<th>largest<th>shape</tr>"
    title = f"<h2>{_text(name)}: {_text(_conclusion(verdict))}</h2>" if name else "<h2>Stages</h2>"
    return f"{title}<table>{head}{rows}</table>"


def _row(stage: Stage) -> str:
    low, high = DECADES
    places = [0.0 if not x else (min(max(math.log10(x), low), high) - low) / (high - low) * 100
              for x in (stage.row.error, stage.bound)]  # fmt: skip
    bar = f'<i style="width:{places[0]:.1f}%"></i><u style="left:{places[1]:.1f}%"></u>'
    own = "" if stage.reference is None else f"{stage.reference:.1e}"
    a, b = ("missing" if shape is None else "×".join(map(str, shape)) for shape in stage.row.shapes)
    cells = [
        f"{stage.row.error:.1e}",
        f"{stage.bound:.1e}",
        own,
        f"{stage.row.largest:.1e}",
        a if a == b else f"{a} | {b}",
    ]
    state = ' class="bad"' if stage.parts else ""
    return f"<tr{state}><td>{_text(stage.row.name)}<div>{bar}</div>{''.join(f'<td>{cell}' for cell in cells)}</tr>"


def _pictures(outcome: Outcome) -> Iterator[str]:
    """Both sides' pictures and what differs, as many times brighter as shows it."""
    names = [name for name in outcome.mine if name.startswith("pixels") and name in outcome.truth]
    for name in names:
        mine, truth = outcome.mine[name], outcome.truth[name]
        for a, b in zip(mine, truth, strict=False):
            if a.shape != b.shape:
                continue
            difference = (a.int() - b.int()).abs()
            times = 255 // max(1, int(difference.max()))
            trio = {
                "this engine": a, "the reference": b,
                f"difference × {times}, at most {int(difference.max())} of 255": (difference * times).byte(),
            }  # fmt: skip
            shown = (
                f'<figure><img alt="" src="{_uri(x)}"><figcaption>{_text(t)}</figcaption></figure>'
                for t, x in trio.items()
            )
            yield f"<div class=trio>{''.join(shown)}</div>"


def _uri(pixels: Tensor) -> str:
    return image(Image.fromarray(pixels.to(torch.uint8).numpy()), LARGEST, 95)

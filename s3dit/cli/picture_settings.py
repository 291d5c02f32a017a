"""What drew a picture, in words that are the same for every program, and in which of them two pictures differ.

`read_settings` makes Settings of the metadata that `inspect_pictures` reads: of s3dit, ComfyUI, AUTOMATIC1111 and its
forks, stable-diffusion.cpp. `differences` compares three of them by what they do, not by their words: the schedule by
its noise levels, computed of both; guidance by its scale in one form; and the dtype. All are untrusted data.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3dit.cli.inspect_pictures import COMFYUI, SCHEDULES, SOLVERS, picture
from s3dit.cli.record import own_name, read_record
from s3dit.errors import RequestError
from s3dit.inputs.image_metadata import read_texts
from s3dit.request import Request

# Noise levels that are equal but for rounding.
NEAR = 1e-5
# Fields of a request that other rows tell, or that say where, not what.
TOLD = {
    "prompt", "negative_prompt", "height", "width", "seed", "num_inference_steps", "guidance_scale", "cfg", "shift",
    "schedule", "sigmas", "solver", "num_images_per_prompt", "preset",
}  # fmt: skip
# What says how the machine rounds, by the name that a row has.
MACHINE = {"torch": "torch", "threads": "threads", "cpu": "CPU", "numerics": "numerics", "s3dit": "version of s3dit"}


@dataclass(frozen=True, slots=True)
class Settings:
    """What drew a picture; None in it, or no entry: the picture does not say.

    by: the program · words: settings by name · levels: noise levels · guidance: its scale s, and how it is written ·
    machine: what rounds · notes: what could not be read.
    """

    by: str | None = None
    words: dict[str, Any] = field(default_factory=dict)
    levels: tuple[float, ...] | None = None
    guidance: tuple[float, str] | None = None
    dtype: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A setting of two pictures: its name, both values, whether they differ (None: one of them is not told), a note."""

    name: str
    a: Any
    b: Any
    differs: bool | None
    note: str = ""


def read_settings(path: Path) -> Settings:
    """Read what drew a picture; without metadata, or with damaged ones, no settings. RequestError for no picture."""
    if not read_texts(path):
        return Settings(notes=(f"{path.name} says nothing of how it was drawn",))
    try:
        facts = picture(path)
        return _own(facts.facts) if facts.kind == "a picture drawn by s3dit" else _foreign(facts.kind, facts.facts)
    except RequestError as error:
        return Settings(notes=(f"{path.name}: its metadata cannot be read ({error})",))


def _own(facts: dict[str, Any]) -> Settings:
    """Settings of a picture of s3dit; raises RequestError for what it does not write."""
    data, engine = dict(facts), facts.get("engine")
    if isinstance(engine, dict):
        # Of a picture that cannot be replayed, too.
        data["engine"] = {key: value for key, value in engine.items() if key != "replayable"}
    record = read_record(data)
    request = Request.from_json(data)
    values = request.to_json()
    words = {
        "model": record.model, "adapters": [(own_name(each["file"]), each["scale"]) for each in record.adapters],
        "prompt": values.get("prompt"), "negative prompt": values.get("negative_prompt") or "",
        "seed": values.get("seed"), "solver": values["solver"], "schedule": values["schedule"],
        "shift": values.get("shift"), "steps": values.get("num_inference_steps"),
    }  # fmt: skip
    words |= {name: value for name, value in values.items() if name not in TOLD}
    words |= {f"pixels of {name}": value for name, value in record.engine.get("inputs", {}).items()}
    words |= {f"{part} of": name for part, name in record.engine.get("mixed", {}).items()}
    # What was drawn has no cfg left.
    scale = request.guidance_scale
    if isinstance(scale, list | tuple):
        words["guidance by step"] = scale
    formats = [f"{part} in {name}" for part, name in record.engine.get("quantized", {}).items()]
    placement = record.engine.get("placement")
    return Settings(
        "s3dit", words, tuple(record.engine.get("levels", ())) or None,
        (float(scale), f"guidance_scale {scale:g}") if isinstance(scale, int | float) else None,
        None if placement is None else ", ".join([placement, *formats]),
        {said: record.engine[name] for name, said in MACHINE.items() if name in record.engine},
    )  # fmt: skip


def _foreign(kind: str, facts: dict[str, Any]) -> Settings:
    """Settings of another program's picture; its words as they are here where there is the same."""
    if "seed" not in facts:
        return Settings(notes=("its graph tells no settings",))
    sampler, schedule = str(facts["sampler"] or "").lower(), str(facts["schedule"] or "").lower().replace(" ", "_")
    if sampler not in SOLVERS and sampler.rpartition(" ")[2] in SCHEDULES and not schedule:
        # As stable-diffusion.cpp writes both in one.
        sampler, _, schedule = sampler.rpartition(" ")
    cfg, shift, denoise = (_number(facts.get(name)) for name in ("cfg", "shift", "denoise"))
    words = {
        "model": facts["model"] and own_name(str(facts["model"])),
        "adapters": [(own_name(str(each["file"])), _number(each["strength"])) for each in facts["adapters"]],
        "prompt": facts["prompt"], "negative prompt": facts["negative_prompt"] or "",
        "seed": _number(facts["seed"], int), "solver": SOLVERS.get(sampler, sampler or None),
        "schedule": schedule or None, "shift": shift, "steps": _number(facts["steps"], int),
        "strength": denoise if denoise and denoise < 1 else None,
    }  # fmt: skip
    levels, notes = _levels(words, kind == COMFYUI)
    guidance = None if cfg is None else (cfg - 1, f"cfg {cfg:g}")
    return Settings(kind.removeprefix("a picture "), words, levels, guidance, facts.get("dtype"), notes=notes)


def _levels(words: dict[str, Any], comfyui: bool) -> tuple[tuple[float, ...] | None, tuple[str, ...]]:
    """Noise levels of another program's settings, and what is assumed of them; None where too little is told."""
    from s3dit.inputs.start_image import remaining_sigmas

    known = words["schedule"] in SCHEDULES and words["solver"] in SOLVERS.values() and words["steps"]
    if not known:
        return None, ()
    shift = words["shift"] or 3.0
    notes = () if words["shift"] else ("its shift is not told: 3 is taken, Z-Image's in ComfyUI",)
    try:
        request = Request(
            prompt="", num_inference_steps=words["steps"], schedule=words["schedule"], shift=shift,
            solver=words["solver"], convention="comfyui" if comfyui else "own",
        )  # fmt: skip
        return tuple(remaining_sigmas(request.filled(strength=words["strength"])).tolist()), notes
    except RequestError as error:
        return None, (f"its noise levels cannot be computed: {error}",)


def _number(value: Any, kind: Callable[[Any], Any] = float) -> Any:
    """A finite number of JSON or of text; None where there is none. kind: int for one that floats would round."""
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if -math.inf < number < math.inf else None


def differences(a: Settings, b: Settings) -> list[Row]:
    """Every setting that two pictures tell, the three that are compared by what they do first."""
    dtypes = a.dtype, b.dtype
    rows = [_schedule(a, b), _guidance(a, b), Row("dtype", *dtypes, None if None in dtypes else dtypes[0] != dtypes[1])]
    computed = a.levels is not None and b.levels is not None
    for name in dict.fromkeys([*a.words, *b.words]):
        if computed and name in ("steps", "schedule", "shift"):
            continue
        one, other = a.words.get(name), b.words.get(name)
        both = a.by == b.by or (one is not None and other is not None)
        if one != other or name in ("seed", "model"):
            rows.append(Row(name, one, other, one != other if both and a.by and b.by else None))
    return rows


def machines(a: Settings, b: Settings) -> Iterator[Row]:
    """What rounds otherwise, of two pictures of s3dit."""
    for name in a.machine.keys() & b.machine.keys():
        if a.machine[name] != b.machine[name]:
            yield Row(name, a.machine[name], b.machine[name], True)


def _schedule(a: Settings, b: Settings) -> Row:
    """Noise levels against each other, and in words what makes them."""
    one, other = (
        ", ".join(
            f"{name} {str(each.words[name])[:40]}" for name in ("steps", "schedule", "shift") if each.words.get(name)
        )
        for each in (a, b)
    )
    if a.levels is None or b.levels is None:
        return Row("schedule", one or None, other or None, None)
    if len(a.levels) != len(b.levels):
        return Row("schedule", one, other, True, f"{len(a.levels) - 1} and {len(b.levels) - 1} steps are taken")
    away = [abs(x - y) for x, y in zip(a.levels, b.levels, strict=True)]
    i = away.index(max(away))
    if away[i] <= NEAR:
        return Row("schedule", one, other, False, f"the same {len(away) - 1} steps, noise levels within {away[i]:.1g}")
    return Row("schedule", one, other, True, f"level {i} is {a.levels[i]:.4g} and {b.levels[i]:.4g}")


def _guidance(a: Settings, b: Settings) -> Row:
    """The scale in one form; where the numbers are equal in two forms, that is named."""
    if a.guidance is None or b.guidance is None:
        return Row("guidance", a.guidance and a.guidance[1], b.guidance and b.guidance[1], None)
    (one, first), (other, second) = a.guidance, b.guidance
    if one == other:
        return Row("guidance", first, second, False, "" if first == second else "the same in the other form")
    low, forms = min(one, other), first.split()[0] != second.split()[0]
    if abs(abs(one - other) - 1) > 1e-9 or low < 0:
        return Row("guidance", first, second, True)
    which = "the same number in two forms" if forms else "perhaps one number in two forms"
    return Row("guidance", first, second, True, f"{which}: cfg {low + 1:g} is guidance_scale {low:g}")

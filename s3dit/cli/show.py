"""What the command line shows: a plan, which implementation computes what, progress, the picture as it forms."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3dit.files import claimed
from s3dit.terminal import bar, event, line, paint, say

if TYPE_CHECKING:
    from PIL import Image

    from s3dit.kernels.dispatch import Op
    from s3dit.pipeline import Pipeline
    from s3dit.plan import Plan
    from s3dit.request import Request
    from s3dit.sampling.step import Step

# Bytes of a part from which its loading is worth a bar.
LONG = 1 << 28


def describe(pipe: "Pipeline", plan: "Plan") -> str:
    """The plan as text: where, what, when, how many bytes, which noise levels."""
    request = plan.request
    sizes = sorted({f"{w}×{h}" for w, h in zip(request.per_image("width"), request.per_image("height"), strict=True)})
    lines = [
        f"{pipe.folder.name}: {pipe.config.variant}, {pipe.placement}"
        + "".join(f", {part} in {name}" for part, name in pipe.parts.formats.items() if name),
        f"{request.count} picture(s) of {', '.join(sizes)}: {plan.calls} model calls ({request.solver}, shift "
        f"{'by size' if request.shift is None else format(request.shift, 'g')}, guidance {_guidance(request)})",
        "noise levels " + " ".join(f"{s:.4g}" for s in plan.sigmas),
    ]
    lines += [
        f"adapter {record['file']} of strength {record['scale']:g}"
        + "".join(f", {name} × {factor:g}" for name, factor in record.get("blocks", {}).items())
        + (", from {:g} to {:g} of the steps".format(*record["steps"]) if "steps" in record else "")
        + (", merged" if record.get("merged") else "")
        for record in pipe.lora.records()
    ]
    if request.strength is not None:
        lines.append(f"from start images of strength {request.strength:g}: {len(plan.sigmas) - 1} steps of "
                     f"{request.num_inference_steps}")  # fmt: skip
    if plan.then is not None:
        lines.append(f"then {request.upscale:g} times as large, noise levels "
                     + " ".join(f"{s:.4g}" for s in plan.then.sigmas))  # fmt: skip
    for turn, stage in enumerate(plan.stages, 1):
        again = f", {_size(stage.again)} again each further pass" if stage.again else ""
        lines.append(
            f"  {turn}. {stage.part:<12} reads {_size(stage.reads)}{again}, holds {_size(stage.holds)}: {stage.work}"
        )
    held = {stage.part: stage.holds for stage in plan.stages}
    turns = [stage.holds + stage.beside for stage in plan.stages]
    most = sum(held.values()) if pipe.parts.mode == "resident" else max(turns)
    weights = f"{pipe.parts.mode}: at most {_size(most)} of weights at a time, besides activations"
    lines.append(weights if plan.memory is None else str(plan.memory))
    return "\n".join(map(line, [*lines, *(f"note: {note}" for note in plan.notes)]))


def _guidance(request: "Request") -> str:
    """The scale or scales of guidance, and what else there is of it."""
    given: Any = request.guidance_scale
    texts = [",".join(format(scale, "g") for scale in (given if isinstance(given, list | tuple) else [given]))]
    if request.guidance_interval is not None:
        texts.append("t {:g} to {:g}".format(*request.guidance_interval))
    texts += [text for text in (request.guidance_method,) if text]
    return " ".join(texts) + (f", skip_layers {request.skip_layers}" if request.skip_layers else "")


def to_json(pipe: "Pipeline", plan: "Plan") -> dict[str, Any]:
    """The plan as JSON values."""
    return {
        "model": pipe.folder.name, "variant": pipe.config.variant, "placement": str(pipe.placement),
        "residency": pipe.parts.mode, "quantized": {part: name for part, name in pipe.parts.formats.items() if name},
        "adapters": pipe.lora.records(), "request": plan.request.to_json(), "sigmas": plan.sigmas,
        "then_sigmas": None if plan.then is None else plan.then.sigmas, "model_calls": plan.calls,
        "stages": [asdict(stage) for stage in plan.stages], "memory": None if plan.memory is None else str(plan.memory),
        "notes": plan.notes,
    }  # fmt: skip


def explain(pipe: "Pipeline", plan: "Plan") -> dict[str, Any]:
    """Which implementation runs each operation of a model call, and why not the others, as JSON values.

    backend, numerics, device · operations: a list of name, shape and dtype of the first argument, count of such calls,
    chosen (the implementation with its backend and numerics, None if there is none) and others (reason by
    implementation). Runs on the meta device.
    """
    from s3dit.kernels.dispatch import backend, numerics, record_calls, use_backend, use_numerics

    with record_calls() as calls:
        pipe.dry_run(plan)
    with use_backend(pipe.backend), use_numerics(pipe.numerics):
        place = {"backend": backend(), "numerics": numerics(), "device": str(pipe.placement)}
        return place | {"operations": _explained(calls)}


def _explained(calls: "list[tuple[Op, tuple[Any, ...]]]") -> list[dict[str, Any]]:
    """Calls that are alike together, in the order in which they come first."""
    rows: dict[str, dict[str, Any]] = {}
    for op, args in calls:
        x, answers = args[0], op.explain(*args)
        classes = {each.function.__name__.strip("_"): each.numerics for each in op.implementations}
        labels = {
            name: f"{name} ({kind}" + (f", {classes[name]})" if name in classes else ")") for name, kind, _ in answers
        }
        chosen = next((labels[name] for name, _, why in answers if why == "chosen"), None)
        others = {labels[name]: why for name, _, why in answers if labels[name] != chosen}
        row: dict[str, Any] = {"name": op.name, "shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}
        row |= {"chosen": chosen, "others": others}
        rows.setdefault(repr(row), row | {"count": 0})["count"] += 1
    return [*rows.values()]


def kernels_text(kernels: dict[str, Any]) -> str:
    """What `explain` gives as text: a line for each kind of call, and one for each implementation that is not taken."""
    lines = [f"backend {kernels['backend']}, {kernels['numerics']}, {kernels['device']}"]
    for row in kernels["operations"]:
        question = f"{row['name']} {'×'.join(map(str, row['shape']))} {row['dtype']}"
        lines.append(f"  {row['count']:3} × {question}: {row['chosen'] or 'none'}")
        lines += [f"        not {name}: {why}" for name, why in row["others"].items()]
    return "\n".join(map(line, lines))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def show(picture: "Image.Image") -> None:
    """Draw a picture in the terminal, if there is one."""
    from s3dit.inputs.ansi import ansi

    paint(ansi(picture, 48))


class Progress:
    """A bar that counts model calls, or JSON lines; called with each Step, and used as a context manager.

    Parts of LONG bytes and more get a bar of their own while they are loaded.
    """

    def __init__(self, pipe: "Pipeline", plan: "Plan", *, json: bool, preview: Path | None) -> None:
        """json: print one JSON object a step instead of the bars · preview: show the picture as it forms, in the
        terminal and in a file beside this picture's, which is removed at the end.
        """
        self.pipe, self.plan, self.json = pipe, plan, json
        self.large = {stage.part: stage.reads for stage in plan.stages if stage.reads >= LONG}
        self.loading: dict[str, Any] = {}
        self.preview = preview
        self.ending = ExitStack()

    def __enter__(self) -> "Progress":
        """Open the bar and the file of the preview."""
        if self.preview is not None:
            # A free name: a file of this name may be the user's.
            free = claimed(self.preview.with_name(f"{self.preview.stem}.preview.png"))
            self.preview = self.ending.enter_context(free)
            self.ending.callback(self.preview.unlink, missing_ok=True)
            say(f"the picture forms in {self.preview}")
        self.bar = self.ending.enter_context(bar("denoising", total=self.plan.calls, unit="call", disable=self.json))
        self.ending.enter_context(self.pipe.parts.reading(self.read))
        return self

    def __exit__(self, *error: object) -> None:
        """Close the bar, and remove the preview."""
        self.ending.close()

    def read(self, part: str, count: int) -> None:
        """Show how much of a large part is loaded: `count` more bytes of it were read."""
        if self.json or part not in self.large:
            return
        if part not in self.loading:
            self.loading[part] = bar(f"loading {part}", total=self.large[part], unit="B", unit_scale=True, leave=False)
        loading = self.loading[part]
        loading.update(count)
        if loading.n >= self.large[part]:
            self.loading.pop(part).close()

    def __call__(self, step: "Step") -> None:
        """Show a step of the solver."""
        if self.json:
            event(event="step", step=step.i, of=step.n, model_calls=step.calls, sigma=step.sigma_next)
        self.bar.update(step.calls - self.bar.n)
        if self.preview is not None:
            from s3dit.inputs.images import to_pil
            from s3dit.inputs.save_image import save_png

            # The transformer stays: a small autoencoder beside it is worth less than loading it again.
            with self.pipe.parts.beside():
                picture = to_pil(self.pipe.decode(step.denoised[:1])[0][None])[0]
            save_png(picture, self.preview)
            show(picture)

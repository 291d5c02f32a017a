"""What the command line shows: a plan, who computes what, progress, and the picture as it forms."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3dit.request import Request

if TYPE_CHECKING:
    from PIL import Image

    from s3dit.kernels.dispatch import Op
    from s3dit.pipeline import Pipeline
    from s3dit.plan import Plan
    from s3dit.sampler import Step

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
        f"{request.shift:g}, guidance {request.guidance_scale:g})",
        "noise levels " + " ".join(f"{s:.4g}" for s in plan.sigmas),
    ]
    lines += [
        f"adapter {one['file']} of strength {one['scale']:g}" + (", merged" if one.get("merged") else "")
        for one in pipe.lora.records()
    ]
    if request.strength is not None:
        lines.append(f"from start images of strength {request.strength:g}: {len(plan.sigmas) - 1} steps of "
                     f"{request.num_inference_steps}")  # fmt: skip
    if plan.then is not None:
        lines.append(f"then {request.upscale:g} times as large, noise levels "
                     + " ".join(f"{s:.4g}" for s in plan.then.sigmas))  # fmt: skip
    for turn, stage in enumerate(plan.stages, 1):
        lines.append(f"  {turn}. {stage.part:<12} reads {_size(stage.reads)}, holds {_size(stage.holds)}: {stage.work}")
    held = {stage.part: stage.holds for stage in plan.stages}
    turns = [stage.holds + stage.beside for stage in plan.stages]
    most = sum(held.values()) if pipe.parts.mode == "resident" else max(turns)
    weights = f"{pipe.parts.mode}: at most {_size(most)} of weights at a time, besides activations"
    lines.append(weights if plan.fit is None else str(plan.fit))
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def explain(pipe: "Pipeline", request: Request) -> str:
    """Which implementation serves each operation of one model call, and why not the others."""
    from s3dit.kernels.dispatch import asked, backend, use_backend

    with asked() as calls:
        pipe.rehearse(request)
    with use_backend(pipe.backend):
        return _explained(calls, f"backend {backend()}, {pipe.placement}")


def _explained(calls: "list[tuple[Op, tuple[Any, ...]]]", title: str) -> str:
    found: dict[tuple[str, ...], int] = {}
    for op, args in calls:
        x, answers = args[0], op.explain(*args)
        question = f"{op.name} {'×'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
        chosen = next((f"{name} ({kind})" for name, kind, why in answers if why == "chosen"), "nobody")
        others = [f"not {name} ({kind}): {why}" for name, kind, why in answers if f"{name} ({kind})" != chosen]
        key = (f"{question}: {chosen}", *others)
        found[key] = found.get(key, 0) + 1
    lines = [title]
    for (question, *others), count in found.items():
        lines += [f"  {count:3} × {question}", *(f"        {other}" for other in others)]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def show(picture: "Image.Image") -> None:
    if sys.stderr.isatty():
        from s3dit.images import ansi

        print(ansi(picture, 48), file=sys.stderr)


class Progress:
    """A bar that counts model calls, or JSON lines; with --preview also the picture as it forms."""

    def __init__(self, pipe: "Pipeline", plan: "Plan", args: argparse.Namespace) -> None:
        from tqdm import tqdm

        self.pipe, self.plan, self.args = pipe, plan, args
        self.bar = tqdm(total=plan.calls, unit="call", desc="denoising", disable=args.json, file=sys.stderr)
        self.reads = {stage.part: stage.reads for stage in plan.stages if stage.reads >= LONG}
        self.loading: dict[str, tqdm[Any]] = {}
        pipe.parts.on_read = self.read

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.parts.on_read = None
        self.bar.close()
        if self.args.preview:
            self._preview_path().unlink(missing_ok=True)

    def read(self, part: str, count: int) -> None:
        """Show a part coming in, where that takes long: `count` more bytes of it were read."""
        from tqdm import tqdm

        if self.args.json or part not in self.reads:
            return
        if part not in self.loading:
            options: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False, "file": sys.stderr}
            self.loading[part] = tqdm(total=self.reads[part], desc=f"loading {part}", **options)
        bar = self.loading[part]
        bar.update(count)
        if bar.n >= self.reads[part]:
            self.loading.pop(part).close()

    def _preview_path(self) -> Path:
        output: Path = self.args.output
        return output.with_name(f"{output.stem}.preview.png")

    def __call__(self, step: "Step") -> None:
        if self.args.json:
            event = {"event": "step", "step": step.i, "of": step.n, "model_calls": step.calls, "sigma": step.sigma_next}
            print(json.dumps(event), flush=True)
        self.bar.update(step.calls - self.bar.n)
        if self.args.preview:
            from s3dit.images import save_png, to_pil

            # The transformer stays: a small autoencoder beside it is worth less than loading it again.
            with self.pipe.parts.beside():
                picture = to_pil(self.pipe.decode(step.denoised[:1])[0][None])[0]
            save_png(picture, self._preview_path())
            show(picture)

"""`s3dit plan`: print what a request will load and compute, without reading weights."""

import argparse
from typing import TYPE_CHECKING, Any

from s3dit.cli.options import add_model, add_request, add_runtime
from s3dit.cli.prepare import load, read_request
from s3dit.cli.show import describe, explain, kernels_text, to_json
from s3dit.terminal import event, tell

if TYPE_CHECKING:
    from s3dit.parallel.placement import Form
    from s3dit.pipeline import Pipeline
    from s3dit.plan import Plan

SUMMARY = "print what a request will load and compute"
EXAMPLES = (
    ("s3dit plan --model path/to/Z-Image --vram 4GiB", "how it would be done within 4 GiB of GPU memory"),
    ("s3dit plan --model path/to/Z-Image", "what would be loaded, when, how many bytes"),
    ("s3dit plan --size 64x64 --kernels", "which implementation runs each operation, and why"),
    ("s3dit plan --model path/to/Z-Image --parallel 4", "how 4 GPUs would share it, and what they would send"),
    ("s3dit plan --size 64x64 --json", "the same for a program"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    add_request(parser)
    add_model(parser)
    add_runtime(parser, parallel=True)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--kernels", action="store_true", help="also print which implementation runs each operation, and why"
    )
    group.add_argument("--json", action="store_true", help="the plan as one JSON object")


def _shared(pipe: "Pipeline", plan: "Plan", form: "Form") -> dict[str, Any]:
    """How ranks share the largest model call of a plan, and what each sends of it at most, as JSON values."""
    from s3dit.parallel.passes import Places

    last, config = plan if plan.then is None else plan.then, pipe.config.transformer
    layout = last.layout(config, bool(plan.request.guidance_scale), "cpu")
    places = Places.of(form, layout.image, layout.joint, layout.gather)
    nets = [pipe.parts.controlnets[control.part] for control in plan.controls]
    refiners = sum(len(net.places) if net.version == "2.0" else config.n_refiner_layers for net in nets)
    blocks = {"image": refiners, "joint": sum(len(net.places) for net in nets)}
    sent = max(places.sent(config, pipe.placement.compute.itemsize, form.size, **blocks))
    return {
        "form": str(form), "items": len(layout.joint.spans.lengths), "groups": places.groups,
        "ranks": form.size // places.groups, "bytes": sent, "megabytes": round(sent / 1e6, 1),
        "calls_megabytes": round(sent * plan.calls / 1e6, 1),
    }  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the plan of the request that the options say; returns the exit code."""
    pipe, plan = load(args, *read_request(args))
    kernels = explain(pipe, plan) if args.kernels else None
    ranks = None if args.parallel is None else _shared(pipe, plan, args.parallel)
    if args.json:
        beside = {"kernels": kernels, "parallel": ranks}
        event(**to_json(pipe, plan), **{name: value for name, value in beside.items() if value is not None})
        return 0
    tell(describe(pipe, plan))
    if ranks is not None:
        tell("parallel {form}: {items} items of a model call in {groups} group(s) of {ranks} rank(s); each sends "
             "{megabytes:,} MB a call, {calls_megabytes:,} MB in all calls".format(**ranks))  # fmt: skip
    if kernels is not None:
        tell(kernels_text(kernels))
    return 0

"""`s3dit generate --replay`: make a request from the metadata of a picture, and report what differs from then.

Metadata are untrusted. A replay takes a request from them (prompt, sizes, seed, steps, noise levels, guidance), checked
against the same types and bounds as the user's own (`Request.check`), for a single picture, because a picture records
itself alone; `--count` asks for more. The user's own options replace any of it.

A replay never does this because of metadata: use the network; load a model (but one that comes with the engine), a
part, an adapter or a ControlNet; choose a device or a number format; open an image without its recorded hash. Models,
parts, adapters and controls are named in an error, and the user gives them: `--model`, `--transformer`, `--lora`,
`--control`. Adapters that are given take the strengths and the order of then. Start images, masks, also of regions, and
references are searched as regular files beside the picture and in the current folder, under their recorded name (or
below these folders, where that was a relative path without `..`), and used only if their pixels have the recorded hash;
else the user gives them with `--image`, `--mask`, `--region` or `--reference`.

The picture has the same bits where model, adapters, images, number formats, device, dtype, versions, number of threads
and kind of CPU are the same. `changes` gives what differs, as far as it is recorded, with the option that undoes it.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3dit.cli.lora_option import LoraOption
from s3dit.cli.options import OWN_FORMATS
from s3dit.cli.record import (
    FORMATS,
    OPTIONS,
    PARTS,
    PLAIN,
    Record,
    image_beside,
    named_images,
    own_name,
    read_record,
    several,
    spoken,
)
from s3dit.control import IMAGES as CONTROL_IMAGES
from s3dit.control import Control, shown
from s3dit.errors import RequestError
from s3dit.presets import PRESETS
from s3dit.region import Region
from s3dit.request import IMAGES, Request
from s3dit.runtime.embedded import FOLDERS

if TYPE_CHECKING:
    from s3dit.pipeline import Pipeline

# Two ways to say one thing: whichever the user chooses, the picture's is dropped.
RIVALS = {"cfg": "guidance_scale", "num_inference_steps": "sigmas"}


@dataclass(frozen=True, slots=True)
class Replay:
    """What a picture's metadata give to a new request.

    request: fields of the Request that drew it, without those that the user gives anew · adapters: records of those
    that were attached · engine: what drew it; its "others" say what the user gave that is not what it was.
    """

    request: dict[str, Any]
    adapters: list[dict[str, Any]]
    engine: dict[str, Any]


# Of a request that replays no picture.
NOTHING = Replay({}, [], {})


def replayed(args: argparse.Namespace, prompt: Any) -> Replay:
    """Read the picture of --replay; prompt: the user's, or None. Raises RequestError that names the picture."""
    from s3dit.inputs.image_metadata import read_metadata

    data = read_metadata(args.replay)
    with _naming(args.replay):
        record = read_record(data)
        adapters, engine = record.adapters, record.engine
        inputs = engine.get("inputs", {})
        _check_given(args, record)
        if args.model is None and record.model in FOLDERS:
            args.model = record.model
        request = Request.from_json(data)
        request = _alone(request, args, prompt)
        controls: list[Control] = args.control or []
        if request.controls and not controls:
            words = " ".join(f"--control {shown(spoken(control))}" for control in request.controls)
            raise RequestError(f"it was drawn with a ControlNet; give it, and what it is to follow, with {words}")
        regions = args.region or _regions(args.replay.parent, request, inputs)
        engine["others"] = [*_others(args, request, controls, inputs)]
        engine["others"] += (
            [f"with {shown(record.unknown)}, of which this version knows nothing"] if record.unknown else []
        )
        request = request.filled(control=None, region=regions or None, **_images(args, request, inputs))
    # Regions themselves: a Request takes no JSON of them.
    values = request.to_json() | ({"region": request.region} if request.region else {})
    if prompt is not None:
        values.pop("prompt")
    for chosen, dropped in (*RIVALS.items(), *((b, a) for a, b in RIVALS.items())):
        if getattr(args, chosen) is not None:
            values.pop(dropped, None)
    if args.convention == "own":
        # Which has no places, and no option takes one away.
        values.pop("batch_place", None)
    if args.preset is not None:
        # All that it stands for is the user's choice.
        replaced = {*PRESETS[args.preset], *(RIVALS.get(name) for name in PRESETS[args.preset])}
        values = {name: value for name, value in values.items() if name not in replaced}
    return Replay(values, adapters, engine)


def attach(pipe: "Pipeline", args: argparse.Namespace, records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Attach the adapters of the command line, and yield a report of each.

    records: of the adapters of a replayed picture, or none. Each must be among those given, matched by its hash, else
    by its file's name; adapters are attached in the order of the records, with the recorded strength, blocks and steps
    unless others are given. Raises RequestError, CheckpointError.
    """
    from s3dit.weights.adapter import read_adapter
    from s3dit.weights.hub import resolve_file

    left = [(option, read_adapter(resolve_file(option.file)).digest() if records else "") for option in args.lora]
    # Files by the number of the record that they are taken for.
    matched: dict[int, tuple[LoraOption, str]] = {}
    for by_hash in (True, False):
        for i, was in enumerate(records):
            wanted = was["sha256"] if by_hash else own_name(was["file"])
            same = [given for given in left if wanted == (given[1] if by_hash else own_name(given[0].file))]
            if i not in matched and same:
                left.remove(same[0])
                matched[i] = same[0]
    if missing := [was for i, was in enumerate(records) if i not in matched]:
        raise RequestError(f"{args.replay}: {_wanted(missing)} (scale 0 leaves one out)")
    for i, was in enumerate(records):
        option, digest = matched[i]
        scale = was["scale"] if option.scale is None else option.scale
        strength = {name: was[name] for name in ("blocks", "steps") if name in was} | option.strength
        partial = args.lora_allow_partial or was.get("partial", False)
        report = pipe.lora.attach(option.file, scale, allow_partial=partial, **strength)
        if was.get("merged"):
            pipe.lora.merge(report.name)
        told = f"; strength {scale:g} as the picture was drawn" if option.scale is None else ""
        yield f"{report}{told}{'' if digest == was['sha256'] else '; another file than the picture was drawn with'}"
    for option, _ in left:
        scale = 1.0 if option.scale is None else option.scale
        report = pipe.lora.attach(option.file, scale, allow_partial=args.lora_allow_partial, **option.strength)
        yield f"{report}{'; the picture was drawn without it' if records else ''}"


def changes(pipe: "Pipeline", engine: Mapping[str, Any]) -> Iterator[str]:
    """Yield in what a pipeline differs from the one that drew a picture, as far as `engine` records it."""
    import torch

    from s3dit.kernels import dispatch

    if (variant := engine.get("variant", pipe.config.variant)) != pipe.config.variant:
        yield f"with a model of the variant {shown(variant)}, this is {pipe.config.variant} (--model)"
    if (placement := engine.get("placement", str(pipe.placement))) != str(pipe.placement):
        yield f"on {shown(placement)}, this is on {pipe.placement} (--device, --dtype)"
    if (numerics := engine.get("numerics", "lossless" if engine else pipe.numerics)) != pipe.numerics:
        yield f"with {shown(numerics)} numerics, these are {pipe.numerics} (--numerics)"
    if (backend := engine.get("backend", own := pipe.backend or dispatch.backend())) != own:
        yield f"by the operations of {shown(backend)}, these are of {own} (--backend)"
    if (compiled := engine.get("compiled", pipe.parts.compiled)) != pipe.parts.compiled:
        yield "with compiled blocks, these are not (--compile)" if compiled else "without --compile"
    own = "1" if pipe.parts.ranks.size == 1 else str(pipe.parts.ranks.form)
    if (parallel := engine.get("parallel", "1" if engine else own)) != own:
        yield f"by {shown(parallel)} processes, this is by {own} (--parallel)"
    # Sums are taken in another order; versions differ in theirs too.
    if (threads := engine.get("threads", torch.get_num_threads())) != torch.get_num_threads():
        yield f"on {threads} threads, these are {torch.get_num_threads()} (OMP_NUM_THREADS={threads})"
    if (cpu := engine.get("cpu", kind := torch.backends.cpu.get_cpu_capability())) != kind:
        yield f"on a CPU with {shown(cpu)}, this has {kind}"
    if (version := engine.get("torch", torch.__version__)) != torch.__version__:
        yield f"with torch {shown(version)}, this is {torch.__version__}"
    now = {part: name for part, name in pipe.parts.formats.items() if name}
    then = engine.get("quantized", now)
    for part in {**now, **then}:
        if (before := then.get(part, "")) != (name := now.get(part, "")):
            change = f"with its {part if part in PARTS else shown(part)} in {shown(before) if before else PLAIN}"
            option = f" ({FORMATS[part]} {before})" if part in FORMATS and before in OWN_FORMATS else ""
            yield f"{change}, this is in {name or PLAIN}{option}"
    yield from engine.get("others", ())


@contextmanager
def _naming(picture: Path) -> Iterator[None]:
    """Raise the RequestError of what runs inside with the name of the picture before its message."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{picture}: {error}") from None


def _check_given(args: argparse.Namespace, record: Record) -> None:
    """Raise RequestError unless the user gave the model, the parts and the adapters that a picture only names."""
    if args.model in (None, *FOLDERS) and record.model not in (None, *FOLDERS):
        raise RequestError(f"it was drawn with {shown(record.model)}; say where that is with --model")
    for part, name in record.engine.get("mixed", {}).items():
        if getattr(args, part) is None:
            raise RequestError(f"it was drawn with the {part} of {shown(name)}; say where that is with {PARTS[part]}")
    if record.adapters and not args.lora:
        raise RequestError(_wanted(record.adapters))


def _wanted(adapters: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(shown(f"{own_name(adapter['file'])}:{adapter['scale']:g}") for adapter in adapters)
    return f"it was drawn with {'adapters' if len(adapters) > 1 else 'the adapter'} {names}; give them with --lora"


def _alone(request: Request, args: argparse.Namespace, prompt: Any) -> Request:
    """The request for a single picture out of a record; RequestError if the record is of several."""
    count = 1 if args.num_images_per_prompt is not None else request.num_images_per_prompt
    if prompt is not None:
        request = request.filled(prompt="")
    if (pictures := len(request.prompts) * count) != 1:
        raise RequestError(f"it asks for {pictures} pictures; needed 1, itself; say how many you want with --count")
    request = request.filled(prompt=request.prompts[0], num_images_per_prompt=1)
    own = {field.name: request.per_image(field.name)[0] for field in fields(request) if field.metadata["each"]}
    return request.filled(negative_prompt=request.per_image("negative_prompt")[0], **own)


def _images(args: argparse.Namespace, request: Request, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of images that a picture names and the user does not give: files whose pixels have the recorded hash."""
    images: dict[str, Any] = {}
    for name in (*IMAGES, "reference"):
        if getattr(args, name) is not None:
            continue
        given, hashes = named_images(request, name), several(inputs.get(name))
        if len(given) != len(hashes):
            names = ", ".join(map(shown, given[:4])) or "nothing"
            raise RequestError(
                f"it names {names} for {name}, {len(given)} in all, and has {len(hashes)} hashes; no file is opened "
                f"without its hash; give what is to be drawn with {OPTIONS[name]}"
            )
        pairs = zip(given, hashes, strict=True)
        paths = [image_beside(args.replay.parent, *pair, OPTIONS[name]) for pair in pairs]
        images[name] = (paths or None) if name == "reference" else paths[0] if paths else None
    return images


def _regions(folder: Path, request: Request, inputs: Mapping[str, Any]) -> list[Region]:
    """The regions that a picture names, their masks found beside it by their recorded hash."""
    regions = []
    for number, region in enumerate(request.regions()[0], 1):
        if region.box is None:
            sha256 = inputs.get(f"region {number} mask")
            if not isinstance(sha256, str):
                raise RequestError(
                    f"it names {shown(region.mask)} as a mask of a region and has no hash of it; no file is opened "
                    "without its hash; give the regions with --region"
                )
            region = replace(region, mask=image_beside(folder, str(region.mask), sha256, "--region"))
        regions.append(region)
    return regions


def _others(
    args: argparse.Namespace, request: Request, controls: Sequence[Control], inputs: Mapping[str, Any]
) -> Iterator[str]:
    """Yield which of the user's images are not those that a picture was drawn with."""
    from s3dit.inputs.images import Picture

    if len(controls) != len(request.controls) and request.controls:
        yield f"with {len(request.controls)} controls, this is with {len(controls)}"
    given = {name: several(getattr(args, name)) for name in OPTIONS if several(getattr(args, name))}
    for number, control in enumerate(controls, 1):
        names = {name: f"control {number} {name}" for name in CONTROL_IMAGES}
        images = {key: getattr(control, name) for name, key in names.items()}
        given |= {key: [image] for key, image in images.items() if key in inputs and image}
    names_of = {f"region {number} mask": region for number, region in enumerate(args.region or (), 1)}
    given |= {key: [region.mask] for key, region in names_of.items() if key in inputs and region.box is None}
    for name, paths in given.items():
        if name in inputs and [Picture.open(path, name).sha256 for path in paths] != several(inputs[name]):
            yield f"with another {name} than {', '.join(map(shown, paths))}"

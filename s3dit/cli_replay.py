"""`s3dit generate --replay`: a request out of the picture that it made, and what may be another than it was then.

Metadata are what somebody else wrote. What a replay takes from them is one request: prompt, sizes, seed, steps, noise
levels, guidance, held to the same types and bounds as the user's own (`Request.check`), for one picture, because a
picture says what made it alone; `--count` asks for more. The user's own options change any of it.

What a replay never does with them: ask the network; load a model, a part, an adapter or a ControlNet that they name;
choose a device or a number format; open an image whose hash they do not carry. Models, parts, adapters and controls are
named in an error, and the user gives them: `--model`, `--transformer`, `--lora`, `--control`. Adapters that are given
take the strengths and the order that they had. Start images, masks and references are looked for as plain files beside
the picture and in the current folder, under the name that they had (or below these folders, where that was a relative
path without `..`), and used only if their pixels have the hash that the picture carries; else the user gives them with
`--image`, `--mask` or `--reference`.

The picture is the same to the bit where model, adapters, images, number formats, device, dtype, versions, number of
threads and kind of CPU are the same. What differs, as far as the picture remembers it, is told (`changes`), with the
option that undoes it.
"""

import argparse
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from s3dit.control import IMAGES as CONTROL_IMAGES
from s3dit.control import Control, shown
from s3dit.request import IMAGES, Request, RequestError

if TYPE_CHECKING:
    from s3dit.pipeline import Pipeline

# Options that give what a picture only names.
OPTIONS = {"image": "--image", "mask_image": "--mask", "reference": "--reference"}
PARTS = {"transformer": "--transformer", "text_encoder": "--text-encoder", "vae": "--vae"}
FORMATS = {"transformer": "--quantize", "text_encoder": "--quantize-text"}
# Formats that those options make; any other comes with its file.
OWN_FORMATS = ("fp8", "int8", "int4", "fp8-weights", "int8-weights")
PLAIN = "plain floats"
# Two ways to say one thing: whichever the user chooses, the picture's is dropped.
RIVALS = (("cfg", "guidance_scale"), ("sigmas", "num_inference_steps"))
HASH = re.compile("[0-9a-f]{64}")
STEERING = re.compile(f"control [0-9]{{1,2}} ({'|'.join(CONTROL_IMAGES)})")
# What records hold: a type, a list of one, or a mapping of names to one. REQUIRED of an adapter.
NUMBER = int | float
ENGINE: dict[str, Any] = {
    "s3dit": str, "torch": str, "variant": str, "placement": str, "mixed": {str: str}, "quantized": {str: str},
    "levels": [NUMBER], "model_calls": int, "replayable": bool, "inputs": {str: str | list}, "threads": int,
    "cpu": str,
}  # fmt: skip
ADAPTER: dict[str, Any] = {"file": str, "sha256": str, "scale": NUMBER, "partial": bool, "merged": bool}
REQUIRED = {"file", "sha256", "scale"}
# Adapters and entries of a list: more is no honest record.
MOST_ADAPTERS, MOST_ENTRIES = 64, 1001


def replayed(args: argparse.Namespace, prompt: Any) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The request that a picture was made with, without what the user gives anew; its adapters; and what drew it.

    "others" of the latter: what the user gave that is not what it was. Raises RequestError, of one line that names the
    picture.
    """
    from s3dit.images import read_metadata

    data = read_metadata(args.replay)
    with _naming(args.replay):
        model, adapters = data.pop("model", None), data.pop("adapters", [])
        engine, unknown = _record("engine", data.pop("engine", {}), ENGINE)
        _check_inputs(inputs := engine.get("inputs", {}))
        _check_adapters(adapters)
        if engine.get("replayable") is False:
            raise RequestError("its noise or an image was given from Python, not by a seed and files; draw it there")
        _check_given(args, model, engine, adapters)
        request = Request.from_json(data)
        request.check()
        request = _alone(request, args, prompt)
        controls = [Control.parse(text) for text in args.control or ()]
        if request.controls and not controls:
            words = " ".join(f"--control {shown(_spoken(one))}" for one in request.controls)
            raise RequestError(f"it was drawn with a ControlNet; give it, and what it is to follow, with {words}")
        engine["others"] = [*_others(args, request, controls, inputs)]
        engine["others"] += [f"with {shown(unknown)}, of which this version knows nothing"] if unknown else []
        request = replace(request, control=None, **_images(args, request, inputs))
    values = request.to_json()
    if prompt is not None:
        values.pop("prompt")
    for chosen, dropped in (*RIVALS, *(pair[::-1] for pair in RIVALS)):
        if getattr(args, chosen) is not None:
            values.pop(dropped, None)
    return values, adapters, engine


def attach(pipe: "Pipeline", args: argparse.Namespace, records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Attach the adapters of the command line, and say of each what became of it.

    records: of a replayed picture, or none. Each must be among those given, known by its hash or else by its name; it
    takes its place and, unless another is given, its strength. Raises RequestError, CheckpointError.
    """
    from s3dit.weights.adapter import read_adapter
    from s3dit.weights.hub import resolve_file

    left = [(file, scale, read_adapter(resolve_file(file)).digest() if records else "") for file, scale in args.lora]
    found: dict[int, tuple[str, float | None, str]] = {}
    for by_hash in (True, False):
        for i, was in enumerate(records):
            wanted = was["sha256"] if by_hash else _own(was["file"])
            same = [one for one in left if wanted == (one[2] if by_hash else _own(one[0]))]
            if i not in found and same:
                left.remove(same[0])
                found[i] = same[0]
    if missing := [was for i, was in enumerate(records) if i not in found]:
        raise RequestError(f"{args.replay}: {_wanted(missing)} (scale 0 leaves one out)")
    for i, was in enumerate(records):
        file, scale, digest = found[i]
        partial = args.lora_allow_partial or was.get("partial", False)
        report = pipe.lora.attach(file, was["scale"] if scale is None else scale, allow_partial=partial)
        if was.get("merged"):
            pipe.lora.merge(report.name)
        strength = f"; strength {was['scale']:g} as the picture was drawn" if scale is None else ""
        yield f"{report}{strength}{'' if digest == was['sha256'] else '; another file than the picture was drawn with'}"
    for file, scale, _ in left:
        report = pipe.lora.attach(file, 1.0 if scale is None else scale, allow_partial=args.lora_allow_partial)
        yield f"{report}{'; the picture was drawn without it' if records else ''}"


def changes(pipe: "Pipeline", engine: Mapping[str, Any]) -> Iterator[str]:
    """In what a pipeline differs from the one that drew a picture, as far as that remembers it."""
    import torch

    if (variant := engine.get("variant", pipe.config.variant)) != pipe.config.variant:
        yield f"with a model of the variant {shown(variant)}, this is {pipe.config.variant} (--model)"
    if (placement := engine.get("placement", str(pipe.placement))) != str(pipe.placement):
        yield f"on {shown(placement)}, this is on {pipe.placement} (--device, --dtype)"
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
            found = f"with its {part if part in PARTS else shown(part)} in {shown(before) if before else PLAIN}"
            option = f" ({FORMATS[part]} {before})" if part in FORMATS and before in OWN_FORMATS else ""
            yield f"{found}, this is in {name or PLAIN}{option}"
    yield from engine.get("others", ())


@contextmanager
def _naming(picture: Path) -> Iterator[None]:
    """Whatever is wrong with a picture's metadata is said of it."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{picture}: {error}") from None


def _record(name: str, found: Any, kinds: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The entries of a record that are known here, held to their kinds; and the names of the others."""
    if not isinstance(found, dict):
        raise RequestError(f"its {name} is {shown(found)}; needed a JSON object; take the original file")
    known = {key: value for key, value in found.items() if key in kinds}
    for key, value in known.items():
        if not _fits(value, kinds[key]):
            raise RequestError(
                f"its {name} has a {key} of {shown(value)}, as s3dit writes none; take the original file"
            )
    return known, sorted({*found} - {*known})[:8]


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and len(value) <= MOST_ENTRIES and all(_fits(one, kind[0]) for one in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(one, kind[str]) for one in value.values())
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    """Hashes of images, a list of them for references."""
    for name, found in inputs.items():
        if name not in OPTIONS and not STEERING.fullmatch(name):
            raise RequestError(f"its hashes are of {shown(name)}, too, as s3dit writes none; take the original file")
        hashes = found if name == "reference" and isinstance(found, list) else [found]
        if not all(isinstance(one, str) and HASH.fullmatch(one) for one in hashes):
            raise RequestError(f"its hash of {shown(name)} is {shown(found)}; needed sha256, 64 digits and letters")


def _check_adapters(found: Any) -> None:
    if not isinstance(found, list) or len(found) > MOST_ADAPTERS:
        raise RequestError(f"its adapters are {shown(found)}; needed a list of at most {MOST_ADAPTERS}")
    for one in found:
        known, unknown = _record("adapter", one, ADAPTER)
        if unknown or (missing := sorted(REQUIRED - {*known})):
            said = f"{shown(unknown)}, unknown here" if unknown else f"no {', '.join(missing)}"
            raise RequestError(f"its adapter has {said}; it was written by another version")
        if not HASH.fullmatch(one["sha256"]):
            raise RequestError(f"its adapter has a sha256 of {shown(one['sha256'])}; needed 64 digits and letters")
        if not abs(one["scale"]) <= 1000:
            raise RequestError(f"its adapter has a scale of {shown(one['scale'])}; needed a number within ±1000")


def _check_given(args: argparse.Namespace, model: Any, engine: Mapping[str, Any], adapters: Sequence[Any]) -> None:
    """The user gave what a picture may not name."""
    if not isinstance(model, str | None):
        raise RequestError(f"its model is {shown(model)}; needed a name")
    if args.model in (None, "embedded") and model not in (None, "embedded"):
        raise RequestError(f"it was drawn with {shown(model)}; say where that is with --model")
    for part, name in engine.get("mixed", {}).items():
        if part not in PARTS:
            raise RequestError(f"its engine has a part {shown(part)}; needed one of {', '.join(PARTS)}")
        if getattr(args, part) is None:
            raise RequestError(f"it was drawn with the {part} of {shown(name)}; say where that is with {PARTS[part]}")
    if adapters and not args.lora:
        raise RequestError(_wanted(adapters))


def _wanted(adapters: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(shown(f"{_own(one['file'])}:{one['scale']:g}") for one in adapters)
    return f"it was drawn with {'adapters' if len(adapters) > 1 else 'the adapter'} {names}; give them with --lora"


def _spoken(control: Control) -> str:
    """A control as the command line says it, without the folders of whoever drew with it."""
    paths = {name: getattr(control, name) for name in ("model", *CONTROL_IMAGES)}
    own: dict[str, Any] = {name: _own(path) for name, path in paths.items() if isinstance(path, str)}
    return str(replace(control, **own))


def _alone(request: Request, args: argparse.Namespace, prompt: Any) -> Request:
    """The request of the one picture that a picture speaks of."""
    count = 1 if args.num_images_per_prompt is not None else request.num_images_per_prompt
    if prompt is not None:
        request = replace(request, prompt="")
    if (pictures := len(request.prompts) * count) != 1:
        raise RequestError(f"it asks for {pictures} pictures; needed 1, itself; say how many you want with --count")
    request = replace(request, prompt=request.prompts[0], num_images_per_prompt=1)
    own = {one.name: request.per_image(one.name)[0] for one in fields(request) if one.metadata["each"]}
    return replace(request, negative_prompt=request.per_image("negative_prompt")[0], **own)


def _images(args: argparse.Namespace, request: Request, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the images that a picture names and the user does not give: the files that are what they were."""
    found: dict[str, Any] = {}
    for name in (*IMAGES, "reference"):
        if getattr(args, name) is not None:
            continue
        given, hashes = _named(request, name), _several(inputs.get(name))
        if len(given) != len(hashes):
            names = ", ".join(map(shown, given[:4])) or "nothing"
            raise RequestError(
                f"it names {names} for {name}, {len(given)} in all, and has {len(hashes)} hashes; no file is opened "
                f"without its hash; give what is to be drawn with {OPTIONS[name]}"
            )
        paths = [_file(args.replay.parent, *one, OPTIONS[name]) for one in zip(given, hashes, strict=True)]
        found[name] = (paths or None) if name == "reference" else paths[0] if paths else None
    return found


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _named(request: Request, name: str) -> list[Any]:
    return request.references()[0] if name == "reference" else _several(getattr(request, name))


def _file(folder: Path, named: str, sha256: str, option: str) -> str:
    """The plain file that a picture names, beside it or in the current folder, whose pixels have that hash."""
    from s3dit.images import Picture

    # os.path: a name that is too long, or in a folder that may not be read, is no file.
    there = [path for path in _places(folder, named) if os.path.isfile(path)]
    for path in there:
        try:
            if Picture.open(str(path)).sha256 == sha256:
                return str(path)
        except RequestError:
            continue
    if there:
        raise RequestError(
            f"{shown(str(there[0]))} is not what it was then; needed the same pixels; give the file with {option}"
        )
    raise RequestError(
        f"it was drawn with {shown(named)}, not found beside it nor in this folder; give the file with {option}"
    )


def _places(folder: Path, named: str) -> Iterator[Path]:
    """Where a file may be that a picture names: never outside of its folder and the current one."""
    # A share or a drive of Windows is a network or a device elsewhere, too, and an absolute path in any case.
    inside = not PureWindowsPath(named).anchor and ".." not in re.split(r"[/\\]", named)
    for name in dict.fromkeys([named, _own(named)] if inside else [_own(named)]):
        if not PureWindowsPath(name).anchor:
            yield from dict.fromkeys((folder / name, Path(name)))


def _own(path: str) -> str:
    """The last name of a path of any system."""
    return re.split(r"[/\\]", path)[-1]


def _others(
    args: argparse.Namespace, request: Request, controls: Sequence[Control], inputs: Mapping[str, Any]
) -> Iterator[str]:
    """Which of the user's images are not those that a picture was drawn with."""
    from s3dit.images import Picture

    if len(controls) != len(request.controls) and request.controls:
        yield f"with {len(request.controls)} controls, this is with {len(controls)}"
    given = {name: _several(getattr(args, name)) for name in OPTIONS if _several(getattr(args, name))}
    for number, one in enumerate(controls, 1):
        names = {name: f"control {number} {name}" for name in CONTROL_IMAGES}
        given |= {key: [getattr(one, name)] for name, key in names.items() if key in inputs and getattr(one, name)}
    for name, paths in given.items():
        if name in inputs and [Picture.open(path, name).sha256 for path in paths] != _several(inputs[name]):
            yield f"with another {name} than {', '.join(map(shown, paths))}"

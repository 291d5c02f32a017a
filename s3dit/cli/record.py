"""Read and check what a picture's metadata say of how it was drawn; they are untrusted.

`read_record` takes model, adapters and engine out of the metadata and checks them against what s3dit writes; the rest
is a request. `image_beside` searches the image that a record names, and takes it only by its hash. `cli.replay` draws
from a record, `cli.inspect_pictures` describes one.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from s3dit.cli.option_names import FIELDS, NAMES
from s3dit.cli.options import OWN_FORMATS
from s3dit.control import IMAGES as CONTROL_IMAGES
from s3dit.control import Control, shown
from s3dit.errors import RequestError
from s3dit.request import IMAGES, Request
from s3dit.runtime.embedded import FOLDERS

# Stands before a name whose place only the user knows.
PLACE = "path/to/"
# Options that give what a picture only names.
OPTIONS = {name: FIELDS[name] for name in (*IMAGES, "reference")}
PARTS = {part: NAMES[part] for part in ("transformer", "text_encoder", "vae")}
FORMATS = {"transformer": NAMES["quantize"], "text_encoder": NAMES["quantize_text"]}
PLAIN = "plain floats"
HASH = re.compile("[0-9a-f]{64}")
STEERING = re.compile(f"control [0-9]{{1,2}} ({'|'.join(CONTROL_IMAGES)})|region [0-9]{{1,2}} mask")
# What records hold: a type, a list of one, or a mapping of names to one. REQUIRED of an adapter.
NUMBER = int | float
ENGINE: dict[str, Any] = {
    "s3dit": str, "torch": str, "variant": str, "placement": str, "mixed": {str: str}, "quantized": {str: str},
    "levels": [NUMBER], "model_calls": int, "replayable": bool, "inputs": {str: str | list}, "threads": int,
    "cpu": str, "numerics": str, "backend": str, "compiled": bool, "reused": int,
}  # fmt: skip
ADAPTER: dict[str, Any] = {
    "file": str,
    "sha256": str,
    "scale": NUMBER,
    "partial": bool,
    "merged": bool,
    "blocks": {str: NUMBER},
    "steps": [NUMBER],
}
REQUIRED = {"file", "sha256", "scale"}
# Adapters and entries of a list at most: s3dit writes fewer.
MOST_ADAPTERS, MOST_ENTRIES = 64, 1001


@dataclass(frozen=True, slots=True)
class Record:
    """What drew a picture: model (a name), adapters and engine as they were written.

    unknown: keys of the engine that this version does not know.
    """

    model: str | None
    adapters: list[dict[str, Any]]
    engine: dict[str, Any]
    unknown: list[str]


def read_record(data: dict[str, Any]) -> Record:
    """Take what drew a picture out of its metadata, which leaves the request; raises RequestError."""
    model, adapters = data.pop("model", None), data.pop("adapters", [])
    engine, unknown = _record("engine", data.pop("engine", {}), ENGINE)
    _check_inputs(engine.get("inputs", {}))
    _check_adapters(adapters)
    if engine.get("replayable") is False:
        raise RequestError("its noise or an image was given from Python, not by a seed and files; draw it there")
    if not isinstance(model, str | None):
        raise RequestError(f"its model is {shown(model)}; needed a name")
    for part in engine.get("mixed", {}):
        if part not in PARTS:
            raise RequestError(f"its engine has a part {shown(part)}; needed one of {', '.join(PARTS)}")
    return Record(model, adapters, engine, unknown)


def needed(record: Record, request: Request, folder: Path) -> Iterator[tuple[str, str]]:
    """Options, each with a value, that a replay needs of the user: what a picture only names, and no file here is.

    folder: of the picture. Where only the user knows a file, it is the name that it had, under PLACE.
    """
    if record.model is not None and record.model not in FOLDERS:
        yield "--model", PLACE + own_name(record.model)
    for part, name in record.engine.get("mixed", {}).items():
        yield PARTS[part], PLACE + own_name(name)
    for part, name in record.engine.get("quantized", {}).items():
        if part in FORMATS and name in OWN_FORMATS:
            yield FORMATS[part], name
    for adapter in record.adapters:
        yield "--lora", PLACE + own_name(adapter["file"])
    inputs = record.engine.get("inputs", {})
    for number, control in enumerate(request.controls, 1):
        places: dict[str, Any] = {"model": PLACE + own_name(str(control.model))}
        for name in CONTROL_IMAGES:
            if isinstance(path := getattr(control, name), str):
                places[name] = _placed(folder, path, inputs.get(f"control {number} {name}"))
        yield "--control", str(replace(control, **places))
    regions = request.regions()[0]
    masks = [
        region.box or _placed(folder, str(region.mask), inputs.get(f"region {number} mask"))
        for number, region in enumerate(regions, 1)
    ]
    if any(isinstance(mask, str) and mask.startswith(PLACE) for mask in masks):
        pairs = zip(regions, masks, strict=True)
        yield from (("--region", str(replace(region, mask=mask))) for region, mask in pairs)
    for name, option in OPTIONS.items():
        paths, hashes = named_images(request, name), several(inputs.get(name))
        known = len(paths) == len(hashes)
        places_of = [_placed(folder, str(path), hashes[i] if known else None) for i, path in enumerate(paths)]
        if any(place.startswith(PLACE) for place in places_of):
            yield from ((option, place) for place in places_of)


def _placed(folder: Path, named: str, sha256: str | None) -> str:
    """Where an image is: beside the picture if it is there with that hash, else a place that the user knows."""
    try:
        return image_beside(folder, named, sha256, "") if sha256 else PLACE + own_name(named)
    except RequestError:
        return PLACE + own_name(named)


def _record(name: str, record: Any, kinds: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The entries of a record that are known here, checked against their kinds; and the names of the others."""
    if not isinstance(record, dict):
        raise RequestError(f"its {name} is {shown(record)}; needed a JSON object; take the original file")
    known = {key: value for key, value in record.items() if key in kinds}
    for key, value in known.items():
        if not _fits(value, kinds[key]):
            raise RequestError(
                f"its {name} has a {key} of {shown(value)}, as s3dit writes none; take the original file"
            )
    return known, sorted({*record} - {*known})[:8]


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, list):
        return isinstance(value, list) and len(value) <= MOST_ENTRIES and all(_fits(entry, kind[0]) for entry in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_fits(entry, kind[str]) for entry in value.values())
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    """Hashes of images, a list of them for references."""
    for name, given in inputs.items():
        if name not in OPTIONS and not STEERING.fullmatch(name):
            raise RequestError(f"its hashes are of {shown(name)}, too, as s3dit writes none; take the original file")
        hashes = given if name == "reference" and isinstance(given, list) else [given]
        if not all(isinstance(digest, str) and HASH.fullmatch(digest) for digest in hashes):
            raise RequestError(f"its hash of {shown(name)} is {shown(given)}; needed sha256, 64 digits and letters")


def _check_adapters(adapters: Any) -> None:
    if not isinstance(adapters, list) or len(adapters) > MOST_ADAPTERS:
        raise RequestError(f"its adapters are {shown(adapters)}; needed a list of at most {MOST_ADAPTERS}")
    for adapter in adapters:
        known, unknown = _record("adapter", adapter, ADAPTER)
        if unknown or (missing := sorted(REQUIRED - {*known})):
            fault = f"{shown(unknown)}, unknown here" if unknown else f"no {', '.join(missing)}"
            raise RequestError(f"its adapter has {fault}; it was written by another version")
        if not HASH.fullmatch(adapter["sha256"]):
            raise RequestError(f"its adapter has a sha256 of {shown(adapter['sha256'])}; needed 64 digits and letters")
        if not abs(adapter["scale"]) <= 1000:
            raise RequestError(f"its adapter has a scale of {shown(adapter['scale'])}; needed a number within ±1000")


def spoken(control: Control) -> str:
    """A control in the form of the command line, its files by their last names alone."""
    paths = {name: getattr(control, name) for name in ("model", *CONTROL_IMAGES)}
    own: dict[str, Any] = {name: own_name(path) for name, path in paths.items() if isinstance(path, str)}
    return str(replace(control, **own))


def several(value: Any) -> list[Any]:
    """A list as it is, None as an empty list, any other value as the only entry of a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def named_images(request: Request, name: str) -> list[Any]:
    """The images that a field of a request for a single picture holds, of `reference` those of that picture."""
    return request.references()[0] if name == "reference" else several(getattr(request, name))


def image_beside(folder: Path, named: str, sha256: str, option: str) -> str:
    """The regular file of an image that a picture names, beside it or in the current folder; RequestError if none is.

    sha256: of its pixels · option: gives the file instead, for the message.
    """
    from s3dit.inputs.image_files import file_sha256

    # os.path: a name that is too long, or in a folder that may not be read, is no file.
    there = [path for path in _places(folder, named) if os.path.isfile(path)]
    for path in there:
        try:
            if file_sha256(str(path)) == sha256:
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
    """Paths where a file that a picture names is searched: never outside of its folder and the current folder."""
    # A share or a drive of Windows is a network or a device elsewhere, too, and an absolute path in any case.
    inside = not PureWindowsPath(named).anchor and ".." not in re.split(r"[/\\]", named)
    for name in dict.fromkeys([named, own_name(named)] if inside else [own_name(named)]):
        if not PureWindowsPath(name).anchor:
            yield from dict.fromkeys((folder / name, Path(name)))


def own_name(path: str) -> str:
    """The last name of a path of any system."""
    return re.split(r"[/\\]", path)[-1]

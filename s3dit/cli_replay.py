"""`s3dit generate --replay`: a request out of the picture that it made, and what may be another than it was then."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3dit.request import IMAGES, Request, RequestError

if TYPE_CHECKING:
    from s3dit.pipeline import Pipeline


def replayed(args: argparse.Namespace, prompt: Any) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """The request that a picture was made with, its adapters and what drew it; its model too, unless one is named."""
    from s3dit.images import Picture, read_metadata

    data = read_metadata(args.replay)
    model, engine, adapters = data.pop("model", None), _mapping(data.pop("engine", None)), data.pop("adapters", [])
    if engine.get("replayable") is False:
        raise RequestError(
            f"{args.replay}: its noise or an image was given from Python, not by a seed and files; it cannot be drawn "
            "again from here"
        )
    inputs = _mapping(engine.get("inputs"))
    for name in set(IMAGES) & set(inputs):
        # Another file may be given instead; one that is taken from there must be what it was.
        if getattr(args, name) is None and Picture.open(str(data.get(name)), name).sha256 != inputs[name]:
            raise RequestError(
                f"{data[name]} is not what it was when {args.replay} was drawn; needed the same pixels; give the file "
                f"with {'--mask' if name == 'mask_image' else '--image'}"
            )
    if args.model in (None, "embedded") and model not in (None, "embedded"):
        raise RequestError(f"{args.replay} was drawn with {model}; say where it is with --model")
    for part, name in _mapping(engine.get("mixed")).items():
        if getattr(args, str(part), name) is None:
            raise RequestError(
                f"{args.replay} was drawn with the {part} of {name}; say where it is with --{part.replace('_', '-')}"
            )
    request = Request.from_json(data)
    request.check()
    if args.reference is None:
        _check_references(args.replay, request, inputs.get("reference"))
    values = request.to_json()
    if request.control and not args.control:
        from s3dit.branches import hold

        hold(request.controls, inputs, args.replay)
    if request.control:
        values["control"] = request.control
    if prompt is not None:
        values.pop("prompt")
    return values, adapters, engine


def changes(pipe: "Pipeline", engine: Mapping[str, Any]) -> Iterator[str]:
    """In what a pipeline differs from the one that drew a picture, as far as that remembers it."""
    if (placement := engine.get("placement", str(pipe.placement))) != str(pipe.placement):
        yield f"on {placement}, this is on {pipe.placement}"
    for part, name in pipe.parts.formats.items():
        if "quantized" in engine and (before := _mapping(engine["quantized"]).get(part)) != (name or None):
            yield f"with its {part} in {before or 'plain floats'}, this is in {name or 'plain floats'}"


def _check_references(replay: Path, request: Request, known: Any) -> None:
    """References that a replayed picture names must be what they were."""
    from s3dit.images import Picture

    given, hashes = request.references()[0], known if isinstance(known, list) else []
    if len(given) != len(hashes):
        raise RequestError(
            f"{replay}: its metadata names {len(given)} references and has {len(hashes)} hashes; it was changed since; "
            "give the files with --reference"
        )
    for path, sha256 in zip(given, hashes, strict=True):
        if Picture.open(path).sha256 != sha256:
            raise RequestError(
                f"{path} is not what it was when {replay} was drawn; needed the same pixels; give the files with "
                "--reference"
            )


def _mapping(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}

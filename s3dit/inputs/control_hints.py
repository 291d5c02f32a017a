"""From the controls of a request to the branches that act in a pass.

Pictures are opened and held to the ControlNet, and to the size that is drawn, before any weight is read (`read`).
The autoencoder then turns them into what a branch looks at, once a request (`patches`), and at every noise level those
branches act that have it in their steps (`acting`). A control of strength 0 is no control, and costs nothing.

Not here: what a ControlNet computes (`controlnet`), what the user may say (`control`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from s3dit.control import IMAGES, Control
from s3dit.errors import RequestError
from s3dit.inputs.images import Picture, Pictures
from s3dit.model.controlnet import ActiveControlNet, ControlNet, ControlNetConfig, Controls, condition
from s3dit.request import Request
from s3dit.values import one_by_one


@dataclass(frozen=True, slots=True)
class PreparedControl:
    """A control that was checked.

    number: its place among the request's, from 1 · part: its ControlNet's name · pictures: by field, one row a picture.
    """

    number: int
    control: Control
    part: str
    config: ControlNetConfig
    pictures: tuple[dict[str, Picture], ...]


def read(
    request: Request,
    find: Callable[[Control], tuple[str, ControlNetConfig]],
    pictures: Pictures,
    notes: list[str],
) -> tuple[Request, tuple[PreparedControl, ...]]:
    """Open and check the controls of a resolved request; returns it with their strengths filled in, and them.

    find: opens a ControlNet -> its part and what it is. Those of strength 0 are held to everything and then left out.
    Adds notes; raises RequestError, and what `find` raises.
    """
    controls, found = [], []
    for number, given in enumerate(request.controls, 1):
        given = replace(given, **{name: one_by_one(getattr(given, name)) for name in IMAGES})
        part, config = find(given)
        control = replace(given, strength=config.strength if given.strength is None else float(given.strength))
        if control.inpaint is not None and not config.inpaints:
            raise RequestError(f"{control.model} is a {config}, which cannot inpaint; needed one of version 2.0 or 2.1")
        rows = _opened(request.filled(control=control), pictures)
        controls.append(control)
        notes.append(f"{control.model}: {config}, strength {control.strength:g}{_when(control)}")
        notes += [*config.notes, *_scaled(request, rows)]
        if control.strength:
            found.append(PreparedControl(number, control, part, config, rows))
    return request.filled(control=controls or None), tuple(found)


def _when(control: Control) -> str:
    whole = (control.start, control.end) == (0, 1)
    return "" if whole else f", from {control.start:g} to {control.end:g} of the steps"


def _opened(request: Request, pictures: Pictures) -> tuple[dict[str, Picture], ...]:
    """The pictures of a request's one control, by field, for every picture to be drawn."""
    rows = []
    for i in range(request.count):
        (control,) = request.controls_of(i)
        row = {}
        for name in IMAGES:
            if (source := getattr(control, name)) is not None:
                row[name] = pictures.open(source, f"control {name}")
        if "mask" in row and row["mask"].size != row["inpaint"].size:
            (h, w), (height, width) = row["mask"].size, row["inpaint"].size
            raise RequestError(
                f"{row['mask'].name} is {w}×{h} pixels; needed the size of {row['inpaint'].name}, {width}×{height}"
            )
        if "mask" in row and not row["mask"].mask().any():
            raise RequestError(
                f"{row['mask'].name} is black everywhere, so nothing would be painted; needed white where "
                f"{row['inpaint'].name} is to be painted anew, or neither of them"
            )
        rows.append(row)
    return tuple(rows)


def _sizes(request: Request) -> list[tuple[int, int]]:
    return list(zip(request.per_image("height"), request.per_image("width"), strict=True))


def _scaled(request: Request, rows: Sequence[dict[str, Picture]]) -> list[str]:
    """What to say of pictures that are not of the size that is drawn."""
    notes = []
    for row, (height, width) in zip(rows, _sizes(request), strict=True):
        for picture in row.values():
            h, w = picture.size
            if (h, w) != (height, width):
                changed = "" if 0.9 < height * w / (width * h) < 1.1 else ", which changes its proportions"
                notes.append(f"{picture.name} is {w}×{h} pixels; it is scaled to {width}×{height}{changed}")
    return notes


def patches(prepared: PreparedControl, request: Request, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """What a branch looks at, of all pictures end to end: (tokens, 4 · channels) fp32.

    encode: pixels (3, H, W) fp32 in [-1, 1] on the CPU to model-space latents on any device.
    """
    done: dict[tuple[object, ...], Tensor] = {}
    found = []
    for row, size in zip(prepared.pictures, _sizes(request), strict=True):
        key = (*map(id, row.values()), size)
        if key not in done:
            pixels = {name: row[name].pixels(size) for name in ("image", "inpaint") if name in row}
            mask = row["mask"].mask(size) if "mask" in row else None
            channels = prepared.config.channels
            done[key] = condition(encode, channels, pixels.get("image"), pixels.get("inpaint"), mask)
        found.append(done[key])
    return torch.cat(found)


def hashes(prepared: Sequence[PreparedControl], i: int) -> dict[str, str]:
    """Hashes of what picture i is steered by, under names such as "control 1 image"."""
    return {
        f"control {one.number} {name}": picture.sha256 for one in prepared for name, picture in one.pictures[i].items()
    }


def acting(
    prepared: Sequence[PreparedControl], nets: Sequence[nn.Module], shown: Sequence[Tensor], sigmas: Tensor
) -> Callable[[Tensor], tuple[Controls, ...]]:
    """What acts at a noise level, for `guidance.guide`.

    nets, shown: the weights of each control and its `patches` · levels (n + 1,) fp32, as they are walked.
    """
    n = len(sigmas) - 1
    branches = []
    for one, net, seen in zip(prepared, nets, shown, strict=True):
        assert isinstance(net, ControlNet)
        branches.append(ActiveControlNet(net, seen, one.control.strength or 0.0, one.control.rule))

    def control(sigma: Tensor) -> tuple[Controls, ...]:
        i = int((sigmas[:-1] > sigma).sum())
        found = tuple(b for one, b in zip(prepared, branches, strict=True) if one.control.acts(i, n))
        return (Controls(found),) if found else ()

    return control

"""Prepares the controls of a request: reads their pictures, and selects the ControlNets that act at a noise level.

Pictures are opened and checked against the ControlNet, and against the size that is drawn, before any weight is read
(`read`). The autoencoder then turns them into a ControlNet's input, once a request (`patches`), and at every noise
level those ControlNets act that have it in their steps (`acting`). A control of strength 0 is no control, and costs
nothing.

Not here: what a ControlNet computes (model/controlnet.py), what a user may ask for (control.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from s3dit.control import IMAGES, Control
from s3dit.errors import RequestError
from s3dit.inputs.images import Picture, Pictures
from s3dit.model.controlnet import ActiveControlNet, ControlNet, Controls, condition
from s3dit.model.controlnet_config import ControlNetConfig
from s3dit.request import Request
from s3dit.values import one_by_one


@dataclass(frozen=True, slots=True)
class PreparedControl:
    """A control that was checked, with its pictures.

    number: its place among the request's, from 1 · part: its ControlNet's name · pictures: by field (image, inpaint,
    mask), one dict for each picture that is drawn.
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
    """Open and check the controls of a resolved request; returns it with their strengths filled in, and them prepared.

    find: opens a ControlNet -> its part's name and its configuration. Those of strength 0 are checked like the others
    and then left out. Adds notes; raises RequestError, and what `find` raises.
    """
    controls, prepared = [], []
    for number, given in enumerate(request.controls, 1):
        given = replace(given, **{name: one_by_one(getattr(given, name)) for name in IMAGES})
        part, config = find(given)
        control = replace(given, strength=config.strength if given.strength is None else float(given.strength))
        if control.inpaint is not None and not config.inpaints:
            raise RequestError(f"{control.model} is a {config}, which cannot inpaint; needed one of version 2.0 or 2.1")
        opened = _opened(request.filled(control=control), pictures)
        controls.append(control)
        notes.append(f"{control.model}: {config}, strength {control.strength:g}{_when(control)}")
        notes += [*config.notes, *_scaled(request, opened)]
        if control.strength:
            prepared.append(PreparedControl(number, control, part, config, opened))
    return request.filled(control=controls or None), tuple(prepared)


def _when(control: Control) -> str:
    """In which steps a control acts, for a note; empty where in all."""
    whole = (control.start, control.end) == (0, 1)
    return "" if whole else f", from {control.start:g} to {control.end:g} of the steps"


def _opened(request: Request, pictures: Pictures) -> tuple[dict[str, Picture], ...]:
    """Open the pictures of a request's only control: by field, for every picture to be drawn; raises RequestError."""
    opened = []
    for i in range(request.count):
        (control,) = request.controls_of(i)
        by_field = {}
        for name in IMAGES:
            if (source := getattr(control, name)) is not None:
                by_field[name] = pictures.open(source, f"control {name}")
        if "mask" in by_field:
            _check_mask(by_field["mask"], by_field["inpaint"], request.convention == "diffusers")
        opened.append(by_field)
    return tuple(opened)


def _check_mask(mask: Picture, inpaint: Picture, scaled: bool) -> None:
    """Raise RequestError for a mask of another size than its picture, or one that leaves nothing to paint.

    scaled: another size is no fault, since both are scaled to what is drawn, as diffusers does.
    """
    if mask.size != inpaint.size and not scaled:
        (h, w), (height, width) = mask.size, inpaint.size
        raise RequestError(f"{mask.name} is {w}×{h} pixels; needed the size of {inpaint.name}, {width}×{height}")
    if not mask.mask().any():
        raise RequestError(
            f"{mask.name} is black everywhere, so nothing would be painted; needed white where {inpaint.name} is to be "
            "painted anew, or neither of them"
        )


def _sizes(request: Request) -> list[tuple[int, int]]:
    """(height, width) of every picture to be drawn, in pixels."""
    return list(zip(request.per_image("height"), request.per_image("width"), strict=True))


def _scaled(request: Request, opened: Sequence[dict[str, Picture]]) -> list[str]:
    """Notes on pictures that are not of the size that is drawn."""
    notes = []
    for by_field, (height, width) in zip(opened, _sizes(request), strict=True):
        for picture in by_field.values():
            h, w = picture.size
            if (h, w) != (height, width):
                changed = "" if 0.9 < height * w / (width * h) < 1.1 else ", which changes its proportions"
                notes.append(f"{picture.name} is {w}×{h} pixels; it is scaled to {width}×{height}{changed}")
    return notes


def patches(prepared: PreparedControl, request: Request, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Make a ControlNet's input, of all pictures end to end: (tokens, 4 · channels) fp32.

    encode: pixels (3, H, W) fp32 in [-1, 1] on the CPU to model-space latents on any device.
    """
    encoded: dict[tuple[object, ...], Tensor] = {}
    keys = []
    for by_field, size in zip(prepared.pictures, _sizes(request), strict=True):
        keys.append((*map(id, by_field.values()), size))
        # Equal inputs are encoded once.
        if keys[-1] not in encoded:
            pixels = {name: by_field[name].pixels(size) for name in ("image", "inpaint") if name in by_field}
            mask = by_field["mask"].mask(size) if "mask" in by_field else None
            channels = prepared.config.channels
            encoded[keys[-1]] = condition(encode, channels, pixels.get("image"), pixels.get("inpaint"), mask)
    return torch.cat([encoded[key] for key in keys])


def hashes(prepared: Sequence[PreparedControl], i: int) -> dict[str, str]:
    """Return the SHA-256 of every control picture of picture i, under names such as "control 1 image"."""
    return {
        f"control {control.number} {name}": picture.sha256
        for control in prepared
        for name, picture in control.pictures[i].items()
    }


def acting(
    prepared: Sequence[PreparedControl], nets: Sequence[nn.Module], inputs: Sequence[Tensor], sigmas: Tensor
) -> Callable[[Tensor], Controls | None]:
    """Return the function from a noise level to what acts there, for `guidance.guide`: a Controls, or None.

    nets, inputs: the module of each control and its `patches` · sigmas (n + 1,) fp32, as the solver steps through them.
    """
    n = len(sigmas) - 1
    active = []
    for control, net, tokens in zip(prepared, nets, inputs, strict=True):
        assert isinstance(net, ControlNet)
        given = control.control
        active.append(ActiveControlNet(net, tokens, given.strength or 0.0, given.rule or "authors"))

    def controls(sigma: Tensor) -> Controls | None:
        i = int((sigmas[:-1] > sigma).sum())
        now = tuple(net for control, net in zip(prepared, active, strict=True) if control.control.acts(i, n))
        return Controls(now) if now else None

    return controls

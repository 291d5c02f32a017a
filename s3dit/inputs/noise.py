"""Draws the noise of pictures: what they start from, and what stochastic solvers add.

A picture has a seed and a generator of its own, so that it does not depend on its neighbors. Other programs draw the
noise of a batch at once from one generator: with `convention` comfyui or diffusers the pictures that share a seed are
such a batch, and `batch_place` says which of a batch are drawn, of which the others' noise is passed over.

All numbers are drawn on the CPU in fp32 as latents, (16, H/8, W/8), as diffusers and ComfyUI draw them there. torch
draws a multiple of 16 numbers the same in one call and in several, so a batch's noise is that of its pictures in turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.model.layout import patchify
from s3dit.request import Request
from s3dit.values import as_list

Grids = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a picture's noise comes from: a generator, and of how many others noise is drawn before and after it."""

    generator: torch.Generator
    before: int = 0
    after: int = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """Draw normal numbers in fp32, on the generator's device; in other dtypes it would give other numbers."""
        generator, noise = self.generator, []
        for _ in range(self.before + 1 + self.after):
            noise.append(torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32))
        return noise[self.before]


def sources(request: Request, ahead: int = 0) -> list[Source]:
    """Return the source of each picture's noise; a single generator that the caller gives serves all in order.

    ahead: is added to seeds. Raises RequestError where the caller gives another number of generators.
    """
    given = request.generator
    if given is not None:
        several = [given] * request.count if isinstance(given, torch.Generator) else list(given)
        if len(several) != request.count:
            raise RequestError(f"{len(several)} generators for {request.count} pictures; needed one, or one a picture")
        return [Source(generator) for generator in several]
    found: list[Source] = []
    each, first = _each(request), 0
    for i, (seed, (place, size)) in enumerate(zip(request.seeds(), places(request), strict=True)):
        if i % each == 0:
            generator, first = torch.Generator().manual_seed(seed + ahead), place
        last = i % each == each - 1
        found.append(Source(generator, first if i % each == 0 else 0, size - 1 - place if last else 0))
    return found


def _each(request: Request) -> int:
    """How many pictures, one after another, share a generator."""
    return 1 if request.convention == "own" else request.count // max(1, len(as_list(request.seed)))


def places(request: Request) -> list[tuple[int, int]]:
    """Return the place of each picture in the batch that its noise is drawn with, from 0, and the batch's size.

    Raises RequestError where `batch_place` leaves no room for them.
    """
    each = _each(request)
    first, size = request.batch_place or (0, each)
    if first + each > size:
        raise RequestError(
            f"batch_place is {first},{size}, which has room for {size - first} of {each} pictures; needed a batch of "
            f"at least {first + each}, such as {first},{first + each}"
        )
    return [(first + i % each, size) for i in range(request.count)]


def draw(grids: Grids, given: Sequence[Source]) -> Tensor:
    """Draw noise (tokens, 64) fp32 on the CPU, each picture's from its own source."""
    pairs = zip(grids, given, strict=True)
    return torch.cat([patchify(source((16, 2 * rows, 2 * columns)).cpu()) for (rows, columns), source in pairs])


def given_state(request: Request) -> Tensor | None:
    """Return latents that are the state to start from, (tokens, 64) fp32: what diffusers means beside a start image."""
    theirs = request.latents is not None and request.image is not None and request.convention == "diffusers"
    return _patches(request.latents or ()) if theirs else None


def _patches(latents: Tensor | Sequence[Tensor]) -> Tensor:
    return torch.cat([patchify(each.float().contiguous()) for each in latents])


def starting_noise(request: Request, grids: Grids, given: Sequence[Source]) -> Tensor:
    """Return the noise (tokens, 64) fp32 that a request starts from: the latents that it gives, or drawn noise."""
    if request.latents is not None and given_state(request) is None:
        return _patches(request.latents)
    return draw(grids, given)


def of_steps(request: Request, given: Sequence[Source]) -> Sequence[Source]:
    """Return the sources of what solvers add: those of the start, or with convention comfyui those of seed + 1."""
    # As ComfyUI does on a CPU; on a GPU it draws there, other numbers.
    return sources(request, 1) if request.convention == "comfyui" else given

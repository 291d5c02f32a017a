"""What solvers have in common: the functions that they are given, and the Steps that they yield.

The flow goes from sigma 1 (noise) to 0 (image); the state is x = (1 - sigma)·image + sigma·noise, and the model's
velocity v points from noise to image, so that its estimate of the image is x + sigma·v. A solver knows a function
`velocity(x, sigma)` and nothing else: not guidance, not text, not shapes. The state is one flat fp32 tensor of patches
(tokens, 64) for all pictures together; every solver is element-wise, so pictures do not see each other. The one thing
from outside is `keep`, which has the state after every step and may put parts of it back on a course of theirs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from s3dit.model.layout import unpatchify

# velocity(x (tokens, 64) fp32, sigma () fp32) -> (tokens, 64) fp32
Velocity = Callable[[Tensor, Tensor], Tensor]
# noise() -> (tokens, 64) fp32, fresh at every call
Noise = Callable[[], Tensor]
# keep(x (tokens, 64), i from 1, sigma after step i) -> x (tokens, 64)
Keep = Callable[[Tensor, int, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step of a solver: `i` of `n`, from 1, after `calls` model calls.

    x (tokens, 64) fp32: the state now, at `sigma_next` · start: the state at `sigma`, where `velocity` was taken ·
    grids: (rows, columns) of patches of every picture, filled in by the pipeline · reused: of the calls, how many a
    cache spared each picture, so far; empty without one.
    """

    i: int
    n: int
    calls: int
    sigma: float
    sigma_next: float
    x: Tensor
    start: Tensor
    velocity: Tensor
    grids: tuple[tuple[int, int], ...] = ()
    reused: tuple[int, ...] = ()

    @property
    def latents(self) -> list[Tensor]:
        """The state as latents, one fp32 (16, H/8, W/8) for each picture."""
        return split_latents(self.x, self.grids)

    @property
    def denoised(self) -> list[Tensor]:
        """The model's estimate of the image at this step, start + sigma · velocity, as latents: a preview."""
        return split_latents(self.start + self.sigma * self.velocity, self.grids)


def split_latents(x: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Cut the flat state (tokens, 64) into latents, one (16, H/8, W/8) for each picture."""
    pieces = x.split([rows * columns for rows, columns in grids])
    return [unpatchify(piece, grid) for piece, grid in zip(pieces, grids, strict=True)]


def pairs(sigmas: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (i, sigma, sigma_next) of every step, as fp32 scalars on the CPU."""
    return zip(range(1, len(sigmas)), sigmas[:-1], sigmas[1:], strict=True)


def all_is_free(x: Tensor, i: int, sigma: Tensor) -> Tensor:
    """Return x as it is: the `keep` of a request without a mask."""
    return x

"""The autoencoder by strips: every rank computes some rows of a picture, all together the same numbers as one.

Unlike tiles this is exact. What looks beyond its own row is led to the others, by hooks that stand on the modules while
a picture is split: a 3 × 3 convolution gets a row of either neighbour, a GroupNorm the moments of the whole picture,
attention the keys and values of all positions. Where a picture goes by tiles, each tile is split. Pictures with fewer
rows of latents than ranks are computed whole by every rank.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.kernels.group_norm import group_moments
from s3dit.model.vae import Attention, Autoencoder, GroupNorm
from s3dit.parallel.placement import bounds
from s3dit.parallel.ranks import Exchange, Ranks


def prepare(model: nn.Module, ranks: Ranks) -> None:
    """Let encoder and decoder of an autoencoder that was just made go by strips; other models stay as they are."""
    if isinstance(model, Autoencoder):
        for part, cell in ((model.encoder, model.factor), (model.decoder, 1)):
            part.forward = partial(_by_strips, part, ranks, cell)  # type: ignore[method-assign]


def _by_strips(part: nn.Module, ranks: Ranks, cell: int, x: Tensor) -> Tensor:
    """Apply an encoder or decoder to x (B, C, H, W), of which a latent cell is `cell` rows: each rank to its rows."""
    whole = type(part).forward.__get__(part)
    latent_rows = x.shape[2] // cell
    if latent_rows < ranks.size:
        done: Tensor = whole(x)
        return done
    strips = _Strips(ranks, bounds(latent_rows, ranks.size))
    start, end = strips.bounds[ranks.rank]
    with ranks.section(), strips.led(part):
        return strips.joined(whole(x[:, :, start * cell : end * cell]), 2)


@dataclass(frozen=True, slots=True)
class _Strips:
    """Which rows of latents each rank has; in a larger picture a multiple of them."""

    ranks: Ranks
    bounds: list[tuple[int, int]]

    def joined(self, x: Tensor, axis: int) -> Tensor:
        """Bring together, along an axis, a tensor whose length there is proportional to a rank's rows."""
        counts = [end - start for start, end in self.bounds]
        scale = x.shape[axis] // counts[self.ranks.rank]
        exchange = Exchange.of(self.ranks, 1, [[scale * count] for count in counts])
        return exchange.start(x.movedim(axis, 0))().movedim(0, axis)

    @contextmanager
    def led(self, part: nn.Module) -> Iterator[None]:
        """While inside, the modules of a part compute rows of a picture as they would in the whole one."""
        with ExitStack() as stack:
            for module in part.modules():
                if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
                    # Hooks also keep the part from fused ways, which would go past them.
                    stack.callback(module.register_forward_pre_hook(self._widened).remove)
                    stack.callback(module.register_forward_hook(self._cropped).remove)
                elif isinstance(module, Attention):
                    for project in (module.to_k, module.to_v):
                        stack.callback(project.register_forward_hook(self._of_all).remove)
                elif isinstance(module, GroupNorm):
                    stack.enter_context(_instead(module, partial(self._normed, module)))
            yield

    def _widened(self, conv: Any, args: tuple[Tensor]) -> Tensor:
        """Put the neighbours' rows around x (B, C, h, W); below one that halves the sides, instead of its border."""
        (x,) = args
        above, below = self._edges(x, halves := conv.stride != (1, 1))
        x = x[:, :, :-1] if halves and below is not None else x
        return torch.cat([rows for rows in (None if halves else above, x, below) if rows is not None], 2)

    def _cropped(self, conv: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        """Take off the rows that the neighbours compute."""
        if conv.stride != (1, 1):
            return out
        first, last = self.ranks.rank == 0, self.ranks.rank == self.ranks.size - 1
        return out[:, :, 0 if first else 1 : None if last else -1]

    def _edges(self, x: Tensor, bordered: bool) -> tuple[Tensor | None, Tensor | None]:
        """The last row of the rank above, None on the first; the first row of the one below, None on the last.

        bordered: whether the last row of x is a border, and no row of the picture.
        """
        last = -2 if bordered else -1
        edges = torch.stack((x[:, :, 0], x[:, :, last]))
        rows = Exchange.of(self.ranks, 1, [[2]] * self.ranks.size).start(edges)()[:, :, :, None]
        before, after = 2 * self.ranks.rank - 1, 2 * self.ranks.rank + 2
        return rows[before] if before > 0 else None, rows[after] if after < len(rows) else None

    def _of_all(self, project: nn.Module, args: Any, out: Tensor) -> Tensor:
        """Keys or values (B, n, C) of this rank's positions -> those of all."""
        return self.joined(out, 1)

    def _normed(self, norm: GroupNorm, x: Tensor) -> Tensor:
        """Normalize x (B, C, h, W) by the moments of the whole picture."""
        return torch.cat([norm.applied(each, self._moments(each, norm.num_groups), False) for each in x.split(1)])

    def _moments(self, picture: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of every channel's group in the whole picture, of which this is a part (1, C, h, W)."""
        own = torch.stack(group_moments(picture, groups))
        each = Exchange.of(self.ranks, 1, [[1]] * self.ranks.size).start(own[None])().double()
        share = torch.tensor([end - start for start, end in self.bounds], dtype=torch.float64, device=each.device)
        means, variances = each.unbind(1)
        share = (share / self.bounds[-1][1])[:, None]
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean).square())).sum(0)
        return mean.to(own.dtype), variance.to(own.dtype)


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """While inside, a module has a forward of its own."""
    held = vars(module)
    held["forward"] = forward
    try:
        yield
    finally:
        del held["forward"]

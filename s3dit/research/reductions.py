"""Reductions: what to keep of a site's tensor in place of all of it, by name.

Each takes one item's rows (n, …) and gives a small fp32 tensor, at once, so that nothing large is held: all sites of a
full-size model over 8 steps take less than 1 GB. None makes a copy of all of the tensor, which may have hundreds of
millions of numbers: they go through it by pieces. Further ones are functions of one's own.
"""

from collections.abc import Callable, Iterator
from functools import reduce

import torch
from torch import Tensor

# Numbers that `sample` keeps of a tensor, spread evenly; cosines taken of them are within about 1 % of the whole's.
SAMPLE = 16384
# Numbers that percentiles are taken of, and rows of the effective rank.
PERCENTILES, RANK_ROWS = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9), 256
PERCENTILE_SAMPLE = 1 << 20
# Numbers that are in fp64 at a time: 8 MiB.
PIECE = 1 << 20


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """The rows of a tensor (n, …) as fp64, about PIECE numbers at a time."""
    for piece in x.detach().split(max(1, PIECE // x[0].numel())):
        # Metal has no fp64.
        yield piece.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _average(x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean over the rows of what a function gives of rows."""
    return reduce(torch.add, (of(piece).sum(0) for piece in _pieces(x))) / len(x)


def mean(x: Tensor) -> Tensor:
    """Mean of each channel over the rows: (n, …) -> (…)."""
    return _average(x, lambda rows: rows).float()


def std(x: Tensor) -> Tensor:
    """Standard deviation of each channel over the rows (divided by n): (n, …) -> (…)."""
    center = _average(x, lambda rows: rows)
    return _average(x, lambda rows: (rows - center).square()).sqrt().float()


def largest(x: Tensor) -> Tensor:
    """Largest magnitude of each channel over the rows: (n, …) -> (…)."""
    return reduce(torch.maximum, (piece.abs().amax(0) for piece in _pieces(x))).float()


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each row: (n, …) -> (n,)."""
    return torch.cat([torch.linalg.vector_norm(piece.flatten(1), dim=1) for piece in _pieces(x)]).float()


def rms(x: Tensor) -> Tensor:
    """Root of the mean square of all numbers: -> ()."""
    return _average(x, torch.square).mean().sqrt().float()


def kurtosis(x: Tensor) -> Tensor:
    """Fourth central moment of all numbers over their squared variance (3 for normal ones): -> ()."""
    center = _average(x, lambda rows: rows).mean()
    variance = _average(x, lambda rows: (rows - center).square()).mean()
    return (_average(x, lambda rows: (rows - center).pow(4)).mean() / variance.square()).float()


def percentiles(x: Tensor) -> Tensor:
    """PERCENTILES of all numbers, or of about a million of them spread evenly: -> (9,)."""
    values = _evenly(x, PERCENTILE_SAMPLE)
    return torch.quantile(values, torch.tensor(PERCENTILES, device=x.device) / 100)


def effective_rank(x: Tensor) -> Tensor:
    """Exponential of the entropy of the singular values' shares, of at most RANK_ROWS rows spread evenly: -> ().

    Between 1 (all rows are multiples of one) and the number of rows or channels. Source: Roy and Vetterli 2007.
    """
    if len(x) > RANK_ROWS:
        x = x[torch.linspace(0, len(x) - 1, RANK_ROWS, device=x.device).long()]
    rows = x.detach().flatten(1).double()
    # The eigenvalues of the smaller Gram matrix are the squares.
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / values.sum()
    return torch.exp(-torch.special.xlogy(share, share).sum()).float()


def sample(x: Tensor) -> Tensor:
    """SAMPLE of the numbers, spread evenly, or all where there are fewer: for `Record.cosines`."""
    return _evenly(x, SAMPLE)


def _evenly(x: Tensor, most: int) -> Tensor:
    """At most so many numbers of x, flat, in fp32."""
    # An odd step, so that it does not fall on the same channels of every row.
    index = torch.arange(0, x.numel(), -(-x.numel() // most) | 1, device=x.device)
    # By places: a flat view of a tensor that is not contiguous would be a copy of all of it.
    return x.detach()[torch.unravel_index(index, x.shape)].float()


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function
    for function in (mean, std, largest, norms, rms, kurtosis, percentiles, effective_rank, sample)
}

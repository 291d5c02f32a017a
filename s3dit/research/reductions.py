"""Reductions: what to keep of a site's tensor in place of all of it, by name.

Each takes one item's rows (n, …) and gives a small fp32 tensor, at once, so that nothing large is held: all sites of a
full-size model over 8 steps take less than 1 GB. Further ones are functions of one's own.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Numbers that `sample` keeps of a tensor, spread evenly; cosines taken of them are within about 1 % of the whole's.
SAMPLE = 16384
# Numbers that percentiles are taken of, and rows of the effective rank.
PERCENTILES, RANK_ROWS = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9), 256
PERCENTILE_SAMPLE = 1 << 20


def _rows(x: Tensor) -> Tensor:
    """The rows of a tensor (n, …) as fp32 (n, D)."""
    return x.detach().float().flatten(1) if x.ndim > 1 else x.detach().float()[None]


def mean(x: Tensor) -> Tensor:
    """Mean of each channel over the rows: (n, …) -> (…)."""
    return x.detach().float().mean(0)


def std(x: Tensor) -> Tensor:
    """Standard deviation of each channel over the rows (divided by n): (n, …) -> (…)."""
    return x.detach().float().std(0, correction=0)


def largest(x: Tensor) -> Tensor:
    """Largest magnitude of each channel over the rows: (n, …) -> (…)."""
    return x.detach().float().abs().amax(0)


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each row: (n, …) -> (n,)."""
    return torch.linalg.vector_norm(_rows(x), dim=1)


def rms(x: Tensor) -> Tensor:
    """Root of the mean square of all numbers: -> ()."""
    return x.detach().double().square().mean().sqrt().float()


def kurtosis(x: Tensor) -> Tensor:
    """Fourth central moment of all numbers over their squared variance (3 for normal ones): -> ()."""
    centered = x.detach().double() - x.detach().double().mean()
    return (centered.pow(4).mean() / centered.square().mean().square()).float()


def percentiles(x: Tensor) -> Tensor:
    """PERCENTILES of all numbers, or of about a million of them spread evenly: -> (9,)."""
    values = _evenly(x, PERCENTILE_SAMPLE)
    return torch.quantile(values, torch.tensor(PERCENTILES, device=x.device) / 100)


def effective_rank(x: Tensor) -> Tensor:
    """Exponential of the entropy of the singular values' shares, of at most RANK_ROWS rows spread evenly: -> ().

    Between 1 (all rows are multiples of one) and the number of rows or channels. Source: Roy and Vetterli 2007.
    """
    rows = _rows(x)
    if len(rows) > RANK_ROWS:
        rows = rows[torch.linspace(0, len(rows) - 1, RANK_ROWS, device=x.device).long()]
    # The eigenvalues of the smaller Gram matrix are the squares.
    rows = rows.double()
    gram = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = values / values.sum()
    return torch.exp(-torch.special.xlogy(share, share).sum()).float()


def sample(x: Tensor) -> Tensor:
    """SAMPLE of the numbers, spread evenly, or all where there are fewer: for `Record.cosines`."""
    return _evenly(x, SAMPLE)


def _evenly(x: Tensor, most: int) -> Tensor:
    """At most so many numbers of x, flat, in fp32."""
    flat = x.detach().reshape(-1)
    if flat.numel() > most:
        # An odd step, so that it does not fall on the same channels of every row.
        flat = flat[:: -(-flat.numel() // most) | 1]
    return flat.float()


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function
    for function in (mean, std, largest, norms, rms, kurtosis, percentiles, effective_rank, sample)
}

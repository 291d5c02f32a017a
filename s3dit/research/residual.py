"""The residual stream taken apart: which block wrote what into each token, and what of it reached the velocity.

    with residual(pipe) as terms:
        pipe("a red star above a blue ring", seed=7)
    terms.table("share").picture().save("who_wrote_the_velocity.png")
    terms.massive(step=4)                     # channels that are far larger than the rest

The stream after the last block is what entered the first one plus everything that attention and feed-forwards added on
the way: the terms. Each is measured as it is added, for every token, and nothing of its size is kept:

| statistic | what it is |
|---|---|
| `norm` | length of what is added |
| `cosine` | between what is added and the stream that it is added to; of what entered, 1 |
| `share` | of image tokens, what the term contributes to the velocity along itself, below |
| `unexplained` | of `between` and `output`: the stream less the sum of the terms in fp64, relative: rounding alone |
| `largest`, `median` | of `output`: largest magnitude of each channel, and median of all magnitudes |

The velocity is v = W · (scale · (h - mean h) / std h) + b of the last stream h, which is linear in h once its std is
known. So it is b plus a sum over terms c; a term's share is c · (v - b) over the mean of |v - b|² over the image, and
the shares of all terms have the mean 1. A negative share is taken back by other terms.

What a ControlNet adds after a block is a term too: the `input` of the block that follows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.loaded_model import LoadedModel
from s3dit.research.instrument import Item, Splitter, attached
from s3dit.research.lenses import END, Pass, passes
from s3dit.research.observe import splitter
from s3dit.research.record import Key, Record, fingerprint
from s3dit.research.reductions import largest, norms
from s3dit.research.sites import Site, sites
from s3dit.research.table import Table

# What is measured of terms, and is a number a token.
OF_TERMS = ("norm", "cosine", "share")
# Of the final layer's LayerNorm.
EPS = 1e-6
ADDED = ("attention.added", "ffn.added")


class Residual(Record):
    """What was measured of the residual stream: a Record by term, step, item, branch and statistic."""

    @property
    def terms(self) -> list[str]:
        """The terms, in the order in which they are added."""
        return list(dict.fromkeys(key.site for key in self if key.statistic == "norm"))

    def table(self, statistic: str = "norm", item: int = 0, branch: str = "positive") -> Table:
        """Return the mean of a statistic over tokens, by term and step: the length of the terms, their shares, …."""
        if statistic not in OF_TERMS:
            raise RequestError(f"statistic is {statistic!r}; needed one of {', '.join(OF_TERMS)}")
        found = self.select(item=item, branch=branch, statistic=statistic)
        steps = list(dict.fromkeys(key.step for key in found))
        means = {(key.site, key.step): values.double().mean().item() for key, values in found.items()}
        title = {"norm": "Mean length of what is added to a token", "share": "Share of the velocity",
                 "cosine": "Mean cosine of what is added with the stream"}[statistic]  # fmt: skip
        rows = [[means.get((term, step)) for step in steps] for term in self.terms]
        return Table.of(f"{title}, by step", self.terms, steps, rows, log=statistic == "norm")

    def map(self, term: str, step: int, statistic: str = "norm", item: int = 0, branch: str = "positive") -> Tensor:
        """Return a statistic of the image tokens on their grid, (rows, columns)."""
        values = self.at(term, step=step, item=item, branch=branch, statistic=statistic)
        # Of several pictures, the last one's values are here.
        tokens = [each for each in self.items_seen if (each.item, each.branch) == (item, branch)][-1]
        image = values if statistic == "share" else values[tokens.find("image")]
        return image.unflatten(0, tokens.grid)

    def massive(self, step: int, item: int = 0, branch: str = "positive", top: int = 8) -> Table:
        """Return the channels of the stream that reach highest: their largest magnitude over the median, by block."""
        found = self.select("layers.*.output", step=step, item=item, branch=branch)
        largest = {key.site: values for key, values in found.select(statistic="largest").items()}
        if not largest:
            raise RequestError(f"nothing was seen of step {step}, item {item} ({branch}); needed one that was drawn")
        ratios = torch.stack([values / found.at(site, step, item, branch, statistic="median")
                              for site, values in largest.items()])  # fmt: skip
        channels = ratios.amax(0).topk(min(top, ratios.shape[1])).indices
        title = f"Largest magnitude of a channel over the median of all, step {step}"
        blocks = [site.removesuffix(".output") for site in largest]
        return Table.of(
            title, [f"channel {i}" for i in channels.tolist()], blocks, ratios[:, channels].T.tolist(), True
        )


@contextmanager
def residual(
    pipe: LoadedModel,
    *,
    steps: Sequence[int] | None = None,
    items: Sequence[int] | None = None,
    branch: str | None = None,
) -> Iterator[Residual]:
    """Take the stream of the main blocks apart for as long as the `with` lasts; the picture stays as in `observe`.

    Beside the model it takes the stream three times more in fp64, and for each term what the velocity has of it: at
    1024 × 1024 with 30 blocks some 450 MB. Where a solver calls the model twice in a step, the first call is seen.
    """
    chosen = sites(pipe, ["layers.*.input", *(f"layers.*.{each}" for each in (*ADDED, "between", "output")), END])
    record = Residual()
    record.model = fingerprint(pipe)
    split = splitter(pipe, steps, items, branch, None)
    with passes(pipe) as running:
        account = _Account(record, split)
        with attached(pipe, chosen.values(), lambda site, tensor: account.see(site, tensor, running[0])):
            yield record


class _Account:
    """The stream of the pass that runs, the sum of its terms, and what the velocity has of each."""

    def __init__(self, record: Residual, split: Splitter) -> None:
        self._record, self._split = record, split
        # here: the stream as it is now · sum: of the terms, fp64 · parts: by term, W (scale · (c - mean c)), (n, 64).
        self._here, self._sum, self._parts = torch.empty(0), torch.empty(0), dict[str, Tensor]()

    def see(self, site: Site, tensor: Tensor, current: Pass) -> None:
        """Take in what a site shows, in the order of the computation."""
        items = [part for part in self._split(site, tensor) if not part.call and part.tokens is not None]
        if not items:
            return
        if site.name == END:
            self._shares(items, tensor, current)
        elif site.name == "layers.0.input":
            # Metal has no fp64.
            self._sum = torch.zeros_like(tensor, dtype=torch.float32 if tensor.device.type == "mps" else torch.float64)
            self._parts.clear()
            self._term(site, items, tensor, tensor, current)
        elif site.suffix in ADDED:
            self._term(site, items, tensor, self._here, current)
        elif site.suffix == "input":
            if not torch.equal(tensor, self._here):
                self._term(site, items, tensor - self._here, self._here, current)
        else:
            self._check(site, items, tensor)
        if site.suffix not in ADDED and site.name != END:
            self._here = tensor.detach()

    def _keep(self, part: Item, statistic: str, values: Tensor) -> None:
        if part.tokens is not None and part.tokens not in self._record.items_seen:
            self._record.items_seen.append(part.tokens)
        key = Key(part.site.name, part.step, 0, part.item, part.branch, statistic)
        self._record[key] = values.detach().to("cpu", torch.float32, copy=True)

    def _term(self, site: Site, items: list[Item], term: Tensor, stream: Tensor, current: Pass) -> None:
        """Measure a term (N, dim) that is added to the stream (N, dim)."""
        self._sum += term
        for part in items:
            rows = term[part.index]
            self._keep(part, "norm", norms(rows))
            self._keep(part, "cosine", F.cosine_similarity(rows.float(), stream[part.index].float(), dim=1))
        image, scale = current.image_tokens(site, term)
        linear = current.final.linear
        centered = ((image.float() - image.float().mean(-1, keepdim=True)) * scale).to(image.dtype)
        # Less the bias, and with what adapters add.
        self._parts[site.name] = (linear(centered) - linear(torch.zeros_like(centered[:1]))).float()

    def _check(self, site: Site, items: list[Item], stream: Tensor) -> None:
        """Compare the stream (N, dim) with the sum of the terms, and measure its channels."""
        for part in items:
            there = stream[part.index].to(self._sum.dtype)
            lengths = torch.linalg.vector_norm(there, dim=1).clamp(min=1e-30)
            self._keep(part, "unexplained", torch.linalg.vector_norm(self._sum[part.index] - there, dim=1) / lengths)
            if site.suffix == "output":
                self._keep(part, "largest", largest(stream[part.index]))
                self._keep(part, "median", stream[part.index].float().abs().median())

    def _shares(self, items: list[Item], velocity: Tensor, current: Pass) -> None:
        """Measure the share of each term in the velocity (n, patch_dim)."""
        site = replace(items[0].site, stream="joint")
        tokens, _ = current.image_tokens(site, self._here)
        # The last stream's, as the final layer norms it.
        std = (tokens.float().var(-1, correction=0, keepdim=True) + EPS).sqrt()
        bias = current.final.linear(torch.zeros_like(tokens[:1])).float()
        target = velocity.float() - bias
        for name, part in self._parts.items():
            along = (part / std * target).sum(-1)
            for item in items:
                size = target[item.index].square().sum(-1).mean()
                of_term = replace(item, site=replace(item.site, name=name))
                self._keep(of_term, "share", along[item.index] / size)

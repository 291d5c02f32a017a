"""Who looks at what: attention by word, kind of token, head, layer and step, without a matrix of all pairs.

    with attention_maps(pipe, ["star", "ring"]) as maps:
        pipe("a red star above a blue ring", seed=7)
    maps.map("star")                    # (rows, columns): how much the image looks at the word
    maps.share("text padding")          # mean mass of the image tokens on a kind of token

Queries are the image tokens, keys everything they see. Their weights on few columns are exp(q·k / sqrt(D) - L), where
L, the log-sum-exp of a query's scores, comes from attention itself (`attention_lse`), which is run once more with the
keys in place of the values: that gives the mean key of each query too, and with it the entropy L - q·mean / sqrt(D).

Means over steps, layers and heads are made as the model runs; `keep` says which of them stay apart.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.kernels.attention import Spans, attention_lse
from s3dit.loaded_model import LoadedModel
from s3dit.research.instrument import Splitter, attached
from s3dit.research.observe import splitter
from s3dit.research.sites import Site, sites
from s3dit.research.tokens import KINDS, ItemTokens

Axis = Literal["step", "layer", "head"]
# Weights that are held at a time.
CHUNK = 1 << 24


class AttentionMaps:
    """Means of image tokens' attention; made by `attention_maps`.

    words: as they were asked for · keep: what is not averaged over · items: the map of tokens by item and branch.
    """

    def __init__(self, words: Sequence[str], keep: Sequence[Axis]) -> None:
        self.words, self.keep = list(words), tuple(keep)
        self.items: dict[tuple[int, str], ItemTokens] = {}
        # (item, branch, word or kind or "entropy", step or 0, layer or "") -> sum (heads or 1, queries) and count.
        self._sums: dict[tuple[int, str, str, int, str], tuple[Tensor, int]] = {}

    def groups(self, item: ItemTokens) -> dict[str, list[int]]:
        """Return the tokens whose weights are added up, by name: of each kind but image, of the text, of each word."""
        kinds = {kind: item.find(kind) for kind in (*KINDS, "text") if kind != "image"}
        return kinds | {word: item.find(word) for word in self.words if item.has(word)}

    def add(self, item: ItemTokens, what: str, step: int, layer: str, values: Tensor) -> None:
        """Add values (heads, queries) of one layer and step."""
        key = (
            item.item, item.branch, what, step if "step" in self.keep else 0, layer if "layer" in self.keep else "",
        )  # fmt: skip
        values = (values if "head" in self.keep else values.mean(0, keepdim=True)).double().cpu()
        total, count = self._sums.get(key, (torch.zeros_like(values), 0))
        self._sums[key] = total + values, count + 1

    def weights(
        self, what: str, *, item: int = 0, branch: str = "positive", step: int | None = None, layer: str | None = None,
        head: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the mean weight of each image token on a word or kind of token, or its entropy: (queries,) fp64.

        what: one of `words`, a kind of token, or "entropy" · step, layer (a block's name), head: one of those that were
        kept apart; averaged over where None. Raises RequestError for what was not looked at.
        """
        found = [
            (total, count)
            for (i, b, name, s, at), (total, count) in self._sums.items()
            if (i, b, name) == (item, branch, what) and step in (None, s) and layer in (None, at)
        ]
        if not found:
            seen = sorted({key[2] for key in self._sums})
            near = difflib.get_close_matches(what, seen, n=3, cutoff=0.0)
            raise RequestError(
                f"no attention to {what!r} (item {item}, {branch}, step {step}, layer {layer}) was kept; needed one of "
                f"{', '.join(near) or 'nothing: no picture was drawn'}, and steps and layers named in keep"
            )
        if head is not None and "head" not in self.keep:
            raise RequestError('heads were averaged over; needed keep=("head",)')
        mean = torch.stack([total for total, _ in found]).sum(0) / sum(count for _, count in found)
        return mean.mean(0) if head is None else mean[head]

    def map(
        self, what: str, *, within_text: bool = False, item: int = 0, branch: str = "positive", **at: object
    ) -> Tensor:
        """Return `weights` as a picture (rows, columns) of the item's grid.

        within_text: divided by the weight on all tokens of the text, padding not counted.
        """
        values = self.weights(what, item=item, branch=branch, **at)  # type: ignore[arg-type]
        if within_text:
            values = values / self.weights("text", item=item, branch=branch, **at)  # type: ignore[arg-type]
        return values.view(self.items[item, branch].grid)

    def share(self, what: str, **at: object) -> float:
        """Return the mean weight of the image tokens on a word or kind of token; of all kinds they sum to 1."""
        return self.weights(what, **at).mean().item()  # type: ignore[arg-type]


@contextmanager
def attention_maps(
    pipe: LoadedModel,
    words: str | Sequence[str] = (),
    *,
    layers: str | Sequence[str] = "layers.*",
    steps: Sequence[int] | None = None,
    items: Sequence[int] | None = None,
    branch: str | None = None,
    keep: Sequence[Axis] = (),
) -> Iterator[AttentionMaps]:
    """Gather the attention of image tokens for as long as the `with` lasts.

    words: pieces of the prompt, a column each; weights on the tokens of a word are added · layers: patterns of blocks ·
    keep: "step", "layer", "head", which are then not averaged over. The picture stays as it does in `observe`. A word
    that an item's prompt lacks is left out there; RequestError where no item has it.
    """
    words = [words] if isinstance(words, str) else list(words)
    if wrong := [name for name in keep if name not in get_args(Axis)]:
        raise RequestError(f"keep is {wrong}; needed some of {', '.join(get_args(Axis))}")
    maps = AttentionMaps(words, keep)
    with gathering(pipe, maps, layers=layers, steps=steps, items=items, branch=branch):
        yield maps
    missing = [word for word in words if maps.items and not any(item.has(word) for item in maps.items.values())]
    if missing:
        next(iter(maps.items.values())).find(missing[0])


@contextmanager
def gathering(
    pipe: LoadedModel,
    maps: AttentionMaps,
    *,
    layers: str | Sequence[str] = "layers.*",
    steps: Sequence[int] | None = None,
    items: Sequence[int] | None = None,
    branch: str | None = None,
) -> Iterator[None]:
    """Give attention to `maps.add` for as long as the `with` lasts: for classes that keep other means than these."""
    patterns = [layers] if isinstance(layers, str) else list(layers)
    chosen = sites(pipe, [f"{pattern}.attention.{site}" for pattern in patterns for site in ("q_rope", "k_rope")])
    split = splitter(pipe, steps, items, branch, None)
    queries: dict[str, Tensor] = {}

    def visit(site: Site, tensor: Tensor) -> None:
        # The queries of a block are shown just before its keys.
        if site.suffix == "attention.q_rope":
            queries[site.block] = tensor
        else:
            _gather(maps, split, site, queries.pop(site.block), tensor)

    with attached(pipe, chosen.values(), visit):
        yield


def _gather(maps: AttentionMaps, split: Splitter, site: Site, q: Tensor, k: Tensor) -> None:
    """Add what one block computed: q, k (N, H, D)."""
    for part in split(site, k):
        item = part.tokens
        if item is None:
            raise RequestError("attention maps are of pictures; needed a call of the pipeline itself")
        maps.items[item.item, item.branch] = item
        image = item.find("image")
        if site.stream != "joint":
            raise RequestError(f"{site.block} has no text beside the image; needed blocks layers.*")
        qi, ki = q[part.index][image], k[part.index]
        spans = Spans.of((len(qi),), q.device), Spans.of((len(ki),), k.device)
        mean_key, lse = attention_lse(qi, ki, ki, *spans)
        scale = q.shape[-1] ** -0.5
        entropy = lse - scale * (qi.float() * mean_key.float()).sum(-1)
        maps.add(item, "entropy", part.step, site.block, entropy.T)
        groups = maps.groups(item)
        columns = sorted({token for found in groups.values() for token in found})
        place = {token: i for i, token in enumerate(columns)}
        sums = _weights(qi, ki[columns], lse, scale, [[place[token] for token in found] for found in groups.values()])
        for (what, found), values in zip(groups.items(), sums, strict=True):
            if found:
                maps.add(item, what, part.step, site.block, values)
        of_kinds = [values for (kind, _), values in zip(groups.items(), sums, strict=True) if kind in KINDS]
        maps.add(item, "image", part.step, site.block, 1.0 - torch.stack(of_kinds).sum(0))


def _weights(q: Tensor, k: Tensor, lse: Tensor, scale: float, groups: list[list[int]]) -> list[Tensor]:
    """The weights of queries (n, H, D) on groups of keys (m, H, D), summed within each group: (H, n) fp32 a group."""
    member = torch.zeros(len(k), len(groups), device=q.device)
    for i, group in enumerate(groups):
        member[group, i] = 1.0
    out = []
    for head in range(q.shape[1]):
        keys = k[:, head].float().T
        rows = max(1, CHUNK // max(1, len(k)))
        pieces = [
            ((piece.float() @ keys) * scale - at[:, None]).exp() @ member
            for piece, at in zip(q[:, head].split(rows), lse[:, head].split(rows), strict=True)
        ]
        out.append(torch.cat(pieces))
    return list(torch.stack(out).unbind(-1))

"""Who looks at what: attention by word, kind of token, head, layer and step, without a matrix of all pairs.

    with attention_maps(pipe, ["star", "ring"]) as maps:
        pipe("a red star above a blue ring", seed=7)
    maps.map("star")                    # (rows, columns): how much the image looks at the word
    maps.map("star->image")             # and the word at the image
    maps.share("text padding")          # mean mass of the image tokens on a kind of token

Queries are the image tokens, keys everything they see. Their weights on few columns are exp(q·k / sqrt(D) - L), where
L, the log-sum-exp of a query's scores, comes from attention itself (`attention_lse`), which is run once more with the
keys in place of the values: that gives the mean key of each query too, and with it the entropy L - q·mean / sqrt(D).
All of it takes as long as the model's attention again (`tools/bench.py research`).

Means over steps, layers and heads are made as the model runs; `keep` says which of them stay apart.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.kernels.attention import SCORE_CHUNK, Spans, attention_lse
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

    def add(self, item: ItemTokens, step: int, layer: str, found: Mapping[str, Tensor]) -> None:
        """Add what one layer looks at, (heads, queries) each; RequestError after a picture of another size."""
        values = torch.stack(list(found.values())).detach().double()
        # All in one copy: a GPU would be waited for at each.
        values = (values if "head" in self.keep else values.mean(1, keepdim=True)).cpu()
        at = (step if "step" in self.keep else 0, layer if "layer" in self.keep else "")
        for what, own in zip(found, values, strict=True):
            total, count = self._sums.get(key := (item.item, item.branch, what, *at), (torch.zeros_like(own), 0))
            if total.shape != own.shape:
                found_size = f"item {item.item} is of another size than in the picture before"
                raise RequestError(f"{found_size}; needed one; look at each by itself")
            self._sums[key] = total + own, count + 1

    def weights(
        self, what: str, *, item: int = 0, branch: str = "positive", step: int | None = None, layer: str | None = None,
        head: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the mean weight of each image token on a word or kind of token, or its entropy: (queries,) fp64.

        what: one of `words`, a kind of token, or "entropy"; "word->image" for the word's weight on each image token ·
        step, layer (a block's name), head: one of those that were kept apart; averaged over where None. Raises
        RequestError for what was not looked at.
        """
        found = [
            (total, count)
            for (i, b, name, s, at), (total, count) in self._sums.items()
            if (i, b, name) == (item, branch, what) and step in (None, s) and layer in (None, at)
        ]
        if not found:
            seen = sorted({key[2] for key in self._sums})
            near = ", ".join(difflib.get_close_matches(what, seen, n=3, cutoff=0.0))
            raise RequestError(
                f"no attention to {what!r} (item {item}, {branch}, step {step}, layer {layer}) was kept; needed one of "
                f"{near or 'nothing: no picture was drawn'}, at {self._kept()}"
            )
        heads = len(found[0][0])
        if head is not None and not ("head" in self.keep and 0 <= head < heads):
            kept = f"0 to {heads - 1}" if "head" in self.keep else 'keep=("head",), for they were averaged over'
            raise RequestError(f"head is {head}; needed {kept}")
        mean = torch.stack([total for total, _ in found]).sum(0) / sum(count for _, count in found)
        return mean.mean(0) if head is None else mean[head]

    def _kept(self) -> str:
        """What was kept apart, for messages: steps and layers only where `keep` names them."""
        places = {"item": 0, "branch": 1, "step": 3, "layer": 4}
        values = {axis: [str(key[place]) for key in self._sums] for axis, place in places.items()}
        apart = [axis for axis in values if axis in ("item", "branch", *self.keep) and values[axis]]
        return ", ".join(f"{axis} {values[axis][0]} to {values[axis][-1]}" for axis in apart)

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
    patterns = [layers] if isinstance(layers, str) else list(layers)
    chosen = sites(pipe, [f"{pattern}.attention.{site}" for pattern in patterns for site in ("q_rope", "k_rope")])
    maps = AttentionMaps(words, keep)
    split = splitter(pipe, steps, items, branch, None)
    queries: dict[str, Tensor] = {}

    def visit(site: Site, tensor: Tensor) -> None:
        # The queries of a block are shown just before its keys.
        if site.suffix == "attention.q_rope":
            queries[site.block] = tensor
        else:
            _gather(maps, split, site, queries.pop(site.block), tensor)

    with attached(pipe, chosen.values(), visit):
        yield maps
    missing = [word for word in words if maps.items and not any(item.has(word) for item in maps.items.values())]
    if missing:
        next(iter(maps.items.values())).find(missing[0])


def _gather(maps: AttentionMaps, split: Splitter, site: Site, q: Tensor, k: Tensor) -> None:
    """Add what one block computed: q, k (N, H, D)."""
    for part in split(site, k):
        item = part.tokens
        if item is None:
            raise RequestError("attention maps are of pictures; needed a call of the pipeline itself")
        maps.items[item.item, item.branch] = item
        if site.stream != "joint":
            raise RequestError(f"{site.block} has no text beside the image; needed blocks layers.*")
        maps.add(item, part.step, site.block, looks(q[part.index], k[part.index], item, maps.words))


def looks(q: Tensor, k: Tensor, item: ItemTokens, words: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the weights of one item's image tokens on words and kinds of token, and their entropy, in one block.

    q, k (n, H, D): of all the item's tokens, as they are multiplied · words: as `ItemTokens.find` takes them; those
    that the item has none of are left out -> (H, queries) fp32 each; those of the kinds of token sum to 1. Of words of
    the text also the other way, "word->image": mean weight of the word's tokens on each image token.
    """
    if q.device.type == "cpu":
        # As fast as 16 bits, in which the mean key, and so the entropy, would be rounded.
        q, k = q.float(), k.float()
    image = item.find("image")
    everything, q = q, q[image]
    lse, mean_score = _moments(q, k)
    # What is left of each query's weight is on the image.
    names = [name for name in dict.fromkeys((*KINDS, "text", *words)) if name != "image" and item.has(name)]
    groups = {name: found for name in names if (found := item.find(name))}
    columns = sorted({token for found in groups.values() for token in found})
    place = {token: i for i, token in enumerate(columns)}
    sums = _weights(q, k[columns], lse, [[place[token] for token in found] for found in groups.values()])
    weights = dict(zip(groups, sums, strict=True))
    weights["image"] = 1.0 - torch.stack([weights[kind] for kind in KINDS if kind in weights]).sum(0)
    weights["entropy"] = (lse - mean_score).T
    for word in words:
        found = [token for token in groups.get(word, ()) if item.places[token]]
        if found:
            scores = torch.einsum("nhd,mhd->hnm", everything[found].float(), k.float()) * q.shape[-1] ** -0.5
            weights[f"{word}->image"] = scores.softmax(-1)[:, :, image].mean(1)
    return weights


def _moments(q: Tensor, k: Tensor) -> Tensor:
    """The log-sum-exp of the scores of queries (n, H, D), and the scores' mean by their weights: (2, n, H) fp32."""
    scale = q.shape[-1] ** -0.5
    if q.device.type != "cpu" or torch.get_num_threads() > 1:
        mean_key, lse = attention_lse(q, k, k, Spans.of((len(q),), q.device), Spans.of((len(k),), k.device))
        return torch.stack((lse, scale * (q.float() * mean_key.float()).sum(-1)))
    # One core is as busy with attention's second product as with the first, and can do without it.
    moments, rows = torch.empty(2, *q.shape[:2]), max(1, SCORE_CHUNK // len(k))
    for head in range(q.shape[1]):
        keys = (k[:, head] * scale).T.contiguous()
        for queries, out in zip(q[:, head].split(rows), moments[:, :, head].split(rows, 1), strict=True):
            scores = queries @ keys
            weights = scores.softmax(-1)
            # The largest weight is exp(largest score - log-sum-exp), and never near 0.
            out[0] = scores.amax(-1) - weights.amax(-1).log()
            out[1] = weights.mul_(scores).sum(-1)
    return moments


def _weights(q: Tensor, k: Tensor, lse: Tensor, groups: list[list[int]]) -> list[Tensor]:
    """The weights of queries (n, H, D) on groups of keys (m, H, D), summed within each group: (H, n) fp32 a group."""
    member = torch.zeros(len(k), len(groups), device=q.device)
    for i, group in enumerate(groups):
        member[group, i] = 1.0
    keys = (k.float() * q.shape[-1] ** -0.5).permute(1, 2, 0)
    rows = max(1, CHUNK // max(1, keys.shape[0] * len(k)))
    pieces = [
        (piece.float().transpose(0, 1) @ keys).sub_(at.T[..., None]).exp_() @ member
        for piece, at in zip(q.split(rows), lse.split(rows), strict=True)
    ]
    return list(torch.cat(pieces, 1).unbind(-1))

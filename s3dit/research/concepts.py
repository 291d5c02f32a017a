"""Maps of concepts: where in a picture is what a word means, read off the outputs of attention.

    with concept_maps(pipe, ["star", "ring"]) as maps:
        pipe("a red star above a blue ring", seed=7)
    maps.map("star")                    # (rows, columns)

Concept tokens go along with the picture read-only: each main block treats them as it treats its own tokens, with the
same weights and modulation, and in attention those of a concept look at one another and at the image, while neither
image nor prompt looks at them, so the picture keeps its bits. Where what attention answers to the image is like what it
answers to a concept, or like what the concept would tell, the picture shows the concept. This is ConceptAttention
(arXiv 2502.04320), whose concepts run in the text half of two-stream blocks; here both streams share their weights.

The rows of concepts are computed beside the model (`concept_stream`). What an edit does to the image reaches them
through its keys and values. What finds things best is measured in README.md.
"""

import difflib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.loaded_model import LoadedModel
from s3dit.research.attention import Axis
from s3dit.research.concept_stream import SITES, ConceptStream, Rows, Source
from s3dit.research.instrument import Item, Splitter
from s3dit.research.observe import splitter
from s3dit.research.sites import Site, nearest, sites
from s3dit.research.tokens import ItemTokens

Contrast = Literal["others", "softmax"]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of image rows a (n, H, D) and concept rows b (c, H, D) by head: (c, H, n) fp32."""
    return torch.einsum("nhd,chd->chn", a.float(), b.float())


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


# method(image, concepts) -> (c, H, n): how much each image token is like a concept's token, by head.
METHODS: dict[str, Callable[[Rows, Rows], Tensor]] = {
    # ConceptAttention: products of what attention answers.
    "output": lambda image, concept: _dot(image.out, concept.out),
    "cosine": lambda image, concept: _dot(_unit(image.out), _unit(concept.out)),
    # What the image was answered, against what a concept would tell.
    "value": lambda image, concept: _dot(image.out, concept.v),
    "value cosine": lambda image, concept: _dot(_unit(image.out), _unit(concept.v)),
    # Scores: of the image's queries with a concept's keys, and the other way round; and the weights of the latter.
    "image to concept": lambda image, concept: _dot(image.q, concept.k) * image.q.shape[-1] ** -0.5,
    "concept to image": lambda image, concept: _dot(image.k, concept.q) * image.q.shape[-1] ** -0.5,
    "attention": lambda image, concept: METHODS["concept to image"](image, concept).softmax(-1),
}


class ConceptMaps:
    """Means of concepts' maps; made by `concept_maps`.

    concepts, methods: as they were asked for · keep: what is not averaged over · items: the map of tokens by item and
    branch.
    """

    def __init__(self, concepts: Sequence[str], methods: Sequence[str], keep: Sequence[Axis]) -> None:
        self.concepts, self.methods, self.keep = list(concepts), list(methods), tuple(keep)
        self.items: dict[tuple[int, str], ItemTokens] = {}
        # (item, branch, concept, method) -> by (step or 0, layer or "") sum (heads or 1, image tokens) and count.
        self._sums: dict[tuple[int, str, str, str], dict[tuple[int, str], tuple[Tensor, int]]] = defaultdict(dict)

    def add(self, at: Item, concept: str, method: str, values: Tensor) -> None:
        """Add values (heads, image tokens) of one layer and step."""
        step, layer = at.step if "step" in self.keep else 0, at.site.block if "layer" in self.keep else ""
        values = (values if "head" in self.keep else values.mean(0, keepdim=True)).double().cpu()
        sums = self._sums[at.item, at.branch, concept, method]
        total, count = sums.get((step, layer), (torch.zeros_like(values), 0))
        sums[step, layer] = total + values, count + 1

    def values(
        self, concept: str, *, method: str | None = None, item: int = 0, branch: str = "positive",
        step: int | None = None, layer: str | None = None, head: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the mean likeness of each image token to a concept: (image tokens,) fp64.

        method: one of `methods`, the first without · step, layer (a block's name), head: one of those that were kept
        apart; averaged over where None. Raises RequestError for what was not looked at.
        """
        method = self.methods[0] if method is None else method
        found = [
            sums
            for (s, at), sums in self._sums.get((item, branch, concept, method), {}).items()
            if step in (None, s) and layer in (None, at)
        ]
        if not found:
            seen = sorted({key[2] for key in self._sums})
            near = difflib.get_close_matches(concept, seen, n=3, cutoff=0.0)
            raise RequestError(
                f"no map of {concept!r} by {method!r} (item {item}, {branch}, step {step}, layer {layer}) was made; "
                f"needed one of {', '.join(near) or 'nothing: no picture was drawn'}, a method of "
                f"{', '.join(self.methods)}, and steps and layers named in keep"
            )
        if head is not None and "head" not in self.keep:
            raise RequestError('heads were averaged over; needed keep=("head",)')
        mean = torch.stack([total for total, _ in found]).sum(0) / sum(count for _, count in found)
        return mean.mean(0) if head is None else mean[head]

    def array(
        self, concept: str, *, method: str | None = None, item: int = 0, branch: str = "positive"
    ) -> Tensor:  # fmt: skip
        """Return what was kept of a concept: (steps, layers, heads, image tokens) fp64, 1 of what was averaged over."""
        self.values(concept, method=method, item=item, branch=branch)
        sums = self._sums[item, branch, concept, method or self.methods[0]]
        steps = sorted({step for step, _ in sums})
        layers = list(dict.fromkeys(layer for _, layer in sums))
        each = [[total / count for total, count in (sums[step, layer] for layer in layers)] for step in steps]
        return torch.stack([torch.stack(of_step) for of_step in each])

    def map(self, concept: str, *, contrast: Contrast | None = None, item: int = 0, branch: str = "positive",
            **at: Any) -> Tensor:  # fmt: skip
        """Return `values` as a picture (rows, columns) of the item's grid.

        contrast: against all concepts of the item: "others" takes the mean of the other concepts' maps away, "softmax"
        is the concept's share in a softmax over concepts.
        """
        if contrast not in (None, *get_args(Contrast)):
            raise RequestError(f"contrast is {contrast!r}; needed {' or '.join(get_args(Contrast))}, or None")
        values = self.values(concept, item=item, branch=branch, **at)
        if contrast is not None:
            present = {key[2] for key in self._sums if key[:2] == (item, branch)} - {concept}
            others = [self.values(other, item=item, branch=branch, **at) for other in sorted(present)]
            if not others:
                raise RequestError(f"{concept!r} is the only concept of item {item}; a contrast needs two")
            if contrast == "others":
                values = values - torch.stack(others).mean(0)
            else:
                values = torch.stack([values, *others]).softmax(0)[0]
        return values.view(self.items[item, branch].grid)

    def combined(self, concept: str, heads: Sequence[tuple[str, str, int]], *, item: int = 0,
                 branch: str = "positive", step: int | None = None) -> Tensor:  # fmt: skip
        """Return the mean of maps of several heads, each with its mean taken away and divided by its deviation.

        heads: (method, block, head) of each; keep=("layer", "head") is needed -> (rows, columns) of the item's grid.
        """
        if not heads:
            raise RequestError("heads are none; needed some, as (method, block, head)")
        at: dict[str, Any] = {"item": item, "branch": branch, "step": step}
        each = [self.map(concept, method=how, layer=layer, head=head, **at) for how, layer, head in heads]
        return torch.stack([(one - one.mean()) / one.std(correction=0).clamp(min=1e-30) for one in each]).mean(0)


@contextmanager
def concept_maps(
    pipe: LoadedModel,
    concepts: str | Sequence[str],
    *,
    source: Source = "template",
    mutual: bool = False,
    methods: str | Sequence[str] = "value",
    layers: str | Sequence[str] = "layers.*",
    keep: Sequence[Axis] = (),
    **choice: Any,
) -> Iterator[ConceptMaps]:
    """Gather maps of concepts for as long as the `with` lasts.

    concepts: words or pieces of text; of one that is several tokens, the maps are averaged · source: what concept
    tokens are at first: "template", the concept as a prompt of its own; "bare", likewise without the chat template;
    "prompt", the words where they stand in the prompt, as the refiner leaves them; or "tokens", where no token goes
    along and the prompt's own take the place of the concept's in each block · mutual: whether concepts look at one
    another, so that the maps of each depend on the rest · methods: of METHODS · layers: patterns of main blocks · keep:
    "step", "layer", "head", which are then not averaged over · choice: steps, items, branch of `observe`. Of "prompt"
    and "tokens", a concept that an item's prompt lacks is left out there.
    Raises RequestError for what does not exist, and for a concept that no item has.
    """
    concepts, methods = _listed(concepts), _listed(methods)
    _check(concepts, methods, source, keep)
    wanted, chosen = _blocks(pipe, layers)
    maps = ConceptMaps(concepts, methods, keep)

    def show(part: Item, image: Rows, concept: Rows, owner: Sequence[str]) -> None:
        if part.site.block in wanted:
            _compare(maps, part, image, concept, owner)

    stream = ConceptStream(pipe, concepts, source, mutual, _split(pipe, **choice), show)
    maps.items = stream.items
    with stream.attached(chosen):
        yield maps
    if not maps.items:
        warnings.warn("no map: nothing was drawn at the steps, items and branch that were chosen", stacklevel=3)
    for item in maps.items.values():
        if missing := set(concepts) - {key[2] for key in maps._sums}:
            item.find(min(missing))


def _listed(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(dict.fromkeys(given))


def _compare(maps: ConceptMaps, part: Item, image: Rows, concept: Rows, owner: Sequence[str]) -> None:
    """Add what every method says of one block; owner: the concept of each row."""
    for method in maps.methods:
        values = METHODS[method](image, concept)
        for name in dict.fromkeys(owner):
            own = [i for i, owned in enumerate(owner) if owned == name]
            maps.add(part, name, method, values[own].mean(0))


def _split(
    pipe: LoadedModel, *, steps: Sequence[int] | None = None, items: Sequence[int] | None = None,
    branch: str | None = None,
) -> Splitter:  # fmt: skip
    return splitter(pipe, steps, items, branch, None)


def _blocks(pipe: LoadedModel, layers: str | Sequence[str]) -> tuple[set[str], list[Site]]:
    """The blocks whose maps are wanted, and the sites of all blocks up to the last of them."""
    patterns = [f"{pattern}.attention.heads" for pattern in _listed(layers)]
    wanted = {site.block for site in sites(pipe, patterns).values()}
    if foreign := [name for name in wanted if not name.startswith("layers.")]:
        raise RequestError(f"{foreign[0]} has no text beside the image; needed blocks layers.*")
    last = max(int(name.split(".")[1]) for name in wanted)
    chosen = sites(pipe, ["layers.0.input", *(f"layers.{i}.{site}" for i in range(last + 1) for site in SITES)])
    return wanted, list(chosen.values())


def _check(concepts: Sequence[str], methods: Sequence[str], source: str, keep: Sequence[str]) -> None:
    """Raise RequestError for what `concept_maps` does not take."""
    for name, given, known in (("keep", keep, get_args(Axis)), ("methods", methods, [*METHODS]),
                               ("source", [source], get_args(Source))):  # fmt: skip
        if wrong := [str(each) for each in given if each not in known]:
            near = nearest(wrong[0], known)[0]
            raise RequestError(f"{name}: {wrong[0]!r} is none of {', '.join(known)}; the nearest is {near}")
    if not methods:
        raise RequestError(f"methods are none; needed one or more of {', '.join(METHODS)}")
    if not concepts or not all(isinstance(each, str) and each.strip() for each in concepts):
        raise RequestError(f"concepts are {list(concepts)}; needed words, one or more")

"""Maps of concepts: where in a picture is what a word means, read off the outputs of attention.

    with concept_maps(pipe, ["star", "ring"]) as maps:
        pipe("a red star above a blue ring", seed=7)
    maps.map("star")                    # (rows, columns)

Concept tokens go along with the picture read-only: each main block treats them as it treats its own tokens, with the
same weights and modulation, and in attention they look at one another and at the image, while neither image nor prompt
looks at them, so the picture keeps its bits. Where an image token's answer of attention is like a concept's, the
picture shows the concept. This is ConceptAttention (arXiv 2502.04320), whose concepts run in the text half of
two-stream blocks; here both streams share their weights, as in CogVideoX.

The rows of concepts are computed beside the model, by the layers' own weights and adapters and the references of Ops,
so that hooks and edits of others see nothing of them. What an edit does to the image reaches the concepts through its
keys and values.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.kernels.attention import Spans, attention
from s3dit.kernels.norm import gated_residual, gated_residual_norm, qk_norm_rope, rms_norm_modulate
from s3dit.loaded_model import LoadedModel
from s3dit.model.layers import rope_table
from s3dit.model.layout import text_to_image
from s3dit.model.timestep import modulation_tables
from s3dit.model.transformer import QK_EPS, Block, Context, Transformer
from s3dit.research.attention import Axis
from s3dit.research.instrument import Item, Splitter, attached
from s3dit.research.observe import splitter
from s3dit.research.sites import Site, nearest, sites
from s3dit.research.tokens import ItemTokens

Source = Literal["template", "bare", "prompt", "tokens"]
Contrast = Literal["others", "softmax"]
SITES = ("modulation", "attention.v", "attention.q_rope", "attention.k_rope", "attention.heads")


@dataclass(frozen=True, slots=True)
class Rows:
    """What a block computes of some tokens, (n, H, D) each: queries, keys, values, and what attention answers."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    def at(self, index: Any) -> "Rows":
        """Some of the rows."""
        return Rows(self.q[index], self.k[index], self.v[index], self.out[index])


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
        # (item, branch, concept, method, step or 0, layer or "") -> sum (heads or 1, image tokens) and count.
        self._sums: dict[tuple[int, str, str, str, int, str], tuple[Tensor, int]] = {}

    def add(self, at: Item, concept: str, method: str, values: Tensor) -> None:
        """Add values (heads, image tokens) of one layer and step."""
        step, layer = at.step if "step" in self.keep else 0, at.site.block if "layer" in self.keep else ""
        values = (values if "head" in self.keep else values.mean(0, keepdim=True)).double().cpu()
        key = at.item, at.branch, concept, method, step, layer
        total, count = self._sums.get(key, (torch.zeros_like(values), 0))
        self._sums[key] = total + values, count + 1

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
            (total, count)
            for (i, b, name, how, s, at), (total, count) in self._sums.items()
            if (i, b, name, how) == (item, branch, concept, method) and step in (None, s) and layer in (None, at)
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
    steps: Sequence[int] | None = None,
    items: Sequence[int] | None = None,
    branch: str | None = None,
    keep: Sequence[Axis] = (),
) -> Iterator[ConceptMaps]:
    """Gather maps of concepts for as long as the `with` lasts.

    concepts: words or pieces of text; of one that is several tokens, the maps are averaged · source: what concept
    tokens are at first: "template", the concept as a prompt of its own; "bare", likewise without the chat template;
    "prompt", the words where they stand in the prompt, as the refiner leaves them; or "tokens", where no token goes
    along and the prompt's own take the place of the concept's in each block · mutual: whether concepts look at one
    another, so that the maps of each depend on the rest · methods: of METHODS · layers: patterns of
    main blocks · steps, items, branch: as in `observe` · keep: "step", "layer", "head", which are then not averaged
    over. Of "prompt" and "tokens", a concept that an item's prompt lacks is left out there.
    Raises RequestError for what does not exist, and for a concept that no item has.
    """
    concepts, methods = ([given] if isinstance(given, str) else list(given) for given in (concepts, methods))
    for name, given, known in (("keep", keep, get_args(Axis)), ("methods", methods, [*METHODS]),
                               ("source", [source], get_args(Source))):  # fmt: skip
        if not given and name == "methods" or (wrong := [each for each in given if each not in known]):
            near = f"; the nearest to {wrong[0]} is {nearest(str(wrong[0]), known)[0]}" if given else ""
            raise RequestError(f"{name} is {list(given)}; needed some of {', '.join(known)}{near}")
    if not concepts or not all(isinstance(each, str) and each.strip() for each in concepts):
        raise RequestError(f"concepts are {concepts}; needed words, one or more")
    patterns = [layers] if isinstance(layers, str) else list(layers)
    wanted = {site.block for site in sites(pipe, [f"{pattern}.attention.heads" for pattern in patterns]).values()}
    if foreign := [name for name in wanted if not name.startswith("layers.")]:
        raise RequestError(f"{foreign[0]} has no text beside the image; needed blocks layers.*")
    last = max(int(name.split(".")[1]) for name in wanted)
    chosen = sites(pipe, ["layers.0.input", *(f"layers.{i}.{site}" for i in range(last + 1) for site in SITES)])
    maps = ConceptMaps(concepts, methods, keep)
    given = _encoded(pipe, concepts, source) if source in ("template", "bare") else None
    run = _Run(pipe, maps, source, given, wanted, splitter(pipe, steps, items, branch, None), mutual)
    model = pipe.parts.component("transformer").module
    begin = model.register_forward_pre_hook(run.begin)
    try:
        with attached(pipe, chosen.values(), run.visit):
            yield maps
    finally:
        begin.remove()
    seen = {key[2] for key in maps._sums}
    if maps.items and (missing := [concept for concept in concepts if concept not in seen]):
        next(iter(maps.items.values())).find(missing[0])


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of concepts: x (c, dim) · positions (c, 3) · owner: of each the concept that it belongs to."""

    x: Tensor
    positions: Tensor
    owner: tuple[str, ...]


def _encoded(pipe: LoadedModel, concepts: Sequence[str], source: Source) -> Tokens:
    """Concepts as prompts of their own, through text encoder and refiner; the template's tokens are left out."""
    rows, places, owner = [], [], list[str]()
    with pipe._turn():
        prompts = []
        for concept in concepts:
            # With the space that a word has before it inside a prompt.
            ids, (found,) = pipe.tokenizer.encode(f" {concept}"), pipe.tokenizer.places(f" {concept}", 0)
            kept = [source == "template" or place is not None for place in found]
            prompts.append(([*compress(ids, kept)], [place is not None for place in compress(found, kept)]))
        features = pipe.encoders.encode_texts([tuple(ids) for ids, _ in prompts])
        transformer = pipe.parts["transformer"]
        assert isinstance(transformer, Transformer)
        for concept, (ids, words), text in zip(concepts, prompts, features, strict=True):
            layout = text_to_image([(1, 1)], [len(ids)], pipe.placement.device)
            index = torch.tensor(words).nonzero()[:, 0]
            rows.append(transformer.context(layout, text).text[index.to(text.device)])
            places.append(layout.text.positions[index])
            owner += [concept] * len(index)
    return Tokens(torch.cat(rows), torch.cat(places), tuple(owner))


class _Run:
    """The passes of a run: takes the concepts' rows through the blocks, and adds up their maps."""

    def __init__(
        self, pipe: LoadedModel, maps: ConceptMaps, source: Source, given: Tokens | None, wanted: set[str], split: Splitter,
        mutual: bool,
    ) -> None:
        """given: the concepts' tokens where they are no part of the prompt · wanted: blocks that maps are made of."""
        self._pipe, self._maps, self._source, self._given, self._wanted = pipe, maps, source, given, wanted
        self._split, self._mutual = split, mutual
        self._context: Context | None = None
        # Of the running pass, by item and branch; and what the running block has computed.
        self._tokens: dict[tuple[int, str], Tokens] = {}
        self._held: dict[str, Tensor] = {}

    def begin(self, model: Any, args: tuple[Any, ...]) -> None:
        """A pass of the transformer begins."""
        self._context = args[2]
        self._tokens.clear()

    def visit(self, site: Site, tensor: Tensor) -> None:
        """Take what a block computes; the last of it is what attention answers."""
        if site.suffix == "input":
            for part in self._split(site, tensor):
                self._start(part, tensor)
        elif site.suffix != "attention.heads":
            self._held[site.suffix] = tensor
            if site.suffix == "modulation":
                parts = self._split(site, tensor)
                self._modulation = {(part.item, part.branch): tensor[part.index] for part in parts}
        else:
            rows = Rows(*(self._held.pop(f"attention.{name}") for name in ("q_rope", "k_rope", "v")), tensor)
            heads = tensor.shape[1]
            rows = Rows(rows.q, rows.k, rows.v.unflatten(-1, (heads, -1)) if rows.v.ndim == 2 else rows.v, rows.out)
            for part in self._split(site, tensor):
                if (part.item, part.branch) in self._tokens:
                    self._block(part, rows.at(part.index))

    def _start(self, part: Item, tensor: Tensor) -> None:
        """The first rows of the concepts of an item: x of the joint stream, (N, dim), as it enters the main blocks."""
        item, context = part.tokens, self._context
        if item is None or context is None:
            raise RequestError("maps of concepts are of pictures; needed a call of the pipeline itself")
        self._maps.items[item.item, item.branch] = item
        if self._given is not None:
            self._tokens[item.item, item.branch] = self._given
            return
        found = [(token, concept) for concept in self._maps.concepts if item.has(concept) for token in item.find(concept)]
        if found:
            index = torch.tensor([token for token, _ in found], device=tensor.device)
            start = item.starts["joint"]
            self._tokens[item.item, item.branch] = Tokens(
                tensor[part.index][index], context.joint.positions[start + index.cpu()], tuple(c for _, c in found)
            )

    def _groups(self, tokens: Tokens) -> tuple[int, ...]:
        """Numbers of tokens that see one another: those of a concept, or of all."""
        return (len(tokens.owner),) if self._mutual else tuple(Counter(tokens.owner).values())

    def _block(self, part: Item, rows: Rows) -> None:
        """One block for one item: take its concepts through, then add their maps. rows: of all of the item's tokens."""
        item, tokens = part.tokens, self._tokens[part.item, part.branch]
        assert item is not None
        image = rows.at(item.find("image"))
        if self._source == "tokens":
            concept = rows.at([token for name in dict.fromkeys(tokens.owner) for token in item.find(name)])
        else:
            model = self._pipe.parts.component("transformer").module
            assert isinstance(model, Transformer)
            block = model.get_submodule(part.site.block)
            assert isinstance(block, Block)
            rope = rope_table(tokens.positions, model.config.axes_dims, model.config.rope_theta).to(image.q.device)
            x, concept = through(block, tokens.x, self._groups(tokens), rope, self._modulation[part.item, part.branch], image)
            self._tokens[part.item, part.branch] = Tokens(x, tokens.positions, tokens.owner)
        if part.site.block in self._wanted:
            for method in self._maps.methods:
                maps = METHODS[method](image, concept)
                for name in dict.fromkeys(tokens.owner):
                    own = [i for i, owner in enumerate(tokens.owner) if owner == name]
                    self._maps.add(part, name, method, maps[own].mean(0))


def through(
    block: Block, x: Tensor, groups: tuple[int, ...], rope: Tensor, modulation: Tensor, image: Rows
) -> tuple[Tensor, Rows]:
    """Take rows of concepts x (c, dim) through a main block -> x behind it, and what it computed of them.

    groups: numbers of rows that see one another · rope (c, head_dim / 2, 2) fp32 · modulation (1, 4 · dim): what adaLN answers for the item · image: of the block's
    image tokens, whose keys and values the concepts see beside their own. The layers' own hooks are not run.
    """
    mixing, ffn = block.attention, block.feed_forward
    factor, gate, ffn_factor, ffn_gate = modulation_tables(modulation, block.norms())
    row = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    normed = rms_norm_modulate.reference(x, factor, row, block.eps)
    q, k, v = (layer.forward(normed).unflatten(-1, (mixing.heads, -1)) for layer in (mixing.to_q, mixing.to_k, mixing.to_v))
    q, k = qk_norm_rope.reference(q, k, mixing.norm_q.weight, mixing.norm_k.weight, rope, QK_EPS)
    keys, values = (
        torch.cat([row for of_group in own.split(list(groups)) for row in (of_group, seen)])
        for own, seen in ((k, image.k), (v, image.v))
    )
    spans = Spans.of(groups, q.device), Spans.of(tuple(n + len(image.k) for n in groups), q.device)
    out = attention.reference(q, keys, values, *spans)
    x, normed = gated_residual_norm.reference(
        x, mixing.to_out[0].forward(out.flatten(1)), gate, ffn_factor, row, block.eps
    )
    mixed = ffn.w2.forward(F.silu(ffn.w1.forward(normed)) * ffn.w3.forward(normed))
    return gated_residual.reference(x, mixed, ffn_gate, row, block.eps), Rows(q, k, v, out)

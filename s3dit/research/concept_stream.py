"""The tokens of concepts, and what the main blocks make of them: a stream that the picture knows nothing of.

A block treats rows of concepts as it treats its own tokens, with the same weights, adapters and modulation; in
attention those of a concept look at one another and at the image. They are computed beside the model, by the layers'
own `forward` and the references of Ops, so that hooks, edits and replaced Ops of others see nothing of them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Literal

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
from s3dit.research.instrument import Item, Splitter, attached
from s3dit.research.sites import Site
from s3dit.research.tokens import ItemTokens

# What concept tokens are at first; `concept_maps` has the meanings.
Source = Literal["template", "bare", "prompt", "tokens"]
# What is seen of a block, in the order of the computation; before it, of the first, the tokens that enter.
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


@dataclass(frozen=True, slots=True)
class ConceptTokens:
    """Tokens of concepts: x (c, dim) · positions (c, 3) · owner: of each the concept that it belongs to."""

    x: Tensor
    positions: Tensor
    owner: tuple[str, ...]


def encoded(pipe: LoadedModel, concepts: Sequence[str], *, template: bool) -> ConceptTokens:
    """Make the tokens of concepts, each as a prompt of its own: through text encoder and refiner.

    template: whether the chat template stands around it then; its own tokens are no concept's.
    """
    rows, places, owner = [], [], list[str]()
    with pipe._turn():
        prompts = []
        for concept in concepts:
            # With the space that a word has before it inside a prompt.
            ids, (found,) = pipe.tokenizer.encode(f" {concept}"), pipe.tokenizer.places(f" {concept}", 0)
            kept = [template or place is not None for place in found]
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
    return ConceptTokens(torch.cat(rows), torch.cat(places), tuple(owner))


def through(
    block: Block, x: Tensor, groups: tuple[int, ...], rope: Tensor, modulation: Tensor, image: Rows
) -> tuple[Tensor, Rows]:
    """Take rows of concepts x (c, dim) through a main block -> x behind it, and what it computed of them.

    groups: numbers of rows that see one another · rope (c, head_dim / 2, 2) fp32 · modulation (1, 4 · dim):
    what adaLN answers for the item · image: of the block's image tokens, whose keys and values the concepts see beside
    their own. The layers' own hooks are not run.
    """
    mixing, ffn = block.attention, block.feed_forward
    factor, gate, ffn_factor, ffn_gate = modulation_tables(modulation, block.norms())
    row = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    normed: Any = rms_norm_modulate.reference(x, factor, row, block.eps)
    q, k, v = (
        layer.forward(normed).unflatten(-1, (mixing.heads, -1)) for layer in (mixing.to_q, mixing.to_k, mixing.to_v)
    )
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


class ConceptStream:
    """The concepts of a run, which go along with its passes."""

    def __init__(
        self, pipe: LoadedModel, concepts: Sequence[str], source: Source, mutual: bool, split: Splitter,
        show: Callable[[Item, Rows, Rows, Sequence[str]], None],
    ) -> None:  # fmt: skip
        """show(part, image, concepts, owner): is given what a block computes of image tokens and of concepts' tokens.

        mutual: whether concepts look at one another · owner: of each row the concept that it belongs to.
        """
        self._pipe, self._concepts, self._source, self._mutual = pipe, concepts, source, mutual
        self._split, self._show = split, show
        alone = source in ("template", "bare")
        self._given = encoded(pipe, concepts, template=source == "template") if alone else None
        module = pipe.parts.component("transformer").module
        assert isinstance(module, Transformer)
        self._model = module
        self._context: Context | None = None
        # The map of tokens by item and branch, of what was drawn.
        self.items: dict[tuple[int, str], ItemTokens] = {}
        # Of the running pass, by item and branch; and what the running block has computed.
        self._tokens: dict[tuple[int, str], ConceptTokens] = {}
        self._held: dict[str, Tensor] = {}

    @contextmanager
    def attached(self, chosen: Iterable[Site]) -> Iterator[None]:
        """Go along as long as the `with` lasts. chosen: the first main block's input, and SITES of blocks."""
        begin = self._model.register_forward_pre_hook(self._begin)
        try:
            with attached(self._pipe, chosen, self._visit):
                yield
        finally:
            begin.remove()

    def _begin(self, model: Any, args: tuple[Any, ...]) -> None:
        """A pass of the transformer begins."""
        self._context = args[2]
        self._tokens.clear()

    def _visit(self, site: Site, tensor: Tensor) -> None:
        """Take what a block computes; the last of it is what attention answers."""
        if site.suffix == "input":
            for part in self._split(site, tensor):
                self._start(part, tensor[part.index])
        elif site.suffix != "attention.heads":
            self._held[site.suffix] = tensor
        else:
            q, k, v = (self._held.pop(f"attention.{name}") for name in ("q_rope", "k_rope", "v"))
            rows = Rows(q, k, v.view_as(tensor), tensor)
            for part in self._split(site, tensor):
                if (part.item, part.branch) in self._tokens:
                    self._block(part, rows.at(part.index))

    def _start(self, part: Item, x: Tensor) -> None:
        """Make the tokens of an item's concepts. x: its tokens as they enter the main blocks, (n, dim)."""
        item, context = part.tokens, self._context
        if item is None or context is None:
            raise RequestError("maps of concepts are of pictures; needed a call of the pipeline itself")
        self.items[part.item, part.branch] = item
        tokens = self._given
        if tokens is None:
            present = [concept for concept in self._concepts if item.has(concept)]
            if not present:
                return
            found = [(token, concept) for concept in present for token in item.find(concept)]
            places, owner = zip(*found, strict=True)
            index = torch.tensor(places)
            positions = context.joint.positions[item.starts["joint"] + index]
            tokens = ConceptTokens(x[index.to(x.device)], positions, owner)
        self._tokens[part.item, part.branch] = tokens

    def _modulation(self, item: ItemTokens) -> Tensor:
        """What adaLN answered for the image tokens of an item, (1, 4 · dim)."""
        table, context = self._held["modulation"], self._context
        assert context is not None
        # One row is every item's.
        place = item.starts["joint"] + item.find("image")[0]
        row = 0 if len(table) == 1 else int(context.joint.modulation_row[place])
        return table[row : row + 1]

    def _block(self, part: Item, rows: Rows) -> None:
        """Take an item's concepts through a block. rows: what the block computed of all of the item's tokens."""
        item, tokens = part.tokens, self._tokens[part.item, part.branch]
        assert item is not None
        image = rows.at(item.find("image"))
        if self._source == "tokens":
            concepts = rows.at([token for name in dict.fromkeys(tokens.owner) for token in item.find(name)])
        else:
            block = self._model.get_submodule(part.site.block)
            assert isinstance(block, Block)
            config = self._model.config
            rope = rope_table(tokens.positions, config.axes_dims, config.rope_theta).to(image.q.device)
            groups = (len(tokens.owner),) if self._mutual else tuple(Counter(tokens.owner).values())
            x, concepts = through(block, tokens.x, groups, rope, self._modulation(item), image)
            self._tokens[part.item, part.branch] = replace(tokens, x=x)
        self._show(part, image, concepts, tokens.owner)

"""What stands before and behind the transformer: prompts, references and pictures to tensors, latents to pictures.

`Encoders` runs a model's text encoder, vision tower and autoencoder, whose weights come into memory when something has
to be computed. Features of prompts and references are kept, so that more pictures of a prompt never load the text
encoder again. What is kept is dropped when what it was computed with is no longer the same: another adapter, another
parameter, another backend or numerics.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3dit.errors import CheckpointError
from s3dit.inputs.references import Reference, ReferenceFeatures
from s3dit.kernels.dispatch import backend, numerics, overridden
from s3dit.model.layout import padded
from s3dit.model.text_encoder import EMBEDDING
from s3dit.model.vae import Autoencoder
from s3dit.runtime import budget
from s3dit.runtime.components import Components
from s3dit.runtime.finite import check_finite

# Features of this many prompts are kept; one of 100 tokens is 1 MB in fp32.
PROMPTS_KEPT = 256
# Features of this many reference pictures are kept, 2 to 3 MB each in fp32.
REFERENCES_KEPT = 64
# Latent cells (16,384 is 1024 × 1024 pixels) above which a picture is decoded by tiles, and a tile's side in cells.
WHOLE_CELLS, TILE = 1536 * 1536 // 64, 96


@dataclass(frozen=True, slots=True, eq=False)
class PromptEmbeds:
    """A prompt that was given as features, (tokens, cap_feat_dim); stands where token ids of a prompt stand."""

    features: Tensor

    def __len__(self) -> int:
        return len(self.features)


# A prompt, or a piece of one: token ids, or its features.
Text = tuple[int, ...] | PromptEmbeds
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class FeatureCache(OrderedDict[K, V], Generic[K, V]):
    """What some parts computed, by what they were given: after `trim`, the `limit` entries that came last.

    state: of the parts when it was computed.
    """

    def __init__(self, limit: int, *parts: str) -> None:
        super().__init__()
        self.limit, self.parts = limit, parts
        self.state: tuple[object, ...] = ()

    def trim(self) -> None:
        """Drop the oldest entries above the limit."""
        while len(self) > self.limit:
            self.popitem(last=False)


class Encoders:
    """The text encoder, the vision tower and the autoencoder of a pipeline, and what is kept of their work."""

    def __init__(self, components: Components, limit: budget.Budget | None, graphs: bool = False) -> None:
        """limit: the pipeline's budget, from which the size of tiles follows · graphs: whether it records."""
        self.components, self.limit, self.graphs = components, limit, graphs
        self._prompts: FeatureCache[Text, Tensor] = FeatureCache(PROMPTS_KEPT, "text_encoder")
        self._references: FeatureCache[Hashable, ReferenceFeatures] = FeatureCache(REFERENCES_KEPT, "siglip", "vae")

    @property
    def prompts(self) -> FeatureCache[Text, Tensor]:
        """Features of prompts that would be the same if they were computed again, by token ids."""
        return self._valid(self._prompts)

    @property
    def references(self) -> FeatureCache[Hashable, ReferenceFeatures]:
        """Features of references that would be the same if they were computed again, by `Reference.key`."""
        return self._valid(self._references)

    def clear(self) -> None:
        """Drop all features that are kept."""
        self._prompts.clear()
        self._references.clear()

    def _valid(self, cache: FeatureCache[K, V]) -> FeatureCache[K, V]:
        """A cache, emptied if its parts have changed; an empty one while hooks or replaced Ops look on."""
        components = self.components
        present = [part for part in cache.parts if part in components.checkpoints]
        try:
            for part in present:
                components.checkpoints[part].check()
        except CheckpointError:
            cache.clear()
            raise
        if overridden() or components.watched(*present):
            return FeatureCache(cache.limit)
        state = (backend(), numerics(), *components.state(*present))
        if state != cache.state:
            cache.clear()
        cache.state = state
        return cache

    def encode_texts(self, texts: Sequence[Text]) -> list[Tensor]:
        """Features (tokens, cap_feat_dim) of prompts in the compute dtype, kept ones or from the text encoder.

        Each distinct prompt takes one pass of the text encoder by itself.
        """
        placement, cache = self.components.placement, self.prompts
        new = [ids for ids in dict.fromkeys(texts) if not isinstance(ids, PromptEmbeds) and ids not in cache]
        if new:
            self._encode_new(new, cache)
        features = [
            text.features.to(placement.device, placement.compute) if isinstance(text, PromptEmbeds) else cache[text]
            for text in texts
        ]
        cache.trim()
        return features

    def _encode_new(self, new: Sequence[tuple[int, ...]], cache: FeatureCache[Text, Tensor]) -> None:
        """Put the features of prompts, each by its ids, into the cache."""
        placement = self.components.placement
        with self.components.clock.stage("text_encoder"):
            encoder = self.components["text_encoder"]
            flat = torch.tensor([token for ids in new for token in ids])
            stored = self.components.checkpoints["text_encoder"]
            rows = stored.rows(EMBEDDING, flat)
            stored.release()
            # parity: the embedding is rounded to the dtype that the weights are kept in.
            x = rows.to(placement.dtype).to(placement.device, placement.compute)
            # Each by itself: what is kept must not depend on what else was asked for when it was computed.
            for ids, embedded in zip(new, x.split([len(ids) for ids in new]), strict=True):
                run = partial(self._encode, encoder, embedded)
                cache[ids] = run()
                check_finite(cache[ids], "text features", run, (encoder, stored.path))

    def _encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        """Features of one prompt's embeddings x (n, hidden) -> (n, hidden)."""
        # A part that comes and goes takes its recordings along, and one costs as much as two passes.
        if not self.graphs or self.components.mode != "resident":
            return encoder(x, (len(x),))
        # Later tokens change nothing before them, so one recording serves all prompts of about a length.
        lengths = (padded(len(x)),)
        rope = encoder.rope_of(lengths, x.device)  # type: ignore[operator]
        run = self.components.component("text_encoder").replay
        return run(F.pad(x, (0, 0, 0, lengths[0] - len(x))), lengths, rope)[: len(x)]

    def encode_references(self, pictures: Sequence[Reference], tile: int | None = None) -> list[ReferenceFeatures]:
        """What the transformer reads of reference pictures, kept or from the vision tower and the autoencoder."""
        placement, cache = self.components.placement, self.references
        new = list({picture.key: picture for picture in pictures if picture.key not in cache}.values())
        if new:
            features = []
            with self.components.clock.stage("siglip"):
                tower = self.components["siglip"]
                for picture in new:
                    patches = picture.patches.to(placement.device, placement.compute)
                    run = partial(tower, patches, [picture.seen])
                    features.append(run())
                    path = self.components.checkpoints["siglip"].path
                    check_finite(features[-1], "vision features", run, (tower, path))
            latents = self.encode_images([picture.pixels for picture in new], None, tile)
            for picture, of_picture, seen in zip(new, latents, features, strict=True):
                cache[picture.key] = ReferenceFeatures.of(of_picture, seen)
        encoded = [cache[picture.key] for picture in pictures]
        cache.trim()
        return encoded

    def encode_images(
        self,
        pixels: Sequence[Tensor],
        generators: Sequence[torch.Generator] | None = None,
        tile: int | None = None,
        shared: bool = False,
    ) -> list[Tensor]:
        """Latents (16, H/8, W/8) fp32 of pictures (3, H, W) in [-1, 1]; large ones by tiles of `tile` cells a side.

        The mode of what the autoencoder answers, or with generators, one a picture, a sample; shared: one sample where
        picture and generator are the same.
        """
        by_id: dict[tuple[int, int], Tensor] = {}
        latents = []
        for i, picture in enumerate(pixels):
            # The same tensor twice is encoded once.
            generator = None if generators is None else generators[i]
            key = id(picture), id(generator) if generator is None or shared else i
            if key not in by_id:
                vae, path = self._autoencoder()
                side = tile or self.tile_for(picture.shape[-2] // 8, picture.shape[-1] // 8)
                run = partial(vae.encode, picture[None].to(self.components.placement.device), generator, side)
                with self.components.clock.stage("vae encode"):
                    by_id[key] = run()[0]
                    check_finite(by_id[key], "encoded picture", run, (vae, path))
            latents.append(by_id[key])
        return latents

    def decode(self, latents: Sequence[Tensor], tile: int | None = None) -> list[Tensor]:
        """Pictures (3, H, W) fp32 on the CPU, in about [-1, 1], of latents (16, H/8, W/8); large ones by tiles."""
        vae, path = self._autoencoder()
        pictures = []
        for of_picture in latents:
            side = tile or self.tile_for(of_picture.shape[-2], of_picture.shape[-1])
            run = partial(vae.decode, of_picture[None].to(self.components.placement.device), side)
            with self.components.clock.stage("vae decode"):
                picture = run()[0]
                check_finite(picture, "decoded picture", run, (vae, path))
                # In its own dtype, which may be half the bytes.
                pictures.append(picture.cpu().float())
        return pictures

    def _autoencoder(self) -> tuple[Autoencoder, Path]:
        vae = self.components["vae"]
        assert isinstance(vae, Autoencoder)
        return vae, self.components.checkpoints["vae"].path

    def tile_for(self, rows: int, columns: int) -> int | None:
        """The side of a tile, in latent cells, for a picture of so many cells that no plan knows; None: whole."""
        large = TILE if rows * columns > WHOLE_CELLS else None
        if self.limit is None:
            return large
        components = self.components
        room = self.limit.size - self.limit.reserve - components.sizes("vae")[1]
        config, compute = components.config.vae, components.placement.compute
        work = partial(budget.decoder_work, config, 8 * rows, 8 * columns, dtype=compute)
        return next((tile for tile in budget.TILES if work(tile=tile) <= room), budget.TILES[-1]) or large

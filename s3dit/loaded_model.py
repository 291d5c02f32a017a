"""A model and what it can do, stage by stage: encode, one velocity, decode; its parts, and the memory they take.

`Pipeline` draws with it. Every method takes its turn: calls from several threads wait for one another, and what a
thread has switched on in torch (autocast, gradients, a default device) changes nothing.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, overload

import torch
from torch import Tensor

from s3dit import values
from s3dit.control import shown
from s3dit.errors import RequestError
from s3dit.inputs import references
from s3dit.kernels.dispatch import use_backend, use_numerics
from s3dit.model.layout import patchify
from s3dit.model.text_encoder import TextEncoder
from s3dit.model.tokenizer import Tokenizer
from s3dit.model.transformer import Transformer
from s3dit.model.vae import Autoencoder
from s3dit.plan import Plan, layout_of
from s3dit.request import Request
from s3dit.runtime.adapters import Adapters
from s3dit.runtime.budget import Budget
from s3dit.runtime.components import Components
from s3dit.runtime.devices import Placement, own_settings
from s3dit.runtime.encoders import Encoders, PromptEmbeds
from s3dit.runtime.sources import Sources
from s3dit.sampling.step import split_latents

if TYPE_CHECKING:
    from s3dit.request import Embeds


@dataclass(frozen=True, slots=True)
class Now:
    """What a pipeline computes at the moment: a step of a plan, counted from 1."""

    plan: Plan
    step: int


class LoadedModel:
    """A model whose weights come into memory when a stage needs them."""

    def __init__(
        self,
        sources: Sources,
        components: Components,
        *,
        limit: Budget | None = None,
        graphs: bool = False,
        backend: str | None = None,
        numerics: str = "lossless",
    ) -> None:
        """limit: of memory, if any · graphs: record the transformer's passes · backend, numerics: of its calls."""
        self.sources, self.folder, self.config = sources, sources.path, sources.config
        self.parts, self.limit, self.graphs = components, limit, graphs
        self.backend, self.numerics = backend, numerics
        self.tokenizer = Tokenizer(sources.tokenizer)
        self.lora = Adapters(components)
        self.encoders = Encoders(components, limit, graphs)
        self._computing = False
        # While a step is computed; for those who look on (`research`).
        self.now: Now | None = None

    def encode(self, texts: str | Sequence[str], max_sequence_length: int = 512) -> list[Tensor]:
        """Features of prompts, (tokens, cap_feat_dim) each, the caller's own: what `prompt_embeds` takes."""
        values.texts("texts", texts)
        texts = [texts] if isinstance(texts, str) else texts
        with self._turn():
            ids = [tuple(self.tokenizer.segments(text, 0, max_sequence_length)[0]) for text in texts]
            return [features.clone() for features in self.encoders.encode_texts(ids)]

    def encode_references(self, pictures: Sequence[references.Reference]) -> list[references.ReferenceFeatures]:
        """What the transformer reads of reference pictures, from what is kept or the tower and the autoencoder."""
        with self._turn():
            encoded = self.encoders.encode_references(pictures)
            return [references.ReferenceFeatures(each.patches.clone(), each.features.clone()) for each in encoded]

    def look(self, pictures: Sequence[references.Reference]) -> list[references.ReferenceFeatures]:
        """`encode_references` by its former name, for one release."""
        warnings.warn("look is called encode_references now", FutureWarning, stacklevel=2)
        return self.encode_references(pictures)

    def encode_images(
        self, pixels: Sequence[Tensor], generators: Sequence[torch.Generator] | None = None
    ) -> list[Tensor]:
        """Latents (16, H/8, W/8) fp32 of pictures (3, H, W) in [-1, 1]; large ones by tiles.

        The mode of what the autoencoder answers, or with generators, one a picture, a sample.
        """
        for picture in pixels:
            values.check_floats("pixels", picture, "pictures (3, H, W) in [-1, 1], floats, in a list")
            if picture.ndim != 3 or picture.shape[0] != 3 or any(side % 8 for side in picture.shape[1:]):
                raise RequestError(f"pixels have shape {tuple(picture.shape)}; needed (3, H, W), multiples of 8")
        with self._turn():
            return self.encoders.encode_images(pixels, generators)

    @overload
    def velocity(
        self, latents: Tensor, t: float | Tensor, prompt_embeds: "Embeds", target: float | None = None
    ) -> Tensor: ...
    @overload
    def velocity(
        self, latents: Sequence[Tensor], t: float | Tensor, prompt_embeds: "Embeds", target: float | None = None
    ) -> list[Tensor]: ...
    def velocity(
        self, latents: Tensor | Sequence[Tensor], t: float | Tensor, prompt_embeds: "Embeds",
        target: float | None = None,
    ) -> Tensor | list[Tensor]:  # fmt: skip
        """One pass of the transformer without guidance, with the shapes and the sign of diffusers' transformer.

        latents: (B, 16, H/8, W/8), or a list of (16, H/8, W/8), each also with one frame, (…, 16, 1, H/8, W/8), as
        diffusers' transformer takes them · t: 0 noise to 1 image (1 - sigma), one for all or (B,) · prompt_embeds: as
        in a Request, one an item -> fp32, in the form of `latents`: latents + (sigma - sigma_next) · velocity is the
        next state. target: the time that a TwinFlow model aims at, by its own code 0 for the image. Gradients flow to
        whatever wants them: latents, t, features, parameters. Raises RequestError.
        """
        config, device = self.config.transformer, self.placement.device
        items = [_without_frame(values.tensor_of(item)) for item in latents]
        grids = [(item.shape[1] // 2, item.shape[2] // 2) for item in items]
        request = Request(prompt_embeds=prompt_embeds)
        request.check_embeds(config.cap_feat_dim)
        texts = [PromptEmbeds(features) for features in request.embeds]
        times = _times(t)
        if not items or len(texts) != len(items) or len(times) not in (1, len(items)):
            raise RequestError(
                f"{len(items)} latents, {len(texts)} prompt_embeds and {len(times)} of t; needed one of prompt_embeds "
                "for each of latents, and one t, or as many"
            )
        if target is not None:
            if not config.target_timestep:
                raise RequestError("target is given, but this model has no t_embedder_2; needed a TwinFlow checkpoint")
            times = torch.stack((times, _times(target).expand_as(times)), -1)
        wanted = torch.is_grad_enabled()
        with self._turn():
            transformer = self.parts["transformer"]
            assert isinstance(transformer, Transformer)
            leaves = (*items, times, *request.embeds, *transformer.parameters())
            with torch.set_grad_enabled(wanted and any(leaf.requires_grad for leaf in leaves)):
                layout = layout_of(grids, [(len(text),) for text in texts], (), config, device)
                context = transformer.context(layout, torch.cat(self.encoders.encode_texts(texts)))
                x = torch.cat([patchify(item.float().contiguous()) for item in items]).to(device)
                pieces = split_latents(transformer(x, times.to(device), context).float(), grids)
                out = [piece.reshape(item.shape) for piece, item in zip(pieces, latents, strict=True)]
                return out if isinstance(latents, list | tuple) else torch.stack(out)

    def decode(self, latents: Sequence[Tensor], tile: int | None = None) -> list[Tensor]:
        """Pictures (3, H, W) fp32 in about [-1, 1] of latents (16, H/8, W/8), in a list or batch; large ones by tiles.

        tile: the side of one, in latent cells (default: as memory allows). Raises RequestError.
        """
        items = [_without_frame(values.tensor_of(item), even=False) for item in latents]
        with self._turn():
            return self.encoders.decode(items, tile)

    @property
    def placement(self) -> Placement:
        """Where, and in which dtypes, the parts are kept and computed."""
        return self.parts.placement

    @property
    def transformer(self) -> Transformer:
        """The transformer, in memory; it stays there for as long as you have this object (so do the next two)."""
        return cast(Transformer, self.parts.handle("transformer"))

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder, in memory for as long as you have this object."""
        return cast(TextEncoder, self.parts.handle("text_encoder"))

    @property
    def vae(self) -> Autoencoder:
        """The autoencoder, in memory for as long as you have this object."""
        return cast(Autoencoder, self.parts.handle("vae"))

    def clear(self) -> None:
        """Give memory back: drop kept features and let every part go, but those that somebody has (`transformer`, …).

        The next picture loads what it needs again. Adapters stay attached.
        """
        with self.parts.lock:
            self.encoders.clear()
            self.parts.free()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Compute: one thread at a time, with the pipeline's own backend, whatever the caller has set up in torch."""
        with self.parts.lock:
            if self._computing:
                raise RequestError(
                    "this pipeline was called out of its own computation (by a hook, or a replacement of an "
                    "operation); needed a call before it, after it or between two steps; use a second pipeline"
                )
            self._computing = True
            try:
                with own_settings(self.placement.device), use_backend(self.backend), use_numerics(self.numerics):
                    yield
            finally:
                self._computing = False


def _without_frame(item: Tensor, even: bool = True) -> Tensor:
    """One item's latents as (16, H/8, W/8); RequestError where they are none. even: whether sides must be."""
    values.check_floats("latents", item, "floats (16, H/8, W/8) an item")
    shape = tuple(item.shape)
    item = item[:, 0] if item.ndim == 4 and item.shape[1] == 1 else item
    odd = even and any(side % 2 for side in item.shape[1:])
    if item.ndim != 3 or item.shape[0] != 16 or odd or not item.numel():
        raise RequestError(f"latents have shape {shape} an item; needed (16, H/8, W/8)" + ", both even" * even)
    return item


def _times(t: float | Tensor) -> Tensor:
    """The times of items as (1,) or (B,) fp32; RequestError where one is not from 0 to 1."""
    try:
        times = torch.as_tensor(t, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(f"t is {shown(t)}; needed a number from 0 (noise) to 1 (image), or one an item") from None
    if times.is_meta or not ((times >= 0) & (times <= 1)).all():
        raise RequestError(
            f"t is {shown(t)}; needed numbers from 0 (noise) to 1 (image): 1 - sigma, or (1000 - timestep) / 1000"
        )
    return times

"""Variation: noise on the features of prompts, so that pictures of one prompt differ more than their noise makes them.

A distilled model draws nearly the same picture for every seed. Every token of a text, those of the template included,
gets Gaussian noise whose norm is `strength` times that of its features: the transformer norms each token first, so that
this is what it sees of it, and the features as a whole are changed by the same share. Negative prompts are left alone.
"""

from collections.abc import Iterator, Sequence, Sized

import torch
from torch import Tensor

from s3dit.guidance_options import SEEDS, Variation
from s3dit.inputs.noise import places
from s3dit.request import Request
from s3dit.values import as_list


def variations(request: Request) -> list[Variation]:
    """The variation of every picture, none being of strength 0; seeds count up over the pictures that share one."""
    if request.variation is None:
        return [Variation(0.0)] * request.count
    each = request.count // len(as_list(request.variation))
    own = [seed + place for seed, (place, _) in zip(request.seeds(), places(request), strict=True)]
    given = [Variation.of(text) for text in request.per_image("variation")]
    return [
        Variation(one.strength, (own[i] if one.seed is None else one.seed + i % each) % SEEDS)
        for i, one in enumerate(given)
    ]


def varied(features: Sequence[Tensor], captions: Sequence[Sized], variations: Sequence[Variation]) -> list[Tensor]:
    """Vary the features (tokens, width) of texts, in their dtype; those of strength 0 stay as they are.

    captions: the texts of each picture, and maybe of others behind them · variations: one a picture, each with a seed.
    """
    pending: Iterator[Tensor] = iter(features)
    made = []
    for caption, variation in zip(captions, variations, strict=False):
        generator = torch.Generator().manual_seed(variation.seed or 0)
        for _ in range(len(caption)):
            text = next(pending)
            if variation.strength > 0:
                # On the CPU, so that every device has the same.
                noise = torch.randn(text.shape, generator=generator).to(text.device)
                norms = [torch.linalg.vector_norm(each, dim=1, keepdim=True) for each in (text.float(), noise)]
                text = (text + variation.strength * norms[0] / norms[1] * noise).to(text.dtype)
            made.append(text)
    return made

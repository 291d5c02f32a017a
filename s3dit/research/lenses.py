"""Lenses: what a picture would be if the model stopped here: x0 at every step, and the final layer after every block.

    with lens(pipe, "layers.*", steps=[1, 4, 8]) as seen:
        pipe("a red star above a blue ring", seed=7)
    seen.picture().save("lens.png")          # a row for each block, a column for each step
    seen.errors()                            # how far each block's velocity is from the pass's own

The model ends in a final layer that reads a velocity off the image tokens. Applied to the tokens after an earlier
block, it shows what these say already in the terms of the output (the "logit lens" of language models). The estimate of
the image is x0 = x + sigma · velocity. After the last block both are the pass's own; ControlNets add to the tokens
after a block, which is seen in the block that follows.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from s3dit.errors import RequestError
from s3dit.inputs.images import to_pil
from s3dit.loaded_model import LoadedModel
from s3dit.model.layout import Grid, unpatchify
from s3dit.model.timestep import FinalLayer
from s3dit.model.transformer import PATCH, Context, Transformer
from s3dit.research import pictures
from s3dit.research.instrument import attached
from s3dit.research.observe import splitter
from s3dit.research.sites import Site, nearest, sites
from s3dit.research.table import Table
from s3dit.sampling.step import Step

# The name of the pass's own velocity among those of blocks.
END = "velocity"


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass of the transformer that runs: its input, and its final layer.

    state (n, patch_dim) fp32 · sigma (n, 1) or (1, 1) fp32 · scale: of the time, (R, dim) with a row an item, or one.
    """

    state: Tensor
    sigma: Tensor
    context: Context
    scale: Tensor
    final: FinalLayer

    def image_tokens(self, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens (N, dim) of a stream, those that are denoised (n, dim), and the scale of each, or one row."""
        pack = self.context.image if site.stream == "image" else self.context.joint
        rows = pack.modulation_row[pack.token_index]
        return tokens[pack.token_index], self.scale if len(self.scale) == 1 else self.scale[rows]

    def velocity(self, site: Site, tokens: Tensor) -> Tensor:
        """Apply the final layer to the tokens (N, dim) of a stream -> (n, patch_dim)."""
        # Not by a call, whose hooks are for the pass's own.
        return self.final.forward(*self.image_tokens(site, tokens))


@contextmanager
def passes(pipe: LoadedModel) -> Iterator[list[Pass]]:
    """Give a list whose only element is the pass that runs, or ran last, for as long as the `with` lasts."""
    module = pipe.parts.component("transformer").module
    assert isinstance(module, Transformer)
    running: list[Pass] = []

    def begin(model: nn.Module, args: tuple[Any, ...]) -> None:
        if pipe.now is None:
            raise RequestError("lenses are of pictures; needed a call of the pipeline itself, or of its stream")
        state, t, context = args[:3]
        final = module.all_final_layer[PATCH]
        assert isinstance(final, FinalLayer)
        time = module.embed_time(context.times(t), context.text.dtype)
        t = t if t.ndim == 1 else t[:, 0]
        rows = context.image.modulation_row[context.image.token_index]
        sigma = (1.0 - (t if len(t) == 1 else t[rows]))[:, None]
        running[:] = [Pass(state, sigma, context, 1.0 + final.adaLN_modulation(time), final)]

    handle = module.register_forward_pre_hook(begin)
    try:
        yield running
    finally:
        handle.remove()


class Key(NamedTuple):
    """What a velocity is of: block, or END for the pass's own; step of the solver, from 1; picture; branch."""

    layer: str
    step: int
    item: int
    branch: str


class Lens:
    """Velocities that the final layer reads off the tokens after blocks, in the order in which they were computed.

    velocities: (n, patch_dim) fp32 on the CPU · states: x and sigma at each step, picture and branch · grids: rows and
    columns of patches of each picture.
    """

    def __init__(self, pipe: LoadedModel) -> None:
        self._pipe = pipe
        self.velocities: dict[Key, Tensor] = {}
        self.states: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = {}
        self.grids: dict[int, Grid] = {}

    @property
    def layers(self) -> list[str]:
        """The blocks, in order, and END."""
        return list(dict.fromkeys(key.layer for key in self.velocities))

    @property
    def steps(self) -> list[int]:
        """The steps of the solver that were seen, in order."""
        return list(dict.fromkeys(key.step for key in self.velocities))

    def velocity(self, layer: str, step: int, item: int = 0, branch: str = "positive") -> Tensor:
        """Return the velocity (n, patch_dim) after a block; RequestError where it was not seen, naming the nearest."""
        key = Key(layer, step, item, branch)
        if key not in self.velocities:
            seen = {" ".join(map(str, each)): each for each in self.velocities}
            near = ", ".join(nearest(" ".join(map(str, key)), seen)) or "nothing: no picture was drawn"
            raise RequestError(
                f"the lens has nothing of {layer}, step {step}, item {item} ({branch}); the nearest are {near}"
            )
        return self.velocities[key]

    def x0(self, layer: str = END, step: int = 1, item: int = 0, branch: str = "positive") -> Tensor:
        """Return the estimate of the image after a block, as latents (16, H/8, W/8) fp32."""
        velocity, (state, sigma) = self.velocity(layer, step, item, branch), self.states[step, item, branch]
        return unpatchify(state + sigma * velocity, self.grids[item])

    def errors(self, item: int = 0, branch: str = "positive") -> Table:
        """Of every block and step, how far its velocity is from the pass's own, ‖a - b‖ / ‖b‖."""
        rows = []
        for layer in self.layers:
            pairs = [[self.velocity(name, step, item, branch).double() for name in (layer, END)] for step in self.steps]
            rows.append([((a - b).norm() / b.norm()).item() for a, b in pairs])
        return Table.of("Relative error of the velocity read after each block, by step", self.layers, self.steps, rows)

    def images(self, layers: Sequence[str] | None = None, steps: Sequence[int] | None = None, item: int = 0,
               branch: str = "positive") -> dict[tuple[str, int], Image.Image]:  # fmt: skip
        """Decode the estimates of the image after blocks at steps (default: all), by (block, step)."""
        places = [(layer, step) for layer in layers or self.layers for step in steps or self.steps]
        decoded = decode(self._pipe, (self.x0(layer, step, item, branch) for layer, step in places))
        return dict(zip(places, decoded, strict=True))

    def picture(self, layers: Sequence[str] | None = None, steps: Sequence[int] | None = None, item: int = 0,
                branch: str = "positive", side: int | None = None) -> Image.Image:  # fmt: skip
        """Draw `images` as a table: a row for each block, a column for each step, each `side` pixels large."""
        found = self.images(layers, steps, item, branch)
        captions = [f"{layer}, step {step}" for layer, step in found]
        title, columns = "x0 by the final layer after each block", len({step for _, step in found})
        return pictures.strip([*found.values()], captions, title, columns=columns, side=side)


def decode(pipe: LoadedModel, latents: Iterable[Tensor]) -> list[Image.Image]:
    """Decode latents (16, H/8, W/8) one by one."""
    return [to_pil(pipe.decode([each])[0][None])[0] for each in latents]


def x0_images(pipe: LoadedModel, steps: Iterable[Step], item: int = 0) -> list[Image.Image]:
    """Draw the estimate of the image at every step of `pipe.stream(…)`, guidance included, after the last of them."""
    # Decoding between two steps would load the weights anew each time.
    return decode(pipe, [step.denoised[item] for step in steps])


@contextmanager
def lens(
    pipe: LoadedModel,
    layers: str | Sequence[str] = "layers.*",
    *,
    steps: Sequence[int] | None = None,
    items: Sequence[int] | None = None,
    branch: str | None = None,
) -> Iterator[Lens]:
    """Apply the final layer after blocks for as long as the `with` lasts; the picture stays as it does in `observe`.

    layers: patterns of blocks of the image or joint stream; none for the pass's own velocity alone · steps, items,
    branch: as in `observe`. What is kept is as large as the state for each block and step: at 1024 × 1024 with 30
    blocks and 8 steps 250 MB. Where a solver calls the model twice in a step, the first call is seen.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    chosen = sites(pipe, [*(f"{pattern}.output" for pattern in patterns), END])
    if wrong := [site.block for site in chosen.values() if site.stream not in ("image", "joint", "patches")]:
        raise RequestError(f"{wrong[0]} has no image tokens; needed blocks layers.* or noise_refiner.*")
    split, seen = splitter(pipe, steps, items, branch, None), Lens(pipe)
    with passes(pipe) as running:

        def visit(site: Site, tensor: Tensor) -> None:
            (current,), velocity = running, tensor if site.name == END else None
            for part in split(replace(site, stream="patches"), current.state):
                if part.call or part.tokens is None:
                    continue
                velocity = current.velocity(site, tensor) if velocity is None else velocity
                item, at = part.tokens, (part.step, part.item, part.branch)
                sigma = current.sigma if len(current.sigma) == 1 else current.sigma[part.index]
                seen.grids[part.item] = item.grid
                seen.states[at] = (_copy(current.state[part.index]), _copy(sigma))
                seen.velocities[Key(site.block or END, *at)] = _copy(velocity[part.index])

        with attached(pipe, chosen.values(), visit):
            yield seen


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)

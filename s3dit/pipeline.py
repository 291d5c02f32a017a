"""The story in one file: load, plan, encode, sample, decode.

    pipe = Pipeline.load("Tongyi-MAI/Z-Image-Turbo")
    pipe(prompt="a red fox in the snow", seed=7).images[0].save("fox.png")

Headers are read and checked at `load`; weights come into memory when a stage needs them (`offload.Residency`). Prompt
features are kept, so that more pictures of a prompt never load the text encoder again. `stream` yields Steps: progress
bars, previews and early stops are a `for` loop around it.

What it does not do: schedules and solvers (`sampler`), guidance (`guidance`), where tokens stand (`layout`).
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from s3dit import __version__, budget, images
from s3dit.devices import Placement, place
from s3dit.graphs import Replay, check_compiler, compile_blocks
from s3dit.guidance import Guidance, guide
from s3dit.kernels.dispatch import BackendError, backend, set_backend
from s3dit.layout import padded, patchify, text_to_image
from s3dit.linear import swap
from s3dit.offload import Mode, Residency, stream, tensors
from s3dit.request import Request, RequestError, Result
from s3dit.sampler import Step, model_calls, sigmas, solve
from s3dit.sources import SHIFT_NOTE, Sources, gather
from s3dit.text_encoder import EMBEDDING, TextEncoder
from s3dit.tokenizer import Tokenizer
from s3dit.trace import first_nonfinite
from s3dit.transformer import Context, Transformer
from s3dit.vae import Autoencoder
from s3dit.weights import keymap
from s3dit.weights.assign import assign, pending, schemes
from s3dit.weights.checkpoint import Checkpoint, CheckpointError
from s3dit.weights.quantize import named, schemes_for

EMBEDDED = Path(__file__).resolve().parent / "weights" / "tiny"
# Features of this many prompts are kept; one of 100 tokens is 1 MB in fp32.
PROMPTS_KEPT = 256
# Latent cells (16,384 is 1024 × 1024 pixels) above which a picture is decoded by tiles, and a tile's side in cells.
WHOLE_CELLS, TILE = 1536 * 1536 // 64, 96


@dataclass(frozen=True, slots=True)
class Stage:
    """One turn of a part: what is read from disk and what is then held in memory, in bytes."""

    part: str
    reads: int
    holds: int
    work: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request will do, known before any weight is read; `fit` is its plan of memory where there is a budget."""

    request: Request
    stages: tuple[Stage, ...]
    sigmas: tuple[float, ...]
    calls: int
    notes: tuple[str, ...]
    fit: budget.Fit | None = None


class Pipeline:
    """A model, ready to draw; make one with `Pipeline.load`."""

    def __init__(
        self,
        sources: Sources,
        placement: Placement,
        residency: Mode,
        *,
        vram: int | None = None,
        compiled: bool = False,
        graphs: bool = False,
        quantize: str | None = None,
        quantize_text: str | None = None,
    ) -> None:
        self.sources, self.folder, self.config, self.placement = sources, sources.path, sources.config, placement
        self.vram, self.compiled, self.graphs = vram, compiled, graphs
        self.tokenizer = Tokenizer(sources.tokenizer)
        self.checkpoints = sources.checkpoints
        self._asked = {"transformer": quantize, "text_encoder": quantize_text}
        self.parts = Residency({part: self._maker(part) for part in self.checkpoints}, residency)
        if residency == "streamed":
            self.parts.kept = {"text_encoder": 0, "transformer": 0}
        self._tile: int | None = None
        self._weights: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self._features: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._tokens: dict[tuple[str, int], tuple[int, ...]] = {}
        # The number format that each part is in, "" for plain floats.
        self.formats = {part: named(schemes(self._blank(part)[0])) for part in self.checkpoints}
        for part in self.checkpoints:
            self._sizes(part)

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        transformer: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        tokenizer: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        residency: Mode | None = None,
        backend: str | None = None,
        vram: str | int | None = None,
        compile: bool = False,
        graphs: bool = False,
        quantize: str | None = None,
        quantize_text: str | None = None,
    ) -> Self:
        """Open a model: "embedded", a folder in the official layout, a file, or a hub name (Tongyi-MAI/Z-Image-Turbo).

        transformer, text_encoder, vae: files or folders of parts that take the place of the model's own, which may then
        lack them (see `sources`) · tokenizer: a folder, likewise · device: cpu, cuda, mps (default: the best there is)
        · dtype: "bf16" or "fp32" (default: bf16 where the device computes it natively) · residency: "staged" (default)
        loads the parts in turn, "resident" keeps them all, "streamed" also brings their blocks in one by one · vram: a
        budget such as "4GiB", from which each request's residency follows (see `budget`) · compile: compile the
        transformer's blocks, in the first pass · graphs: record the transformer's passes as CUDA graphs, one a size
        · quantize, quantize_text: number formats of transformer and text encoder: "fp8", "int8" (both sides of a
        product), "fp8-weights", "int8-weights", "int4" (weights only); float weights are encoded as they come in, a
        quantized model is run in its own format.
        Raises CheckpointError (files), BackendError (device, dtype, backend, compile, graphs), RequestError (the rest).
        """
        if residency not in (None, "staged", "resident", "streamed"):
            raise RequestError(f"residency is {residency!r}; needed staged, resident or streamed")
        if residency is not None and vram is not None:
            raise RequestError(f"both vram and residency {residency} are given; vram chooses the residency by itself")
        if graphs and (vram is not None or residency == "streamed"):
            raise RequestError("graphs need weights that stay where they are; use them without vram and streaming")
        size = None if vram is None else budget.parse_size(vram)
        placement = place(device, dtype)
        if graphs and placement.device.type != "cuda":
            raise BackendError(f"graphs need a CUDA device, found {placement.device}; load the model without graphs")
        if compile:
            check_compiler(placement.device)
        if backend is not None:
            set_backend(backend)
        given = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        sources = gather(model, given, tokenizer, EMBEDDED)
        return cls(
            sources, placement, residency or "staged", vram=size, compiled=compile, graphs=graphs,
            quantize=quantize, quantize_text=quantize_text,
        )  # fmt: skip

    def _blank(self, part: str) -> tuple[nn.Module, tuple[str, ...]]:
        """A part's module on the meta device, and the names that are never read."""
        module: nn.Module
        unused: tuple[str, ...]
        with torch.device("meta"):
            if part == "transformer":
                module, unused = Transformer(self.config.transformer), ("norm_final.weight",)
            elif part == "vae":
                module, unused = Autoencoder(self.config.vae), ()
            else:
                module = encoder = TextEncoder(self.config.text_encoder)
                unused = encoder.unused
            stored = keymap.official(self.checkpoints[part], module.state_dict())
            for name, kind in schemes_for(part, stored, self._asked.get(part)).items():
                if not any(fnmatchcase(f"{name}.weight", pattern) for pattern in unused):
                    swap(module, kind, name.__eq__)
        return module, unused

    def _maker(self, part: str) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            module, unused = self._blank(part)
            # The VAE is small and convolutions have no widening path: it is kept in the dtype it computes in.
            dtype = self.placement.compute if part == "vae" else self.placement.dtype
            device, kept = self.placement.device, self.parts.kept.get(part)
            if kept is None:
                assign(module, self.checkpoints[part], dtype=dtype, device=device, unused=unused)
            else:
                # Streamed blocks stay what they are in the file, and are cast on their way to the device.
                assign(module, self.checkpoints[part], dtype=None, unused=unused)
                stream(module, device, kept, dtype)
            if self.compiled and part == "transformer":
                compile_blocks(module)
            return module.eval()

        return make

    def _sizes(self, part: str) -> tuple[int, int, tuple[int, ...]]:
        """Bytes of a part: read, held outside of its blocks, held by each block.

        Raises CheckpointError when names or shapes are not this model's.
        """
        if part in self._weights:
            return self._weights[part]
        module, unused = self._blank(part)
        read = pending(module, self.checkpoints[part], unused)
        fixed, blocks = budget.sizes(module, self.placement.compute if part == "vae" else self.placement.dtype, unused)
        # The lists of the VAE are no repeated blocks: each is of another shape, and all are small.
        self._weights[part] = (read, fixed + sum(blocks), ()) if part == "vae" else (read, fixed, blocks)
        return self._weights[part]

    def _stage(self, part: str, work: str, kept: Mapping[str, int]) -> Stage:
        read, fixed, blocks = self._sizes(part)
        whole = fixed + sum(blocks)
        streamed = fixed + (kept[part] + 2) * max(blocks) if part in kept else whole
        return Stage(part, read, min(whole, streamed), work)

    def plan(self, request: Request | None = None, **fields: Any) -> Plan:
        """Say what a request will do; everything that is wrong with it is raised here, before any heavy work."""
        request = (Request(**fields) if request is None else request).resolve(self.config)
        if request.seed is None:
            request = replace(request, seed=secrets.randbits(32))
        levels = sigmas(request.num_inference_steps or 1, request.shift or 1.0, request.schedule, request.sigmas)
        calls = model_calls(request.solver, levels)
        new = {
            ids
            for text in self._texts(request)
            if (ids := self._ids(text, request.max_sequence_length)) not in self._features
        }
        branches = 2 if request.guidance_scale else 1
        works = {"transformer": f"{calls} model calls, {request.count * branches} items each"}
        if new:
            works = {"text_encoder": f"{sum(map(len, new))} tokens"} | works
        if request.output_type != "latent":
            works["vae"] = f"{request.count} pictures"
        fit = None if self.vram is None else self._fit(request, sum(map(len, new)), tuple(works))
        kept = self.parts.kept if fit is None else fit.kept
        stages = tuple(self._stage(part, work, kept) for part, work in works.items())
        return Plan(request, stages, tuple(levels.tolist()), calls, tuple(self._notes(request)), fit)

    def _fit(self, request: Request, new: int, parts: tuple[str, ...]) -> budget.Fit:
        """The plan of memory for a request that encodes `new` prompt tokens; BackendError where there is none."""
        config, compute, device = self.config, self.placement.compute, self.placement.device.type
        sides = list(zip(request.per_image("height"), request.per_image("width"), strict=True))
        grids, items = self._items(request)
        tokens = sum(padded(rows * columns) for rows, columns in grids) + sum(map(padded, items))
        # Where SwiGLU has a stand-in; plain, it is the widest place of a pass.
        lean = {"cpu": ("auto", "torch"), "cuda": ("auto", "triton")}.get(device, ())
        kind = {"lean": backend() in lean, "quantized": bool(self.formats["transformer"])}
        tiles = [tile for tile in budget.TILES if tile is None or 8 * tile < max(map(max, sides))]
        works: dict[str, list[tuple[int | None, int]]] = {
            "text_encoder": [(None, budget.encoder_work(config.text_encoder, new, compute))],
            "transformer": [(None, budget.transformer_work(config.transformer, tokens, compute, **kind))],
            "vae": [
                (tile, max(budget.decoder_work(config.vae, *side, tile, compute, device) for side in sides))
                for tile in tiles
            ],
        }
        needs = {part: budget.Need(*self._sizes(part)[1:], tuple(works[part])) for part in parts}
        return budget.fit(self.vram or 0, needs, budget.RESERVE[device])

    def _notes(self, request: Request) -> Iterator[str]:
        """What the user should know: the embedded model's world, sizes far from home."""
        config, settings = self.config, self.config.settings
        yield from self.sources.notes
        if self.sources.guessed and request.shift == config.scheduler.shift:
            yield SHIFT_NOTE
        if config.words:
            text = " ".join(self._texts(request)).lower()
            unknown = sorted({w for w in (w.strip(".,;:!?\"'()") for w in text.split()) if w} - config.words)
            sizes = set(request.per_image("height")) | set(request.per_image("width"))
            if unknown or sizes != {settings.height}:
                odd = f"unknown words: {', '.join(unknown[:8])}" if unknown else f"its size is {settings.height}"
                yield f"{config.note} ({odd})"
        elif any(not 512 <= side <= 2048 for n in ("height", "width") for side in request.per_image(n)):
            yield "the model was trained for sides of 512 to 2048 pixels; other sizes draw, but less well"

    @staticmethod
    def _texts(request: Request) -> list[str]:
        """Every text a request needs features of: prompts, and the negative ones when guidance is on."""
        negatives = [n or "" for n in request.per_image("negative_prompt")] if request.guidance_scale else []
        return [*request.prompts, *negatives]

    def _ids(self, text: str, max_length: int) -> tuple[int, ...]:
        """Token ids of one text; kept, so that a cut prompt is warned of once."""
        key = (text, max_length)
        if key not in self._tokens:
            self._tokens[key] = tuple(self.tokenizer.encode(text, max_length))
        return self._tokens[key]

    @torch.no_grad()
    def rehearse(self, request: Request) -> None:
        """Run one model call of a resolved request, text included, on torch's fake tensors: no memory, no arithmetic.

        `dispatch.asked` hears what would be computed.
        """
        device, compute, config = self.placement.device, self.placement.compute, self.config
        lengths = [len(self._ids(text, request.max_sequence_length)) for text in self._texts(request)]
        grids, items = self._items(request)
        layout = text_to_image(grids, items, device)
        encoder, transformer = (self._blank(part)[0] for part in ("text_encoder", "transformer"))
        assert isinstance(transformer, Transformer)
        with FakeTensorMode(allow_non_fake_inputs=True), device:
            for shelf, name, tensor in (*tensors(encoder), *tensors(transformer)):
                weight = isinstance(tensor, nn.Parameter)
                blank = torch.empty(tensor.shape, dtype=self.placement.dtype if weight else tensor.dtype)
                shelf[name] = nn.Parameter(blank, requires_grad=False) if weight else blank
            encoder(torch.empty(sum(lengths), config.text_encoder.hidden_size, dtype=compute), lengths)
            text = torch.empty(sum(items), config.transformer.cap_feat_dim, dtype=compute)
            x = torch.empty(sum(rows * columns for rows, columns in grids), config.transformer.patch_dim)
            transformer(x, torch.zeros(1), transformer.context(layout, text))

    def _items(self, request: Request) -> tuple[tuple[tuple[int, int], ...], list[int]]:
        """Of the items of a pass with guidance, if that is on: grids of patches, and lengths of texts in tokens."""
        heights, widths = request.per_image("height"), request.per_image("width")
        grids = tuple((h // 16, w // 16) for h, w in zip(heights, widths, strict=True))
        texts = [p for p in request.prompts for _ in range(request.num_images_per_prompt)]
        if request.guidance_scale:
            texts, grids = texts + [n or "" for n in request.per_image("negative_prompt")], grids * 2
        return grids, [len(self._ids(text, request.max_sequence_length)) for text in texts]

    @torch.inference_mode()
    def encode(self, texts: list[str], max_sequence_length: int = 512) -> list[Tensor]:
        """Features of prompts, (n, cap_feat_dim) each, from the kept ones or the text encoder."""
        ids = [self._ids(text, max_sequence_length) for text in texts]
        new = [one for one in dict.fromkeys(ids) if one not in self._features]
        if new:
            encoder = self.parts["text_encoder"]
            flat = torch.tensor([token for one in new for token in one])
            stored = self.checkpoints["text_encoder"]
            rows = keymap.official(stored, encoder.state_dict()).rows(EMBEDDING, flat)
            # parity: the embedding is rounded to the dtype that the weights are kept in.
            x = rows.to(self.placement.dtype).to(self.placement.device, self.placement.compute)
            features = encoder(x, [len(one) for one in new])
            again = partial(encoder, x, [len(one) for one in new])
            _finite(features, "text features", encoder, self.checkpoints["text_encoder"], again)
            for one, feature in zip(new, features.split([len(one) for one in new]), strict=True):
                self._features[one] = feature
        found = [self._features[one] for one in ids]
        while len(self._features) > PROMPTS_KEPT:
            self._features.popitem(last=False)
        return found

    def stream(self, request: Request | None = None, **fields: Any) -> Iterator[Step]:
        """Sample a request and yield a Step after every step of the solver."""
        yield from self._sample(self.plan(request, **fields))

    @torch.inference_mode()
    def _sample(self, plan: Plan) -> Iterator[Step]:
        request, device = plan.request, self.placement.device
        if plan.fit is not None:
            self.parts.settle(plan.fit.mode, plan.fit.kept, [stage.part for stage in plan.stages])
            self._tile = plan.fit.tile
        grids = tuple(
            (h // 16, w // 16) for h, w in zip(request.per_image("height"), request.per_image("width"), strict=True)
        )
        prompts = [p for p in request.prompts for _ in range(request.num_images_per_prompt)]
        length = request.max_sequence_length
        positive = self.encode(prompts, length)
        negatives = [n or "" for n in request.per_image("negative_prompt")]
        negative = self.encode(negatives, length) if request.guidance_scale else []
        transformer = self.parts["transformer"]
        assert isinstance(transformer, Transformer)

        @cache
        def context(guided: bool) -> Context:
            text = positive + negative if guided else positive
            layout = text_to_image(grids * (2 if guided else 1), [len(t) for t in text], device)
            return transformer.context(layout, torch.cat(text))

        generators = self._generators(request)
        x = self._noise(request, grids, generators).to(device)
        guidance = Guidance(
            request.guidance_scale or 0.0, float(request.cfg_normalization), float(request.cfg_truncation)
        )
        run: Callable[..., Tensor] = transformer
        if self.graphs:
            # It lives as long as the weights that it has recorded.
            if "replay" not in vars(transformer):
                vars(transformer)["replay"] = Replay(transformer)
            run = vars(transformer)["replay"]
        velocity = guide(run, context, guidance, [rows * columns for rows, columns in grids])
        levels = torch.tensor(plan.sigmas)

        def fresh() -> Tensor:
            return _draw(grids, generators).to(device)

        for step in solve(request.solver, velocity, x, levels, fresh):
            again = partial(velocity, step.start, torch.tensor(step.sigma))
            _finite(step.velocity, f"velocity of step {step.i}", transformer, self.checkpoints["transformer"], again)
            yield replace(step, grids=grids)

    @staticmethod
    def _generators(request: Request) -> list[torch.Generator]:
        """One source of random numbers a picture; a single generator given by the caller serves all in order."""
        given = request.generator
        if given is None:
            return [torch.Generator().manual_seed(seed) for seed in request.seeds()]
        several = [given] * request.count if isinstance(given, torch.Generator) else list(given)
        if len(several) != request.count:
            raise RequestError(f"{len(several)} generators for {request.count} pictures; needed one, or one a picture")
        return several

    @staticmethod
    def _noise(request: Request, grids: tuple[tuple[int, int], ...], generators: list[torch.Generator]) -> Tensor:
        if request.latents is not None:
            return torch.cat([patchify(one.float().contiguous()) for one in request.latents])
        return _draw(grids, generators)

    @torch.inference_mode()
    def decode(self, latents: list[Tensor], tile: int | None = None) -> list[Tensor]:
        """Pictures (3, H, W) fp32 in about [-1, 1] of latents (16, H/8, W/8); large ones by tiles."""
        vae = self.parts["vae"]
        assert isinstance(vae, Autoencoder)
        pictures = []
        for one in latents:
            large = one.shape[-1] * one.shape[-2] > WHOLE_CELLS
            run = partial(
                vae.decode, one[None].to(self.placement.device), tile or self._tile or (TILE if large else None)
            )
            picture = run()[0]
            _finite(picture, "decoded picture", vae, self.checkpoints["vae"], run)
            pictures.append(picture.float().cpu())
        return pictures

    def __call__(
        self, request: Request | None = None, *, on_step: Callable[[Step], None] | None = None, **fields: Any
    ) -> Result:
        """Draw a request; `on_step` sees every Step (for bars and previews; for anything else use `stream`)."""
        plan = self.plan(request, **fields)
        request = plan.request
        try:
            step = None
            for step in self._sample(plan):
                if on_step is not None:
                    on_step(step)
            assert step is not None
            latents = [one.cpu() for one in step.latents]
            pictures: list[Any] = []
            if request.output_type != "latent":
                pictures = self.decode(latents)
        except torch.OutOfMemoryError as error:
            raise BackendError(_memory(plan, str(error))) from None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise BackendError(_memory(plan, str(error))) from None
        if request.output_type == "pil":
            pictures = [images.to_pil(picture[None])[0] for picture in pictures]
        return Result(pictures, latents, self._metadata(plan))

    def _metadata(self, plan: Plan) -> list[dict[str, Any]]:
        """For each picture, a request that draws it alone, and what drew it."""
        request = plan.request
        engine = {
            "s3dit": __version__,
            "torch": torch.__version__,
            "variant": self.config.variant,
            "placement": str(self.placement),
            "mixed": {part: self.checkpoints[part].path.name for part in self.sources.mixed},
            "quantized": {part: name for part, name in self.formats.items() if name},
            "levels": list(plan.sigmas),
            "model_calls": plan.calls,
            # With these the request alone does not say where the noise came from.
            "replayable": request.generator is None and request.latents is None,
        }
        shared = replace(request, num_images_per_prompt=1, generator=None, latents=None)
        prompts = [p for p in request.prompts for _ in range(request.num_images_per_prompt)]
        spread = [request.per_image(name) for name in ("negative_prompt", "height", "width")]
        rows = zip(prompts, *spread, request.seeds(), strict=True)
        model = "embedded" if self.folder == EMBEDDED else self.folder.name
        return [
            replace(shared, prompt=p, negative_prompt=n, height=h, width=w, seed=s).to_json()
            | {"model": model, "engine": engine}
            for p, n, h, w, s in rows
        ]


def _draw(grids: tuple[tuple[int, int], ...], generators: list[torch.Generator]) -> Tensor:
    """Noise for every picture from its own generator, drawn as latents so that it is diffusers' noise: (tokens, 64)."""
    return torch.cat(
        [
            patchify(torch.randn(16, 2 * rows, 2 * columns, generator=g, device=g.device).cpu())
            for (rows, columns), g in zip(grids, generators, strict=True)
        ]
    )


def _finite(x: Tensor, what: str, model: nn.Module, checkpoint: Checkpoint, again: Callable[[], object]) -> None:
    """Stop at the first NaN or infinity; name the module where it arose (by running `again`) or the weight at fault."""
    if x.isfinite().all():
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # Codes of 8 bits and less are finite; their scales may not be.
        if not tensor.is_meta and tensor.itemsize > 1 and not tensor.isfinite().all():
            raise CheckpointError(
                f"{what} is not finite because {name} in {checkpoint.path} holds NaN or infinity; "
                "needed finite weights; download the file again"
            )
    with first_nonfinite(model) as found:
        again()
    raise BackendError(
        f"{what} is not finite although every weight of {type(model).__name__} is; first seen in {found}; "
        "use dtype fp32, and less guidance if it is high"
    )


def _memory(plan: Plan, error: str) -> str:
    held = max(stage.holds for stage in plan.stages)
    return (
        f"out of memory ({error.splitlines()[0][:120]}); the largest part holds {held / 1e9:.1f} GB besides "
        "activations; draw fewer or smaller pictures at once, give a budget (vram), or use dtype bf16"
    )

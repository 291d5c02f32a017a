"""The story in one file: load, plan, encode, sample, decode.

    pipe = Pipeline.load("Tongyi-MAI/Z-Image-Turbo")
    pipe.lora.attach("style.safetensors", scale=0.8)
    pipe(prompt="a red fox in the snow", seed=7).images[0].save("fox.png")

Headers are read and checked at `load`; weights come into memory when a stage needs them (`offload.Residency`). Prompt
features are kept, so that more pictures of a prompt never load the text encoder again. `stream` yields Steps: progress
bars, previews and early stops are a `for` loop around it.

What it does not do: schedules and solvers (`sampler`), guidance (`guidance`), noise and start images (`conditioning`),
where tokens stand (`layout`), the list of adapters (`adapters`).
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from s3dit import __version__, branches, budget, conditioning, images, references
from s3dit.adapters import Adapters
from s3dit.control import Control
from s3dit.controlnet import ControlNet, ControlNetConfig, open_controlnet
from s3dit.devices import Placement, place
from s3dit.graphs import Replay, check_compiler, compile_blocks
from s3dit.guidance import Guidance, guide
from s3dit.kernels.dispatch import BackendError, backend, set_backend
from s3dit.layout import Layout, edit, text_to_image
from s3dit.linear import swap
from s3dit.offload import Mode, Residency, stream, tensors
from s3dit.request import IMAGES, Request, RequestError, Result
from s3dit.sampler import Step, model_calls, solve
from s3dit.sources import SHIFT_NOTE, Sources, gather
from s3dit.text_encoder import EMBEDDING, TextEncoder
from s3dit.tokenizer import Tokenizer
from s3dit.trace import first_nonfinite
from s3dit.transformer import Context, Transformer
from s3dit.vae import Autoencoder
from s3dit.vision_encoder import VisionEncoder
from s3dit.weights import keymap
from s3dit.weights.assign import assign, pending, schemes
from s3dit.weights.checkpoint import Checkpoint, CheckpointError
from s3dit.weights.hub import resolve_file
from s3dit.weights.quantize import named, schemes_for

EMBEDDED = Path(__file__).resolve().parent / "weights" / "tiny"
# Features of this many prompts are kept; one of 100 tokens is 1 MB in fp32.
PROMPTS_KEPT = 256
# What the model reads of so many reference pictures is kept, 2 to 3 MB each in fp32.
LOOKS_KEPT = 64
# Latent cells (16,384 is 1024 × 1024 pixels) above which a picture is decoded by tiles, and a tile's side in cells.
WHOLE_CELLS, TILE = 1536 * 1536 // 64, 96


# Token ids of an item's texts: one, or the segments around its references.
Caption = tuple[tuple[int, ...], ...]
# References of every picture.
Seen = tuple[tuple[references.Reference, ...], ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """One turn of a part: what is read from disk and what is then held in memory, in bytes.

    beside: held in the same turn by other parts (ControlNets beside the transformer).
    """

    part: str
    reads: int
    holds: int
    work: str
    beside: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request will do, known before any weight is read.

    calls: of the model, in all · fit: the plan of memory where there is a budget · canvases: its start images, read ·
    controls: what steers it, read · references: of each picture, read · then: the second pass if there is one, whose
    canvases the first one draws.
    """

    request: Request
    stages: tuple[Stage, ...]
    sigmas: tuple[float, ...]
    calls: int
    notes: tuple[str, ...]
    fit: budget.Fit | None = None
    canvases: tuple[conditioning.Canvas, ...] = ()
    controls: tuple[branches.Prepared, ...] = ()
    then: "Plan | None" = None
    references: Seen = ()


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
        self.checkpoints = dict(sources.checkpoints)
        self._asked = {"transformer": quantize, "text_encoder": quantize_text}
        self.parts = Residency({part: self._maker(part) for part in self.checkpoints}, residency)
        self.lora = Adapters(
            self.parts, lambda part: self._blank(part)[0], placement.device, placement.compute, self._adapted
        )
        if residency == "streamed":
            self.parts.kept = {"text_encoder": 0, "transformer": 0}
        # Called with the part's name and the bytes of each tensor that is read, as parts come in.
        self.on_read: Callable[[str, int], None] | None = None
        self.controlnets: dict[str, ControlNetConfig] = {}
        self._tile: int | None = None
        self._weights: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self._features: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._looks: OrderedDict[Any, references.Look] = OrderedDict()
        self._tokens: dict[tuple[str, int, int], Caption] = {}
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
            elif part in self.controlnets:
                module = ControlNet(self.controlnets[part], self.config.transformer)
                unused = self.controlnets[part].unused(self.checkpoints[part])
            elif part == "siglip":
                assert self.config.vision is not None
                module, unused = VisionEncoder(self.config.vision), VisionEncoder.unused
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
                seen = None if self.on_read is None else partial(self.on_read, part)
                assign(module, self.checkpoints[part], dtype=dtype, device=device, unused=unused, progress=seen)
            else:
                # Streamed blocks stay what they are in the file, and are cast on their way to the device.
                assign(module, self.checkpoints[part], dtype=None, unused=unused)
                stream(module, device, kept, dtype)
            self.lora.give(part, module)
            if self.compiled and part not in ("text_encoder", "vae"):
                compile_blocks(module)
            return module.eval()

        return make

    def _adapted(self, part: str) -> None:
        """Forget what was computed before a part's adapters changed."""
        if part == "text_encoder":
            self._features.clear()

    def _sizes(self, part: str) -> tuple[int, int, tuple[int, ...]]:
        """Bytes of a part: read, held outside of its blocks, held by each block.

        Raises CheckpointError when names or shapes are not this model's.
        """
        if part in self._weights:
            read, fixed, blocks = self._weights[part]
            return read, fixed + self.lora.nbytes(part), blocks
        module, unused = self._blank(part)
        read = pending(module, self.checkpoints[part], unused)
        fixed, blocks = budget.sizes(module, self.placement.compute if part == "vae" else self.placement.dtype, unused)
        # The lists of the VAE are no repeated blocks: each is of another shape, and all are small.
        self._weights[part] = (read, fixed + sum(blocks), ()) if part == "vae" else (read, fixed, blocks)
        return self._weights[part]

    def _controlnet(self, control: Control) -> tuple[str, ControlNetConfig]:
        """The part that a control wants, and what it is; opened and held to this model when first asked for."""
        if self.graphs:
            raise RequestError("graphs record passes without control; load the model without graphs, or leave it out")
        path = resolve_file(str(control.model))
        part = f"controlnet {path}" + (f" as {control.version}" if control.version else "")
        if part not in self.controlnets:
            checkpoint, config = open_controlnet(path, self.config.transformer, control.version)
            self.checkpoints[part], self.controlnets[part] = checkpoint, config
            self.parts.add(part, self._maker(part))
            if self.parts.mode == "streamed":
                self.parts.kept = {**self.parts.kept, part: 0}
        return part, self.controlnets[part]

    def _stage(self, part: str, work: str, kept: Mapping[str, int]) -> Stage:
        read, fixed, blocks = self._sizes(part)
        whole = fixed + sum(blocks)
        streamed = fixed + (kept[part] + 2) * max(blocks) if part in kept else whole
        return Stage(part, read, min(whole, streamed), work)

    def plan(self, request: Request | None = None, **fields: Any) -> Plan:
        """Say what a request will do; everything that is wrong with it is raised here, before any heavy work."""
        request, canvases, said = conditioning.prepare(Request(**fields) if request is None else request)
        request, seen, more = references.prepare(request, self.config, self.folder)
        request, controls, rest = branches.prepare(request.resolve(self.config), self._controlnet)
        if request.seed is None:
            request = replace(request, seed=secrets.randbits(32))
        texts = dict.fromkeys(ids for caption in self._captions(request) for ids in caption)
        new = [ids for ids in texts if ids not in self._features]
        strange = {one.key: one for row in seen for one in row if one.key not in self._looks}.values()
        works = [("text_encoder", f"{sum(map(len, new))} tokens")] if new else []
        read = [f"{len(strange)} references"] if strange else []
        works += [("siglip", read[0])] if strange else []
        found = [(one, conditioning.levels(one)) for one in conditioning.passes(request, said)]
        calls = [model_calls(request.solver, few) for _, few in found]
        read += [f"{request.count} start images"] * bool(canvases) + ["control images"] * bool(controls)
        works += [("vae", " and ".join(read))] if read else []
        for turn, count in enumerate(calls, 1):
            works.append(("transformer", f"{count} model calls, {len(self._captions(request))} items each"))
            works += [(part, "beside the transformer") for part in dict.fromkeys(one.part for one in controls)]
            if turn < len(calls):
                works.append(("vae", f"{request.count} pictures, enlarged, and start images again"))
        if request.output_type != "latent":
            works.append(("vae", f"{request.count} pictures"))
        largest, parts = found[-1][0], tuple(dict.fromkeys(part for part, _ in works))
        fit = None if self.vram is None else self._fit(largest, seen, sum(map(len, new)), parts, len(controls))
        kept = self.parts.kept if fit is None else fit.kept
        stages = tuple(self._stage(part, work, kept) for part, work in works)
        held = sum({stage.part: stage.holds for stage in stages if stage.part in self.controlnets}.values())
        stages = tuple(replace(stage, beside=held if stage.part == "transformer" else 0) for stage in stages)
        notes = tuple(dict.fromkeys([*said, *more, *rest, *self._notes(request), *self._notes(largest)]))
        first, *later = (
            Plan(one, stages, tuple(few.tolist()), sum(calls), notes, fit, (), controls, references=seen)
            for one, few in found
        )
        return replace(first, canvases=canvases, then=later[0] if later else None)

    def _fit(self, request: Request, seen: Seen, new: int, parts: tuple[str, ...], controls: int) -> budget.Fit:
        """The plan of memory for a request that encodes `new` prompt tokens; BackendError where there is none."""
        config, compute, device = self.config, self.placement.compute, self.placement.device.type
        pictures = [one for row in seen for one in row]
        # Encoding a reference takes less than decoding a picture of its size.
        sides = [(one.pixels.shape[1], one.pixels.shape[2]) for one in pictures]
        sides += zip(request.per_image("height"), request.per_image("width"), strict=True)
        tokens = sum(self._layout(request, seen, bool(request.guidance_scale), "cpu").whole.spans.lengths)
        # Where SwiGLU has a stand-in; plain, it is the widest place of a pass.
        lean = {"cpu": ("auto", "torch"), "cuda": ("auto", "triton")}.get(device, ())
        kind = {"lean": backend() in lean, "quantized": bool(self.formats["transformer"])}
        passing = budget.transformer_work(config.transformer, tokens, compute, **kind)
        passing += budget.control_work(config.transformer, tokens, compute, controls)
        tiles = [tile for tile in budget.TILES if tile is None or 8 * tile < max(map(max, sides))]
        works: dict[str, list[tuple[int | None, int]]] = {
            "text_encoder": [(None, budget.encoder_work(config.text_encoder, new, compute))],
            "transformer": [(None, passing)],
            "vae": [
                (tile, max(budget.decoder_work(config.vae, *side, tile, compute, device) for side in sides))
                for tile in tiles
            ],
        }
        if config.vision is not None:
            patches = sum(len(one.patches) for one in pictures)
            works["siglip"] = [(None, budget.vision_work(config.vision, patches, compute))]
        needs = {part: budget.Need(*self._sizes(part)[1:], tuple(works.get(part, [(None, 0)]))) for part in parts}
        guests = {part: needs.pop(part) for part in parts if part in self.controlnets}
        return budget.fit_beside(self.vram or 0, needs, "transformer", guests, budget.RESERVE[device])

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
        """The text of every item of a pass: prompts, and after them the negative ones when guidance is on."""
        negatives = [n or "" for n in request.per_image("negative_prompt")] if request.guidance_scale else []
        return [*(p for p in request.prompts for _ in range(request.num_images_per_prompt)), *negatives]

    def _captions(self, request: Request) -> list[Caption]:
        """Token ids of those texts, cut into segments where there are references."""
        texts = self._texts(request)
        counts = [len(row) for row in request.references()] * (len(texts) // request.count)
        return [self._caption(*item, request.max_sequence_length) for item in zip(texts, counts, strict=True)]

    def _caption(self, text: str, pictures: int, max_length: int) -> Caption:
        """Token ids of one text; kept, so that a cut prompt is warned of once."""
        key = (text, pictures, max_length)
        if key not in self._tokens:
            self._tokens[key] = tuple(map(tuple, self.tokenizer.segments(text, pictures, max_length)))
        return self._tokens[key]

    def _layout(self, request: Request, seen: Seen, guided: bool, device: torch.device | str) -> Layout:
        """Where the tokens of a pass stand: with guidance the pictures twice, with their prompts and negative ones."""
        times = 2 if guided else 1
        grids = _grids(request) * times
        lengths = [tuple(map(len, caption)) for caption in self._captions(request)[: len(grids)]]
        if self.config.transformer.siglip_feat_dim is None:
            return text_to_image(grids, [length for (length,) in lengths], device)
        shapes = [[one.shape for one in row] for row in seen] * times
        return edit(grids, lengths, shapes, device, slide=request.reference_positions == "released")

    @torch.no_grad()
    def rehearse(self, request: Request) -> None:
        """Run one model call of a resolved request, text included, on torch's fake tensors: no memory, no arithmetic.

        `dispatch.asked` hears what would be computed.
        """
        device, compute, config = self.placement.device, self.placement.compute, self.config
        lengths = list(map(len, dict.fromkeys(ids for caption in self._captions(request) for ids in caption)))
        seen = references.prepare(request, config, self.folder)[1]
        layout = self._layout(request, seen, bool(request.guidance_scale), device)
        encoder, transformer = (self._blank(part)[0] for part in ("text_encoder", "transformer"))
        assert isinstance(transformer, Transformer)
        with FakeTensorMode(allow_non_fake_inputs=True), device:
            for shelf, name, tensor in (*tensors(encoder), *tensors(transformer)):
                weight = isinstance(tensor, nn.Parameter)
                blank = torch.empty(tensor.shape, dtype=self.placement.dtype if weight else tensor.dtype)
                shelf[name] = nn.Parameter(blank, requires_grad=False) if weight else blank
            encoder(torch.empty(sum(lengths), config.text_encoder.hidden_size, dtype=compute), lengths)
            text = torch.empty(len(layout.text.real), config.transformer.cap_feat_dim, dtype=compute)
            x = torch.empty(len(layout.image.real), config.transformer.patch_dim)
            looks: list[Tensor] = []
            if layout.vision is not None and layout.clean is not None:
                looks = [x.new_empty(len(layout.clean), x.shape[1])]
                looks += [text.new_empty(len(layout.vision.real), config.transformer.siglip_feat_dim or 0)]
            transformer(x, torch.zeros(1), transformer.context(layout, text, *looks))

    @torch.inference_mode()
    def encode(self, texts: list[str], max_sequence_length: int = 512) -> list[Tensor]:
        """Features of prompts, (n, cap_feat_dim) each, from the kept ones or the text encoder."""
        return self._encode([self._caption(text, 0, max_sequence_length)[0] for text in texts])

    def _encode(self, ids: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """`encode` of token ids."""
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
        for _, step in self._passes(self.plan(request, **fields)):
            yield step

    def _passes(self, plan: Plan) -> Iterator[tuple[Plan, Step]]:
        """Every step of a plan and of what follows it, counted through, with the plan that it belongs to."""
        step = None
        for step in self._sample(plan):
            yield plan, step if plan.then is None else replace(step, n=step.n + len(plan.then.sigmas) - 1)
        if plan.then is None:
            return
        assert step is not None
        pictures = self._pictures(plan, step.latents)
        then = replace(plan.then, canvases=conditioning.enlarged(plan.canvases, pictures, plan.then.request))
        for later in self._sample(then):
            yield then, replace(later, i=step.i + later.i, n=step.n + later.n, calls=step.calls + later.calls)

    @torch.inference_mode()
    def _sample(self, plan: Plan) -> Iterator[Step]:
        request, device = plan.request, self.placement.device
        if plan.fit is not None:
            self.parts.settle(plan.fit.mode, plan.fit.kept, [stage.part for stage in plan.stages])
            self._tile = plan.fit.tile
        grids = _grids(request)
        captions = self._captions(request)
        positive, negative = (
            self._encode([ids for caption in few for ids in caption])
            for few in (captions[: request.count], captions[request.count :])
        )
        looks = self.look([one for row in plan.references for one in row])
        sources = conditioning.generators(request)
        sampled = sources if request.posterior == "sample" else None
        start = self.encode_images([canvas.pixels for canvas in plan.canvases], sampled)
        shown = [branches.patches(one, request, lambda one: self.encode_images([one])[0]) for one in plan.controls]
        transformer = self.parts["transformer"]
        assert isinstance(transformer, Transformer)
        with self.parts.beside():
            nets = {one.part: self.parts[one.part] for one in plan.controls}

        @cache
        def context(guided: bool) -> Context:
            layout = self._layout(request, plan.references, guided, device)
            text = positive + negative if guided else positive
            return transformer.context(layout, torch.cat(text), *references.joined(looks * (2 if guided else 1)))

        steps = torch.tensor(plan.sigmas)
        x, keep = conditioning.starting_noise(request, grids, sources).to(device), None
        if start:
            x, keep = conditioning.begin(plan.canvases, start, x, steps, request.mask_mode == "differential")
        guidance = Guidance(
            request.guidance_scale or 0.0, float(request.cfg_normalization), float(request.cfg_truncation)
        )
        run: Callable[..., Tensor] = transformer
        if self.graphs:
            # It lives as long as the weights that it has recorded.
            if "replay" not in vars(transformer):
                vars(transformer)["replay"] = Replay(transformer)
            run = vars(transformer)["replay"]
        control = branches.acting(plan.controls, [nets[one.part] for one in plan.controls], shown, steps)
        velocity = guide(run, context, guidance, [rows * columns for rows, columns in grids], control)
        beside = [(net, self.checkpoints[part]) for part, net in nets.items()]

        def fresh() -> Tensor:
            return conditioning.draw(grids, sources).to(device)

        for step in solve(request.solver, velocity, x, steps, fresh, keep):
            again = partial(velocity, step.start, torch.tensor(step.sigma))
            _finite(
                step.velocity,
                f"velocity of step {step.i}",
                transformer,
                self.checkpoints["transformer"],
                again,
                *beside,
            )
            yield replace(step, grids=grids)

    @torch.inference_mode()
    def look(self, pictures: Sequence[references.Reference]) -> list[references.Look]:
        """What the transformer reads of reference pictures, from what is kept or the tower and the autoencoder."""
        new = list({one.key: one for one in pictures if one.key not in self._looks}.values())
        if new:
            tower = self.parts["siglip"]
            patches = torch.cat([one.patches for one in new]).to(self.placement.device, self.placement.compute)
            run = partial(tower, patches, [one.seen for one in new])
            features = run()
            _finite(features, "vision features", tower, self.checkpoints["siglip"], run)
            latents = self.encode_images([one.pixels for one in new])
            parts = features.split([len(one.patches) for one in new])
            self._looks |= {one.key: references.Look.of(*of) for one, *of in zip(new, latents, parts, strict=True)}
        found = [self._looks[one.key] for one in pictures]
        while len(self._looks) > LOOKS_KEPT:
            self._looks.popitem(last=False)
        return found

    @torch.inference_mode()
    def encode_images(
        self, pixels: Sequence[Tensor], generators: Sequence[torch.Generator] | None = None
    ) -> list[Tensor]:
        """Latents (16, H/8, W/8) fp32 of pictures (3, H, W) in [-1, 1]; large ones by tiles.

        The mode of what the autoencoder answers, or with generators, one a picture, a sample.
        """
        found: dict[int, Tensor] = {}
        latents = []
        for i, one in enumerate(pixels):
            # The same tensor twice is encoded once.
            if generators is not None or id(one) not in found:
                vae = self.parts["vae"]
                assert isinstance(vae, Autoencoder)
                tile = self._tile or (TILE if one.shape[-1] * one.shape[-2] > 64 * WHOLE_CELLS else None)
                generator = None if generators is None else generators[i]
                run = partial(vae.encode, one[None].to(self.placement.device), generator, tile)
                found[id(one)] = run()[0]
                _finite(found[id(one)], "encoded picture", vae, self.checkpoints["vae"], run)
            latents.append(found[id(one)])
        return latents

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
            for done in self._passes(plan):
                if on_step is not None:
                    on_step(done[1])
            last, step = done
            latents = [one.cpu() for one in step.latents]
            pictures: list[Any] = []
            if request.output_type != "latent":
                pictures = self._pictures(last, latents)
        except torch.OutOfMemoryError as error:
            raise BackendError(_memory(plan, str(error))) from None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise BackendError(_memory(plan, str(error))) from None
        if request.output_type == "pil":
            pictures = [images.to_pil(picture[None])[0] for picture in pictures]
        return Result(pictures, latents, self._metadata(plan))

    def _pictures(self, plan: Plan, latents: list[Tensor]) -> list[Tensor]:
        """Decode, and lay what was to be kept of start images over it."""
        pictures = self.decode(latents)
        if not plan.canvases or not plan.request.composite:
            return pictures
        differential = plan.request.mask_mode == "differential"
        return [canvas.over(one, differential) for canvas, one in zip(plan.canvases, pictures, strict=True)]

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
        }
        shared = replace(request, num_images_per_prompt=1, generator=None, latents=None)
        prompts = [p for p in request.prompts for _ in range(request.num_images_per_prompt)]
        names = ("negative_prompt", "height", "width", *IMAGES, "reference_area")
        rows = zip(prompts, request.seeds(), *(request.per_image(name) for name in names), strict=True)
        model = "embedded" if self.folder == EMBEDDED else self.folder.name
        adapters = {"adapters": self.lora.records()} if self.lora.names else {}
        found = []
        for i, (prompt, seed, *values) in enumerate(rows):
            own = dict(zip(names, values, strict=True)) | {"reference": request.references()[i] or None}
            if own["reference"] is None:
                own["reference_positions"] = "released"
            controls = request.controls_of(i)
            data = replace(shared, prompt=prompt, seed=seed, control=controls or None, **own).to_json()
            # Without these the request alone does not say where noise and images came from.
            whole = request.generator is None and request.latents is None
            whole = whole and all(name in data for name, value in own.items() if value is not None)
            whole = whole and all(one.named for one in controls)
            hashes: dict[str, Any] = dict(plan.canvases[i].hashes) if plan.canvases else {}
            hashes |= branches.hashes(plan.controls, i)
            if plan.references[i]:
                hashes["reference"] = [one.sha256 for one in plan.references[i]]
            inputs = {"inputs": hashes} if hashes else {}
            found.append(data | {"model": model, "engine": engine | {"replayable": whole} | inputs} | adapters)
        return found


def _grids(request: Request) -> tuple[tuple[int, int], ...]:
    """Rows and columns of patches of every picture."""
    sides = zip(request.per_image("height"), request.per_image("width"), strict=True)
    return tuple((height // 16, width // 16) for height, width in sides)


def _finite(
    x: Tensor,
    what: str,
    model: nn.Module,
    checkpoint: Checkpoint,
    again: Callable[[], object],
    *beside: tuple[nn.Module, Checkpoint],
) -> None:
    """Stop at the first NaN or infinity; name the module where it arose (by running `again`) or the weight at fault.

    beside: models that take part in what `model` computes.
    """
    if x.isfinite().all():
        return
    for suspect, stored in (*beside, (model, checkpoint)):
        for name, tensor in (*suspect.named_parameters(), *suspect.named_buffers()):
            # Codes of 8 bits and less are finite; their scales may not be.
            if not tensor.is_meta and tensor.itemsize > 1 and not tensor.isfinite().all():
                raise CheckpointError(
                    f"{what} is not finite because {name} in {stored.path} holds NaN or infinity; "
                    "needed finite weights; download the file again"
                )
    with first_nonfinite(model) as found:
        again()
    raise BackendError(
        f"{what} is not finite although every weight of {type(model).__name__} is; first seen in {found}; "
        "use dtype fp32, and less guidance if it is high"
    )


def _memory(plan: Plan, error: str) -> str:
    held = max(stage.holds + stage.beside for stage in plan.stages)
    return (
        f"out of memory ({error.splitlines()[0][:120]}); the largest part holds {held / 1e9:.1f} GB besides "
        "activations; draw fewer or smaller pictures at once, give a budget (vram), or use dtype bf16"
    )

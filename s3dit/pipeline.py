"""The story in one file: load, plan, encode, sample, decode.

    pipe = Pipeline.load("Tongyi-MAI/Z-Image-Turbo")
    pipe.lora.attach("style.safetensors", scale=0.8)
    pipe(prompt="a red fox in the snow", seed=7).images[0].save("fox.png")

Headers are read and checked at `load`; weights come into memory when a stage needs them (`residency`). Prompt features
are kept, so that more pictures of a prompt never load the text encoder again. `stream` yields Steps: progress bars,
previews and early stops are a `for` loop around it.

A pipeline may be called from several threads, which wait for one another: for a whole call, and of a `stream` for each
step. So between two steps the pipeline is free for anybody, the stream's own thread included, and the next step brings
back what it needs. What a thread has switched on in torch (autocast, gradients, a default device) changes nothing.

What it does not do: schedules and solvers (`sampler`), guidance (`guidance`), noise and start images (`conditioning`),
where tokens stand (`layout`), the list of adapters (`adapters`).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from s3dit import __version__
from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.inputs import control_hints, images, references, start_image
from s3dit.kernels.dispatch import backend, check_backend, overridden, use_backend
from s3dit.model.text_encoder import EMBEDDING
from s3dit.model.tokenizer import Tokenizer
from s3dit.model.transformer import Context, Transformer
from s3dit.model.vae import Autoencoder
from s3dit.plan import Plan, make_plan, out_of_memory, records
from s3dit.request import Request, Result
from s3dit.runtime import budget
from s3dit.runtime.adapters import Adapters
from s3dit.runtime.block_streaming import Mode, tensors
from s3dit.runtime.components import Components
from s3dit.runtime.devices import Placement, own_settings, place
from s3dit.runtime.finite import check_finite
from s3dit.runtime.graphs import check_compiler
from s3dit.runtime.sources import Sources, open_sources
from s3dit.sampling.guidance import Guidance, guide
from s3dit.sampling.solvers import Step, solve
from s3dit.weights import keymap

EMBEDDED = Path(__file__).resolve().parent / "weights" / "tiny"
# Features of this many prompts are kept; one of 100 tokens is 1 MB in fp32.
PROMPTS_KEPT = 256
# What the model reads of so many reference pictures is kept, 2 to 3 MB each in fp32.
REFERENCES_KEPT = 64
# Latent cells (16,384 is 1024 × 1024 pixels) above which a picture is decoded by tiles, and a tile's side in cells.
WHOLE_CELLS, TILE = 1536 * 1536 // 64, 96


class Kept(OrderedDict[Any, Any]):
    """What some parts computed, by what they were given; the `most` entries that came last, after `trim`.

    state: of the parts when that was.
    """

    def __init__(self, most: int, *parts: str) -> None:
        super().__init__()
        self.most, self.parts = most, parts
        self.state: tuple[object, ...] = ()

    def trim(self) -> None:
        """Drop what is too much."""
        while len(self) > self.most:
            self.popitem(last=False)


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
        backend: str | None = None,
        disable_mmap: bool = False,
    ) -> None:
        self.sources, self.folder, self.config = sources, sources.path, sources.config
        self.vram, self.graphs, self.backend = vram, graphs, backend
        self.tokenizer = Tokenizer(sources.tokenizer)
        asked = {"transformer": quantize, "text_encoder": quantize_text}
        self.parts = Components(sources, placement, residency, asked, compiled, disable_mmap)
        self.lora = Adapters(self.parts)
        self._features = Kept(PROMPTS_KEPT, "text_encoder")
        self._reference_features = Kept(REFERENCES_KEPT, "siglip", "vae")
        self._computing = False

    @property
    def placement(self) -> Placement:
        """Where, and in which dtypes, the parts are kept and computed."""
        return self.parts.placement

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
        disable_mmap: bool = False,
    ) -> Self:
        """Open a model: "embedded", a folder in the official layout, a file, or a hub name (Tongyi-MAI/Z-Image-Turbo).

        transformer, text_encoder, vae: files or folders of parts that take the place of the model's own, which may then
        lack them (see `sources`) · tokenizer: a folder, likewise · device: cpu, cuda, mps (default: the best there is)
        · dtype: "bf16" or "fp32" (default: bf16 where the device computes it natively) · residency: "staged" (default)
        loads the parts in turn, "resident" keeps them all, "streamed" also brings their blocks in one by one · vram: a
        budget such as "4GiB", from which each request's residency follows (see `budget`) · compile: compile the
        transformer's blocks, in the first pass · graphs: record the transformer's passes as CUDA graphs, one a size
        · backend: who serves the operations, in this pipeline's calls: auto, reference, torch or triton · quantize,
        quantize_text: number formats of transformer and text encoder: "fp8", "int8" (both sides of a
        product), "fp8-weights", "int8-weights", "int4" (weights only); float weights are encoded as they come in, a
        quantized model is run in its own format · disable_mmap: read weights into memory instead of mapping their
        files, which may then be cut short while they are in use (see `weights.mapped_file`).
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
            check_backend(backend)
        given = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        with own_settings(placement.device):
            sources = open_sources(model, given, tokenizer, EMBEDDED)
            return cls(
                sources, placement, residency or "staged", vram=size, compiled=compile, graphs=graphs,
                quantize=quantize, quantize_text=quantize_text, backend=backend, disable_mmap=disable_mmap,
            )  # fmt: skip

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
                with own_settings(self.placement.device), use_backend(self.backend):
                    yield
            finally:
                self._computing = False

    def _known(self, kept: Kept) -> Kept:
        """What is kept of what some parts computed, if they would still compute it; nothing while somebody looks in."""
        present = [part for part in kept.parts if part in self.parts.checkpoints]
        try:
            for part in present:
                self.parts.checkpoints[part].check()
        except CheckpointError:
            kept.clear()
            raise
        if overridden() or self.parts.watched(*present):
            return Kept(kept.most)
        state = (backend(), *self.parts.state(*present))
        if state != kept.state:
            kept.clear()
        kept.state = state
        return kept

    def plan(self, request: Request | str | Sequence[str] | None = None, **fields: Any) -> Plan:
        """Prepare a request without reading a weight; everything that is wrong with it is raised here."""
        request = Request.of(request, **fields)
        if self.graphs and request.controls:
            raise RequestError("graphs record passes without control; load the model without graphs, or leave it out")
        with self._turn():
            known, reference_features = self._known(self._features), self._known(self._reference_features)
            return make_plan(request, self.sources, self.tokenizer, self.parts, self.vram, known, reference_features)

    def dry_run(self, plan: Plan) -> None:
        """Run one model call of a plan, text included, on torch's fake tensors: no memory, no arithmetic.

        `dispatch.asked` hears what would be computed.
        """
        with self._turn():
            self._rehearse(plan)

    def _rehearse(self, plan: Plan) -> None:
        device, compute, config = self.placement.device, self.placement.compute, self.config
        lengths = list(map(len, dict.fromkeys(ids for caption in plan.captions for ids in caption)))
        layout = plan.layout(config.transformer, bool(plan.request.guidance_scale), device)
        encoder, transformer = (self.parts.blank(part)[0] for part in ("text_encoder", "transformer"))
        assert isinstance(transformer, Transformer)
        with FakeTensorMode(allow_non_fake_inputs=True), device:
            for shelf, name, tensor in (*tensors(encoder), *tensors(transformer)):
                weight = isinstance(tensor, nn.Parameter)
                blank = torch.empty(tensor.shape, dtype=self.placement.dtype if weight else tensor.dtype)
                shelf[name] = nn.Parameter(blank, requires_grad=False) if weight else blank
            encoder(torch.empty(sum(lengths), config.text_encoder.hidden_size, dtype=compute), lengths)
            text = torch.empty(len(layout.text.token_index), config.transformer.cap_feat_dim, dtype=compute)
            x = torch.empty(len(layout.image.token_index), config.transformer.patch_dim, dtype=torch.float32)
            reference_features: list[Tensor] = []
            if layout.vision is not None and layout.clean is not None:
                reference_features = [x.new_empty(len(layout.clean), x.shape[1])]
                reference_features += [
                    text.new_empty(len(layout.vision.token_index), config.transformer.siglip_feat_dim or 0)
                ]
            transformer(x, torch.zeros(1, dtype=torch.float32), transformer.context(layout, text, *reference_features))

    def encode(self, texts: list[str], max_sequence_length: int = 512) -> list[Tensor]:
        """Features of prompts, (n, cap_feat_dim) each, the caller's own, from the kept ones or the text encoder."""
        with self._turn():
            found = self._encode([tuple(self.tokenizer.segments(text, 0, max_sequence_length)[0]) for text in texts])
            return [one.clone() for one in found]

    def _encode(self, ids: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """`encode` of token ids."""
        known = self._known(self._features)
        new = [one for one in dict.fromkeys(ids) if one not in known]
        if new:
            encoder = self.parts["text_encoder"]
            flat = torch.tensor([token for one in new for token in one])
            stored = self.parts.checkpoints["text_encoder"]
            rows = keymap.official(stored, encoder.state_dict()).rows(EMBEDDING, flat)
            stored.release()
            # parity: the embedding is rounded to the dtype that the weights are kept in.
            x = rows.to(self.placement.dtype).to(self.placement.device, self.placement.compute)
            # Each by itself: what is kept must not depend on what else was asked for when it was computed.
            for one, embedded in zip(new, x.split([len(one) for one in new]), strict=True):
                run = partial(encoder, embedded, [len(one)])
                known[one] = run()
                check_finite(known[one], "text features", run, (encoder, stored.path))
        found = [known[one] for one in ids]
        known.trim()
        return found

    def stream(self, request: "Request | Plan | str | Sequence[str] | None" = None, **fields: Any) -> Iterator[Step]:
        """Sample a request or a plan and yield a Step after every step of the solver.

        Steps may be taken, and the generator closed, from any thread. Between two of them the pipeline may be used for
        anything else, previews or other pictures, which may cost loading the weights again.
        """
        for _, step in self._passes(self._planned(request, fields)):
            yield step

    def _planned(self, request: "Request | Plan | str | Sequence[str] | None", fields: dict[str, Any]) -> Plan:
        if not isinstance(request, Plan):
            return self.plan(request, **fields)
        if fields:
            raise RequestError(f"a Plan and {', '.join(fields)} are given; a plan runs as it is; make another one")
        return request

    def _passes(self, plan: Plan) -> Iterator[tuple[Plan, Step]]:
        """Every step of a plan and of what follows it, counted through, with the plan that it belongs to."""
        step = None
        for step in self._sample(plan):
            yield plan, step if plan.then is None else replace(step, n=step.n + len(plan.then.sigmas) - 1)
        if plan.then is None:
            return
        assert step is not None
        with self._turn():
            pictures = self._pictures(plan, step.latents)
        then = replace(plan.then, start_images=start_image.enlarged(plan.start_images, pictures, plan.then.request))
        for later in self._sample(then):
            yield then, replace(later, i=step.i + later.i, n=step.n + later.n, calls=step.calls + later.calls)

    def _sample(self, plan: Plan) -> Iterator[Step]:
        """Every step of one plan, each in a turn of its own."""
        grids, steps = plan.grids, None
        while True:
            with self._turn():
                if plan.memory is not None and (
                    steps is None or (plan.memory.mode, plan.memory.kept) != self.parts.policy
                ):
                    self.parts.set_policy(plan.memory.mode, plan.memory.kept, [stage.part for stage in plan.stages])
                if steps is None:
                    steps = self._begin(plan)
                else:
                    # Somebody else may have had the pipeline since the last step.
                    self._models(plan)
                step = next(steps, None)
            if step is None:
                return
            yield replace(step, grids=grids)

    def _models(self, plan: Plan) -> tuple[Transformer, dict[str, nn.Module]]:
        """What a model call needs, in memory: the transformer, and ControlNets by name."""
        transformer = self.parts["transformer"]
        assert isinstance(transformer, Transformer)
        with self.parts.beside():
            return transformer, {one.part: self.parts[one.part] for one in plan.controls}

    def _begin(self, plan: Plan) -> Iterator[Step]:
        """Prepare what no step changes -> the solver's steps, to be taken with the `_models` in memory."""
        request, device = plan.request, self.placement.device
        grids, tile = plan.grids, plan.tile
        positive, negative = (
            self._encode([ids for caption in few for ids in caption])
            for few in (plan.captions[: request.count], plan.captions[request.count :])
        )
        reference_features = self._encode_references([one for row in plan.references for one in row], tile)
        sources = start_image.generators(request)
        sampled = sources if request.posterior == "sample" else None
        start = self._encode_images([one.pixels for one in plan.start_images], sampled, tile)
        shown = [
            control_hints.patches(one, request, lambda one: self._encode_images([one], None, tile)[0])
            for one in plan.controls
        ]
        transformer, nets = self._models(plan)

        @cache
        def context(guided: bool) -> Context:
            layout = plan.layout(self.config.transformer, guided, device)
            text = positive + negative if guided else positive
            return transformer.context(
                layout, torch.cat(text), *references.joined(reference_features * (2 if guided else 1))
            )

        steps = torch.tensor(plan.sigmas, dtype=torch.float32)
        x, keep = start_image.starting_noise(request, grids, sources).to(device), None
        if start:
            x, keep = start_image.begin(plan.start_images, start, x, steps, request.mask_mode == "differential")
        guidance = Guidance(
            request.guidance_scale or 0.0, float(request.cfg_normalization), float(request.cfg_truncation)
        )
        run = self.parts.component("transformer").replay if self.graphs else transformer
        control = control_hints.acting(plan.controls, [nets[one.part] for one in plan.controls], shown, steps)
        velocity = guide(run, context, guidance, [rows * columns for rows, columns in grids], control)
        taking_part = {"transformer": transformer, **nets}
        models = [(one, self.parts.checkpoints[part].path) for part, one in taking_part.items()]

        def fresh() -> Tensor:
            return start_image.draw(grids, sources).to(device)

        for step in solve(request.solver, velocity, x, steps, fresh, keep):
            again = partial(velocity, step.start, torch.tensor(step.sigma, dtype=torch.float32))
            check_finite(step.velocity, f"velocity of step {step.i}", again, *models)
            yield step

    def encode_references(self, pictures: Sequence[references.Reference]) -> list[references.ReferenceFeatures]:
        """What the transformer reads of reference pictures, from what is kept or the tower and the autoencoder."""
        with self._turn():
            found = self._encode_references(pictures, None)
            return [references.ReferenceFeatures(one.patches.clone(), one.features.clone()) for one in found]

    # The name of before, for one release.
    look = encode_references

    def _encode_references(
        self, pictures: Sequence[references.Reference], tile: int | None
    ) -> list[references.ReferenceFeatures]:
        known = self._known(self._reference_features)
        new = list({one.key: one for one in pictures if one.key not in known}.values())
        if new:
            tower = self.parts["siglip"]
            features = []
            for one in new:
                patches = one.patches.to(self.placement.device, self.placement.compute)
                run = partial(tower, patches, [one.seen])
                features.append(run())
                check_finite(features[-1], "vision features", run, (tower, self.parts.checkpoints["siglip"].path))
            latents = self._encode_images([one.pixels for one in new], None, tile)
            known.update(
                {one.key: references.ReferenceFeatures.of(*of) for one, *of in zip(new, latents, features, strict=True)}
            )
        found = [known[one.key] for one in pictures]
        known.trim()
        return found

    def encode_images(
        self, pixels: Sequence[Tensor], generators: Sequence[torch.Generator] | None = None
    ) -> list[Tensor]:
        """Latents (16, H/8, W/8) fp32 of pictures (3, H, W) in [-1, 1]; large ones by tiles.

        The mode of what the autoencoder answers, or with generators, one a picture, a sample.
        """
        with self._turn():
            return self._encode_images(pixels, generators, None)

    def _encode_images(
        self, pixels: Sequence[Tensor], generators: Sequence[torch.Generator] | None, tile: int | None
    ) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        latents = []
        for i, one in enumerate(pixels):
            # The same tensor twice is encoded once.
            if generators is not None or id(one) not in found:
                vae = self.parts["vae"]
                assert isinstance(vae, Autoencoder)
                side = tile or self._tile_of(one.shape[-2] // 8, one.shape[-1] // 8)
                generator = None if generators is None else generators[i]
                run = partial(vae.encode, one[None].to(self.placement.device), generator, side)
                found[id(one)] = run()[0]
                check_finite(found[id(one)], "encoded picture", run, (vae, self.parts.checkpoints["vae"].path))
            latents.append(found[id(one)])
        return latents

    def decode(self, latents: list[Tensor], tile: int | None = None) -> list[Tensor]:
        """Pictures (3, H, W) fp32 in about [-1, 1] of latents (16, H/8, W/8); large ones by tiles."""
        with self._turn():
            return self._decode(latents, tile)

    def _tile_of(self, rows: int, columns: int) -> int | None:
        """The side of a tile, in cells, for a picture of so many cells that no plan knows; None where it goes whole."""
        large = TILE if rows * columns > WHOLE_CELLS else None
        if self.vram is None:
            return large
        compute, device = self.placement.compute, self.placement.device.type
        room = self.vram - budget.RESERVE[device] - self.parts.sizes("vae")[1]
        work = partial(budget.decoder_work, self.config.vae, 8 * rows, 8 * columns, dtype=compute, device=device)
        return next((tile for tile in budget.TILES if work(tile=tile) <= room), budget.TILES[-1]) or large

    def _decode(self, latents: list[Tensor], tile: int | None) -> list[Tensor]:
        vae = self.parts["vae"]
        assert isinstance(vae, Autoencoder)
        pictures = []
        for one in latents:
            side = tile or self._tile_of(one.shape[-2], one.shape[-1])
            run = partial(vae.decode, one[None].to(self.placement.device), side)
            picture = run()[0]
            check_finite(picture, "decoded picture", run, (vae, self.parts.checkpoints["vae"].path))
            pictures.append(picture.float().cpu())
        return pictures

    def __call__(
        self,
        request: "Request | Plan | str | Sequence[str] | None" = None,
        *,
        on_step: Callable[[Step], None] | None = None,
        **fields: Any,
    ) -> Result:
        """Draw a prompt, a request or a plan: `pipe("a red fox", seed=7)`.

        on_step sees every Step, for bars and previews; for anything else use `stream`. Other threads wait until the
        pictures are done: `on_step` may use the pipeline, but not wait for one that does.
        """
        with self.parts.lock:
            return self._draw(self._planned(request, fields), on_step)

    def _draw(self, plan: Plan, on_step: Callable[[Step], None] | None) -> Result:
        request = plan.request
        try:
            for done in self._passes(plan):
                if on_step is not None:
                    on_step(done[1])
            last, step = done
            pictures: list[Any] = []
            with self._turn():
                latents = [one.cpu() for one in step.latents]
                if request.output_type != "latent":
                    pictures = self._pictures(last, latents)
        except torch.OutOfMemoryError as error:
            raise BackendError(out_of_memory(plan, str(error))) from None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise BackendError(out_of_memory(plan, str(error))) from None
        if request.output_type == "pil":
            pictures = [images.to_pil(picture[None])[0] for picture in pictures]
        return Result(pictures, latents, self.records(plan))

    def records(self, plan: Plan) -> list[dict[str, Any]]:
        """What the pictures of a plan will carry, one a picture: JSON values."""
        return records(plan, self._engine(), self._beside())

    def _pictures(self, plan: Plan, latents: list[Tensor]) -> list[Tensor]:
        """Decode, and lay what was to be kept of start images over it."""
        pictures = self._decode(latents, plan.tile)
        if not plan.start_images or not plan.request.composite:
            return pictures
        differential = plan.request.mask_mode == "differential"
        return [given.over(one, differential) for given, one in zip(plan.start_images, pictures, strict=True)]

    def _engine(self) -> dict[str, Any]:
        """What draws, as pictures remember it."""
        return {
            "s3dit": __version__,
            "torch": torch.__version__,
            "variant": self.config.variant,
            "placement": str(self.placement),
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "mixed": {part: self.parts.checkpoints[part].path.name for part in self.sources.mixed},
            "quantized": {part: name for part, name in self.parts.formats.items() if name},
        }

    def _beside(self) -> dict[str, Any]:
        """The model and its adapters, as pictures remember them."""
        model = "embedded" if self.folder == EMBEDDED else self.folder.name
        return {"model": model} | ({"adapters": self.lora.records()} if self.lora.names else {})

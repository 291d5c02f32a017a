"""The story in one file: load, plan, encode, sample, decode.

    pipe = Pipeline.load("Tongyi-MAI/Z-Image-Turbo")
    pipe.lora.attach("style.safetensors", scale=0.8)
    pipe("a red fox in the snow", seed=7).save("fox.png")

Headers are read and checked at `load`; weights come into memory when a stage needs them (`residency`). `plan` prepares
a request without a weight. `stream` yields Steps: progress bars, previews and early stops are a `for` loop around it.

A pipeline may be called from several threads, which wait for one another: for a whole call, and of a `stream` for each
step. So between two steps the pipeline is free for anybody, the stream's own thread included, and the next step brings
back what it needs. What a thread has switched on in torch (autocast, gradients, a default device) changes nothing.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import torch
from torch import Tensor, nn

from s3dit.control import shown
from s3dit.dry_run import dry_run
from s3dit.errors import RequestError
from s3dit.guidance_options import SkipLayers
from s3dit.inputs import control_hints, images, noise, references, region_masks, start_image
from s3dit.inputs.variation import variations, varied
from s3dit.kernels.dispatch import check_backend, check_numerics
from s3dit.loaded_model import LoadedModel, Now
from s3dit.model.transformer import Context, Transformer
from s3dit.parallel.join import join
from s3dit.plan import Plan, make_plan
from s3dit.request import Request
from s3dit.request_fields import RequestFields
from s3dit.result import Result, engine_of, records, with_metadata
from s3dit.runtime import budget
from s3dit.runtime.block_streaming import Mode
from s3dit.runtime.cached_calls import CachedCalls
from s3dit.runtime.components import Components
from s3dit.runtime.devices import own_settings, place
from s3dit.runtime.embedded import NAMES
from s3dit.runtime.finite import FiniteChecks
from s3dit.runtime.graphs import check_launches
from s3dit.runtime.modulations import ahead
from s3dit.runtime.sources import open_sources
from s3dit.runtime.stopwatch import shown_seconds
from s3dit.sampling.guidance import guide
from s3dit.sampling.guidance_methods import guidance_of
from s3dit.sampling.regions import RegionBlend
from s3dit.sampling.skip_layers import SkippedLayers
from s3dit.sampling.solvers import solve
from s3dit.sampling.step import Step
from s3dit.sampling.target_time import target_time
from s3dit.stages import out_of_memory

if TYPE_CHECKING:
    from s3dit.research.observe import Edit
    from s3dit.research.record import Record

LOG = getLogger(__name__)
Numerics = Literal["exact", "lossless", "approximate"]
# What a picture may be asked for by.
Wanted = Request | Plan | str | Sequence[str] | None


class Pipeline(LoadedModel):
    """A model, ready to draw; make one with `Pipeline.load`."""

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
        numerics: Numerics = "lossless",
        vram: str | int | None = None,
        ram: str | int | None = None,
        compile: bool = False,
        graphs: bool = False,
        quantize: str | None = None,
        quantize_text: str | None = None,
        disable_mmap: bool = False,
        parallel: int | str | None = None,
    ) -> Self:
        """Open a model: a folder in the official layout, a file, a hub name (Tongyi-MAI/Z-Image-Turbo), or "embedded".

        transformer, text_encoder, vae: files or folders of parts that take the place of the model's own, which may then
        lack them (see `sources`) · tokenizer: a folder, likewise · device: cpu, cuda, mps (default: the best there is)
        · dtype: "bf16" or "fp32" (default: bf16 where the device computes it natively) · residency: "staged" (default)
        loads the parts in turn, "resident" keeps them all, "streamed" also brings their blocks in one by one · vram: a
        budget such as "4GiB", from which each request's residency follows (see `budget`) · ram: on a CPU, one of all
        that the process has resident · compile: compile the transformer's blocks, in the first pass · graphs: record
        the transformer's passes as CUDA graphs, one a size · backend: what runs the operations, in this pipeline's
        calls: auto, reference, torch or triton · numerics: how near that is to the references: "exact" takes
        implementations with the same bits only, "lossless" (default) also those that sum in another order,
        "approximate" also those with a stated error (none at present) · quantize, quantize_text: formats of transformer
        and text encoder: "fp8", "int8" (both sides of a product), "fp8-weights", "int8-weights", "int4" (weights only),
        into which floats are encoded as they come in · disable_mmap: read weights into memory instead of mapping their
        files, which may then be cut short (see `weights.mapped_file`) · parallel: how many processes of torchrun's draw
        together, 4 or 2x2 (see PARALLEL.md).
        Raises CheckpointError (files), BackendError (device, dtype, backend, compile, graphs), RequestError (the rest).
        """
        ranks, placement = join(parallel, place(device, dtype), compile)
        limit = budget.budget_of(vram, ram, residency, placement.device.type)
        if graphs and (limit is not None or residency == "streamed"):
            raise RequestError("graphs need weights that stay where they are; use them without vram and streaming")
        check_launches(placement.device, compile, graphs)
        if backend is not None:
            check_backend(backend)
        check_numerics(numerics)
        if compile and numerics == "exact":
            raise RequestError("both compile and numerics exact are given; compiled blocks round in other places")
        given = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
        formats = {"transformer": quantize, "text_encoder": quantize_text}
        with own_settings(placement.device), ranks.together():
            sources = open_sources(model, given, tokenizer)
            components = Components(sources, placement, residency or "staged", formats, compile, disable_mmap, ranks)
            return cls(sources, components, limit=limit, graphs=graphs, backend=backend, numerics=numerics)

    def plan(self, request: Request | str | Sequence[str] | None = None, **fields: Unpack[RequestFields]) -> Plan:
        """Prepare a request without reading a weight; everything that is wrong with it is raised here."""
        return self.parts.ranks.agreed(lambda: self._prepared(Request.of(request, **fields)), self.records)

    def _prepared(self, checked: Request) -> Plan:
        if self.graphs and (name := "control" if checked.controls else "cache" if checked.cache else ""):
            raise RequestError(f"graphs record passes without {name}; load the model without graphs, or leave it out")
        with self._turn():
            kept = self.encoders.prompts, self.encoders.references
            return make_plan(checked, self.sources, self.tokenizer, self.parts, self.limit, *kept)

    def dry_run(self, plan: Plan) -> None:
        """Run one model call of a plan, text included, on torch's fake tensors: no memory, no arithmetic.

        `dispatch.record_calls` tells what would be computed.
        """
        with self._turn():
            dry_run(plan, self.parts)

    def __call__(
        self,
        request: Wanted = None,
        *,
        on_step: Callable[[Step], None] | None = None,
        **fields: Unpack[RequestFields],
    ) -> Result:
        """Draw a prompt, a request or a plan: `pipe("a red fox", seed=7)`.

        fields: those of `Request` · on_step sees every Step, for bars and previews; for anything else use `stream`.
        Other threads wait until the pictures are done: `on_step` may use the pipeline, but not wait for one that does.
        """
        if on_step is not None and not callable(on_step):
            raise RequestError(f"on_step is {shown(on_step)}; needed a function that takes a Step")
        with self.parts.lock:
            plan = self._planned(request, fields)
            with self.parts.ranks.together(), out_of_memory(plan.stages), self.parts.clock.measured() as seconds:
                for done in self._steps(plan):
                    if on_step is not None:
                        on_step(done[1])
                last, step = done
                pictures: list[Any] = []
                with self._turn():
                    latents = [latent.cpu() for latent in step.latents]
                    if plan.request.output_type != "latent":
                        pictures = self._pictures(last, latents)
            # Still inside: they are of the adapters that drew, whatever others attach meanwhile.
            metadata = self.records(plan)
            # Of none where there is no cache.
            for record, reused in zip(metadata, step.reused, strict=False):
                record["engine"]["reused"] = reused
        LOG.info("drew %d of %s; seconds: %s", plan.request.count, self.folder.name, shown_seconds(seconds))
        if plan.request.output_type == "pil":
            drawn = [images.to_pil(picture[None])[0] for picture in pictures]
            pictures = [with_metadata(*each) for each in zip(drawn, metadata, strict=True)]
        return Result(pictures, latents, metadata, seconds)

    def stream(self, request: Wanted = None, **fields: Unpack[RequestFields]) -> Iterator[Step]:
        """Sample a request or a plan and yield a Step after every step of the solver.

        Steps may be taken, and the generator closed, from any thread. Between two of them the pipeline may be used for
        anything else, previews or other pictures, which may cost loading the weights again.
        """
        for _, step in self._steps(self._planned(request, fields)):
            yield step

    def records(self, plan: Plan) -> list[dict[str, Any]]:
        """What the pictures of a plan will carry, one a picture: JSON values."""
        beside: dict[str, Any] = {"model": NAMES.get(self.folder, self.folder.name)}
        if self.lora.names:
            beside["adapters"] = self.lora.records()
        return records(plan, engine_of(self), beside)

    def observe(self, sites: "str | Sequence[str]", **choice: Any) -> "AbstractContextManager[Record]":
        """Record what sites compute, inside a `with`; arguments as of `research.observe.observe`."""
        from s3dit.research.observe import observe

        return observe(self, sites, **choice)

    def edit(self, changes: "Mapping[str, Edit]", **choice: Any) -> AbstractContextManager[None]:
        """Replace what sites compute, inside a `with`; arguments as of `research.observe.edit`."""
        from s3dit.research.observe import edit

        return edit(self, changes, **choice)

    def _planned(self, request: Wanted, fields: RequestFields) -> Plan:
        """The plan that a call was given, or one of what it was given, with a warning for what has no effect."""
        if isinstance(request, Plan):
            if fields:
                raise RequestError(f"a Plan and {', '.join(fields)} are given; a plan runs as it is; make another one")
            return request
        plan = self.plan(request, **fields)
        for note in plan.unused:
            warnings.warn(note, stacklevel=3)
        return plan

    def _steps(self, plan: Plan) -> Iterator[tuple[Plan, Step]]:
        """Every step of a plan and of its second pass, counted through, with the plan that it belongs to."""
        step = None
        for step in self._sample(plan):
            yield plan, step if plan.then is None else replace(step, n=step.n + len(plan.then.sigmas) - 1)
        if plan.then is None:
            return
        assert step is not None
        with self._turn():
            pictures = self._pictures(plan, step.latents)
        then = replace(plan.then, start_images=start_image.enlarged(plan.start_images, pictures, plan.then.request))
        for later in self._sample(then, step.n):
            reused = tuple(map(sum, zip(step.reused, later.reused, strict=True)))
            counted = {name: getattr(step, name) + getattr(later, name) for name in ("i", "n", "calls")}
            yield then, replace(later, **counted, reused=reused)

    def _sample(self, plan: Plan, before: int = 0) -> Iterator[Step]:
        """Every step of one pass, each in a turn of its own; before: steps of the passes before it."""
        steps, memory, step, n = None, plan.memory, None, len(plan.sigmas) - 1
        while True:
            with self._turn(), self.lora.step(step.i if step else 0, n):
                if memory is not None and (steps is None or (memory.mode, memory.kept) != self.parts.policy):
                    self.parts.set_policy(memory.mode, memory.kept, [stage.part for stage in plan.stages])
                if steps is None:
                    self.parts.turns = [stage.part for stage in plan.stages]
                    steps = self._begin(plan)
                else:
                    # Somebody else may have had the pipeline since the last step.
                    self._models(plan)
                self.now = Now(plan, before + (step.i if step else 0) + 1)
                try:
                    with self.parts.clock.stage("transformer"):
                        step = next(steps, None)
                finally:
                    self.now = None
            if step is None:
                return
            yield replace(step, grids=plan.grids)

    def _models(self, plan: Plan) -> tuple[Transformer, dict[str, nn.Module]]:
        """What a model call needs, in memory: the transformer, and ControlNets by name."""
        transformer = self.parts["transformer"]
        assert isinstance(transformer, Transformer)
        with self.parts.beside():
            return transformer, {control.part: self.parts[control.part] for control in plan.controls}

    def _begin(self, plan: Plan) -> Iterator[Step]:
        """Prepare what no step changes -> the solver's steps, to be taken with the `_models` in memory."""
        request, device, encoders = plan.request, self.placement.device, self.encoders
        positive, negative, features = self._features(plan)
        sources = noise.sources(request)
        encode = partial(encoders.encode_images, tile=plan.tile)
        first, start = start_image.drawn(plan.start_images, request, sources, encode)
        hints = [
            control_hints.patches(control, request, lambda pixels: encoders.encode_images([pixels], None, plan.tile)[0])
            for control in plan.controls
        ]
        transformer, nets = self._models(plan)
        pictures, guided = range(request.count), bool(request.guidance_scale)
        regions = None
        if plan.shares:
            regions = RegionBlend([*region_masks.copies(plan.shares, plan.grids)], plan.grids, device)
            hints = [regions.spread(hint) if not guided else torch.cat((regions.spread(hint), hint)) for hint in hints]

        @cache
        def made(guided: bool, adapters: object) -> Context:
            layout = plan.layout(self.config.transformer, guided, device)
            text = torch.cat(positive + negative if guided else positive)
            seen = [each for i in (*plan.owners, *(pictures if guided else ())) for each in features[i]]
            return transformer.context(layout, text, *references.joined(seen))

        def context(guided: bool) -> Context:
            return made(guided, self.lora.state)

        later = noise.of_steps(request, sources)

        def fresh() -> Tensor:
            return noise.draw(plan.grids, later).to(device)

        sigmas = torch.tensor(plan.sigmas, dtype=torch.float32)
        x, keep, differential = first.to(device), None, request.mask_mode == "differential"
        if start:
            state = noise.given_state(request)
            x, keep = start_image.begin(plan.start_images, start, x, sigmas, differential, state)
        skipped = request.skip_layers and SkippedLayers(transformer, SkipLayers.of(request.skip_layers))
        lengths = [rows * columns for rows, columns in plan.grids]
        run: Any = self.parts.component("transformer").replay if self.graphs else transformer
        if request.cache:
            run = CachedCalls(transformer, request.cache, sigmas, lengths, plan.owners)
        aimed = target_time(request.target_timestep, sigmas)
        control = control_hints.acting(plan.controls, [nets[control.part] for control in plan.controls], hints, sigmas)
        modulation = ahead(
            transformer, context, sigmas, device, lambda: (self.lora.state, self.parts.state("transformer")), aimed
        )
        guidance = guidance_of(request, sigmas, lengths, skipped or None)
        velocity = guide(self.parts.ranks.shared(run), context, guidance, lengths, control, modulation, regions, aimed)
        computing = {"transformer": transformer, **nets}
        models = [(module, self.parts.checkpoints[part].path) for part, module in computing.items()]
        checks = FiniteChecks()
        for step in solve(request.solver, velocity, x, sigmas, fresh, keep, request.convention):
            again = partial(velocity, step.start, torch.tensor(step.sigma, dtype=torch.float32))
            checks.add(step.velocity, f"velocity of step {step.i}", again, *models)
            reused = tuple(run.reused) if request.cache else ()
            yield replace(step, calls=step.calls + (skipped.calls if skipped else 0), reused=reused)
        checks.finish()

    def _features(self, plan: Plan) -> tuple[list[Tensor], list[Tensor], list[list[references.ReferenceFeatures]]]:
        """What the transformer reads beside the pictures: prompts, negative prompts, references of each picture."""
        prompts = len(plan.owners)
        positive, negative = (
            self.encoders.encode_texts([text for caption in captions for text in caption])
            for captions in (plan.captions[:prompts], plan.captions[prompts:])
        )
        pictures = [reference for of_picture in plan.references for reference in of_picture]
        each = variations(plan.request)
        positive = varied(positive, plan.captions, [each[i] for i in plan.owners])
        encoded = iter(self.encoders.encode_references(pictures, plan.tile))
        return positive, negative, [[next(encoded) for _ in of_picture] for of_picture in plan.references]

    def _pictures(self, plan: Plan, latents: list[Tensor]) -> list[Tensor]:
        """Decode, and lay what was to be kept of start images over it."""
        pictures = self.encoders.decode(latents, plan.tile)
        if not plan.start_images or not plan.request.composite:
            return pictures
        differential = plan.request.mask_mode == "differential"
        return [given.over(drawn, differential) for given, drawn in zip(plan.start_images, pictures, strict=True)]

"""JobPipeline: the pipeline as one job sees it, with strengths of adapters and a clock of its own.

Weights, files and kept features are those of the pipeline. What differs is who computes: the transformer is shared by
turns (`turn`), encoders and the autoencoder work in the one thread of the engine that is for them, and nothing holds
the pipeline's lock for a whole picture.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.control import shown
from s3dit.errors import RequestError
from s3dit.inputs import images
from s3dit.kernels.dispatch import use_backend, use_numerics
from s3dit.model.transformer import Transformer
from s3dit.pipeline import Pipeline
from s3dit.plan import Plan
from s3dit.runtime.adapter_strength import check_scale
from s3dit.runtime.adapters import Adapters
from s3dit.runtime.components import Components
from s3dit.runtime.devices import own_settings
from s3dit.runtime.encoders import Encoders
from s3dit.runtime.residency import Component
from s3dit.runtime.stopwatch import Stopwatch
from s3dit.sampling.step import Step
from s3dit.serve.turn import SharedTransformer, Turn

# stage(work) -> what work() returns, computed in the thread for encoders
Stage = Callable[[Callable[[], Any]], Any]
# The strengths of adapters, by name.
Strengths = Mapping[str, float]


class JobComponents(Components):
    """The parts of a pipeline, with adapters and a clock of a job."""

    def __init__(self, parts: Components, adapters: Strengths | None, resident: bool) -> None:
        """adapters: strengths by name, None as they are · resident: every part is in memory to stay."""
        vars(self).update(vars(parts))
        self._shared, self.clock = parts.lock, Stopwatch()
        # Which a call holds for a whole picture.
        self.lock: Any = nullcontext()
        if resident:
            self.mode, self.kept = "resident", {}
        self.adapters = {name: replace(each) for name, each in parts.adapters.items()}
        if adapters is not None:
            self._set(adapters)

    def _set(self, wanted: Strengths) -> None:
        """Take the strengths that a job wants; raises RequestError."""
        if not isinstance(wanted, Mapping):
            raise RequestError(f"adapters are {shown(wanted)}; needed strengths by name, such as {{'style': 0.8}}")
        for name, scale in wanted.items():
            if name not in self.adapters:
                raise RequestError(f"no adapter {name!r}; there is {', '.join(self.adapters) or 'none'}")
            check_scale(scale)
        for name, each in self.adapters.items():
            if not each.merged:
                each.scale = float(wanted.get(name, 0.0))
            elif name in wanted:
                raise RequestError(f"adapter {name!r} is merged, so its strength is what it is; leave it out")

    def __getitem__(self, name: str) -> nn.Module:
        """Return a part's module, loaded into memory if it is not."""
        with self._shared:
            return super().__getitem__(name)

    def component(self, name: str) -> Component:
        """Return a part, in memory or not."""
        with self._shared:
            return super().component(name)

    def strengths(self, part: str) -> dict[str, float]:
        """The strengths of the adapters beside a part."""
        return {name: each.strength for name, each in self.adapters.items() if part in each.deltas and not each.merged}

    def state(self, *names: str) -> tuple[object, ...]:
        """Return a value that is another once what these parts compute for this job may be."""
        return *super().state(*names), *(tuple(self.strengths(name).items()) for name in names)


class JobAdapters(Adapters):
    """The adapters of a job: whether one acts in a step is noted, and the engine sets it where it computes."""

    @contextmanager
    def step(self, i: int, n: int) -> Iterator[None]:
        """Note which adapters rest in step i (from 0) of n."""
        for adapter in self._loaded.values():
            adapter.resting = not adapter.acts(min(i, n - 1), n)
        yield

    @property
    def state(self) -> tuple[object, ...]:
        """A value that is another once adapters change the transformer otherwise."""
        revision = self._parts.revisions["transformer"]
        return revision, *((name, each.strength) for name, each in self._loaded.items())

    def records(self) -> list[dict[str, Any]]:
        """What a picture's metadata says of the adapters that act."""
        return [record for record in super().records() if record["scale"] or record.get("merged")]


class JobEncoders(Encoders):
    """The encoders of a pipeline, which compute in the engine's thread for them."""

    def __init__(self, encoders: Encoders, parts: JobComponents, stage: Stage) -> None:
        vars(self).update(vars(encoders))
        self.components, self._stage = parts, stage

    def encode_texts(self, *args: Any) -> Any:
        """As `Encoders.encode_texts`."""
        return self._stage(lambda: super(JobEncoders, self).encode_texts(*args))

    def encode_references(self, *args: Any) -> Any:
        """As `Encoders.encode_references`."""
        return self._stage(lambda: super(JobEncoders, self).encode_references(*args))

    def encode_images(self, *args: Any, **named: Any) -> Any:
        """As `Encoders.encode_images`."""
        return self._stage(lambda: super(JobEncoders, self).encode_images(*args, **named))

    def decode(self, *args: Any) -> Any:
        """As `Encoders.decode`."""
        return self._stage(lambda: super(JobEncoders, self).decode(*args))


class JobPipeline(Pipeline):
    """A pipeline whose calls are one job's; it is called once, in the job's own thread."""

    def __init__(self, pipe: Pipeline, adapters: Strengths | None, resident: bool) -> None:
        """adapters, resident: as of `JobComponents`. Raises RequestError."""
        vars(self).update(vars(pipe))
        self.parts: JobComponents = JobComponents(pipe.parts, adapters, resident)
        self.lora = JobAdapters(self.parts)
        self._pipe, self._resident = pipe, resident
        # For `plan`: what is kept may be gone when the job is drawn.
        self.encoders = SimpleNamespace(prompts=(), references=())  # type: ignore[assignment]

    def begin(self, turn: Turn, stage: Stage, modulated_at: Callable[..., Any]) -> None:
        """Take part in an engine's passes: from here on it can draw."""
        self.turn, self._modulated_at = turn, modulated_at

        def elsewhere(work: Callable[[], Any]) -> Any:
            turn.give()
            return stage(work)

        self.encoders = JobEncoders(self._pipe.encoders, self.parts, elsewhere)
        # With a clock of their own, as they are made while the job goes on.
        previewed = JobComponents(self._pipe.parts, None, self._resident)
        self._previews = JobEncoders(self._pipe.encoders, previewed, lambda work: work())

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Compute with the pipeline's own settings, in the job's thread."""
        with own_settings(self.placement.device), use_backend(self.backend), use_numerics(self.numerics):
            yield

    def _models(self, plan: Plan) -> tuple[Transformer, dict[str, nn.Module]]:
        """What a model call needs, once it is the job's turn: the transformer that is shared, and ControlNets."""
        self.turn.take()
        # The step may be one of other adapters than the last.
        self.turn.on_turn()
        transformer, nets = super()._models(plan)
        return SharedTransformer.of(transformer, self.turn, self._modulated_at), nets

    def preview(self, step: Step, output_type: str) -> list[Any]:
        """What a step takes the pictures for, Pillow's or tensors; called in the thread for encoders."""
        with self._turn(), nullcontext() if self._resident else self._previews.components.beside():
            pictures: list[Tensor] = self._previews.decode(step.denoised)
        return pictures if output_type == "tensor" else [images.to_pil(picture[None])[0] for picture in pictures]

    def tokens(self, plan: Plan) -> int:
        """Tokens of the largest model call of a plan, padding included."""
        layout = plan.layout(self.config.transformer, bool(plan.request.guidance_scale), torch.device("cpu"))
        own = sum(layout.joint.spans.lengths)
        return own if plan.then is None else max(own, self.tokens(plan.then))

"""The passes of an engine: what jobs ask of the transformer, computed together where it can be."""

import operator
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

from torch import Tensor

from s3dit.kernels.dispatch import overridden
from s3dit.model.timestep import Modulation
from s3dit.model.transformer import Context, Transformer
from s3dit.pipeline import Pipeline
from s3dit.serve.encoder_thread import EncoderThread
from s3dit.serve.job import Job
from s3dit.serve.job_pipeline import JobPipeline
from s3dit.serve.packing import Call, join
from s3dit.serve.stats import Counts
from s3dit.serve.turn import Turn

LOG = getLogger(__name__)
# Times whose modulation is kept, 2 MB each of the published models; on a CPU, where calls compute their own.
MODULATIONS = 64


@dataclass(slots=True, eq=False)
class Task:
    """A job in an engine.

    tokens: of its largest call · partials: steps after which to show what there is · shown: how many were ·
    overtaken: how often · halt: what ends it from outside.
    """

    job: Job
    pipe: JobPipeline
    tokens: int
    partials: Sequence[int]
    turn: Turn = field(init=False)
    shown: int = 0
    overtaken: int = 0
    halt: BaseException | None = None

    def why_stop(self) -> BaseException | None:
        """The reason to end it before its next step, if there is one."""
        return self.halt or self.job.why_stop()

    @property
    def strengths(self) -> dict[str, float]:
        """Of the adapters beside the transformer, in its present step."""
        return self.pipe.parts.strengths("transformer")

    @property
    def call(self) -> Call:
        """What it asks for now."""
        assert self.turn.call is not None
        return self.turn.call


class Passes:
    """Computes calls with the pipeline's transformer, and sets the strengths of adapters for that."""

    def __init__(self, pipe: Pipeline, resident: bool, tokens: int, encoders: EncoderThread, counts: Counts) -> None:
        """tokens: of a pass at most."""
        self._pipe, self._resident, self._tokens, self._counts = pipe, resident, tokens, counts
        self._encoders = encoders
        self._modulations: OrderedDict[Any, Modulation] = OrderedDict()
        # Of the last pass: the contexts of its calls, and that of all.
        self._last: tuple[list[Context], Context | None] = [], None
        self._worn = {part: dict(worn) for part, worn in self._attached().items()}

    def _attached(self) -> dict[str, dict[str, float]]:
        """The strengths of adapters as they are attached to the pipeline, by part."""
        adapters = [(name, each) for name, each in self._pipe.parts.adapters.items() if not each.merged]
        parts = "transformer", "text_encoder"
        return {part: {name: each.strength for name, each in adapters if part in each.deltas} for part in parts}

    def wear(self, part: str, strengths: Mapping[str, float]) -> None:
        """Set the strengths of the adapters beside a part; called by the one thread that computes with it now."""
        worn = self._worn[part]
        # A part that comes and goes is given those of the job that loads it.
        if worn == strengths or part not in self._pipe.parts.held:
            return
        attachments = self._pipe.parts.component(part).attachments
        for name, strength in strengths.items():
            if worn.get(name) != strength or not self._resident:
                attachments.rescale(name, strength)
                worn[name] = strength

    def undress(self) -> None:
        """Set the strengths as they are attached to the pipeline."""
        for part, strengths in self._attached().items():
            self.wear(part, strengths)

    def compute(self, tasks: Sequence[Task]) -> None:
        """Answer the calls of some jobs, together where they are of one kind."""
        groups: dict[Any, list[Task]] = {}
        separate = len(tasks) > 1 and self._separate()
        for task in tasks:
            key = task if separate else (task.call.kind, *self._common(task).items())
            groups.setdefault(key, []).append(task)
        for group in groups.values():
            for batch in self._batches(group):
                self._pass(batch)

    def _common(self, task: Task) -> dict[str, float]:
        """The strengths that must be equal in a pass: of adapters that change more than what tokens are multiplied by.

        Where blocks compute their modulation themselves, or come and go, of all.
        """
        if any(task.call.modulation.alone) or "transformer" not in self._pipe.parts.held:
            return task.strengths
        attachments = self._pipe.parts.component("transformer").attachments
        return {name: strength for name, strength in task.strengths.items() if attachments.has_vectors(name)}

    @contextmanager
    def _wearing(self, batch: Sequence[Task]) -> Iterator[None]:
        """Inside the `with` every call has the strengths of its job."""
        self.wear("transformer", batch[0].strengths)
        several = {name: [task.strengths[name] for task in batch] for name in batch[0].strengths}
        several = {name: strengths for name, strengths in several.items() if len(set(strengths)) > 1}
        if not several:
            yield
            return
        # Of the three streams of a pass: patches, image tokens with their padding, and these with the texts.
        calls = [task.call for task in batch]
        streams = [(len(c.x), len(c.context.image.positions), len(c.context.joint.positions)) for c in calls]
        with self._pipe.parts.component("transformer").attachments.by_token(several, list(zip(*streams, strict=True))):
            yield

    def _separate(self) -> bool:
        """Whether every call has a pass of its own: others might change its bits, or somebody looks on."""
        return self._pipe.numerics == "exact" or overridden() or self._pipe.parts.watched("transformer")

    def _batches(self, group: Sequence[Task]) -> list[list[Task]]:
        """Calls that are computed together, in their order, of as many tokens as a pass may have."""
        batches: list[list[Task]] = []
        room = 0
        for task in group:
            if not batches or task.call.tokens > room:
                batches.append([])
                room = self._tokens
            batches[-1].append(task)
            room -= task.call.tokens
        return batches

    def _pass(self, batch: Sequence[Task]) -> None:
        """Compute some calls in one pass; where it fails, in halves, until it is known whose fault it is."""
        error = self._computed(batch)
        if error is None:
            return
        if len(batch) == 1:
            batch[0].turn.answer = error
            return
        LOG.warning("a pass of %d requests failed, and is computed in halves: %s", len(batch), error)
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            self._pass(half)

    def _computed(self, batch: Sequence[Task]) -> BaseException | None:
        """Compute some calls in one pass; returns its error, without the frames that hold its tensors."""
        calls = [task.call for task in batch]
        try:
            with self._encoders.beside(), self._pipe._turn():
                transformer = self._pipe.parts["transformer"]
                joined = self._joined(calls)
                with self._wearing(batch):
                    out: Tensor = transformer(joined.x, joined.t, joined.context, None, joined.modulation)
                for task, answer in zip(batch, out.split([len(call.x) for call in calls]), strict=True):
                    task.turn.answer = answer
        except BaseException as error:
            return error.with_traceback(None)
        self._counts.passed(len(batch), joined.tokens)
        return None

    def _joined(self, calls: Sequence[Call]) -> Call:
        """The calls as one, with the last pass's context where the requests are the same."""
        contexts = [call.context for call in calls]
        known, context = self._last
        same = len(known) == len(contexts) and all(map(operator.is_, known, contexts))
        joined = join(calls, context if same else None)
        self._last = contexts, joined.context
        return joined

    def forget(self) -> None:
        """Drop what is kept of the last pass, when there is no next one yet."""
        self._last = [], None

    def modulated_at(self, t: Tensor, context: Context) -> Modulation:
        """The modulation of a call at times t, kept on a CPU: requests of one schedule share their times."""
        transformer = self._pipe.parts["transformer"]
        assert isinstance(transformer, Transformer)
        times, dtype = context.times(t), context.text.dtype
        if times.device.type != "cpu":
            return transformer.modulation(times, dtype)
        key = (times.shape, *times.flatten().tolist(), dtype, self._pipe.parts.revisions["transformer"])
        key += tuple(self._worn["transformer"].items())
        if key not in self._modulations:
            self._modulations[key] = transformer.modulation(times, dtype)
            while len(self._modulations) > MODULATIONS:
                self._modulations.popitem(last=False)
        self._modulations.move_to_end(key)
        return self._modulations[key]

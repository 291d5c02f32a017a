"""The ranks of a drawing, and what they say to one another: short texts, and tensors.

Every rank runs the same program, plans the same request and holds the same state; they part only inside a model call
(`passes`) and inside the autoencoder (`strips`), where they exchange tensors through torch's collectives. What they
agree on, that all plan the same and that all have come to a model call, are short texts in the store of the `watch`,
read without pickle; waiting for them ends when a rank fails.
"""

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.parallel.alone import Alone, Records, T
from s3dit.parallel.placement import Form
from s3dit.parallel.watch import OUTSIDE, Watch

# Errors that a plan may end in, by name.
ERRORS = {kind.__name__: kind for kind in (RequestError, CheckpointError, BackendError)}
# What a record says of a machine, which may be another for each rank.
OWN = ("torch", "backend", "threads", "cpu")


class Ranks(Alone):
    """This process and the others, which are in the same place of the same program."""

    def __init__(self, form: Form, device: torch.device, watch: Watch, stores: tuple[Any, Any]) -> None:
        """Wait for all ranks, and begin to watch. stores: this thread's own connection; on rank 0, what it serves."""
        self.form, self.rank, self.size, self.device = form, watch.rank, watch.size, device
        self._watch, (self._store, self._served), self._turn = watch, stores, 0
        self._seed = 0
        self._groups: dict[int, Any] = {}
        # What of a layout is this rank's, for `passes`.
        self.cuts: OrderedDict[int, Any] = OrderedDict()
        self.exchange("")
        watch.start()

    def seed(self) -> int:
        """Draw a seed for a request without one, the same for all ranks, as `make` of `agreed` wants it."""
        return self._seed

    def agreed(self, make: Callable[[], T], told: Callable[[T], Records]) -> T:
        """Return the plan that `make` makes if all ranks made the same, else raise everywhere what it raised on one.

        told: the records of a plan's pictures.
        """
        # Before, as a rank that fails comes to nothing more.
        self._seed = int(self.exchange(str(super().seed()))[0])
        try:
            made = make()
            _check(made)
            said = f"= {_digest(made, told(made))}"
        except (RequestError, CheckpointError, BackendError) as error:
            if self._watch.verdict is not None:
                raise
            said = f"{type(error).__name__} {error}"
        answers = self.exchange(said)
        failed = [(rank, answer) for rank, answer in enumerate(answers) if not answer.startswith("= ")]
        if failed:
            kind, _, text = failed[0][1].partition(" ")
            raise ERRORS[kind](text if len(failed) == self.size else f"rank {failed[0][0]} of {self.size}: {text}")
        if other := [rank for rank, answer in enumerate(answers) if answer != answers[0]]:
            raise RequestError(
                f"rank {other[0]} of {self.size} was asked for something else than rank 0; needed the same request, "
                "model and files everywhere"
            )
        return made

    @contextmanager
    def together(self) -> Iterator[None]:
        """Compute inside the `with`; an error there ends all ranks."""
        self._watch.engaged += 1
        try:
            yield
        except BaseException as error:
            # Of a signal the text is its number.
            stopped = isinstance(error, KeyboardInterrupt)
            self._watch.fail("it was told to stop" if stopped else str(error) or type(error).__name__)
            raise
        finally:
            self._watch.engaged -= 1

    @contextmanager
    def section(self) -> Iterator[None]:
        """A model call inside the `with`, which begins when every rank has come to it."""
        with self.together():
            self.exchange("")
            self._watch.inside = True
            try:
                yield
            finally:
                self._watch.inside = False

    def exchange(self, text: str) -> list[str]:
        """Give a short text to all ranks -> the texts of all, in their order; waits until every rank is here."""
        self._turn += 1
        keys = [f"turn{self._turn}/{rank}" for rank in range(self.size)]
        self._watch.waiting = True
        try:
            self._store.set(keys[self.rank], text)
            start = time.monotonic()
            while not self._store.check(keys):
                self._raise_verdict()
                if (waited := time.monotonic() - start) > OUTSIDE:
                    late = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                    self._watch.fail(f"waited {OUTSIDE:g} s for rank {late[0]}")
                # A model call on a GPU takes tens of milliseconds; loading takes seconds.
                time.sleep(5e-5 if waited < 0.1 else 5e-3)
            answers = [answer.decode() for answer in self._store.multi_get(keys)]
            # All ranks have read the turn before, as they have come to this one.
            self._store.delete_key(f"turn{self._turn - 1}/{self.rank}")
        except RuntimeError as error:
            raise (error if isinstance(error, BackendError) else self._watch.explained(error)) from None
        finally:
            self._watch.waiting = False
        return answers

    def group(self, groups: int) -> Any:
        """The process group of this rank where ranks are in so many groups; made by all when it is first needed."""
        if groups not in self._groups:
            from torch.distributed.device_mesh import init_device_mesh

            grid = (groups, self.size // groups)
            mesh = init_device_mesh(self.device.type, grid, mesh_dim_names=("items", "tokens"))
            self._groups[groups] = mesh.get_group("tokens")
        return self._groups[groups]

    def begun(self) -> None:
        """Note that an exchange of tensors has begun."""
        self._watch.count += 1

    def wait(self, work: Any) -> None:
        """Wait for an exchange of tensors: on a GPU its stream does; raises BackendError where a rank is gone."""
        try:
            while self.device.type == "cpu" and not work.is_completed():
                self._raise_verdict()
                time.sleep(5e-5)
            work.wait()
        except RuntimeError as error:
            raise (error if isinstance(error, BackendError) else self._watch.explained(error)) from None

    def close(self) -> None:
        """Leave the others, at the end of the process."""
        self._watch.close()

    def _raise_verdict(self) -> None:
        if (error := self._watch.error()) is not None:
            raise error


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """Brings together the rows that the ranks of a group have.

    counts: rows of each rank of the group · order (rows,): where in the ranks' rows, each padded to the longest, those
    of the result are; None where they lie as they come.
    """

    ranks: Ranks
    groups: int
    counts: tuple[int, ...]
    order: Tensor | None

    @classmethod
    def of(cls, ranks: Ranks, groups: int, runs: Sequence[Sequence[int]]) -> "Exchange":
        """Make an exchange whose result is put together from runs; of each rank its runs' lengths, in their order.

        The result has the first run of every rank, then the second of every rank, and so on.
        """
        counts = tuple(map(sum, runs))
        rows = [list(torch.arange(n).split(list(of_rank))) for n, of_rank in zip(counts, runs, strict=True)]
        of_runs = zip(*rows, strict=True)
        order = torch.cat([run + rank * max(counts) for of_all in of_runs for rank, run in enumerate(of_all)])
        plain = len(order) == len(counts) * max(counts) and bool((order == torch.arange(len(order))).all())
        return cls(ranks, groups, counts, None if plain else order.to(ranks.device))

    def start(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin with x (n, …), this rank's rows -> a function that waits and returns the rows of all."""
        dist: Any = torch.distributed
        rows, group = max(self.counts), self.ranks.group(self.groups)
        if len(x) < rows:
            x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - len(x)))
        x = x.contiguous()
        out = x.new_empty(rows * len(self.counts), *x.shape[1:])
        # Its name until torch 2.12, and since.
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(out, x, group=group, async_op=True)
        self.ranks.begun()

        def done(kept: Tensor = x) -> Tensor:
            # What is sent is kept until it is.
            self.ranks.wait(work)
            return out if self.order is None else out[self.order]

        return done


def _check(plan: Any) -> None:
    """Raise RequestError for what ranks do not share."""
    if plan.request.cache is not None:
        raise RequestError(
            "both cache and parallel are given; a cache looks at all tokens, of which each rank has some; leave one out"
        )


def _digest(plan: Any, records: Records) -> str:
    """A hash of what decides what the ranks compute and exchange, the content of files and tensors included."""
    request, seen = plan.request, list[Any]()
    for record in records:
        engine = {name: value for name, value in record["engine"].items() if name not in OWN}
        # Each rank has a device of its own, and all one dtype.
        engine["placement"] = engine["placement"].partition(",")[2]
        seen.append(record | {"engine": engine})
    seen += [request.generator, request.latents, request.prompt_embeds, request.negative_prompt_embeds]
    text = json.dumps([*seen, request.output_type, plan.tile], sort_keys=True, default=_content)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(value: torch.Generator | Tensor) -> str:
    """A hash of a generator's state or of a tensor."""
    tensor = value.get_state() if isinstance(value, torch.Generator) else value.detach().cpu()
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()

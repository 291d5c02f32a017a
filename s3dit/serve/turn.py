"""Turn: the transformer goes from job to job, and what they ask of it is computed together.

A job draws in a thread of its own, by the pipeline's ordinary code. Where that calls the transformer, the thread hands
the call over and waits; the engine's thread takes one job after the other up to its next call, computes the calls of
all, and goes on. So at any time one thread computes with the transformer, and no solver or guidance knows of others.
"""

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from s3dit.model.timestep import Modulation
from s3dit.model.transformer import Context, Steering, Transformer
from s3dit.serve.packing import Call


class Turn:
    """The right of one job to use the transformer; `run` is called by the engine, the rest by the job's thread.

    held: whether the job is between `take` and `give` · call: what it asks for now · answer: what `ask` returns.
    """

    def __init__(self, announce: Callable[[], None], on_turn: Callable[[], None]) -> None:
        """announce: tells the engine that the job waits for its turn · on_turn: is called whenever its turn comes."""
        self._announce, self.on_turn = announce, on_turn
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.held = False
        self.call: Call | None = None
        self.answer: Tensor | BaseException | None = None
        self.asked = False

    def take(self) -> None:
        """Wait for the first turn; nothing where it is held. Raises what the engine ends the job with."""
        if not self.held:
            self._announce()
            self._wait()

    def give(self) -> None:
        """Let the transformer go, for something that needs other parts, or for good; nothing where it is not held."""
        if self.held:
            self.held = False
            self._back.release()

    def close(self) -> None:
        """Forget the job, which is over."""
        self._announce = self.on_turn = lambda: None

    def ask(self, call: Call) -> Tensor:
        """Hand a call over and wait for its answer; raises what went wrong with it."""
        self.call, self.asked = call, True
        self._back.release()
        self._wait()
        answer, self.answer = self.answer, None
        assert isinstance(answer, Tensor)
        return answer

    def pause(self) -> None:
        """Let the others have their turns, after a step that asked for nothing."""
        if self.held and not self.asked:
            self._back.release()
            self._wait()
        self.asked = False

    def run(self, error: BaseException | None = None) -> None:
        """Let the job go on until it asks, pauses or gives the transformer back; error: is raised there instead."""
        if error is not None:
            self.answer = error
        self.call = None
        self._go.release()
        self._back.acquire()

    def refuse(self, error: BaseException) -> None:
        """Raise an error in the job where it waits, and do not wait for what it does then."""
        self.answer = error
        self._go.release()

    def _wait(self) -> None:
        self._go.acquire()
        self.held = True
        if isinstance(error := self.answer, BaseException):
            self.answer = None
            raise error
        self.on_turn()


class SharedTransformer(Transformer):
    """The transformer as a job sees it: its calls are handed over where others may be computed beside them.

    It shares every attribute with the pipeline's own. Calls that steer the streams (ControlNet), and those for which
    the module is changed meanwhile (a cache, skipped layers), are computed here and now.
    """

    __slots__ = ("_forwards", "_modulated_at", "_turn")
    _forwards: list[Any]
    _modulated_at: Callable[[Tensor, Context], Modulation]
    _turn: Turn

    @classmethod
    def of(
        cls, transformer: Transformer, turn: Turn, modulated_at: Callable[[Tensor, Context], Modulation]
    ) -> "SharedTransformer":
        """See a transformer as a job does; modulated_at: the modulation of a call that brings none."""
        shared = object.__new__(cls)
        for name, value in {
            "__dict__": vars(transformer),
            "_turn": turn,
            "_modulated_at": modulated_at,
            "_forwards": _forwards(transformer),
        }.items():
            object.__setattr__(shared, name, value)
        return shared

    def forward(
        self, x: Tensor, t: Tensor, context: Context, control: Steering | None = None,
        modulation: Modulation | None = None,
    ) -> Tensor:  # fmt: skip
        """As `Transformer.forward`."""
        if control is not None or "_through" in vars(self) or _forwards(self) != self._forwards:
            return super().forward(x, t, context, control, modulation)
        return self._turn.ask(Call(x, t, context, modulation or self._modulated_at(t, context)))


def _forwards(transformer: Transformer) -> list[Any]:
    """The layers' own forwards, where they have some (compiled ones, and skipped layers while they are)."""
    return [vars(layer).get("forward") for layer in transformer.layers]

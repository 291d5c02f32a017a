"""What an ordinary pipeline has in the place of ranks: one process, which has nobody to ask."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from s3dit.parallel.placement import Form

T = TypeVar("T")
Records = list[dict[str, Any]]


class Alone:
    """One rank that does all itself."""

    rank, size = 0, 1
    form = Form(1, 1)

    def prepare(self, model: nn.Module) -> None:
        """Let a model that was just made compute its share only."""

    def shared(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return what calls a transformer, so that this rank computes its share and gets the whole answer."""
        return run

    def seed(self) -> int:
        """Draw a seed for a request without one, the same for all ranks."""
        return secrets.randbits(32)

    def agreed(self, make: Callable[[], T], told: Callable[[T], Records]) -> T:
        """Return the plan that `make` makes if all ranks made the same, else raise everywhere what it raised on one.

        told: the records of a plan's pictures.
        """
        return make()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Compute inside the `with`; an error there ends all ranks."""
        yield

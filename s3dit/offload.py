"""Residency: which parts of a model are in memory, and when.

*staged* (default): text encoder, transformer and VAE take turns; loading one lets the others go. *resident*: every
part stays once loaded. A part is made by a function that the caller gives, so nothing here knows a model. On a CPU
where file and compute dtype agree, a part is a set of views of the mapped file, and its turn costs no copy.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Mode = Literal["staged", "resident"]


class Residency:
    """Parts by name, made when first asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], nn.Module]], mode: Mode) -> None:
        self.mode = mode
        self._makers = makers
        self._held: dict[str, nn.Module] = {}

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the parts in memory now."""
        return tuple(self._held)

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self._held:
            if self.mode == "staged":
                self.free()
            self._held[name] = self._makers[name]()
        return self._held[name]

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Inside the `with`, parts come in beside those that are held (for previews)."""
        before, self.mode = self.mode, "resident"
        try:
            yield
        finally:
            self.mode = before

    def free(self) -> None:
        """Let every part go."""
        self._held.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

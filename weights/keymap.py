"""Spellings: the names that tensors carry in files that are not the official directory, as a short table.

The official directory's names are the names of our modules. Another spelling is a change of prefix, said once and not
once a layer; which one a file has is told from its keys. `official` gives the same checkpoint under official names.

Source: the key sets of transformers 4.51 (`Qwen3ForCausalLM`: with `model.`) and 5.x (`Qwen3Model`: without), both
seen in model folders. Single-file and adapter spellings are not here yet.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor

from s3dit.weights.container import Checkpoint, CheckpointError, Entry


@dataclass(frozen=True, slots=True)
class Spelling:
    """A prefix of official names and the one that a file has in its place."""

    name: str
    official: str = ""
    stored: str = ""

    def to_official(self, key: str) -> str:
        """The official name of a stored key."""
        return self.official + key[len(self.stored) :] if key.startswith(self.stored) else key


SPELLINGS = (
    Spelling("official"),
    Spelling("bare Qwen3Model", official="model.", stored=""),
)


def detect(keys: Iterable[str], names: Collection[str]) -> Spelling:
    """The spelling under which most keys of a file are among a model's official names; the official one on a draw."""
    keys = list(keys)
    names = frozenset(names)
    return max(SPELLINGS, key=lambda spelling: sum(spelling.to_official(key) in names for key in keys))


def official(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The checkpoint under the official names of the model that has `names`; itself when it is spelled so already."""
    spelling = detect(checkpoint, names)
    return checkpoint if spelling.name == "official" else Respelled(checkpoint, spelling)


class Respelled(Checkpoint):
    """A checkpoint whose keys read in the official spelling."""

    def __init__(self, checkpoint: Checkpoint, spelling: Spelling) -> None:
        self.path = checkpoint.path
        self.metadata = checkpoint.metadata
        self._checkpoint = checkpoint
        self._stored = {spelling.to_official(key): key for key in checkpoint}
        self.schemes = {spelling.to_official(layer): scheme for layer, scheme in checkpoint.schemes.items()}

    def keys(self) -> list[str]:
        """All names, in the order in which the tensors lie on disk."""
        return list(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def entry(self, name: str) -> Entry:
        """Shape, dtype and bytes of one tensor; CheckpointError for an unknown name."""
        return self._checkpoint.entry(self._key(name))

    def load(self, name: str) -> Tensor:
        """One tensor in its stored dtype, as the checkpoint below gives it."""
        return self._checkpoint.load(self._key(name))

    def _key(self, name: str) -> str:
        """The stored key of an official name."""
        if name not in self._stored:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r} among {len(self._stored)}; the files are of another model"
            )
        return self._stored[name]

"""A Record: what was observed, by site, step, call, item, branch and statistic; and its file.

    record.at("layers.3.attention.output", step=2)          # one tensor
    record.select("layers.*.output", branch="positive")     # a part of the record
    record.save("run.safetensors"), Record.load("run.safetensors")

The file is safetensors; its metadata hold the map of tokens and a fingerprint of the transformer's weights, so that a
record is not taken for one of another model.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.loaded_model import LoadedModel
from s3dit.research import trace
from s3dit.research.sites import nearest
from s3dit.research.tokens import ItemTokens
from s3dit.research.trace import pattern_regex
from s3dit.weights.container import Checkpoint

# The key of a record's notes in the metadata of its file.
NOTES = "s3dit.record"
# Numbers of each tensor that a fingerprint reads: all of a full-size model would take as long as loading it.
READ = 1024


class Key(NamedTuple):
    """What a tensor of a record is of; `instrument.Item` explains the fields. statistic: "" where all was kept."""

    site: str
    step: int = 1
    call: int = 0
    item: int = 0
    branch: str = "positive"
    statistic: str = ""

    def __str__(self) -> str:
        return f"{self.site}#{self.step}.{self.call}.{self.item}.{self.branch}" + f".{self.statistic}" * bool(
            self.statistic
        )


class Record(dict[Key, Tensor]):
    """Observed tensors on the CPU, in the order in which they were computed.

    items_seen: the map of tokens of every item that was seen · model: the `fingerprint` of its weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.items_seen: list[ItemTokens] = []
        self.model = ""

    def at(
        self,
        site: str,
        step: int = 1,
        item: int = 0,
        branch: str = "positive",
        call: int = 0,
        statistic: str | None = None,
    ) -> Tensor:
        """Return one tensor. statistic: may be left out where one was kept. Raises RequestError, naming the nearest."""
        found = self.select(site, step=step, item=item, branch=branch, call=call, statistic=statistic)
        if len(found) == 1:
            return next(iter(found.values()))
        wanted = str(Key(site, step, call, item, branch, statistic or ""))
        near = ", ".join(nearest(wanted, map(str, found or self))) or "nothing: the record is empty"
        raise RequestError(f"{wanted} is {len(found)} tensors of this record; needed one; the nearest are {near}")

    def select(
        self,
        pattern: str = "**",
        *,
        step: int | None = None,
        item: int | None = None,
        branch: str | None = None,
        call: int | None = None,
        statistic: str | None = None,
    ) -> Self:
        """Return the part of the record whose sites match a pattern and whose other fields are those given."""
        regex = pattern_regex(pattern)
        wanted = {"step": step, "item": item, "branch": branch, "call": call, "statistic": statistic}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        part = type(self)()
        part.items_seen, part.model = self.items_seen, self.model
        part.update(
            (key, tensor)
            for key, tensor in self.items()
            if regex.fullmatch(key.site) and all(getattr(key, name) == value for name, value in wanted.items())
        )
        return part

    def cosines(self) -> Tensor:
        """Return the cosine of every tensor of the record with every other, (n, n) fp64, in order.

        Of `select("layers.7.output")` those between steps, of `select("layers.*.output", step=3)` those between layers.
        Raises RequestError where their sizes differ.
        """
        sizes = {tuple(tensor.shape) for tensor in self.values()}
        if len(sizes) != 1:
            raise RequestError(f"cosines of tensors of {len(sizes)} shapes; needed one shape; select sites of one kind")
        rows = torch.stack([tensor.double().flatten() for tensor in self.values()])
        rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows @ rows.T

    def apply(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a record of function(tensor) of each."""
        part = self.select()
        part.update((key, function(tensor)) for key, tensor in self.items())
        return part

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, whole or not at all. Raises RequestError."""
        notes = {"keys": [list(key) for key in self], "items": [asdict(item) for item in self.items_seen]}
        named = {str(key): tensor for key, tensor in self.items()}
        trace.save(named, path, {NOTES: json.dumps({**notes, "model": self.model})})

    @classmethod
    def load(cls, path: str | Path, model: str | None = None) -> Self:
        """Read a record back; raises RequestError where it is none, or of another model than the one identified."""
        named, metadata = trace.load(path)
        record = cls()
        try:
            notes: Any = json.loads(metadata[NOTES])
            keys = [Key(*key) for key in notes["keys"]]
            record.items_seen, record.model = [_item(each) for each in notes["items"]], str(notes["model"])
            record.update(zip(keys, named.values(), strict=True))
        except (KeyError, TypeError, ValueError):
            raise RequestError(f"{path}: is no record of sites; needed a file that `Record.save` wrote") from None
        if model is not None and model != record.model:
            raise RequestError(f"{path}: is of model {record.model[:12]}, this one is {model[:12]}; needed one model")
        return record


def _item(data: dict[str, Any]) -> ItemTokens:
    """An ItemTokens from JSON."""
    places = tuple(None if place is None else (int(place[0]), int(place[1])) for place in data["places"])
    rows = {name: tuple(of_stream) for name, of_stream in data["rows"].items()}
    rest = {name: data[name] for name in ("item", "branch", "prompt", "starts")}
    references = tuple((rows, columns) for rows, columns in data.get("references", ()))
    return ItemTokens(
        grid=tuple(data["grid"]), kinds=tuple(data["kinds"]), places=places, rows=rows, references=references, **rest
    )


# Of checkpoints that were looked at: some containers compute tensors, or read them whole.
_fingerprints: WeakKeyDictionary[Checkpoint, str] = WeakKeyDictionary()


def fingerprint(pipe: LoadedModel) -> str:
    """Return what identifies the transformer's weights: a SHA-256 of names, shapes, dtypes and tensors' beginnings."""
    checkpoint = pipe.parts.checkpoints["transformer"]
    if checkpoint in _fingerprints:
        return _fingerprints[checkpoint]
    digest = hashlib.sha256()
    for name in sorted(checkpoint):
        tensor = checkpoint.load(name)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        start = tensor.flatten()[:READ].contiguous() if tensor.is_contiguous() else tensor[:1].flatten()[:READ].clone()
        digest.update(start.view(torch.uint8).numpy().tobytes())
    checkpoint.release()
    return _fingerprints.setdefault(checkpoint, digest.hexdigest())

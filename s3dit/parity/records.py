"""Stages on disk: written as they come, kept as safetensors with what they are of, and read back one by one."""

import hashlib
import json
import os
import platform
import secrets
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from s3dit import __version__
from s3dit.errors import RequestError
from s3dit.pipeline import Pipeline
from s3dit.plan import Plan
from s3dit.request import IMAGES
from s3dit.research.trace import ORDER
from s3dit.weights.json_files import parse_json

# dtype -> its name in a header of safetensors
DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.uint8: "U8",
}  # fmt: skip
# Fields of a request whose pictures are told by their hashes, whatever their files are called.
BY_HASH = (*IMAGES, "reference", "control")


class Spool(MutableMapping[str, Tensor]):
    """Stages in a file that vanishes with the process, each read back when it is asked for: no matter how many."""

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        tensor = tensor.detach().to("cpu").contiguous()
        self._places[name] = self._file.seek(0, os.SEEK_END), tensor.dtype, tensor.shape
        self._file.write(_bytes(tensor))

    def __getitem__(self, name: str) -> Tensor:
        start, dtype, shape = self._places[name]
        self._file.seek(start)
        data = bytearray(self._file.read(shape.numel() * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def save(self, path: Path, notes: Mapping[str, str]) -> None:
        """Write the stages as safetensors, whole or not at all; raises RequestError."""
        header: dict[str, Any] = {"__metadata__": {**notes, ORDER: json.dumps([*self])}}
        end = 0
        for name, (_, dtype, shape) in self._places.items():
            start, end = end, end + shape.numel() * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        partial = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            try:
                with open(partial, "wb") as file:
                    file.write(len(text).to_bytes(8, "little") + text)
                    for name in self:
                        file.write(_bytes(self[name]))
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise RequestError(f"{path}: cannot be written ({error}); needed a writable folder with room") from None


def _bytes(tensor: Tensor) -> Any:
    """A contiguous tensor as it lies in memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


class Stored(Mapping[str, Tensor]):
    """A record on disk, and its notes; raises RequestError where it is none."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
            self.notes = dict(self._file.metadata() or {})
            names = parse_json(self.notes.pop(ORDER, "null"))
            if not isinstance(names, list) or sorted(map(str, names)) != sorted(self._file.keys()):
                raise RequestError(f"{path}: is no record of stages; needed a file that s3dit parity wrote")
            self._names: list[str] = names
        except (OSError, SafetensorError) as error:
            raise RequestError(f"{path}: cannot be read ({error}); needed a file that s3dit parity wrote") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def task_notes(pipe: Pipeline, plan: Plan) -> dict[str, str]:
    """What two records must share to be comparable: what is drawn, with what adapters; not by whom, nor where."""
    request = plan.request
    said = {name: value for name, value in request.to_json().items() if name not in BY_HASH}
    hashes = [start.hashes for start in plan.start_images]
    references = [[reference.key for reference in row] for row in plan.references]
    controls = [
        {name: value for name, value in given.control.to_json().items() if name in ("strength", "start", "end", "rule")}
        | {"pictures": [{name: p.sha256 for name, p in each.items()} for each in given.pictures]}
        for given in plan.controls
    ]
    latents = [hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in request.latents or ()]
    adapters = [{name: value for name, value in each.items() if name != "file"} for each in pipe.lora.records()]
    said |= {"seed": request.seeds(), "shift": request.shift}
    more: dict[str, Any] = {
        "images": hashes,
        "references": references,
        "controls": controls,
        "latents": latents,
        "adapters": adapters,
    }
    said |= {name: value for name, value in more.items() if any(value)}
    return {"task": json.dumps(said, ensure_ascii=False, default=str), "lengths": json.dumps(lengths_of(plan))}


def lengths_of(plan: Plan) -> list[int]:
    """Tokens of every item's prompt, the negative ones behind; none for the segments around references."""
    whole = all(len(caption) == 1 for caption in plan.captions)
    return [len(caption[0]) for caption in plan.captions] if whole else []


def side_notes(side: str, dtype: str, device: str, **more: str) -> dict[str, str]:
    """Who computed a record, and on what: engine, versions, dtype, device, threads."""
    versions = {"s3dit": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if side == "diffusers":
        import diffusers
        import transformers

        versions |= {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    name = platform.processor() or platform.machine()
    machine = {"cpu": name, "instructions": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    told = {"versions": json.dumps(versions), "machine": json.dumps(machine)}
    return {"side": side, "dtype": dtype, "device": device, **told, **more}


def check_task(path: Path, found: Mapping[str, str], needed: Mapping[str, str]) -> None:
    """Raise RequestError unless a record is of the task that is needed."""
    one, other = (json.loads(notes.get("task", "{}")) for notes in (found, needed))
    for key in dict.fromkeys([*other, *one]):
        if one.get(key) != other.get(key):
            raise RequestError(
                f"{path}: recorded with {key} {one.get(key)}, needed {other.get(key)}; give the options that it was "
                "recorded with"
            )

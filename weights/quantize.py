"""Quantizing a model directory into a smaller one, layer by layer; and the formats that such a directory is run in.

The weights are streamed: each tensor is read, encoded and written before the next, so a model of any size needs the
memory of its largest layer a few times over. What is not encoded is copied as it is stored; parts that are not
quantized are hard links where the file system has them. The new directory appears whole, under its name, or not at all.

The metadata of each file names the format, with a hash of the source; dtypes show which layers are in it. Layers that
Z-Image is sensitive to are not quantized: embedders, modulation and the final layer, 2 % of the numbers, and the last
layers of the text encoder.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from s3dit.errors import BackendError, CheckpointError
from s3dit.kernels.scheme import Scheme
from s3dit.kernels.schemes import SCHEMES
from s3dit.weights.assign import encode_weight
from s3dit.weights.checkpoint import Checkpoint, open_checkpoint
from s3dit.weights.container import FLOATS
from s3dit.weights.formats import FINER_SCHEMES
from s3dit.weights.model_folder import building, left_out
from s3dit.weights.safetensors_dir import SUFFIX, write_safetensors

# Layers that may be of a number format, by part, under official names.
QUANTIZABLE = {
    "transformer": re.compile(
        r"()(layers|noise_refiner|context_refiner)\.(\d+)\.(attention\.to_([qkv]|out\.0)|feed_forward\.w[123])"
    ),
    "text_encoder": re.compile(r"(model\.)?(layers)\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"),
}
# What attention hands on: a sixth of the weights, and half of the error of a 4-bit model. They are given 8 bits.
SENSITIVE_LAYERS = re.compile(r"\.(to_v|to_out\.0|v_proj|o_proj)$")
# The last layers of the text encoder are not quantized, at most this many and at most a quarter; the very last is
# never computed.
LAST_LAYERS_KEPT = 8
# Bytes of one file of the new directory, gathered in memory; read before the source's map is let go; hashed at a time.
SHARD_BYTES, MAPPED_BYTES, HASH_BYTES = 1 << 30, 1 << 29, 1 << 24
# Stands in the headers for the hash of the source until that is known.
UNKNOWN = "sha256:" + "-" * 64
# Bytes of free disk that are needed besides the weights.
SPARE = 64 << 20
STEM = {"text_encoder": "model"}


def scheme_named(name: str) -> Scheme:
    """Return the number format of a name that a user gave; raises BackendError."""
    if name not in SCHEMES:
        raise BackendError(f"number format is {name!r}; needed one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def schemes_for(part: str, checkpoint: Checkpoint, asked: str | None) -> dict[str, Scheme]:
    """Return the number formats that a part's layers are to be run in, under the checkpoint's names.

    They are the formats that it is stored in, or for floats the format `asked`, if any. Raises CheckpointError where it
    is stored in another format than was asked for, and BackendError for a format that does not exist.
    """
    wanted = None if asked is None else scheme_named(asked)
    stored = named(checkpoint.schemes)
    if wanted is not None and stored not in ("", wanted.name):
        raise CheckpointError(
            f"{checkpoint.path}: is {stored} already, {wanted.name} was asked for; leave the choice out, or take "
            "the unquantized files"
        )
    if stored or wanted is None:
        return dict(checkpoint.schemes)
    return quantizable_layers(
        part, (name.removesuffix(".weight") for name in checkpoint if name.endswith(".weight")), wanted
    )


def named(schemes: Mapping[str, Scheme]) -> str:
    """Return the name of a part whose layers are in these formats: the most frequent; empty for floats."""
    counts = Counter(scheme.name for scheme in schemes.values())
    return max(counts, key=counts.__getitem__, default="")


def quantizable_layers(part: str, names: Iterable[str], scheme: Scheme) -> dict[str, Scheme]:
    """Return the layers of a part that can be quantized, each with its scheme; none for a small part."""
    pattern = QUANTIZABLE.get(part)
    matches = {name: match for name in names if pattern is not None and (match := pattern.fullmatch(name))}
    kept = 0
    count = 1 + max((int(match[3]) for match in matches.values() if match[2] == "layers"), default=0)
    if part == "text_encoder":
        kept = 1 + min(LAST_LAYERS_KEPT, count // 4)
    finer = SCHEMES[FINER_SCHEMES.get(scheme.name, scheme.name)]
    return {
        name: finer if SENSITIVE_LAYERS.search(name) else scheme
        for name, match in matches.items()
        if not kept or int(match[3]) < count - kept
    }


def quantize(
    source: Path,
    target: Path,
    schemes: Mapping[str, Scheme],
    *,
    version: str,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the model directory `source` to `target`, each part named in `schemes` in that number format.

    version: of s3dit, for the metadata. force: replace what is at `target`. progress: called with the stored bytes of
    each tensor that was read. Raises CheckpointError before anything is written where source or target are unfit or the
    disk too small, and leaves nothing behind when it is interrupted.
    """
    checkpoints = check(source, target, schemes, force=force)
    target = target.resolve()
    with building(target) as built:
        shutil.copytree(source, built, copy_function=_link, ignore=_ignored(source, schemes))
        for part, checkpoint in checkpoints.items():
            try:
                _write(checkpoint, part, built / part, schemes[part], version, progress or (lambda count: None))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{target}: {part} could not be written ({error}); nothing was left there; make room and try again"
                ) from None


def check(source: Path, target: Path, schemes: Mapping[str, Scheme], *, force: bool = False) -> dict[str, Checkpoint]:
    """Raise the CheckpointError that `quantize` would raise before it writes; return the checkpoints of the parts."""
    if not source.is_dir():
        raise CheckpointError(f"{source}: not a folder; needed a model in the official directory layout")
    check_target(source, target, force=force)
    real = target.resolve()
    checkpoints = {part: open_checkpoint(source / part) for part in schemes}
    needed = SPARE
    for part, checkpoint in checkpoints.items():
        stored = named(checkpoint.schemes)
        not_floats = [name for name in checkpoint if checkpoint.entry(name).dtype not in FLOATS]
        if stored or not_floats:
            what = stored or f"not plain floats ({not_floats[0]})"
            raise CheckpointError(f"{checkpoint.path}: is {what} already; needed the unquantized files")
        needed += _quantized_size(checkpoint, schemes_for(part, checkpoint, schemes[part].name))
    others = (path for path in source.rglob("*") if path.is_file() and path.relative_to(source).parts[0] not in schemes)
    # Links take no room, but a file system without them would copy.
    needed += sum(path.stat().st_size for path in others if path.stat().st_dev != real.parent.stat().st_dev)
    check_room(target, needed)
    return checkpoints


def check_target(source: Path, target: Path, *, force: bool = False) -> None:
    """Raise CheckpointError for a directory that cannot be made, or not be replaced."""
    real, home = target.resolve(), source.resolve()
    if real.is_relative_to(home) or home.is_relative_to(real):
        raise CheckpointError(f"{target}: overlaps with the source {source}; needed a folder beside it")
    if os.path.lexists(target) and not force:
        raise CheckpointError(f"{target}: exists; choose another name, or replace it with --force")
    if target.exists() and not any((target / part).is_dir() for part in ("transformer", *STEM, "vae")):
        raise CheckpointError(f"{target}: is no model directory, so it is not replaced; choose another name")
    if not real.parent.is_dir() or not os.access(real.parent, os.W_OK):
        raise CheckpointError(f"{real.parent}: not a writable folder; needed one for {real.name}; make it, or choose")


def check_room(target: Path, needed: int) -> None:
    """Raise CheckpointError where the disk of `target` has less than `needed` bytes free."""
    folder = target.resolve().parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: {free / 1e9:.1f} GB free; needed {needed / 1e9:.1f} GB for {target.name}; make room, or "
            "choose another disk"
        )


def _quantized_size(checkpoint: Checkpoint, quantized: Mapping[str, Scheme]) -> int:
    """Return the bytes of a checkpoint once quantized; raises CheckpointError for widths that do not fit."""
    total = 0
    for name in checkpoint:
        entry = checkpoint.entry(name)
        scheme = quantized.get(name.removesuffix(".weight"))
        if scheme is None:
            total += entry.nbytes
            continue
        try:
            out, in_ = entry.shape
            parts = scheme.spec(out, in_).values()
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {name} {list(entry.shape)}: {error}") from None
        total += sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in parts)
    return total


def _ignored(source: Path, schemes: Collection[str]) -> Callable[[str, list[str]], list[str]]:
    """Return copytree's `ignore`: the weights of parts that are written anew, and what `left_out` ignores."""
    foreign = left_out(source)

    def ignore(folder: str, names: list[str]) -> list[str]:
        anew = Path(folder).name in schemes and Path(folder).parent == source
        weights = (SUFFIX, f"{SUFFIX}.index.json")
        return [*foreign(folder, names), *(name for name in names if anew and name.endswith(weights))]

    return ignore


def _link(source: str, target: str) -> None:
    """Make a hard link to a file of weights, where that is possible; copy any other file, which a user may edit."""
    real = os.path.realpath(source)
    try:
        if not source.endswith(SUFFIX):
            raise OSError
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def _write(
    checkpoint: Checkpoint, part: str, folder: Path, scheme: Scheme, version: str, progress: Callable[[int], None]
) -> None:
    """Stream a part into shards of its folder, and write the index that names them."""
    quantized = schemes_for(part, checkpoint, scheme.name)
    kept = sorted(name for name in checkpoint if name.removesuffix(".weight") not in quantized)
    skipped = json.dumps(kept)
    metadata = {"format": "pt", "scheme": scheme.name, "source": UNKNOWN, "skipped": skipped, "s3dit": version}
    shards = Shards(folder, STEM.get(part, "diffusion_pytorch_model"), metadata)
    digest = hashlib.sha256()
    read = 0
    for name in checkpoint.keys():  # noqa: SIM118
        tensor = checkpoint.load(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        _hash(digest, tensor)
        layer = name.removesuffix(".weight")
        if layer in quantized:
            parts = encode_weight(quantized[layer], tensor, name, checkpoint)
            shards.add({f"{layer}.{leaf}": value for leaf, value in parts.items()})
        else:
            # A view would hold the whole map of the source.
            shards.add({name: tensor.clone()})
        progress(tensor.nbytes)
        read += tensor.nbytes
        if read > MAPPED_BYTES:
            # Mapped pages count as memory: with the last tensor that looks at it the map goes, and a new one is made.
            del tensor
            checkpoint.release()
            read = 0
    # What was read is of one file only if that one is still there.
    checkpoint.check()
    shards.close(f"sha256:{digest.hexdigest()}")


def _hash(digest: "hashlib._Hash", tensor: Tensor) -> None:
    """Feed the bytes of a tensor to a digest, a chunk at a time."""
    for run in tensor.contiguous().view(-1).view(torch.uint8).split(HASH_BYTES):
        digest.update(run.numpy())


class Shards:
    """Tensors gathered into files of at most SHARD_BYTES, and the index that names them."""

    def __init__(self, folder: Path, stem: str, metadata: dict[str, str]) -> None:
        self.folder, self.stem, self.metadata = folder, stem, metadata
        self._tensors: dict[str, Tensor] = {}
        self._held = 0
        self._files: list[list[str]] = []
        self._total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Add the tensors of a layer; a file that is full is written."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._held and self._held + size > SHARD_BYTES:
            self._flush()
        self._tensors |= tensors
        self._held, self._total = self._held + size, self._total + size

    def close(self, source: str) -> None:
        """Write the last file and the index, and the hash of the source, known only now, into every header."""
        self._flush()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._files, 1):
            file = self._file(i).rename(self.folder / f"{self.stem}-{i:05d}-of-{count:05d}{SUFFIX}")
            weight_map |= dict.fromkeys(names, file.name)
            with file.open("r+b") as opened:
                header = opened.read(int.from_bytes(opened.read(8), "little"))
                opened.seek(8 + header.index(UNKNOWN.encode()))
                opened.write(source.encode())
        data = {"metadata": self.metadata | {"source": source, "total_size": self._total}, "weight_map": weight_map}
        (self.folder / f"{self.stem}{SUFFIX}.index.json").write_text(json.dumps(data, indent=2))

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.partial"

    def _flush(self) -> None:
        self._files.append(list(self._tensors))
        write_safetensors(self._tensors, self._file(len(self._files)), self.metadata)
        self._tensors, self._held = {}, 0

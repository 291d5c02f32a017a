"""Assigning: every tensor of a checkpoint becomes the parameter of its name, strictly.

The model is on the meta device under the official names, so nothing is allocated twice. Names, shapes and dtypes are
all checked from headers before the first tensor is read; a model is either filled or unchanged.

Tensors are read in their order on disk. Where dtype and device agree the parameter becomes a view of the mapped file
and costs no memory; else it is cast as it is read, and its pages are given back, so only a single stored tensor is in
use at a time: 24.6 GB of fp32 shards become 12.3 GB of bf16 without both being held.

A layer of a number format (it has a `scheme`) takes the parts of a quantized file as they are stored; where the file
has a float weight instead, that is encoded as it is read, in its stored dtype and on the device.

Values are not checked, except by an encoder: a scan for NaN would read the whole file once more.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from s3dit.errors import CheckpointError
from s3dit.kernels.scheme import Scheme
from s3dit.weights.container import FLOATS, Checkpoint, Entry, dtype_name
from s3dit.weights.keymap import official
from s3dit.weights.mapped_file import give_back
from s3dit.weights.repack import unpadded


def assign(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device = "cpu",
    unused: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fill a model on the meta device from a checkpoint in any spelling that `keymap` knows, strictly.

    dtype: of the parameters afterwards, floating; None keeps what is stored. unused: glob patterns of official names
    that are never read; what the model has under them stays on meta. progress: called with the stored bytes of each
    tensor that was read.
    Raises CheckpointError for tensors that are missing, unexpected, of a wrong shape or of a wrong dtype (fp32, bf16 or
    fp16, or what the scheme of a layer says), and for NaN in a weight that is to be encoded.
    """
    checkpoint, needed = _verified(model, checkpoint, unused)
    formats = schemes(model)
    for name in needed:
        layer, _, leaf = name.rpartition(".")
        scheme = formats.get(layer)
        if scheme is not None and leaf == "weight" and checkpoint.entry(name).dtype in FLOATS:
            stored = checkpoint.load(name)
            for part, tensor in encode_weight(scheme, stored.to(device), name, checkpoint).items():
                _set_tensor(model, f"{layer}.{part}", tensor)
            give_back(stored)
        else:
            stays, stored = scheme is not None and leaf != "bias", checkpoint.load(name)
            tensor = stored.to(device=device, dtype=None if stays else dtype)
            _set_tensor(model, name, tensor)
            if tensor is not stored:
                give_back(stored)
        # None is held while the next is read.
        del stored
        if progress is not None:
            progress(checkpoint.entry(name).nbytes)
    checkpoint.release()


def fitted(checkpoint: Checkpoint, parameters: Mapping[str, Tensor]) -> Checkpoint:
    """Return the checkpoint under official names and without padding, for a model whose state dict is `parameters`."""
    return unpadded(official(checkpoint, parameters), parameters)


def verify(model: nn.Module, checkpoint: Checkpoint, unused: Sequence[str] = ()) -> None:
    """Raise the CheckpointError that `assign` would raise, from headers alone: no tensor is read."""
    _verified(model, checkpoint, unused)


def pending(model: nn.Module, checkpoint: Checkpoint, unused: Sequence[str] = ()) -> int:
    """Return the stored bytes that `assign` is going to read, the sum of its `progress`; raises as `verify` does."""
    checkpoint, needed = _verified(model, checkpoint, unused)
    return sum(checkpoint.entry(name).nbytes for name in needed)


def _verified(model: nn.Module, checkpoint: Checkpoint, unused: Sequence[str]) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint under official names, and the names to read in order; raises CheckpointError."""
    parameters = model.state_dict(keep_vars=True)
    checkpoint = fitted(checkpoint, parameters)
    needs = _check(model, checkpoint, parameters, unused)
    return checkpoint, [name for name in checkpoint if name in needs and not _matches(name, unused)]


def encode_weight(scheme: Scheme, weight: Tensor, name: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the parts of a stored weight (out, in) in a scheme.

    name, checkpoint: for the error. Raises CheckpointError where the scheme is only read, or cannot take the weight.
    """
    if scheme.encode is None:
        raise CheckpointError(
            f"{checkpoint.path}: {name} is a plain float; {scheme.name} is only read, from files of its own producer; "
            "needed one that s3dit writes"
        )
    try:
        return scheme.encode(weight)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {name} {error}") from None


def schemes(model: nn.Module) -> dict[str, Scheme]:
    """Return the number formats of a model's layers, by the layer's name."""
    formats = ((name, getattr(module, "scheme", None)) for name, module in model.named_modules())
    return {name: scheme for name, scheme in formats if isinstance(scheme, Scheme)}


def _needs(model: nn.Module, parameters: dict[str, Tensor], stored: dict[str, Entry]) -> dict[str, Entry]:
    """Return what the model needs of a file, by name: a quantized layer its parts, or a float weight if stored.

    The dtype is "float" where any of FLOATS will do; bytes are not known.
    """
    formats = schemes(model)
    needs = {}
    for name, parameter in parameters.items():
        layer, _, leaf = name.rpartition(".")
        weight = stored.get(f"{layer}.weight")
        if layer not in formats or leaf == "bias":
            needs[name] = Entry(tuple(parameter.shape), "float", 0)
        elif weight is None or weight.dtype not in FLOATS:
            needs[name] = Entry(tuple(parameter.shape), dtype_name(parameter.dtype), 0)
        elif leaf == "weight":
            module = model.get_submodule(layer)
            needs[name] = Entry((module.out_features, module.in_features), "float", 0)  # type: ignore[arg-type]
    return needs


def _check(
    model: nn.Module, checkpoint: Checkpoint, parameters: dict[str, Tensor], unused: Sequence[str]
) -> dict[str, Entry]:
    """Check a checkpoint in official spelling against a model's names, shapes and dtypes; raises CheckpointError."""
    stored = {name: checkpoint.entry(name) for name in checkpoint}
    # What is never read is needed in no format, and may be in any: a quantized embedding, say, is read by rows.
    left = {layer for layer in checkpoint.formats if _matches(f"{layer}.weight", unused)}
    needs = {
        name: need for name, need in _needs(model, parameters, stored).items() if name.rpartition(".")[0] not in left
    }
    missing = [name for name in needs if name not in stored and not _matches(name, unused)]
    unexpected = [name for name in stored if name not in needs and not _matches(name, unused)]
    # The shape of a tensor that is never read, or read by rows, still tells whether the file is of this model.
    pairs = [(name, entry, needs[name]) for name, entry in stored.items() if name in needs]
    shapes = [
        f"{name} {list(entry.shape)}, needed {list(need.shape)}"
        for name, entry, need in pairs
        if entry.shape != need.shape
    ]
    floats = [f"{name} {e.dtype}" for name, e, need in pairs if need.dtype == "float" and e.dtype not in FLOATS]
    codes = [
        f"{name} {entry.dtype}, needed {need.dtype}"
        for name, entry, need in pairs
        if need.dtype not in ("float", entry.dtype)
    ]
    wrong = [
        *_count(missing, "missing"),
        *_count(unexpected, "unexpected"),
        *_count(shapes, "of a wrong shape"),
        *_count(floats, "not in float32, bfloat16 or float16"),
        *_count(codes, "of a wrong dtype"),
    ]
    if wrong:
        quantized = any(need.dtype != "float" for need in needs.values())
        remedy = "or quantize them again with `s3dit quantize`" if quantized else "unquantized"
        raise CheckpointError(
            f"{checkpoint.path}: not the weights of this model: {'; '.join(wrong)}; take weights and config.json from "
            f"the same model, {remedy}"
        )
    return needs


def _count(names: Sequence[str], what: str) -> Iterable[str]:
    """Yield a phrase for a kind of fault, with the number of tensors and the first ten, where there are any."""
    if names:
        yield f"{len(names)} tensors {what} ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer to this very tensor; parameters require no gradient."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor)

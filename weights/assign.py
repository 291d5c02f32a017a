"""Give every tensor of a checkpoint to the parameter of its name, and account for every name on both sides.

The model stands on the meta device under the official names, so nothing is allocated twice. Everything that can be
wrong is found from headers before the first tensor is read; a model is either filled or untouched.

Tensors go one by one, in their order on disk. Where dtype and device agree the parameter becomes a view of the mapped
file and costs no memory; else it is cast on the way in, and only one stored tensor is looked at at a time. Mapped pages
are the kernel's to drop, and a shard's map goes when the next one is opened: 24.6 GB of fp32 shards become 12.3 GB of
bf16 without both being held.

Values are not looked at here: a scan for NaN would read the whole file once more.
"""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from s3dit.weights.container import Checkpoint, CheckpointError
from s3dit.weights.keymap import official

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def assign(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device = "cpu",
    unused: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fill a model on the meta device from a checkpoint in any spelling that keymap knows, strictly.

    dtype: of the parameters afterwards, floating; None keeps what is stored. unused: glob patterns of official names
    that are never read; what the model has under them stays on meta. progress: called with the stored bytes of each
    tensor that was read.
    Raises CheckpointError for tensors that are missing, unexpected, of a wrong shape or not fp32, bf16 or fp16.
    """
    checkpoint, needed = _verified(model, checkpoint, unused)
    for name in needed:
        tensor = checkpoint.load(name).to(device=device, dtype=dtype)
        _put(model, name, tensor)
        if progress is not None:
            progress(checkpoint.entry(name).nbytes)


def verify(model: nn.Module, checkpoint: Checkpoint, unused: Sequence[str] = ()) -> None:
    """Raise the CheckpointError that `assign` would raise, from headers alone: no tensor is read."""
    _verified(model, checkpoint, unused)


def pending(model: nn.Module, checkpoint: Checkpoint, unused: Sequence[str] = ()) -> int:
    """The stored bytes that `assign` is going to read, what its `progress` adds up to; verifies first."""
    checkpoint, needed = _verified(model, checkpoint, unused)
    return sum(checkpoint.entry(name).nbytes for name in needed)


def _verified(model: nn.Module, checkpoint: Checkpoint, unused: Sequence[str]) -> tuple[Checkpoint, list[str]]:
    """The checkpoint under official names, and the names to read in their order on disk; CheckpointError if unfit."""
    homes = model.state_dict(keep_vars=True)
    checkpoint = official(checkpoint, homes)
    _check(checkpoint, homes, unused)
    return checkpoint, [name for name in checkpoint if name in homes and not _matches(name, unused)]


def _check(checkpoint: Checkpoint, homes: dict[str, Tensor], unused: Sequence[str]) -> None:
    """Hold a checkpoint in official spelling to a model's names and shapes; one CheckpointError for all trouble."""
    stored = {name: checkpoint.entry(name) for name in checkpoint}
    missing = [name for name in homes if name not in stored and not _matches(name, unused)]
    unexpected = [name for name in stored if name not in homes and not _matches(name, unused)]
    # The shape of a tensor that is never read, or read by rows, still tells whether the file is of this model.
    shapes = [
        f"{name} {list(entry.shape)}, needed {list(homes[name].shape)}"
        for name, entry in stored.items()
        if name in homes and entry.shape != tuple(homes[name].shape)
    ]
    dtypes = [
        f"{name} {str(entry.dtype).removeprefix('torch.')}"
        for name, entry in stored.items()
        if name in homes and entry.dtype not in FLOATS
    ]
    wrong = [
        *_count(missing, "missing"),
        *_count(unexpected, "unexpected"),
        *_count(shapes, "of a wrong shape"),
        *_count(dtypes, "not in float32, bfloat16 or float16"),
    ]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path}: not the weights of this model: {'; '.join(wrong)}; take weights and config.json from "
            "the same model, unquantized"
        )


def _count(names: Sequence[str], what: str) -> Iterable[str]:
    """One phrase for one kind of trouble: how many, and the first ten."""
    if names:
        yield f"{len(names)} tensors {what} ({', '.join(names[:10])}{', …' if len(names) > 10 else ''})"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a parameter or buffer be this very tensor; parameters ask for no gradient."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor)

"""Number formats as files store them: which layers of a checkpoint are quantized, how, and their parts as Schemes say.

`recognized` looks at a checkpoint's names, dtypes and metadata, never at the file's name, and gives it back with its
`schemes`. A producer whose tensors are not the parts that a Scheme names is shown through a view that makes them so,
one layer at a time, when they are asked for.

The names of layers are the file's own here; `keymap` turns them into official ones afterwards.
"""

import torch

from s3dit.kernels.linear import SCHEMES
from s3dit.kernels.scheme import Scheme
from s3dit.weights.container import FLOATS, Checkpoint, CheckpointError

# Layers that are too sensitive for a format are given another one, whose weights are int8.
FINER = {"int4": "int8-weights"}


def recognized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the number formats of its layers; raises CheckpointError for a format that is not known."""
    if "scheme" in checkpoint.metadata:
        checkpoint.schemes = _own(checkpoint)
    return checkpoint


def _own(checkpoint: Checkpoint) -> dict[str, Scheme]:
    """The layers of a file that `s3dit quantize` wrote: metadata says the format, dtypes which layers are in it."""
    name = checkpoint.metadata["scheme"]
    if name not in SCHEMES:
        raise CheckpointError(
            f"{checkpoint.path}: its metadata says scheme {name!r}; needed {', '.join(SCHEMES)} or plain floats; take "
            "the unquantized files, or a newer s3dit"
        )
    finer = SCHEMES[FINER.get(name, name)]
    dtypes = {key.removesuffix(".weight"): checkpoint.entry(key).dtype for key in checkpoint if key.endswith(".weight")}
    return {
        layer: finer if dtype == torch.int8 else SCHEMES[name] for layer, dtype in dtypes.items() if dtype not in FLOATS
    }

"""S3-DiT (Z-Image) inference from scratch: `Pipeline.load(...)`, then `pipe("a red fox", seed=7).save("fox.png")`.

Importing this package does not import torch; the names below load on first use.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3dit.control import Control as Control
    from s3dit.errors import BackendError as BackendError
    from s3dit.errors import CheckpointError as CheckpointError
    from s3dit.errors import RequestError as RequestError
    from s3dit.pipeline import Pipeline as Pipeline
    from s3dit.plan import Plan as Plan
    from s3dit.region import Region as Region
    from s3dit.request import Request as Request
    from s3dit.result import Result as Result
    from s3dit.sampling.step import Step as Step

__version__ = "0.1.0"
__all__ = [
    "BackendError", "CheckpointError", "Control", "Pipeline", "Plan", "Region", "Request", "RequestError", "Result",
    "Step", "__version__",
]  # fmt: skip

# The links to ../kernels and ../weights in a checkout are plain files where a system has none (Windows): then the rooms
# are found beside this folder.
if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(os.path.abspath(__path__[0])))

# Fresh activations of tens of megabytes cost more in 4 KiB page faults than in arithmetic on a CPU; torch reads this
# once, at its first allocation, and asks the kernel for huge pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


# The room of each name.
_ROOMS = {
    "BackendError": "errors", "CheckpointError": "errors", "RequestError": "errors", "Control": "control",
    "Pipeline": "pipeline", "Plan": "plan", "Region": "region", "Request": "request", "Result": "result",
    "Step": "sampling.solvers",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import one of the names above."""
    if name not in _ROOMS:
        raise AttributeError(f"module 's3dit' has no attribute {name!r}")
    return getattr(import_module(f"s3dit.{_ROOMS[name]}"), name)

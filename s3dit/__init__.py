"""S3-DiT (Z-Image) inference from scratch: `Pipeline.load(...)`, then `pipe(prompt=...)`.

Importing this package does not import torch; the names below load on first use.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3dit.control import Control
    from s3dit.errors import RequestError
    from s3dit.pipeline import Pipeline
    from s3dit.request import Request, Result

__version__ = "0.1.0"
__all__ = ["Control", "Pipeline", "Request", "RequestError", "Result", "__version__"]

# Fresh activations of tens of megabytes cost more in 4 KiB page faults than in arithmetic on a CPU; torch reads this
# once, at its first allocation, and asks the kernel for huge pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from s3dit.pipeline import Pipeline

        return Pipeline
    if name == "Control":
        from s3dit.control import Control

        return Control
    if name in ("Request", "RequestError", "Result"):
        from s3dit import request

        return getattr(request, name)
    raise AttributeError(f"module 's3dit' has no attribute {name!r}")

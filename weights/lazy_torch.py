"""torch, imported at its first use: headers are read and number formats are recognized without it.

Importing torch takes a second, of which `s3dit inspect` needs nothing. `from s3dit.weights.lazy_torch import torch`
gives the module to a type checker, and at run time an object whose attributes are those of the module.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["torch"]

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        """Stands for the module until an attribute of it is used."""

        def __getattr__(self, name: str) -> Any:
            import torch as module

            return getattr(module, name)

    torch = _Torch()

"""Without a GPU, Triton kernels are tested in its interpreter: switched on before the engine is imported."""

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton
    from triton.runtime import interpreter

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        _patch = interpreter._patch_lang_tensor

        def _patch_lang_tensor(tensor, scope):
            """A run-time bound of a loop is an array of one number, which numpy 2.4 no longer takes for an index."""
            _patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

        interpreter._patch_lang_tensor = _patch_lang_tensor

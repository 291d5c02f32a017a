"""The official repository's transformer in the place of diffusers'."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.errors import RequestError


class Official(nn.Module):
    """The official repository's transformer behind the call that diffusers' pipeline makes."""

    def __init__(self, checkout: Path, folder: Path, dtype: torch.dtype) -> None:
        """checkout: of Tongyi-MAI/Z-Image · folder: of the weights. Raises RequestError where it is none."""
        super().__init__()
        source = checkout / "src"
        if not (source / "zimage" / "transformer.py").is_file():
            raise RequestError(f"{checkout}: no src/zimage/transformer.py; needed a checkout of Tongyi-MAI/Z-Image")
        if str(source) not in sys.path:
            sys.path.insert(0, str(source))
        # Its modules greet on standard output, which belongs to the results.
        with redirect_stdout(sys.stderr):
            import utils.attention  # type: ignore[import-not-found]  # noqa: F401
            from utils.loader import load_sharded_safetensors  # type: ignore[import-not-found]
            from zimage.transformer import ZImageTransformer2DModel  # type: ignore[import-not-found]
        known = ZImageTransformer2DModel.__init__.__code__.co_varnames
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.inner = ZImageTransformer2DModel(**{key: value for key, value in config.items() if key in known})
        self.inner.load_state_dict(load_sharded_safetensors(folder, device="cpu"))
        self.inner.to(dtype)
        self.dtype, self.in_channels = dtype, self.inner.in_channels

    @property
    def device(self) -> torch.device:
        """Where the pipeline puts its own tensors."""
        device: torch.device = self.inner.x_pad_token.device
        return device

    def forward(self, x: list[Tensor], t: Tensor, text: list[Tensor], **ignored: object) -> Any:
        """Latents (C, 1, H, W), times and caption features, one an item -> (velocities, …)."""
        return self.inner(x, t, text)

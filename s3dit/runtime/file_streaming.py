"""Streams a model's repeated blocks on a CPU: each computes where its file is mapped, and its pages are given back.

Nothing is copied but what must be cast. While a block computes, the system is asked to read the next one into its
cache; when it is done, its pages leave this process (`mapped_file.give_back`), and what the system's cache still holds
of them costs little to have again. Tensors that are no views of a file (encoded while they were loaded, changed by a
user) stay where they are. The arithmetic is the same, bit for bit.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.model.hooks import Own
from s3dit.runtime.block_streaming import TensorDict, cast_dtype, like, move, tensors
from s3dit.weights.mapped_file import ask_for, give_back


def stream_files(model: nn.Module, kept: int = 0, dtype: torch.dtype | None = None) -> "FileStreamer | None":
    """Do as `block_streaming.move` does, on the CPU -> what streams the other blocks, None where there is none."""
    moving = move(model, torch.device("cpu"), kept, dtype)
    return FileStreamer(moving, dtype) if moving else None


class FileStreamer:
    """Casts a block's tensors when it is entered, and gives their pages back when it is left.

    Outside of its own forward a block has the tensors of its file, so a model reads and saves as ever. copies: how
    often a block was entered.
    """

    def __init__(self, blocks: Sequence[nn.Module], dtype: torch.dtype | None) -> None:
        """Register the hooks; dtype: what parameters are cast to, as in `block_streaming.move`."""
        self.copies, self._blocks, self._dtype = 0, blocks, dtype
        # Of the block that runs: where each tensor belongs, the file's, and the one that stands in its place.
        self._placed: list[tuple[TensorDict, str, Tensor, Tensor]] = []
        self._hooks = []
        for i, block in enumerate(blocks):
            self._hooks.append(block.register_forward_pre_hook(Own(partial(self._enter, i))))
            self._hooks.append(block.register_forward_hook(Own(self._leave), always_call=True))
            give_back(*(tensor for *_, tensor in tensors(block)))

    def close(self) -> None:
        """Stop streaming: the running block, if any, has its file's tensors again, and the hooks are removed."""
        self._leave()
        for hook in self._hooks:
            hook.remove()

    def compute_dtype(self, owner: TensorDict, leaf: str) -> torch.dtype:
        """Return the dtype that a parameter of a block computes in."""
        return cast_dtype(owner[leaf], self._dtype)

    def _enter(self, i: int, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Cast block i's tensors where they need it, and ask for the block that follows."""
        self._leave()
        self.copies += 1
        ask_for(*(tensor for *_, tensor in tensors(self._blocks[(i + 1) % len(self._blocks)])))
        for owner, leaf, tensor in list(tensors(block)):
            # Gradients flow back through the cast.
            cast = tensor.to(cast_dtype(tensor, self._dtype))
            if cast is not tensor:
                cast = owner[leaf] = cast if cast.requires_grad else like(tensor, cast)
                give_back(tensor)
            self._placed.append((owner, leaf, tensor, cast))

    def _leave(self, *_: Any) -> None:
        """Give the running block its file's tensors back, and their pages to the system."""
        for owner, leaf, tensor, placed in self._placed:
            # What a user has put there meanwhile stays.
            if owner.get(leaf) is placed:
                owner[leaf] = tensor
            give_back(tensor)
        self._placed.clear()

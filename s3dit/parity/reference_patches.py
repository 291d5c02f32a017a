"""What is looked at, or put right, inside of diffusers and transformers while a reference is drawn."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from s3dit.parity.parts import ReferenceParts
from s3dit.plan import Plan

DIFFUSERS = "diffusers.models.transformers.transformer_z_image"


@contextmanager
def patched(plan: Plan, parts: ReferenceParts, omni: bool) -> Iterator[None]:
    """Take out of diffusers what a plan does not ask for: the posterior's sample, and casts of fp32 to 16 bits."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    with ExitStack() as stack:
        if plan.start_images and plan.request.posterior == "mode":
            stack.enter_context(patch.object(Posterior, "sample", lambda self, generator=None: self.mode()))
        whole = parts.dtype == torch.float32
        if whole and parts.reads_gguf:
            from diffusers.quantizers.gguf import utils as gguf

            # Without a dtype its reader decodes in fp16.
            exact = {kind: partial(decode, dtype=parts.dtype) for kind, decode in gguf.dequantize_functions.items()}
            stack.enter_context(patch.dict(gguf.dequantize_functions, exact))
        if omni and whole:
            stack.enter_context(patch.object(torch.Tensor, "bfloat16", lambda self: self))
        yield


@contextmanager
def attended(show: Callable[[Tensor, Tensor], None], official: bool = False) -> Iterator[None]:
    """Show queries and keys as diffusers' attention multiplies them, or the official repository's."""
    names = ("utils.attention", "dispatch_attention") if official else (DIFFUSERS, "dispatch_attention_fn")
    # It is there: the transformer that attends was built of it.
    module = sys.modules[names[0]]
    attend = getattr(module, names[1])

    def shown(q: Tensor, k: Tensor, *args: Any, **named: Any) -> Any:
        show(q, k)
        return attend(q, k, *args, **named)

    with patch.object(module, names[1], shown):
        yield


@contextmanager
def rotated_text(show: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Show queries and keys of transformers' Qwen3 after its rotation, (B, L, heads, D)."""
    from transformers.models.qwen3 import modeling_qwen3 as module

    rotate = module.apply_rotary_pos_emb

    def shown(*args: Any, **named: Any) -> Any:
        q, k = rotate(*args, **named)
        show(q.transpose(1, 2), k.transpose(1, 2))
        return q, k

    with patch.object(module, "apply_rotary_pos_emb", shown):
        yield

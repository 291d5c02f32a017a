"""How many tokens an engine computes in a pass, and whether the whole model stays in memory."""

import torch

from s3dit.kernels.dispatch import backend
from s3dit.pipeline import Pipeline
from s3dit.runtime import budget

# A picture of 1024 × 1024 with the longest prompt. About there a GPU is full, and larger passes only keep requests
# waiting for one another.
MOST_TOKENS = 64 * 64 + 512
# Pictures whose decoding has its memory set aside.
DECODED = 1024


def stays(pipe: Pipeline) -> bool:
    """Whether every part of a pipeline stays in memory: as it was loaded, or because its budget holds all."""
    if pipe.limit is None:
        return pipe.parts.mode == "resident"
    return _room(pipe, _free(pipe, pipe.limit)) > 0


def most_tokens(pipe: Pipeline) -> int:
    """Tokens of a pass: MOST_TOKENS, or as many as there is memory for beside weights that stay."""
    if pipe.limit is not None:
        return max(1, min(MOST_TOKENS, _room(pipe, _free(pipe, pipe.limit))))
    if pipe.placement.device.type != "cuda" or not stays(pipe):
        return MOST_TOKENS
    free, _ = torch.cuda.mem_get_info(pipe.placement.device)
    # The weights are loaded already; what torch has set aside is free as well.
    unused = torch.cuda.memory_reserved(pipe.placement.device) - torch.cuda.memory_allocated(pipe.placement.device)
    return max(1, min(MOST_TOKENS, _room(pipe, free + unused)))


def _free(pipe: Pipeline, limit: budget.Budget) -> int:
    """Bytes of a budget beside all parts, with what `_room` sets aside."""
    sizes = [pipe.parts.sizes(part) for part in pipe.parts.checkpoints]
    weights = sum(fixed + sum(blocks) for _, fixed, blocks in sizes)
    return limit.size - limit.reserve + budget.RESERVE[pipe.placement.device.type] - weights


def _room(pipe: Pipeline, free: int) -> int:
    """Tokens that a pass has memory for in `free` bytes, beside a picture that is decoded meanwhile; at least 0."""
    config, compute, device = pipe.config, pipe.placement.compute, pipe.placement.device.type
    lean = (pipe.backend or backend()) in {"cpu": ("auto", "torch"), "cuda": ("auto", "triton")}.get(device, ())
    kind = {"lean": lean, "quantized": bool(pipe.parts.formats["transformer"])}
    none, some = (budget.transformer_work(config.transformer, n, compute, **kind) for n in (0, 1024))
    side = min(DECODED, config.settings.height)
    beside = budget.RESERVE[device] + budget.decoder_work(config.vae, side, side, None, compute)
    return max(0, (free - beside - none) * 1024 // (some - none))

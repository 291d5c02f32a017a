"""One stored layer of an adapter: which kind its tensors are of, whether they are complete, and the Delta they make.

Tensors come by role (`dialects.ROLES`). A kind is a way to write a matrix: LoRA, LoHa, LoKr, a difference, a new
weight. The strength alpha / rank is folded into the first factor.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from s3dit.errors import CheckpointError
from s3dit.weights.adapter_info import KIND_ROLES, has_no_rank, kinds_of
from s3dit.weights.adapter_settings import Settings
from s3dit.weights.checkpoint import Checkpoint
from s3dit.weights.delta import Delta, Full, Hadamard, Kronecker, LowRank, Term, scale_exactly

# The largest alpha / rank that is no accident.
MAX_STRENGTH = 1e4


def check_complete(checkpoint: Checkpoint, layer: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a stored layer lacks a tensor of its kind, or has tensors of two kinds."""
    kinds = kinds_of(tensors)
    if len(kinds) > 1:
        raise CheckpointError(f"{checkpoint.path}: {layer} is {' and '.join(kinds)} at once; needed one kind a layer")
    lacking = [
        role for kind in kinds for role in KIND_ROLES[kind] if not any(name in tensors for name in role.split("|"))
    ]
    if lacking:
        raise CheckpointError(
            f"{checkpoint.path}: {layer} has {', '.join(sorted(tensors))} but no {lacking[0].replace('|', ' or ')}; "
            "the file was cut short or badly converted, take it from its source"
        )


def layer_delta(tensors: Mapping[str, Tensor], settings: Settings | None, layer: str) -> Delta:
    """Return the Delta of one stored layer.

    tensors: by role · settings: PEFT's, for alpha and rank where the tensors do not hold them · layer: the official
    name that the settings' patterns are matched with. Raises ValueError where the tensors do not fit together.
    """
    if "core" in tensors:
        raise ValueError("a core between its factors (of a convolution), needed a linear layer")
    alpha = None
    if "alpha" in tensors and not has_no_rank(tensors):
        if tensors["alpha"].numel() != 1:
            raise ValueError(f"an alpha of {list(tensors['alpha'].shape)}, needed one number")
        alpha = float(tensors["alpha"].double())
    term = _term(tensors, alpha, settings, layer)
    bias, magnitude = tensors.get("diff_b"), tensors.get("magnitude")
    if "up.bias" in tensors:
        # PEFT's bias stands behind the up factor, so it shares its strength.
        if "down" not in tensors:
            raise ValueError("the bias of an up factor without its factors")
        bias = scale_exactly(tensors["up.bias"], _factor(_rank(tensors["down"]), alpha, settings, layer))
    if settings is not None and "down" in tensors and settings.norms not in (None, magnitude is not None):
        # In the place of norms that are not there PEFT puts those of the model, which is another adapter.
        raise ValueError(f"{'norms' if magnitude is not None else 'no norms'} where use_dora is {settings.norms}")
    if magnitude is not None and magnitude.ndim == 1:
        magnitude = magnitude[:, None]
    delta = Delta(term, bias, magnitude, replaces="set" in tensors)
    shape, wanted = delta.shape, tensors.get("shape")
    if wanted is not None and tuple(wanted.flatten().tolist()) != shape:
        raise ValueError(
            f"a weight that is made {wanted.flatten().tolist()} first, needed one of the model's own shape"
        )
    return delta


def _term(tensors: Mapping[str, Tensor], alpha: float | None, settings: Settings | None, layer: str) -> Term | None:
    """Return the matrix of a layer, its strength folded in; None where only its bias or norms change."""
    kind = next(iter(kinds_of(tensors)), None)
    if kind == "lora":
        term = LowRank(tensors["up"], tensors["down"])
        return term.scaled(_factor(_rank(term.down), alpha, settings, layer))
    if kind == "loha":
        product = Hadamard(*(tensors[role] for role in KIND_ROLES["loha"]))
        return product.scaled(_factor(_rank(product.w1b), alpha, settings, layer))
    if kind == "lokr":
        return _lokr(tensors, alpha, settings, layer)
    return None if kind is None else Full(tensors[kind])


def _lokr(tensors: Mapping[str, Tensor], alpha: float | None, settings: Settings | None, layer: str) -> Term:
    """Return a Kronecker product; factors that are low-rank products themselves are small and are multiplied out."""
    factors, rank = [], None
    for name in ("lokr_w1", "lokr_w2"):
        if name in tensors:
            factors.append(tensors[name])
            continue
        pair = LowRank(tensors[f"{name}_a"], tensors[f"{name}_b"])
        # Its shape, which raises where the factors do not fit, before its rank.
        _, rank = pair.shape, _rank(pair.down)
        factors.append(pair.dense())
    term = Kronecker(*factors)
    if "alpha" not in tensors and settings is not None:
        return term.scaled(_factor(None, None, settings, layer))
    # Without a rank the alpha that LyCORIS writes means nothing.
    return term if rank is None else term.scaled(_factor(rank, alpha, settings, layer))


def _rank(down: Tensor) -> int:
    """Return the rank of a pair, the number of rows of its down factor."""
    if down.ndim < 2:
        raise ValueError(f"a down factor of {list(down.shape)}, needed [N, r] and [r, K]")
    return down.shape[0]


def _factor(rank: float | None, alpha: float | None, settings: Settings | None, layer: str) -> float:
    """Return alpha / rank of one layer, 1 where no alpha is known; a rank of None is taken from the settings."""
    if settings is not None:
        alpha = settings.alpha_of(layer) if alpha is None else alpha
        rank = settings.rank_of(layer) if rank is None else rank
    if alpha is None or rank is None:
        return 1.0
    factor = alpha / (math.sqrt(rank) if settings is not None and settings.root else rank)
    if abs(factor) > MAX_STRENGTH:
        raise ValueError(
            f"alpha {alpha:g} at rank {rank:g}, needed a strength alpha / rank of at most {MAX_STRENGTH:g}"
        )
    return factor

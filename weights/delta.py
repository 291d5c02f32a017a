"""Delta, the change that an adapter makes to a layer, and Term, the matrix of its weight in the trained factors.

The kinds of adapters differ only in how they write a matrix of the weight's shape, the term:

    LowRank    up · down                                      LoRA
    Hadamard   (w1a · w1b) ⊙ (w2a · w2b)                      LoHa
    Kronecker  w1 ⊗ w2                                        LoKr
    Full       the matrix itself, or a vector of a norm       differences, new weights

Each multiplies tokens without forming that matrix where it can (`times`), forms it (`dense`), and can be cut by rows,
which is how a matrix for q, k and v is given to three layers. The strength alpha / rank is folded into a factor, so a
Delta needs no settings beside it.

Besides, a Delta may add to the bias, replace the weight instead of adding to it, and rescale the sum to given norms
(DoRA): with N magnitudes W'' = (W + Δ) · magnitude / norm of its rows, with K of its columns.

Source: LoRA (2106.09685), LyCORIS (2309.14859), DoRA (2402.09353). ComfyUI's row norm is that of W alone; here, as in
the paper, PEFT and LyCORIS, it is that of W + Δ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from s3dit.kernels.aligned import aligned


@dataclass(frozen=True, slots=True)
class Term:
    """A matrix of a weight's shape (N, K), in factors.

    The fields of a subclass are its factors: tensors of any float dtype.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the matrix; raises ValueError where the factors do not fit together."""
        raise NotImplementedError

    def times(self, x: Tensor) -> Tensor:
        """Multiply x (…, K), of the factors' dtype, by the matrix, transposed -> (…, N)."""
        raise NotImplementedError

    def onto(self, y: Tensor, x: Tensor, strength: Tensor) -> Tensor:
        """Return y (…, N) + strength · `times(x)`; strength () fp32, or one a token, (…, 1)."""
        change = self.times(x)
        return y + (strength * change).to(change.dtype)

    def dense(self) -> Tensor:
        """Return the matrix (N, K) in fp32."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> "Term":
        """Return the term of rows start to stop of the matrix."""
        raise NotImplementedError

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Return the term of the factors that `change` makes of these."""
        return type(self)(*(change(getattr(self, field.name)) for field in fields(self)))

    def scaled(self, factor: float) -> Self:
        """Return the term times a number, which is multiplied into the first factor (`scale_exactly`)."""
        first = fields(self)[0].name
        return replace(self, **{first: scale_exactly(getattr(self, first), factor)})


@dataclass(frozen=True, slots=True)
class LowRank(Term):
    """The term of LoRA: up (N, r) · down (r, K)."""

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, K); raises ValueError where the ranks differ."""
        return _product(self.up, self.down)

    def times(self, x: Tensor) -> Tensor:
        """Multiply by down, then by up, so that the matrix is never formed."""
        return F.linear(F.linear(x, self.down), self.up)

    def onto(self, y: Tensor, x: Tensor, strength: Tensor) -> Tensor:
        """Add the product to y in the second multiplication, scaled where there are the fewest numbers."""
        inner = F.linear(x, self.down)
        inner = (inner * strength).to(inner.dtype)
        return torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), self.up.T).view(y.shape)

    def dense(self) -> Tensor:
        """Return up @ down in fp32."""
        return aligned(self.up.float()) @ aligned(self.down.float())

    def rows(self, start: int, stop: int) -> "LowRank":
        """Return the same down with some rows of up."""
        return LowRank(self.up[start:stop], self.down)


@dataclass(frozen=True, slots=True)
class Hadamard(Term):
    """The term of LoHa: (w1a (N, r) · w1b (r, K)) ⊙ (w2a (N, s) · w2b (s, K))."""

    w1a: Tensor
    w1b: Tensor
    w2a: Tensor
    w2b: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (N, K); raises ValueError where the two products differ in shape."""
        first, second = _product(self.w1a, self.w1b), _product(self.w2a, self.w2b)
        if first != second:
            raise ValueError(f"factors of {list(first)} and {list(second)}, needed equal ones")
        return first

    def times(self, x: Tensor) -> Tensor:
        """Form the matrix and multiply by it: cheap, because there are fewer ranks than tokens."""
        return F.linear(x, (self.w1a @ self.w1b) * (self.w2a @ self.w2b))

    def dense(self) -> Tensor:
        """Return (w1a @ w1b) * (w2a @ w2b) in fp32."""
        w1a, w1b, w2a, w2b = (aligned(factor.float()) for factor in (self.w1a, self.w1b, self.w2a, self.w2b))
        return (w1a @ w1b) * (w2a @ w2b)

    def rows(self, start: int, stop: int) -> "Hadamard":
        """Return the same w1b and w2b with some rows of w1a and w2a."""
        return Hadamard(self.w1a[start:stop], self.w1b, self.w2a[start:stop], self.w2b)


@dataclass(frozen=True, slots=True)
class Kronecker(Term):
    """The term of LoKr: w1 (a, b) ⊗ w2 (c, d), a matrix (a · c, b · d)."""

    w1: Tensor
    w2: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (a · c, b · d); raises ValueError where a factor is not a matrix."""
        if self.w1.ndim != 2 or self.w2.ndim != 2:
            raise ValueError(f"factors {list(self.w1.shape)} and {list(self.w2.shape)}, needed two matrices")
        (a, b), (c, d) = self.w1.shape, self.w2.shape
        return (a * c, b * d)

    def times(self, x: Tensor) -> Tensor:
        """Multiply runs of x by w2, then by w1, so that the matrix is never formed."""
        inner = F.linear(x.unflatten(-1, (self.w1.shape[1], -1)), self.w2)  # (…, b, c)
        return (self.w1 @ inner).flatten(-2)

    def dense(self) -> Tensor:
        """Return the Kronecker product in fp32."""
        return torch.kron(self.w1.float(), self.w2.float())

    def rows(self, start: int, stop: int) -> Term:
        """Return some rows: as a Kronecker product where they are whole blocks of w2, else as a full matrix."""
        height = self.w2.shape[0]
        if start % height or stop % height:
            return Full(self.dense()[start:stop])
        return Kronecker(self.w1[start // height : stop // height], self.w2)


@dataclass(frozen=True, slots=True)
class Full(Term):
    """The term that is a matrix (N, K) itself, or a vector (N,) of a norm."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        return tuple(self.weight.shape)

    def times(self, x: Tensor) -> Tensor:
        """Multiply x by the matrix, transposed."""
        return F.linear(x, self.weight)

    def dense(self) -> Tensor:
        """Return the matrix in fp32."""
        return self.weight.float()

    def rows(self, start: int, stop: int) -> "Full":
        """Return some rows of the matrix."""
        return Full(self.weight[start:stop])


@dataclass(frozen=True, slots=True)
class Delta:
    """The whole change of a layer; see the module's docstring.

    term (N, K), None where only the bias changes · bias (N,) is added to the layer's · magnitude (N, 1) or (1, K)
    rescales the rows or columns of the sum · replaces: the term is the new weight instead of a summand · factor: of its
    adapter's strength in this layer.
    """

    term: Term | None
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    replaces: bool = False
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight, (N,) where only a bias is known; raises ValueError where tensors disagree."""
        if self.term is None:
            if self.bias is None or self.magnitude is not None:
                raise ValueError("norms of rows or columns without a change of the weight")
            return tuple(self.bias.shape)
        shape = self.term.shape
        if self.bias is not None and tuple(self.bias.shape) != shape[:1]:
            raise ValueError(f"a bias of {list(self.bias.shape)} beside a weight of {list(shape)}")
        if self.magnitude is not None and tuple(self.magnitude.shape) not in ((shape[0], 1), (1, shape[-1])):
            raise ValueError(f"norms of {list(self.magnitude.shape)} beside a weight of {list(shape)}")
        return shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether it can change a weight of this shape."""
        return self.shape == (shape if self.term is not None else shape[:1])

    @property
    def idle(self) -> bool:
        """Return whether it changes nothing, whatever the weight."""
        if self.replaces or self.magnitude is not None or (self.bias is not None and bool(self.bias.any())):
            return False
        return self.term is None or not all(getattr(self.term, factor.name).any() for factor in fields(self.term))

    def by_rows(self) -> bool:
        """Return whether it has norms, and they are those of rows."""
        return self.magnitude is not None and self.magnitude.shape[-1] == 1

    def row_part(self, i: int, count: int) -> "Delta":
        """Return the i-th of `count` equal runs of rows; raises ValueError where it cannot be cut."""
        if count == 1:
            return self
        total = self.shape[0]
        if total % count:
            raise ValueError(f"{total} rows, needed a multiple of {count}, for as many layers")
        if self.magnitude is not None and not self.by_rows():
            raise ValueError(f"norms of columns that {count} layers share, which cannot be cut; train them apart")
        start, stop = total // count * i, total // count * (i + 1)
        bias, magnitude = (None if t is None else t[start:stop] for t in (self.bias, self.magnitude))
        return Delta(None if self.term is None else self.term.rows(start, stop), bias, magnitude, self.replaces)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the changed weight at strength 1: weight (N, K) of any float dtype -> (N, K) fp32."""
        weight = weight.float()
        if self.term is None:
            return weight
        dense = self.term.map(lambda tensor: tensor.to(weight.device)).dense()
        changed = dense if self.replaces else weight + dense
        if self.magnitude is None:
            return changed
        return changed * (self.magnitude.to(changed) / norms(changed, rows=self.by_rows()))


def norms(weight: Tensor, *, rows: bool) -> Tensor:
    """Return the Euclidean norms of the rows (N, 1) or the columns (1, K) of a weight, at least 1e-12."""
    return torch.linalg.vector_norm(weight, dim=1 if rows else 0, keepdim=True).clamp(min=1e-12)


def scale_exactly(tensor: Tensor, factor: float) -> Tensor:
    """Return a tensor times a number: in its own dtype where that is exact, else in fp32."""
    if factor == 1:
        return tensor
    product = tensor.double() * factor
    narrow = product.to(tensor.dtype)
    return narrow if torch.equal(narrow.double(), product) else product.float()


def fuse(deltas: Sequence[Delta | None], rows: int) -> Delta:
    """Return the Delta of several layers stacked by rows, `rows` each; None is a layer without change.

    LoRA stays LoRA of the summed rank and LoHa stays LoHa, by factors along a diagonal; others become full. Raises
    ValueError where layers have norms or new weights, which cannot be stacked.
    """
    changes = [delta for delta in deltas if delta is not None]
    if any(delta.magnitude is not None or delta.replaces for delta in changes):
        raise ValueError("norms or new weights, which are of one layer each")
    none = torch.zeros(rows, dtype=torch.float32)
    biases = [none if delta is None or delta.bias is None else delta.bias.float() for delta in deltas]
    bias = torch.cat(biases) if any(delta.bias is not None for delta in changes) else None
    terms = [None if delta is None else delta.term for delta in deltas]
    there = [term for term in terms if term is not None]
    if not there:
        return Delta(None, bias)
    # What is stacked, and what goes along a diagonal, of the kinds that a diagonal of factors can hold.
    for kind, diagonal, stacked in ((LowRank, ("up",), ("down",)), (Hadamard, ("w1a", "w2a"), ("w1b", "w2b"))):
        if all(isinstance(term, kind) for term in there):
            factors = {leaf: _diagonal(terms, rows, leaf) for leaf in diagonal}
            factors |= {leaf: torch.cat([getattr(term, leaf) for term in there]) for leaf in stacked}
            return Delta(kind(**factors), bias)
    width = there[0].shape[1]
    blank = torch.zeros(rows, width, dtype=torch.float32)
    return Delta(Full(torch.cat([blank if t is None else t.dense() for t in terms])), bias)


def _diagonal(terms: Sequence[Term | None], rows: int, leaf: str) -> Tensor:
    """Return a factor of several terms along a diagonal; a layer without a term gets rows of zeros."""
    first = next(getattr(term, leaf) for term in terms if term is not None)
    blocks = [first.new_zeros(rows, 0) if term is None else getattr(term, leaf) for term in terms]
    return torch.block_diag(*blocks)


def _product(left: Tensor, right: Tensor) -> tuple[int, ...]:
    """Return the shape of a product of two factors; raises ValueError where they are not [N, r] and [r, K]."""
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"factors {list(left.shape)} and {list(right.shape)}, needed [N, r] and [r, K]")
    return (left.shape[0], right.shape[1])

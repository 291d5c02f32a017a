"""The kinds of change against their matrices in float64: as products, as matrices, cut by rows, fused, in strength."""

import pytest
import torch

from s3dit.weights.delta import Delta, Full, Hadamard, Kronecker, LowRank, fuse, norms, scale_exactly

OUT, IN = 24, 8


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(1)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(dtype)


def terms(random):
    """Each kind, and its matrix in float64."""
    up, down = random(OUT, 3), random(3, IN)
    a, b, c, d = random(OUT, 2), random(2, IN), random(OUT, 2), random(2, IN)
    one, other, whole = random(6, 2), random(4, 4), random(OUT, IN)
    a8, b8, c8, d8 = (t.double() for t in (a, b, c, d))
    kron = torch.einsum("ij,kl->ikjl", one.double(), other.double()).reshape(OUT, IN)
    return {
        "low rank": (LowRank(up, down), up.double() @ down.double()),
        "hadamard": (Hadamard(a, b, c, d), (a8 @ b8) * (c8 @ d8)),
        "kronecker": (Kronecker(one, other), kron),
        "full": (Full(whole), whole.double()),
    }


@pytest.mark.parametrize("kind", ["low rank", "hadamard", "kronecker", "full"])
@pytest.mark.parametrize("shape", [(5, IN), (1, IN), (2, 3, IN), (IN,)])
def test_products_are_those_of_the_matrix(random, kind, shape):
    term, matrix = terms(random)[kind]
    x = random(*shape)
    wanted = x.double() @ matrix.T
    # 1e-6: fp32, with sums of eight.
    close = {"rtol": 1e-6, "atol": 1e-5}
    assert term.shape == (OUT, IN) and torch.allclose(term.dense().double(), matrix, **close)
    assert torch.allclose(term.times(x).double(), wanted, **close)
    y, strength = random(*wanted.shape), torch.tensor(-0.5)
    if len(shape) > 1:
        assert torch.allclose(term.onto(y, x, strength).double(), y.double() - 0.5 * wanted, **close)
    # Of all heights, among them those that a Kronecker product cannot be cut at.
    for start, stop in ((0, 8), (8, 24), (3, 5)):
        cut = term.rows(start, stop)
        assert cut.shape == (stop - start, IN) and torch.allclose(cut.dense().double(), matrix[start:stop], **close)
    assert torch.allclose(term.scaled(1.7).dense().double(), 1.7 * matrix, **close)


def test_changed_is_the_formula(random):
    term, matrix = terms(random)["low rank"]
    weight = random(OUT, IN, dtype=torch.bfloat16)
    wide = weight.double()
    rows, columns = random(OUT, 1).abs(), random(1, IN).abs()
    cases = {
        Delta(term): wide + matrix,
        Delta(term, replaces=True): matrix,
        Delta(None, random(OUT)): wide,
        Delta(term, None, rows): (wide + matrix) * rows / (wide + matrix).pow(2).sum(1, keepdim=True).sqrt(),
        Delta(term, None, columns): (wide + matrix) * columns / (wide + matrix).pow(2).sum(0, keepdim=True).sqrt(),
    }
    for delta, wanted in cases.items():
        found = delta.changed(weight)
        assert found.dtype == torch.float32 and torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert norms(torch.zeros(2, 2), rows=True).min() > 0


def test_fused_is_what_its_pieces_are_row_upon_row(random):
    """Of each kind, with a layer that has none; cutting it again gives the pieces back."""
    kinds = {
        "low rank": [Delta(LowRank(random(OUT, rank), random(rank, IN))) for rank in (1, 2)],
        "full": [Delta(Full(random(OUT, IN)), random(OUT)) for _ in range(2)],
        "mixed": [Delta(Full(random(OUT, IN))), Delta(LowRank(random(OUT, 2), random(2, IN)))],
    }
    for first, second in kinds.values():
        whole = fuse([first, None, second], OUT)
        wanted = torch.cat([first.term.dense(), torch.zeros(OUT, IN), second.term.dense()])
        assert torch.allclose(whole.term.dense(), wanted, atol=1e-6) and whole.shape == (3 * OUT, IN)
        for i, piece in enumerate((first, None, second)):
            dense = torch.zeros(OUT, IN) if piece is None else piece.term.dense()
            assert torch.allclose(whole.row_part(i, 3).term.dense(), dense, atol=1e-6)
    bias = fuse([None, Delta(None, torch.ones(OUT)), None], OUT)
    assert bias.term is None and bias.bias.sum() == OUT and bias.bias[OUT:-OUT].sum() == OUT


def test_a_strength_keeps_every_bit(random):
    half = random(9, 9, dtype=torch.bfloat16)
    assert scale_exactly(half, 1.0) is half
    assert scale_exactly(half, 0.25).dtype == torch.bfloat16 and torch.equal(scale_exactly(half, 0.25) * 4, half)
    third = scale_exactly(half, 1 / 3)
    assert third.dtype == torch.float32 and torch.allclose(third.double(), half.double() / 3, rtol=1e-7)

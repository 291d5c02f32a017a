"""GGUF's blocks against gguf-py: decoded to the same bits, and multiplied, also in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from s3dit.errors import BackendError
from s3dit.kernels.gguf import BLOCKS, GGUF, block_scales
from s3dit.kernels.gguf_matmul import KERNELS, gguf_dequantize, gguf_matmul, packed_blocks
from s3dit.kernels.mixed_matmul import launch_mixed
from s3dit.kernels.schemes import linear

gguf = pytest.importorskip("gguf", reason="needs gguf-py as reference: pip install 's3dit[test]'")

# Half a unit in the last of 11 and 8 bits, for the weight and for the result.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def random_blocks(kind, out, in_):
    """Every byte at random, scales apart, which are moderate numbers: (out, bytes of a row) uint8."""
    block = BLOCKS[kind]
    blocks = torch.randint(0, 256, (out * in_ // block.elements, block.bytes), dtype=torch.uint8)
    for at in block.scales:
        blocks[:, at : at + 2] = torch.randn(len(blocks), 1).mul(0.1).half().view(torch.uint8)
    return blocks.view(out, -1)


def by_gguf(kind, rows):
    """What gguf-py makes of them."""
    return torch.from_numpy(gguf.dequantize(rows.cpu().numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", BLOCKS)
def test_decoded_to_the_bits_of_gguf(kind):
    rows = random_blocks(kind, 7, 768)
    assert GGUF[kind].spec(7, 768) == {"weight": (tuple(rows.shape), torch.uint8)}
    decoded = GGUF[kind].decode({"weight": rows})
    assert decoded.shape == (7, 768) and torch.equal(decoded, by_gguf(kind, rows))
    assert block_scales(kind, rows).shape == (7 * 768 // BLOCKS[kind].elements, len(BLOCKS[kind].scales))


def test_sizes_are_those_of_gguf():
    for kind, block in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (block.elements, block.bytes)
    with pytest.raises(ValueError, match="multiple of 256, found 96"):
        GGUF["Q4_K"].spec(1, 96)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_cpu_against_float64(kind, wide, monkeypatch):
    monkeypatch.setattr("s3dit.kernels.scheme.WEIGHT_CHUNK", 256 * 5)
    rows, x, bias = random_blocks(kind, 33, 256), torch.randn(2, 9, 256).to(wide), torch.randn(33)
    expected = F.linear(x.double(), by_gguf(kind, rows).double(), bias.double())
    for out in (linear(x, GGUF[kind], {"weight": rows}, bias), GGUF[kind].linear.reference(x, {"weight": rows}, bias)):
        assert out.dtype == wide and relative(out, expected) < ROUNDING[wide]
    assert linear(x[:, :0], GGUF[kind], {"weight": rows}, bias).shape == (2, 0, 33)


def test_rows_may_be_cut(kind="Q6_K"):
    rows = random_blocks(kind, 12, 512)
    whole = GGUF[kind].decode({"weight": rows})
    assert torch.equal(GGUF[kind].decode({"weight": rows[4:8]}), whole[4:8])


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("m, n, blocks, splits", [(1, 16, 1, 1), (33, 40, 3, 2), (17, 33, 2, 1)])
@pytest.mark.sampled(4)
def test_few_rows(kind, m, n, blocks, splits, dtype, device, poison):
    in_ = 256 * blocks if BLOCKS[kind].elements == 256 else 96 * blocks
    rows, bias = random_blocks(kind, n, in_).to(device), torch.randn(n, device=device)
    x = torch.randn(m, in_, device=device).to(dtype)
    out = launch_mixed(x, packed_blocks(rows, kind), bias, 32, 32, splits)
    expected = F.linear(x.double(), by_gguf(kind, rows).to(device).double(), bias.double())
    assert out.dtype == dtype and relative(out, expected) < ROUNDING[dtype]


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.sampled(2)
def test_many_rows(kind, dtype, device, poison, monkeypatch):
    monkeypatch.setattr("s3dit.kernels.gguf_matmul.FUSED_ROWS", 16)
    in_ = 512 if BLOCKS[kind].elements == 256 else 160
    rows, x = random_blocks(kind, 35, in_).to(device), torch.randn(3, 7, in_, device=device).to(dtype)
    expected = by_gguf(kind, rows).to(device)
    made = gguf_dequantize(rows, kind, dtype)
    # fp32: a product and a difference may be fused to one rounding
    assert made.dtype == dtype and relative(made, expected) < ROUNDING[dtype]
    assert relative(gguf_matmul(x, rows, kind, None), F.linear(x.double(), expected.double())) < ROUNDING[dtype]


def test_types_without_a_kernel_are_plain_torch(device):
    from s3dit.kernels.dispatch import set_backend

    x = torch.randn(2, 256, device=device, dtype=torch.float32)
    try:
        set_backend("triton")
        assert GGUF["Q3_K"].linear.choose(x, {}, None) is GGUF["Q3_K"].linear.reference
        with pytest.raises(BackendError, match="float64"):
            GGUF["Q4_K"].linear.choose(x.double(), {}, None)
        assert GGUF["Q4_K"].linear.choose(x.half(), {}, None).__name__ == "in_kernel"
    finally:
        set_backend("auto")

"""A block on Triton kernels and on references, in each way that its activations may travel."""

import pytest
import torch

from s3dit.kernels.attention import Spans
from s3dit.kernels.dispatch import INTERPRETED, set_backend
from s3dit.kernels.scheme import QuantizedRows
from s3dit.model.config import TransformerConfig
from s3dit.model.layers import rope_table
from s3dit.model.transformer import Block, common_input_dtype

GPU = torch.cuda.is_available()
CONFIG = TransformerConfig.from_json(
    {
        "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 96, "n_layers": 1,
        "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 32,
        "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [8, 12, 12],
    },
    "test",
)  # fmt: skip


class Rounding(torch.nn.Linear):
    """A linear layer that takes int8 rows, and notes in what form its input came."""

    input_dtype = torch.int8

    def forward(self, x):
        self.came = type(x)
        return super().forward(x.dequantize().to(x.dtype) if isinstance(x, QuantizedRows) else x)


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = Block(CONFIG, modulated=True).requires_grad_(False)
    for parameter in block.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return block.to("cuda" if GPU else "cpu")


def arguments():
    """x of two items of different length, with a row of modulation each."""
    device, lengths = "cuda" if GPU else "cpu", (5, 33)
    positions = torch.randint(0, 50, (sum(lengths), 3), device=device)
    row = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths)).to(device)
    rope = rope_table(positions, CONFIG.axes_dims, CONFIG.rope_theta)
    x, time = torch.randn(sum(lengths), 96, device=device), torch.randn(2, 96, device=device)
    return x, rope, Spans.of(lengths, device), time, row


def runs(block, args):
    """What references give, and Triton."""
    answers = []
    for backend in ("reference", "triton"):
        set_backend(backend)
        try:
            answers.append(block(*args))
        finally:
            set_backend("auto")
    return answers


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.skipif(not (GPU or INTERPRETED), reason="needs a CUDA device, or Triton for its interpreter")
@pytest.mark.parametrize("rounding", [False, True])
def test_kernels_and_references_agree(block, rounding):
    args = arguments()
    if GPU:
        block, args = block.half(), [x.half() if isinstance(x, torch.Tensor) and x.dim() == 2 else x for x in args]
    exact = block(*args)
    if rounding:
        for layer in block.modules():
            if type(layer).__name__ == "Linear" and layer.in_features > 96 or layer in (
                block.attention.to_q, block.attention.to_k, block.attention.to_v, block.feed_forward.w1,
                block.feed_forward.w3,
            ):  # fmt: skip
                layer.__class__ = Rounding
    reference, triton = runs(block, args)
    # a few int8 values of a hundred thousand on the other side of a half; in fp32 else, some ulp
    assert relative(triton, reference) < (2e-3 if GPU or rounding else 1e-6)
    # int8 rows of width 96: steps of 1/127 of the largest, some 1e-2 of each product, gated into the residual
    assert relative(reference, exact) < (2e-2 if rounding else 1e-6)
    if rounding:
        assert {block.attention.to_q.came, block.feed_forward.w1.came, block.feed_forward.w2.came} == {QuantizedRows}


def test_rows_only_where_all_take_them(block):
    to_q, to_k = block.attention.to_q, block.attention.to_k
    assert common_input_dtype(to_q, to_k) is None
    to_q.__class__ = Rounding
    assert common_input_dtype(to_q, to_k) is None
    to_k.__class__ = Rounding
    assert common_input_dtype(to_q, to_k) == torch.int8
    assert block.attention.input_dtype is None

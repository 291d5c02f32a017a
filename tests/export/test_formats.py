"""Every number format goes through a graph, or is refused by its name before any work.

The bound is that of whole models: a weight is decoded in one piece where the engine takes it in runs, so sums may be of
another order. Both sides are given the same numbers, so that also formats that round activations round them alike.
"""

import pytest
import torch

from s3dit import RequestError
from s3dit.export import graphs
from s3dit.kernels.dispatch import use_backend
from s3dit.kernels.gguf import BLOCKS, GGUF
from s3dit.kernels.grouped import grouped, hadamard
from s3dit.kernels.int8 import INTEGER_DOT
from s3dit.kernels.number_format import DFLOAT11, Form
from s3dit.kernels.schemes import SCHEMES
from s3dit.model.linear import QuantLinear

OUT, IN, BOUND = 64, 512, 1e-5
E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
# What `weights/` makes of the files of other producers, each of a kind.
FORMS = {
    "fp8-e5m2": Form(E5M2),
    "fp8-block128": Form(E4M3, 128),
    "mxfp8": Form(E4M3, 32, "float8_e8m0fnu"),
    "nvfp4": Form("uint8", 16, E4M3, channel=True, column=True),
    "int8-convrot": Form("int8", rotation=64),
    "convrot-w4a4": Form("uint8", rotation=64),
    "asym-w4a8": Form("uint8", 16, E4M3, channel=True, offset="float32", rounded=True, rotation=64),
    "awq-w4a16": Form("uint8", 64, "bfloat16", offset="bfloat16"),
    "bnb-nf4": Form("uint8", 64),
    "bnb-fp4": Form("uint8", 64),
    "torchao-int8": Form("int8", 32),
    "torchao-uint8": Form("uint8", 32, offset="float32"),
    "sdnq-int8": Form("int8", rank=8, low="float32"),
    "sdnq-uint4": Form("uint8", 32, offset="float32", rotation=32, rank=8),
    "svdq-int4": Form("uint8", 64, "bfloat16", column=True, rank=32),
    "svdq-fp4": Form("uint8", 16, E4M3, channel=True, column=True, rank=32),
}
KINDS = SCHEMES | GGUF | {name: grouped(name, form) for name, form in FORMS.items()}


def tensor(name, shape, dtype):
    """A part of a weight of random numbers."""
    if name == "rotation":
        return hadamard(shape[-1])
    if name == "table":
        return torch.linspace(-1, 1, 16)[None]
    if dtype in (torch.uint8, torch.int8):
        return torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype)
    return (torch.rand(shape) * 0.02 + 0.01 if name == "scale" else torch.randn(shape)).to(dtype)


class Layers(torch.nn.Module):
    """A layer of every format, side by side: one graph of all."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(QuantLinear(scheme, IN, OUT) for scheme in KINDS.values())
        for layer in self.layers:
            for name, (shape, dtype) in layer.scheme.spec(OUT, IN).items():
                layer.register_buffer(name, tensor(name, shape, dtype))
            if block := BLOCKS.get(layer.scheme.name):
                blocks = layer.weight.view(-1, block.bytes)
                for at in block.scales:
                    blocks[:, at : at + 2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


@pytest.mark.slow
def test_every_format_is_multiplied_in_a_graph(tmp_path):
    """And in the same graph, compiled."""
    torch.manual_seed(0)
    layers = Layers().eval()
    with graphs.traceable(torch.device("cpu")):
        free = ({0: torch.export.Dim("rows")},)
        program = torch.export.export(layers, (torch.randn(5, IN),), dynamic_shapes=free, strict=False)
    graphs.check_operations(program)
    products = [str(node.target) for node in program.graph.nodes].count("aten._int_mm.default")
    # Of int8 alone, where this CPU has an exact one; elsewhere the same codes are multiplied in floating point.
    assert products == INTEGER_DOT
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layers.pt2"))
    for run in (program.module(), torch._inductor.aoti_load_package(path)):
        for rows in (1, 40, 300):
            x = torch.randn(rows, IN)
            with torch.no_grad(), use_backend("torch"):
                both = zip(KINDS, run(x), layers(x), strict=True)
            off = {name: ((found - wanted).norm() / wanted.norm()).item() for name, found, wanted in both}
            assert {name: each for name, each in off.items() if not each < BOUND} == {}


@pytest.mark.parametrize("form", ["export", "compiled", "onnx"])
def test_every_format_is_taken_or_refused_by_its_name(form):
    for name in (*KINDS, DFLOAT11):
        for device in ("cpu", "cuda"):
            given = {"text_encoder": name}, form, torch.device(device)
            if form == "onnx" or name == DFLOAT11 or (name, device) == ("fp8", "cuda"):
                with pytest.raises(RequestError, match=f"found text_encoder in {name};.*s3dit convert"):
                    graphs._check_formats(*given)
            else:
                graphs._check_formats(*given)

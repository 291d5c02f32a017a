"""Kernels of the number formats and of rows, compiled for GPUs that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s3dit.kernels.dispatch import INTERPRETED

needs_triton = pytest.mark.skipif(
    not torch.cuda.is_available() and not INTERPRETED, reason="Triton needs a GPU or TRITON_INTERPRET=1"
)

# Every launch compiles instead, for another GPU: the tensors stay on the CPU, and nothing is computed.
COMPILER = """
import sys
import types

import torch

torch.cuda.is_available = lambda: True
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s3dit.kernels.rows import launch_quantize_rows

capability, limit = int(sys.argv[1]), int(sys.argv[2])
names = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8", torch.int64: "i64"}
names |= {torch.float8_e4m3fn: "fp8e4nv", torch.int32: "i32", torch.int16: "i16"}
assembly = []

def launch(kernel, grid):
    def compiled(*given, **options):
        signature, constants, aligned = {}, {}, {}
        given = (*given, *(options.pop(parameter.name) for parameter in kernel.params[len(given) :]))
        for i, (parameter, value) in enumerate(zip(kernel.params, given, strict=True)):
            # As Triton does at a launch, which takes a 1 for a constant.
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + names[value.dtype]
                aligned[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[parameter.name] = "i32"
            elif isinstance(value, float):
                signature[parameter.name] = "fp32"
            else:
                block = ",".join(map(str, value.block_shape))
                signature[parameter.name] = f"tensordesc<{names[value.base.dtype]}[{block}]>"
        source = ASTSource(kernel, signature, constants, aligned)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert built.metadata.shared <= limit * 1024, (kernel.__name__, options, built.metadata.shared)
        assembly.append(built.asm["ptx"])
    return compiled

triton.JITFunction.__getitem__ = launch
"""

ROW_KERNELS = """
from s3dit.kernels.dfloat11 import launch_decode
from s3dit.kernels.group_norm import launch_moments, launch_normalize
from s3dit.kernels.norm_kernels import launch_norm, launch_norm_rope, launch_residual_norm
from s3dit.kernels.pictures import launch_add, launch_repeat
from s3dit.kernels.swiglu import swiglu

x, weight, head = torch.zeros(3, 3840).bfloat16(), torch.zeros(3840).bfloat16(), torch.zeros(128).bfloat16()
factor, row, rope = torch.zeros(2, 3840), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 64, 2)
q, k, product = x.view(3, 30, 128), x[:, :1024].view(3, 8, 128), torch.zeros(3, 20480).bfloat16()
activate = next(s.function for s in swiglu.implementations if s.backend == "triton")
for dtype in (None, torch.int8, torch.float8_e4m3fn) if capability >= 89 else (None, torch.int8):
    for table in (factor, factor[:1]):
        launch_norm(x, table, row, 1e-5, dtype)
        launch_residual_norm(x, x, table, table, row, 1e-5, dtype)
    activate(*product.chunk(2, -1), dtype)
    if dtype is not None:
        launch_quantize_rows(x, dtype)
launch_norm(x, weight, None, 1e-5, None)
launch_residual_norm(x, x, factor, None, row, 1e-5, None)
launch_residual_norm(x, x, None, weight, None, 1e-5, None)
for halves in (False, True):
    launch_norm_rope(q, k, head, head, rope, 1e-5, halves)
for channels, side in ((128, 64), (512, 64), (128, 1)):
    picture = torch.zeros(1, channels, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
    moments = launch_moments(picture, 32, weight[:channels] if side > 1 else None)
    launch_normalize(picture, *moments, weight[:channels], weight[:channels], 1e-6, True)
    launch_repeat(launch_add(picture, picture, weight[:channels]))
parts = [torch.zeros(count, dtype=torch.uint8) for count in (8192, 640)]
launch_decode(torch.zeros(64, 64, dtype=torch.uint8), *parts, torch.zeros(3, dtype=torch.int64), parts[0].view(32, 256))
found = "".join(assembly)
# Pairs of numbers are converted by one instruction.
words = ["cvt.rn.bf16x2.f32"] + ["cvt.rn.satfinite.e4m3x2.f32"] * (capability >= 90)
assert all(word in found for word in words), words
"""

PRODUCTS = """
from s3dit.kernels import gguf_matmul, grouped, matmul, mixed_matmul
from s3dit.kernels.gguf import GGUF
from s3dit.kernels.scheme import QuantizedRows
from s3dit.kernels.schemes import SCHEMES

matmul.describable = lambda *tensors: capability >= 90
matmul.program_count = mixed_matmul.program_count = lambda device: 132
grouped.F = gguf_matmul.F = mixed_matmul.F = types.SimpleNamespace(linear=lambda x, weight, bias: None)
form = grouped.Form("uint8", 16, "bfloat16", True, "bfloat16", rounded=True)
packed = (grouped.grouped("packed", form), grouped.grouped("fp8", grouped.Form("float8_e4m3fn", 128)))
for rows in (64, 4224):
    for scheme in (*SCHEMES.values(), GGUF["Q8_0"], GGUF["Q5_K"], GGUF["Q6_K"], *packed):
        parts = {part: torch.zeros(shape, dtype=dtype) for part, (shape, dtype) in scheme.spec(3840, 10240).items()}
        x = torch.zeros(rows, 10240, dtype=torch.bfloat16)
        x = QuantizedRows(*launch_quantize_rows(x, scheme.activation), x.dtype) if scheme.activation else x
        next(s for s in scheme.linear.implementations if s.backend == "triton").function(x, parts, None)
        if scheme.activation:
            up = {**parts, "weight": parts["weight"].clone()}
            matmul.launch_scaled(
                x.values, parts["weight"], x.scale, parts["scale"], None, x.dtype, up=up["weight"], up_scale=up["scale"]
            )
found = " ".join(assembly)
words = ["wgmma.mma_async", "f32.bf16.bf16", "f32.e4m3.e4m3", "s32.s8.s8", "cp.async.bulk.tensor"]
assert capability < 90 or all(word in found for word in words), [word for word in words if word not in found]
"""


ATTENTION = """
from s3dit.kernels import flash_attention
from s3dit.kernels.tune import trying

flash_attention.describable = lambda *tensors: 90 <= capability < 120
flash_attention.capability = lambda device: divmod(capability, 10)
for dim in (64, 96, 128):
    q, k, v = torch.zeros(64, 3 * 30 * dim, dtype=torch.bfloat16).unflatten(1, (3, 30, dim)).unbind(1)
    cu = torch.tensor([0, 64], dtype=torch.int32)
    for long in (False, True):
        config = flash_attention.estimated_config(flash_attention._block(dim), long, torch.device("cuda"))
        with trying("attention", config):
            flash_attention.flash_attention(q, k, v, cu, cu, 64, dim == 64)
        assert ("cp.async.bulk.tensor" in assembly[-1]) == (90 <= capability < 120 and dim != 96)
        assert ("wgmma" if capability == 90 else "mma.sync") in assembly[-1]
        assert ".local" not in assembly[-1]
"""


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize(
    "kernels, capability, shared",
    [
        *(pytest.param(PRODUCTS, target, shared, id=f"products-{target}") for target, shared in ((90, 227), (89, 99))),
        # For 89 and 90 those of the default path are compiled by tests/tools/test_kernel_report.py too.
        *(pytest.param(ROW_KERNELS, target, 48, id=f"rows-{target}") for target in (80, 120)),
        *(
            pytest.param(ATTENTION, target, shared, id=f"attention-{target}")
            for target, shared in ((90, 227), (120, 99))
        ),
    ],
)
@pytest.mark.slow
def test_kernels_compile_for_gpus(kernels, capability, shared, triton_cache):
    """At the sizes of the model, and without a GPU: finds what the interpreter forgives.

    Such are names that Triton does not know, types, more KiB of shared memory than there are, tensor cores left idle.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(triton_cache), "PYTHONWARNINGS": "ignore"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILER + kernels, str(capability), str(shared)],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

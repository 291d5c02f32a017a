"""Kernels of the number formats, compiled for GPUs that need not be there."""

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
COMPILED = """
import sys
import types

import torch

torch.cuda.is_available = lambda: True
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from s3dit.kernels import gguf_matmul, grouped, matmul, mixed_matmul
from s3dit.kernels.gguf import GGUF
from s3dit.kernels.rows import launch_quantize_rows
from s3dit.kernels.scheme import QuantizedRows
from s3dit.kernels.schemes import SCHEMES

capability, limit = int(sys.argv[1]), int(sys.argv[2])
names = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8"}
names[torch.float8_e4m3fn] = "fp8e4nv"
assembly = []

def launch(kernel, grid):
    def compiled(*given, **options):
        signature, constants, aligned = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(kernel.params, given, strict=True)):
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + names[value.dtype]
                aligned[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[parameter.name] = "i32"
            else:
                block = ",".join(map(str, value.block_shape))
                signature[parameter.name] = f"tensordesc<{names[value.base.dtype]}[{block}]>"
        source = ASTSource(kernel, signature, constants, aligned)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert built.metadata.shared <= limit * 1024, (kernel.__name__, options, built.metadata.shared)
        assembly.append(built.asm["ptx"])
    return compiled

triton.JITFunction.__getitem__ = launch
matmul._describable = lambda *tensors: capability >= 90
matmul.program_count = mixed_matmul.program_count = lambda device: 132
grouped.F = gguf_matmul.F = mixed_matmul.F = types.SimpleNamespace(linear=lambda x, weight, bias: None)
form = grouped.Form(torch.uint8, 16, torch.bfloat16, True, torch.bfloat16, rounded=True)
packed = (grouped.grouped("packed", form), grouped.grouped("fp8", grouped.Form(torch.float8_e4m3fn, 128)))
for rows in (64, 4224):
    for scheme in (*SCHEMES.values(), GGUF["Q8_0"], GGUF["Q5_K"], GGUF["Q6_K"], *packed):
        parts = {part: torch.zeros(shape, dtype=dtype) for part, (shape, dtype) in scheme.spec(3840, 10240).items()}
        x = torch.zeros(rows, 10240, dtype=torch.bfloat16)
        x = QuantizedRows(*launch_quantize_rows(x, scheme.activation), x.dtype) if scheme.activation else x
        next(s for s in scheme.linear.implementations if s.backend == "triton").function(x, parts, None)
found = " ".join(assembly)
words = ["wgmma.mma_async", "f32.bf16.bf16", "f32.e4m3.e4m3", "s32.s8.s8", "cp.async.bulk.tensor"]
assert capability < 90 or all(word in found for word in words), [word for word in words if word not in found]
"""


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("capability, shared", [(90, 227), (89, 99)])
def test_kernels_compile_for_gpus(capability, shared, tmp_path):
    """With the tiles of the model, and without a GPU: finds what the interpreter forgives.

    Such are names that Triton does not know, types, more KiB of shared memory than there are, tensor cores left idle.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(capability), str(shared)],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

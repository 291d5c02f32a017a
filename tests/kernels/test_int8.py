"""The int8 product of a CPU in processes of their own: under another default device, and without 8-bit dot products."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Extreme values: a saturated 16-bit sum of two products, signed times unsigned, 2 · 255 · 127, would not fit.
PRODUCT = """
from s3dit.kernels.int8 import int8
from s3dit.kernels.scheme import QuantizedRows
values = torch.full((48, 128), 127, dtype=torch.int8, device="cpu")
values[1::2] = -127
weight = torch.full((40, 128), 127, dtype=torch.int8, device="cpu")
weight[3::5] = -127
rows = QuantizedRows(values, torch.ones(48, 1, device="cpu"), torch.float32)
product = int8.linear(rows, {"weight": weight, "scale": torch.ones(40, 1, device="cpu")}, None)
exact = values.long() @ weight.long().T
assert product.device.type == "cpu" and torch.equal(product.long(), exact), product
"""


@pytest.mark.parametrize(
    ("before", "environment"),
    [
        ("", {}),
        ("torch.set_default_device('meta')", {}),
        ("", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
        ("torch.set_default_device('meta')", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    ],
)
@pytest.mark.slow
def test_extreme_int8_products_are_exact(before, environment):
    code = f"import torch\n{before}\n{PRODUCT}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr

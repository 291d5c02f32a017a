"""Copies of misaligned tensors, so that the bits of a product do not depend on where its weight lies in memory.

In fp32, a CPU's matrix product of few rows may take another order of sums where an operand does not start at a multiple
of 16 bytes. Seen with MKL on an AMD EPYC with AVX512-BF16, up to 23 rows, on one thread and on two; with 24 rows and
more, in bf16 and in convolutions never. What torch allocates starts at multiples of 64; a tensor in a mapped file lies
at any multiple of 8. So the same weights, mapped from one file, from another, or copied into memory, would give
pictures that differ in the fifth digit.

A product of few rows with a weight that may be mapped takes it through `aligned`: the copy costs another reading of a
weight whose product with few rows is mostly reading, is made only for misaligned weights, and is freed at once.
"""

import torch
from torch import Tensor, nn

# Rows of x from which on the weight need not be aligned; measured to be enough from 24 on.
MAX_ALIGNED_ROWS = 32
# Bytes; of torch's own allocations on a CPU.
ALIGNMENT = 64


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of it where its address in a CPU's memory is not a multiple of ALIGNMENT bytes.

    Any shape and dtype. Under torch.compile, and for tensors without memory (fake tensors, those of torch.func), always
    the tensor itself.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter):
        return tensor
    try:
        misplaced = tensor.data_ptr() % ALIGNMENT
    except RuntimeError:
        return tensor
    return tensor.clone() if misplaced else tensor

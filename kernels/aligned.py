"""Tensors at addresses that do not decide the bits of a product.

In fp32, a CPU's matrix product of few rows may take another order of sums where an operand does not start at a multiple
of 16 bytes. Seen with MKL on an AMD EPYC with AVX512-BF16, up to 23 rows, on one thread and on two; with 24 rows and
more, in bf16 and in convolutions never. What torch allocates starts at multiples of 64; a tensor in a mapped file lies
at any multiple of 8. So the same weights, mapped from one file, from another, or copied into memory, would give
pictures that differ in the fifth digit.

Whoever multiplies few rows by a weight that may be mapped takes it through `aligned`: the copy costs one more reading
of a weight whose product with few rows is little but reading, is made only where the file lies badly, and goes at once.
"""

import torch
from torch import Tensor, nn

# Rows from which on products are taken as they lie; seen to be enough from 24 on.
FEW_ROWS = 32
# Bytes; of torch's own allocations on a CPU.
ALIGNMENT = 64


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where it lies in a CPU's memory at no multiple of ALIGNMENT bytes.

    Under torch.compile, and for tensors without memory (fake ones, those of torch.func), always the tensor.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter):
        return tensor
    try:
        misplaced = tensor.data_ptr() % ALIGNMENT
    except RuntimeError:
        return tensor
    return tensor.clone() if misplaced else tensor

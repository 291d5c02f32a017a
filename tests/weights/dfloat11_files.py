"""A writer of DFloat11 groups, after the format's description, and DFloat11's own where it is installed."""

import heapq
import importlib.util
from itertools import count
from pathlib import Path

import pytest
import torch


def words(frequencies):
    """Huffman codes {symbol: text of 0 and 1}."""
    order = count()
    heap = [(number, next(order), {symbol: ""}) for symbol, number in frequencies.items()]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        joined = {s: "0" + w for s, w in left.items()} | {s: "1" + w for s, w in right.items()}
        heapq.heappush(heap, (a + b, next(order), joined))
    return {symbol: word or "0" for symbol, word in heap[0][2].items()}


def tables(coded):
    """The tables of codes: one for each whole number of bytes that goes before the end of one, and the lengths."""
    starts = sorted({word[: 8 * i] for word in coded.values() for i in range((len(word) - 1) // 8 + 1)}, key=len)
    luts = torch.zeros(len(starts) + 1, 256, dtype=torch.uint8)
    for symbol, word in coded.items():
        luts[-1, symbol] = len(word)
        for i in range(0, len(word), 8):
            row, byte = starts.index(word[:i]), word[i : i + 8]
            if i + 8 >= len(word):
                first = int(byte.ljust(8, "0"), 2)
                luts[row, first : first + (1 << 8 - len(byte))] = symbol
            else:
                luts[row, int(byte, 2)] = 256 - starts.index(word[: i + 8])
    return luts


def compress(weights, coded=None):
    """The six tensors of a group of bf16 weights; coded: codes other than Huffman's {exponent: text of bits}."""
    bits = torch.cat([weight.flatten() for weight in weights]).view(torch.int16).int()
    exponents = (bits >> 7 & 255).long()
    symbols, numbers = exponents.unique(return_counts=True)
    coded = coded or words(dict(zip(symbols.tolist(), numbers.tolist(), strict=True)))
    lengths, codes = torch.zeros(256, dtype=torch.long), torch.zeros(256, dtype=torch.long)
    for symbol, word in coded.items():
        lengths[symbol], codes[symbol] = len(word), int(word, 2)
    length, code = lengths[exponents], codes[exponents]
    begin = length.cumsum(0) - length
    size = -(-int(length.sum()) // 8)
    blocks = -(-size // 4096)
    stream = torch.zeros(blocks * 4096 * 8, dtype=torch.uint8)
    for i in range(int(length.max())):
        has = length > i
        stream[begin[has] + i] = (code[has] >> length[has] - 1 - i & 1).to(torch.uint8)
    runs = torch.arange(blocks * 512) * 64
    first = torch.searchsorted(begin, runs)
    gaps = torch.where(first < len(begin), begin[first.clamp(max=len(begin) - 1)] - runs, 0)
    gap_bits = (gaps[:, None] >> torch.arange(4, -1, -1) & 1).flatten()
    return {
        "encoded_exponent": pack(stream)[:size],
        "sign_mantissa": (bits >> 8 & 128 | bits & 127).to(torch.uint8),
        "luts": tables(coded),
        "gaps": pack(gap_bits),
        "output_positions": torch.cat([first[::512], torch.tensor([len(begin)])]).to(torch.uint32).view(torch.uint8),
        "split_positions": torch.tensor([weight.numel() for weight in weights]).cumsum(0)[:-1],
    }


def pack(bits):
    return (bits.view(-1, 8).long() << torch.arange(7, -1, -1)).sum(1).to(torch.uint8)


def compress_with_dfloat11(weights):
    """The same by DFloat11's own encoder; of its modules the only one that imports without cupy."""
    if (package := importlib.util.find_spec("dfloat11")) is None:
        pytest.skip("needs DFloat11's encoder: pip install 's3dit[test]'")
    path = Path(package.origin).with_name("dfloat11_utils.py")
    spec = importlib.util.spec_from_file_location("dfloat11_utils", path)
    own = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    flat = [weight.flatten() for weight in weights]
    codec, _, table = own.get_32bit_codec(own.get_codec(torch.cat(flat))[1])
    codes, signs, positions, gaps, splits = own.encode_weights(flat, codec, 8, 512)
    return {
        "encoded_exponent": codes.clone(), "sign_mantissa": signs, "luts": own.get_luts(table), "gaps": gaps,
        "output_positions": positions.view(torch.uint8).clone(), "split_positions": splits,
    }  # fmt: skip

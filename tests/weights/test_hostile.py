"""Files as an attacker or a bad line makes them: mutants of each container, and the classics one by one.

Each is read to the end or refused with a CheckpointError, in bounded time, without allocating above twice the file. CI
runs some hundreds of mutants; S3DIT_MUTANTS=50000 is for a longer run.
"""

import contextlib
import json
import os
import struct
import time
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from s3dit.errors import CheckpointError
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.container import MAX_HEADER_BYTES, MAX_TENSORS, sniff
from s3dit.weights.gguf_file import GGUFFile
from s3dit.weights.split_checkpoint import split

MUTANTS = int(os.environ.get("S3DIT_MUTANTS", "3000" if os.environ.get("S3DIT_SLOW") == "1" else "600"))
# Of one draw.
BATCH = 20
# What Python itself allocates for its objects, and now and then for a module, beside what a file asks for.
FLOOR = 1 << 21
NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    31,
    32,
    33,
    255,
    10**9,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
OPS = ("byte", "u32", "u64", "cut", "drop", "repeat", "insert", "bit")


def edits(seed):
    """Up to four edits, (what, where, number), of 16 bytes; the first is always one."""
    for i in range(0, 16, 4):
        op, number, where = struct.unpack("<BBH", seed[i : i + 4])
        if i == 0 or op < 128:
            yield OPS[op % len(OPS)], where, NUMBERS[number % len(NUMBERS)]


def mutate(data, edits):
    """A file after some edits, each (what, where, number)."""
    data = bytearray(data)
    for op, where, number in edits:
        at = where % max(1, len(data))
        if op == "byte":
            data[at : at + 1] = bytes([number % 256])
        elif op == "bit" and data:
            data[at] ^= 1 << number % 8
        elif op == "u32":
            data[at : at + 4] = struct.pack("<I", number % 2**32)
        elif op == "u64":
            data[at : at + 8] = struct.pack("<Q", number)
        elif op == "cut":
            del data[at:]
        elif op == "drop":
            del data[at : at + 1 + number % 40]
        elif op == "repeat":
            data[at:at] = data[at : at + 1 + number % 200]
        else:
            data[at:at] = bytes([number % 256]) * (1 + number % 9)
    return bytes(data)


def devour(path):
    """Read all that a file lets itself be read; CheckpointError is the only way out besides."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint:
        entry = checkpoint.entry(name)
        assert entry.nbytes <= path.stat().st_size
        if isinstance(entry.dtype, torch.dtype):
            tensor = checkpoint.load(name)
            assert tuple(tensor.shape) == entry.shape and tensor.nbytes == entry.nbytes
    if sniff(path) == "gguf":
        file = GGUFFile(path)
        for key in file.fields:
            with contextlib.suppress(CheckpointError):
                file.items(key)
    split(checkpoint)


def feed(path, data):
    """Whether a file was read; it must not take long nor much."""
    path.write_bytes(data)
    tracemalloc.start()
    start, read = time.process_time(), False
    with contextlib.suppress(CheckpointError):
        devour(path)
        read = True
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 2 and peak < 2 * len(data) + FLOOR
    return read


TENSORS = {
    "cap_embedder.0.weight": torch.ones(8), "cap_pad_token": torch.ones(1, 8), "layers.0.a.weight": torch.ones(4, 8),
    "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(2, 34, dtype=torch.uint8), "empty": torch.ones(0, 4),
}  # fmt: skip


def gguf_bytes(path):
    """A GGUF file from the specification, every kind of value in it."""

    def text(words):
        return struct.pack("<Q", len(words)) + words.encode()

    keys = text("general.architecture") + struct.pack("<I", 8) + text("lumina2")
    keys += text("general.alignment") + struct.pack("<II", 4, 32)
    keys += text("tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("") + text("bcd")
    keys += text("types") + struct.pack("<IIQ3i", 9, 5, 3, 1, 2, 3) + text("base") + struct.pack("<If", 6, 1e6)
    table, data = b"", b""
    for name, tensor in TENSORS.items():
        kind = {torch.float32: 0, torch.bfloat16: 30, torch.uint8: 8}[tensor.dtype]
        shape = (2, 32) if kind == 8 else tensor.shape
        table += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        table += struct.pack("<IQ", kind, len(data))
        data += tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        data += bytes(-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(TENSORS), 5) + keys + table
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path.read_bytes()


def safetensors_bytes(path):
    save_file(TENSORS, path, metadata={"format": "pt", "note": 'a \\ " b'})
    return path.read_bytes()


@pytest.mark.parametrize("make", [gguf_bytes, safetensors_bytes])
@pytest.mark.longer
def test_mutants(make, tmp_path):
    path = tmp_path / "x"
    whole = make(path)
    devour(path)
    seen = {True: 0, False: 0}

    @settings(max_examples=MUTANTS // BATCH, deadline=None, database=None, derandomize=True)
    @given(st.binary(min_size=BATCH * 16, max_size=BATCH * 16))
    def batch(seed):
        """One draw is many mutants, since drawing takes longer than reading; it still shrinks to the byte at fault."""
        for start in range(0, len(seed), 16):
            seen[feed(path, mutate(whole, edits(seed[start : start + 16])))] += 1

    batch()
    # Mutants of both sorts were made, so the test looks at more than the first check of each reader.
    assert min(seen.values()) > MUTANTS // 50


@pytest.mark.parametrize("make", [gguf_bytes, safetensors_bytes])
def test_cut_at_every_byte(make, tmp_path):
    path = tmp_path / "x"
    whole = make(path)
    end = len(whole) - (64 if make is gguf_bytes else 0)
    for size in range(end):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


A = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HOSTILE = {
    "a header of 2^63": file({"a": tensor()}, bytes(4), length=2**63),
    "a header beyond the end": file({"a": tensor()}, bytes(4), length=10**6),
    "offsets beyond the end": file({"a": tensor(0, 400, (100,))}, bytes(4)),
    "offsets backwards": file({"a": tensor(4, 0)}, bytes(4)),
    "one over another": file({"a": tensor(), "b": tensor(0, 4)}, bytes(4)),
    "a hole": file({"a": tensor(), "b": tensor(8, 12)}, bytes(12)),
    "a wild size": file({"a": tensor(0, 4, (2**62, 2**62))}, bytes(4)),
    "a negative size": file({"a": tensor(0, 4, (-1,))}, bytes(4)),
    "an unknown type": file({"a": tensor(dtype="Q99")}, bytes(4)),
    "a bomb of brackets": file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a key twice": file(b'{"a":' + A + b',"a":' + A + b"}", bytes(4)),
    "metadata twice": file(b'{"__metadata__":{"x":"1","x":"2"},"a":' + A + b"}", bytes(4)),
    "a number of a million digits": file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,4]}}'),
    "metadata that is no text": file({"__metadata__": {"x": [1]}, "a": tensor()}, bytes(4)),
    "no object": file(b"[1, 2]"),
    "too many tensors": file(
        b'{"a":' + b",".join([A.replace(b'"dtype"', b'"data_offsets"')] * (MAX_TENSORS + 1)) + b"}"
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_the_classics_of_safetensors(case, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[case])
    start = time.process_time()
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert time.process_time() - start < 2
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1000


def test_a_header_longer_than_sense(tmp_path):
    """A hole on the disk with a header of 64 MB is refused before it is read."""
    with (tmp_path / "x").open("wb") as opened:
        opened.write(struct.pack("<Q", 2 * MAX_HEADER_BYTES) + b"{")
        opened.truncate(2 * MAX_HEADER_BYTES + 100)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="neither safetensors nor GGUF"):
        open_checkpoint(tmp_path / "x")
    assert tracemalloc.get_traced_memory()[1] < FLOOR
    tracemalloc.stop()


@pytest.mark.parametrize(
    "index, words",
    [
        (b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', "is there twice"),
        (b'{"weight_map":{"a":"../x.safetensors"}}', "plain name"),
        (b'{"weight_map":{"a":"/etc/x.safetensors"}}', "plain name"),
        (b'{"weight_map":' + b"[" * 100_000 + b"}", "not readable as JSON"),
        (b" " * (1 << 24) + b'{"weight_map":{}}', "is too large"),
    ],
)
def test_indices(index, words, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path)

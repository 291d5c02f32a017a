"""GGUF files of an independent writer (gguf-py) read to the byte, and broken headers refused in one line."""

import struct

import numpy as np
import pytest
import torch

from s3dit.errors import CheckpointError
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.container import sniff
from s3dit.weights.gguf_file import GGML_TYPES, PLAIN_TYPES, GGUFFile

gguf = pytest.importorskip("gguf", reason="GGUF files are made by gguf-py: pip install 's3dit[test]'")


def write(path, tensors, arch="lumina2", **fields):
    """tensors: name -> numpy array, or (bytes as uint8, type name)."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        writer.add_key_value(key.replace("__", "."), value, *kind(value))
    for name, data in tensors.items():
        data, dtype = data if isinstance(data, tuple) else (data, None)
        writer.add_tensor(name, data, raw_dtype=None if dtype is None else gguf.GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def kind(value):
    types = gguf.GGUFValueType
    if isinstance(value, list):
        return types.ARRAY, types.STRING if isinstance(value[0], str) else types.INT32
    return ({str: types.STRING, int: types.UINT32, float: types.FLOAT32, bool: types.BOOL}[type(value)],)


def noise(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


@pytest.fixture
def path(tmp_path):
    bf16 = torch.from_numpy(noise(1, 6)).bfloat16().view(torch.uint8).numpy()
    tensors = {
        "a": noise(3, 4), "b": noise(5).astype(np.float16), "c": (bf16, "BF16"),
        "d": (gguf.quantize(noise(4, 64), gguf.GGMLQuantizationType.Q8_0), "Q8_0"),
        "e": (np.arange(2 * 2 * 144, dtype=np.uint8).reshape(2, 288), "Q4_K"),
    }  # fmt: skip
    return write(
        tmp_path / "x.gguf", tensors, x__count=3, x__base=1e6, x__on=True, x__words=["a", "", "ü"], x__n=[1, -2]
    )


def test_blocks_are_those_of_ggml():
    theirs = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert theirs == GGML_TYPES


def test_every_byte_and_shape(path):
    found = GGUFFile(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(found) == set(theirs)
    for name, tensor in theirs.items():
        mine = found.load(name)
        assert mine.contiguous().view(torch.uint8).numpy().tobytes() == tensor.data.tobytes()
        assert found.shapes[name] == tuple(reversed(tensor.shape.tolist()))
        assert found.entry(name).shape == tuple(mine.shape) and found.entry(name).nbytes == tensor.n_bytes
    assert torch.equal(found.load("a"), torch.from_numpy(noise(3, 4)))
    assert found.load("c").dtype == torch.bfloat16 and found.load("c").shape == (1, 6)
    assert found.ggml_types == {"d": "Q8_0", "e": "Q4_K"}
    assert found.entry("e").shape == (2, 288) and found.entry("e").dtype == "uint8"


def test_metadata_as_it_is_typed(path):
    found = GGUFFile(path)
    assert found.metadata["general.architecture"] == "lumina2"
    assert (found.fields["x.count"], found.fields["x.base"], found.fields["x.on"]) == (3, 1e6, True)
    assert found.items("x.words") == ["a", "", "ü"] and found.items("x.n") == [1, -2]
    with pytest.raises(CheckpointError, match="no list 'x.count'"):
        found.items("x.count")
    with pytest.raises(CheckpointError, match="no tensor 'f' among 5"):
        found.load("f")


def test_views_of_one_private_map(path):
    """No copy is made, and writing into a view never reaches the file."""
    found, before = open_checkpoint(path), path.read_bytes()
    view = found.load("a")
    assert view.data_ptr() == found.load("a").data_ptr()
    view.zero_()
    assert path.read_bytes() == before and GGUFFile(path).load("a").any()


def test_a_folder_with_one_file(path):
    assert open_checkpoint(path.parent).path == path


def test_cut_at_every_boundary(path, tmp_path):
    whole, short = path.read_bytes(), tmp_path / "short.gguf"
    # The last tensor's padding is not missed by anybody.
    for size in range(8, len(whole) - 64, 3):
        short.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="broken GGUF"):
            GGUFFile(short)


def header(tensors=0, keys=0, body=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body + bytes(64)


def text(words, length=None):
    return struct.pack("<Q", len(words) if length is None else length) + words


def tensor(name=b"t", dims=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, offset)


def key(kind, value, name=b"general.alignment"):
    return text(name) + struct.pack("<I", kind) + value


HOSTILE = {
    "a billion tensors": (header(10**9), "claims 1000000000 tensors"),
    "2^63 keys": (header(0, 2**63), "keys"),
    "a long name": (header(1, 0, text(b"t", 2**63)), "a text of"),
    "a text beyond the end": (header(0, 1, key(8, text(b"x", 500))), "a text of 500 bytes"),
    "a list beyond the end": (header(0, 1, key(9, struct.pack("<IQ", 0, 2**62))), "a list of"),
    "texts beyond the end": (header(0, 1, key(9, struct.pack("<IQ", 8, 2**60))), "texts in"),
    "a list of lists": (header(0, 1, key(9, struct.pack("<IQ", 9, 1) * 3)), "a list of type 9"),
    "an unknown value": (header(0, 1, key(77, b"")), "a value of type 77"),
    "a key twice": (header(0, 2, key(0, b"\1") * 2), "is there twice"),
    "alignment 0": (header(0, 1, key(4, struct.pack("<I", 0))), "general.alignment is 0"),
    "alignment 2^31": (header(0, 1, key(4, struct.pack("<I", 2**31))), "general.alignment is 2147483648"),
    "alignment in words": (header(0, 1, key(8, text(b"many"))), "general.alignment is many"),
    "no such type": (header(1, 0, tensor(kind=31)), "type 31"),
    "a negative size": (header(1, 0, tensor(dims=(2**64 - 4, 4))), "has the sizes"),
    "a size hidden by a zero": (header(1, 0, tensor(dims=(0, 2**63))), "has the sizes"),
    "many dimensions": (header(1, 0, tensor(dims=(1,) * 5)), "5 dimensions"),
    "no blocks": (header(1, 0, tensor(kind=12, dims=(256, 0))), "multiple of 256"),
    "half a block": (header(1, 0, tensor(kind=12, dims=(128, 4))), "multiple of 256"),
    "beyond the end": (header(1, 0, tensor(dims=(4096,))), "is said to lie at"),
    "a wild offset": (header(1, 0, tensor(offset=2**63)), "is said to lie at"),
    "a crooked offset": (header(1, 0, tensor(offset=4)), "a multiple of 32"),
    "one over another": (header(2, 0, tensor() + tensor(b"u")), "behind the tensor before it"),
    "a name twice": (header(2, 0, tensor() + tensor(offset=32)), "listed twice"),
    "not UTF-8": (header(1, 0, tensor(b"\xff\xfe")), "not UTF-8"),
    "the first version": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case, tmp_path):
    data, words = HOSTILE[case]
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=words.replace("^", r"\^")) as error:
        open_checkpoint(tmp_path / "x.gguf")
    assert len(str(error.value).splitlines()) == 1


def test_an_empty_file_of_gguf_is_named(tmp_path):
    (tmp_path / "x").write_bytes(header())
    assert sniff(tmp_path / "x") == "gguf" and len(open_checkpoint(tmp_path / "x")) == 0
    assert set(PLAIN_TYPES) <= {name for name, *_ in GGML_TYPES.values()}

"""Safetensors files and folders: what is read, and everything that is refused before a tensor is read."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s3dit.errors import CheckpointError
from s3dit.weights.checkpoint import open_checkpoint
from s3dit.weights.safetensors_dir import open_file, write_safetensors

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HOME = {"a": FIRST, "b": SECOND, "c": FIRST}


def write_raw(path, header, data=b"", length=None):
    """A file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def write_index(folder, home, name=INDEX):
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": home}))


@pytest.fixture
def tensors():
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0), "c": torch.tensor([[-1.0]])}


@pytest.fixture
def sharded(tmp_path, tensors):
    """a and c in the first shard, b in the second."""
    save_file({"a": tensors["a"], "c": tensors["c"]}, tmp_path / FIRST)
    save_file({"b": tensors["b"]}, tmp_path / SECOND)
    write_index(tmp_path, HOME)
    return tmp_path


def refused(path, words):
    with pytest.raises(CheckpointError, match=words) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool,
     torch.float8_e4m3fn, torch.float8_e5m2],
)  # fmt: skip
def test_one_file(dtype, tmp_path):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors", metadata={"source": "test"})
    # The container alone: what is quantized is shown as the parts of a format above it.
    checkpoint = open_file(tmp_path / "x.safetensors")
    entry = checkpoint.entry("x")
    assert (entry.shape, entry.dtype, entry.nbytes) == ((2, 3), str(dtype).removeprefix("torch."), 6 * dtype.itemsize)
    loaded = checkpoint.load("x")
    assert loaded.dtype == dtype and torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))
    assert checkpoint.metadata["source"] == "test"
    assert open_checkpoint(tmp_path).keys() == ["x"], "a folder with one file is that file"


def test_dtype_that_torch_lacks_is_a_word(tmp_path):
    path = write_raw(tmp_path / "x.safetensors", {"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, b"ab")
    assert open_checkpoint(path).entry("x").dtype == "F4"


def test_keys_come_in_the_order_of_the_disk(tmp_path):
    place = {"dtype": "F32", "shape": [1]}
    header = {"late": place | {"data_offsets": [4, 8]}, "early": place | {"data_offsets": [0, 4]}}
    assert open_checkpoint(write_raw(tmp_path / "x.safetensors", header, bytes(8))).keys() == ["early", "late"]


def test_tensors_are_views_of_the_file(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    first, again = checkpoint.load("a"), checkpoint.load("a")
    assert first.data_ptr() == again.data_ptr()
    del checkpoint
    # The map is private and lives as long as a view of it does.
    first.fill_(9)
    assert again.eq(9).all() and path.read_bytes() == before


def test_misaligned_file_is_read(tmp_path):
    """Old writers did not pad the header; 13 bytes of name make the data begin at an odd address."""
    header = {"odd": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    tensor = open_checkpoint(write_raw(tmp_path / "x.safetensors", text, data)).load("odd")
    assert tensor.tolist() == [1.5, -2.0] and tensor.data_ptr() % 4 == 0


@pytest.mark.parametrize("name", [INDEX, "diffusion_pytorch_model.safetensors.index.json", "w.safetensors.index.json"])
def test_shards(sharded, tensors, name):
    (sharded / INDEX).rename(sharded / name)
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.keys() == ["a", "c", "b"]
    for key, tensor in tensors.items():
        assert torch.equal(checkpoint.load(key), tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/maps")
def test_one_shard_is_mapped_at_a_time(sharded):
    checkpoint = open_checkpoint(sharded)

    def mapped():
        maps = Path("/proc/self/maps").read_text()
        return [name for name in (FIRST, SECOND) if str(sharded / name) in maps]

    assert mapped() == []
    checkpoint.load("a")
    assert mapped() == [FIRST]
    checkpoint.load("b")
    assert mapped() == [SECOND]


def test_hidden_files_are_not_seen(sharded):
    (sharded / f"._{INDEX}").write_bytes(b"\0\5\x16\7")
    assert len(open_checkpoint(sharded)) == 3


def test_official_stem_before_others(tmp_path, tensors):
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"x": tensors["a"]}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert len(open_checkpoint(tmp_path)) == 3


def test_choice_of_files(tmp_path, tensors):
    for name in ("one", "two"):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    assert "one.safetensors, two.safetensors" in refused(tmp_path, "2 files")


def test_choice_of_indices(sharded):
    write_index(sharded, HOME, "other.safetensors.index.json")
    (sharded / INDEX).rename(sharded / "third.safetensors.index.json")
    refused(sharded, r"2 files \*.safetensors.index.json")


def test_missing_shard(sharded):
    (sharded / SECOND).unlink()
    refused(sharded, f"{SECOND}: missing, the index names it; download this shard")


def test_missing_index(sharded):
    (sharded / INDEX).unlink()
    refused(sharded, "shards .* without the")


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_truncated_shard(sharded, cut):
    """Cut in the data and in the header."""
    data = (sharded / FIRST).read_bytes()
    (sharded / FIRST).write_bytes(data[:-cut])
    assert FIRST in refused(sharded, "cut short or damaged")


def test_longer_file(sharded):
    (sharded / FIRST).write_bytes((sharded / FIRST).read_bytes() + b"\0")
    refused(sharded, "damaged")


PLACE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{garbage", None),
        (b'{"x": 3}', None),
        (b"{}", 1 << 20),
        (b"{" * 20_000, None),
        (json.dumps({"x": PLACE | {"data_offsets": [0, 400]}}).encode(), None),
        (json.dumps({"x": PLACE | {"shape": [9]}}).encode(), None),
        (json.dumps({"x": PLACE | {"shape": [-1]}}).encode(), None),
        (json.dumps({"x": PLACE | {"shape": [1 << 62, 1 << 62]}}).encode(), None),
        (json.dumps({"x": PLACE | {"dtype": "Q7"}}).encode(), None),
        (json.dumps({"x": PLACE, "y": PLACE}).encode(), None),
    ],
    ids=["no-json", "no-entry", "long", "deep", "beyond", "shape", "negative", "overflow", "dtype", "overlap"],
)
def test_garbage_header(header, length, tmp_path):
    refused(write_raw(tmp_path / "x.safetensors", header, bytes(4), length), "x.safetensors: .*damaged")


def test_header_longer_than_the_format_allows(tmp_path):
    refused(write_raw(tmp_path / "x.safetensors", b"{}", length=200_000_000), "neither safetensors nor GGUF")


def test_shard_that_is_no_safetensors(sharded):
    (sharded / FIRST).write_bytes(b"\x80\x02}q\x00.")
    refused(sharded, f"{FIRST}: is a pickle")


def test_index_names_a_tensor_that_is_nowhere(sharded):
    write_index(sharded, HOME | {"ghost": FIRST})
    assert f"ghost (not in {FIRST})" in refused(sharded, "index and the shards disagree: 1 tensors")


def test_index_names_the_wrong_shard(sharded):
    write_index(sharded, HOME | {"b": FIRST, "c": SECOND})
    assert f"b (not in {FIRST})" in refused(sharded, "disagree: 2 tensors")


def test_tensor_that_the_index_does_not_name(sharded):
    write_index(sharded, {"a": FIRST, "b": SECOND})
    assert f"c (in {FIRST})" in refused(sharded, "1 are in a shard but not in the index")


def test_tensor_in_two_shards(sharded, tensors):
    save_file({"b": tensors["b"], "a": tensors["a"]}, sharded / SECOND)
    refused(sharded, f"a lies in two shards, {FIRST} and {SECOND}")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\0"],
)
def test_broken_index(sharded, text):
    (sharded / INDEX).write_text(text)
    refused(sharded, "JSON|weight_map")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..\\model.safetensors", "..", "",
     "model.safetensors\0", "model.bin", "./model.safetensors", "C:\\model.safetensors"],
)  # fmt: skip
def test_index_stays_inside_the_folder(sharded, tensors, name):
    """The file is there for those names that could reach one, so only the rule stands in the way."""
    inside = sharded / "inside"
    (inside / "sub").mkdir(parents=True)
    for folder in (sharded, inside, inside / "sub"):
        save_file(tensors, folder / "model.safetensors")
    write_index(inside, dict.fromkeys(tensors, name))
    refused(inside, "the index names a shard .*needed the plain name")


def test_link_out_of_the_folder(sharded, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (sharded / FIRST).rename(outside / "blob")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (INDEX, SECOND):
        (sharded / name).rename(folder / name)
    (folder / FIRST).symlink_to(outside / "blob")
    refused(folder, "a link that leaves the folder")


def test_snapshot_of_the_hub_cache(sharded, tmp_path):
    """huggingface_hub: snapshots/REVISION/PART/FILE is a relative link to blobs/HASH of the same repository."""
    entry = tmp_path / "models--org--name"
    part = entry / "snapshots" / "0123abcd" / "text_encoder"
    part.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, name in enumerate((INDEX, FIRST, SECOND)):
        (sharded / name).rename(entry / "blobs" / f"{number:064x}")
        (part / name).symlink_to(Path("../../../blobs") / f"{number:064x}")
    checkpoint = open_checkpoint(part)
    assert len(checkpoint) == 3 and checkpoint.load("b").tolist() == [0, 1, 2, 3]
    # Another repository's blobs are outside.
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (entry / "blobs" / f"{1:064x}").rename(other / "x")
    (part / FIRST).unlink()
    (part / FIRST).symlink_to(other / "x")
    refused(part, "leaves the folder")


def test_folder_as_a_link(sharded, tmp_path):
    (tmp_path / "link").symlink_to(sharded, target_is_directory=True)
    assert len(open_checkpoint(tmp_path / "link")) == 3


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (None, "found nothing; download the folder again"),
        ("readme.txt", "found readme.txt"),
        ("model_index.json", "a whole model; give the folder of one part"),
        ("model.gguf", "neither safetensors nor GGUF"),
        ("pytorch_model.bin", "is a pickle"),
    ],
)
def test_folder_without_safetensors(file, words, tmp_path):
    if file is not None:
        (tmp_path / file).write_bytes(b"x")
    refused(tmp_path, words)


def test_what_is_written_may_be_read_as_any_new_file(tmp_path):
    (tmp_path / "any").touch()
    write_safetensors({"a": torch.ones(2)}, tmp_path / "new.safetensors", {"of": "nobody"})
    assert (tmp_path / "new.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
    assert open_checkpoint(tmp_path / "new.safetensors").load("a").tolist() == [1, 1]

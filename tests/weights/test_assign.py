"""A checkpoint into a meta model: every name accounted for, one tensor at a time, or nothing at all."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from s3dit.errors import CheckpointError
from s3dit.weights.assign import assign, pending, verify
from s3dit.weights.checkpoint import open_checkpoint


class Model(nn.Module):
    """The corners of a real one: nested names, a bare parameter, a buffer, numbers in names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.ModuleDict({"2-1": nn.Linear(3, 2)})
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        self.pad = nn.Parameter(torch.empty(1, 2))
        self.register_buffer("scale", torch.empty(2))


def blank():
    with torch.device("meta"):
        return Model()


class Spied:
    """A checkpoint that remembers what was loaded and whether the tensor before it was still held."""

    def __new__(cls, checkpoint):
        load, checkpoint.loaded, checkpoint.held, last = checkpoint.load, [], [], []

        def spy(name):
            checkpoint.held.append(any(ref() is not None for ref in last))
            tensor = load(name)
            last[:] = [weakref.ref(tensor)]
            checkpoint.loaded.append(name)
            return tensor

        checkpoint.load = spy
        # The map stays, so that addresses can be compared afterwards.
        checkpoint.release = lambda: None
        return checkpoint


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(t.shape, generator=generator) for name, t in blank().state_dict().items()}


@pytest.fixture
def stored(tmp_path):
    """Save tensors and open them again, spied upon."""

    def save(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        return Spied(open_checkpoint(tmp_path))

    return save


def untouched(model):
    return all(tensor.is_meta for tensor in model.state_dict().values())


def test_every_value_arrives(tensors, stored):
    model = blank()
    assign(model, stored(tensors), dtype=torch.float32)
    found = model.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert not any(p.requires_grad for p in model.parameters())
    assert isinstance(model.pad, nn.Parameter) and not isinstance(model.scale, nn.Parameter)
    assert model.embed["2-1"](torch.ones(1, 3)).shape == (1, 2)


def test_views_where_the_dtype_agrees(tensors, stored):
    model, checkpoint = blank(), stored(tensors)
    assign(model, checkpoint, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == checkpoint.load(name).data_ptr(), name


def maps(path):
    """How often this process has mapped a file."""
    return sum(line.rstrip().endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_a_file_is_mapped_for_as_long_as_its_tensors_live(tensors, tmp_path):
    """A part that is let go must not leave its pages behind: they count as resident memory."""
    safe, other = tmp_path / "model.safetensors", tmp_path / "model.gguf"
    save_file(tensors, safe)
    writer = pytest.importorskip("gguf").GGUFWriter(other, "any")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path in (safe, other):
        checkpoint, model = open_checkpoint(path), blank()
        assign(model, checkpoint, dtype=torch.float32)
        assert maps(path) >= 1
        del model
        assert maps(path) == 0
        assert torch.equal(checkpoint.load("scale"), tensors["scale"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_one_tensor_at_a_time(tensors, stored, dtype):
    model, checkpoint = blank(), stored(tensors)
    assign(model, checkpoint, dtype=dtype)
    assert all(torch.equal(found, tensors[name].to(dtype)) for name, found in model.state_dict().items())
    assert not any(checkpoint.held), "an already cast tensor was still held when the next one was read"
    assert checkpoint.loaded == checkpoint.keys(), "tensors are read once, in their order on disk"


def test_mixed_dtypes(tensors, stored):
    """What agrees stays a view, what does not is cast; both in one model."""
    mixed = {name: t.bfloat16() if name.startswith("layers") else t for name, t in tensors.items()}
    model, checkpoint = blank(), stored(mixed)
    assign(model, checkpoint, dtype=torch.bfloat16)
    shared = {n for n, t in model.state_dict().items() if t.data_ptr() == checkpoint.load(n).data_ptr()}
    assert shared == {name for name in tensors if name.startswith("layers")}
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}


def test_unused_is_never_read(tensors, stored):
    model = blank()
    checkpoint = stored(tensors | {"lm_head.weight": torch.ones(4)})
    assign(model, checkpoint, dtype=torch.float32, unused=("layers.2.*", "lm_head.weight"))
    assert sorted(checkpoint.loaded) == sorted(tensors.keys() - {"layers.2.weight"})
    assert model.layers[2].weight.is_meta and not model.layers[1].weight.is_meta


def test_unused_may_be_absent(tensors, stored):
    del tensors["layers.2.weight"]
    assign(blank(), stored(tensors), dtype=torch.float32, unused=("layers.2.*",))


def test_progress_adds_up_to_pending(tensors, stored):
    checkpoint, steps = stored(tensors), []
    unused = ("layers.0.*",)
    total = pending(blank(), checkpoint, unused)
    assert checkpoint.loaded == []
    assign(blank(), checkpoint, dtype=torch.bfloat16, unused=unused, progress=steps.append)
    assert sum(steps) == total == 4 * sum(t.numel() for n, t in tensors.items() if n != "layers.0.weight")


FAULTS = {
    "missing": (lambda t: t.pop("pad"), r"1 tensors missing \(pad\)"),
    "unexpected": (lambda t: t.update(ghost=torch.ones(1)), r"1 tensors unexpected \(ghost\)"),
    "shape": (
        lambda t: t.update(pad=torch.ones(2, 1)),
        r"1 tensors of a wrong shape \(pad \[2, 1\], needed \[1, 2\]\)",
    ),
    "rank": (lambda t: t.update(pad=torch.ones(2)), r"1 tensors of a wrong shape \(pad \[2\], needed \[1, 2\]\)"),
    "int8": (lambda t: t.update(pad=torch.ones(1, 2).to(torch.int8)), r"1 tensors not in .* \(pad int8\)"),
    "int32": (lambda t: t.update(scale=torch.ones(2, dtype=torch.int32)), r"1 tensors not in .* \(scale int32\)"),
    "fp64": (lambda t: t.update(pad=torch.ones(1, 2).double()), r"\(pad float64\)"),
    # The last layer is not read, but its shape still tells that the file is of another model.
    "unused": (lambda t: t.update({"layers.2.weight": torch.ones(3, 3)}), r"wrong shape \(layers.2.weight"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unfit_checkpoint(tensors, stored, fault):
    """`verify`, `pending` and `assign` say the same, before a tensor is read and with the model untouched."""
    spoil, words = FAULTS[fault]
    spoil(tensors)
    model, checkpoint = blank(), stored(tensors)
    unused = ("layers.2.*",)
    for ask in (
        lambda: verify(model, checkpoint, unused),
        lambda: pending(model, checkpoint, unused),
        lambda: assign(model, checkpoint, dtype=torch.float32, unused=unused),
    ):
        with pytest.raises(CheckpointError, match=words) as error:
            ask()
        assert "take weights and config.json from the same model" in str(error.value)
    assert checkpoint.loaded == [] and untouched(model)


def test_all_trouble_in_one_message(tensors, stored):
    for fault in ("missing", "unexpected", "int32"):
        FAULTS[fault][0](tensors)
    with pytest.raises(CheckpointError, match=r"1 tensors missing .*; 1 tensors unexpected .*; 1 tensors not in"):
        verify(blank(), stored(tensors))


def test_long_lists_are_cut(tensors, stored):
    tensors |= {f"ghost{i:02}": torch.ones(1) for i in range(12)}
    with pytest.raises(CheckpointError, match=r"12 tensors unexpected \(ghost00, .*ghost09, …\)"):
        verify(blank(), stored(tensors))


def test_sound_checkpoint_verifies(tensors, stored):
    checkpoint = stored(tensors)
    verify(blank(), checkpoint)
    assert checkpoint.loaded == []


def test_another_model_altogether(stored):
    with pytest.raises(CheckpointError, match="7 tensors missing .*; 1 tensors unexpected"):
        assign(blank(), stored({"conv.weight": torch.ones(1)}), dtype=torch.float32)

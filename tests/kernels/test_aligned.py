"""The same bits from any file: products of few rows never see an address that depends on where a tensor lies in one.

Some CPUs give other bits where an operand is misaligned (`kernels.aligned`), most do not. So two things are tested: on
every CPU, that no such operand reaches a product; and that the bits are the same, on whatever CPU this runs.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from s3dit import Pipeline
from s3dit.kernels.aligned import ALIGNMENT, MAX_ALIGNED_ROWS
from s3dit.model.linear import Linear
from s3dit.runtime.embedded import EMBEDDED

# Of one prompt below MAX_ALIGNED_ROWS tokens, with guidance, so that all kinds of small products are met.
REQUEST = {
    "prompt": "a red star", "seed": 3, "height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.5,
    "output_type": "latent",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv"}


def save_shifted(tensors, path, shift):
    """Write tensors so that the first begins `shift` bytes behind a multiple of ALIGNMENT, in the file and mapped."""
    for length in range(0, 2 * ALIGNMENT, 8):
        save_file(tensors, path, metadata={"note": "x" * length})
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        if start % ALIGNMENT == shift:
            return
    raise AssertionError(f"no header of a length that gives {shift}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The embedded model in fp32, its tensors at several distances from an aligned address."""
    made = {}
    for shift in (0, 8, 24, 56):
        made[shift] = folder = tmp_path_factory.mktemp(f"shift{shift}")
        shutil.copytree(EMBEDDED, folder, dirs_exist_ok=True)
        for path in folder.glob("*/*.safetensors"):
            save_shifted({name: tensor.float() for name, tensor in load_file(path).items()}, path, shift)
    return made


class Products(TorchDispatchMode):
    """Collects the fp32 products of few rows, and those of them that have a misaligned operand."""

    def __init__(self):
        super().__init__()
        self.few, self.misaligned = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        operands = [one for one in args if isinstance(one, torch.Tensor)]
        if name in PRODUCTS and operands[0].dtype == torch.float32:
            # A bias is copied to where the sums go; it is no operand.
            operands = operands[1:] if name.startswith(("addmm", "baddbmm", "addmv")) else operands[:2]
            if min(one.shape[-2] if one.dim() > 1 else 1 for one in operands[:1]) < MAX_ALIGNED_ROWS:
                self.few += 1
                wrong = [one for one in operands if one.data_ptr() % ALIGNMENT]
                self.misaligned += [(name, [tuple(one.shape) for one in operands])] if wrong else []
        return func(*args, **(kwargs or {}))


def lora(folder):
    """An adapter beside layers that see few rows, its factors misaligned."""
    g = torch.Generator().manual_seed(1)
    weights = load_file(next((folder / "transformer").glob("*.safetensors")))
    names = [name for name in weights if name.endswith(("adaLN_modulation.0.weight", "attention.to_q.weight"))]
    tensors = {}
    for name in names:
        out, in_ = weights[name].shape
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.lora_B.weight"] = 0.1 * torch.randn(out, 4, generator=g)
        tensors[f"{layer}.lora_A.weight"] = 0.1 * torch.randn(4, in_, generator=g)
    path = folder.parent / f"lora-{folder.name}.safetensors"
    save_shifted(tensors, path, 8)
    return path


def loaded(folder, options):
    return Pipeline.load(folder, device="cpu", dtype="fp32", **options)


RESIDENCIES = [{"residency": "resident"}, {"residency": "staged"}, {"residency": "streamed"}, {"vram": "40MiB"}]


@pytest.mark.parametrize("options", RESIDENCIES, ids=str)
@pytest.mark.sampled(1)
def test_no_product_of_few_rows_sees_where_a_file_put_its_weight(folders, options):
    pipe = loaded(folders[8], options)
    pipe.lora.attach(lora(folders[8]), 0.7)
    with Products() as products:
        pipe(**REQUEST)
    assert products.few > 20
    assert not products.misaligned


def test_the_rule_is_what_keeps_them_away(folders, monkeypatch):
    """Without it, misaligned operands are met: the test above can fail."""
    monkeypatch.setattr("s3dit.kernels.float_linear.aligned", lambda tensor: tensor)
    with Products() as products:
        loaded(folders[8], {})(**REQUEST)
    assert products.misaligned


def test_the_bits_are_those_of_the_aligned_file(folders):
    found = [
        loaded(folder, options)(**REQUEST).latents[0]
        for shift, folder in folders.items()
        for options in (RESIDENCIES if shift == 8 else RESIDENCIES[:1])
    ]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("rows", [1, 7, 23, 24, 31, 32, 33])
def test_a_linear_layer_gives_one_answer_wherever_its_operands_lie(rows):
    g = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 96, generator=g), torch.randn(64, 96, generator=g)
    layer = Linear(96, 64, bias=False)

    def moved(tensor, places):
        memory = torch.empty(tensor.numel() + 16)
        return memory[places : places + tensor.numel()].view(tensor.shape).copy_(tensor)

    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    wanted = layer(x)
    for places in (1, 2, 3, 4, 14):
        layer.weight = torch.nn.Parameter(moved(weight, places), requires_grad=False)
        assert torch.equal(layer(moved(x, places)), wanted)
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(64, 96), rtol=1e-5, atol=1e-5)

"""ControlNets told from their tensors, held to the published sizes, and the branch's own properties."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend

from s3dit import Pipeline, Region
from s3dit.control import Control
from s3dit.errors import CheckpointError
from s3dit.model.config import TransformerConfig
from s3dit.model.controlnet import ActiveControlNet, ControlNet, Controls, condition, open_controlnet
from s3dit.model.controlnet_config import ControlNetConfig
from s3dit.model.layout import patchify, text_to_image
from s3dit.runtime.block_streaming import stream
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.graphs import compile_blocks
from s3dit.runtime.model_config import read_model
from s3dit.weights.container import Checkpoint, Entry

TINY = read_model(EMBEDDED).transformer
OFFICIAL = TransformerConfig.from_json(
    {
        "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 3840, "n_layers": 30,
        "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5, "qk_norm": True,
        "cap_feat_dim": 2560, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48],
    },
    "test",
)  # fmt: skip
CHANNELS = {"1.0": 16, "2.0": 33, "2.1": 33}
GRIDS, LENGTHS = [(5, 7), (4, 6)], [12, 40]


def network(version, places=(0, 2, 4), seed=3):
    """A random branch for the embedded model."""
    net = ControlNet(ControlNetConfig(version, CHANNELS[version], places), TINY)
    g = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=g)
        is_norm = "norm" in name and "adaLN" not in name
        parameter.data = 0.1 * noise + 1.0 if is_norm else noise * parameter.shape[-1] ** -0.5
    return net.requires_grad_(False).eval()


def write(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


class Header(Checkpoint):
    """A file of which only names and shapes exist, all its values one number."""

    def __init__(self, shapes, value):
        self.path, self.metadata, self.shapes, self.value = "header.safetensors", {}, shapes, value

    def keys(self):
        return list(self.shapes)

    def entry(self, name):
        return Entry(self.shapes[name], "bfloat16", 0)

    def load(self, name):
        return torch.full((4, 4), self.value)


@pytest.mark.parametrize(
    ("version", "blocks", "tensors", "parameters"),
    [("1.0", 6, 136, 1_550_778_368), ("2.0", 15, 259, 2_950_156_800), ("2.1", 15, 295, 3_356_225_792),
     ("2.1", 3, 91, 1_008_308_480)],
)  # fmt: skip
def test_published_files_by_their_headers(version, blocks, tensors, parameters):
    step = 30 // blocks
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig(version, CHANNELS[version], tuple(range(0, 30, step))), OFFICIAL)
    state = net.state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (tensors, parameters)
    header = Header({name: tuple(tensor.shape) for name, tensor in state.items()}, 1.0)
    config = ControlNetConfig.of(header, OFFICIAL)
    assert config == net.config and config.strength == (0.9 if version == "2.1" else 0.75)
    assert config.unused(header) == ()
    assert f"ControlNet {version}" in str(config)


def test_2_0_is_told_by_a_refiner_of_zeros():
    """The two have the same names and shapes; the caller may know better, and says so."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network("2.1").state_dict().items()}
    found = {value: ControlNetConfig.of(Header(shapes, value), TINY) for value in (0.0, 1.0)}
    assert [found[value].version for value in (0.0, 1.0)] == ["2.0", "2.1"]
    assert all(name.startswith("control_noise_refiner.") for name in found[0.0].unused(Header(shapes, 0.0)))
    assert ControlNetConfig.of(Header(shapes, 0.0), TINY, "2.1").unused(Header(shapes, 0.0)) == ()
    assert ControlNetConfig.of(Header(shapes, 1.0), TINY, "2.0").version == "2.0"


@pytest.mark.parametrize(("version", "asked"), [("1.0", "2.1"), ("2.1", "1.0"), ("2.0", "2.1"), ("2.0", "1.0")])
def test_a_version_that_the_tensors_cannot_be(version, asked):
    shapes = {name: tuple(tensor.shape) for name, tensor in network(version).state_dict().items()}
    with pytest.raises(CheckpointError, match=f"version {version}, asked for is {asked}"):
        ControlNetConfig.of(Header(shapes, 1.0), TINY, asked)


def test_a_model_saved_with_its_base(tmp_path):
    net = network("2.1")
    path = write(tmp_path / "merged.safetensors", net.state_dict() | {"x_pad_token": torch.zeros(1, 192)})
    checkpoint, config = open_controlnet(path, TINY)
    assert config == ControlNetConfig("2.1", 33, (0, 2, 4)) and config.unused(checkpoint) == ("x_pad_token",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"control_all_x_embedder.2-1.weight": None}, "no ControlNet for Z-Image"),
        ({"control_all_x_embedder.2-1.weight": None, "x_pad_token": (1, 192)}, "the model itself"),
        ({"control_all_x_embedder.2-1.weight": (3840, 132)}, "width 3840, this one is 192 wide"),
        ({"control_all_x_embedder.2-1.weight": (192, 64)}, "64 columns"),
        ({"control_layers.3.after_proj.weight": (192, 192)}, "4 control layers cannot be spread evenly over the 6"),
    ],
)
def test_foreign_files(change, words):
    shapes = {name: tuple(tensor.shape) for name, tensor in network("2.1").state_dict().items()} | change
    header = Header({name: shape for name, shape in shapes.items() if shape is not None}, 1.0)
    with pytest.raises(CheckpointError, match=words):
        ControlNetConfig.of(header, TINY)


def test_omni_has_none():
    shapes = {name: tuple(tensor.shape) for name, tensor in network("2.1").state_dict().items()}
    with pytest.raises(CheckpointError, match="no Omni or Edit model has one"):
        ControlNetConfig.of(Header(shapes, 1.0), replace(TINY, siglip_feat_dim=1152))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"control_layers_places": [0, 2]}, "do not fit 3 control layers"),
        ({"control_layers_places": [1, 2, 4]}, "do not fit"),
        ({"control_layers_places": [0, 2, 6]}, "do not fit"),
        ({"control_layers_places": [0, 4, 2]}, "do not fit"),
        ({"control_layers_places": "0,2,4"}, "do not fit"),
        ({"control_refiner_layers_places": [1]}, "do not fit"),
        ({"add_control_noise_refiner": "both"}, "add_control_noise_refiner is 'both'"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, said, words):
    write(tmp_path / "diffusion_pytorch_model.safetensors", network("2.1").state_dict())
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=words):
        open_controlnet(tmp_path, TINY)


def test_a_config_is_heard(tmp_path):
    path = write(tmp_path / "diffusion_pytorch_model.safetensors", network("2.1").state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"control_layers_places": [0, 1, 5]}))
    assert open_controlnet(tmp_path, TINY)[1].places == (0, 1, 5) == open_controlnet(path, TINY)[1].places


def test_a_key_that_nobody_knows_is_noted(tmp_path):
    write(tmp_path / "diffusion_pytorch_model.safetensors", network("2.1").state_dict())
    known = {"_class_name": "ZImageControlNetModel", "_diffusers_version": "0.36", "dim": TINY.dim, "qk_norm": True}
    known |= {"control_layers_places": [0, 1, 5], "control_in_dim": 33, "quantization_config": None}
    (tmp_path / "config.json").write_text(json.dumps(known))
    assert open_controlnet(tmp_path, TINY)[1].notes == ()
    (tmp_path / "config.json").write_text(json.dumps(known | {"odd": 1}))
    (note,) = open_controlnet(tmp_path, TINY)[1].notes
    assert note.endswith("safetensors: its config.json: keys without effect here, nor known in diffusers: 'odd'")
    pipe = Pipeline.load(device="cpu")
    control = Control(tmp_path, torch.zeros(3, 64, 64))
    assert note in pipe.plan(prompt="a star", height=64, width=64, control=control).notes


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_regions_are_steered_as_their_picture_is(tmp_path, guidance):
    """Halves of one prompt are the prompt; guidance ends on the way, when a pass holds the copies alone."""
    net = network("2.1")
    write(tmp_path / "net.safetensors", net.state_dict())
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    options = {"control": Control(tmp_path / "net.safetensors", image, 0.5), "guidance_scale": guidance, "seed": 1}
    options |= {"height": 64, "width": 96, "num_inference_steps": 3, "output_type": "latent"}
    options |= {"cfg_truncation": 0.3} if guidance else {}
    halves = [Region((0, 0, 0.5, 1), "a star"), Region((0.5, 0, 0.5, 1), "a star")]
    split, whole = (pipe("a star", region=region, **options).latents[0] for region in (halves, None))
    assert (split - whole).norm() < 1e-5 * whole.norm()
    unsteered = pipe("a star", **options | {"control": None}).latents[0]
    assert (unsteered - whole).norm() > 0.01 * whole.norm()


@pytest.fixture(scope="module")
def model():
    return Pipeline.load(device="cpu", dtype="fp32").parts["transformer"]


def velocity(model, branches, items=(0, 1), guided=False, control=True):
    """Of some of two items; guided: twice, with one and the same text."""
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(r * c, 64, generator=g) for r, c in GRIDS]
    texts = [torch.randn(n, 128, generator=g) for n in LENGTHS]
    items = [*items, *items] if guided else items
    layout = text_to_image([GRIDS[i] for i in items], [LENGTHS[i] for i in items])
    with torch.inference_mode():
        context = model.context(layout, torch.cat([texts[i] for i in items]))
        x = torch.cat([xs[i] for i in items])
        return model(x, torch.tensor([0.3]), context, *([Controls(branches)] if control else []))


def branch(net, items=(0, 1), strength=0.8, rule="authors", seed=5):
    g = torch.Generator().manual_seed(seed)
    parts = [torch.randn(r * c, 4 * net.config.channels, generator=g) for r, c in GRIDS]
    return ActiveControlNet(net, torch.cat([parts[i] for i in items]), strength, rule)


@pytest.mark.parametrize("rule", ["authors", "diffusers"])
@pytest.mark.parametrize("version", list(CHANNELS))
@pytest.mark.sampled(1)
def test_strength_zero_is_no_control_bit_for_bit(model, version, rule):
    plain, net = velocity(model, (), control=False), network(version)
    assert torch.equal(velocity(model, (branch(net, strength=0.0, rule=rule),)), plain)
    assert not torch.allclose(velocity(model, (branch(net, rule=rule),)), plain, rtol=0.1)


@pytest.mark.parametrize("rule", ["authors", "diffusers"])
@pytest.mark.parametrize("version", list(CHANNELS))
@pytest.mark.sampled(2)
def test_a_batch_is_one_by_one_and_guidance_twice_the_same(model, version, rule):
    net = network(version)
    both = velocity(model, (branch(net, rule=rule),))
    apart = [velocity(model, (branch(net, [i], rule=rule),), [i]) for i in (0, 1)]
    # Sums in matrix products of other heights, some 1e-7 a block.
    assert ((both - torch.cat(apart)).norm() / both.norm()).item() < 3e-6
    twice = velocity(model, (branch(net, rule=rule),), guided=True)
    for half in twice.chunk(2):
        assert ((both - half).norm() / both.norm()).item() < 3e-6


def test_hints_of_several_add_up(model):
    """Twice the same at half the strength is once at the whole; others are not lost beside it."""
    net = network("2.1")
    whole = velocity(model, (branch(net),))
    halves = velocity(model, (branch(net, strength=0.3), branch(net, strength=0.5)))
    assert ((halves - whole).norm() / whole.norm()).item() < 3e-6
    mixed = velocity(model, (branch(net), branch(network("1.0", (0, 3)), rule="diffusers")))
    assert ((mixed - whole).norm() / whole.norm()).item() > 0.05


def test_control_acts_where_its_picture_is(model):
    """Another control picture of the first item leaves the second one as it was."""
    net = network("2.1")
    one, other = branch(net), branch(net)
    other.patches[: 5 * 7] *= 2
    a, b = (velocity(model, (given,)).split([35, 24]) for given in (one, other))
    assert torch.equal(a[1], b[1]) and not torch.allclose(a[0], b[0], rtol=0.1)


@pytest.mark.parametrize("version", list(CHANNELS))
@pytest.mark.slow
def test_streamed_and_compiled_branches_are_the_same(model, version):
    plain = velocity(model, (branch(network(version)),))
    streamed = network(version)
    belt = stream(streamed, "cpu")
    assert torch.equal(velocity(model, (branch(streamed),)), plain) and belt.copies > 0
    torch._dynamo.reset()
    counter, compiled = CompileCounterWithBackend("eager"), network(version)
    compile_blocks(compiled, counter)
    assert torch.equal(velocity(model, (branch(compiled),)), plain)
    # First and later control blocks, and the plain ones of 1.0.
    assert counter.frame_count == (3 if version == "1.0" else 2)
    torch._dynamo.reset()


def test_the_channels_of_a_condition():
    """Control, then what is kept, then the picture with a hole; what is not given is 0."""
    g = torch.Generator().manual_seed(0)
    control, inpaint = (torch.rand(3, 32, 48, generator=g) for _ in range(2))
    mask = (torch.arange(48) < 20).float().expand(1, 32, 48)

    def encode(pixels):
        # 16 numbers a cell that tell its pixels apart.
        return torch.nn.functional.pixel_unshuffle(pixels, 8)[:16]

    found = condition(encode, 33, control, inpaint, mask)
    kept = (torch.arange(6) * 8 >= 20).float().expand(1, 4, 6)
    needed = torch.cat((encode(control), kept, encode(inpaint * (1 - mask))))
    assert torch.equal(found, patchify(needed))
    nothing = torch.zeros(17, 4, 6)
    assert torch.equal(condition(encode, 33, control), patchify(torch.cat((encode(control), nothing))))
    assert torch.equal(condition(encode, 16, control), patchify(encode(control)))
    assert torch.equal(
        condition(encode, 33, None, inpaint, mask), patchify(torch.cat((torch.zeros(16, 4, 6), needed[16:])))
    )

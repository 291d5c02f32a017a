"""Several ranks draw what one does: processes on the CPU (gloo), which draw together by 2.

S3DIT_SLOW=1 adds 3, 4 and 5. Sums are taken in another order where keys of several ranks meet and where products have
fewer rows: a few roundings of fp32 (6e-8) in 10 blocks, 7e-7 at most. Three cases amplify roundings, with a bound of
their own: there one rank that computes by other instructions (MKL_CBWR=AVX2 DNNL_MAX_CPU_ISA=SSE41) is as far from
itself, 0.9e-6 of references, 1.6e-6 of a start image and 1.3e-6 of skipped layers, as 2 to 4 ranks are from it, 0.8 to
1.1e-6, 1.4 to 1.6e-6 and 1.1 to 1.2e-6. What is wrong in any token, row or picture is 1e-2 and more.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from s3dit.cli.main import main
from s3dit.errors import BackendError, RequestError
from s3dit.inputs.image_metadata import read_metadata
from s3dit.model.controlnet import ControlNet, ControlNetConfig
from s3dit.model.transformer import Transformer
from s3dit.model.vision_encoder import VisionEncoder
from s3dit.parallel.join import join
from s3dit.parallel.placement import MOST_RANKS, Form, groups_of, runs, shares
from s3dit.runtime.devices import place
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import read_model

pytestmark = pytest.mark.longer
HERE = Path(__file__).parent

# The others take most of the time.
WORLDS = [2, 3, 4, 5] if os.environ.get("S3DIT_SLOW") == "1" else [2]
BOUND = 1e-6
SHORT = {"seed": 3, "num_inference_steps": 1, "output_type": "latent"}
PLAIN, GUIDED = {"dtype": "fp32"}, {"guidance_scale": 0.5}
# 35 and 24 patches: padding, and ranks that have nothing but padding of it.
SIZES = {"prompt": ["a red star above a blue ring", "a green square"], "height": [80, 64], "width": [112, 96]}
WIDE = {"prompt": "a red star", "height": 64, "width": 96}
CASES = {
    "text": {"fields": {**WIDE, "num_inference_steps": 2, "output_type": "tensor"}},
    "ragged": {"fields": {**SIZES, **GUIDED}, "counted": True},
    "control": {"fields": {**WIDE, "control": ("net.safetensors", "a.png", 0.8), **GUIDED}},
    "reference": {"load": {"model": "omni"}, "fields": {**WIDE, "reference": "a.png", **GUIDED}, "bound": 3e-6},
    "image": {
        "fields": {"prompt": "x", "image": "b.png", "strength": 0.9, "num_inference_steps": 2},
        "worlds": WORLDS[1:2] or WORLDS, "bound": 3e-6,
    },
    "layers": {
        "load": {"quantize": "int8-weights", "residency": "streamed", "lora": "style.safetensors"},
        "fields": {**WIDE, "skip_layers": "2:1.5"}, "worlds": WORLDS[1:2] or WORLDS, "bound": 3e-6,
    },
}  # fmt: skip


def random_tensors(model, scale=0.5):
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(tensor.shape, generator=generator) * scale * tensor.shape[-1] ** -0.5 + ("norm" in name)
        for name, tensor in model.state_dict().items()
    }


def write_models(folder):
    """An Omni model, a ControlNet, an adapter and pictures."""
    shutil.copytree(EMBEDDED, folder / "omni")
    (folder / "omni" / "s3dit.json").unlink()
    (weights,) = (folder / "omni" / "transformer").glob("*.safetensors")
    tower = {
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16,
        "num_channels": 3, "num_patches": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    processor = {
        "patch_size": 16, "max_num_patches": 64, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "resample": 2,
        "image_std": [0.5] * 3, "do_resize": True, "do_rescale": True, "do_normalize": True,
    }  # fmt: skip
    config = folder / "omni" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"siglip_feat_dim": 24}))
    for name, data in (("siglip/config", tower), ("siglip_processor/preprocessor_config", processor)):
        (folder / "omni" / name).parent.mkdir()
        (folder / "omni" / f"{name}.json").write_text(json.dumps(data))
    model = read_model(folder / "omni")
    save_file(random_tensors(Transformer(model.transformer)) | load_file(weights), weights)
    save_file(random_tensors(VisionEncoder(model.vision)), folder / "omni" / "siglip" / "model.safetensors")
    net = ControlNet(ControlNetConfig("2.1", 33, (0, 2, 4)), read_model(EMBEDDED).transformer)
    save_file(random_tensors(net), folder / "net.safetensors")
    dim = read_model(EMBEDDED).transformer.dim
    pair = {"lora_A": torch.full((4, dim), 0.02), "lora_B": torch.full((dim, 4), 0.02)}
    save_file(
        {f"transformer.layers.1.attention.to_k.{k}.weight": v for k, v in pair.items()}, folder / "style.safetensors"
    )
    for name, size in (("a", (96, 64)), ("b", (64, 88))):
        levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(levels).resize(size).save(folder / f"{name}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the processes made of the cases."""
    folder = tmp_path_factory.mktemp("ranks")
    write_models(folder)
    cases = {
        name: {"worlds": WORLDS} | case | {"fields": SHORT | case["fields"], "load": PLAIN | case.get("load", {})}
        for name, case in CASES.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, HERE / "worker.py", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def relative(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize(("name", "world"), [(n, w) for n, case in CASES.items() for w in case.get("worlds", WORLDS)])
def test_ranks_draw_what_one_draws(folder, name, world):
    got, expected = (load_file(folder / f"{name} {count}.safetensors") for count in (world, 1))
    errors = {key: relative(got[key], expected[key]) for key in expected}
    assert got.keys() == expected.keys() and max(errors.values()) < CASES[name].get("bound", BOUND), errors


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_are_those_of_the_formula(folder, world):
    """Of every rank; guidance is 2 groups on an even number of ranks, where two items exchange nothing."""
    for rank in range(world):
        notes = json.loads((folder / f"notes{rank}.json").read_text())
        counted, formula, groups = notes[f"ragged {world}"]
        assert counted == formula and groups == 2 - world % 2


def test_all_ranks_are_told_the_same(folder):
    notes = [json.loads((folder / f"notes{rank}.json").read_text()) for rank in range(max(WORLDS))]
    for world in WORLDS:
        first, *others = (each[f"told {world}"] for each in notes[:world])
        assert all(other == first for other in others)
        assert first["wrong"].startswith(f"rank 0 of {world}: height is 7") and isinstance(first["seed"], int)
        for name in ("differs", "limits", "noise", "adapters"):
            assert str(first[name]).startswith(f"rank 1 of {world} was asked for something else than rank 0"), name


def test_the_first_rank_writes_and_speaks(folder):
    (code, out, err), other = (json.loads((folder / f"notes{rank}.json").read_text())["command"] for rank in (0, 1))
    assert code == 0 and out == f"{folder / 'drawn.png'}\n" and "seed" in err and other == [0, "", ""]
    assert read_metadata(folder / "drawn.png")["engine"]["parallel"] == "2" and not (folder / "drawn-2.png").exists()


def test_the_plan_says_what_is_sent(capsys):
    """Two items of 4 × 4 patches and less than 32 tokens: 64 rows of the image stream, 128 of the joint one, by 4.

    Half of the image rows are padding, so two of the ranks have 8 patches of each picture, to give to three others.
    """
    words = ["plan", "a red star", "--model", "embedded-base", "--size", "64x64", "--device", "cpu", "--parallel"]
    assert main([*words, "4"]) == 0
    assert "2 items of a model call in 2 group(s) of 2 rank(s); each sends" in capsys.readouterr().out
    assert main([*words, "1x4", "--dtype", "fp32", "--json"]) == 0
    said, config = json.loads(capsys.readouterr().out)["parallel"], read_model(EMBEDDED).transformer
    rows = config.n_refiner_layers * 16 + config.n_layers * 32
    assert said["groups"] == 1 and said["bytes"] == 3 * 4 * (2 * config.dim * rows + 16 * config.patch_dim)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--parallel", "2"], "--parallel is 2, processes: 1; needed 2; start them with torchrun"),
        (["--parallel", "2", "--preview"], "both --parallel and --preview are given"),
        (["--parallel", "2", "--compile"], "both --parallel and --compile are given"),
    ],
)
def test_the_command_line_refuses(words, answer, capsys, tmp_path):
    assert main(["generate", "a", "--device", "cpu", *words, "-o", str(tmp_path / "a.png")]) == 2
    assert answer in capsys.readouterr().err


def test_forms():
    assert [str(Form.of(given)) for given in (4, "4", "2x2", "1×4", "4x1")] == ["4", "4", "2x2", "1x4", "4"]
    for given in (0, -1, True, "x", "2x", "2x2x2", "a", 33, "6x6", 2.5, "²"):
        with pytest.raises(RequestError, match="parallel is"):
            Form.of(given)


def test_shares_are_even():
    """Over all items of a stream every rank has as much, within a token; and all of it is somebody's."""
    for size in range(1, MOST_RANKS + 1):
        lengths = [32, 64, 96, 4096]
        assert all(min(shares(length, size)) >= 1 and sum(shares(length, size)) == length for length in lengths)
        totals = [0] * size
        for rank, count in runs(lengths, Form.of(size), 1):
            totals[rank] += count
        assert sum(totals) == sum(lengths) and max(totals) - min(totals) <= 1


@pytest.mark.parametrize(
    ("form", "lengths", "groups"),
    [(4, (1, 1), 2), (4, (1,) * 4, 4), (4, (1,) * 3, 1), (8, (1, 1), 2), (5, (1, 1), 1), (6, (1,) * 4, 2),
     ("1x4", (1, 1), 1), ("2x2", (1,) * 4, 2), (2, (9, 2), 1), (4, (9, 2, 2, 9), 2)],
)  # fmt: skip
def test_items_come_first_where_they_divide(form, lengths, groups):
    assert groups_of(Form.of(form), lengths) == groups


def test_what_does_not_go(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BackendError, match="parallel is 4, processes: 1; needed 4; start them with torchrun"):
        join(4, place("cpu", "fp32"), False)
    with pytest.raises(RequestError, match="both parallel and compile"):
        join(4, place("cpu", "fp32"), True)

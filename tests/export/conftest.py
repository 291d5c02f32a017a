"""One folder of graphs for all tests of this room: tracing, writing and loading it takes half a minute on one core."""

import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from s3dit import Control, Pipeline
from s3dit.export import graphs, runner
from s3dit.runtime.embedded import EMBEDDED

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "model"))
from test_controlnet import network, write  # noqa: E402


def shorten(folder: Path, part: str, keep: str, **config: int) -> None:
    """Drop tensors whose names do not match `keep` from a part of a model's folder, and say so in its config.json."""
    path, (weights,) = folder / part / "config.json", (folder / part).glob("*.safetensors")
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    save_file({name: tensor for name, tensor in load_file(weights).items() if re.match(keep, name)}, weights)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The embedded model with one main block, and little of all else: a graph has as many nodes, and takes as long."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(EMBEDDED, folder)
    shorten(folder, "transformer", r"(?!layers\.[1-9])", n_layers=1)
    shorten(folder, "text_encoder", r"(?!model\.layers\.[2-9])", num_hidden_layers=2)
    return folder


@pytest.fixture(scope="session")
def load_small(small):
    """Load the small model, in fp32 unless it is said."""

    def load(**options):
        return Pipeline.load(small, device="cpu", residency="resident", **{"dtype": "fp32"} | options)

    return load


@pytest.fixture(scope="session")
def pipe(load_small):
    return load_small()


@pytest.fixture(scope="session")
def controlnet():
    """Make a ControlNet of a version for `pipe`."""

    def make(version):
        net = network(version, (0,))
        net.layers = 1
        return net

    return make


@pytest.fixture(scope="session")
def net_module(controlnet):
    return controlnet("2.1")


@pytest.fixture(scope="session")
def net(net_module, tmp_path_factory):
    """The file of `net_module`."""
    return write(tmp_path_factory.mktemp("control") / "net.safetensors", net_module.state_dict())


@pytest.fixture(scope="session")
def model(pipe, net, tmp_path_factory):
    """The written folder of `pipe` and `net`, opened by the runner.

    The transformer's graph, which is as dear to write and to load as to trace, is used as it was traced; the tests of
    the other forms, and the other parts, come from files.
    """
    folder, traced, save, load = tmp_path_factory.mktemp("export") / "model", {}, graphs._save, torch.export.load

    def keep(graph, path, form):
        if path.name == "transformer":
            traced["transformer.pt2"] = graph
            zipfile.ZipFile(path.with_suffix(".pt2"), "w").close()
        else:
            save(graph, path, form)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_save", keep)
        assert graphs.write(pipe, folder, control=Control(net)) == []
        patch.setattr(torch.export, "load", lambda path: traced.get(Path(path).name) or load(path))
        model = runner.Model(folder)
        for part in ("text_encoder", "transformer", "vae", "vae_encoder"):
            model.load(part)
    return model

"""One folder of graphs for all tests of this room: tracing, writing and loading it takes half a minute on one core."""

import pytest

from s3dit import Pipeline
from s3dit.export import graphs, runner


def cut(layers: int, **options: object) -> Pipeline:
    """The embedded model with so many main blocks: a graph has as many nodes, and tracing takes as long."""
    pipe = Pipeline.load(device="cpu", residency="resident", **{"dtype": "fp32"} | options)
    del pipe.transformer.layers[layers:]
    return pipe


@pytest.fixture(scope="session")
def pipe():
    return cut(2)


@pytest.fixture(scope="session")
def model(pipe, tmp_path_factory):
    """The written folder of `pipe`, opened by the runner."""
    folder = tmp_path_factory.mktemp("export") / "model"
    assert graphs.write(pipe, folder) == []
    return runner.Model(folder)


@pytest.fixture(scope="session")
def cut_model():
    return cut

"""The embedded model in fp32, once a file: instruments must leave it as it was."""

import pytest

from s3dit import Pipeline


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(device="cpu", dtype="fp32")

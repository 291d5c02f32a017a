"""An Op takes the first stand-in that may serve, obeys a forced backend, and can be replaced in a `with`."""

import pytest
import torch

from s3dit.kernels import dispatch
from s3dit.kernels.dispatch import BackendError, op, set_backend


@pytest.fixture
def double():
    @op
    def double(x, when):
        """Twice x."""
        return "reference"

    double.on("cpu", "torch", when=lambda x, when: when)(lambda x, when: "torch")
    double.on("cuda", "triton")(lambda x, when: "triton")
    yield double
    set_backend("auto")


def test_first_stand_in_that_may_serve(double):
    assert double(torch.ones(1), True) == "torch"
    assert double(torch.ones(1), False) == "reference"


def test_forced_reference(double):
    set_backend("reference")
    assert double(torch.ones(1), True) == "reference"


def test_using_replaces_and_restores_on_error(double):
    with pytest.raises(ZeroDivisionError), double.using(lambda x, when: 1 / 0):
        double(torch.ones(1), True)
    assert double(torch.ones(1), True) == "torch"


def test_forced_backend_that_cannot_run_is_an_error(double, monkeypatch):
    with pytest.raises(BackendError, match="needed one of"):
        set_backend("cuda")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="needs a CUDA device"):
            set_backend("triton")
    monkeypatch.setattr(dispatch, "_backend", "triton")
    with pytest.raises(BackendError, match="no kernel of double serves cpu"):
        double(torch.ones(1), True)

"""An Op runs the first implementation that can run, obeys a forced backend, and can be replaced in a `with`."""

import pytest
import torch

from s3dit.errors import BackendError
from s3dit.kernels import dispatch
from s3dit.kernels.dispatch import launcher, op, set_backend


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


def test_the_first_implementation_that_can_run(double):
    assert double(torch.ones(1), True) == "torch"
    assert double(torch.ones(1), False) == "reference"


def test_keywords_are_those_of_the_reference(double):
    assert double(when=True, x=torch.ones(1)) == "torch" and double(torch.ones(1), when=False) == "reference"
    with pytest.raises(TypeError, match="missing a required argument: 'when'"):
        double(torch.ones(1), where=True)


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
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="needs a CUDA device"):
            set_backend("triton")
    monkeypatch.setattr(dispatch, "_backend", "triton")
    with pytest.raises(BackendError, match="no kernel of double may run: needs cuda tensors, found cpu"):
        double(torch.ones(1), True)
    reasons = ["needs cuda tensors, found cpu", "backend 'triton' is forced"]
    assert [reason for *_, reason in double.explain(torch.ones(1), True)][1:] == reasons


def test_explain_lists_implementations_and_reasons(double):
    x = torch.ones(1)
    reasons = [(backend, reason) for _, backend, reason in double.explain(x, True)]
    assert reasons[0] == ("torch", "chosen")
    assert reasons[1:] == [("triton", "needs cuda tensors, found cpu"), ("reference", "<lambda> comes first")]
    assert [reason for *_, reason in double.explain(x, False)] == [
        "not for these arguments", "needs cuda tensors, found cpu", "chosen",
    ]  # fmt: skip
    set_backend("reference")
    assert double.explain(x, True)[0][2] == "backend 'reference' is forced"
    assert double.explain(x, True)[-1][2] == "chosen"
    set_backend("auto")
    with double.using(lambda x, when: x):
        assert double.explain(x, True) == [("<lambda>", "override", "chosen")]


def test_a_launcher_is_one_node_of_a_graph():
    @launcher(lambda x, times: torch.empty_like(x))
    def _times_for_test(x: torch.Tensor, times: int) -> torch.Tensor:
        # A graph cannot hold this: the numbers are looked at.
        return x * times if x.sum().item() > 0 else x.clone()

    graph = torch.compile(lambda x: _times_for_test(x + 1, 3), fullgraph=True, backend="eager")
    assert graph(torch.ones(2)).tolist() == [6, 6] == _times_for_test(torch.full((2,), 2.0), 3).tolist()

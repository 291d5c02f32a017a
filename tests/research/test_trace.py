"""Observation leaves every bit and every hook as it was, and finds the first difference."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from s3dit.errors import RequestError
from s3dit.kernels.dispatch import op
from s3dit.research.trace import Row, compare, first_difference, load, save, trace, trace_op
from s3dit.runtime.finite import first_nonfinite


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.feed = nn.Sequential(nn.Linear(4, 4), nn.SiLU())

    def forward(self, x):
        # In place on purpose: what was recorded before must not change with it.
        h = self.attention(x)
        h += 1
        return self.feed(h)


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


class Split(nn.Module):
    def forward(self, x):
        return x[:2], {"rest": x[2:], "pair": Pair(x, x + 1)}, "text"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.split = Split()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        self.split(x)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().requires_grad_(False)


X = torch.linspace(-1, 1, 12).view(3, 4)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_observing_changes_nothing(model):
    before = model(X)
    with trace(model, "**") as record:
        assert hooks(model) > 0
        assert torch.equal(model(X), before)
    assert hooks(model) == 0
    assert torch.equal(record["#0"], before)


def test_names_are_chosen_by_pattern(model):
    with trace(model, "layers.*.attention") as record:
        model(X)
        model(X)
    assert [*record] == [f"layers.{i}.attention#{call}" for call in (0, 1) for i in range(3)]
    with trace(model, ["layers.1.**", "layers.?"]) as record:
        model(X)
    assert [*record] == [
        "layers.0#0", "layers.1.attention#0", "layers.1.feed.0#0", "layers.1.feed.1#0", "layers.1.feed#0",
        "layers.1#0", "layers.2#0",
    ]  # fmt: skip


def test_what_is_kept_is_a_copy(model):
    with trace(model, "layers.0.attention") as record:
        model(X)
    assert torch.equal(record["layers.0.attention#0"], model.layers[0].attention(X))


def test_keep_chooses_what_is_kept(model):
    with trace(model, "layers.*", keep=lambda x: x.norm()) as record:
        model(X)
    assert all(value.shape == () for value in record.values()) and len(record) == 3


def test_results_of_several_tensors(model):
    with trace(model, "split") as record:
        model(X)
    assert [*record] == ["split#0.0", "split#0.1.rest", "split#0.1.pair.first", "split#0.1.pair.second"]


def test_hooks_go_also_after_an_error(model):
    with pytest.raises(ZeroDivisionError), trace(model, "**"):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError), first_nonfinite(model):
        model(torch.zeros(3, 5))
    assert hooks(model) == 0


def test_a_pattern_without_a_module_is_refused(model):
    with pytest.raises(RequestError, match=r"layers\.9.*nearest"), trace(model, ["layers.0", "layers.9"]):
        pass
    assert hooks(model) == 0


def test_gradients_still_flow_and_the_record_holds_none(model):
    x = X.clone().requires_grad_(True)
    with trace(model, "layers.*") as record:
        model(x).sum().backward()
    assert x.grad is not None and not any(value.requires_grad for value in record.values())


@op
def double(x, y):
    return 2 * x + y


@double.on("cpu", "torch")
def _faster(x, y):
    return x + x + y + 1e-3


def test_an_op_is_observed_as_it_would_run():
    one = torch.ones(2)
    expected = double(X, one[:1])
    with trace_op(double) as record:
        assert torch.equal(double(X, one[:1]), expected)
        double(one, one)
    assert [*record] == [f"double#{call}.{part}" for call in (0, 1) for part in ("0", "1", "result")]
    assert torch.equal(record["double#0.result"], expected)
    assert double.choose(X, one) is _faster
    with double.using(double.reference), trace_op(double) as record:
        assert torch.equal(double(one, one), 3 * one)
    assert torch.equal(record["double#0.result"], 3 * one)


def test_an_op_is_left_alone_after_an_error():
    with pytest.raises(RuntimeError), trace_op(double):
        double(torch.zeros(2), torch.zeros(3))
    assert double.choose(X, X) is _faster


def test_records_there_and_back(model, tmp_path):
    with trace(model, "**") as record:
        model(X)
    save(record, tmp_path / "a.safetensors", {"seed": "7"})
    again, metadata = load(tmp_path / "a.safetensors")
    assert metadata == {"seed": "7"} and [*again] == [*record]
    assert first_difference(compare(again, record)) is None
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_that_are_no_record_are_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("hello")
    save_file({"x": X}, tmp_path / "plain")
    save_file({"x": X}, tmp_path / "other", {"s3dit.order": '["y"]'})
    for name in ("text", "plain", "other", "none"):
        with pytest.raises(RequestError, match="trace.save"):
            load(tmp_path / name)
    with pytest.raises(RequestError, match="cannot be written"):
        save({"x": X}, tmp_path / "none" / "a")


def test_compare():
    inf, nan = math.inf, math.nan
    a = {
        "same": X,
        "near": X + 0.01,
        "gone": X,
        "shape": X,
        "nan": torch.tensor([nan, inf, 1.0]),
        "bad": torch.tensor(nan),
    }
    b = {
        "same": X.double(),
        "near": X,
        "shape": X[:2],
        "nan": torch.tensor([nan, inf, 1.0]),
        "bad": torch.tensor(1.0),
        "new": X,
    }
    rows = {row.name: row for row in compare(a, b)}
    assert [*rows] == ["same", "near", "gone", "shape", "nan", "bad", "new"]
    assert rows["same"].error == rows["nan"].error == 0.0
    assert rows["near"].error == pytest.approx(0.01 * 12**0.5 / X.norm().item(), rel=1e-4)
    assert rows["near"].largest == pytest.approx(0.01, rel=1e-4)
    assert all(rows[name].error == inf for name in ("gone", "shape", "bad", "new"))
    assert rows["gone"].shapes == ((3, 4), None) and "missing" in str(rows["gone"])
    assert first_difference([*rows.values()]).name == "near"
    assert first_difference([*rows.values()], tolerance=0.1).name == "gone"
    assert first_difference([Row("x", nan, nan, ((), ()))], tolerance=1.0).name == "x"


def test_compare_other_dtypes():
    for dtype in (torch.int64, torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex64):
        value = torch.tensor([0.0, 1.0, 1.0]).to(dtype)
        assert compare({"x": value}, {"x": value.clone()})[0].error == 0.0
    zeros = {"x": torch.zeros(3)}
    assert compare(zeros, zeros)[0].error == 0.0
    assert compare({"x": torch.ones(3)}, zeros)[0].error == math.inf


def test_the_first_difference_is_named(model):
    with trace(model, "**") as reference:
        model(X)
    model.layers[1].feed[0].bias[2] += 0.5
    with trace(model, "**") as changed:
        model(X)
    assert first_difference(compare(changed, reference)).name == "layers.1.feed.0#0"


def test_the_first_nonfinite_module_is_named(model):
    with first_nonfinite(model) as found:
        model(X)
    assert found.name is None and "finite" in str(found)
    model.layers[1].feed[0].weight[0, 0] = math.inf
    with first_nonfinite(model) as found:
        model(X)
    assert (found.name, found.kind, found.count, found.size) == ("layers.1.feed.0", "Linear", 3, 12)
    assert 0 < found.largest_input < 10 and "layers.1.feed.0 (Linear): 3 of 12" in str(found)
    assert hooks(model) == 0

"""Reductions are the formulas that they are named after, keep little of a large model, and copy little on the way."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s3dit import Pipeline
from s3dit.configs.infer_config import TEXT_ENCODER, TRANSFORMER, VAE
from s3dit.model.transformer import Transformer
from s3dit.model.vae import Autoencoder
from s3dit.research import reductions
from s3dit.research.observe import observe
from s3dit.research.reductions import REDUCTIONS
from s3dit.research.sites import sites

GB = 10**9


@pytest.mark.parametrize("piece", [1 << 20, 64, 1])
def test_against_plain_formulas(piece, monkeypatch):
    monkeypatch.setattr(reductions, "PIECE", piece)
    x = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
    flat = x.double().flatten(1)
    got = {name: function(x) for name, function in REDUCTIONS.items()}
    assert all(value.dtype == torch.float32 for value in got.values())
    assert torch.allclose(got["norms"].double(), flat.square().sum(1).sqrt())
    assert torch.allclose(got["mean"].double(), x.double().mean(0))
    assert torch.allclose(got["std"].double(), x.double().std(0, correction=0))
    assert torch.equal(got["largest"], x.abs().amax(0))
    assert torch.allclose(got["rms"].double(), flat.square().mean().sqrt())
    centered = flat - flat.mean()
    assert torch.allclose(got["kurtosis"].double(), centered.pow(4).mean() / centered.square().mean() ** 2)
    values = torch.linalg.svdvals(flat)
    share = values / values.sum()
    assert torch.allclose(got["effective_rank"].double(), torch.exp(-(share * share.log()).sum()), rtol=1e-5)
    assert abs(REDUCTIONS["effective_rank"](torch.ones(9, 4)).item() - 1) < 1e-3
    assert got["percentiles"][4] == x.flatten().quantile(0.5)
    assert torch.equal(got["sample"], x.flatten())


def test_a_sample_is_spread_evenly_over_what_is_not_contiguous():
    x = torch.arange(200 * 300.0).view(300, 200).T
    kept = reductions.sample(x)
    # 60,000 numbers: every fourth would do, seven is the next that has no divisor in common with a row of 300.
    assert torch.equal(kept, x.flatten()[::7]) and len(kept) <= reductions.SAMPLE


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made inside of it, beside what a tensor has already."""

    def __init__(self, known):
        super().__init__()
        self.known, self.nbytes = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != self.known:
                self.nbytes = max(self.nbytes, made.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.sampled(3)
def test_no_copy_of_a_large_tensor_is_made(name, contiguous):
    """32 MiB of bf16; 8 MiB are a piece in fp64, and the places of a million numbers."""
    x = torch.ones(8, 1 << 21, dtype=torch.bfloat16).view(4096, 4096)
    x = x if contiguous else x.T
    with Largest(x) as largest:
        REDUCTIONS[name](x)
    assert largest.nbytes <= x.nbytes // 2


@pytest.fixture(scope="module")
def full():
    """The published model without weights, as `sites` looks at it, and the shapes of its sites at 1024² and 512 words.

    Those of the autoencoder are what a pass without numbers gives.
    """
    with torch.device("meta"):
        modules = {"transformer": Transformer(TRANSFORMER), "vae": Autoencoder(VAE)}
    parts = SimpleNamespace(component=lambda name: SimpleNamespace(module=modules[name]))
    pipe = SimpleNamespace(parts=parts, config=SimpleNamespace(text_encoder=TEXT_ENCODER))
    tokens = {"image": 4096, "text": 512, "joint": 4608, "rows": 1, "patches": 4096, "prompt": 512}
    shapes, found = {}, sites(pipe)
    for name, site in found.items():
        if site.stream in tokens:
            shapes[name] = (tokens[site.stream], *site.shape[1:])
        else:
            module = modules["vae"].get_submodule(site.module)
            module.register_forward_hook(lambda *call, name=name: shapes.update({name: tuple(call[-1].shape[1:])}))
    with torch.inference_mode():
        modules["vae"].decode(torch.empty(1, 16, 128, 128, device="meta"))
    return {name: (site, shapes[name]) for name, site in found.items() if name in shapes}


@cache
def kept(name, shape):
    """Bytes of what a reduction gives of a tensor, found without its numbers; "" for everything, in 16 bits."""
    x = torch.empty(shape, device="meta")
    return 4 * REDUCTIONS[name](x).numel() if name else 2 * x.numel()


def held(full, names, steps, branches):
    """Bytes of a record of all sites."""
    times = {"transformer": steps * branches, "text_encoder": branches, "vae": 1}
    return sum(times[site.part] * kept(name, shape) for site, shape in full.values() for name in names)


def test_all_sites_of_a_full_size_model_over_8_steps_fit_in_a_gigabyte(full, monkeypatch):
    """Any one of the reductions with guidance (at most 685 MB), all nine together without (846 MB); else 210 GB."""
    # In one piece: shapes are the same, and are found sooner.
    monkeypatch.setattr(reductions, "PIECE", 1 << 40)
    assert len(full) > 700 and full["layers.29.ffn.product"][1] == (4608, 10240)
    for name in REDUCTIONS:
        assert held(full, [name], steps=8, branches=2) < GB, name
    assert held(full, REDUCTIONS, steps=8, branches=1) < GB
    assert held(full, [""], steps=8, branches=1) > 200 * GB


@pytest.mark.slow
def test_a_record_holds_what_is_counted():
    """The count, by the same rule, is what `observe` keeps of the small model."""
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    with observe(pipe, "**") as everything, observe(pipe, "**", reduce=list(REDUCTIONS)) as record:
        pipe("a red star", seed=1, num_inference_steps=1)
    assert len(record) == len(everything) * len(REDUCTIONS) and any(key.site.startswith("vae") for key in record)
    for key, value in record.items():
        whole = everything[key._replace(statistic="")]
        assert value.untyped_storage().nbytes() == kept(key.statistic, tuple(whole.shape))


def test_a_sample_sees_every_channel():
    """Rows of 192: with a step of 3, or of any other divisor, only a third of the channels would be seen."""
    channels = torch.arange(192.0).expand(1000, 192)
    for most in (64_000, 1 << 16, 48_000, 1000):
        seen = reductions._evenly(channels, most)
        assert most / 4 < len(seen) <= most and len(seen.unique()) == 192

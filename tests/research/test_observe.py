"""Observation leaves every bit as it was, sites hold what they say, and edits act where they are meant to."""

import re
from contextlib import nullcontext

import pytest
import torch

from s3dit import Pipeline
from s3dit.errors import RequestError
from s3dit.kernels.dispatch import overridden
from s3dit.model.layout import patchify
from s3dit.research import edits
from s3dit.research.attention import attention_maps
from s3dit.research.observe import edit, observe
from s3dit.research.record import Record
from s3dit.research.sites import sites
from s3dit.research.tokens import tokens

PROMPT = "a red star above a blue ring"
DRAW = {"seed": 7, "num_inference_steps": 2, "height": 96, "width": 128, "output_type": "latent"}


def latents(pipe, prompt=PROMPT, **more):
    return torch.stack(pipe(prompt, **{**DRAW, **more}).latents)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def plain(pipe):
    return latents(pipe)


def test_every_site_is_seen_and_no_bit_changes(pipe, plain):
    with observe(pipe, "**", reduce="rms") as record:
        assert torch.equal(latents(pipe), plain)
    drawn = {name for name, site in sites(pipe).items() if site.part != "vae"}
    assert {key.site for key in record} == drawn
    assert all(value.isfinite() and value > 0 for value in record.values())
    steps = {key.step for key in record if key.site == "layers.0.output"}
    assert steps == {1, 2} and {key.step for key in record if key.site.startswith("text_encoder")} == {0}


@pytest.mark.parametrize(
    "load",
    [
        {"residency": "streamed"}, {"residency": "resident"}, {"vram": "700MiB"}, {"quantize": "int8"},
        {"quantize": "int4"}, {"dtype": "bf16"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.sampled(1)
def test_every_way_to_hold_a_model(load):
    pipe = Pipeline.load(**{"device": "cpu", "dtype": "fp32", **load})
    more = {"prompt": [PROMPT, "a green ring"], "negative_prompt": "a blue star", "guidance_scale": 1.5}
    before = latents(pipe, **more)
    with observe(pipe, "**", reduce="rms") as record:
        assert torch.equal(latents(pipe, **more), before)
    items = {(key.item, key.branch) for key in record if key.site == "layers.0.output"}
    assert items == {(i, branch) for i in (0, 1) for branch in ("positive", "negative")}
    assert {name for name, site in sites(pipe).items() if site.part != "vae"} == {key.site for key in record}


def test_shapes_are_those_that_are_listed(pipe):
    with observe(pipe, "**", steps=[1]) as record:
        pipe(PROMPT, **{**DRAW, "output_type": "pil"})
    listed = sites(pipe)
    for key, tensor in record.items():
        shape = listed[key.site].shape
        if listed[key.site].stream != "picture":
            assert tensor.shape[1:] == shape[1:], key.site
        else:
            assert tensor.ndim == 3 == len(shape), key.site


def test_sites_of_a_block_agree_with_one_another(pipe):
    """The residual stream is the sum of what blocks add, and each block's input is the output of the one before."""
    with observe(pipe, "layers.*.*") as record, observe(pipe, "layers.*.*.*") as inner:
        pipe(PROMPT, **DRAW)
    for step in (1, 2):
        for i in range(6):
            before, between, after = (record.at(f"layers.{i}.{name}", step) for name in ("input", "between", "output"))
            added = [inner.at(f"layers.{i}.{name}.added", step) for name in ("attention", "ffn")]
            assert relative(before + added[0], between) < 2e-7
            assert relative(between + added[1], after) < 2e-7
            if i:
                assert torch.equal(record.at(f"layers.{i - 1}.output", step), before)
            product = torch.nn.functional.silu(inner.at(f"layers.{i}.ffn.gate", step)) * inner.at(
                f"layers.{i}.ffn.up", step
            )
            assert relative(product, inner.at(f"layers.{i}.ffn.product", step)) < 2e-7


def test_heads_are_attention_of_what_is_rotated(pipe):
    with observe(pipe, "layers.2.attention.*", steps=[1]) as record:
        pipe(PROMPT, **DRAW)
    q, k, heads = (record.at(f"layers.2.attention.{name}").double() for name in ("q_rope", "k_rope", "heads"))
    v = record.at("layers.2.attention.v").double().unflatten(-1, heads.shape[1:])
    weights = (torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    assert torch.allclose(torch.einsum("hnm,mhd->nhd", weights, v), heads, atol=1e-5)


def test_velocity_and_x0(pipe):
    steps = []
    with observe(pipe, ["velocity", "x0"]) as record:
        pipe(PROMPT, on_step=steps.append, **DRAW)
    for step in steps:
        assert torch.equal(record.at("velocity", step.i), step.velocity)
        assert torch.allclose(record.at("x0", step.i), step.start + step.sigma * step.velocity, atol=1e-6)


def test_a_batch_is_cut_into_its_items(pipe):
    """What is seen of an item in a batch of two sizes is what is seen of it alone."""
    with observe(pipe, "layers.3.output") as alone:
        pipe("a green ring", **{**DRAW, "seed": 8})
    with observe(pipe, "layers.3.output") as batch:
        pipe([PROMPT, "a green ring"], **{**DRAW, "seed": [7, 8]})
    for step in (1, 2):
        assert torch.allclose(alone.at("layers.3.output", step), batch.at("layers.3.output", step, item=1), atol=2e-4)


def test_choices(pipe):
    with observe(pipe, "layers.1.output", steps=[2], items=[1], branch="negative", tokens=["image", "ring"]) as record:
        pipe([PROMPT, "a green ring"], negative_prompt="a ring", guidance_scale=1.0, **DRAW)
    ((key, tensor),) = record.items()
    assert (key.step, key.item, key.branch) == (2, 1, "negative") and len(tensor) == 48 + 1


def test_what_is_never_seen_is_said(pipe):
    with pytest.warns(UserWarning, match=r"observed nothing of layers\.1\.output"):  # noqa: SIM117
        with observe(pipe, ["layers.1.output", "text_encoder.layers.0.output"], items=[0], branch="negative") as record:
            latents(pipe)
    assert {key.site for key in record} == {"text_encoder.layers.0.output"}


def test_words_are_taken_of_the_items_that_have_them(pipe):
    """A negative prompt, or another picture's, need not have a word; one that nobody has is an error."""
    more = {"prompt": [PROMPT, "a green ring"], "negative_prompt": "blurred", "guidance_scale": 1.0}
    with observe(pipe, "layers.1.output", tokens="star", steps=[1]) as record:
        latents(pipe, **more)
    assert [(key.item, key.branch) for key in record] == [(0, "positive")]
    with pytest.raises(RequestError, match="'stir'.*nearest are.*star"), observe(pipe, "velocity", tokens="stir"):
        latents(pipe, **more)
    before = latents(pipe, **more)
    with edits.without_words(pipe, "star"):
        after = latents(pipe, **more)
    assert torch.equal(before[1], after[1]) and not torch.equal(before[0], after[0])


@pytest.mark.parametrize("block", ["context_refiner.0", "layers.2"])
def test_an_edit_between_attention_and_feed_forward_is_of_the_residual(pipe, block):
    """With zeros there, the block's output is what its feed-forward adds, of zeros: nothing."""
    with (
        edit(pipe, {f"{block}.between": edits.zero()}),
        observe(pipe, [f"{block}.output", f"{block}.between"]) as record,
    ):
        latents(pipe)
    assert all(not record.at(f"{block}.{site}").any() for site in ("between", "output"))


def test_x0_of_items_with_times_and_sizes_of_their_own(pipe):
    sizes, times = [(12, 16), (16, 16)], torch.tensor([0.9, 0.2])
    noise = [torch.randn(16, *size, generator=torch.Generator().manual_seed(1)) for size in sizes]
    features = pipe.encode([PROMPT, "a green ring"])
    with observe(pipe, ["x0", "velocity"]) as record:
        pipe.velocity(noise, t=times, prompt_embeds=features)
    rows = [h * w // 4 for h, w in sizes]
    ((_, x0), (_, velocity)) = sorted(record.items(), key=lambda each: each[0].site != "x0")
    for i, (image, v) in enumerate(zip(x0.split(rows), velocity.split(rows), strict=True)):
        assert torch.allclose(image, patchify(noise[i]) + (1 - times[i]) * v, atol=1e-5)


def test_an_edit_that_changes_nothing_changes_nothing(pipe, plain):
    same = {"**": lambda rows, where: rows.clone()}
    everything = {
        name: same["**"]
        for name, site in sites(pipe).items()
        if site.side != "op" and name != "x0" and site.part != "vae"
    }
    with edit(pipe, everything):
        assert torch.equal(latents(pipe), plain)
    with edit(pipe, {"layers.*.attention.*": same["**"], "layers.*.between": same["**"], "x0": same["**"]}):
        assert torch.allclose(latents(pipe), plain, atol=1e-4)


def test_edits_are_chosen_by_step_item_and_token(pipe):
    prompts, more = [PROMPT, "a green ring"], {"seed": [1, 2]}
    before = latents(pipe, prompts, **more)
    with edit(pipe, {"layers.2.output": edits.scale(1.1)}, items=[1], tokens="image"):
        after = latents(pipe, prompts, **more)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    with pytest.warns(UserWarning, match=r"edited nothing of layers\.2\.output"):  # noqa: SIM117
        with edit(pipe, {"layers.2.output": edits.scale(1.1)}, branch="negative"):
            assert torch.equal(latents(pipe, prompts, **more), before)


def test_patching_everything_gives_the_other_run(pipe, plain):
    other = "a blue star above a red ring"
    with observe(pipe, "layers.*.output") as record:
        pipe(other, **DRAW)
    with edit(pipe, {"layers.5.output": edits.patch(record)}):
        assert torch.equal(latents(pipe), latents(pipe, other))


def test_a_picture_of_the_autoencoder_is_edited(pipe):
    """Zeros in every channel of its first layer leave what the rest makes of zeros, the same for all pictures."""
    more = {**DRAW, "seed": [1, 2], "output_type": "pil"}
    site = "vae.decoder.conv_in.output"
    with edit(pipe, {site: edits.zero()}), observe(pipe, site) as record:
        first, second = pipe([PROMPT, "a green ring"], **more).images
    assert not record.at(site, step=0, item=1).any() and first.tobytes() == second.tobytes()


def test_ablations(pipe, plain):
    def drawn(change, site="layers.2.attention.heads"):
        with observe(pipe, site, steps=[1]) as record, edit(pipe, {site: change}):
            result = latents(pipe)
        return result, record.at(site)

    result, seen = drawn(edits.zero(heads=[1, 4]))
    assert not torch.equal(result, plain)
    result, seen = drawn(edits.mean(channels=[3]))
    again, _ = drawn(edits.resample(1))
    assert torch.equal(again, drawn(edits.resample(1))[0]) and not torch.equal(again, drawn(edits.resample(2))[0])
    with edit(pipe, {"layers.2.output": edits.steer(torch.ones(192), 0.0)}):
        assert torch.equal(latents(pipe), plain)
    for wrong in (edits.zero(heads=[6]), edits.zero(channels=[-1]), edits.steer(torch.ones(3))):
        with pytest.raises(RequestError, match="needed"), edit(pipe, {"layers.2.attention.heads": wrong}):
            latents(pipe)


def test_layers_are_skipped_repeated_and_reordered(pipe, plain):
    with edits.skipped(pipe, [2]):
        skipped = latents(pipe)
    with edits.rearranged(pipe, [0, 1, 3, 4, 5]):
        assert torch.allclose(latents(pipe), skipped, atol=1e-4)
    with edits.rearranged(pipe, [0, 1, 2, 3, 4, 5]):
        assert torch.equal(latents(pipe), plain)
    with edits.rearranged(pipe, [0, 1, 2, 2, 3, 4, 5]):
        assert not torch.equal(latents(pipe), plain)
    assert torch.equal(latents(pipe), plain)
    with pytest.raises(RequestError, match="0 to 5"), edits.rearranged(pipe, [6]):
        pass


def test_a_word_is_left_out_from_a_step_on(pipe, plain):
    with edits.without_words(pipe, "red", steps=[2]):
        late = latents(pipe)
    with edits.without_words(pipe, "red"):
        early = latents(pipe)
    assert 0 < (late - plain).norm() < (early - plain).norm()
    with pytest.raises(RequestError, match="nearest are.*red"), edits.without_words(pipe, "rad"):
        latents(pipe)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows, where: rows[1:], r"returned \(95, 192\); needed a tensor \(96, 192\)"),
        (lambda rows, where: rows * float("nan"), "not finite"),
        (lambda rows, where: 3, "returned int"),
    ],
)
def test_what_an_edit_may_not_return(pipe, plain, change, said):
    with pytest.raises(RequestError, match=said), edit(pipe, {"layers.1.output": change}):
        latents(pipe)
    assert torch.equal(latents(pipe), plain)


def test_wrong_choices_are_named(pipe):
    for wrong, said in (
        ({"patterns": "layers.9.output"}, "nearest are.*layers"),
        ({"patterns": "velocity", "branch": "both"}, "positive or"),
        ({"patterns": "velocity", "steps": [0]}, "whole numbers from 1"),
        ({"patterns": "velocity", "reduce": "norm"}, "nearest is norms"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=said), observe(pipe, **wrong):
            pass
    graphs = Pipeline.load(device="cpu", dtype="fp32")
    graphs.graphs = True
    with pytest.raises(RequestError, match="loaded with graphs"), observe(graphs, "velocity"):
        pass


@pytest.mark.parametrize("ends", [True, False])
def test_nothing_is_left_when_a_with_ends(pipe, plain, ends):
    """No hook on any module, no Op replaced, whether the run ended or was broken off: unused, they cost nothing."""

    def broken(rows, where):
        raise KeyError("broken off")

    def ours():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        modules = [module for part in ("transformer", "text_encoder", "vae") for module in pipe.parts[part].modules()]
        hooks = [hook for module in modules for kind in kinds for hook in getattr(module, kind).values()]
        return [hook for hook in hooks if "s3dit.research" in getattr(hook, "__module__", "")]

    error = nullcontext() if ends else pytest.raises(KeyError)
    change = {"layers.2.between": edits.scale(1.0) if ends else broken}
    with error, observe(pipe, "**", reduce="rms"), attention_maps(pipe, "star"), edit(pipe, change):
        assert overridden() and ours()
        latents(pipe)
    assert not overridden() and not ours()
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("steps", [[99], [2, 3]])
def test_steps_that_a_run_does_not_have(pipe, plain, steps):
    wrong = [step for step in steps if step > 2]
    said = re.escape(f"steps {wrong} were chosen of a run that has 2; needed some of 1 to 2")
    for look in (
        observe(pipe, "layers.1.output", steps=steps),
        edit(pipe, {"layers.1.output": edits.zero()}, steps=steps),
        attention_maps(pipe, "star", steps=steps),
    ):
        with pytest.raises(RequestError, match=said), look:
            latents(pipe)
    assert torch.equal(latents(pipe), plain)


def test_steps_are_counted_through_two_passes(pipe):
    two = {"upscale": 1.5, "upscale_strength": 0.5}
    with observe(pipe, "velocity", reduce="rms") as record:
        pipe(PROMPT, **DRAW, **two)
    last = max(key.step for key in record)
    with observe(pipe, "velocity", steps=[last], reduce="rms") as again:
        pipe(PROMPT, **DRAW, **two)
    assert last > 2 and [key.step for key in again] == [last]
    with pytest.raises(RequestError, match=f"of a run that has {last};"), observe(pipe, "velocity", steps=[last + 1]):
        pipe(PROMPT, **DRAW, **two)


def test_a_record_of_another_model_is_no_patch(pipe, plain):
    with observe(pipe, "layers.2.output") as record:
        pipe(PROMPT, **DRAW)
    part = record.select("layers.2.output", step=1)
    with edit(pipe, {"layers.2.output": edits.patch(part)}, steps=[1]):
        assert torch.equal(latents(pipe), plain)
    part.model = "f" * 64
    said = f"of model f{{12}}, this one is {record.model[:12]}; needed one model"
    with pytest.raises(RequestError, match=said), edit(pipe, {"layers.2.output": edits.patch(part)}):
        pass
    part.model = ""
    with edit(pipe, {"layers.2.output": edits.patch(part)}, steps=[1]):
        assert torch.equal(latents(pipe), plain)
    with (
        edit(pipe, {"layers.2.output": edits.patch(part)}),
        pytest.raises(RequestError, match="needed one; the nearest"),
    ):
        latents(pipe)


def test_a_record_is_saved_and_loaded(pipe, tmp_path):
    with observe(pipe, "layers.*.output", reduce=["norms", "sample"]) as record:
        pipe(PROMPT, **DRAW)
    record.save(tmp_path / "run.safetensors")
    again = Record.load(tmp_path / "run.safetensors", record.model)
    assert list(again) == list(record) and all(torch.equal(again[key], record[key]) for key in record)
    assert again.items_seen == record.items_seen == tokens(pipe, pipe.plan(PROMPT, **DRAW))
    with pytest.raises(RequestError, match="one model"):
        Record.load(tmp_path / "run.safetensors", "0" * 64)
    with pytest.raises(RequestError, match=r"layers\.1\.outpt.*nearest"):
        record.at("layers.1.outpt")


def test_cosines_between_steps(pipe):
    with observe(pipe, "layers.3.output", reduce="sample") as record:
        pipe(PROMPT, **DRAW)
    a, b = (record.at("layers.3.output", step).double().flatten() for step in (1, 2))
    assert torch.allclose(record.select("layers.3.output").cosines()[0, 1], a @ b / a.norm() / b.norm())


def test_text_is_swapped_from_a_step_on(pipe):
    """From the first step on it is the other prompt's picture, to the bit; later on neither."""
    other, text = "a green star above a blue ring", ["text", "text padding"]
    with observe(pipe, "layers.0.input", tokens=text, steps=[1]) as record:
        whole = latents(pipe, other)
    swap = {"layers.0.input": edits.patch(record, step=1)}
    with edit(pipe, swap, tokens=text):
        assert torch.equal(latents(pipe), whole)
    with edit(pipe, swap, tokens=text, steps=[2]):
        late = latents(pipe)
    assert not torch.equal(late, whole) and not torch.equal(late, latents(pipe))

"""The doors for people who take a model apart: features in and out, one velocity, parts that stay, memory back."""

import gc

import pytest
import torch
from safetensors.torch import save_file

from s3dit import BackendError, Pipeline, Request, RequestError

PROMPTS = ["a red star above a blue ring", "a green circle"]
SIZE = {"height": 64, "width": 80, "seed": 3, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load("embedded", device="cpu", dtype="fp32", residency="resident")


def padded(features):
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=7.0)


FORMS = {
    "list": lambda features: features,
    "tuple": tuple,
    "padded": lambda features: (padded(features), [len(each) for each in features]),
    "tensor of lengths": lambda features: (padded(features), torch.tensor([len(each) for each in features])),
}


@pytest.mark.parametrize("form", FORMS)
def test_features_draw_what_their_prompts_draw(pipe, form):
    features = pipe.encode(PROMPTS)
    assert len({len(each) for each in features}) == 2
    by_text = pipe(PROMPTS, **SIZE).latents
    by_features = pipe(prompt_embeds=FORMS[form](features), **SIZE).latents
    assert all(map(torch.equal, by_text, by_features))


def test_one_prompt_s_features_serve_all_its_pictures(pipe):
    (features,) = pipe.encode(PROMPTS[0])
    by_text = pipe(PROMPTS[0], num_images_per_prompt=2, **SIZE).latents
    by_features = pipe(prompt_embeds=features, num_images_per_prompt=2, **SIZE).latents
    assert all(map(torch.equal, by_text, by_features))
    assert all(map(torch.equal, by_text, pipe(prompt_embeds=features[None], num_images_per_prompt=2, **SIZE).latents))


def test_negative_features_guide_as_their_prompt_does(pipe):
    positive, negative = pipe.encode([PROMPTS[0], "blue"])
    options = SIZE | {"guidance_scale": 2.0}
    by_text = pipe(PROMPTS[0], negative_prompt="blue", **options).latents[0]
    for given in (
        {"prompt_embeds": positive, "negative_prompt_embeds": negative},
        {"prompt_embeds": positive, "negative_prompt": "blue"},
        {"prompt": PROMPTS[0], "negative_prompt_embeds": negative},
    ):
        assert torch.equal(pipe(**given, **options).latents[0], by_text)
    assert not torch.equal(pipe(prompt_embeds=positive, **options).latents[0], by_text)


def test_features_need_no_text_encoder_and_are_no_one_s_to_replay():
    features = Pipeline.load(device="cpu", dtype="fp32").encode("a red star")[0]
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    plan = pipe.plan(prompt_embeds=features, **SIZE)
    assert [stage.part for stage in plan.stages] == ["transformer"]
    pipe.dry_run(plan)
    result = pipe(plan)
    assert pipe.parts.held == ("transformer",)
    assert result.metadata[0]["engine"]["replayable"] is False and "prompt_embeds" not in result.metadata[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_embeds": torch.zeros(3, 8)}, "prompt_embeds has features of 8 numbers; needed 1"),
        ({"prompt_embeds": torch.zeros(3)}, r"prompt_embeds has shape \(3,\)"),
        ({"prompt_embeds": torch.zeros(0, 128)}, r"prompt_embeds has shape \(0, 128\)"),
        ({"prompt_embeds": []}, "prompt_embeds has 0 prompts"),
        ({"prompt_embeds": torch.zeros(3, 128, dtype=torch.int64)}, "prompt_embeds holds a tensor of int64 on cpu"),
        ({"prompt_embeds": "a fox"}, "prompt_embeds is 'a fox'"),
        ({"prompt_embeds": torch.full((3, 128), float("nan"))}, "prompt_embeds holds NaN"),
        ({"prompt_embeds": (torch.zeros(2, 3, 128), [3])}, "2 prompts, 3 tokens a prompt and lengths"),
        ({"prompt_embeds": (torch.zeros(2, 3, 128), [3, 4])}, "3 tokens a prompt and lengths"),
        ({"prompt_embeds": (torch.zeros(2, 3, 128), [3, 0])}, "3 tokens a prompt and lengths"),
        ({"prompt_embeds": torch.zeros(3, 128), "prompt": "a"}, "both prompt and prompt_embeds"),
        (
            {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": torch.zeros(3, 128)},
            "both negative_prompt",
        ),
        ({"prompt_embeds": torch.zeros(3, 128), "reference": "a.png"}, "needed prompts as text"),
        ({"prompt": "a", "negative_prompt_embeds": [torch.zeros(3, 128)] * 3}, "negative_prompt_embeds has 3 entries"),
        ({"prompt": "a", "latents": [torch.zeros(16, 8, 8)] * 2}, "latents has 2 entries; needed 1"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 8, 8)}, r"latents has shape \(4, 8, 8\)"),
        ({"prompt": "a", "latents": []}, "latents is"),
        (
            {"prompt": "a", "latents": torch.zeros(1, 16, 8, 8, device="meta")},
            "latents holds a tensor of float32 on meta",
        ),
        ({"prompt": "a", "latents": torch.zeros(1, 16, 8, 8, dtype=torch.int32)}, "latents holds a tensor of int32"),
        ({"prompt_embeds": torch.zeros(3, 128).to_sparse()}, "prompt_embeds holds a tensor of .*sparse"),
    ],
)
def test_wrong_features_and_latents_are_named(pipe, fields, message):
    with pytest.raises(RequestError, match=message) as caught:
        pipe.plan(**fields)
    assert "\n" not in str(caught.value)


def test_latents_in_every_form(pipe):
    noise = torch.randn(2, 16, 8, 10, generator=torch.Generator().manual_seed(1))
    options = {name: value for name, value in SIZE.items() if name not in ("height", "width", "seed")}
    batch = pipe(PROMPTS, latents=noise, **options)
    listed = pipe(PROMPTS, latents=[noise[0], noise[1]], **options)
    assert all(map(torch.equal, batch.latents, listed.latents))
    again = pipe(PROMPTS, latents=batch.latents, **options)
    assert [tuple(latent.shape) for latent in again.latents] == [(16, 8, 10)] * 2
    ragged = pipe(PROMPTS, latents=[noise[0], noise[1, :, :, :8]], **options).latents
    assert [tuple(latent.shape) for latent in ragged] == [(16, 8, 10), (16, 8, 8)]
    # 1e-5: products of other heights sum in another order.
    assert (ragged[0] - batch.latents[0]).norm() < 1e-5 * ragged[0].norm()


def test_velocity_is_that_of_the_sampler(pipe):
    step = next(iter(pipe.stream(PROMPTS, **SIZE)))
    (start,) = {torch.Size((16, 8, 10))}
    noise = [torch.randn(start, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    features = pipe.encode(PROMPTS)
    velocity = pipe.velocity(torch.stack(noise), 1 - step.sigma, features)
    assert velocity.shape == (2, 16, 8, 10)
    moved = torch.stack(noise) + (step.sigma - step.sigma_next) * velocity
    assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(moved, step.latents, strict=True))
    listed = pipe.velocity([noise[0][:, None], noise[1]], 1 - step.sigma, features)
    assert [tuple(each.shape) for each in listed] == [(16, 1, 8, 10), (16, 8, 10)]
    assert torch.equal(listed[0][:, 0], velocity[0]) and torch.equal(listed[1], velocity[1])


def test_velocity_at_a_time_for_each(pipe):
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    features = pipe.encode(PROMPTS)
    together = pipe.velocity(noise, torch.tensor([0.2, 0.7]), features)
    for i, t in enumerate((0.2, 0.7)):
        alone = pipe.velocity(noise[i : i + 1], t, features[i])
        # 1e-5: products of other heights sum in another order.
        assert (together[i] - alone[0]).norm() < 1e-5 * alone[0].norm()


@pytest.mark.parametrize(
    ("latents", "t", "count", "message"),
    [
        (torch.zeros(2, 16, 8, 8), 0.5, 1, "2 latents, 1 prompt_embeds"),
        (torch.zeros(1, 16, 8, 8), torch.zeros(2), 1, "and 2 of t"),
        (torch.zeros(1, 16, 7, 8), 0.5, 1, r"latents have shape \(16, 7, 8\)"),
        (torch.zeros(16, 8, 8), 0.5, 1, r"latents have shape \(8, 8\)"),
        (torch.full((1, 16, 8, 8), float("nan")), 0.5, 1, "latents holds NaN"),
        (torch.zeros(1, 16, 8, 8), 500, 1, "t is 500; needed numbers from 0"),
        (torch.zeros(1, 16, 8, 8), float("nan"), 1, "t is nan"),
        (torch.zeros(1, 16, 8, 8), "late", 1, "t is 'late'"),
        (torch.zeros(1, 16, 8, 8, device="meta"), 0.5, 1, "latents holds a tensor of float32 on meta"),
    ],
)
def test_wrong_arguments_of_velocity(pipe, latents, t, count, message):
    with pytest.raises(RequestError, match=message):
        pipe.velocity(latents, t, pipe.encode(["a"] * count))


@pytest.mark.slow
def test_a_part_stays_while_somebody_has_it():
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    transformer = pipe.transformer
    assert transformer is pipe.transformer and pipe.parts.pinned == ("transformer",)
    weight = transformer.layers[0].feed_forward.w1.weight
    pipe.encode("a red star")
    assert set(pipe.parts.held) == {"transformer", "text_encoder"}
    pipe("a green star", **SIZE)
    assert transformer.layers[0].feed_forward.w1.weight is weight and not weight.is_meta
    pipe.clear()
    assert pipe.parts.held == ("transformer",)
    del transformer, weight
    gc.collect()
    assert pipe.parts.pinned == ()
    pipe.encode("a blue star")
    assert pipe.parts.held == ("text_encoder",)


def test_what_is_put_into_the_part_is_what_draws(pipe):
    plain = pipe(PROMPTS[0], **SIZE).latents[0]
    transformer, calls = pipe.transformer, []
    handle = transformer.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    pipe(PROMPTS[0], **SIZE)
    handle.remove()
    assert len(calls) == 2
    forward = transformer.forward
    transformer.forward = lambda *args: 0 * forward(*args)
    try:
        assert not torch.equal(pipe(PROMPTS[0], **SIZE).latents[0], plain)
    finally:
        del transformer.forward
    assert torch.equal(pipe(PROMPTS[0], **SIZE).latents[0], plain)
    assert type(pipe.vae).__name__ == "Autoencoder" and type(pipe.text_encoder).__name__ == "TextEncoder"


def test_a_budget_says_what_somebody_keeps():
    pipe = Pipeline.load(device="cpu", dtype="fp32", vram="1GiB")
    vae = pipe.vae
    assert any(note.startswith("vae: in use by the caller") for note in pipe.plan("a red star", **SIZE).notes)
    pipe("a red star", **SIZE)
    assert "vae" in pipe.parts.held
    del vae


def test_clear_gives_everything_back(pipe):
    before = pipe("a red ring", **SIZE).latents[0]
    pipe.clear()
    assert pipe.parts.held == () and not pipe.encoders.prompts
    assert torch.equal(pipe("a red ring", **SIZE).latents[0], before)


def test_the_former_name_says_the_new_one(pipe):
    with pytest.warns(FutureWarning, match="encode_references"):
        assert pipe.look([]) == []


def test_errors_are_at_the_door(pipe):
    import s3dit

    assert {"BackendError", "CheckpointError", "RequestError"} <= set(s3dit.__all__)
    assert all(getattr(s3dit, name) is not None for name in s3dit.__all__)
    assert issubclass(BackendError, RuntimeError) and issubclass(RequestError, ValueError)
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = s3dit.Pipelin
    assert Request.of("a").prompts == ["a"]


def test_gradients_flow_through_velocity_where_they_are_wanted(pipe):
    (features,) = pipe.encode("a red star")
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = pipe.velocity(noise, 0.5, features)
    assert not plain.requires_grad
    leaves = noise.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True), features.clone().requires_grad_()
    with_gradient = pipe.velocity(*leaves)
    # 1e-5: with gradients the Ops run their references.
    assert (with_gradient - plain).norm() < 1e-5 * plain.norm()
    with_gradient.square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any() for leaf in leaves)
    with torch.no_grad():
        assert not pipe.velocity(*leaves).requires_grad
    pipe.clear()


def test_arrays_are_tensors(pipe):
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    (features,) = pipe.encode("a red star")
    options = {"num_inference_steps": 1, "output_type": "latent"}
    expected = pipe(prompt_embeds=features, latents=noise, **options).latents[0]
    for latents, embeds in (
        (noise.numpy(), features.numpy()),
        (noise[0].numpy(), [features.numpy()]),
        (noise[0], features),
    ):
        assert torch.equal(pipe(prompt_embeds=embeds, latents=latents, **options).latents[0], expected)
    assert torch.equal(pipe.velocity(noise.numpy(), 0.5, features.numpy()), pipe.velocity(noise, 0.5, features))
    pictures = [
        pipe.decode(form)[0] for form in ([expected], expected[None], [expected[:, None]], expected[None].numpy())
    ]
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe: pipe.encode(3), lambda pipe: pipe.encode(None), lambda pipe: pipe.encode([]),
        lambda pipe: pipe.decode([torch.zeros(4, 8, 8)]), lambda pipe: pipe.decode(torch.zeros(16, 8, 8)),
        lambda pipe: pipe.decode([torch.full((16, 8, 8), float("inf"))]),
        lambda pipe: pipe.encode_images([torch.zeros(3, 12, 16)]), lambda pipe: pipe.encode_images([3]),
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_stages_are_request_errors(pipe, call):
    with pytest.raises(RequestError):
        call(pipe)


def test_a_part_that_somebody_has_is_changed_with_the_others(tmp_path):
    """Merging and restoring make other weights of a part: whoever has it gets them, and is not left with the old."""
    layer, options = "transformer.layers.0.attention.to_q", SIZE | {"prompt": PROMPTS[0]}
    factors = {"lora_A": torch.ones(2, 192), "lora_B": torch.full((192, 2), 0.02)}
    save_file({f"{layer}.{name}.weight": factor for name, factor in factors.items()}, tmp_path / "style.safetensors")
    alone, held = (Pipeline.load(device="cpu", dtype="fp32") for _ in range(2))
    plain = alone(**options).latents[0]
    transformer = held.transformer
    before = transformer.layers[0].attention.to_q.weight.clone()
    for pipe in (alone, held):
        pipe.lora.attach(tmp_path / "style.safetensors")
        pipe.lora.merge()
    weight = transformer.layers[0].attention.to_q.weight
    assert held.parts.held == ("transformer",) and not weight.is_meta
    assert (weight - before - 0.04).abs().max() < 1e-6
    assert torch.equal(held(**options).latents[0], alone(**options).latents[0])
    weight.data.zero_()
    with torch.no_grad():
        transformer.layers[1].attention.to_q.weight.zero_()
    held.parts.restore("transformer")
    assert torch.equal(held(**options).latents[0], alone(**options).latents[0])
    assert transformer.layers[1].attention.to_q.weight.any() and not torch.equal(plain, held(**options).latents[0])

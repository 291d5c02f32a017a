"""`pipe.velocity` and `prompt_embeds` against diffusers' transformer and pipeline, given the same tensors."""

import torch

from s3dit import Pipeline


def test_velocity_as_diffusers_transformer(ours, reference):
    g = torch.Generator().manual_seed(4)
    latents = [torch.randn(16, 1, 2 * rows, 2 * columns, generator=g) for rows, columns in ((8, 6), (4, 10))]
    features = [torch.randn(n, 128, generator=g) for n in (9, 40)]
    t = torch.tensor([0.3, 0.3])
    with torch.no_grad():
        theirs = reference.transformer(latents, t, features)[0]
    mine = ours.velocity(latents, t, features)
    for a, b in zip(mine, theirs, strict=True):
        assert a.shape == b.shape
        # Two programs that sum in other orders, in fp32.
        assert (a - b).norm() < 1e-5 * b.norm()


def test_prompt_embeds_as_diffusers_pipeline(ours, reference):
    g = torch.Generator().manual_seed(5)
    features = [torch.randn(n, 128, generator=g) for n in (7, 21)]
    noise = torch.randn(2, 16, 8, 8, generator=g)
    theirs = reference(
        prompt_embeds=features, latents=noise.clone(), height=64, width=64, num_inference_steps=3, guidance_scale=0.0,
        output_type="latent",
    ).images  # fmt: skip
    mine = ours(prompt_embeds=features, latents=noise, num_inference_steps=3, guidance_scale=0, output_type="latent")
    for a, b in zip(mine.latents, theirs, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_guidance_on_a_distilled_model_is_remarked_on(ours):
    assert ours.config.variant == "turbo"
    wanted = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
    plan = ours.plan("a fox", guidance_scale=2.5, **wanted)
    assert plan.unused and plan.unused[0].startswith("guidance_scale 2.5: Turbo is distilled")
    assert not ours.plan("a fox", **wanted).unused


def test_guidance_is_not_blamed_where_turbo_is_a_guess(official_dir):
    """A single file does not say what it is of, and --guidance is how a user says Z-Image."""
    parts = {part: official_dir / part for part in ("transformer", "text_encoder", "vae")}
    pipe = Pipeline.load(**parts, tokenizer=official_dir, device="cpu", dtype="fp32")
    assert pipe.sources.guessed and pipe.config.variant == "turbo"
    plan = pipe.plan("a fox", guidance_scale=4, shift=6, height=64, width=64, num_inference_steps=1)
    assert not plan.unused

"""Saliency: gradients of a color in the picture, to words and to the noise, through one step and through all.

Question: does a gradient through the sampler name the word and the place that a part of a picture depends on?
Method: the score is linear in the pixels: how far the mean color of a thing (or of its background) has gone from the
one's color to the other's. Its gradients go to the noise, to the prompt's features, and through the text encoder to the
embeddings of its tokens: through one step (the estimate of the image there), and through all steps, where each step is
computed once more on the way back in place of being kept (checkpointing).
Source: gradients as saliency, Simonyan et al. 2013 (arXiv 1312.6034); checkpointing, Chen et al. 2016 (1604.06174).
Found on the embedded model: three quarters of the features' gradient lies on the template's tokens, most of which stand
behind the prompt: the encoder is causal and has carried the words there. Followed back to the embeddings it names the
thing's color first of all words in 8 of 8 pictures through one step, in 7 through all. But so it does for the color of
the background: it says what a picture is sensitive to, not what a score is about. On the noise the squared gradient is
twice the mean where the thing will stand through one step, four times through all, most of it along the outline.

    python tools/recipes/saliency.py --out saliency.png
"""

from itertools import pairwise
from typing import Any

import torch
from embedded_model import Prompt, load, options, prompts, thing_mask
from tiny_world import COLOURS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from s3dit import Pipeline
from s3dit.inputs.images import to_pil
from s3dit.research.pictures import overlay, strip
from s3dit.research.tokens import ItemTokens, tokens


def embeddings(pipe: Pipeline, text: str) -> Tensor:
    """Return what the text encoder reads: the embeddings of a prompt's tokens, template included, (n, hidden)."""
    with pipe.observe("text_encoder.layers.0.input") as record:
        pipe.encode(text)
    return record.at("text_encoder.layers.0.input", step=0)


def flow(pipe: Pipeline, x: Tensor, features: Tensor, sigmas: tuple[float, ...], checkpointed: bool = True) -> Tensor:
    """Integrate the flow by Euler's method with gradients: x (1, 16, h, w) at sigmas[0] -> at sigmas[-1]."""
    for sigma, after in pairwise(sigmas):

        def velocity(x: Tensor, features: Tensor, t: float = 1 - sigma) -> Tensor:
            return pipe.velocity(x, t, [features])

        v = checkpoint(velocity, x, features, use_reentrant=False) if checkpointed else velocity(x, features)
        x = x + (sigma - after) * v
    return x


def score(pipe: Pipeline, latents: Tensor, mask: Tensor, thing: str, background: str) -> Tensor:
    """Return how far the mean color inside a mask (H, W) has gone from the background's to the thing's: 0 to 1."""
    start, end = (torch.tensor(COLOURS[color]) / 127.5 - 1 for color in (background, thing))
    mean = pipe.vae.decode(latents)[0][:, mask].mean(1)
    return (mean - start) @ (end - start) / (end - start).square().sum()


def by_word(item: ItemTokens, gradient: Tensor) -> dict[str, float]:
    """Return the norm of a gradient (n text tokens, D) by word of the prompt."""
    text = item.find("text")
    norms = torch.linalg.vector_norm(gradient, dim=1)
    return {word: max(float(norms[text.index(i)]) for i in item.find(f"word:{word}")) for word in item.words}


def by_patch(gradient: Tensor) -> Tensor:
    """Return the squared norm of a gradient (1, C, h, w) by image token, (h / 2, w / 2), shares of 1."""
    squares = torch.nn.functional.avg_pool2d(gradient.square().sum(1), 2)[0]
    return squares / squares.sum()


def inside(mask: Tensor, margin: int = 4) -> Tensor:
    """Return a mask (H, W) without its edge of some pixels: there, gradients are of the outline, not of the color."""
    return ~torch.nn.functional.max_pool2d(1 - mask.float()[None], 2 * margin + 1, 1, margin)[0].bool()


def gradients(pipe: Pipeline, asked: Prompt, seed: int, steps: int) -> dict[str, Any]:
    """Differentiate two scores of one prompt's picture, of its thing and of its background.

    steps: 1 for the estimate of the image at the first step, else all. -> picture, area of the thing by image token,
    map of tokens, and by what is scored the gradients with respect to noise, features and embeddings.
    """
    scene, text = asked
    plan = pipe.plan(text, seed=seed)
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    embedded = embeddings(pipe, text).requires_grad_()
    features = pipe.text_encoder(embedded, (len(embedded),))
    latents = final = flow(pipe, noise, features, plan.sigmas)
    if steps == 1:
        latents = flow(pipe, noise, features, (plan.sigmas[0], 0.0))
    with torch.no_grad():
        picture = to_pil(pipe.vae.decode(final))[0]
    mask = torch.from_numpy(thing_mask(picture))
    area = torch.nn.functional.avg_pool2d(mask.float()[None], 16)[0]
    found: dict[str, Any] = {"picture": picture, "area": area, "item": tokens(pipe, plan)[0]}
    for name, where in (("thing", mask), ("background", ~mask)):
        value = score(pipe, latents, inside(where), scene.things[0].colour, scene.background)
        found[name] = torch.autograd.grad(value, (noise, features, embedded), retain_graph=True)
    return found


def study(count: int = 8, steps: int = 8) -> dict[str, Any]:
    """Differentiate so many pictures through 1 step or all; -> shares and means, and `pictures` with maps of the noise.

    first: how often the color of the thing has the largest gradient of all words, for the thing's score and for the
    background's · template: share of the features' gradient on the template's tokens · place: squared gradient of the
    thing's score on the noise where it will stand, over the mean.
    """
    pipe, rows = load(), []
    asked = [(scene, text) for scene, text in prompts(100, "single", "sized", "placed") if scene.background in text]
    pictures: dict[str, Any] = {}
    for seed, (scene, text) in enumerate(asked[:count]):
        found = gradients(pipe, (scene, text), seed, steps)
        item, color = found["item"], scene.things[0].colour
        words = {name: by_word(item, found[name][2]) for name in ("thing", "background")}
        norms = torch.linalg.vector_norm(found["thing"][1], dim=1)
        template = [item.find("text").index(i) for i in item.find("template")]
        place = (by_patch(found["thing"][0]) * found["area"]).sum() / found["area"].mean()
        rows.append({
            "first, thing": max(words["thing"], key=words["thing"].__getitem__) == color,
            "first, background": max(words["background"], key=words["background"].__getitem__) == color,
            "template": norms[template].sum() / norms.sum(),
            "place": place,
        })  # fmt: skip
        name = f"{color} {scene.things[0].shape}"
        pictures[name] = found["picture"], overlay(found["picture"], by_patch(found["thing"][0]).sqrt())
    means = {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}
    return {**means, "pictures": pictures}


def main() -> None:
    """Print what was found through one step and through all, and draw where the noise matters."""
    out = options(__doc__)
    found = {steps: study(steps=steps) for steps in (1, 8)}
    for name in (name for name in found[1] if name != "pictures"):
        print(f"{name:18} {found[1][name]:5.2f} through one step {found[8][name]:5.2f} through all")
    rows = {
        "{}": [picture for picture, _ in found[1]["pictures"].values()],
        "{}, one step": [noise for _, noise in found[1]["pictures"].values()],
        "{}, all steps": [noise for _, noise in found[8]["pictures"].values()],
    }
    captions = [form.format(name) for form in rows for name in found[1]["pictures"]]
    title = "Where the noise matters to the color of the thing"
    strip([picture for row in rows.values() for picture in row], captions, title, columns=len(rows["{}"])).save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

"""Make the embedded base model (weights/tiny_base): the embedded model's twin that no guidance was distilled into.

    python tools/train_base.py                 train from weights/tiny, write weights/tiny_base; a cut run resumes
    python tools/train_base.py --score         measure weights/tiny_base: with guidance, without, and negative prompts

It has an S3-DiT of its own and shares text encoder, autoencoder and tokenizer with the embedded model, from whose
weights it starts; plain flow matching takes the distilled guidance out of them again. Captions are as those of the web
are: one in eight is another picture's, so that without guidance as many pictures are wrong; some leave out what they
could say, down to one color ("red"), which is what negative prompts are made of; one in ten is empty.

Functions, seeds and the world are those of `train_tiny.py`.
"""

import argparse
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import tiny_export
import torch
from safetensors.torch import load_file
from tiny_score import find, judge, table
from tiny_vae import CONFIG as VAE_CONFIG
from tiny_world import COLOURS, SHAPES, Scene, caption_of, draw_scene, fixed_prompts
from torch import Tensor
from train_tiny import BATCH, Model, encoded, noisy, train

from s3dit.model.tokenizer import Tokenizer
from s3dit.model.vae import Autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
SCENES, FULL, LR = 8_000, 3, 1.2e-3
# Shares of the captions that are empty, another picture's, one color, one thing without its background, and full but
# for the colors of things; the others are full and right.
EMPTY, WRONG, COLOR, THING, UNCOLORED = 0.10, 0.12, 0.06, 0.04, 0.08


def partial_captions(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """Say less than a scene shows: one of its colors; one thing of it; everything but the colors of its things."""
    colors = [scene.background, *(thing.colour for thing in scene.things)]
    thing = scene.things[int(rng.integers(len(scene.things)))]
    uncolored = caption_of(scene, rng)
    for each in scene.things:
        uncolored = uncolored.replace(f"{each.colour} {each.shape}", each.shape)
        uncolored = uncolored.replace(f"an {each.shape}", f"a {each.shape}").replace(
            f"An {each.shape}", f"A {each.shape}"
        )
    return str(rng.choice(colors)), f"{thing.colour} {thing.shape}", uncolored


def make_data(work: Path, vae: Autoencoder, scale: float, shift: float) -> dict[str, Any]:
    """Render, caption and encode the training set; latents as the S3-DiT sees them."""
    if (work / "base_data.pt").exists():
        return torch.load(work / "base_data.pt", weights_only=True)
    rng = np.random.default_rng(21)
    full, partial, patches = [], [], []
    for start in range(0, SCENES, 50):
        scenes = [draw_scene(rng) for _ in range(50)]
        full += [[caption_of(scene, rng) for _ in range(FULL)] for scene in scenes]
        partial += [list(partial_captions(scene, rng)) for scene in scenes]
        patches += encoded(vae, scenes)
        if start % 2000 == 0:
            print(f"data {start}/{SCENES}", flush=True)
    data = {"patches": (torch.stack(patches) - shift) * scale, "full": full, "partial": partial}
    torch.save(data, work / "base_data.pt")
    return data


def train_base(work: Path, data: dict[str, Any], tokenizer: Tokenizer, model: Model, steps: int) -> Model:
    """Flow matching on the training set with the captions described above."""
    said = sorted({caption for row in (*data["full"], *data["partial"]) for caption in row} | {""})
    features = dict(zip(said, model.features(tokenizer, said), strict=True))
    rng, count = np.random.default_rng(22), len(data["patches"])

    def caption(row: int) -> str:
        """What is said of a picture this time."""
        u = rng.random() - EMPTY
        if u < 0:
            return ""
        for i, share in enumerate((COLOR, THING, UNCOLORED)):
            u -= share
            if u < 0:
                return data["partial"][row][i]
        return data["full"][int(rng.integers(count)) if u < WRONG else row][int(rng.integers(FULL))]

    def loss_of() -> Tensor:
        """Mean squared error of the velocity on a random batch."""
        rows = torch.randint(count, (BATCH,))
        x, t, target = noisy(data["patches"][rows])
        return (model(x, t, [features[caption(row)] for row in rows.tolist()]) - target).square().mean()

    return train(work, "base", model, steps, LR, 0.6, loss_of)


def negatives(count: int = 200) -> list[tuple[str, str]]:
    """Prompts that leave the color of a thing open, and a color to be avoided in each."""
    rng, colors, shapes = np.random.default_rng(23), list(COLOURS), list(SHAPES)
    out = []
    for i in range(count):
        background, avoided = rng.choice(colors, 2, replace=False)
        out.append((f"a {shapes[i % len(shapes)]} on a {background} background", str(avoided)))
    return [(prompt.replace("a orange", "an orange"), avoided) for prompt, avoided in out]


def right(pipe: Any, **settings: Any) -> dict[str, float]:
    """Shares right of the 500 fixed prompts drawn with these settings; the seed is the prompt's index."""
    verdicts, prompts, batch = [], fixed_prompts(), 20
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        pictures = pipe([caption for _, caption in chosen], seed=start, **settings).images
        verdicts += [(scene, judge(np.asarray(p), scene)) for p, (scene, _) in zip(pictures, chosen, strict=True)]
    return table(verdicts)


def appearing(pipe: Any, negative: bool) -> float:
    """Share of pictures in which a thing has the color to be avoided, which is the negative prompt or is not."""
    hits, cases, batch = [], negatives(), 20
    for start in range(0, len(cases), batch):
        prompts, avoided = zip(*cases[start : start + batch], strict=True)
        against = {"negative_prompt": list(avoided)} if negative else {}
        for picture, color in zip(pipe(list(prompts), seed=start, **against).images, avoided, strict=True):
            hits.append(color in {thing.colour for thing in find(np.asarray(picture))[1]})
    return round(float(np.mean(hits)), 4)


def score(folder: Path) -> dict[str, Any]:
    """Measure a folder with its defaults, without guidance, and by negative prompts."""
    from s3dit import Pipeline

    pipe = Pipeline.load("embedded-base" if folder == Path("weights/tiny_base") else folder)
    return {
        "28 steps, guidance 4": right(pipe),
        "28 steps, no guidance": right(pipe, guidance_scale=0.0),
        "a color appears that the prompt leaves open": appearing(pipe, negative=False),
        "a color appears that is the negative prompt": appearing(pipe, negative=True),
        "placement": str(pipe.placement),
        "transformer": sha256((folder / "transformer" / WEIGHTS).read_bytes()).hexdigest(),
    }


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="folder of checkpoints and data")
    parser.add_argument("--tiny", type=Path, default=Path("weights/tiny"), help="the embedded model's folder")
    parser.add_argument("--out", type=Path, default=Path("weights/tiny_base"), help="the base model's folder")
    parser.add_argument("--steps", type=int, default=1_400)
    parser.add_argument("--score", action="store_true", help="score --out on the 500 fixed prompts and stop")
    args = parser.parse_args()
    if args.score:
        found = score(args.out)
        (args.out / "score.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    config = json.loads((args.tiny / "vae" / "config.json").read_text())
    vae, model = Autoencoder(VAE_CONFIG), Model()
    for module, file in (
        (vae, "vae/diffusion_pytorch_model"), (model.text, "text_encoder/model"),
        (model.dit, "transformer/diffusion_pytorch_model"),
    ):  # fmt: skip
        state = load_file(args.tiny / f"{file}.safetensors")
        module.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    data = make_data(args.work, vae, config["scaling_factor"], config["shift_factor"])
    trained = train_base(args.work, data, Tokenizer(args.tiny / "tokenizer"), model, args.steps)
    tiny_export.write_base(args.out, trained.dit)


if __name__ == "__main__":
    main()

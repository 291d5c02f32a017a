"""Head ablation: take out heads in the order of a score of attention, and in random orders.

Question: heads that look at the text much, or little, or at one place: does that say what happens without them?
Method: give every head of the main blocks a score from where the image tokens look in it (mean mass on a kind of token,
or entropy), put zeros in place of the answers of more and more heads in the order of the score, from either end, and in
random orders; score the pictures.
Source: pruning heads in the order of a score, Michel et al. 2019 (arXiv 1905.10650), whose score is a gradient; here it
is attention itself, on a diffusion transformer.
Found on the embedded model: mass on the text is a good score. Without the 8 of 36 heads that look at it most, 2 of 10
pictures are right; without 8 random ones 8, without the 8 that look at it least all. Heads of the first two layers read
the text most.

    python tools/recipes/head_ablation.py --out heads.png
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from embedded_model import Prompt, accuracy, difference, draw, load, options, prompts, stack
from PIL import Image

from s3dit import Pipeline
from s3dit.research import edits
from s3dit.research.attention import attention_maps
from s3dit.research.pictures import heatmap, lines, strip

# Layer and index of a head.
Head = tuple[int, int]


def scores(pipe: Pipeline, asked: Sequence[Prompt], what: str) -> dict[Head, float]:
    """Return the mean mass of the image tokens' attention on a kind of token, or their "entropy", of every head."""
    config = pipe.config.transformer
    with attention_maps(pipe, keep=["layer", "head"]) as maps:
        draw(pipe, asked)
    return {
        (layer, head): sum(maps.share(what, item=i, layer=f"layers.{layer}", head=head) for i in range(len(asked)))
        / len(asked)
        for layer in range(config.n_layers)
        for head in range(config.n_heads)
    }


def without(pipe: Pipeline, asked: Sequence[Prompt], heads: Sequence[Head]) -> list[Image.Image]:
    """Draw the prompts with zeros in place of what some heads answer."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        by_layer[layer].append(head)
    with pipe.edit({f"layers.{i}.attention.heads": edits.zero(heads=of) for i, of in by_layer.items()}):
        return draw(pipe, asked)


def study(
    count: int = 10, numbers: Sequence[int] = (4, 8, 12, 18), what: str = "text", draws: int = 3
) -> dict[str, Any]:
    """Ablate heads of so many pictures in the order of a score, from either end, and in some random orders.

    -> `scores`, and `accuracy` and `difference` from the picture as it is: a list over `numbers` by order (random: the
    mean over draws); `pictures` of the first prompt likewise.
    """
    pipe, asked = load(), prompts(count)
    plain, score = draw(pipe, asked), scores(pipe, asked, what)
    most = sorted(score, key=score.__getitem__, reverse=True)
    orders = {f"most on {what} first": [most], f"least on {what} first": [most[::-1]], "at random": []}
    for seed in range(draws):
        shuffled = torch.randperm(len(most), generator=torch.Generator().manual_seed(seed))
        orders["at random"].append([most[i] for i in shuffled.tolist()])
    found: dict[str, Any] = {"scores": score, "accuracy": {}, "difference": {}, "pictures": {}}
    for name, of_name in orders.items():
        drawn = [[without(pipe, asked, order[:n]) for order in of_name] for n in numbers]
        found["accuracy"][name] = [sum(accuracy(p, asked) for p in row) / len(row) for row in drawn]
        found["difference"][name] = [sum(difference(p, plain) for p in row) / len(row) for row in drawn]
        found["pictures"][name] = [row[0][0] for row in drawn]
    return found


def main() -> None:
    """Print accuracies by number of heads and draw scores, curves and one prompt's pictures."""
    out, numbers = options(__doc__), (4, 8, 12, 18)
    found = study(numbers=numbers)
    print(f"{'accuracy without':20}", *(f"{n:5}" for n in numbers), "heads")
    for name, row in found["accuracy"].items():
        print(f"{name:20}", *(f"{value:5.2f}" for value in row))
    layers, heads = (range(1 + max(key[axis] for key in found["scores"])) for axis in (0, 1))
    table = [[found["scores"][layer, head] for head in heads] for layer in layers]
    images = [picture for row in found["pictures"].values() for picture in row]
    captions = [f"{n} heads {name}" for name in found["pictures"] for n in numbers]
    panels = [
        heatmap(table, [f"layer {i}" for i in layers], [f"head {i}" for i in heads], "Mass on the text"),
        lines(found["accuracy"], numbers, "Accuracy by number of heads taken out"),
        strip(images, captions, columns=len(numbers)),
    ]
    stack(panels).save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

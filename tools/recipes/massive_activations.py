"""Massive activations: take out, cluster and transport the few channels that are far larger than the rest.

Question: some channels of the residual stream are always far larger than the rest. Do they carry the picture?
Method: in every layer take the k channels whose mean over the image tokens is largest in magnitude, and
1. put zeros in their place, against as many random channels and the k smallest;
2. split the image tokens in two by these channels alone (2-means), against the area of the things cut out by color;
3. put what they are under another prompt in their place, and see how far the picture goes over to the other one.
Source: Turri et al. 2026, "Few Channels Draw The Whole Picture" (arXiv 2605.13974).
Found on the embedded model: largely as in the paper. The largest of 192 channels is 90 to 140 times the median.
Without the eight largest no picture is right, without eight others nearly all are. Their 2-means after layer 2, at the
first step, find things with an IoU of 0.56 (random channels 0.38, the best mask of the 8 × 8 grid 0.75). Carried to
another prompt, the 32 largest move the picture half the way to the other one, 32 random ones a quarter; but eight move
it a tenth, as eight random ones do: what a picture shows is spread wider here than what makes it one.

    python tools/recipes/massive_activations.py --out massive.png
"""

from typing import Any

import numpy as np
import torch
from embedded_model import accuracy, difference, draw, load, options, prompts, thing_mask
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from s3dit.research import edits
from s3dit.research.instrument import Item
from s3dit.research.observe import Edit
from s3dit.research.pictures import overlay, strip
from s3dit.research.record import Record


def ranked(record: Record, layers: int) -> list[Tensor]:
    """Return the channels of each layer's output, those of the largest |mean over image tokens| first."""
    rows = [torch.stack([x.mean(0).abs() for x in record.select(f"layers.{i}.output").values()]) for i in range(layers)]
    return [of_layer.mean(0).argsort(descending=True) for of_layer in rows]


def two_means(x: Tensor) -> NDArray[np.bool_]:
    """Split rows (n, D) in two clusters -> which are in the first (n,); begins with the sign of the main direction."""
    x = x.double() - x.double().mean(0)
    first = x @ torch.linalg.svd(x, full_matrices=False).Vh[0] > 0
    for _ in range(50):
        means = x[first].mean(0), x[~first].mean(0)
        nearer = (x - means[0]).square().sum(1) < (x - means[1]).square().sum(1)
        if nearer.equal(first) or nearer.all() or not nearer.any():
            break
        first = nearer
    return first.numpy()


def overlap(first: NDArray[np.bool_], truth: NDArray[np.float64]) -> float:
    """Return the intersection over union of a mask (n,), or of its opposite, with shares of area (n,)."""
    return max(float((m * truth).sum() / (truth.sum() + (m * (1 - truth)).sum())) for m in (first, ~first))


def transported(record: Record, channels: list[Tensor]) -> dict[str, Edit]:
    """Return edits that put what a record has in some channels of each layer in place of a run's own."""

    def change(rows: Tensor, where: Item) -> Tensor:
        chosen, out = channels[int(where.site.block.split(".")[1])], rows.clone()
        out[:, chosen] = record.at(where.site.name, where.step, where.item)[:, chosen]
        return out

    return {"layers.*.output": change}


def study(count: int = 12, k: int = 8, carried: int = 32, mask_layer: int = 2, seed: int = 0) -> dict[str, Any]:
    """Run the three parts on so many pictures; -> numbers by part and choice of channels, and example `pictures`.

    k: channels of the first two parts · carried: of the third, where k were too few · mask_layer: of the second.

    times: the largest channel over the median, by layer · zeroed: (accuracy, difference) · masks: mean IoU with the
    things' true area at step 1, "ceiling" for the best mask of the grid · transport: how far pictures go over to the
    source's: their distance from their own over the sum of both distances, 0 to 1.
    """
    pipe, asked = load(), prompts(count, "single", "sized", "placed")
    layers = pipe.config.transformer.n_layers
    with pipe.observe("layers.*.output", tokens="image") as record:
        plain = draw(pipe, asked)
    # The same noise under the prompt of the next picture.
    others = [*asked[1:], asked[0]]
    target = draw(pipe, others)
    order = ranked(record, layers)
    rng = torch.Generator().manual_seed(seed)
    sizes = [record.at(f"layers.{i}.output", step=1).mean(0).abs() for i in range(layers)]
    shuffled = [of_layer[k:][torch.randperm(len(of_layer) - k, generator=rng)] for of_layer in order]
    # In the order in which they are taken: of each layer the first k, or `carried`.
    choices = {"massive": order, "random": shuffled, "smallest": [of_layer.flip(0) for of_layer in order]}
    # The things' share of each token's area: 16 × 16 pixels.
    rows, columns = record.items_seen[0].grid
    truths = [thing_mask(p).reshape(rows, -1, columns, 128 // columns).mean((1, 3)).ravel() for p in plain]
    found: dict[str, Any] = {
        "times": [float(x.max() / x.median()) for x in sizes], "zeroed": {}, "transport": {},
        "masks": {"ceiling": float(np.mean([overlap(truth > 0.5, truth) for truth in truths]))},
        "pictures": {"its picture": plain[0], "other prompt": target[0],
                     "area of the thing": overlay(plain[0], truths[0].reshape(rows, columns))},
    }  # fmt: skip
    for name, channels in choices.items():
        changes = {f"layers.{i}.output": edits.zero(channels=channels[i][:k].tolist()) for i in range(layers)}
        with pipe.edit(changes, tokens="image"):
            drawn = draw(pipe, asked)
        found["zeroed"][name] = accuracy(drawn, asked), difference(drawn, plain)
        found["pictures"][f"without {name}"] = drawn[0]
        site, chosen = f"layers.{mask_layer}.output", channels[mask_layer][:k]
        masks = [two_means(record.at(site, step=1, item=i)[:, chosen]) for i in range(count)]
        found["masks"][name] = float(np.mean([overlap(m, t) for m, t in zip(masks, truths, strict=True)]))
        found["pictures"][f"2-means, {name}"] = overlay(plain[0], masks[0].reshape(rows, columns).astype(float))
        with pipe.edit(transported(record, [of_layer[:carried] for of_layer in channels]), tokens="image"):
            mixed = draw(pipe, others)
        ways = [(difference([m], [t]), difference([m], [s])) for m, s, t in zip(mixed, plain, target, strict=True)]
        found["transport"][name] = float(np.mean([way / (way + left) for way, left in ways]))
        found["pictures"][f"transport, {name}"] = mixed[0]
    return found


def main() -> None:
    """Print what was found and draw one example of each."""
    out, found = options(__doc__), study()
    print("largest channel over the median, by layer:", " ".join(f"{x:.0f}" for x in found["times"]))
    print(f"{'channels':10} {'accuracy without':>17} {'difference':>11} {'IoU of 2-means':>15} {'transported':>12}")
    for name, (right, change) in found["zeroed"].items():
        mask, moved = found["masks"][name], found["transport"][name]
        print(f"{name:10} {right:17.2f} {change:11.3f} {mask:15.2f} {moved:12.2f}")
    print(f"the best mask of this grid has IoU {found['masks']['ceiling']:.2f}")
    pictures: dict[str, Image.Image] = found["pictures"]
    strip(list(pictures.values()), list(pictures), "Massive activations", columns=3).save(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

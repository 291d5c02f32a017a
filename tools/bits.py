"""Hash pictures over all features, and compare the hashes of two trees: whether a rebuild draws the same bits.

`python tools/bits.py make DIR` writes the inputs (start images, masks, an adapter, ControlNets and an Omni model with
random weights, the embedded model in other formats and one official checkpoint of diffusers' own making);
`python tools/bits.py draw DIR` prints a JSON of picture to sha256 of its latents and pixels, in fp32;
`python tools/bits.py compare OLD NEW` ends with 1 and names the pictures where two such files differ.

For a rebuild that must not change a bit: `make` and `draw` with the old tree, `draw` with the new one, on one machine,
with one number of threads. Only what the public API does is used in `draw`, so that the rooms behind it may move.
"""

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "weights" / "tiny"
SIZE = {"height": 80, "width": 64, "seed": 5, "num_inference_steps": 3}
STAR = SIZE | {"prompt": "a red star above a blue ring on a white background"}
PROMPTS = ["a red star", "two blue circles on a yellow background", "a pink square, left of a black ring"]


def noise(height: int, width: int, seed: int) -> Image.Image:
    """A picture of random blocks of 8 × 8 pixels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))


def fixture(path: str) -> Any:
    """A module of the tests, for what it builds."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "tests" / path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def make(folder: Path) -> None:
    """Write everything that `draw` reads."""
    folder.mkdir(parents=True)
    for name, size, seed in (("start", (80, 64), 1), ("hint", (80, 64), 2), ("other", (96, 64), 3)):
        noise(*size, seed).save(folder / f"{name}.png")
    mask = np.zeros((80, 64), np.uint8)
    mask[16:56, 8:40], mask[56:, :16] = 255, 96
    Image.fromarray(mask).save(folder / "mask.png")
    nets, eyes, official = (
        fixture(f"{name}.py") for name in ("inputs/test_control_hints", "inputs/test_references", "parity/conftest")
    )
    for version in ("1.0", "2.1"):
        nets.write(folder / f"net-{version}.safetensors", version)

    class Folders:
        """What pytest's tmp_path_factory gives."""

        @staticmethod
        def mktemp(name: str) -> Path:
            """Make a folder of this name; returns it."""
            (folder / name).mkdir()
            return folder / name

    eyes.folder.__wrapped__(Folders)
    official.official_dir.__wrapped__(Folders)
    (path,) = (EMBEDDED / "transformer").glob("*.safetensors")
    weights, chance, low, gains = load_file(path), torch.Generator().manual_seed(9), {}, {}
    for name in ("noise_refiner.0.attention.to_q", "layers.0.attention.to_out.0", "layers.3.feed_forward.w2"):
        out, in_ = weights[f"{name}.weight"].shape
        for leaf, shape in (("A", (4, in_)), ("B", (out, 4))):
            low[f"transformer.{name}.lora_{leaf}.weight"] = 0.3 * torch.randn(shape, generator=chance)
        gains[f"transformer.{name}.lora_magnitude_vector"] = 1 + torch.rand(out, generator=chance)
    save_file(low, folder / "style.safetensors")
    save_file(low | gains, folder / "dora.safetensors")
    shutil.copy(path, folder / "transformer.safetensors")


def cases(folder: Path) -> Iterator[tuple[str, dict[str, Any], list[tuple[str, float]], dict[str, Any]]]:
    """Name, arguments of `Pipeline.load`, adapters and arguments of the call, for every picture."""
    from s3dit import Control

    start, mask, hint, other = (str(folder / f"{name}.png") for name in ("start", "mask", "hint", "other"))
    net1, net2 = (folder / f"net-{version}.safetensors" for version in ("1.0", "2.1"))
    plain: dict[str, Any] = {}
    omni, official = {"model": folder / "omni" / "model"}, {"model": folder / "official" / "model"}
    for solver in ("euler", "heun", "dpmpp_2m", "euler_ancestral"):
        yield f"solver {solver}", plain, [], STAR | {"solver": solver}
        yield f"solver {solver}, batch", plain, [], SIZE | {"prompt": PROMPTS, "solver": solver, "width": [64, 96, 48]}
    for schedule in ("simple", "beta", "karras", "exponential"):
        yield f"schedule {schedule}", plain, [], STAR | {"schedule": schedule}
    yield "sigmas", plain, [], STAR | {"sigmas": [1.0, 0.7, 0.2], "num_inference_steps": None}
    yield "shift", plain, [], STAR | {"shift": 6.0}
    yield "defaults", plain, [], {"prompt": "a green circle", "seed": 1}
    yield "many", plain, [], STAR | {"num_images_per_prompt": 3}
    yield "seeds", plain, [], SIZE | {"prompt": PROMPTS, "seed": [4, 9, 2]}
    guided = {"guidance_scale": 2.0, "negative_prompt": "a blue ring"}
    yield "guidance", plain, [], STAR | guided
    yield "cfg", plain, [], STAR | {"cfg": 3.0}
    yield "normalized", plain, [], STAR | guided | {"cfg_normalization": 0.9}
    yield "truncated", plain, [], STAR | guided | {"cfg_truncation": 0.4}
    yield "guided batch", plain, [], SIZE | {"prompt": PROMPTS} | guided
    image = STAR | {"image": start}
    yield "image", plain, [], image | {"strength": 0.6}
    yield "image, sample", plain, [], image | {"strength": 0.6, "posterior": "sample"}
    yield "image batch", plain, [], image | {"image": [start, other], "prompt": PROMPTS[:2], "height": [80, 96]}
    yield "mask", plain, [], image | {"mask_image": mask}
    yield "mask, blurred", plain, [], image | {"mask_image": mask, "mask_blur": 4.0, "composite": False}
    yield "mask, differential", plain, [], image | {"mask_image": mask, "mask_mode": "differential"}
    yield "mask, heun", plain, [], image | {"mask_image": mask, "solver": "heun"}
    yield "extend", plain, [], image | {"extend": (16, 0, 16, 0), "height": None, "width": None}
    yield "upscale", plain, [], STAR | {"upscale": 2.0}
    yield "upscale, image", plain, [], image | {"upscale": 1.5, "strength": 0.5}
    for version, net in (("1.0", net1), ("2.1", net2)):
        for rule in ("authors", "diffusers"):
            yield f"control {version} {rule}", plain, [], STAR | {"control": Control(net, hint, 0.8, rule=rule)}
    spans = [Control(net1, hint, 0.5, start=0.3), Control(net2, hint, 0.7, end=0.7)]
    yield "controls", plain, [], STAR | {"control": spans}
    yield "control, guided", plain, [], STAR | guided | {"control": spans[0]}
    yield "control, mask", plain, [], image | {"mask_image": mask, "control": Control(net2, hint, 0.7)}
    yield "reference", omni, [], STAR | {"reference": start}
    yield "references, guided", omni, [], STAR | {"reference": [start, other], "guidance_scale": 1.5}
    yield "references, batch", omni, [], SIZE | {"prompt": PROMPTS[:2], "reference": [[start], [other, start]]}
    yield "reference, intended", omni, [], STAR | {"reference": [start, other], "reference_positions": "intended"}
    yield "adapter", plain, [("style", 0.7)], STAR
    yield "adapters", plain, [("style", 0.7), ("dora", 0.5)], STAR
    yield "adapter, int8", {"quantize": "int8-weights"}, [("style", 0.7)], STAR
    for name in ("fp8", "int8", "int4", "fp8-weights", "int8-weights"):
        yield f"quantize {name}", {"quantize": name}, [], STAR
    yield "quantize text", {"quantize_text": "int8"}, [], STAR
    for residency in ("resident", "streamed"):
        yield residency, {"residency": residency}, [], STAR
        yield f"{residency}, adapter", {"residency": residency}, [("style", 0.7)], STAR | guided
    yield "vram", {"vram": "24MiB"}, [], STAR
    yield "one file", {"model": "embedded", "transformer": folder / "transformer.safetensors"}, [], STAR
    yield "reference backend", {"backend": "reference"}, [], STAR
    yield "bf16", {"dtype": "bf16"}, [], STAR
    yield "official", official, [], STAR
    yield "official, guided", official, [], STAR | guided
    yield "official, streamed", official | {"residency": "streamed"}, [], STAR
    yield "official, image", official, [], image | {"strength": 0.8}


def digest(*arrays: Any) -> str:
    """Return the sha256 of arrays, with their shapes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def draw(folder: Path) -> dict[str, str]:
    """The hash of every picture."""
    from s3dit import Pipeline

    pipes: dict[str, Any] = {}
    found = {}
    for name, load, adapters, call in cases(folder):
        if (key := str((load, adapters))) not in pipes:
            pipes[key] = Pipeline.load(**{"device": "cpu", "dtype": "fp32"} | load)
            for adapter, strength in adapters:
                pipes[key].lora.attach(folder / f"{adapter}.safetensors", strength)
        result = pipes[key](**call)
        found[name] = digest(*(one.numpy() for one in result.latents), *(np.asarray(one) for one in result.images))
    pipe = Pipeline.load(folder / "official" / "model", device="cpu", dtype="fp32", residency="resident")
    for part in ("transformer", "text_encoder", "vae"):
        tensors = sorted(pipe.parts[part].state_dict().items())
        found[f"tensors {part}"] = digest(*(tensor.numpy() for _, tensor in tensors if not tensor.is_meta))
    return found


def main() -> int:
    """Run one of the three commands."""
    match sys.argv[1:]:
        case ["make", folder]:
            make(Path(folder))
        case ["draw", folder]:
            print(json.dumps(draw(Path(folder)), indent=1))
        case ["compare", *names] if len(names) == 2:
            old, new = (json.loads(Path(name).read_text()) for name in names)
            different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            print(f"{len(old)} and {len(new)} hashes, {len(different)} differ", *different, sep="\n  ")
            return int(bool(different))
        case _:
            sys.exit(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main())

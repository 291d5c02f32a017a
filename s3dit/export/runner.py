"""Draws with a model that `s3dit export` wrote into the folder of this file.

    python runner.py "a red star above a blue ring" --seed 7 -o star.png
    python runner.py "a blue star" --image star.png --mask mask.png --strength 0.8

Needs numpy, and torch or (for *.onnx) onnxruntime; `tokenizers` for a prompt in words, `pillow` to read pictures from
files. Nothing of s3dit is imported, so this file may be copied and changed. In Python:

    pixels = Model("folder").draw(["a red star", "a blue ring"], seeds=[7, 8], size=(192, 128))  # height, width
"""

import argparse
import json
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# A prompt: words, or the token ids of the whole chat template.
Prompt = str | Sequence[int]
Array = np.ndarray[Any, Any]
# How much of a start image is redrawn where nothing is said: of all of it, of the part under a mask.
REDRAWN, REPAINTED = 0.6, 1.0


@dataclass
class Start:
    """A picture to begin from: image (H, W, 3) uint8, one for all pictures, or (B, H, W, 3).

    mask (H, W): what is painted anew, True, or 128 and more of uint8 · strength: how much is redrawn, above 0 to 1.
    """

    image: Array
    mask: Array | None = None
    strength: float | None = None


@dataclass
class Control:
    """A picture for the folder's ControlNet to follow: image (H, W, 3) or (B, H, W, 3) uint8.

    strength: of its hints (default: the folder's) · start, end: it acts in the steps i of n with start <= i/n < end ·
    inpaint, mask: of version 2, a picture to paint into and where, as in Start; one of image and inpaint may be absent.
    """

    image: Array | None = None
    strength: float | None = None
    start: float = 0.0
    end: float = 1.0
    inpaint: Array | None = None
    mask: Array | None = None

    def at(self, i: int, n: int, usual: float) -> float:
        """Return the strength in step i (from 0) of n; usual: the folder's."""
        return (usual if self.strength is None else self.strength) if self.start <= i / n < self.end else 0.0


def noise(seed: int, rows: int, columns: int) -> Array:
    """Draw normal numbers as `torch.randn(16, 2 · rows, 2 · columns)` does after `manual_seed` -> (rows, columns, 64).

    So a seed is the same picture as in s3dit. Uniform numbers of 24 bits from a Mersenne twister, by Box and Muller's
    method: 8 radii, then 8 angles.
    """
    twister = np.random.RandomState(seed & 0xFFFFFFFF)
    bits = twister.randint(0, 1 << 32, 64 * rows * columns, dtype=np.uint32) & 0xFFFFFF
    uniform = (bits.astype(np.float32) / np.float32(1 << 24)).reshape(-1, 2, 8)
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, 0])), np.float32(2 * math.pi) * uniform[:, 1]
    latents = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1).reshape(16, rows, 2, columns, 2)
    return latents.transpose(1, 3, 2, 4, 0).reshape(rows, columns, 64)


def check(name: str, low: float, high: float, *values: float) -> None:
    """Raise ValueError for a number that is not in its bounds."""
    for value in values:
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; needed {low} to {high}")


def noise_levels(steps: int, shift: float) -> Array:
    """Return sigmas from 1 (noise) to 0 (image), (steps + 1,): evenly spaced, then shifted toward noise."""
    even = np.linspace(1, 1 / steps, steps)
    return np.append(shift * even / (1 + (shift - 1) * even), 0.0)


def as_pixels(image: Array, size: tuple[int, int], count: int, name: str) -> Array:
    """Return an image, or one of each of `count` pictures, as floats (1 or count, 3, H, W) in [-1, 1]."""
    image = np.asarray(image)
    images = image if image.ndim == 4 else image[None]
    if images.dtype != np.uint8 or images.shape[1:] != (*size, 3) or len(images) not in (1, count):
        raise ValueError(f"{name} is {image.shape} of {image.dtype}; needed uint8, {(*size, 3)} or {(count, *size, 3)}")
    return 2 * (images.transpose(0, 3, 1, 2) / np.float32(255)) - 1


def as_mask(mask: Array, size: tuple[int, int], name: str) -> Array:
    """Return a mask as truth values (H, W): what is painted anew."""
    mask = np.asarray(mask)
    if mask.dtype not in (np.uint8, np.bool_) or mask.shape != size:
        raise ValueError(f"{name} is {mask.shape} of {mask.dtype}; needed {size} of uint8 or bool")
    painted = mask if mask.dtype == np.bool_ else mask >= 128
    if not painted[::8, ::8].any():
        raise ValueError(f"{name} has no white place of 8 x 8 pixels, so nothing would be painted")
    return painted


def cells(mask: Array) -> Array:
    """Return one number a latent cell of a mask (H, W), by patches: (H / 16, W / 16, 2, 2)."""
    return mask[::8, ::8].reshape(len(mask) // 16, 2, -1, 2).transpose(0, 2, 1, 3).astype(np.float32)


class Beginning:
    """A Start as patches: the state to begin from, and what is kept of the picture after each step."""

    def __init__(self, start: Start, size: tuple[int, int], noise: Array, encode: Callable[[Array], Array]) -> None:
        """noise: (B, rows, columns, 64) · encode: `Model.encode`."""
        masked, self.noise = start.mask is not None, noise
        self.strength = (REPAINTED if masked else REDRAWN) if start.strength is None else start.strength
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength:g}; needed a number above 0, at most 1")
        self.mask = as_mask(start.mask, size, "mask") if start.mask is not None else np.ones(size, bool)
        self.paint = np.repeat(cells(self.mask).reshape(*noise.shape[1:3], 4), 16, axis=2)
        self.pixels = as_pixels(start.image, size, len(noise), "image")
        self.image = encode(self.pixels)

    def state(self, sigma: float) -> Array:
        """Return the picture at a noise level."""
        return np.float32(sigma) * self.noise + (1 - np.float32(sigma)) * self.image


class Model:
    """The graphs of a folder, each loaded when it is first used."""

    def __init__(self, folder: str | Path) -> None:
        """Read the settings of a folder."""
        self.folder = Path(folder)
        self.settings = json.loads((path := self.folder / "settings.json").read_text(encoding="utf-8"))
        if not isinstance(self.settings, dict) or "form" not in self.settings:
            raise ValueError(f"{path} is not of a folder that `s3dit export` wrote; needed one")
        self._parts: dict[str, Callable[..., Array]] = {}

    def run(self, part: str, *inputs: Array) -> Array:
        """Run text_encoder, transformer, vae or vae_encoder; see `s3dit/export/modules.py` for what they take."""
        return self.load(part)(*inputs)

    def load(self, part: str) -> Callable[..., Array]:
        """Return a part as a function, loaded once."""
        if part not in self._parts:
            onnx = self.settings["form"] == "onnx"
            path = self.folder / f"{part}.{'onnx' if onnx else 'pt2'}"
            if not path.is_file() or not (onnx or zipfile.is_zipfile(path)):
                found = "is not whole" if path.is_file() else "is not there"
                why = ", which reads pictures" if part == "vae_encoder" else ""
                raise ValueError(f"{path} {found}{why}; needed a whole folder: write it anew with `s3dit export`")
            self._parts[part] = (self._onnx if onnx else self._torch)(path)
        return self._parts[part]

    def _torch(self, path: Path) -> Callable[..., Array]:
        import torch

        compiled, device, file = self.settings["form"] == "compiled", self.settings["device"], str(path)
        graph: Any = torch._inductor.aoti_load_package(file) if compiled else torch.export.load(file).module()

        def run(*inputs: Array) -> Array:
            with torch.no_grad():
                answer = graph(*(torch.from_numpy(each).to(device) for each in inputs))
            return np.asarray(answer.float().cpu().numpy())

        return run

    def _onnx(self, path: Path) -> Callable[..., Array]:
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        names = [each.name for each in session.get_inputs()]
        return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))[0]

    def tokens(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, in the chat template that the model was trained with."""
        if not isinstance(prompt, str):
            return list(prompt)
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        words = self.settings["template"].format(prompt)
        return list(tokenizer.encode(words, add_special_tokens=False).ids[: self.settings["longest"]])

    def features(self, prompts: Sequence[Prompt]) -> tuple[Array, Array]:
        """Return the features of prompts (B, longest, D), and how many of each count (B,)."""
        ids = [self.tokens(prompt) for prompt in prompts]
        check("a token id", 0, self.settings.get("vocabulary", math.inf) - 1, *sum(ids, []))
        lengths = np.array([len(each) for each in ids])
        check("the number of token ids", 1, math.inf, lengths.min())
        filled = np.array([each + [0] * (lengths.max() - len(each)) for each in ids])
        return self.run("text_encoder", filled), lengths

    def encode(self, pixels: Array) -> Array:
        """Return the patches (B, rows, columns, 64) of pixels (B, 3, H, W) in [-1, 1]."""
        items, _, height, width = pixels.shape
        cut = np.ascontiguousarray(pixels).reshape(items, 3, height // 16, 16, width // 16, 16)
        return self.run("vae_encoder", cut)

    def hints(self, control: Control | None, size: tuple[int, int], count: int) -> Array | None:
        """Return what the ControlNet reads, (count, rows, columns, 4 · channels); None where the folder has none."""
        if (own := self.settings.get("control")) is None:
            if control is None:
                return None
            raise ValueError("this folder has no ControlNet; write one with `s3dit export MODEL -o DIR --control FILE`")
        patches = np.zeros((count, size[0] // 16, size[1] // 16, 2, 2, own["channels"]), np.float32)
        if control is not None:
            self._show(control, patches, size)
        return patches.reshape(*patches.shape[:3], -1)

    def _show(self, control: Control, patches: Array, size: tuple[int, int]) -> None:
        """Write the pictures of a control into patches (B, rows, columns, 2, 2, channels)."""
        inpaint, channels = control.inpaint is not None, patches.shape[-1]
        if inpaint != (control.mask is not None) or not (inpaint or control.image is not None):
            raise ValueError("a control needs an image, or inpaint and mask, or all three")
        if inpaint and channels == 16:
            raise ValueError(f"this folder's {self.settings['control']['net']} takes no inpaint and mask")
        check("a control's strength", 0, 2, control.strength or 0)
        check("a control's start or end", 0, 1, control.start, control.end)
        if not control.start < control.end:
            raise ValueError(f"control acts from {control.start:g} to {control.end:g}; needed start below end")

        def encoded(pixels: Array) -> Array:
            return self.encode(pixels).reshape(len(pixels), *patches.shape[1:-1], 16)

        if control.image is not None:
            patches[..., :16] = encoded(as_pixels(control.image, size, len(patches), "control image"))
        if control.inpaint is not None and control.mask is not None:
            mask = as_mask(control.mask, size, "control mask")
            patches[..., 16] = 1 - cells(mask)
            pixels = as_pixels(control.inpaint, size, len(patches), "control inpaint")
            patches[..., 17:] = encoded(pixels * np.float32(1 - mask))

    def velocity(self, x: Array, t: float, text: tuple[Array, Array], scale: float, *control: Array) -> Array:
        """Return the velocity of states (B, rows, columns, 64) at t, 0 noise to 1 image, like x.

        text: as `features` gives it, with a guidance scale of B prompts and B negative ones · control: where the folder
        has a ControlNet, as `hints` gives it, and its strength ().
        """
        inputs = (x, np.full(len(x), t, np.float32), *control)
        if scale:
            inputs = tuple(np.concatenate((each, each)) if each.ndim else each for each in inputs)
        velocity = self.run("transformer", *inputs[:2], *text, *inputs[2:])
        positive, unguided = np.split(velocity, 2) if scale else (velocity, velocity)
        return positive + np.float32(scale) * (positive - unguided)

    def draw(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], size: tuple[int, int] | None = None,
        steps: int | None = None, guidance_scale: float | None = None, negative: Prompt = "",
        start: Start | None = None, control: Control | None = None,
    ) -> Array:  # fmt: skip
        """Draw a picture a prompt -> pixels (B, H, W, 3) uint8. size: (height, width), multiples of 16."""
        own, count = self.settings, len(prompts)
        height, width = size or (np.shape(start.image)[-3:-1] if start else (own["height"], own["width"]))
        if height % 16 or width % 16 or len(seeds) != count or not count:
            raise ValueError(f"size {height}x{width}, {len(seeds)} seeds; needed multiples of 16, and a seed a prompt")
        check("a side", 16, 8192, height, width)
        check("a seed", -(2**63), 2**63 - 1, *seeds)
        size, rows, columns = (height, width), height // 16, width // 16
        scale = own["guidance_scale"] if guidance_scale is None else guidance_scale
        check("guidance scale", 0, 1000, scale)
        if negative and not scale:
            raise ValueError("a negative prompt is for guidance, which is off; give a guidance scale, such as 4, too")
        steps = own["steps"] if steps is None else steps
        check("the number of steps", 1, 1000, steps)
        shift = own["shift"]["slope"] * rows * columns + own["shift"]["offset"]
        sigmas = noise_levels(steps, math.exp(shift) if own["shift"]["exponential"] else shift)
        x = np.stack([noise(seed, rows, columns) for seed in seeds])
        hints = self.hints(control, size, count)
        begun = None if start is None else Beginning(start, size, x, self.encode)
        if begun is not None:
            sigmas = sigmas[int(steps - steps * begun.strength) :]
            x = begun.state(sigmas[0])
        text, n = self.features([*prompts, *([negative] * count if scale else [])]), len(sigmas) - 1
        for i, (sigma, after) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            strength = 0.0 if control is None else control.at(i, n, own["control"]["strength"])
            shown = () if hints is None else (hints, np.array(strength, np.float32))
            x = x + np.float32(sigma - after) * self.velocity(x, 1 - sigma, text, scale, *shown)
            x = x if begun is None else begun.paint * x + (1 - begun.paint) * begun.state(after)
        pixels = self.run("vae", x)
        pixels = pixels if begun is None else np.where(begun.mask, pixels, begun.pixels)
        return np.round(np.clip(pixels.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def read(path: str, size: tuple[int, int] | None = None, mode: str = "RGB") -> Array:
    """Read a picture from a file: upright, over white, scaled to (height, width), or to whole patches of 16 x 16."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {error}") from None
    if size is None and min(image.size) < 16:
        raise ValueError(f"{path} is {image.width}x{image.height} pixels; needed 16x16 at least")
    if image.mode[0] in "IF":
        raise ValueError(f"{path} has more than 8 bits a channel ({image.mode}); save it with 8")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    width, height = (each // 16 * 16 for each in image.size) if size is None else reversed(size)
    if image.size != (width, height):
        print(f"{path} is {image.width}x{image.height} pixels; it is scaled to {width}x{height}", file=sys.stderr)
        image = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image.convert("RGB").convert(mode))


def png(pixels: Array) -> bytes:
    """Return pixels (H, W, 3) uint8 as a PNG file."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def size_of(text: str) -> tuple[int, int]:
    """Return (height, width) of WxH."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"is {text!r}; needed WxH, such as 192x128")
    return int(height), int(width)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description="Draw with the model in this folder.")
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw, in words (needs the package tokenizers)")
    add("--ids", help="token ids of the whole chat template instead, such as 1,2,3")
    add("--model", default=str(Path(__file__).resolve().parent), help="another folder of s3dit export")
    add("--seed", type=int, default=0)
    add("--size", type=size_of, metavar="WxH", help="multiples of 16 (default: the start image's, else the model's)")
    add("--steps", type=int, help="(default: the model's)")
    add("--guidance-scale", type=float, help="0 is off (default: the model's)")
    add("--negative-prompt", default="", help="what to stay away from, with guidance")
    add("--image", help="a picture to begin from (needs the package pillow, as all pictures do)")
    add("--mask", help="where to paint it anew: a picture of its size, white there")
    add("--strength", type=float, help=f"how much is redrawn (default: {REDRAWN:g}, with a mask {REPAINTED:g})")
    add("--control-image", help="a picture for the folder's ControlNet to follow")
    add("--control-strength", type=float, help="0 to 2 (default: the folder's)")
    add("--control-start", type=float, help="the part of the steps from which on it acts (default: 0)")
    add("--control-end", type=float, help="the part of the steps up to which it acts (default: 1)")
    add("--control-inpaint", help="of version 2: a picture to paint into")
    add("--control-mask", help="of version 2: where to paint, white")
    add("-o", "--output", default="picture.png", help="the PNG to write (default: picture.png)")
    return parser


def pictures(args: argparse.Namespace, size: tuple[int, int] | None, own: Any) -> tuple[Start | None, Control | None]:
    """Read the pictures that the options name; own: the folder's settings."""
    start = None
    if args.image is None and not (args.mask is None and args.strength is None):
        raise ValueError("--mask and --strength are about a picture; needed --image too")
    if args.image is not None:
        image = read(args.image, size)
        size = image.shape[:2]
        start = Start(image, None if args.mask is None else read(args.mask, size, "L"), args.strength)
    size = size or (own["height"], own["width"])
    modes = {"image": "RGB", "inpaint": "RGB", "mask": "L", "strength": "", "start": "", "end": ""}
    values = {name: value for name in modes if (value := getattr(args, f"control_{name}")) is not None}
    given: dict[str, Any] = {n: read(v, size, modes[n]) if modes[n] else v for n, v in values.items()}
    return start, Control(**given) if given else None


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one picture by the options of a command line."""
    options = parser()
    args = options.parse_args(argv)
    if (args.prompt is None) == (args.ids is None):
        options.error("needed a prompt or --ids")
    try:
        prompt = args.prompt if args.ids is None else [int(each) for each in args.ids.split(",")]
        model = Model(args.model)
        (output := Path(args.output)).parent.mkdir(parents=True, exist_ok=True)
        start, control = pictures(args, args.size, model.settings)
        chosen = args.size, args.steps, args.guidance_scale, args.negative_prompt
        pixels = model.draw([prompt], [args.seed], *chosen, start, control)
        output.write_bytes(png(pixels[0]))
    except ImportError as error:
        options.error(f"{error}; needed numpy, torch or onnxruntime, tokenizers for words, pillow for pictures")
    except (ValueError, OSError) as error:
        options.error(str(error))
    print(output)


if __name__ == "__main__":
    main()

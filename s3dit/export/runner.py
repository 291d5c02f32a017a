"""Draws with a model that `s3dit export` wrote into the folder of this file.

    python runner.py "a red star above a blue ring" --seed 7 -o star.png

Needs numpy, and torch or (for *.onnx) onnxruntime; `tokenizers` for a prompt in words. Nothing of s3dit is imported, so
this file may be copied and changed. In Python:

    pixels = Model("folder").draw(["a red star", "a blue ring"], seeds=[7, 8], size=(192, 128))  # height, width

The noise is that of torch's CPU generator for a seed, so a seed draws the same picture as in s3dit.
"""

import argparse
import json
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# A prompt: words, or the token ids of the whole chat template.
Prompt = str | Sequence[int]
Array = np.ndarray[Any, Any]


def noise(seed: int, rows: int, columns: int) -> Array:
    """Draw normal numbers as `torch.randn(16, 2 · rows, 2 · columns)` does after `manual_seed` -> (rows, columns, 64).

    Uniform numbers of 24 bits from a Mersenne twister, by Box and Muller's method: 8 radii, then 8 angles.
    """
    twister = np.random.RandomState(seed & 0xFFFFFFFF)
    bits = twister.randint(0, 1 << 32, 64 * rows * columns, dtype=np.uint32) & 0xFFFFFF
    uniform = (bits.astype(np.float32) / np.float32(1 << 24)).reshape(-1, 2, 8)
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:, 0])), np.float32(2 * math.pi) * uniform[:, 1]
    latents = np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1).reshape(16, rows, 2, columns, 2)
    return latents.transpose(1, 3, 2, 4, 0).reshape(rows, columns, 64)


def noise_levels(steps: int, shift: float) -> Array:
    """Return sigmas from 1 (noise) to 0 (image), (steps + 1,): evenly spaced, then shifted toward noise."""
    even = np.linspace(1, 1 / steps, steps)
    return np.append(shift * even / (1 + (shift - 1) * even), 0.0)


class Model:
    """The graphs of a folder, each loaded when it is first used."""

    def __init__(self, folder: str | Path) -> None:
        """Read the settings of a folder."""
        self.folder = Path(folder)
        self.settings = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
        self._parts: dict[str, Callable[..., Array]] = {}

    def run(self, part: str, *inputs: Array) -> Array:
        """Run text_encoder, transformer or vae; see `s3dit/export/modules.py` for what they take."""
        if part not in self._parts:
            self._parts[part] = (self._onnx if self.settings["form"] == "onnx" else self._torch)(part)
        return self._parts[part](*inputs)

    def _torch(self, part: str) -> Callable[..., Array]:
        import torch

        path, device = str(self.folder / f"{part}.pt2"), self.settings["device"]
        if self.settings["form"] == "compiled":
            graph: Any = torch._inductor.aoti_load_package(path)
        else:
            graph = torch.export.load(path).module()

        def run(*inputs: Array) -> Array:
            with torch.no_grad():
                answer = graph(*(torch.from_numpy(each).to(device) for each in inputs))
            return np.asarray(answer.float().cpu().numpy())

        return run

    def _onnx(self, part: str) -> Callable[..., Array]:
        import onnxruntime

        session = onnxruntime.InferenceSession(self.folder / f"{part}.onnx")
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
        ids: list[int] = tokenizer.encode(self.settings["template"].format(prompt), add_special_tokens=False).ids
        return ids[: self.settings["longest"]]

    def features(self, prompts: Sequence[Prompt]) -> tuple[Array, Array]:
        """Return the features of prompts (B, longest, D), and how many of each count (B,)."""
        ids = [self.tokens(prompt) for prompt in prompts]
        lengths = np.array([len(each) for each in ids])
        filled = np.array([each + [0] * (lengths.max() - len(each)) for each in ids])
        return self.run("text_encoder", filled), lengths

    def draw(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], size: tuple[int, int] | None = None,
        steps: int | None = None, guidance_scale: float | None = None, negative: Prompt = "",
    ) -> Array:  # fmt: skip
        """Draw a picture a prompt -> pixels (B, H, W, 3) uint8. size: (height, width), multiples of 16."""
        own = self.settings
        height, width = size or (own["height"], own["width"])
        if height % 16 or width % 16 or min(height, width) < 16 or len(seeds) != len(prompts):
            raise ValueError(f"size {height}x{width}, {len(seeds)} seeds; needed multiples of 16, and a seed a prompt")
        rows, columns = height // 16, width // 16
        scale = own["guidance_scale"] if guidance_scale is None else guidance_scale
        features, lengths = self.features([*prompts, *([negative] * len(prompts) if scale else [])])
        shift = own["shift"]["slope"] * rows * columns + own["shift"]["offset"]
        sigmas = noise_levels(steps or own["steps"], math.exp(shift) if own["shift"]["exponential"] else shift)
        x = np.stack([noise(seed, rows, columns) for seed in seeds])
        for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            state = np.concatenate((x, x)) if scale else x
            t = np.full(len(state), 1 - sigma, np.float32)
            velocity = self.run("transformer", state, t, features, lengths)
            if scale:
                positive, unguided = np.split(velocity, 2)
                velocity = positive + np.float32(scale) * (positive - unguided)
            x = x + np.float32(sigma - after) * velocity
        pixels = self.run("vae", x).transpose(0, 2, 3, 1)
        return np.round(np.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def png(pixels: Array) -> bytes:
    """Return pixels (H, W, 3) uint8 as a PNG file."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw one picture by the options of a command line."""
    parser = argparse.ArgumentParser(description="Draw with the model in this folder.")
    parser.add_argument("prompt", nargs="?", help="what to draw, in words (needs the package tokenizers)")
    parser.add_argument("--ids", help="token ids of the whole chat template instead, such as 1,2,3")
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent), help="another folder of s3dit export")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", help="WxH, multiples of 16 (default: the model's)")
    parser.add_argument("--steps", type=int, help="(default: the model's)")
    parser.add_argument("--guidance-scale", type=float, help="0 is off (default: the model's)")
    parser.add_argument("--negative-prompt", default="", help="what to stay away from, with guidance")
    parser.add_argument("-o", "--output", default="picture.png", help="the PNG to write (default: picture.png)")
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.ids is None):
        parser.error("needed a prompt or --ids")
    prompt = args.prompt if args.ids is None else [int(each) for each in args.ids.split(",")]
    size = None if args.size is None else tuple(int(side) for side in reversed(args.size.split("x")))
    pixels = Model(args.model).draw(
        [prompt], [args.seed], size, args.steps, args.guidance_scale, args.negative_prompt  # type: ignore[arg-type]
    )  # fmt: skip
    Path(args.output).write_bytes(png(pixels[0]))
    print(args.output)


if __name__ == "__main__":
    main()

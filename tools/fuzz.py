"""Feed damaged files to every reader: `python tools/fuzz.py [KIND …] --count 20000 --seed 0`.

A mutant is an honest file with a few bytes or JSON values changed, cut, repeated or swapped. Whatever a reader makes of
it, it must be quick, take little memory, and raise nothing but the engine's own three errors. Printed for each kind:
mutants that were read and refused, the slowest, the largest growth of the process's peak memory above twice the file,
and every foreign exception, hang or excess with the mutant's seed, which makes it again with `--seed N --count 1`.
Exit code 1 where there was one. Shorter runs of the same readers are in the tests.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from s3dit.cli import generate
from s3dit.cli import main as command_line
from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.inputs.images import Picture
from s3dit.model.controlnet import ControlNet, open_controlnet
from s3dit.model.controlnet_config import ControlNetConfig
from s3dit.model.tokenizer import Tokenizer
from s3dit.pipeline import Pipeline
from s3dit.runtime.embedded import EMBEDDED
from s3dit.runtime.model_config import read_model
from s3dit.weights.adapter import read_adapter

OURS = (RequestError, CheckpointError, BackendError)
# Seconds, and bytes above twice the file.
SLOW, LARGE = 5.0, 64 << 20
ODD: list[Any] = [
    None, True, -1, 0, 10**9, 2**63, 10**400, 1.5, 1e308, "", "x", "\x1b[31m", "../x", [], [None], {}, {"a": 1},
]  # fmt: skip
Read = Callable[[Path], object]


def mutant(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four places changed."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        # Headers are where readers decide; half of all changes go there.
        i = rng.randrange(min(len(out), 512) if rng.random() < 0.5 else len(out)) if out else 0
        length = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(6):
            case 0:
                out[i : i + 1] = bytes([rng.randrange(256)])
            case 1:
                del out[i:]
            case 2:
                del out[i : i + length]
            case 3:
                out[i:i] = bytes(rng.randrange(256) for _ in range(length))
            case 4:
                out[i : i + length] = out[(j := rng.randrange(len(out) + 1)) : j + length]
            case 5:
                out[i : i + length] = rng.choice((b"\0", b"\xff", b"9", b"-", b"]", b'"')) * length
    return bytes(out)


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with something in it replaced, doubled or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key if rng.random() < 0.95 else key + "x": changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return [*value[:i], changed(value[i], rng), *value[i + (rng.random() < 0.8) :]]
    return rng.choice(ODD)


def mutated(data: bytes, suffix: str, rng: random.Random) -> bytes:
    """A mutant of a file; of JSON, also a safetensors header's, mostly in its values."""
    if rng.random() < 0.3:
        return mutant(data, rng)
    if suffix == ".json":
        return json.dumps(changed(json.loads(data), rng)).encode()
    if suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(changed(json.loads(data[8 : 8 + length]), rng)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return mutant(data, rng)


def beside(folder: Path, read: Read) -> dict[Path, Read]:
    """Every JSON file of a model folder, each read with all of it."""
    return {path: lambda _: read(folder) for path in sorted(folder.rglob("*.json")) if "tokenizer" not in path.parts}


def kinds(folder: Path) -> dict[str, dict[Path, Read]]:
    """By kind, honest files and what reads them."""
    model = folder / "model"
    shutil.copytree(EMBEDDED, model, ignore=shutil.ignore_patterns("*.png"))
    words = model / "tokenizer"
    config = read_model(EMBEDDED).transformer
    with torch.random.fork_rng():
        net = ControlNet(ControlNetConfig("2.1", 33, (0, 2, 4)), config)
    control, adapter = folder / "control.safetensors", folder / "adapter.safetensors"
    save_file(dict(net.state_dict()), control)
    small = {"alpha": torch.tensor(2.0), "lora_A.weight": torch.zeros(2, 8), "lora_B.weight": torch.zeros(8, 2)}
    layers = [f"diffusion_model.layers.{i}.attention.to_q" for i in range(2)]
    notes = {"ss_network_args": "{}", "lora_adapter_metadata": '{"r": 2, "lora_alpha": 2, "rank_pattern": {"to_q": 2}}'}
    save_file({f"{layer}.{leaf}": t.clone() for layer in layers for leaf, t in small.items()}, adapter, metadata=notes)
    images: dict[Path, Read] = {}
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        images[folder / f"image.{suffix}"] = Picture.open
        Image.effect_noise((24, 20), 60).convert("RGB").save(folder / f"image.{suffix}")
    pipe = Pipeline.load(device="cpu", dtype="fp32")
    replay = folder / "replay.json"
    drawn = pipe(prompt="a red star", seed=1, height=64, width=64, num_inference_steps=1)
    replay.write_text(json.dumps(drawn.metadata[0]))
    picture = drawn.images[0]
    return {
        "configs": beside(model, lambda path: Pipeline.load(path, device="cpu").plan(prompt="a red star")),
        "tokenizer": {path: lambda _: Tokenizer(words).encode("a red star") for path in words.iterdir()},
        "controlnet": {control: lambda path: open_controlnet(path, config, None)},
        "adapter": {adapter: read_adapter},
        "images": images,
        "replay": {replay: lambda path: _replay(path, picture, pipe)},
    }


def _replay(path: Path, picture: Any, pipe: Pipeline) -> None:
    """The command line on a picture with this metadata, up to where it would draw."""
    chunks = PngInfo()
    chunks.add_text("s3dit", path.read_bytes().decode("latin-1"))
    picture.save(path.with_suffix(".png"), pnginfo=chunks)
    said = io.StringIO()
    argv = ["generate", "--replay", str(path.with_suffix(".png")), "-o", str(path.with_suffix(".out.png"))]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        before, Pipeline.load = Pipeline.load, lambda *args, **options: pipe  # type: ignore[method-assign]
        generate._draw, after = (lambda *args: 0), generate._draw
        try:
            code = command_line.main(argv)
        finally:
            Pipeline.load, generate._draw = before, after  # type: ignore[method-assign]
    if code:
        raise RequestError(said.getvalue())


def peak() -> int:
    """Bytes of resident memory at most since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def forget() -> None:
    """Let the peak of resident memory begin anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def run(kind: str, readers: dict[Path, Read], seeds: range) -> int:
    """Feed a kind's mutants to its readers; prints what was seen and returns how many were wrong."""
    honest = {path: path.read_bytes() for path in readers}
    read = refused = wrong = most = 0
    slowest = 0.0
    for seed in seeds:
        rng = random.Random(f"{kind} {seed}")
        path = rng.choice(list(honest))
        path.write_bytes(mutated(honest[path], path.suffix, rng))
        forget()
        before, start = peak(), time.perf_counter()
        fault = ""
        try:
            readers[path](path)
            read += 1
        except OURS:
            refused += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            fault = "".join(traceback.format_exception(error)[-2:])
        took, grown = time.perf_counter() - start, peak() - before - 2 * path.stat().st_size
        slowest, most = max(slowest, took), max(most, grown)
        fault += f" took {took:.1f} s" * (took > SLOW) + f" took {grown >> 20} MiB" * (grown > LARGE)
        if fault:
            wrong += 1
            print(f"{kind} seed {seed}, {path.name}: {fault}", flush=True)
        path.write_bytes(honest[path])
    print(
        f"{kind}: {len(seeds)} mutants, {read} read, {refused} refused, {wrong} wrong; slowest {slowest:.2f} s, "
        f"at most {most >> 20} MiB above twice the file",
        flush=True,
    )
    return wrong


def main() -> int:
    """Run the kinds that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="configs, tokenizer, controlnet, … (default: all)")
    parser.add_argument("--count", type=int, default=1000, help="mutants of each kind (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first mutant (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        known = kinds(Path(folder))
        if strange := set(args.kinds) - set(known):
            parser.error(f"no kind {', '.join(sorted(strange))}; needed some of {', '.join(known)}")
        seeds = range(args.seed, args.seed + args.count)
        return min(1, sum(run(kind, known[kind], seeds) for kind in args.kinds or known))


if __name__ == "__main__":
    sys.exit(main())

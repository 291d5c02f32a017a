"""Measure whether the memory of the process grows over thousands of small pictures of changing prompts and sizes.

`python tools/soak.py [--count 2000] [RESIDENCY ...]` runs each residency (staged, resident, streamed, vram) in a
process of its own and prints one JSON line: anonymous memory in kB at twenty moments, and how much the lowest of the
last five lies above the lowest of the five before them, in bytes a picture (the lowest, because a moment may find a
part more or less in memory). By then every bounded cache is full (the prompt features take 256 pictures). Ends with 1
where that is above 4 kB a picture. Linux only (/proc).

In fp32, unless `--dtype bf16`. In bf16 memory grows for longer. This is inferred, not measured: oneDNN's documented
cache of primitives holds 1,024 of them by default, one for each shape that is multiplied; at some 100 kB each, an
estimate, thousands of pictures of random sizes and lengths would fill it.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

MODES = {
    "staged": {},
    "resident": {"residency": "resident"},
    "streamed": {"residency": "streamed"},
    "vram": {"vram": "64MiB"},
}
WORDS = ["a", "red", "green", "blue", "pink", "circle", "square", "star", "left", "of", "above", "on", "the", "and"]
# Bytes a picture: what 2,000 pictures may leave behind is 8 MB.
MOST = 4096


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def soak(mode: str, count: int, dtype: str) -> dict[str, object]:
    """Draw `count` pictures in one residency and describe the memory of the process."""
    from s3dit import Pipeline

    pipe, chance, start = Pipeline.load(device="cpu", dtype=dtype, **MODES[mode]), random.Random(1), time.perf_counter()  # type: ignore[arg-type]
    sizes: list[int] = []
    for i in range(count):
        prompt = " ".join(chance.choices(WORDS, k=chance.randint(1, 60))) + f" {i}"
        height, width = (16 * chance.randint(1, 8) for _ in range(2))
        pipe(prompt=prompt, height=height, width=width, seed=i, num_inference_steps=1)
        if (i + 1) * 20 // count > i * 20 // count:
            sizes.append(anonymous())
    growth = (min(sizes[-5:]) - min(sizes[-10:-5])) / (count / 4)
    return {
        "residency": mode, "dtype": dtype, "count": count, "seconds": round(time.perf_counter() - start),
        "kB": [size // 1024 for size in sizes], "bytes_a_picture": round(growth),
    }  # fmt: skip


def main() -> int:
    """Run the residencies one after another, each in a new process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modes", nargs="*", default=list(MODES), metavar="RESIDENCY", help=f"of {', '.join(MODES)}")
    parser.add_argument("--count", type=int, default=2000, help="pictures in each (default: 2000)")
    parser.add_argument("--dtype", default="fp32", help="fp32 (default) or bf16")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if strange := set(args.modes) - set(MODES):
        parser.error(f"no residency {', '.join(sorted(strange))}; there are {', '.join(MODES)}")
    if args.here:
        print(json.dumps(found := soak(args.modes[0], args.count, args.dtype)), flush=True)
        return int(found["bytes_a_picture"] > MOST)  # type: ignore[operator]
    command = [sys.executable, __file__, "--here", "--count", str(args.count), "--dtype", args.dtype]
    return max(subprocess.run([*command, mode]).returncode for mode in args.modes)


if __name__ == "__main__":
    sys.exit(main())

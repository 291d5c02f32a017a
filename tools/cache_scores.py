"""Score caches on an embedded model: calls spared, time, error of spared velocities, error and score of pictures.

`python tools/cache_scores.py` draws `--count` fixed prompts, 28 steps with guidance 4, once whole and once with every
cache of `CACHES`, and prints a table; `--json FILE` writes it too, `--calibrate weights/tiny_base/cache.json` measures
that anew first and prints R².

Time is processor time of the whole call, text and decoding included, on one thread; PSNR is of 8-bit pictures against
those of the whole run, the mean over pictures and the share of 30 dB and more; the velocity's error is that of the
guided velocity which a spared call predicted, against the model's own at the same state: the median step and the worst.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_score import judge
from tiny_world import fixed_prompts

from s3dit import Pipeline, Request
from s3dit.cache import Cache
from s3dit.research.cache_calibration import calibrate
from s3dit.sampling.step import split_latents

CACHES = ("first-block", "modulation", "magnitude", "taylor:1", "taylor:2", "taylor:3")
# Pictures whose spared velocities are compared.
COMPARED = 4


def prompts_of(count: int) -> tuple[list[Any], list[str]]:
    """Scenes and prompts, spread over the fixed ones."""
    every = fixed_prompts()
    scenes, prompts = zip(*every[:: len(every) // count][:count], strict=True)
    return list(scenes), list(prompts)


def right(pictures: Sequence[Any], scenes: Sequence[Any]) -> float:
    """Share of pictures in which everything is as the prompt demands."""
    verdicts = [judge(np.asarray(each), scene) for each, scene in zip(pictures, scenes, strict=True)]
    return sum(verdict.everything for verdict in verdicts) / len(verdicts)


def psnr(picture: Any, whole: Any) -> float:
    """Ratio of 255² to the mean squared difference of two pictures, dB; at most 99."""
    difference = np.asarray(picture, np.float64) - np.asarray(whole, np.float64)
    error = float(np.square(difference).mean())
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(255**2 / error))


def drawn(pipe: Pipeline, prompts: Sequence[str], **fields: Any) -> tuple[list[Any], list[Any], float]:
    """Pictures, their records and the processor time of the call, seconds."""
    start = time.process_time()
    result = pipe(list(prompts), seed=list(range(len(prompts))), **fields)
    return result.images, result.metadata, time.process_time() - start


def velocity_errors(pipe: Pipeline, prompts: Sequence[str], scale: float, **fields: Any) -> dict[int, float]:
    """Measure by step ‖predicted - the model's own‖ / ‖own‖ of the guided velocity, over pictures spared there."""
    positive, (negative,) = pipe.encode(list(prompts)), pipe.encode([""])
    reused, errors = [0] * len(prompts), dict[int, float]()
    for step in pipe.stream(list(prompts), seed=list(range(len(prompts))), guidance_scale=scale, **fields):
        spared = [i for i, (now, before) in enumerate(zip(step.reused, reused, strict=True)) if now > before]
        reused = list(step.reused)
        if not spared:
            continue
        states, velocities = split_latents(step.start, step.grids), split_latents(step.velocity, step.grids)
        given = [states[i] for i in spared]
        own = pipe.velocity(given, 1.0 - step.sigma, [positive[i] for i in spared])
        if scale:
            without = pipe.velocity(given, 1.0 - step.sigma, [negative] * len(spared))
            own = [pos + scale * (pos - neg) for pos, neg in zip(own, without, strict=True)]
        true, predicted = torch.stack(own), torch.stack([velocities[i] for i in spared])
        errors[step.i] = ((predicted - true).norm() / true.norm()).item()
    return errors


def row(
    pipe: Pipeline, cache: Cache | None, whole: tuple[list[Any], float] | None, count: int, **fields: Any
) -> dict[str, Any]:
    """One line of the table; whole: pictures and time of the run without a cache."""
    scenes, prompts = prompts_of(count)
    pictures, records, seconds = drawn(pipe, prompts, cache=cache, **fields)
    before, time_before = whole or (pictures, seconds)
    ratios = [psnr(*pair) for pair in zip(pictures, before, strict=True)]
    found: dict[str, Any] = {
        "cache": "none" if cache is None else str(cache),
        "computed": fields["num_inference_steps"] - np.mean([record["engine"].get("reused", 0) for record in records]),
        "seconds": seconds, "ratio": time_before / seconds, "right": right(pictures, scenes),
        "psnr": float(np.mean(ratios)), "above_30": float(np.mean([each >= 30 for each in ratios])),
    }  # fmt: skip
    if cache is not None:
        scale = fields.pop("guidance_scale")
        found["velocity"] = velocity_errors(pipe, prompts[:COMPARED], scale, cache=cache, **fields)
    return found | {"pictures": pictures}


def line(found: dict[str, Any]) -> str:
    """A row of the printed table."""
    errors = sorted(found.get("velocity", {}).values())
    error = f"{errors[len(errors) // 2]:.1%}, at most {errors[-1]:.0%}" if errors else "–"
    return (f"| {found['cache']} | {found['computed']:.1f} | {found['ratio']:.2f} | {error} | {found['psnr']:.1f} | "
            f"{found['above_30']:.0%} | {found['right']:.1%} |")  # fmt: skip


def main() -> None:
    """Score every cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded-base", help="an embedded model (default embedded-base)")
    parser.add_argument("--count", type=int, default=100, help="prompts (default 100)")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--cache", action="append", help=f"instead of {', '.join(CACHES)}")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="measure a calibration first and write it")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="take this one (default: the model's own)")
    parser.add_argument("--json", type=Path, help="a file for the table")
    args = parser.parse_args()
    pipe = Pipeline.load(args.model, device="cpu", dtype=args.dtype)
    fields = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    if args.calibrate is not None:
        # None of those that are scored.
        _, prompts = prompts_of(250)
        measured = calibrate(pipe, Request(prompt=prompts[1::16], seed=1000, **fields))
        args.calibrate.write_text(json.dumps(measured) + "\n")
        print(f"R² {measured['r2']:.3f} over {measured['points']} steps", file=sys.stderr)
    file = args.calibrate or args.calibration
    calibration = json.loads(file.read_text()) if file is not None else {}
    whole = row(pipe, None, None, args.count, **fields)
    pictures, rows = whole.pop("pictures"), [whole]
    print("| cache | computed calls | time ratio | velocity's error | PSNR, dB | ≥ 30 dB | right |")
    print("|---" * 7 + "|")
    print(line(whole), flush=True)
    for text in args.cache or CACHES:
        cache = Cache.parse(text)
        cache = cache.calibrated(calibration) if calibration else cache
        rows.append(row(pipe, cache, (pictures, whole["seconds"]), args.count, **fields))
        rows[-1].pop("pictures")
        print(line(rows[-1]), flush=True)
    if args.json is not None:
        about = {"model": args.model, "dtype": args.dtype, "prompts": args.count, "torch": torch.__version__, **fields}
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

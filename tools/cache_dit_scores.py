"""Score cache-dit beside `cache_scores.py`: the same model, prompts and steps, through diffusers' ZImagePipeline.

`python tools/cache_dit_scores.py --model DIR` prints rows of that table, each against the pipeline's own whole run, and
needs diffusers, transformers and cache-dit, which pip installs (`--no-deps` will do). It is set as its README says for
a first-block cache: one block first, as many warm-up steps as ours, a threshold; and with its Taylor predictor.
Pictures are drawn one by one, since a batch of diffusers' decides for all of them at once.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import cache_dit
import numpy as np
import torch
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig
from cache_scores import line, prompts_of, psnr, right
from diffusers import ZImagePipeline

THRESHOLDS = (0.08, 0.12)


def drawn(pipe: Any, prompts: list[str], settings: dict[str, Any]) -> tuple[list[Any], float]:
    """Pictures and the processor time of the calls, seconds."""
    start = time.process_time()
    pictures = [pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0]
                for seed, prompt in enumerate(prompts)]  # fmt: skip
    return pictures, time.process_time() - start


def main() -> None:
    """Score cache-dit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder in the official layout")
    parser.add_argument("--count", type=int, default=100, help="prompts (default 100)")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, help="a file for the rows")
    args = parser.parse_args()
    pipe = ZImagePipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    scenes, prompts = prompts_of(args.count)
    settings = {"height": 128, "width": 128, "num_inference_steps": args.steps, "guidance_scale": args.guidance}
    whole, before = drawn(pipe, prompts, settings)
    rows: list[dict[str, Any]] = []
    for threshold in (None, *THRESHOLDS):
        for taylor in (False, True) if threshold else (False,):
            pictures, seconds, computed = whole, before, float(args.steps)
            if threshold:
                config = DBCacheConfig(
                    num_inference_steps=args.steps, Fn_compute_blocks=1, Bn_compute_blocks=0,
                    max_warmup_steps=math.ceil(args.steps / 5), residual_diff_threshold=threshold,
                )  # fmt: skip
                calibrator = TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
                cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
                pictures, seconds = drawn(pipe, prompts, settings)
                # Of the last picture.
                computed -= len(cache_dit.summary(pipe, logging=False)[0].cached_steps)
                cache_dit.disable_cache(pipe)
            ratios = [psnr(*pair) for pair in zip(pictures, whole, strict=True)]
            name = f"cache-dit F1B0:{threshold}" + ", Taylor" * taylor if threshold else "diffusers"
            rows.append({
                "cache": name, "computed": computed, "seconds": seconds, "ratio": before / seconds,
                "right": right(pictures, scenes), "psnr": float(np.mean(ratios)),
                "above_30": float(np.mean([each >= 30 for each in ratios])),
            })  # fmt: skip
            print(line(rows[-1]), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"prompts": args.count, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

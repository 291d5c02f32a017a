"""What the research instruments cost: nothing where they are not used, and attention once more for attention maps.

Unused: pictures of the embedded model by two processes in turn, one that never imports `s3dit.research`, one that has
observed a picture before and left the `with`. Their median times are compared.

Attention maps: of 16 words at 1024 × 1024, one block of the official width, 30 heads of 128, of
random queries and keys; 30 layers take 30 times as long, as their attention does.

Seconds are the processor's, of all threads, so that others on the machine count little.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from bench_machine import ROOT

WORDS = "a red star above one blue ring left of some green circle below two black crosses on plain white paper"
HEADS, HEAD = 30, 128
# A picture for each line that comes in, and its seconds.
PICTURES = """
import sys, time
from s3dit import Pipeline
pipe = Pipeline.load(device="cpu")
def draw():
    start = time.process_time()
    pipe("a red star above a blue ring", seed=7, num_inference_steps=8)
    return time.process_time() - start
if sys.argv[1] == "after":
    from s3dit.research.observe import observe
    from s3dit.research.attention import attention_maps
    with observe(pipe, "**", reduce="rms"), attention_maps(pipe, "star"):
        draw()
else:
    draw()
    assert not any(name.startswith("s3dit.research") for name in sys.modules)
for line in sys.stdin:
    print(draw(), flush=True)
"""


def in_turn(runs: dict[str, Callable[[], float]], repeat: int) -> dict[str, dict[str, float]]:
    """Median and least of the seconds that each function returns, called in turn, the order changing each time."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeat):
        for name in sorted(runs, reverse=bool(turn % 2)):
            took[name].append(runs[name]())
    return {
        name: {"median_s": round(statistics.median(values), 4), "min_s": round(min(values), 4)}
        for name, values in took.items()
    }


def unused(repeat: int) -> dict[str, Any]:
    """Pictures without the instruments, and after them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", PICTURES, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, cwd=ROOT,
        )
        for name in ("without", "after")
    }  # fmt: skip

    def draw(process: "subprocess.Popen[str]") -> float:
        """Let a process draw -> its seconds."""
        assert process.stdin is not None and process.stdout is not None
        print("draw", file=process.stdin, flush=True)
        return float(process.stdout.readline())

    try:
        times = in_turn({name: partial(draw, each) for name, each in processes.items()}, repeat)
    finally:
        for process in processes.values():
            process.communicate()
    ratio = times["after"]["median_s"] / times["without"]["median_s"]
    return {"name": "picture of the embedded model, research instruments unused", **times, "ratio": round(ratio, 3)}


def maps(repeat: int) -> dict[str, Any]:
    """Attention of one block, and attention maps of it."""
    import torch

    from s3dit import Pipeline
    from s3dit.kernels.attention import Spans, attention
    from s3dit.research.attention import AttentionMaps, looks
    from s3dit.research.tokens import tokens
    from s3dit.runtime.devices import place

    pipe = Pipeline.load(device="cpu")
    (item,) = tokens(pipe, pipe.plan(WORDS, height=1024, width=1024, seed=1))
    words = list(dict.fromkeys(item.words))[:16]
    dtype, spans = place("cpu").compute, Spans.of((len(item),))
    q, k, v = (torch.randn(len(item), HEADS, HEAD).to(dtype) for _ in range(3))

    def look() -> None:
        """Gather as `attention_maps` does."""
        AttentionMaps(words, ()).add(item, 1, "layers.0", looks(q, k, item, words))

    def timed(run: Callable[[], object]) -> Callable[[], float]:
        """Call it once to warm up -> a function that calls it and returns its seconds."""

        def once() -> float:
            """One call."""
            start = time.process_time()
            run()
            return time.process_time() - start

        once()
        return once

    with torch.inference_mode():
        times = in_turn({"attention": timed(lambda: attention(q, k, v, spans, spans)), "maps": timed(look)}, repeat)
    return {
        "name": f"attention maps of {len(words)} words, 1024² and {len(item)} tokens, one block, {dtype}", **times,
        "ratio": round(times["maps"]["median_s"] / times["attention"]["median_s"], 3),
    }  # fmt: skip


def bench_research(args: argparse.Namespace) -> dict[str, Any]:
    """Both costs."""
    return {"name": "research instruments", "unused": unused(10 * args.repeat), "maps": maps(args.repeat)}

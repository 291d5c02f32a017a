"""Requests a second in the engine of `s3dit serve`, against the same requests one by one, on the embedded model.

    python tools/bench_engine.py                     64 requests of 64², 8 steps; passes of 1 to 32 of them
    python tools/bench_engine.py --sizes 64,96,128   of mixed sizes
    python tools/bench_engine.py --soak 2000         what stays in memory of so many, a tenth of them cancelled

Every line is JSON: seconds of the wall and of the processor a request, their ratios to one by one in the same process
(measured before and after, the better one counts), latencies, and how many requests a pass served. Where the machine
is shared, seconds of the processor are the ones to believe. Before a figure is given, every picture is compared with
the one drawn alone.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from bench_machine import machine

from s3dit import Pipeline, Request
from s3dit.result import Result
from s3dit.serve.engine import Engine
from s3dit.serve.job import Cancelled
from s3dit.serve.job_pipeline import JobPipeline

# Of the embedded model in fp32, with sums in another order.
BOUND = 1e-5


def requests(count: int, sizes: Sequence[int], steps: int) -> list[Request]:
    """Requests of several prompts and, one after another, of all sizes."""
    prompts = ["a red star", "a blue ring above a green circle on white", "a pink heart"]
    return [
        Request(
            prompt=prompts[i % len(prompts)], seed=i, width=sizes[i % len(sizes)], height=sizes[(i // 2) % len(sizes)],
            num_inference_steps=steps, output_type="tensor",
        )
        for i in range(count)
    ]  # fmt: skip


def difference(result: Result, alone: Result) -> float:
    """The relative difference of two results, the largest of their pictures'."""
    pairs = zip(result.images, alone.images, strict=True)
    return max(((got - expected).norm() / expected.norm()).item() for got, expected in pairs)


def one_by_one(pipe: Pipeline, wanted: Sequence[Request]) -> tuple[list[Result], float, float]:
    """Draw requests one after another -> results, seconds, seconds of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    results = [pipe(request) for request in wanted]
    return results, time.perf_counter() - wall, time.process_time() - cpu


def together(pipe: Pipeline, wanted: Sequence[Request], tokens: int | None) -> tuple[list[Result], dict[str, Any]]:
    """Give requests to an engine at once -> results, and what is measured of it."""
    engine = Engine(pipe, queue_limit=len(wanted), max_batch_tokens=tokens)
    wall, cpu = time.perf_counter(), time.process_time()
    jobs = [engine.submit(request) for request in wanted]
    results = [job.result() for job in jobs]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    engine.stop()
    stats = engine.stats()
    latencies = sorted(stats.latencies)
    served = sum(size * count for size, count in stats.batch_sizes.items())
    return results, {
        "wall_s": wall / len(wanted), "cpu_s": cpu / len(wanted), "passes": stats.passes,
        "requests_a_pass": round(served / stats.passes, 2), "p50_s": round(statistics.median(latencies), 3),
        "p99_s": round(latencies[int(0.99 * (len(latencies) - 1))], 3),
    }  # fmt: skip


def throughput(pipe: Pipeline, wanted: Sequence[Request], batches: Sequence[int]) -> None:
    """Print a line for each size of passes, in requests."""
    counted = JobPipeline(pipe, None, resident=True)
    each = max(counted.tokens(counted.plan(request)) for request in wanted)
    one_by_one(pipe, wanted[:4])
    alone, *before = one_by_one(pipe, wanted)
    rows = []
    for batch in batches:
        results, row = together(pipe, wanted, batch * each)
        worst = max(map(difference, results, alone))
        if worst > BOUND:
            raise SystemExit(f"a picture in company differs by {worst:.1e} from the one alone; no figures")
        rows.append({"most_a_pass": batch, **row, "difference": worst})
    _, *after = one_by_one(pipe, wanted)
    wall, cpu = (min(pair) / len(wanted) for pair in zip(before, after, strict=True))
    settings = {"requests": len(wanted), "steps": wanted[0].num_inference_steps, "threads": torch.get_num_threads()}
    print(json.dumps({"what": "one by one", **settings, "wall_s": round(wall, 4), "cpu_s": round(cpu, 4), **machine()}))
    for row in rows:
        ratios = {"ratio_wall": round(wall / row["wall_s"], 2), "ratio_cpu": round(cpu / row["cpu_s"], 2)}
        numbers = {name: round(row[name], 4) for name in ("wall_s", "cpu_s")}
        print(json.dumps({"what": "engine", **row, **numbers, **ratios}), flush=True)


def soak(pipe: Pipeline, wanted: Sequence[Request], count: int) -> None:
    """Draw `count` requests, some of them cancelled, and print the memory after each tenth."""
    engine, draw = Engine(pipe), random.Random(0)
    ends = {"done": 0, "cancelled": 0}
    for start in range(0, count, 20):
        jobs = [engine.submit(draw.choice(wanted), partial_images=draw.randrange(2)) for _ in range(20)]
        for job in draw.sample(jobs, 2):
            job.cancel()
        for job in jobs:
            try:
                job.result()
                ends["done"] += 1
            except Cancelled:
                ends["cancelled"] += 1
        if start % max(20, count // 10 // 20 * 20) == 0:
            print(json.dumps({"what": "soak", **ends, "memory_mb": engine.stats().memory >> 20}), flush=True)
    engine.stop()


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--sizes", default="64", help="sides in pixels, with commas between (default: 64)")
    parser.add_argument("--steps", type=int, default=8, help="steps of each (default: 8)")
    parser.add_argument("--batches", default="1,2,4,8,16,32", help="most requests a pass (default: 1,2,4,8,16,32)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--soak", type=int, help="draw so many instead, and look at memory")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    pipe = Pipeline.load("embedded", device="cpu", dtype="fp32", residency="resident")
    wanted = requests(args.requests, [*map(int, args.sizes.split(","))], args.steps)
    if args.soak:
        soak(pipe, wanted, args.soak)
    else:
        throughput(pipe, wanted, [*map(int, args.batches.split(","))])


if __name__ == "__main__":
    main()

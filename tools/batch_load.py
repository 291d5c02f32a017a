"""Draw thousands of rows on a real Ray cluster of this machine, and hold every picture to the one drawn alone.

`python tools/batch_load.py [--count 2000] [--bad 20]` writes rows of the embedded model (64 × 64 and 80 × 64 pixels, 2
steps), some of which are wrong, and runs `s3dit batch --ray` on a cluster of one node of one CPU. When a quarter is
done a node joins; when half is done a worker is killed. Then one pipeline draws every picture again, alone, and the
files are compared. Prints one JSON line: rows, pictures, failed rows, results a row, unequal pictures, seconds, workers
with their rows, pictures a second of both ways, CPU and load. Ends with 1 where anything is not as it should be.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench_machine import machine

WORDS = ["red", "green", "blue", "pink", "circle", "square", "star", "ring", "left of", "above", "a", "the"]


def write_rows(path: Path, count: int, bad: int) -> None:
    """Write rows with prompts by chance; so many of them have no prompt, an impossible size, or are no JSON."""
    chance = random.Random(1)
    lines = []
    for number in range(count):
        row: dict[str, Any] = {
            "id": f"row/{number}", "prompt": " ".join(chance.choices(WORDS, k=6)), "width": chance.choice([64, 80]),
            "height": 64, "num_inference_steps": 2,
        }  # fmt: skip
        lines.append(json.dumps(row))
    for i, number in enumerate(chance.sample(range(count), bad)):
        row = json.loads(lines[number])
        lines[number] = [json.dumps(row | {"prompt": None}), json.dumps(row | {"width": 65}), "{" + lines[number]][
            i % 3
        ]
    path.write_text("\n".join(lines) + "\n")


def results_of(output: Path) -> list[dict[str, Any]]:
    """The results that are written so far."""
    path = output / "results.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def disturb(cluster: Any, output: Path, count: int, events: list[str]) -> None:
    """Add a node at a quarter of the rows, and kill the worker of the last row at half of them."""
    while len(results_of(output)) < count // 4:
        time.sleep(0.5)
    cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
    events.append(f"a node joined at {len(results_of(output))}")
    while len(results := results_of(output)) < count // 2:
        time.sleep(0.5)
    name = next(result["worker"] for result in reversed(results) if "worker" in result)
    os.kill(int(name.rpartition(":")[2]), signal.SIGKILL)
    events.append(f"{name} killed at {len(results)}")


def alone(rows: Path, results: list[dict[str, Any]]) -> tuple[int, float]:
    """How many pictures differ from those that one pipeline draws one by one, and its pictures a second."""
    import torch

    from s3dit import Pipeline
    from s3dit.batch.rows import read_rows
    from s3dit.inputs.save_image import encoded

    torch.set_num_threads(1)
    pipe, unequal = Pipeline.load(residency="resident"), 0
    by_id = {row.id: row for row in read_rows(rows, 0, {}, {})}
    pipe("a red star", num_inference_steps=1)
    start = time.perf_counter()
    drawn = [result for result in results if "files" in result]
    for result in drawn:
        picture = pipe(by_id[result["id"]].request())
        data = encoded(picture.images[0], "PNG", picture.metadata[0])
        unequal += list(result["files"].values()) != [hashlib.sha256(data).hexdigest()]
    return unequal, len(drawn) / (time.perf_counter() - start)


def main() -> int:
    """Run it all; returns 1 where a row is lost, doubled or drawn otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--bad", type=int, default=20)
    args = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    from ray.cluster_utils import Cluster

    from s3dit.cli.main import main as s3dit

    folder = Path(tempfile.mkdtemp(prefix="s3dit-batch-"))
    rows, output, events = folder / "rows.jsonl", folder / "pictures", list[str]()
    write_rows(rows, args.count, args.bad)
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        threading.Thread(target=disturb, args=(cluster, output, args.count, events), daemon=True).start()
        start = time.perf_counter()
        code = s3dit(["batch", str(rows), "-o", str(output), "--ray", cluster.address, "--workers", "2"])
        seconds = time.perf_counter() - start
    finally:
        cluster.shutdown()
    results = results_of(output)
    counts = Counter(result["id"] for result in results)
    failed = [result for result in results if "error" in result]
    unequal, rate = alone(rows, results)
    right = len(counts) == args.count and set(counts.values()) == {1} and len(failed) == args.bad and not unequal
    print(json.dumps({
        "rows": args.count, "exit": code, "pictures": len(results) - len(failed), "failed": len(failed),
        "results_a_row": sorted(set(counts.values())), "unequal": unequal, "seconds": round(seconds, 1),
        "pictures_a_second": round((len(results) - len(failed)) / seconds, 2), "alone_a_second": round(rate, 2),
        "workers": Counter(result["worker"] for result in results if "worker" in result), "events": events,
        **machine(), "load": os.getloadavg()[0], "right": right,
    }))  # fmt: skip
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

"""Draw thousands of rows on a real Ray cluster of this machine, and hold every picture to the one drawn alone.

`python tools/batch_load.py [--count 2000] [--bad 20] [--compare N]` writes rows of the embedded model (64 × 64 and 80 ×
64 pixels, 2 steps), some of which are wrong, and runs `s3dit batch --ray` on a cluster of one node of one CPU. When a
quarter of the results has come, a node of one CPU joins; at half, the worker of the latest result is killed. Then one
pipeline draws every picture, or N of them, again, alone, and the files are compared. Prints one JSON line: rows,
pictures, failed rows, unequal pictures, seconds, each worker with its rows and the first and last of its results,
pictures a second of both ways, CPU and load, and what is not as it should be. Ends with 1 where there is any such
thing, also where a worker was not killed and replaced, or drew nothing on the node that joined.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

from bench_machine import ROOT, machine

WORDS = ["red", "green", "blue", "pink", "circle", "square", "star", "ring", "left of", "above", "a", "the"]
NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}


def write_rows(path: Path, count: int, bad: int) -> dict[str, str]:
    """Write rows with prompts by chance, and return what is to be said of the wrong ones, by their ids."""
    chance = random.Random(1)
    rows: list[Any] = [
        {"id": f"row/{number}", "prompt": " ".join(chance.choices(WORDS, k=6)), "width": chance.choice([64, 80]),
         "height": 64, "num_inference_steps": 2}
        for number in range(count)
    ]  # fmt: skip
    reasons = {}
    for i, number in enumerate(chance.sample(range(count), bad)):
        # A list has no id: it goes by its line's number.
        rows[number], name, reason = [
            (rows[number] | {"prompt": None}, f"row/{number}", "it has no prompt"),
            (rows[number] | {"width": 65}, f"row/{number}", "width is 65"),
            ([rows[number]], str(number + 1), "needed JSON lines"),
        ][i % 3]
        reasons[name] = reason
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return reasons


def disturbed(
    process: "subprocess.Popen[str]", cluster: Any, count: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The results as the batch prints them, and at which of them a node joined and which worker was killed."""
    results: list[dict[str, Any]] = []
    events: dict[str, Any] = {}
    assert process.stdout is not None
    for text in process.stdout:
        results.append(json.loads(text))
        if "node joined at" not in events and len(results) >= count // 4:
            cluster.add_node(**NODE)
            events["node joined at"] = len(results)
        if "worker killed at" not in events and len(results) >= count // 2 and "files" in results[-1]:
            events["killed"] = results[-1]["worker"]
            os.kill(int(events["killed"].rpartition(":")[2]), signal.SIGKILL)
            events["worker killed at"] = len(results)
    process.wait()
    return results, events


def faults_of_events(events: dict[str, Any], spans: dict[str, tuple[int, int]]) -> list[str]:
    """What did not happen to the cluster. spans: the first and last result of each worker."""
    faults = [f"no {event}" for event in ("node joined", "worker killed") if f"{event} at" not in events]
    # A node of one CPU has room for one worker at a time.
    if not any(one[0] < other[0] < one[1] for one, other in permutations(spans.values(), 2)):
        faults.append("no two workers drew at once: nothing was drawn on the node that joined")
    if len(spans) < 3:
        faults.append(
            f"{len(spans)} workers drew; needed the first, that of the node that joined, and one that replaces"
        )
    return faults


def faults_of_results(output: Path, printed: list[dict[str, Any]], count: int, reasons: dict[str, str]) -> list[str]:
    """What is wrong with the results of rows, those printed and those in the file."""
    written = [json.loads(line) for line in (output / "results.jsonl").read_bytes().splitlines()]
    faults = [] if written == printed else ["results printed and written differ"]
    counts = Counter(result["id"] for result in written)
    if len(counts) != count or {*counts.values()} != {1}:
        faults.append(f"{count} rows have {len(written)} results of {len(counts)} ids")
    errors = {result["id"]: result["error"] for result in written if "error" in result}
    for name in sorted({*errors, *reasons}):
        if name not in errors or name not in reasons or reasons[name] not in errors[name]:
            faults.append(f"{name} has the error {errors.get(name)!r}; needed {reasons.get(name)!r}")
    return faults


def alone(rows: Path, output: Path, drawn: list[dict[str, Any]]) -> tuple[int, float]:
    """How many files differ from those that one pipeline draws one by one, and its pictures a second."""
    import torch

    from s3dit import Pipeline
    from s3dit.batch.rows import read_rows
    from s3dit.inputs.save_image import encoded

    torch.set_num_threads(1)
    pipe, unequal = Pipeline.load(residency="resident"), 0
    by_id = {row.id: row for row in read_rows(rows, 0, {}, {})}
    pipe("a red star", num_inference_steps=1)
    start = time.perf_counter()
    for result in drawn:
        picture = pipe(by_id[result["id"]].request())
        data = encoded(picture.images[0], "PNG", picture.metadata[0])
        unequal += [(output / name).read_bytes() for name in result["files"]] != [data]
    return unequal, len(drawn) / (time.perf_counter() - start)


def main() -> int:
    """Run it all; returns 1 where anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--bad", type=int, default=20)
    parser.add_argument("--compare", type=int, help="so many pictures, taken by chance (default: all)")
    args = parser.parse_args()
    # Ray's workers have a niceness of 15 otherwise, and would wait for whatever else runs here.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="s3dit-batch-") as folder:
        rows, output = Path(folder, "rows.jsonl"), Path(folder, "pictures")
        reasons = write_rows(rows, args.count, args.bad)
        cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        try:
            start = time.perf_counter()
            command = ["batch", rows, "-o", output, "--ray", cluster.address, "--workers", "2", "--json"]
            with subprocess.Popen([sys.executable, "-m", "s3dit", *command], stdout=subprocess.PIPE, text=True,
                                  env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:  # fmt: skip
                results, events = disturbed(process, cluster, args.count)
            seconds = time.perf_counter() - start
        finally:
            cluster.shutdown()
        load = os.getloadavg()[0]
        order: dict[str, list[int]] = {}
        for number, result in enumerate(results, 1):
            order.setdefault(result.get("worker", ""), []).append(number)
        spans = {name: (numbers[0], numbers[-1]) for name, numbers in order.items() if name}
        drawn = [result for result in results if "files" in result]
        compared = random.Random(2).sample(drawn, min(len(drawn), args.compare or len(drawn)))
        unequal, rate = alone(rows, output, compared)
        faults = faults_of_events(events, spans) + faults_of_results(output, results, args.count, reasons)
    pictures = len(drawn)
    if process.returncode != (1 if reasons else 0):
        faults.append(f"s3dit batch ended with {process.returncode}")
    if unequal:
        faults.append(f"{unequal} pictures are not those drawn alone")
    print(json.dumps({
        "rows": args.count, "exit": process.returncode, "pictures": pictures, "failed": len(results) - pictures,
        "compared": len(compared), "unequal": unequal, "seconds": round(seconds, 1),
        "pictures_a_second": round(pictures / seconds, 2),
        "alone_a_second": round(rate, 2), **events,
        "workers": {name: [len(order[name]), *span] for name, span in spans.items()}, **machine(),
        "load": round(load, 1), "faults": faults, "right": not faults,
    }))  # fmt: skip
    for fault in faults:
        print(f"batch_load: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Two ranks draw, and one comes to grief amid the second model call or after the first: python failing.py FOLDER.

All are tried at once, each by a pair of processes, whose standard error and exit codes are left in FOLDER.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from s3dit import Pipeline
from s3dit.errors import BackendError
from s3dit.parallel import watch

# The rank that fails, by the way in which it does.
KINDS = {"die": 1, "first": 0, "hang": 1, "idle": 1, "freeze": 1, "freeze first": 0, "memory": 1}


def fail(kind):
    if kind in ("die", "first"):
        os._exit(7)
    if kind == "hang":
        time.sleep(600)
    if kind.startswith("freeze"):
        os.kill(os.getpid(), signal.SIGSTOP)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def main(rank, folder, kind):
    """Draw as one of two ranks; returns the exit code."""
    # Shorter than a user's, for a quick test, and long enough for a machine under load.
    watch.SILENT, watch.HANGING, watch.IDLE, watch.GRACE, watch.BEAT = 8.0, 8.0, 8.0, 2.0, 0.5
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{kind}", rank=rank, world_size=2)
    pipe = Pipeline.load(device="cpu", dtype="fp32", parallel=2)
    calls = []

    def hook(*args):
        calls.append(args)
        if len(calls) == 2 and rank == KINDS[kind] and kind != "idle":
            fail(kind)

    def step(_):
        if kind == "idle" and rank == KINDS[kind]:
            time.sleep(600)

    pipe.transformer.layers[1].register_forward_hook(hook)
    try:
        pipe("a red star", height=64, width=64, num_inference_steps=4, seed=1, on_step=step).save(
            folder / f"{kind}.png"
        )
    except BackendError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    return 0


def begun(rank, folder, kind):
    """Begin to draw in a process of its own -> its number."""
    if child := os.fork():
        return child
    os.dup2(os.open(folder / f"{kind}-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    try:
        torch.set_num_threads(1)
        os._exit(main(rank, folder, kind))
    finally:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    folder, codes = Path(sys.argv[1]), {}
    children = {begun(rank, folder, kind): (kind, rank) for kind in KINDS for rank in range(2)}
    while children:
        child, status = os.wait()
        kind, rank = children.pop(child)
        codes[f"{kind}-{rank}"] = os.waitstatus_to_exitcode(status)
        if kind.startswith("freeze") and rank != KINDS[kind]:
            os.kill(next(other for other, ways in children.items() if ways[0] == kind), signal.SIGKILL)
    (folder / "codes.json").write_text(json.dumps(codes))

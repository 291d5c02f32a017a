"""A rank that comes to grief while two draw: python failing.py RANK FOLDER KIND OUTPUT.

KIND says what rank 1 does amid the second model call: die, hang, freeze, memory; or what rank 0 does: first.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from s3dit import Pipeline
from s3dit.errors import BackendError
from s3dit.parallel import watch


def main(rank, folder, kind):
    torch.set_num_threads(1)
    # Shorter than a user's, for a quick test; under load a second is not much.
    watch.SILENT, watch.HANGING, watch.GRACE, watch.BEAT = 6.0, 5.0, 3.0, 0.5
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    pipe = Pipeline.load(device="cpu", dtype="fp32", parallel=2)
    calls = []

    def hook(*args):
        calls.append(args)
        if len(calls) < 2 or rank == (kind != "first"):
            return
        if kind in ("die", "first"):
            os._exit(7)
        if kind == "hang":
            time.sleep(600)
        if kind == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    pipe.transformer.layers[1].register_forward_hook(hook)
    try:
        pipe("a red star", height=64, width=64, num_inference_steps=4, seed=1).save(folder / f"picture{rank}.png")
    except BackendError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

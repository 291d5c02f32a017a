"""Joins the processes that torchrun started, each with a device of its own, into the ranks of a pipeline."""

import atexit
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from s3dit.errors import BackendError, RequestError
from s3dit.parallel.alone import Alone
from s3dit.parallel.placement import Form
from s3dit.parallel.ranks import Ranks
from s3dit.parallel.watch import OUTSIDE, Watch
from s3dit.runtime.devices import Placement

DIST: Any = torch.distributed


class Joined(Ranks):
    """Ranks that share the work of models."""

    def prepare(self, model: nn.Module) -> None:
        """Let a model that was just made compute its share only."""
        # Imported here: most pipelines never join.
        from s3dit.parallel import passes, strips

        passes.prepare(model)
        strips.prepare(model, self)

    def shared(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return what calls a transformer, so that this rank computes its share and gets the whole answer."""
        from s3dit.parallel import passes

        return passes.SharedPasses(run, self)


def join(parallel: int | str | None, placement: Placement, compiled: bool) -> tuple[Alone, Placement]:
    """Join the processes that torchrun started, or those of the caller's own process group.

    parallel: as `Form.of` reads it, None or 1 for this process alone · placement: a CUDA device without a number
    becomes that of this process (LOCAL_RANK) · compiled: whether blocks are to be, which is refused -> the ranks, the
    placement. Raises RequestError, BackendError.
    """
    form = Form(1, 1) if parallel is None else Form.of(parallel)
    if form.size == 1:
        return Alone(), placement
    if compiled:
        raise RequestError("both parallel and compile are given; a compiled block exchanges nothing; leave one out")
    device = placement.device
    if not DIST.is_available() or device.type not in ("cpu", "cuda"):
        raise BackendError(
            f"parallel {form} needs torch.distributed on a CPU or on CUDA devices, found {device}; leave it out"
        )
    _begin(form, device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    ranks = _meet(form, device)
    if device.type == "cuda":
        with ranks.together():
            _take(device)
    return ranks, replace(placement, device=device)


def _begin(form: Form, device: torch.device) -> None:
    """Make the process group, unless the caller has one; raises BackendError where it is not of the size asked for."""
    own = not DIST.is_initialized()
    if own and {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        count = os.environ["WORLD_SIZE"]
    else:
        count = "1" if own else str(DIST.get_world_size())
    if count != str(form.size):
        raise BackendError(
            f"parallel is {form}, processes: {count}; needed {form.size}; start them with torchrun --nproc-per-node "
            f"{form.size} -m s3dit generate … --parallel {form}"
        )
    if own:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        try:
            DIST.init_process_group(backend, timeout=timedelta(seconds=OUTSIDE))
        except (RuntimeError, ValueError) as error:
            raise BackendError(
                f"the {form.size} processes cannot meet ({str(error).splitlines()[0]:.200}); needed all of them at "
                "MASTER_ADDR and MASTER_PORT; start them with torchrun"
            ) from None


def _take(device: torch.device) -> None:
    """Make a CUDA device this process's own."""
    if device.index >= torch.cuda.device_count():
        raise BackendError(
            f"its device {device} does not exist, its machine has {torch.cuda.device_count()} CUDA devices; needed one "
            "for each process; start fewer"
        )
    torch.cuda.set_device(device)


def _meet(form: Form, device: torch.device) -> Joined:
    """Let every rank connect to a store of rank 0's, and begin to watch."""
    rank, host, wait = DIST.get_rank(), os.environ.get("MASTER_ADDR", "localhost"), timedelta(seconds=OUTSIDE)
    store = DIST.TCPStore(host, 0, None, True, wait, wait_for_workers=False) if rank == 0 else None
    over = "cpu" if "gloo" in DIST.get_backend_config() else device
    port = torch.tensor([0 if store is None else store.port], dtype=torch.int64, device=over)
    DIST.broadcast(port, 0)
    ours, watched = (DIST.TCPStore(host, int(port), None, False, wait) for _ in range(2))
    ranks = Joined(form, device, Watch(watched, rank, form.size, device.type == "cpu"), (ours, store))
    atexit.register(ranks.close)
    return ranks

"""A connection to a Ray cluster, and what a process that draws takes of it.

Ray is asked to send no statistics of use. A cluster of this machine alone (`local`) lives as long as the connection,
and has no dashboard; on others s3dit must be installed on every machine.
"""

import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from s3dit.errors import BackendError, RequestError

ABSENT = "--ray needs the package ray; pip install 's3dit[ray]', or leave --ray out"
# Seconds in which a cluster's address must answer.
PATIENCE = 10.0


def check_address(address: str, advice: str = "") -> None:
    """Raise RequestError for what is no address of a cluster; advice: what else may help."""
    if address not in ("local", "auto") and not re.fullmatch(r"(\[[\da-fA-F:]+\]|[^\s:/@]+):\d{1,5}", address):
        raise RequestError(f"--ray is {address!r}; needed local, auto or HOST:PORT of a cluster{advice}")


def prepare() -> None:
    """Set what Ray reads of the environment, some of it when it is imported."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Lines of several processes that differ in numbers alone are not to be merged.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")


@contextmanager
def connected(address: str, show: bool = False) -> Iterator[Any]:
    """The module ray, connected to the cluster at an address: local, auto or HOST:PORT; signals stay the caller's.

    show: print here what processes of the cluster print. Raises BackendError.
    """
    _check_answers(address)
    prepare()
    try:
        import ray
    except ImportError:
        raise BackendError(ABSENT) from None
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address, include_dashboard=False if address == "local" else None, log_to_driver=show,
                 logging_level=logging.ERROR)  # fmt: skip
    except BaseException as error:
        # Where Ray's processes do not start in time, it raises an Exception of no kind of its own.
        if not isinstance(error, OSError | ValueError | RuntimeError) and type(error) is not Exception:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BackendError(f"no Ray cluster at {address} ({reason}); needed local, auto or HOST:PORT of one") from None
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise BackendError(f"the Ray cluster failed ({error}); give the same command again") from None
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise BackendError for an address that nothing answers at: Ray itself tries for many minutes."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise BackendError(
            f"--ray is {address}, where no cluster answers ({error}); needed local, auto or HOST:PORT, on a machine of "
            "the cluster"
        ) from None


def needs(device: str | None, threads: int, resources: Mapping[str, float]) -> dict[str, float]:
    """CPUs and GPUs of a process that draws; raises BackendError where the cluster has not so many.

    device: of the options; None: a GPU where the cluster has any · threads: on a CPU · resources: of the cluster, as
    `ray.cluster_resources` has them.
    """
    gpu = (device or "").startswith("cuda") or (device is None and resources.get("GPU", 0) > 0)
    needed: dict[str, float] = {"CPU": threads, "GPU": int(gpu)}
    for name, count in needed.items():
        if resources.get(name, 0) < count:
            raise BackendError(
                f"the cluster has {resources.get(name, 0):g} {name}s; needed {count:g} for a worker; "
                "choose fewer --worker-threads or another --device"
            )
    return needed


def room(needed: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many processes with these needs the resources hold."""
    return min(int(resources.get(name, 0) // count) for name, count in needed.items() if count)

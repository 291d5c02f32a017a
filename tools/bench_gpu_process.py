"""Processes and the machine of the GPU benchmark: what figures depend on, and programs run with a time limit.

Nothing here imports torch, so that the program which runs the stages holds no memory on the device.
"""

import contextlib
import importlib.metadata
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_machine import ROOT

# Environment variables that may name the commit, where git is missing or the tree is a copy.
COMMIT_VARIABLES = ("S3DIT_COMMIT", "COMMIT", "GIT_COMMIT")


def mend_links() -> None:
    """Make the links s3dit/kernels and s3dit/weights where a copy of the tree has lost them."""
    for name in ("kernels", "weights"):
        link = ROOT / "s3dit" / name
        if (link / "__init__.py").exists():
            continue
        if link.is_dir() and not link.is_symlink():
            link.rmdir()
        else:
            link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / name, target_is_directory=True)


def program_output(*command: str) -> str:
    """Return what a program prints, without spaces around it; empty where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def package_version(package: str) -> str:
    """Return the version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def place(dry: bool) -> dict[str, str]:
    """Return what figures depend on: gpu and driver ("none" where there is none), torch, triton, commit.

    torch is asked for the GPU's name only where nvidia-smi is missing, in another process, and never in a dry run.
    """
    query = program_output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition("\n")[0]
    gpu, _, driver = query.partition(", ")
    if not gpu and not dry:
        gpu = program_output(sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())")
    named = next((os.environ[name] for name in COMMIT_VARIABLES if os.environ.get(name)), "")
    commit = named or program_output("git", "rev-parse", "--short", "HEAD") or "unknown"
    versions = {name: package_version(name) for name in ("torch", "triton")}
    return {"gpu": gpu or "none", "driver": driver or "none", **versions, "commit": commit}


def run_process(command: Sequence[str], seconds: float, log: Path) -> str:
    """Run a program with a time limit, its output appended to `log`, and return how it ended; "ended" is well.

    It and all that it has started are killed when the time is over.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code is None:
        return f"killed after {seconds:.0f} s"
    return "ended" if code == 0 else f"exit code {code}"

"""Shared by the benchmarks: a description of the machine, a measured process, and a full-size random model."""

import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s3dit.kernels.scheme import Spec

ROOT = Path(__file__).resolve().parents[1]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    from s3dit.runtime.devices import place

    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "bf16_native": place("cpu").dtype == torch.bfloat16,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def write_checkpoint(folder: Path, scheme: str | None = None) -> None:
    """A full-size model in the official layout: random bf16 values (one block of them, over and over), real names.

    scheme: a number format of transformer and text encoder, as `s3dit quantize` would write it, but with random codes.
    """
    import torch
    from safetensors.torch import save_file

    from s3dit.kernels.schemes import SCHEMES
    from s3dit.model.config import TextEncoderConfig, TransformerConfig, VAEConfig
    from s3dit.model.text_encoder import TextEncoder
    from s3dit.model.transformer import Transformer
    from s3dit.model.vae import Autoencoder
    from s3dit.runtime.embedded import EMBEDDED
    from s3dit.weights.quantize import quantizable_layers

    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.safetensors", "s3dit.json", "score.json"))
    full: dict[str, tuple[dict[str, Any], Any, Any]] = {
        "transformer": (
            {
                "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30,
                "cap_feat_dim": 2560, "axes_dims": [32, 48, 48],
            },
            TransformerConfig, Transformer,
        ),
        "text_encoder": (
            {
                "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_window_layers": 36,
            },
            TextEncoderConfig, TextEncoder,
        ),
        "vae": (
            {
                "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
                "scaling_factor": 0.3611, "shift_factor": 0.1159,
            },
            VAEConfig, Autoencoder,
        ),
    }  # fmt: skip
    values = torch.randn(1 << 24)
    for part, (changes, config, module) in full.items():
        path = folder / part / "config.json"
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(data))
        with torch.device("meta"):
            shapes = {n: p.shape for n, p in module(config.from_json(data, path)).state_dict().items()}
        layers = (name.removesuffix(".weight") for name in shapes)
        quantized = quantizable_layers(part, layers, SCHEMES[scheme]) if scheme is not None else {}
        metadata = {"format": "pt"} | ({"scheme": str(scheme)} if quantized else {})
        shards: list[dict[str, Any]] = [{}]
        weight_map: dict[str, str] = {}
        size, total = 0, 0
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        for name, shape in shapes.items():
            count = shape.numel()
            if size + count > 1 << 30:
                save_file(shards[-1], folder / part / f"{stem}-{len(shards):05d}.safetensors", metadata)
                shards[-1].clear()
                shards.append({})
                size = 0
            layer = name.removesuffix(".weight")
            if layer in quantized:
                parts = _random_parts(quantized[layer].spec(*shape))
                tensors = {f"{layer}.{leaf}": tensor for leaf, tensor in parts.items()}
            else:
                scale = 1.0 if "norm" in name and len(shape) == 1 and name.endswith("weight") else 0.0
                spread = 0.02 if len(shape) > 1 else 0.01
                block = (values * spread + scale).bfloat16()
                tensors = {name: block.repeat(-(-count // len(block)))[:count].view(shape).clone()}
            shards[-1] |= tensors
            weight_map |= dict.fromkeys(tensors, f"{stem}-{len(shards):05d}.safetensors")
            size, total = size + count, total + sum(tensor.nbytes for tensor in tensors.values())
        save_file(shards[-1], folder / part / f"{stem}-{len(shards):05d}.safetensors", metadata)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / part / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _random_parts(spec: "Spec") -> dict[str, Any]:
    """Random codes of a layer in int4 or int8-weights, with scales and zeros that give weights of about 0.02."""
    import torch

    made: dict[str, Any] = {}
    for leaf, (shape, dtype) in spec.items():
        if leaf == "weight":
            made[leaf] = torch.randint(-(1 << 62), 1 << 62, (-(-shape[0] * shape[1] // 8),)).view(dtype)
            made[leaf] = made[leaf][: shape[0] * shape[1]].view(shape)
        else:
            value = 8.0 if leaf == "zero" else 0.02 / (64 if dtype == torch.float32 else 4.6)
            made[leaf] = torch.full(shape, value, dtype=torch.bfloat16).to(dtype)
    return made


def watched(command: list[str]) -> dict[str, Any]:
    """Run a program: seconds to its first line, in all and between its events of steps, and its peaks of memory.

    Of memory: anonymous, of mapped files, and all that is resident. step_s: by the clock, step_cpu_s: of the processor.
    """
    start, peak = time.perf_counter(), {"RssAnon": 0, "RssFile": 0, "VmHWM": 0}
    steps: list[tuple[float, float]] = []
    with tempfile.TemporaryFile("w+") as out:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment)
        first = None
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status")
            for line in status.read_text().splitlines() if status.exists() else []:
                key, _, value = line.partition(":")
                if key in peak:
                    peak[key] = max(peak[key], int(value.split()[0]))
            if first is None and os.fstat(out.fileno()).st_size:
                first = time.perf_counter() - start
            if len(steps) < os.pread(out.fileno(), 1 << 20, 0).count(b'"event": "step"'):
                steps.append((time.perf_counter(), _processor_seconds(process.pid)))
            time.sleep(0.1)
        errors = process.stderr.read() if process.stderr else ""
    result: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1), "exit": process.returncode}
    if first is not None:
        result["first_step_s"] = round(first, 1)
    if len(steps) > 1:
        took = (round((last - one) / (len(steps) - 1), 1) for one, last in zip(steps[0], steps[-1], strict=True))
        result |= dict(zip(("step_s", "step_cpu_s"), took, strict=True))
    if process.returncode:
        result["error"] = errors.strip().splitlines()[-1:] or "killed"
    return result | {
        "peak_anonymous_gb": round(peak["RssAnon"] * 1024 / 1e9, 2),
        "peak_mapped_gb": round(peak["RssFile"] * 1024 / 1e9, 2),
        "peak_resident_gb": round(peak["VmHWM"] * 1024 / 1e9, 2),
    }


def _processor_seconds(pid: int) -> float:
    """Seconds of the processor that a process has taken, in all its threads; 0 for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

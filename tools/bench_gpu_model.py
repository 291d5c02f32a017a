"""The engine as the GPU benchmark uses it: modules of the official sizes with random weights drawn on the device.

Everything that the benchmark imports from the engine is imported here. Weights are drawn directly in their number
format: encoding six billion of them would take minutes.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
from bench_machine import ROOT
from bench_research import WORDS
from torch import Tensor, nn

from s3dit.kernels.attention import Spans, attention, attention_lse
from s3dit.kernels.dispatch import Op, use_backend
from s3dit.kernels.group_norm import group_moments, normalize_rows
from s3dit.kernels.matmul import launch_scaled, scaled_matmul
from s3dit.kernels.norm import (
    gated_residual,
    gated_residual_norm,
    qk_norm_rope,
    residual_norm,
    rms_norm,
    rms_norm_modulate,
)
from s3dit.kernels.pictures import add_pictures, repeat_pixels
from s3dit.kernels.scheme import quantize_rows
from s3dit.kernels.schemes import SCHEMES
from s3dit.kernels.swiglu import swiglu
from s3dit.kernels.swiglu_linear import swiglu_linear
from s3dit.model.config import TextEncoderConfig, TransformerConfig, VAEConfig
from s3dit.model.layout import text_to_image
from s3dit.model.linear import QuantLinear, swap
from s3dit.model.text_encoder import TextEncoder
from s3dit.model.transformer import Context, Transformer
from s3dit.model.vae import Autoencoder
from s3dit.pipeline import Pipeline
from s3dit.research.attention import AttentionMaps, attention_maps, looks
from s3dit.research.tokens import tokens
from s3dit.runtime.block_streaming import stream, tensors
from s3dit.runtime.graphs import Replay, compile_blocks
from s3dit.runtime.joining import join
from s3dit.runtime.modulations import together
from s3dit.weights.quantize import quantizable_layers

__all__ = [
    "CAPTION", "FORMATS", "SCHEMES", "WORDS", "AttentionMaps", "Context", "Op", "Pipeline", "Replay", "Spans",
    "add_pictures", "attention", "attention_lse", "attention_maps", "autoencoder", "compile_blocks", "gated_residual",
    "gated_residual_norm", "group_moments", "implementations", "in_fp32", "launch_scaled", "looks", "model_inputs",
    "normalize_rows", "qk_norm_rope", "quantize_rows", "random_tensors", "relative", "repeat_pixels", "residual_norm",
    "rms_norm", "rms_norm_modulate", "scaled_matmul", "stream", "swiglu", "swiglu_linear", "text_encoder", "tokens",
    "transformer", "upcast", "use_backend",
]  # fmt: skip

BF16 = torch.bfloat16
FORMATS = ("bf16", "fp8", "int8", "int4", "fp8-weights")
# Caption tokens of a picture; the layout pads them to 128.
CAPTION = 120
# Root mean square of random codes of a stored dtype; the scale brings weights to that of STD.
CODE_RMS = {torch.float8_e4m3fn: 100.0, torch.int8: 73.3, torch.uint8: 4.61}
STD = 0.02
# What the official configurations, and those of a dry run, change in the embedded model's.
OFFICIAL: dict[str, dict[str, Any]] = {
    "transformer": {
        "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560,
        "axes_dims": [32, 48, 48],
    },
    "text_encoder": {
        "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_window_layers": 36,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
        "scaling_factor": 0.3611, "shift_factor": 0.1159,
    },
}  # fmt: skip
DRY: dict[str, dict[str, Any]] = {"transformer": {"n_layers": 1}, "text_encoder": {}, "vae": {}}


def _config(part: str, kind: Any, dry: bool, **changes: Any) -> Any:
    """The configuration of a part, official or of a dry run's size."""
    path = ROOT / "weights" / "tiny" / part / "config.json"
    return kind.from_json(json.loads(path.read_text()) | (DRY if dry else OFFICIAL)[part] | changes, path)


def random_tensors(spec: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> dict[str, Tensor]:
    """Draw the tensors of a quantized weight, by name, as `Scheme.spec` describes them; the weight has STD."""
    drawn: dict[str, Tensor] = {}
    for name, (shape, dtype) in spec.items():
        if name == "scale":
            drawn[name] = torch.full(shape, STD / CODE_RMS[spec["weight"][1]], dtype=dtype, device=device)
        elif name == "zero":
            drawn[name] = torch.full(shape, 7.5, dtype=dtype, device=device)
        elif dtype == torch.float8_e4m3fn:
            drawn[name] = torch.randn(shape, device=device).mul_(CODE_RMS[dtype]).clamp_(-448, 448).to(dtype)
        elif dtype == torch.int8:
            drawn[name] = torch.randint(-127, 128, shape, dtype=dtype, device=device)
        else:
            drawn[name] = torch.randint(0, 256, shape, dtype=dtype, device=device)
    return drawn


def _fill(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device random weights, bf16 or in the number format of the layer, on a device."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            spec = layer.scheme.spec(layer.out_features, layer.in_features)
            layer._buffers.update(random_tensors(spec, device))
    for owner, leaf, tensor in list(tensors(model)):
        if isinstance(tensor, nn.Parameter):
            values = torch.empty(tensor.shape, dtype=BF16, device=device)
            if tensor.dim() == 1 and leaf == "weight":
                values.fill_(1.0)  # of a norm
            else:
                values.normal_(0.0, STD)
            owner[leaf] = nn.Parameter(values, requires_grad=False)
    # As `runtime.components` does where a part is loaded for a GPU.
    join(model)
    model.eval()


def transformer(number_format: str, device: torch.device, dry: bool, layers: int | None = None) -> Transformer:
    """Make the transformer with random weights in a number format of FORMATS; layers: main blocks, None for all."""
    changes = {} if layers is None or dry else {"n_layers": layers}
    with torch.device("meta"):
        model = Transformer(_config("transformer", TransformerConfig, dry, **changes))
        if number_format != "bf16":
            names = [name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")]
            for name, scheme in quantizable_layers("transformer", names, SCHEMES[number_format]).items():
                swap(model, scheme, name.__eq__)
    _fill(model, device)
    return model


def text_encoder(device: torch.device, dry: bool) -> TextEncoder:
    """Make the text encoder with random bf16 weights."""
    with torch.device("meta"):
        model = TextEncoder(_config("text_encoder", TextEncoderConfig, dry))
    _fill(model, device)
    return model


def autoencoder(device: torch.device, dry: bool) -> Autoencoder:
    """Make the autoencoder with random bf16 weights."""
    with torch.device("meta"):
        model = Autoencoder(_config("vae", VAEConfig, dry))
    _fill(model, device)
    return model


def model_inputs(model: Transformer, side: int, device: torch.device, text: Tensor | None = None) -> tuple[Any, ...]:
    """Return what a forward for a picture of side² pixels takes, and what it takes in a sampler's loop on a GPU.

    That is patches (n, 64) fp32, time (1,) fp32, context, no hints, and the modulation of that time, computed before.
    text (CAPTION, cap_feat_dim): features of the caption, None for random ones in bf16.
    """
    grid = side // 16
    if text is None:
        text = torch.randn(CAPTION, model.config.cap_feat_dim, device=device, dtype=BF16)
    context = model.context(text_to_image([(grid, grid)], [CAPTION], device), text)
    time = torch.tensor([0.3], device=device)
    return torch.randn(grid * grid, 64, device=device), time, context, None, together(model, [time], context)[0]


def upcast(model: nn.Module) -> None:
    """Make the parameters of a model fp32, in place; weights in a number format stay as they are."""
    for owner, leaf, tensor in list(tensors(model)):
        if isinstance(tensor, nn.Parameter) and tensor.dtype == BF16:
            owner[leaf] = nn.Parameter(tensor.float(), requires_grad=False)


def in_fp32(value: Any) -> Any:
    """Return arguments of a forward with all that is bf16 in fp32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype == BF16 else value
    if isinstance(value, tuple | list):
        return type(value)(in_fp32(each) for each in value)
    if isinstance(value, dict):
        return {key: in_fp32(each) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: in_fp32(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return type(value)(**fields)
    return value


def implementations(op: Op, args: tuple[Any, ...], device: torch.device) -> dict[str, Callable[..., Any]]:
    """Return each implementation of an Op that runs with these arguments on this device, and the reference, by name."""
    names = {
        candidate.function.__name__.strip("_"): candidate.function
        for candidate in op.implementations
        if not candidate.why_not(device.type, args)
    }
    return names | {"reference": op.reference}


def relative(values: Tensor, expected: Tensor) -> float:
    """Return ‖values - expected‖ / ‖expected‖ in fp64."""
    difference, size = values.double().cpu() - expected.double().cpu(), expected.double().norm().item()
    return difference.norm().item() / max(size, 1e-30)

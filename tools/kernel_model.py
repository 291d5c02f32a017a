"""The model at its official sizes on a pretended device, of fake tensors, and its passes.

`kernel_device.pretend` must have run, and the imports of this module make real tensors: import it before they are fake.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import kernel_device as device
import torch
from bench_gpu_model import OFFICIAL
from kernel_passes import Pass
from torch import nn

from s3dit.kernels.attention import Spans, attention_lse
from s3dit.kernels.gguf import GGUF
from s3dit.kernels.matmul import scaled_matmul
from s3dit.kernels.schemes import SCHEMES
from s3dit.model.config import TextEncoderConfig, TransformerConfig, VAEConfig
from s3dit.model.layout import text_to_image
from s3dit.model.linear import swap
from s3dit.model.text_encoder import TextEncoder
from s3dit.model.transformer import Transformer
from s3dit.model.vae import Autoencoder
from s3dit.runtime.block_streaming import tensors
from s3dit.runtime.joining import join
from s3dit.weights.quantize import quantizable_layers

# Fields of layouts that stay on the host.
ON_HOST = ("on_host", "positions")
TINY = Path(__file__).resolve().parents[1] / "weights" / "tiny"


def _config(part: str, kind: Any, **changes: Any) -> Any:
    """The official configuration of a part."""
    path = TINY / part / "config.json"
    return kind.from_json(json.loads(path.read_text()) | OFFICIAL[part] | changes, path)


def _on_device(model: Any) -> Any:
    """Give a model on the meta device fake tensors on the pretended one; parameters are bf16."""
    for owner, leaf, tensor in list(tensors(model)):
        is_weight = isinstance(tensor, nn.Parameter)
        made = torch.empty(tensor.shape, dtype=torch.bfloat16 if is_weight else tensor.dtype, device="cuda")
        owner[leaf] = nn.Parameter(made, requires_grad=False) if is_weight else made
    # As `runtime.components` does where a part is loaded.
    join(model)
    return model.eval()


@functools.cache
def _transformer(form: str, layers: int | None) -> Any:
    """Make the transformer in a number format, with all main layers or fewer."""
    changes = {} if layers is None else {"n_layers": layers}
    with torch.device("meta"):
        model = Transformer(_config("transformer", TransformerConfig, **changes))
        if form != "bf16":
            names = [name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")]
            # Files of GGUF quantize the layers that a format of our own for weights does.
            layers_of = quantizable_layers("transformer", names, SCHEMES.get(form, SCHEMES["int8-weights"]))
            for name, scheme in layers_of.items():
                swap(model, GGUF.get(form, scheme), name.__eq__)
    return _on_device(model)


def layout(each: Pass) -> Any:
    """The layout of the pass's pictures, made on the host as for a device."""
    grids = [(each.side // 16 >> i, each.side // 16 >> i) for i in range(each.items)]
    return text_to_image(grids, [each.text] * each.items, "cpu")


def faked(value: Any) -> Any:
    """Return a value with its tensors on the pretended device; what is kept on the host stays there."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    return type(value)(**{name: each if name in ON_HOST else faked(each) for name, each in fields.items()})


def run(each: Pass, layout: Any) -> device.Recorded:
    """Run a pass inside of `fake_tensors`, with the layout of its pictures -> what was launched."""
    special = {"text": _encode_text, "decode": _decode, "by hand": _by_hand}
    if each.part in special:
        return special[each.part](each)
    model = _transformer(each.form, each.layers)
    text = _empty(each.text * each.items, model.config.cap_feat_dim)
    with device.recording() as record:
        context = model.context(layout, text)
    if each.part == "forward":
        patches, time = (_empty(*shape, dtype=torch.float32) for shape in ((len(layout.image.token_index), 64), (1,)))
        # Of all steps at once, before the loop.
        modulation = model.modulation(context.times(time), context.text.dtype)
        with device.recording() as record:
            model(patches, time, context, None, modulation)
    return record


def _encode_text(each: Pass) -> device.Recorded:
    """Encode a prompt of the pass's tokens."""
    changes = {} if each.layers is None else {"num_hidden_layers": each.layers, "max_window_layers": each.layers}
    with torch.device("meta"):
        model = TextEncoder(_config("text_encoder", TextEncoderConfig, **changes))
    _on_device(model)
    with device.recording() as record:
        model(_empty(each.text, model.config.hidden_size), [each.text])
    return record


def _decode(each: Pass) -> device.Recorded:
    """Decode a picture of the pass's side."""
    with torch.device("meta"):
        model = Autoencoder(_config("vae", VAEConfig))
    _on_device(model)
    with device.recording() as record:
        model.decode(_empty(1, 16, each.side // 8, each.side // 8, dtype=torch.float32))
    return record


def _by_hand(each: Pass) -> device.Recorded:
    """Launch what no pass does: attention with its log-sum-exp, and products in bf16 of our own."""
    rows = (each.side // 16) ** 2 + 128
    with device.recording() as record:
        q, k, v = (_empty(rows, 30, 128) for _ in range(3))
        spans = Spans((rows,), _empty(2, dtype=torch.int32), torch.empty(2, dtype=torch.int32))
        attention_lse(q, k, v, spans, spans)
        for outputs, inputs in ((3840, 3840), (10240, 3840), (3840, 10240)):
            x, weight = _empty(rows, inputs), _empty(outputs, inputs)
            with device.calling("scaled_matmul", x, {"weight": weight}):
                scaled_matmul(x, weight, None, None, None, torch.bfloat16)
    return record


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor on the pretended device."""
    return torch.empty(shape, dtype=dtype, device="cuda")

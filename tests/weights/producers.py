"""Writers of quantized layers in the formats of others: the libraries themselves where they can be installed.

Written here by hand, from their documented packing, are nunchaku, awq, block128, by_row and old_scaled.

Each gives the tensors of one layer, by the end of their names, and in float32 or float64 what they stand for.
"""

import json

import torch

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def cast(dtype):
    def write(w):
        return {"weight": w.to(dtype)}, w.to(dtype).double()

    return write


def old_scaled(dtype):
    """One scale a tensor, ComfyUI's old names."""

    def write(w):
        scale = w.abs().amax() / torch.finfo(dtype).max
        codes = (w / scale).to(dtype)
        extra = {"scale_weight": scale, "scale_input": torch.ones(1)}
        return {"weight": codes, **extra}, codes.double() * scale.double()

    return write


def comfy(layout, said, **options):
    """comfy-kitchen's layouts; `said` is what ComfyUI writes of them as JSON."""

    def write(w):
        from comfy_kitchen import tensor

        kind = getattr(tensor, layout)
        codes, params = kind.quantize(w, **options)
        tensors = {f"weight{end}": value for end, value in kind.state_dict_tensors(codes, params).items()}
        tensors["comfy_quant"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
        return tensors, kind.dequantize(codes, params).double()

    return write


def awq(w):
    """ComfyUI's awq_w4a16: (code - 8) · scale + zero, groups of 64 along the input, scales transposed."""
    groups = w.unflatten(1, (-1, 64))
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).bfloat16()
    zeros = (low + 8 * scale.float()).bfloat16()
    codes = ((groups - zeros.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    expected = (codes.double() - 8) * scale.double()[..., None] + zeros.double()[..., None]
    codes = codes.flatten(1).to(torch.uint8)
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
    said = torch.tensor(list(b'{"format": "awq_w4a16", "group_size": 64}'), dtype=torch.uint8)
    tensors = {"weight": packed, "weight_scale": scale.T.contiguous(), "weight_zeros": zeros.T.contiguous()}
    return {**tensors, "comfy_quant": said}, expected.flatten(1)


def block128(w):
    """A scale a block of 128 x 128, the last ones cut."""
    out, in_ = w.shape
    codes, expected = torch.empty(out, in_, dtype=torch.float8_e4m3fn), torch.empty(out, in_, dtype=torch.float64)
    scales = torch.empty(-(-out // 128), -(-in_ // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            run = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = w[run].abs().amax() / 448
            codes[run] = (w[run] / scales[i, j]).to(torch.float8_e4m3fn)
            expected[run] = codes[run].double() * scales[i, j].double()
    return {"weight": codes, "weight_scale_inv": scales}, expected


def by_row(dtype, leaf="weight_scale", most=127.0, shape=(-1, 1)):
    """LightX2V's, and with another leaf LLM.int8's: a scale a row."""

    def write(w):
        peak = w.abs().amax(1, keepdim=True)
        codes = w / peak * (127 if dtype == torch.int8 else 448)
        codes = (codes.round() if dtype == torch.int8 else codes).to(dtype)
        scale = peak / most
        step = peak.double() / (127 if dtype == torch.int8 else 448)
        return {"weight": codes, leaf: scale.reshape(shape)}, codes.double() * step

    return write


def bitsandbytes(kind, nested):
    def write(w):
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=nested)
        tensors = {f"weight.{end}": value for end, value in state.as_dict(packed=True).items()}
        return {"weight": packed, **tensors}, functional.dequantize_4bit(packed, state).double()

    return write


def torchao(config):
    """torchao's own quantizer and its safetensors form; the second answer is the metadata of the layer."""

    def write(w):
        from torch import nn
        from torchao import quantization
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
        model[0].weight.data = w
        quantization.quantize_(model, config(quantization))
        tensors, metadata = flatten_tensor_state_dict(model.state_dict())
        tensors = {name.removeprefix("0."): tensor for name, tensor in tensors.items()}
        return tensors, model[0].weight.dequantize().double(), {"weight": metadata["0.weight"]}

    return write


def sdnq(**options):
    """SDNQ's own quantizer and dequantizer."""

    def write(w):
        from sdnq.quantizer import sdnq_quantize_layer_weight

        decode, tensors = sdnq_quantize_layer_weight(w.clone(), layer_class_name="Linear", svd_rank=8, **options)
        tensors = {end: value for end, value in tensors.items() if value is not None}
        across = options.get("use_quantized_matmul", False)
        expected = decode(**{k: v.clone() for k, v in tensors.items()}, skip_quantized_matmul=across)
        return {end: value.contiguous() for end, value in tensors.items()}, expected.double()

    return write


def nunchaku(fp4, rank=32):
    """SVDQuant: smoothing, a branch of low rank, 4-bit codes; every number put to its place one by one.

    The places are those that a warp of 32 lanes reads: see the formulas in `_place_code` and after it.
    """

    def write(w):
        out, in_ = w.shape
        smooth = (torch.rand(in_) + 0.5).bfloat16()
        up, down = (0.1 * torch.randn(out, rank)).bfloat16(), (0.1 * torch.randn(rank, in_)).bfloat16()
        rest = (w.double() - up.double() @ down.double()) * smooth.double()
        group = 16 if fp4 else 64
        groups = rest.unflatten(1, (-1, group))
        channel = (torch.rand(out, 1) + 0.5).bfloat16().double() if fp4 else torch.ones(out, 1).double()
        whole = torch.tensor([0.25]).bfloat16()
        factor = channel * whole.double() if fp4 else channel
        scale = groups.abs().amax(2) / (6 if fp4 else 7) / factor
        scale = scale.to(torch.float8_e4m3fn) if fp4 else scale.bfloat16()
        unit = scale.double()[..., None] * factor[..., None]
        if fp4:
            table = torch.tensor(E2M1, dtype=torch.float64)
            codes = (groups[..., None] / unit[..., None] - table).abs().argmin(-1)
            values = table[codes]
        else:
            values = (groups / unit).round().clamp(-8, 7)
            codes = values.long() % 16
        expected = (values * unit).flatten(1) / smooth.double() + up.double() @ down.double()
        tensors = {
            "qweight": _pack_codes(codes.flatten(1)),
            "wscales": _pack_micro(scale) if fp4 else _pack_vectors(scale),
            "smooth_factor": _pack_vectors(smooth[:, None])[0],
            "smooth_factor_orig": torch.ones(in_).bfloat16(),
            "proj_down": _pack_low(down.T),
            "proj_up": _pack_low(up),
        }
        if fp4:
            tensors |= {"wcscales": _pack_vectors(channel.bfloat16())[0], "wtscale": whole}
        return tensors, expected

    return write


def _pack_codes(codes):
    """An operand of the tensor core is 8 rows by 32 inputs: lane 4b + c holds, of row b, inputs 8c to 8c + 7.

    Four such (16 rows by 64 inputs) are one load of a lane, eight loads a tile of 128 rows.
    """
    out, in_ = codes.shape
    n, k = torch.meshgrid(torch.arange(out), torch.arange(in_), indexing="ij")
    tile, load, upper, b = n // 128, n % 128 // 16, n % 16 // 8, n % 8
    ktile, kupper, c, g = k // 64, k % 64 // 32, k % 32 // 8, k % 8
    lane, register = 4 * b + c, 2 * upper + kupper
    place = ((((tile * (in_ // 64) + ktile) * 8 + load) * 32 + lane) * 4 + register) * 8 + g
    stream = torch.empty(out * in_, dtype=torch.int64)
    stream[place.flatten()] = codes.flatten().long()
    return (stream[::2] | stream[1::2] << 4).to(torch.uint8).view(torch.int8).view(out, in_ // 2)


def _pack_vectors(columns):
    """(n, groups) -> (groups, n): of each 128, lane l of 32 holds the pairs at 16 (l // 4) + 2 (l % 4) and 8 on."""
    n, groups = columns.shape
    row = torch.arange(n)
    lane, second, odd = row % 128 // 16 * 4 + row % 8 // 2, row % 16 // 8, row % 2
    inside = lane * 4 + second * 2 + odd
    flat = torch.empty(n * groups, dtype=columns.dtype)
    for g in range(groups):
        flat[(row // 128 * groups + g) * 128 + inside] = columns[:, g]
    return flat.view(groups, n)


def _pack_micro(scale):
    """(n, in / 16) e4m3 -> (in / 16, n): of each 128 rows, lane 4 (r % 8) + r % 32 // 8 holds rows 32 apart, 4 of k."""
    n, groups = scale.shape
    row, column = torch.meshgrid(torch.arange(n), torch.arange(groups), indexing="ij")
    lane, part = row % 8 * 4 + row % 32 // 8, row % 128 // 32
    place = (((row // 128 * (groups // 4) + column // 4) * 32 + lane) * 4 + part) * 4 + column % 4
    flat = torch.empty(n * groups, dtype=torch.uint8)
    flat[place.flatten()] = scale.view(torch.uint8).flatten()
    return flat.view(torch.float8_e4m3fn).view(groups, n)


def _pack_low(matrix):
    """(channels, rank), tiles of 16 x 16. proj_up: rows are channels; proj_down: rows of a tile are ranks.

    Lane 4r + c of 32 holds of row r (and r + 8) the pairs at 2c and 2c + 8.
    """
    channels, rank = matrix.shape
    is_down = not matrix.is_contiguous()
    channel, r = torch.meshgrid(torch.arange(channels), torch.arange(rank), indexing="ij")
    row, column = (r % 16, channel % 16) if is_down else (channel % 16, r % 16)
    lane, below, right, odd = row % 8 * 4 + column % 8 // 2, row // 8, column // 8, column % 2
    place = (channel // 16 * (rank // 16) + r // 16) * 256 + lane * 8 + below * 4 + right * 2 + odd
    flat = torch.empty(channels * rank, dtype=matrix.dtype)
    flat[place.flatten()] = matrix.flatten()
    return flat.view(channels, rank)


CONVROT = {"convrot": True, "convrot_groupsize": 64}
# Name -> (writer, the library it needs or "", quantization_config of the folder, name of the Scheme).
FORMATS = {
    "e4m3 cast": (cast(torch.float8_e4m3fn), "", None, "fp8-weights"),
    "e5m2 cast": (cast(torch.float8_e5m2), "", None, "fp8-e5m2"),
    "old scaled e4m3": (old_scaled(torch.float8_e4m3fn), "", None, "fp8-weights"),
    "old scaled e5m2": (old_scaled(torch.float8_e5m2), "", None, "fp8-e5m2"),
    "comfy float8_e4m3fn": (
        comfy("TensorCoreFP8Layout", {"format": "float8_e4m3fn"}), "comfy_kitchen", None, "fp8-weights"),
    "comfy float8_e5m2": (
        comfy("TensorCoreFP8Layout", {"format": "float8_e5m2"}, dtype=torch.float8_e5m2), "comfy_kitchen", None,
        "fp8-e5m2"),
    "comfy mxfp8": (comfy("TensorCoreMXFP8Layout", {"format": "mxfp8"}), "comfy_kitchen", None, "mxfp8"),
    "comfy nvfp4": (comfy("TensorCoreNVFP4Layout", {"format": "nvfp4"}), "comfy_kitchen", None, "nvfp4"),
    "comfy int8": (
        comfy("TensorWiseINT8Layout", {"format": "int8_tensorwise"}), "comfy_kitchen", None, "int8-weights"),
    "comfy int8 rows": (
        comfy("TensorWiseINT8Layout", {"format": "int8_tensorwise"}, per_channel=True), "comfy_kitchen", None,
        "int8-weights"),
    "comfy int8 convrot": (
        comfy("TensorWiseINT8Layout", {"format": "int8_tensorwise", "params": CONVROT}, per_channel=True, **CONVROT),
        "comfy_kitchen", None, "int8-convrot"),
    "comfy convrot_w4a4": (
        comfy("TensorCoreConvRotW4A4Layout", {"format": "convrot_w4a4", "convrot_groupsize": 64}, convrot_groupsize=64),
        "comfy_kitchen", None, "convrot-w4a4"),
    "comfy asym_w4a8_int8": (
        comfy("AsymW4A8Int8Layout", {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64},
              convrot_groupsize=64), "comfy_kitchen", None, "asym-w4a8"),
    "comfy asym_w4a8_int8, corrected": (
        comfy("AsymW4A8Int8Layout", {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64},
              convrot_groupsize=64, symmetric=False, codebook=False, scale_dtype=torch.float32), "comfy_kitchen", None,
        "asym-w4a8"),
    "comfy awq_w4a16": (awq, "", None, "awq-w4a16"),
    "fp8 blocks": (block128, "", None, "fp8-block128"),
    "fp8 rows": (by_row(torch.float8_e4m3fn, most=448.0), "", None, "fp8-weights"),
    "int8 rows": (by_row(torch.int8, shape=(-1,)), "", None, "int8-weights"),
    "LLM.int8": (by_row(torch.int8, "SCB", most=1.0, shape=(-1,)), "", None, "int8-weights"),
    "bnb nf4": (bitsandbytes("nf4", False), "bitsandbytes", None, "bnb-nf4"),
    "bnb nf4 nested": (bitsandbytes("nf4", True), "bitsandbytes", None, "bnb-nf4"),
    "bnb fp4 nested": (bitsandbytes("fp4", True), "bitsandbytes", None, "bnb-fp4"),
    "torchao float8": (torchao(lambda q: q.Float8WeightOnlyConfig()), "torchao", None, "fp8-weights"),
    "torchao int8": (torchao(lambda q: q.Int8WeightOnlyConfig(version=2)), "torchao", None, "int8-weights"),
    "torchao int8 groups": (
        torchao(lambda q: q.Int8WeightOnlyConfig(version=2, granularity=q.PerGroup(32))), "torchao", None,
        "torchao-int8"),
    **{
        " ".join(("sdnq", kind, *options)): (
            sdnq(weights_dtype=kind, **options), "sdnq", {"quant_method": "sdnq", "weights_dtype": kind, **options},
            name)
        for kind, options, name in (
            ("uint4", {}, "sdnq-uint4"), ("uint4", {"use_svd": True}, "sdnq-uint4"), ("int8", {}, "int8-weights"),
            ("int4", {"use_svd": True, "use_hadamard": True}, "sdnq-int4"),
            ("uint4", {"use_svd": True, "use_hadamard": True, "hadamard_group_size": 32}, "sdnq-uint4"),
            ("int8", {"use_quantized_matmul": True, "use_svd": True}, "sdnq-int8"),
            ("uint8", {"use_hadamard": True}, "sdnq-uint8"), ("float8_e4m3fn", {}, "fp8-weights"),
            *((f"{sign}int{bits}", {"group_size": 32}, f"sdnq-{sign}int{bits}")
              for bits in (2, 3, 5, 6, 7) for sign in ("u", "")),
        )
    },
    "nunchaku_lite int4": (nunchaku(False), "", None, "svdq-int4"),
    "nunchaku_lite fp4": (nunchaku(True), "", None, "svdq-fp4"),
}  # fmt: skip

"""Number formats behind the prefixes and names of single files: the same picture as their numbers, loaded plainly.

Bit-equal is not to be had where a product is done with codes instead of decoded weights; each tolerance has a reason.
"""

import sys
from pathlib import Path

import pytest
import torch

from s3dit import Pipeline
from s3dit.cli.convert_model import convert
from s3dit.cli.inspect_weights import inspect_path
from s3dit.weights.keymap import official

gguf = pytest.importorskip("gguf", reason="GGUF files are made by gguf-py: pip install 's3dit[test]'")
pytest.importorskip("diffusers", reason="parity needs diffusers: pip install 's3dit[test]'")
sys.path.insert(0, str(Path(__file__).parent))
import spelled  # noqa: E402

DRAW = {"prompt": "a red star above a blue ring", "seed": 3, "height": 64, "width": 64, "num_inference_steps": 2}
Q8 = gguf.GGMLQuantizationType.Q8_0


def load(*args, **options):
    return Pipeline.load(*args, device="cpu", dtype="fp32", **options)


def latents(pipe):
    return pipe(**DRAW, output_type="latent").latents[0]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def write(path, tensors, where, arch):
    """Q8_0 for the matrices that `where` takes; and what they stand for, by gguf-py."""
    writer, plain = gguf.GGUFWriter(path, arch), {}
    for key, tensor in tensors.items():
        data = tensor.contiguous().numpy()
        if where(key) and tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            blocks = gguf.quantize(data, Q8)
            writer.add_tensor(key, blocks, raw_dtype=Q8)
            plain[key] = torch.from_numpy(gguf.dequantize(blocks, Q8).copy())
        else:
            writer.add_tensor(key, data)
            plain[key] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain


@pytest.fixture(scope="module")
def transformer(official_dir, tmp_path_factory):
    """A prefixed ComfyUI GGUF in Q8_0, and its numbers as plain safetensors."""
    folder = tmp_path_factory.mktemp("q8")
    names = spelled.prefixed("model.diffusion_model.", spelled.comfy(spelled.part(official_dir, "transformer")))
    plain = write(folder / "x.gguf", names, lambda key: ".layers." in key, "lumina2")
    return folder / "x.gguf", spelled.save(folder / "x.safetensors", plain)


def test_a_fused_gguf_transformer(transformer, official_dir):
    """fp32 sums of decoded blocks in another order than of the whole weight: 1e-5."""
    quantized, plain = (load(official_dir, transformer=path) for path in transformer)
    assert quantized.parts.formats["transformer"] and not plain.parts.formats["transformer"]
    assert relative(latents(quantized), latents(plain)) < 1e-5


def test_look_and_convert(transformer, official_dir, tmp_path):
    path, plain = transformer
    (part,) = inspect_path(path).parts
    assert (part.container, part.spelling) == ("GGUF", "ComfyUI") and not part.faults
    assert any("Q8_0" in name for name in part.formats["layers"])
    convert(path, tmp_path / "out", version="0", dtype="fp32")
    assert torch.equal(
        latents(load(official_dir, transformer=tmp_path / "out")), latents(load(official_dir, transformer=plain))
    )


def test_a_gguf_text_encoder_with_its_embedding(official_dir, tmp_path):
    """The embedding is decoded by rows, exactly; the layers multiply with blocks: 1e-5."""
    names = spelled.llama(spelled.part(official_dir, "text_encoder"))
    plain = write(tmp_path / "q.gguf", names, lambda key: "norm" not in key, "qwen3")
    path = spelled.save(tmp_path / "q.safetensors", plain)
    quantized, same = (load(official_dir, text_encoder=one) for one in (tmp_path / "q.gguf", path))
    ids = torch.tensor([5, 0, 703, 5])
    rows = [
        official(one.parts.checkpoints["text_encoder"]).rows("model.embed_tokens.weight", ids)
        for one in (quantized, same)
    ]
    assert torch.equal(*rows)
    assert relative(quantized.encode(["a red star"])[0], same.encode(["a red star"])[0]) < 1e-5


def test_a_plain_fp8_cast_with_everything_in_it(official_dir, tmp_path):
    """A crude cast of the whole file, norms and pad tokens too, behind a prefix: as its numbers in fp32."""
    names = spelled.prefixed("model.diffusion_model.", spelled.comfy(spelled.part(official_dir, "transformer")))
    cast = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in names.items()}
    paths = (
        spelled.save(tmp_path / "a.safetensors", cast),
        spelled.save(tmp_path / "b.safetensors", {key: tensor.float() for key, tensor in cast.items()}),
    )
    assert relative(*(latents(load(official_dir, transformer=path)) for path in paths)) < 1e-5

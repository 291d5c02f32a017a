"""`runner.py` draws the engine's picture from a written folder, by torch or onnxruntime, without the engine."""

import ast
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit import Pipeline
from s3dit.export import graphs, runner
from s3dit.model.layout import patchify
from s3dit.sampling.schedules import sigmas

SLOW = pytest.mark.skipif(not os.environ.get("S3DIT_SLOW"), reason="takes a minute; set S3DIT_SLOW=1 to run it")
PAGE = Path(__file__).resolve().parents[2] / "s3dit" / "EXPORT.md"
PROMPTS = ["a red star above a blue ring", "a green square"]


def check(model: runner.Model, pipe: Pipeline) -> None:
    """Compare pictures of a written model with the pipeline's, in two sizes, guided and not."""
    for size, guided in (((48, 80), {}), ((64, 64), {"guidance_scale": 2.0})):
        found = model.draw(PROMPTS, [3, 4], size, steps=2, **guided)
        options = {"height": size[0], "width": size[1], "num_inference_steps": 2, **guided}
        for i, prompt in enumerate(PROMPTS):
            wanted = np.asarray(pipe(prompt, seed=3 + i, **options).images[0])
            # Where a number lies between two integers, the last bit decides.
            off = np.abs(found[i].astype(int) - wanted.astype(int))
            assert off.max() <= 1 and (off > 0).mean() < 1e-2


def test_it_draws_the_pictures_of_the_engine(pipe, model):
    assert sorted(path.name for path in model.folder.iterdir()) == [
        "runner.py", "settings.json", "text_encoder.pt2", "tokenizer.json", "transformer.pt2", "vae.pt2",
    ]  # fmt: skip
    check(model, pipe)


def test_its_command_takes_words_or_ids(pipe, model, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Model", lambda folder: model)
    monkeypatch.chdir(tmp_path)
    ids = ",".join(map(str, pipe.tokenizer.encode(PROMPTS[0])))
    for words, name in ((PROMPTS[:1], "words.png"), (["--ids", ids], "ids.png")):
        runner.main([*words, "--size", "64x48", "--steps", "1", "-o", name])
    assert Path("words.png").read_bytes() == Path("ids.png").read_bytes()
    assert Image.open("ids.png").size == (64, 48)
    with pytest.raises(SystemExit):
        runner.main([])
    with pytest.raises(ValueError, match="size 40x64, 1 seeds; needed multiples of 16"):
        model.draw(PROMPTS[:1], [1], (40, 64))


def test_the_examples_of_the_page_run(model, monkeypatch, capsys):
    """Writing and loading are those of the fixture."""
    written = []
    monkeypatch.setattr(graphs, "write", lambda pipe, folder: written.append((type(pipe), folder)))
    monkeypatch.setattr(runner, "Model", lambda folder: model)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    exec(compile("\n".join(examples), PAGE.name, "exec"), {})
    assert written == [(Pipeline, "stars")] and capsys.readouterr().out == "(2, 64, 96, 3) uint8\n"


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5])
def test_its_noise_is_that_of_torch(seed):
    latents = torch.randn(16, 6, 10, generator=torch.Generator().manual_seed(seed))
    found = runner.noise(seed, 3, 5).reshape(15, 64)
    # Logarithm and cosine of two libraries.
    assert np.abs(found - patchify(latents).numpy()).max() < 2e-6


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (8, 3.0), (28, 6.0), (5, 0.5)])
def test_its_noise_levels_are_the_official_ones(steps, shift):
    assert np.abs(runner.noise_levels(steps, shift) - sigmas(steps, shift).numpy()).max() < 1e-7


def test_a_shift_that_follows_from_the_size_is_written():
    pipe = Pipeline.load(device="cpu")
    scheduler = pipe.config.scheduler
    for kind in ("exponential", "linear"):
        changed = type(scheduler)(shift=1.0, use_dynamic_shifting=True, time_shift_type=kind)
        object.__setattr__(pipe.config, "scheduler", changed)
        shift = graphs.settings(pipe, "export")["shift"]
        value = shift["slope"] * 1000 + shift["offset"]
        assert (np.exp(value) if shift["exponential"] else value) == pytest.approx(changed.shift_at(1000))
    object.__setattr__(pipe.config, "scheduler", scheduler)


def test_its_png_is_read_by_others():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(runner.png(pixels)))), pixels)


def test_it_imports_nothing_of_the_engine():
    tree = ast.parse(graphs.RUNNER.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert own == {"numpy", "torch", "onnxruntime", "tokenizers"}


def test_inputs_go_to_the_device_that_the_graphs_are_of(tmp_path, monkeypatch):
    """Without a GPU: "meta" stands for the other device, and the answer is brought back from where it is."""
    (tmp_path / "settings.json").write_text('{"form": "export", "device": "meta"}')
    seen = []

    def graph(*given):
        seen.extend(each.device.type for each in given)
        return torch.ones(1, dtype=torch.bfloat16)

    monkeypatch.setattr(torch.export, "load", lambda path: type("Graph", (), {"module": lambda self: graph})())
    answer = runner.Model(tmp_path).run("vae", np.zeros(2, np.float32), np.zeros(1, np.int64))
    assert seen == ["meta", "meta"] and answer.dtype == np.float32 and answer.tolist() == [1.0]


@SLOW
def test_compiled_it_draws_the_same(tmp_path, cut_model):
    graphs.write(pipe := cut_model(1), tmp_path / "model", "compiled")
    assert json.loads((tmp_path / "model" / "settings.json").read_text())["form"] == "compiled"
    check(runner.Model(tmp_path / "model"), pipe)


@SLOW
def test_onnxruntime_draws_the_same(tmp_path, cut_model):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    graphs.write(pipe := cut_model(1), tmp_path / "model", "onnx")
    check(runner.Model(tmp_path / "model"), pipe)

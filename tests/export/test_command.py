"""`s3dit export`, and what it refuses; tracing is left to `test_graphs`."""

import re
from pathlib import Path

import pytest
import torch

from s3dit import Control, Pipeline, RequestError
from s3dit.cli.main import main, parse
from s3dit.export import graphs


def test_an_operation_of_the_engine_is_refused():
    class Foreign(torch.nn.Module):
        def forward(self, q, ends):
            return torch.ops.s3dit.attention(q, q, q, ends, ends, ends, ends)

    graph = torch.export.export(Foreign(), (torch.zeros(4, 1, 16), torch.tensor([0, 4], dtype=torch.int32)))
    with pytest.raises(RequestError, match="the graph holds s3dit.attention.default, which torch alone does not have"):
        graphs.check_operations(graph)


def test_the_commands_that_it_names_are_commands():
    """In messages and on the page."""
    root = Path(__file__).resolve().parents[2] / "s3dit"
    texts = [path.read_text(encoding="utf-8") for path in (root / "EXPORT.md", *(root / "export").glob("*.py"))]
    named = {line for text in texts for line in re.findall(r"s3dit ((?:convert|export) [^`\n\"]*[A-Za-z])", text)}
    assert {"convert MODEL DIR", "export MODEL -o DIR", "export embedded -o stars"} <= named
    for line in sorted(named):
        parse(line.split())


def test_the_command_writes_what_its_options_say(net, tmp_path, monkeypatch, capsys):
    """Writing itself is the fixture's."""
    written = []

    def write(pipe, folder, form, progress, control):
        progress("vae")
        written.append((str(pipe.placement), pipe.parts.formats["text_encoder"], folder.name, form, control))
        return ["a note"]

    monkeypatch.setattr(graphs, "write", write)
    options = ["--quantize-text", "int8", "--compile", "--dtype", "fp32", "--device", "cpu"]
    assert main(["export", "embedded", "-o", str(tmp_path / "stars"), *options]) == 0
    control = ["--control", f"{net}::0.5:rule=diffusers"]
    assert main(["export", "embedded", "-o", str(tmp_path / "onnx"), "--onnx", "--device", "cpu", *control]) == 0
    assert written == [
        ("cpu, fp32", "int8", "stars", "compiled", None),
        ("cpu, fp32", "", "onnx", "onnx", Control(str(net), strength=0.5, rule="diffusers")),
    ]
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "stars"), str(tmp_path / "onnx")]
    assert said.err.count("writing vae") == said.err.count("a note") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embedded", "-o", "there"], "there exists; needed the name of a new folder"),
        (["embedded", "-o", "x", "--quantize", "q4"], "--quantize is 'q4'; needed one of"),
        (["embedded", "-o", "x", "--onnx", "--quantize", "int8"], "found transformer in int8; onnx takes"),
        (["embedded", "-o", "x", "--control", "none.safetensors"], "--control none.safetensors: not found"),
        (["embedded", "-o", "x", "--control", "there:a.png"], "control has image"),
        (["embedded", "-o", "x", "--control", "there::3"], "control strength is 3.0; needed"),
        (["embedded", "-o", "x", "--onnx", "--compile"], "not allowed with"),
    ],
)
def test_what_cannot_be_written_is_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    try:
        code = main(["export", *words])
    except SystemExit as done:
        code = done.code
    assert code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("load", "form", "message"),
    [
        ({"quantize": "int8", "dtype": "fp32"}, "onnx", "found transformer in int8; onnx takes weights of floats"),
        ({"residency": "streamed"}, "export", "loaded with residency streamed"),
        ({}, "pt", "form is 'pt'; needed export, compiled, onnx"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_written_is_refused(load, form, message, monkeypatch, tmp_path):
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(RequestError, match=message):
        graphs.write(Pipeline.load(device="cpu", **load), tmp_path / "model", form)
    assert not list(tmp_path.iterdir())

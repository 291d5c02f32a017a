"""`s3dit serve` itself: what is wrong with its options, a start with adapters and a key, and its end by a signal."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from s3dit.cli import serve
from s3dit.cli.main import main
from s3dit.errors import RequestError
from s3dit.serve import server
from s3dit.serve.door import digest

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embedded", "--model", "embedded-base"], "both embedded and --model embedded-base"),
        (["nowhere"], "nowhere: not found"),
        (["--port", "70000"], "--port is 70000; needed 0 to 65535"),
        (["--queue", "0"], "--queue is 0; needed 1"),
        (["--timeout", "nan"], "--timeout is nan"),
        (["--warm-up", "64"], "'64' is not a list of sizes such as"),
        (["--max-steps", "0"], "--max-steps is 0; needed 1"),
        (["--quantize", "fp4"], "--quantize is 'fp4'"),
        (["--warm-up", "64x64,65x64"], "--warm-up: width is 65, not a multiple of 16"),
        (["--warm-up", "64x8192"], "--warm-up: height is 8192; needed an integer from 16 to 4096"),
        (["--warm-up", "4096x4096"], "--warm-up 4096x4096 has 16,777,216 pixels; needed at most 8,388,608"),
        (["--name", ""], "--name is ''; needed a name"),
        (["--allow-host", "example.org:8000"], "--allow-host is 'example.org:8000'; needed a name without"),
        (["--allow-host", "http://example.org"], "--allow-host is 'http://example.org'"),
        (["--allow-origin", "example.org"], "--allow-origin is 'example.org'"),
        (["--allow-origin", "https://example.org/page"], "--allow-origin is 'https://example.org/page'"),
        (["--lora-dir", "nowhere"], "--lora-dir nowhere: No such file"),
        (["--lora-dir", "."], "holds no .safetensors file"),
        (["--api-key-file", "nowhere"], "nowhere: not found; needed a file with a key"),
        (["--api-key-file", "two words"], "holds no key; needed one word"),
        (["--api-key", KEY], "there is no option --api-key; did you mean --api-key-file?"),
        (["--replicas", "2"], "--replicas is given without --ray"),
        (["--worker-threads", "2"], "--worker-threads is given without --ray"),
        (["--ray", "local", "--replicas", "3:2"], "'3:2' is not a number from 1, or MIN:MAX"),
        (["--ray", "embedded"], "--ray is 'embedded'; needed local, auto or HOST:PORT of a cluster"),
        (["--ray", "--port", "0"], "--port is 0 with --ray; needed a port that is free on all machines"),
        (["--ray", "--device", "cuda:1"], "--device is cuda:1 with --ray, which chooses a GPU for each replica"),
        (["--host", "256.256.256.256", "--port", "0"], "cannot be bound"),
    ],
)  # fmt: skip
def test_wrong_options_end_in_a_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two words").write_text("one two\n")
    try:
        code = main(["serve", *words])
    except SystemExit as done:
        code = done.code
    out, err = capsys.readouterr()
    assert code == 2 and said in err and err.count("\n") == 1 and not out


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else True)
    assert main(["serve"]) == 2
    assert "not installed: uvicorn; pip install 's3dit[serve]'" in capsys.readouterr().err
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "ray" else True)
    assert main(["serve", "--ray"]) == 2
    assert "not installed: ray; pip install 's3dit[serve,ray]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_before_a_model_is_read(served, capsys):
    assert main(["serve", "embedded", "--port", str(served.port)]) == 2
    assert "cannot be bound (Address already in use)" in capsys.readouterr().err


def test_a_port_that_is_taken_meanwhile(served):
    """Bound by two before either listens, which systems allow: the second ends in an error of its own."""
    with (
        pytest.raises(RequestError, match="cannot be bound"),
        server.bound("127.0.0.1", 0) as first,
        server.bound("127.0.0.1", first.getsockname()[1]) as second,
    ):
        first.listen()
        server.Server(served.engine, server.Serving(name="tiny"), second).serve_forever()


def test_a_key_is_one_word(monkeypatch):
    """What surrounds it no header could hold."""
    for text in (f"{KEY}\n", f" {KEY}\r\n"):
        monkeypatch.setenv(serve.KEY, text)
        assert serve._key(None) == digest(KEY)
    for text in ("", "a b", "a\x7fb", "\u00e9"):
        monkeypatch.setenv(serve.KEY, text)
        with pytest.raises(RequestError, match="holds no key"):
            serve._key(None)


@pytest.mark.parametrize(("soft", "hard", "set_to", "number"), [
    (1024, 4096, 1280, 1024), (256, 400, 400, 144), (1024, -1, 1280, 1024), (5000, 5000, None, 1024), (64, 64, None, 1),
])  # fmt: skip
def test_connections_are_no_more_than_files(monkeypatch, soft, hard, set_to, number):
    resource, seen = pytest.importorskip("resource"), []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: seen.append(pair))
    assert server._connections() == number
    assert [pair for pair in seen if pair[0] != soft] == ([] if set_to is None else [(set_to, hard)])


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A server in a process of its own: adapters to choose, one that acts, a key, bounds, a warm-up."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "adapters").mkdir()
    for name, sign in (("adapters/ink", 1.0), ("adapters/oil", -1.0), ("always", 0.5)):
        factors = {"lora_A": torch.ones(2, 192), "lora_B": torch.full((192, 2), 0.02 * sign)}
        save_file(
            {f"transformer.layers.0.attention.to_q.{part}.weight": factor for part, factor in factors.items()},
            folder / f"{name}.safetensors",
        )
    (folder / "key").write_text(KEY + "\n")
    words = ["embedded", "--port", "0", "--lora-dir", folder / "adapters", "--lora", f"{folder}/always.safetensors:0.5",
             "--api-key-file", folder / "key", "--name", "mine", "--warm-up", "64x64", "--max-steps", "60"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "s3dit", "serve", *map(str, words)], cwd=ROOT, text=True, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"mine at (http://127\.0\.0\.1:\d+) ", line):
            break
    else:
        pytest.fail("".join(lines))
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    yield process, found[1], lines, reader
    process.kill()
    process.wait()


def ask(url, fields=None, key=KEY):
    """Status and JSON of an answer."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, None if fields is None else json.dumps(fields).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_adapters_are_chosen_by_name(started):
    _, url, _, _ = started
    assert ask(f"{url}/v1/options", key="wrong")[0] == 401
    loras = ask(f"{url}/v1/options")[1]["loras"]
    assert loras == [{"name": "always", "scale": 0.5, "on": True}, {"name": "ink", "scale": 1.0, "on": False},
                     {"name": "oil", "scale": 1.0, "on": False}]  # fmt: skip
    drawn = {}
    for lora in (
        None,
        "ink",
        [{"name": "oil", "scale": 1}],
        [{"name": "ink"}, {"name": "oil"}],
        {"name": "always", "scale": 0},
    ):
        fields = {"prompt": "a red star", "model": "mine", "size": "64x64", "num_inference_steps": 2, "seed": 1}
        status, answer = ask(f"{url}/v1/images/generations", fields | {"lora": lora})
        assert status == 200, answer
        drawn[json.dumps(lora)] = answer["data"][0]["b64_json"]
        worn = {each["file"]: each["scale"] for each in answer["data"][0]["metadata"].get("adapters", ())}
        named = {"always": 0.5} | dict.fromkeys(re.findall("ink|oil", json.dumps(lora)), 1.0)
        assert worn == ({} if "always" in json.dumps(lora) else {f"{name}.safetensors": named[name] for name in named})
    assert len(set(drawn.values())) == 5
    fields = {"prompt": "a", "num_inference_steps": 61}
    assert ask(f"{url}/v1/images/generations", fields)[1]["error"]["param"] == "num_inference_steps"


@pytest.mark.slow
def test_a_signal_under_load_ends_in_order(started):
    """Last: requests that run are drawn, the rest gets 503, the exit code is 0."""
    process, url, lines, reader = started
    answers = []
    fields = {"prompt": "a red star", "size": "64x64", "num_inference_steps": 10}
    threads = [
        threading.Thread(target=lambda: answers.append(ask(f"{url}/v1/images/generations", fields))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert process.wait(60) == 0
    reader.join()
    assert len(answers) == 4 and {status for status, _ in answers} <= {200, 503}
    assert lines[-1] == "s3dit: stopped\n" and not any("Traceback" in line for line in lines)

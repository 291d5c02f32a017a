"""`s3dit serve --ray`: two replicas on a Ray cluster of this machine; and what needs no cluster."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from s3dit.errors import BackendError, CheckpointError

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")
ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef"
SMALL = {"prompt": "a red star", "size": "64x64", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def replicas():
    """The module, whose import takes seconds."""
    from s3dit.serve import replicas

    return replicas


def test_metrics_of_replicas_are_told_apart(replicas):
    found = []
    for replica, count in (("one", 3), ("two", 4)):
        registry = CollectorRegistry()
        Counter("answers", "text", ["path"], registry=registry).labels("/").inc(count)
        found.append((replica, list(registry.collect())))
    text = generate_latest(replicas._Labelled(found)).decode()
    families = {each.name: each for each in text_string_to_metric_families(text)}
    counts = {each.labels["replica"]: each.value for each in families["answers"].samples if each.name.endswith("total")}
    assert counts == {"one": 3, "two": 4} and families["answers"].samples[0].labels["path"] == "/"


def test_a_fleet_has_to_fit(replicas):
    Fleet = replicas.Fleet
    with pytest.raises(BackendError, match="room for 1 replicas of 2 threads; needed 2"):
        Fleet(least=2, most=2, threads=2, device="cpu").options({"CPU": 3.0})
    with pytest.raises(BackendError, match="has 0 GPUs; needed 1"):
        Fleet(least=1, most=1, threads=1, device="cuda").options({"CPU": 8.0})
    found = Fleet(least=2, most=9, threads=1, device=None).options({"CPU": 8.0, "GPU": 2.0})
    assert found == {
        "autoscaling_config": {"min_replicas": 2, "max_replicas": 9},
        "ray_actor_options": {"num_cpus": 1, "num_gpus": 1},
    }


@pytest.mark.parametrize(
    ("message", "kind", "said"),
    [
        ("Traceback:\n  File\ns3dit.errors.CheckpointError: it is torn\n", CheckpointError, "it is torn"),
        ("Failed\nOSError: no room", BackendError, "could be started (OSError: no room)"),
    ],
)  # fmt: skip
def test_why_a_replica_did_not_load(message, kind, said, replicas):
    deployment = SimpleNamespace(message=message)
    error = replicas._why(SimpleNamespace(message="Failed to update.", deployments={"Replica": deployment}))
    assert type(error) is kind and said in str(error)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The command with two replicas and a key: its process, where it is, its lines."""
    folder = tmp_path_factory.mktemp("replicas")
    (folder / "key").write_text(KEY + "\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["embedded", "--ray", "local", "--replicas", "2", "--port", str(port), "--api-key-file", "key"]
    process = subprocess.Popen(
        [sys.executable, "-m", "s3dit", "serve", *words], cwd=folder, text=True, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "replicas: 2 running" in line:
            break
    else:
        pytest.fail("".join(lines))
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    yield process, f"http://127.0.0.1:{port}", lines
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
    reader.join()


def ask(url, path, fields=None, key=KEY):
    """Status, headers and bytes of an answer."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url + path, None if fields is None else json.dumps(fields).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def pictures(url):
    """How many requests each replica has drawn."""
    families = text_string_to_metric_families(ask(url, "/metrics")[2].decode())
    samples = [each for family in families for each in family.samples if each.labels.get("ended") == "done"]
    return {each.labels["replica"]: each.value for each in samples}


@pytest.mark.slow
def test_two_replicas_draw_end_and_are_replaced(started):
    from s3dit.inputs.save_image import encoded
    from s3dit.pipeline import Pipeline
    from s3dit.request import Request

    process, url, lines = started
    assert [ask(url, path, key="wrong")[0] for path in ("/health", "/v1/models", "/metrics")] == [200, 401, 401]
    # A picture that is drawn alone is that of the pipeline to the byte, whichever replica draws it.
    pipe = Pipeline.load(device="cpu", residency="resident")
    done = {}
    for seed in range(20):
        drawn = pipe(Request(prompt="a red star", width=64, height=64, num_inference_steps=2, seed=seed))
        _, _, png = ask(url, "/v1/images/generations", SMALL | {"seed": seed, "response_format": "file"})
        assert png == encoded(drawn.images[0], "PNG", drawn.metadata[0])
        done = pictures(url)
        assert len(done) == 2 and sum(done.values()) == seed + 1
        if all(done.values()):
            break
    assert all(done.values())

    status, headers, body = ask(url, "/v1/images/generations", SMALL | {"steps": 3})
    assert status == 400 and json.loads(body)["error"]["param"] == "steps" and len(headers.get_all("X-Request-Id")) == 1
    fields = SMALL | {"stream": True, "partial_images": 1, "seed": 7}
    _, headers, body = ask(url, "/v1/images/generations", fields)
    assert headers["Content-Type"].startswith("text/event-stream")
    events = re.findall(r"^event: (.*)$", body.decode(), re.M)
    assert events == ["image_generation.partial_image", "image_generation.completed"]

    # A replica that is killed: whoever asks next is answered by the other, then Ray starts one in its place.
    killed = int(re.search(r"Replica pid=(\d+)", "".join(lines))[1])
    os.kill(killed, signal.SIGKILL)
    time.sleep(1)
    assert ask(url, "/v1/images/generations", SMALL)[0] == 200 and ask(url, "/health")[0] == 200
    process.terminate()
    assert process.wait(60) == 0
    assert "s3dit: stopped\n" in lines and KEY not in "".join(lines)

"""The interface as OpenAI's own client uses it, and as a client that wishes no good."""

import base64
import io
import json
import socket
import threading
import time
import zipfile
from contextlib import suppress

import pytest
from PIL import Image
from running import SMALL, running

from s3dit.inputs.image_metadata import read_metadata
from s3dit.serve import api
from s3dit.serve.bounds import Limits
from s3dit.serve.connection import Connection
from s3dit.serve.server import Serving

openai = pytest.importorskip("openai")
MORE = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def png(image):
    image.save(data := io.BytesIO(), "PNG")
    return data.getvalue()


def test_a_picture_is_the_one_drawn_here(client, served, tmp_path):
    """Pixels, metadata and the fields of the answer; the client's own model of it, held strictly."""
    answer = client.images.generate(prompt="a red star", model="tiny", size="64x64", n=2, extra_body=MORE)
    type(answer).model_validate(answer.model_dump(), strict=True)
    alone = served.pipe("a red star", height=64, width=64, num_inference_steps=2, seed=7, num_images_per_prompt=2)
    for i, (one, drawn) in enumerate(zip(answer.data, alone.images, strict=True)):
        assert opened(one.b64_json).tobytes() == drawn.tobytes() and one.seed == 7 + i
        (tmp_path / "a.png").write_bytes(base64.b64decode(one.b64_json))
        assert read_metadata(tmp_path / "a.png") == one.metadata and one.metadata["engine"]["replayable"]
    assert (answer.size, answer.output_format, answer.background) == ("64x64", "png", "opaque")
    used = answer.usage
    assert used.output_tokens == 2 * 16 and used.total_tokens == used.input_tokens + used.output_tokens
    assert used.input_tokens_details.text_tokens == len(served.pipe.tokenizer.encode("a red star"))
    assert answer.seconds["transformer"] > 0 and answer.notes


def test_a_stream_shows_the_picture_forming(client):
    events = list(
        client.images.generate(
            prompt="a red star", size="64x64", stream=True, partial_images=3, output_format="jpeg",
            extra_body=MORE | {"num_inference_steps": 4},
        )
    )  # fmt: skip
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    for event in events:
        type(event).model_validate(event.model_dump(), strict=True)
        assert opened(event.b64_json).format == "JPEG" and event.size == "64x64"
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    whole = client.images.generate(
        prompt="a red star", size="64x64", output_format="jpeg", extra_body=MORE | {"num_inference_steps": 4}
    )
    assert whole.data[0].b64_json == events[-1].b64_json and events[-1].usage.output_tokens == 16


def test_a_picture_is_edited(client, served):
    """A start image with a strength, and with a mask of OpenAI's kind; events are called after edits."""
    start = served.pipe("a blue ring", height=64, width=64, num_inference_steps=2, seed=3).images[0]
    form = {"image": ("a.png", png(start), "image/png"), "prompt": "a red star"}
    answer = client.images.edit(**form, extra_body=MORE | {"strength": 0.8, "num_inference_steps": 4})
    plain = Image.frombytes("RGB", start.size, start.tobytes())
    alone = served.pipe("a red star", image=plain, strength=0.8, num_inference_steps=4, seed=7).images[0]
    assert opened(answer.data[0].b64_json).tobytes() == alone.tobytes() and answer.size == "64x64"
    mask = Image.new("RGBA", start.size)
    mask.paste((0, 0, 0, 255), (0, 0, 32, 64))
    events = list(client.images.edit(**form, mask=("m.png", png(mask)), stream=True, partial_images=1, extra_body=MORE))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    kept = opened(events[-1].b64_json).crop((0, 0, 32, 64))
    assert kept.tobytes() == start.crop((0, 0, 32, 64)).tobytes()


def test_files_and_zips(served):
    status, headers, content = served.ask("POST", "/v1/images/generations", SMALL | {
        "prompt": "a star", "response_format": "file", "output_format": "webp"})  # fmt: skip
    assert status == 200 and headers["Content-Type"] == "image/webp" and headers["X-Seed"] == "7"
    assert Image.open(io.BytesIO(content)).format == "WEBP"
    body = SMALL | {"prompt": "a star", "response_format": "file", "n": 2}
    _, headers, content = served.ask("POST", "/v1/images/generations", body)
    assert headers["Content-Type"] == "application/zip" and headers["X-Seed"] == "7,8"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == ["1.png", "2.png"] and archive.testzip() is None


def test_errors_are_openai_s(client):
    for error, fields in (
        (openai.BadRequestError, {"size": "65x64"}),
        (openai.BadRequestError, {"extra_body": {"steps": 3}}),
        (openai.NotFoundError, {"model": "gpt-image-2"}),
        (openai.BadRequestError, {"extra_body": {"negative_prompt": "red"}}),
        (openai.BadRequestError, {"stream": True, "prompt": "a very " * 600}),
    ):
        with pytest.raises(error) as caught:
            client.images.generate(**{"prompt": "a star", "size": "64x64"} | fields)
        assert caught.value.param and caught.value.type == "invalid_request_error" and caught.value.request_id


def test_what_is_there(served, client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")
    status, headers, content = served.ask("GET", "/health", X_Request_Id="mine.1")
    assert (status, json.loads(content), headers["X-Request-Id"]) == (200, {"status": "ok"}, "mine.1")
    options = json.loads(served.ask("GET", "/v1/options")[2])
    assert options["defaults"]["size"] == "128x128" and "128x128" in options["sizes"] and options["references"] == 0
    assert {"prompt", "lora"} <= set(options["fields"]["generations"]) and options["limits"]["partial_images"] == 3
    document = json.loads(served.ask("GET", "/openapi.json")[2])
    assert document["openapi"] == "3.1.0"
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) >= set(options["fields"]["edits"]) | {"image", "mask"}
    served.draw()
    metrics = served.ask("GET", "/metrics")[2].decode()
    assert 's3dit_http_requests_total{method="POST",path="/v1/images/generations",status="200"}' in metrics
    for name in ("queued", "running", "batch_size_bucket", "pixels_total", "memory_bytes", "stage_seconds_total",
                 "first_partial_seconds_bucket"):  # fmt: skip
        assert f"s3dit_{name}" in metrics
    for path in ("/v1/none", "/v1/models/", "//", "/%00", "/health/", "/v1/images/edits/"):
        status, _, content = served.ask("GET", path)
        assert status == 404 and json.loads(content)["error"]["code"]
    assert served.ask("GET", "/v1/images/generations")[0] == 405 == served.ask("DELETE", "/health")[0]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{}", "text/plain", 415),
        (b"{}", "", 415),
        (b"", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"prompt": "a", "prompt": "b"}', "application/json", 400),
        (b'{"prompt": "a", "seed": NaN}', "application/json", 400),
        (b"[" * 1_000_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": "' + b"a" * 40_000 + b'"}', "application/json; charset=utf-8", 400),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b'{"prompt": "a", "region": ' + b"[" * 900 + b"]" * 900 + b"}", "application/json", 400),
        (b'{"prompt": "a", "\\ud800": 1}', "application/json", 400),
        (b'{"prompt": "a", "' + b"a" * 1_000_000 + b'": 1}', "application/json", 400),
        # Once with every key: in time that grows with their number and not with its square.
        (b"{" + b"".join(b'"%d":0,' % i for i in range(150_000)) + b'"149999":0}', "application/json", 400),
        (b"[" + b"[]," * 700_000 + b"[]]", "application/json", 413),
    ],
)  # fmt: skip
def test_bad_bodies(served, body, kind, status):
    found, _, content = served.ask("POST", "/v1/images/generations", body, Content_Type=kind)
    error = json.loads(content)["error"]
    assert found == status and set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 600


def test_what_stands_outside_of_the_body(served):
    """Fields in the URL, a body that is packed, a method that a path has not: none is passed over."""
    path, fields = "/v1/images/generations", {"prompt": "a star"} | SMALL
    status, _, content = served.ask("POST", f"{path}?size=64x64&seed=1", fields)
    assert (status, json.loads(content)["error"]["param"]) == (400, "size")
    assert served.ask("POST", path, fields, Content_Encoding="gzip")[0] == 415
    status, headers, _ = served.ask("PUT", path, fields)
    assert (status, headers["Allow"]) == (405, "POST")


def test_slow_clients(served, monkeypatch):
    """A head that comes byte by byte, a body that never ends, an answer that is not read; others are served."""
    monkeypatch.setattr(Connection, "asking", 0.6)
    monkeypatch.setattr(Connection, "taking", 0.6)

    def cut(text, then=b"", reads=True):
        """Seconds until the server cuts a connection, to which more is sent again and again."""
        with socket.socket() as link:
            if not reads:
                link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.settimeout(20)
            link.connect(("127.0.0.1", served.port))
            start = time.monotonic()
            with suppress(ConnectionError):
                link.sendall(text)
                while reads and not then and link.recv(1000):
                    pass
                while then and time.monotonic() < start + 20:
                    link.sendall(then)
                    time.sleep(0.05)
            return time.monotonic() - start

    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    stalled = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(20)]
    for link in stalled:
        link.sendall(head + b"Content-Length: 100\r\n\r\n{")
    assert served.draw()[0] == 200
    for link in stalled:
        link.close()
    # What is on its way, of all clients, has a bound too; what has come counts no more.
    with monkeypatch.context() as patch:
        patch.setattr(api, "READERS", 0)
        status, headers, _ = served.ask("POST", "/v1/images/generations", {"prompt": "a"})
        assert (status, headers["Retry-After"]) == (429, "1")
    assert served.draw(n=0)[0] == 400
    while served.server.api.coming:
        time.sleep(0.01)
    assert 0.5 < cut(b"") < 10 and 0.5 < cut(b"GET / HTTP/1.1\r\n", b"X: y\r\n") < 10
    # What is still sent after the answer, which is 405 here.
    assert cut(b"PUT / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n") < 10
    assert 0.5 < cut(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 200, b"X", reads=False) < 15


def test_bad_forms(served):
    kind = "multipart/form-data; boundary=b"

    def send(*parts):
        body = b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--b--\r\n"
        status, _, content = served.ask("POST", "/v1/images/edits", body, Content_Type=kind)
        return status, json.loads(content)["error"]["param"]

    prompt, file = b'name="prompt"\r\n\r\na star', b'name="image"; filename="a.png"\r\n\r\n'
    assert send(prompt) == (400, "image")
    assert send(prompt, b'name="image"\r\n\r\n/etc/passwd') == (400, "image")
    assert send(prompt, file + b"no picture") == (400, "image")
    assert send(file + png(Image.new("RGB", (64, 64)))) == (400, "prompt")
    assert send(prompt, b'name="style"; filename="s.safetensors"\r\n\r\nx') == (400, "style")
    assert send(prompt, file + png(Image.new("RGB", (64, 64))), b'name="foo"\r\n\r\nx') == (400, "foo")
    assert served.ask("POST", "/v1/images/edits", {"prompt": "x"})[0] == 415


def test_bounds_of_a_body():
    """By what it says of itself, and by what comes, whatever it said; and in time."""
    limits = Limits(body=2000, body_seconds=0.3)
    with running(serving=Serving(name="tiny", limits=limits, origins=("https://good.org",))) as server:
        for origin, status in (("https://good.org", 200), ("https://evil.org", 400)):
            asked = {"Origin": origin, "Access_Control_Request_Method": "POST",
                     "Access_Control_Request_Headers": "authorization,x-stainless-os"}  # fmt: skip
            found, headers, _ = server.ask("OPTIONS", "/v1/images/generations", **asked)
            assert found == status and (headers["Access-Control-Allow-Origin"] == origin) == (status == 200)
            assert server.ask("GET", "/v1/models", Origin=origin)[0] == (200 if status == 200 else 403)
        assert server.draw(prompt="a" * 3000)[0] == 413
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

        def raw(text):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as link:
                link.sendall((head + text).encode())
                return link.recv(4000).split(b"\r\n")[0]

        assert b"413" in raw("Transfer-Encoding: chunked\r\n\r\nfa0\r\n" + "a" * 4000 + "\r\n0\r\n\r\n")
        assert b"408" in raw("Content-Length: 100\r\n\r\n{")
        assert b"413" in raw("Content-Length: 99999999999999999999\r\n\r\n{")


def test_a_client_that_leaves_is_not_drawn_for(served):
    """Of a whole answer and of a stream: the next request does not wait for it."""
    for stream in (False, True):
        before = served.engine.stats().cancelled
        link = socket.create_connection(("127.0.0.1", served.port))
        body = json.dumps({"prompt": "a", "size": "64x64", "num_inference_steps": 200, "stream": stream}).encode()
        link.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        end = time.monotonic() + 30
        while not served.engine.stats().running and time.monotonic() < end:
            time.sleep(0.01)
        link.close()
        while served.engine.stats().cancelled == before and time.monotonic() < end:
            time.sleep(0.01)
        assert served.engine.stats().cancelled == before + 1 and not served.engine.stats().running


def test_a_full_queue_a_request_that_takes_long_and_a_dead_engine():
    with running(queue_limit=1, timeout=1.0) as server:
        answers = []
        long = {"num_inference_steps": 200}
        threads = [threading.Thread(target=lambda: answers.append(server.draw(**long))) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [status for status, _ in answers]
        assert set(statuses) == {429, 504}
        assert server.draw()[0] == 200
        server.engine.stop()
        assert server.draw()[0] == 503
        status, _, content = server.ask("GET", "/health")
        assert (status, json.loads(content)) == (503, {"status": "dead"})


def test_a_stop_under_load():
    """What is drawn is finished, what waits is handed back, nobody new comes in."""
    with running(serving=Serving(name="tiny", grace=30.0)) as server:
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(server.draw(num_inference_steps=6))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        while not server.engine.stats().running:
            time.sleep(0.01)
        server.server.should_exit = True
        for thread in threads:
            thread.join()
    statuses = {status for status, _ in answers}
    assert len(answers) == 4 and 200 in statuses and statuses <= {200, 503}
    with pytest.raises(ConnectionRefusedError):
        server.ask("GET", "/health")

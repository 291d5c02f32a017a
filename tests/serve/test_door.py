"""Who comes in, and what the log says of it: hosts, other sites' pages, keys."""

import asyncio
import json
import logging

import pytest

from s3dit.serve.door import LOOPBACK, OPEN, Door, digest

KEY = "a-key-of-the-operator"


def knock(door, path="/v1/models", method="GET", **headers):
    """Status, headers and JSON of what a door answers."""
    sent = []

    async def send(message):
        sent.append(message)

    headers = {"host": "localhost:8000"} | {name.replace("_", "-"): value for name, value in headers.items()}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items() if value is not None]
    asyncio.run(door({"type": "http", "method": method, "path": path, "headers": pairs}, None, send))
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])


async def inside(scope, receive, send):
    visit = scope["visit"]
    visit.size, visit.steps, visit.pictures, visit.user, visit.prompt = "64x64", 2, 1, "ann\n", "a secret"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame-options", b"SAMEORIGIN")]})
    await send({"type": "http.response.body", "body": b"{}"})


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:80", "LOCALHOST:1", "localhost."])
def test_a_loopback_server_knows_its_names(host):
    assert knock(Door(inside), host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["example.org", "localhost.example.org", "127.0.0.1.nip.io", "", "[", "x@evil.org", None]
)
def test_other_names_are_refused(host):
    status, _, body = knock(Door(inside), host=host)
    assert status == 403 and body["error"]["code"] == "wrong_host"
    assert knock(Door(inside, hosts=()), host=host)[0] == 200
    assert knock(Door(inside, hosts=(*LOOPBACK, "example.org")), host="example.org:99")[0] == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200), ("http://localhost:8000", 200), ("http://localhost:8001", 403), ("http://evil.org", 403),
        ("null", 403), ("https://good.org", 200), ("https://good.org.evil.org", 403),
    ],
)  # fmt: skip
def test_pages_of_other_sites_are_refused(origin, status):
    found, _, _ = knock(Door(inside, origins=("https://good.org",)), method="POST", origin=origin)
    assert found == status


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401), ("", 401), ("Bearer", 401), (f"Basic {KEY}", 401), (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401), ("Bearer é", 401), (f"Bearer {KEY}", 200), (f"bearer {KEY}", 200),
    ],
)  # fmt: skip
def test_a_key_opens(header, status):
    door = Door(inside, key=digest(KEY))
    found, headers, body = knock(door, authorization=header)
    assert found == status
    if status == 401:
        assert headers[b"www-authenticate"] == b"Bearer" and body["error"]["code"] == "invalid_api_key"
    assert all(knock(door, path=path)[0] == 200 for path in OPEN)
    assert KEY not in repr(door)


def test_what_every_answer_says():
    _, headers, _ = knock(Door(inside), x_request_id="abc-1")
    assert headers[b"x-request-id"] == b"abc-1" and headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"x-frame-options"] == b"SAMEORIGIN" and headers[b"cache-control"] == b"no-store"
    for odd in ("a b", "x" * 65, "\u00e9", "a\x00"):
        assert len(knock(Door(inside), x_request_id=odd)[1][b"x-request-id"]) == 16


def test_a_line_for_every_request(caplog):
    told = []
    with caplog.at_level(logging.INFO, "s3dit.serve"):
        knock(Door(inside, done=lambda *visit: told.append(visit[:3])), path="/v1/images/generations\n\x1b[2J")
        knock(Door(inside, log_prompts=True))
        knock(Door(inside, key=digest(KEY)))
    first, second, third = (record.getMessage() for record in caplog.records)
    assert "\n" not in first and "\x1b" not in first and "secret" not in first
    assert "GET" in first and " 200 " in first and "1x64x64 steps=2" in first and 'user="ann\\n"' in first
    assert 'prompt="a secret"' in second and " 401 " in third
    assert told == [("GET", "/v1/images/generations\n\x1b[2J", 200)]

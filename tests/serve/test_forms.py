"""Forms: what clients write is read byte for byte, and what is no form is refused whatever it holds."""

import random

import pytest

from s3dit.serve.errors import ApiError
from s3dit.serve.fields import Fields
from s3dit.serve.forms import MOST_PARTS, Part, fields_of, parts_of

TYPE = "multipart/form-data; boundary=frontier"


def form(*parts, end=b"--frontier--\r\n"):
    return b"".join(b"--frontier\r\n" + head + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + end


def named(name, more=b""):
    return b'Content-Disposition: form-data; name="' + name + b'"' + more


def test_bytes_come_as_they_are():
    """Every byte, line ends, and all but the boundary itself."""
    noise = random.Random(1).randbytes(10_000) + bytes(range(256)) + b"\r\n--frontie\r\n--\r\n--fro\r\n"
    body = form((named(b"image", b'; filename="a.png"\r\nContent-Type: image/png'), noise), (named(b"prompt"), b""))
    assert parts_of(TYPE, body) == [Part("image", noise, True), Part("prompt", b"", False)]


def test_what_an_encoder_writes_is_read():
    """urllib3's way is OpenAI's client's; curl and browsers quote the boundary, escape names, fold nothing."""
    httpx2 = pytest.importorskip("httpx2")
    files = {"image[]": ('ä "x".png', b"\x89PNG\r\n", "image/png")}
    request = httpx2.Request("POST", "http://x/", data={"prompt": "ein Stern ★\n", "n": "2"}, files=files)
    parts = parts_of(request.headers["content-type"], request.read())
    assert {(part.name, part.content, part.is_file) for part in parts} == {
        ("prompt", "ein Stern ★\n".encode(), False), ("n", b"2", False), ("image[]", b"\x89PNG\r\n", True),
    }  # fmt: skip
    quoted = 'multipart/form-data; charset=utf-8; boundary="frontier"'
    head = b"content-disposition:form-data;filename=x.png ;name=image\r\nContent-Transfer-Encoding: binary"
    assert parts_of(quoted, b"preamble\r\n" + form((head, b"1")) + b"epilogue") == [Part("image", b"1", True)]
    assert parts_of(TYPE, form((named(b"a%22b%0D%0A"), b"1"))) == [Part('a"b\r\n', b"1", False)]
    assert parts_of(TYPE, b"--frontier--\r\n") == []


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("multipart/form-data", b"", 415),
        ("multipart/mixed; boundary=frontier", b"", 415),
        ("multipart/form-data; boundary=" + "x" * 71, b"", 415),
        (TYPE, b"", 400),
        (TYPE, b"--frontier", 400),
        (TYPE, b"--frontier\r\n", 400),
        (TYPE, form((named(b"a"), b"1"), end=b""), 400),
        (TYPE, form((b"X: y", b"1")), 400),
        (TYPE, form((b"Content-Disposition: attachment; name=a", b"1")), 400),
        (TYPE, form((named(b"\xff"), b"1")), 400),
        (TYPE, form((named(b"a", b"\r\nContent-Transfer-Encoding: Base64"), b"MQ==")), 400),
        (TYPE, form((named(b"a") + b"\r\nX: " + b"y" * 4000, b"1")), 400),
        (TYPE, b"--frontierX\r\n" + named(b"a") + b"\r\n\r\n1\r\n--frontier--", 400),
        (TYPE, form(*[(named(b"a"), b"1")] * (MOST_PARTS + 1)), 413),
        (TYPE, b"\r\n--frontier" * 1_000_000, 413),
    ],
)  # fmt: skip
def test_what_is_no_form_is_refused(kind, body, status):
    with pytest.raises(ApiError) as caught:
        parts_of(kind, body)
    assert caught.value.status == status


def test_a_form_as_large_as_may_be_is_read():
    assert len(parts_of(TYPE, form(*[(named(b"a"), b"1")] * MOST_PARTS))) == MOST_PARTS


def test_texts_become_values():
    schemas = {name: each.schema for name, each in Fields("tiny", loras=("ink",)).of("edits").items()}

    def read(**texts):
        return fields_of([Part(name, text.encode(), False) for name, text in texts.items()], schemas)

    texts = {"sigmas": "[1, 0.5]", "variation": "0.3:7", "cache": '{"method": "taylor"}'}
    assert read(prompt="7", n="2", stream="true", **texts) == {
        "prompt": "7", "n": 2, "stream": True, "sigmas": [1, 0.5], "variation": "0.3:7", "cache": {"method": "taylor"},
    }  # fmt: skip
    lists = [Part("seed[]", b"1", False), Part("seed[]", b"2", False), Part("lora[]", b"ink", False)]
    assert fields_of(lists, schemas) == {"seed": [1, 2], "lora": ["ink"]}
    for parts, param in (
        ([Part("n", b"two", False)], "n"),
        ([Part("n", b"NaN", False)], "n"),
        ([Part("n", b"1", False)] * 2, "n"),
        ([Part("seed", b"1", False), Part("seed[]", b"1", False)], "seed"),
        ([Part("prompt", b"\xff", False)], "prompt"),
        ([Part("seed", b"[" * 100_000, False)], "seed"),
        ([Part("seed", b"[" + b"[]," * 100_000 + b"[]]", False)] * 7, None),
    ):
        with pytest.raises(ApiError) as caught:
            fields_of(parts, schemas)
        assert caught.value.param == param

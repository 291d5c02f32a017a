"""A cache in one word, its JSON, and what is refused of both."""

import json

import pytest

from s3dit.cache import Cache, read_calibration
from s3dit.errors import RequestError
from s3dit.request import Request

CALIBRATION = {"polynomial": [1.0, 0.5], "magnitudes": [[0.0, 1.0], [0.5, 0.9]], "r2": 0.9}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a:cache.json"
    path.write_text(json.dumps(CALIBRATION))
    return path


def test_forms():
    assert Cache.parse("taylor") == Cache("taylor") and Cache.parse("taylor:3") == Cache("taylor", 3.0)
    cache = Cache.parse("first-block:1e-1:order=2:first=5:last=2")
    assert cache == Cache("first-block", 0.1, order=2, first=5, last=2)
    assert Cache.parse(str(cache)) == cache
    assert (cache.limit, cache.degree, cache.always(28)) == (0.1, 2, (5, 26))
    assert [Cache(name).degree for name in ("taylor", "magnitude")] == [1, 0]
    assert [Cache("taylor").always(n) for n in (4, 28, 50)] == [(2, 3), (6, 27), (10, 49)]


def test_a_calibration_is_taken_in(file):
    for text, names in (
        ("magnitude:0.05", {"magnitudes"}), ("modulation", {"polynomial"}),
    ):  # fmt: skip
        cache = Cache.parse(f"{text}:{file}")
        assert cache.missing is None and set(cache.to_json()) & set(CALIBRATION) == names
        assert Cache.from_json(json.loads(json.dumps(cache.to_json()))).to_json() == cache.to_json()
    assert Cache.parse("magnitude").missing == "magnitudes"
    assert Cache("taylor").calibrated(CALIBRATION) == Cache("taylor")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacache", "cache method is 'teacache'; needed one of first-block"),
        ("taylor:x", "has 'x' in it; needed METHOD"),
        ("taylor:1:2", "has '2' in it"),
        ("taylor:1:order=4", "cache order is 4; needed an integer from 0 to 3"),
        ("taylor:1:order=x", "has 'x' for a number"),
        ("taylor:1.5", "cache threshold is 1.5; needed an integer"),
        ("magnitude:-1", "cache threshold is -1.0; needed a number from 0"),
        ("magnitude:1:nowhere.json", "'nowhere.json' cannot be read: FileNotFoundError"),
        (Cache("magnitude", magnitudes=[[0.0, 1.0], [0.0, 2.0]]), "needed pairs"),
        (Cache("magnitude", magnitudes=[[0.0, 1.0], [0.5, 0.0]]), "needed pairs"),
        (Cache("taylor", polynomial=[1.0]), "cache taylor reads no polynomial"),
        ("first-block:0.1:none.json", "cache first-block reads no calibration; leave 'none.json' out"),
        (Cache("modulation", polynomial=[float("nan")]), "needed 1 to 8 coefficients"),
        (Cache("taylor", last=None), "cache last is None"),
        (5, "cache is 5; needed METHOD"),
    ],
)
def test_wrong(text, message):
    with pytest.raises(RequestError, match=message):
        Request(prompt="a", cache=text)


@pytest.mark.parametrize("name", ["order", "first", "last"])
def test_a_count_is_an_integer(name):
    """A file may hold 3.0 there, which counts nothing."""
    with pytest.raises(RequestError, match=f"cache {name} is 3.0; needed an integer"):
        Request.from_json({"prompt": "a", "cache": {"method": "taylor", "threshold": 2.0, name: 3.0}})
    Cache("taylor", 2.0).check()


def test_wrong_calibrations(tmp_path):
    (path := tmp_path / "c.json").write_text("[1]")
    with pytest.raises(ValueError, match="needed a JSON object"):
        read_calibration(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="has no magnitudes"):
        Cache.parse(f"magnitude:{path}")


def test_a_request_carries_it(file):
    request = Request(prompt="a", cache=f"magnitude:0.05:{file}")
    data = json.loads(json.dumps(request.to_json()))
    file.unlink()
    assert Request.from_json(data).to_json() == request.to_json()
    assert request.cache.magnitudes == CALIBRATION["magnitudes"]


@pytest.mark.parametrize("cache", ["magnitude:/etc/cache.json", {"method": "taylor", "file": "x"}, {}, [1]])
def test_a_stranger_s_cache_names_no_file(cache):
    with pytest.raises(RequestError, match="replay data has a cache"):
        Request.from_json({"prompt": "a", "cache": cache})

"""Rows of a batch: what is read, what is wrong with a row, what its result depends on."""

import json

import pytest

from s3dit.batch.rows import derived_seed, joined, read_rows
from s3dit.errors import RequestError


@pytest.fixture
def read(tmp_path):
    def read(*rows, seed=0, defaults=None, settings=None):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
        return read_rows(path, seed, defaults or {}, settings or {})

    return read


def test_a_row_is_a_request(read):
    star, ring = read({"prompt": "a red star", "id": "star", "seed": 7}, b"", {"prompt": "a blue ring", "width": 96})
    assert (star.id, star.line, star.request().seed, star.error) == ("star", 1, 7, None)
    # An empty line is none, and counts.
    assert (ring.id, ring.line, ring.request().width) == ("3", 3, 96)
    assert ring.request().seed == derived_seed(0, "3") != derived_seed(1, "3")


WRONG = [
    (b"not json", "it is no JSON"),
    (b"[1]", "needed JSON lines"),
    (b'{"prompt": "a", "prompt": "b"}', "no JSON"),
    ({"prompt": "a star", "stepz": 3}, "stepz"),
    ({"seed": 3}, "it has no prompt"),
    ({"prompt": "a star", "num_inference_steps": 0}, "num_inference_steps is 0"),
    ({"prompt": "a star", "latents": [0.0]}, "no value of JSON"),
    ({"prompt": "a star", "id": True}, "its id is True"),
    ({"prompt": "a star", "id": "x" * 300}, "too long"),
    ({"prompt": "a star", "id": "\ud800"}, "its id is"),
    ({"prompt": "a star", "image": "missing.png"}, "missing.png"),
]


@pytest.mark.parametrize(("row", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_a_wrong_row_fails_alone(read, row, reason):
    wrong, right = read(row, {"prompt": "a blue ring"})
    assert reason in wrong.error and right.error is None


def test_an_id_that_is_there_twice_ends_the_batch(read):
    with pytest.raises(RequestError, match="line 1"):
        read({"prompt": "a", "id": "2"}, {"prompt": "b"})


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", ".hidden", "a/b", "C:\\a", "ä é", "con\x00"])
def test_an_id_is_no_path(read, name):
    (row,) = read({"prompt": "a red star", "id": name})
    assert not {"/", "\\", "\0", ":"} & set(row.name) and not row.name.startswith(".")


def test_the_digest_is_of_all_that_decides(read, tmp_path):
    def digest(row, **how):
        return read({"prompt": "a red star", "id": "a"} | row, **how)[0].digest

    same = digest({})
    assert digest({}) == same
    others = [
        digest({"prompt": "a red ring"}), digest({}, seed=1), digest({}, defaults={"num_inference_steps": 3}),
        digest({}, settings={"model": "embedded-base"}),
    ]  # fmt: skip
    (tmp_path / "start.png").write_bytes(b"one")
    others.append(digest({"image": "start.png"}))
    (tmp_path / "start.png").write_bytes(b"two")
    others.append(digest({"image": "start.png"}))
    assert len({same, *others}) == 1 + len(others)


def test_what_shares_a_pass(read):
    rows = read(
        {"prompt": "a red star", "seed": 1}, {"prompt": "a blue ring", "seed": 2},
        {"prompt": "a blue ring", "solver": "heun"}, {"prompt": "a blue ring", "variation": 0.5},
    )  # fmt: skip
    first, second, other, alone = (row.shares for row in rows)
    assert first == second != other and alone is None
    request = joined([row.request() for row in rows[:2]])
    assert request.prompt == ["a red star", "a blue ring"] and request.seed == [1, 2]

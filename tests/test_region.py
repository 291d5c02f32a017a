"""What the user may say of a region: the command line's form, what is refused, and JSON there and back."""

import numpy as np
import pytest

from s3dit.errors import RequestError
from s3dit.region import Region
from s3dit.request import Request


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("left.png:a red star", Region("left.png", "a red star")),
        ("left.png@0.5: a star: red", Region("left.png", "a star: red", 0.5)),
        ("left.png@0.5@centered:a star", Region("left.png", "a star", 0.5, True)),
        ("me@home.png@centered:a star", Region("me@home.png", "a star", centered=True)),
        ("0,0,64,128:a red star", Region((0, 0, 64, 128), "a red star")),
        ("0.5,0,.5,1@2:a, b", Region((0.5, 0, 0.5, 1), "a, b", 2.0)),
        ("C:\\m\\left.png:a red star", Region("C:\\m\\left.png", "a red star")),
        ("a.png:", Region("a.png", "")),
    ],
)
def test_the_form_of_the_command_line(text, region):
    assert Region.parse(text) == region
    region.check()
    assert Region.parse(str(region)) == region and Region.from_json(region.to_json()) == region


def test_names_of_files_that_exist_are_as_long_as_they_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("12:30@0.5", "1,2,3,4"):
        (tmp_path / name).touch()
    assert Region.parse("12:30@0.5:a:b") == Region("12:30@0.5", "a:b")
    assert Region.parse("12:30@0.5@2:a") == Region("12:30@0.5", "a", 2.0)
    assert Region.parse("1,2,3,4:a") == Region("1,2,3,4", "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [("left.png", "has no colon"), ("a.png@1.2.3:b", "weight is '1.2.3'"), ("1..2,0,3,4:a", "'1..2,0,3,4' for a box")],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        Region.parse(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Region(3, "a"), "region mask is 3"),
        (Region("", "a"), "region mask is ''"),
        (Region((1, 2, 3), "a"), "region mask is"),
        (Region((0, 0, 0, 5), "a"), "region box is"),
        (Region((-1, 0, 5, 5), "a"), "region box is"),
        (Region((float("nan"), 0, 5, 5), "a"), "region box is"),
        (Region((0, 0, 10**400, 5), "a"), "region box is"),
        (Region("a.png", "a", 0), "region weight is 0"),
        (Region("a.png", "a", 1e-50), "region weight is 1e-50"),
        ([[None], None], "region is a list; needed a Region"),
        (Region("a.png", "a", float("nan")), "region weight is nan"),
        (Region("a.png", "a", True), "region weight is True"),
        (Region("a.png", "a", 1, 1), "region centered is 1"),
        (Region("a.png", 5), "region prompt is 5"),
        ("left.png:a", "region is 'left.png:a'"),
        ([Region("a.png", "a")] * 17, "at most 16 a picture"),
        ([[Region("a.png", "a")], Region("a.png", "a")], "mixes Regions and lists"),
        ([[Region("a.png", "a")]] * 3, "region has 3 entries; needed 1 or 2"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(RequestError, match=message):
        Request(prompt=["a", "b"], region=given)


def test_a_box_of_other_libraries_numbers_is_one_of_python():
    assert Region((np.int64(0), np.float32(0.5), 1, 1), "a").to_json()["mask"] == [0, 0.5, 1, 1]


def test_a_weight_of_the_prompt_needs_regions():
    with pytest.raises(RequestError, match="base_weight is given without region"):
        Request(prompt="a", base_weight=0.5)
    Request(prompt="a", base_weight=0.5, region=Region("a.png", "b"))


def test_one_list_for_all_or_one_a_prompt():
    left, right = Region("left.png", "a"), Region("right.png", "b")
    assert Request(prompt=["a", "b"], region=[left, right]).regions() == [[left, right]] * 2
    assert Request(prompt=["a", "b"], region=[[left], None]).regions() == [[left], []]
    two = Request(prompt=["a", "b"], region=[[left], [right, left]], num_images_per_prompt=2)
    assert two.regions() == [[left], [left], [right, left], [right, left]]


def test_json_and_back():
    given = [[Region("left.png", "a", 0.5)], None, [Region((0, 0, 1, 1), "b", centered=True)]]
    request = Request(prompt=["a", "b", "c"], region=given, base_weight=0.25)
    data = request.to_json()
    assert data["region"] == [
        [{"mask": "left.png", "prompt": "a", "weight": 0.5}], None, [{"mask": [0, 0, 1, 1], "prompt": "b",
                                                                     "centered": True}]
    ]  # fmt: skip
    back = Request.from_json(data)
    assert back.base_weight == 0.25 and back.to_json() == data
    assert back.regions()[2][0].box == (0, 0, 1, 1)
    unnamed = Region(np.zeros((8, 8)), "a")
    assert not unnamed.named and unnamed.to_json() == {"prompt": "a"}


@pytest.mark.parametrize(
    "region",
    [
        5,
        ["x"],
        [[None]],
        [{"mask": "a"}],
        [{"mask": {}, "prompt": "a"}],
        [{"mask": "a", "prompt": "a", "x": 1}],
        [[[]]],
    ],
)
def test_json_of_strangers(region):
    with pytest.raises(RequestError, match="region"):
        Request.from_json({"prompt": "a", "region": region})

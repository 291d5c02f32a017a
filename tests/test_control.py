"""What the user may say of a control: the command line's form, what is refused, and JSON there and back."""

from pathlib import Path

import pytest

from s3dit.control import Control
from s3dit.errors import RequestError
from s3dit.request import Request


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ("a.safetensors:pose.png", Control("a.safetensors", "pose.png")),
        ("a:pose.png:0.8", Control("a", "pose.png", 0.8)),
        ("a:pose.png:0.8:0-0.7", Control("a", "pose.png", 0.8, end=0.7)),
        ("a:pose.png:0.25-1", Control("a", "pose.png", start=0.25)),
        ("a:/poses/pose.png:0", Control("a", "/poses/pose.png", 0.0)),
        ("/m/a:/poses/p.png:version=2.0:rule=diffusers:0.5", Control("/m/a", "/poses/p.png", 0.5, version="2.0",
                                                                   rule="diffusers")),
        ("a::0.9:inpaint=photo.png:mask=m.png", Control("a", None, 0.9, inpaint="photo.png", mask="m.png")),
        ("a:inpaint=photo.png:mask=m.png", Control("a", inpaint="photo.png", mask="m.png")),
        ("C:\\m\\a:D:\\p.png:0.5", Control("C:\\m\\a", "D:\\p.png", 0.5)),
    ],
)  # fmt: skip
def test_the_form_of_the_command_line(text, control):
    assert Control.parse(text) == control
    control.check()


def test_a_colon_in_the_name_of_a_file_that_exists(tmp_path, monkeypatch):
    """Names of files are as long as they can be; what is not there ends at its first colon, as ever."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs: old")
    folder.mkdir()
    net, pose, photo = (folder / name for name in ("2.1: final", "12:30.png", "a = b: 0.5.png"))
    for path in (net, pose, photo):
        path.touch()
    for text, control in (
        (f"{net}:{pose}:0.5:0-0.7", Control(str(net), str(pose), 0.5, end=0.7)),
        (f"{net}:{photo}", Control(str(net), str(photo))),
        (f"a:inpaint={photo}:mask={pose}:0.4", Control("a", None, 0.4, inpaint=str(photo), mask=str(pose))),
        (f"{net}::0.5:mask={pose}:inpaint=b", Control(str(net), None, 0.5, inpaint="b", mask=str(pose))),
    ):
        assert Control.parse(text) == control
    with pytest.raises(ValueError, match="needed FILE:IMAGE"):
        Control.parse("a:runs: new/12:30.png")


@pytest.mark.parametrize(
    "text", ["a:b:c", "a:b:0.5:0.6", "a:b:0.5:0-0.5:0.1-1", "a:b:0-", "a:b:mask=x:mask=y", "a:b:x=1"]
)
def test_another_form_is_refused(text):
    with pytest.raises(ValueError, match="needed FILE:IMAGE"):
        Control.parse(text)


WRONG = [
    (Control("a"), "a has no image"),
    (Control("", "b"), "control model is ''"),
    (Control(3, "b"), "control model is 3"),
    (Control("a", "b", -0.1), "strength is -0.1"),
    (Control("a", "b", 2.5), "needed a number from 0 to 2"),
    (Control("a", "b", float("nan")), "strength is nan"),
    (Control("a", "b", True), "strength is True"),
    (Control("a", "b", "1"), "strength is '1'"),
    (Control("a", "b", start=None), "start is None"),
    (Control("a", "b", start=-0.1), "start is -0.1"),
    (Control("a", "b", end=1.1), "end is 1.1"),
    (Control("a", "b", start=0.5, end=0.5), "from 0.5 to 0.5 of the steps, which is none"),
    (Control("a", "b", start=0.7, end=0.2), "needed start below end"),
    (Control("a", "b", version="3.0"), "version is '3.0'; needed one of 1.0, 2.0, 2.1"),
    (Control("a", "b", rule="mine"), "rule is 'mine'; needed one of authors, diffusers"),
    (Control("a", "b", inpaint="c"), "inpaint but no mask"),
    (Control("a", "b", mask="c"), "mask but no inpaint"),
    (Control("a", ["b", "c", "d"]), "control image has 3 entries"),
    ("a:b", "control is 'a:b'; needed a Control"),
    ([Control("a", "b"), "x"], "needed a Control, or a list"),
]


@pytest.mark.parametrize(("control", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_is_wrong_is_one_request_error(control, words):
    with pytest.raises(RequestError, match=words) as found:
        Request(prompt=["x", "y"], control=control).check()
    assert "\n" not in str(found.value)


def test_json_there_and_back():
    given = [Control("a", "b.png", 0.5, end=0.7), Control(Path("m/c"), inpaint="p", mask=Path("m"), version="2.0")]
    request = Request(prompt="x", control=given)
    data = request.to_json()
    assert data["control"][0] == {"model": "a", "image": "b.png", "strength": 0.5, "end": 0.7}
    back = Request.from_json(data)
    assert back.controls == [given[0], Control("m/c", inpaint="p", mask="m", version="2.0")]
    assert "control" not in Request(prompt="x").to_json()
    for odd in (3, {"image": "b"}, {"model": "a", "weight": 1}):
        with pytest.raises(RequestError, match="replay data has a control"):
            Request.from_json({"prompt": "x", "control": [odd]})
    with pytest.raises(RequestError, match="control of 3"):
        Request.from_json({"prompt": "x", "control": 3})


def test_files_are_named():
    assert Control("a", [Path("b"), "c"]).to_json()["image"] == ["b", "c"]
    assert Control("a", ["b", "c"]).named and Control("a", "b").named and not Control("a", ["b", object()]).named
    assert Control("a", object()).to_json() == {"model": "a"}


def test_controls_of_one_picture():
    control = Control("a", ["one.png", "two.png"], inpaint="p", mask="m")
    request = Request(prompt=["x", "y"], num_images_per_prompt=2, control=control)
    assert [request.controls_of(i)[0].image for i in range(4)] == ["one.png", "one.png", "two.png", "two.png"]
    assert request.controls_of(3)[0] == Control("a", "two.png", inpaint="p", mask="m")


def test_steps_in_which_it_acts():
    """A range holds the steps that begin in it, so that two that meet share none and leave none out."""
    early, late = Control("a", "b", end=0.5), Control("a", "b", start=0.5)
    for n in (1, 4, 7, 8):
        assert [early.acts(i, n) + late.acts(i, n) for i in range(n)] == [1] * n
    assert [Control("a", "b", end=0.7).acts(i, 8) for i in range(8)] == [True] * 6 + [False] * 2
    assert not Control("a", "b", 0.0).acts(0, 1)


def test_drives_of_windows_with_either_slash(monkeypatch):
    monkeypatch.setattr("s3dit.control.COLON", r":(?![\\/])")
    control = Control.parse(r"C:/m/a:D:\p.png:0.5:mask=C:/m.png:inpaint=p.png")
    assert control == Control("C:/m/a", r"D:\p.png", 0.5, mask="C:/m.png", inpaint="p.png")

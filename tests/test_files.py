"""Files of people: what is opened, which prompts a file holds, which names pictures take."""

import os
import socket
import stat

import pytest

from s3dit import files
from s3dit.errors import RequestError
from s3dit.files import claimed, opened, outputs, prompts, whole


def special(tmp_path):
    """(what it is, path) of everything that is no regular file with something in it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
    return [
        ("a pipe", tmp_path / "pipe"),
        ("a folder", tmp_path / "folder"),
        ("empty", tmp_path / "empty"),
        ("a device", tmp_path / "link"),
        ("1,099,511,627,776 bytes", tmp_path / "huge"),
        ("a socket", tmp_path / "socket"),
        *(("a device", f"/dev/{name}") for name in ("zero", "null", "tty")),
    ]


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    paths = special(tmp_path)
    # Not even opened: that alone would set some devices going.
    monkeypatch.setattr(os, "open", lambda *args: pytest.fail("opened"))
    for found, path in paths:
        with pytest.raises(RequestError, match=found) as caught, opened(path, "text", 9):
            pass
        assert str(path) in str(caught.value) and "needed text" in str(caught.value)


def test_a_file_that_becomes_a_pipe_meanwhile_does_not_hang(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "stat", lambda path: os.lstat(tmp_path / "file"))
    with pytest.raises(RequestError, match="a pipe"), opened(tmp_path / "pipe", "text", 9):
        pass


@pytest.mark.parametrize("name", ["a\0b", "a\ud800", "n" * 300, "file/under"])
def test_names_that_cannot_be(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="cannot be read"), opened(name, "text", 9):
        pass


FOUND = {
    "plain": (b"a fox\n\n  a star \r\nthe last", ["a fox", "a star", "the last"]),
    "a mark": (b"\xef\xbb\xbfa fox\n", ["a fox"]),
    "old Macintosh": (b"a fox\ra star\r", ["a fox", "a star"]),
    "not an end of a line": (
        "a\u2028b\u2029c\vd\fe\x1cf\x1dg\x1eh\x85i\n\u3000j".encode(),
        ["a\u2028b\u2029c\vd\fe\x1cf\x1dg\x1eh\x85i", "\u3000j"],
    ),
    "only blanks": ("a\n \t\u3000\nb".encode(), ["a", "b"]),
    "UTF-16, as PowerShell writes it": ("a 狐\r\nb".encode("utf-16"), ["a 狐", "b"]),
    "UTF-16, big end first": (b"\xfe\xff" + "a 狐\r\nb".encode("utf-16-be"), ["a 狐", "b"]),
    "UTF-32": ("a 狐\nb".encode("utf-32"), ["a 狐", "b"]),
    "as many as can be": (b"a\n" * files.MOST_PROMPTS, ["a"] * files.MOST_PROMPTS),
}


@pytest.mark.parametrize("name", FOUND)
def test_prompts_of_a_file(tmp_path, name):
    data, lines = FOUND[name]
    (tmp_path / "p.txt").write_bytes(data)
    assert prompts(str(tmp_path / "p.txt")) == lines


WRONG = {
    "latin-1": ("é".encode("latin-1"), "cannot be read .*utf-8"),
    "UTF-16 without a mark": ("a fox".encode("utf-16-le"), "holds zero bytes"),
    "half of a UTF-16": ("a fox".encode("utf-16")[:-1], "cannot be read .*utf-16"),
    "half of a pair": (b"\xed\xa0\x80", "cannot be read"),
    "nothing": (b"\xef\xbb\xbf\n \n", "holds no prompt"),
    "a million": (b"a\n" * 1_000_000, "1,000,000 prompts; needed at most 1,024"),
    "too long": (b"a" * ((1 << 24) + 1), "16,777,217 bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_file_of_prompts(tmp_path, name):
    data, words = WRONG[name]
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(RequestError, match=words):
        prompts(str(tmp_path / "p.txt"))


def test_names_of_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def names(given, pictures, overwrite=False):
        paths, replace = outputs(given, pictures, overwrite)
        return [str(path) for path in paths], replace

    assert names(None, 1) == (["s3dit.png"], False) and names(None, 2) == (["s3dit-1.png", "s3dit-2.png"], False)
    assert names("a.JPG", 1) == (["a.JPG"], True) and names("a.webp", 2) == (["a-1.webp", "a-2.webp"], False)
    assert names("new/a.png", 1) == (["new/a.png"], True) and names("new/", 1) == (["new/s3dit.png"], False)
    assert list(tmp_path.iterdir()) == []
    # what nobody named is never replaced
    for name in ("s3dit.png", "s3dit-3.png"):
        (tmp_path / name).touch()
    (tmp_path / "s3dit-2.png").symlink_to("nowhere")
    assert names(None, 1) == (["s3dit-4.png"], False)
    assert names(None, 3) == (["s3dit-1.png", "s3dit-4.png", "s3dit-5.png"], False)
    assert names(None, 1, True) == (["s3dit.png"], True)
    # a folder takes the name that is free in it
    (tmp_path / "x.png").mkdir()
    assert names("x.png", 1) == (["x.png/s3dit.png"], False) and names(".", 1) == (["s3dit-4.png"], False)
    # one file that was named is replaced, several only when asked for
    (tmp_path / "a-2.png").touch()
    assert names("a-2.png", 1) == (["a-2.png"], True)
    with pytest.raises(RequestError, match="1 of the 3 outputs exist, such as a-2.png; .* --overwrite"):
        outputs("a.png", 3, False)
    assert names("a.png", 3, True) == (["a-1.png", "a-2.png", "a-3.png"], True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a", "output is 'a'; needed a name that ends in .png, .jpg, .jpeg or .webp, or a folder"),
        ("a.gif", "needed a name"),
        ("", "needed a name"),
        ("pipe.png", "output pipe.png is a pipe; needed a file"),
        ("file/a.png", "cannot be written"),
        ("n" * 300 + ".png", "File name too long"),
        ("n" * 300 + "/a.png", "File name too long"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=words):
        outputs(given, 1, False)
    assert sorted(os.listdir()) == ["file", "pipe.png"]


def test_a_claimed_name_was_free_and_is_given_back(tmp_path):
    path = tmp_path / "new" / "a.png"
    with claimed(path) as first, claimed(path) as second:
        assert (first.name, second.name) == ("a.png", "a-2.png") and first.exists()
    assert second.exists()
    with pytest.raises(KeyboardInterrupt), claimed(path) as third:
        assert third.name == "a-3.png"
        raise KeyboardInterrupt
    assert sorted(one.name for one in path.parent.iterdir()) == ["a-2.png", "a.png"]
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot be written"), claimed(tmp_path / "file" / "a.png"):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), ValueError("no")])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, error):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RequestError), whole(path) as file:
        file.write(b"half")
        raise error
    assert [one.name for one in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"old"
    with whole(tmp_path / "new" / "er" / "b") as file:
        file.write(b"all")
    assert (tmp_path / "new" / "er" / "b").read_bytes() == b"all"
    assert stat.S_ISREG((tmp_path / "new" / "er" / "b").stat().st_mode)

"""What reaches a terminal: every line one line, printable, short; streams that fail; signals that end."""

import ast
import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from s3dit import terminal
from s3dit.terminal import LONGEST, Stopped, event, finish, hushed, line, paint, say, stoppable, streams, tell

ROOT = Path(__file__).resolve().parents[1]

HIDDEN = {
    "escape": ("\x1b[31mred", r"\x1b[31mred"),
    "line feed": ("a\nb", r"a\nb"),
    "carriage return": ("done\rgone", r"done\rgone"),
    "vertical tab, form feed": ("\v\f", r"\x0b\x0c"),
    "next line": ("\x85", r"\x85"),
    "C1": ("\x9b31m", r"\x9b31m"),
    "line separators": ("\u2028\u2029", r"\u2028\u2029"),
    "right to left": ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
    "no width": ("a\u200b\u200d\ufeff\u2060", r"a\u200b\u200d\ufeff\u2060"),
    "no width, printable": ("\u034f\u3164\ufe0f\u2800\U000e0101", r"\u034f\u3164\ufe0f\u2800\U000e0101"),
    "tags": ("\U000e0041", r"\U000e0041"),
    "half of a pair": ("\ud800", r"\ud800"),
    "a byte that is no UTF-8": ("a\udcff", r"a\xff"),
    "a space that is none": ("a\xa0b", r"a\xa0b"),
    "zero": ("\0", r"\x00"),
    "buried": ("e" + "\u0301" * 6, "e" + "\u0301" * 4 + r"\u0301\u0301"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_not_seen_is_shown(name):
    text, shown = HIDDEN[name]
    assert line(text) == shown


def test_what_is_seen_stays():
    text = "a fox × 狐 “quoted” é e\u0301 …  two spaces, C:\\x"
    assert line(text) == text and line(5) == "5"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"2x3 ... \u72d0 \xe9 \u042f \xff"),
        ("cp1251", "2x3 … \\u72d0 \\xe9 Я \\xff"),
        ("cp866", "2x3 ... \\u72d0 \\xe9 Я \\xff"),
        ("latin-1", "2×3 ... \\u72d0 é \\u042f \\xff"),
        ("utf-16", "2×3 … 狐 é Я \\xff"),
    ],
)
def test_any_code_page(encoding, shown):
    assert line("2×3 … 狐 é Я \udcff", encoding) == shown
    shown.encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("one", ["x", "狐", "\x1b", "\U000e0041"])
@pytest.mark.parametrize("count", [598, 600, 601, 1199, 1201, 50_000])
def test_a_line_keeps_both_ends_and_says_what_it_left_out(one, count, encoding):
    text = "found: " + one * count + "; do this"
    shown = line(text, encoding)
    assert len(shown) <= LONGEST and shown.isprintable()
    assert shown.startswith("found: ") and shown.endswith("; do this")
    if "left out" in shown:
        # What is left of the long part, and the number, are all of it: no escape is cut in two.
        start, _, rest = shown.removeprefix("found: ").partition(" [")
        number, _, end = rest.removesuffix("; do this").partition(" characters left out] ")
        width = len(line(one, encoding))
        assert len(start) % width == len(end) % width == 0
        assert (len(start) + len(end)) // width + int(number.replace(",", "")) == count
    else:
        assert count * len(line(one, encoding)) + 16 <= LONGEST


def test_a_cut_line_stays_as_it_is():
    once = line("\x1b狐" * 9999, "ascii")
    assert line(once, "ascii") == once


class Full(io.StringIO):
    """A stream on a full disk."""

    def flush(self):
        raise OSError(28, "No space left on device")


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize(
    ("stream", "code", "words"),
    [
        (Full(), 2, "standard output cannot be written (No space left on device)"),
        (None, 2, "standard output cannot be written (Bad file descriptor)"),
        (Gone(), 141, None),
    ],
)
def test_a_lost_stdout_ends_nothing_but_is_said(stream, code, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", stream)
    with streams():
        tell("a")
        event(event="b")
        assert finish(0) == code and finish(3) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == (words is not None) and (words or "") in err


@pytest.mark.parametrize("stream", [Full(), None, Gone()])
def test_a_lost_stderr_ends_nothing(stream, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", stream)
    with streams():
        say("a")
        paint("b")
        with terminal.bar("c", total=2) as bar:
            bar.update(1)
        tell("d")
        assert finish(0) == 0
    assert capsys.readouterr().out == "d\n"


def test_streams_and_warnings_are_the_callers_again(capsys):
    before = sys.stdout, sys.stderr, warnings.showwarning
    with streams():
        warnings.warn("two\nlines \x1b[2J", stacklevel=1)
        print("×…")
    assert (sys.stdout, sys.stderr, warnings.showwarning) == before
    captured = capsys.readouterr()
    assert captured.err == "s3dit: two\\nlines \\x1b[2J\n" and captured.out == "×…\n"


def test_what_others_print_fits_the_code_page(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp866"))
    with streams():
        print("128×128 … 狐")
    assert raw.getvalue() == b"128x128 ... \\u72d0\n"


def test_several_lines_are_each_one(capsys):
    tell("a\x1b\nb\u2028c\n" + "y" * 700)
    first, second, third = capsys.readouterr().out.splitlines()
    assert (first, second) == ("a\\x1b", "b\\u2028c") and len(third) <= LONGEST


def test_events_are_json_whatever_they_hold(capsys):
    event(path="\udcff\u2028狐" + "x" * 700)
    out = capsys.readouterr().out
    assert out.isascii() and len(out.splitlines()) == 1
    assert json.loads(out) == {"path": "\udcff\u2028狐" + "x" * 700}


def test_a_line_said_beside_a_bar_is_a_line(capsys):
    with terminal.bar("\x1bwork", total=2) as bar:
        bar.update(1)
        say("note")
    # The bar is blanked from the start of its line, then comes the note.
    err = capsys.readouterr().err
    assert "\rs3dit: note\n" in err and "\r\\x1bwork:  50%" in err


def test_a_library_that_prints_past_python_is_hushed(capfd):
    with hushed():
        os.write(2, b"noise")
    os.write(2, b"kept")
    assert capfd.readouterr().err == "kept"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_raises_once_and_handlers_come_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    cleaned = []
    with pytest.raises(Stopped) as caught, stoppable():
        try:
            signal.raise_signal(number)
        finally:
            # The user presses again while things are removed.
            signal.raise_signal(signal.SIGINT)
            cleaned.append(True)
    assert cleaned and caught.value.code == 128 + number and isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(number) is before


def test_a_later_signal_is_taken_again(monkeypatch):
    monkeypatch.setattr(terminal, "QUIET", 0.0)
    with stoppable():
        for _ in range(2):
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGTERM)


def test_a_signal_whose_exception_got_lost_ends_it_at_the_next_line(monkeypatch, capsys):
    """As happens in finalizers: Python prints it and goes on."""
    monkeypatch.setattr(terminal, "LOST", 0.0)
    with pytest.raises(Stopped) as caught, streams(), stoppable():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        say("goes on")
    assert caught.value.code == 143 and capsys.readouterr().err == ""
    with streams(), stoppable():
        say("another time")


def test_no_import_is_torn(tmp_path, monkeypatch):
    """A library of which a half was imported would draw on; the signal waits until it is whole."""
    source = "import signal, time\nsignal.raise_signal(signal.SIGTERM)\ntime.sleep(0.1)\nwhole = True"
    (tmp_path / "slowly_imported.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Stopped) as caught, stoppable():
        import slowly_imported  # type: ignore[import-not-found]

        time.sleep(5)
    assert slowly_imported.whole and caught.value.code == 143


def test_handlers_of_the_caller_stay(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append(1))
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
        assert seen == [1] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, hangup)


def test_another_thread_is_left_alone():
    found = []

    def work():
        with stoppable():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def printing(text):
    """Lines of a source that write to a terminal by themselves."""
    for node in ast.walk(ast.parse(text)):
        named = isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "tqdm", "trange", "os.write")
        if named or (isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr")):
            yield node.lineno


def test_nothing_else_prints():
    assert [*printing("print(1)")] == [1] and [*printing("import sys\nsys.stderr.write('')")] == [2]
    wrong = {
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("s3dit", "kernels", "weights")
        for path in (ROOT / folder).glob("*.py")
        for number in printing(path.read_text(encoding="utf-8"))
        # The entry has to end before anything is imported.
        if path.name not in ("terminal.py", "__main__.py")
    }
    assert not wrong

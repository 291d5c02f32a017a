"""Seconds of stages: exclusive of what is begun inside, and in results."""

import time

from s3dit import Pipeline
from s3dit.runtime import stopwatch
from s3dit.runtime.stopwatch import Stopwatch


def test_a_stage_inside_another_counts_for_itself(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 9.0, 20.0, 22.0])
    monkeypatch.setattr(stopwatch, "time", type("time", (), {"perf_counter": lambda: next(now)}))
    clock = Stopwatch()
    with clock.stage("outer"), clock.stage("inner"):
        pass
    assert clock.seconds == {"outer": 1.0 + 5.0, "inner": 3.0}
    with clock.measured() as spent, clock.stage("inner"):
        pass
    assert spent == {"inner": 2.0} and clock.seconds["inner"] == 5.0


def test_the_seconds_of_a_picture():
    pipe = Pipeline.load(device="cpu")
    request = {"prompt": "a red star", "num_inference_steps": 1, "height": 64, "width": 64, "seed": 1}
    start = time.perf_counter()
    first = pipe(**request)
    took = time.perf_counter() - start
    stages = {"text_encoder", "transformer", "vae decode"}
    assert set(first.seconds) == stages | {"load text_encoder", "load transformer", "load vae"}
    assert all(seconds > 0 for seconds in first.seconds.values()) and sum(first.seconds.values()) <= took
    # The prompt's features are kept. Files of one request are the same bytes, so seconds are not in them.
    again = pipe(**request)
    assert set(again.seconds) == {"transformer", "vae decode", "load transformer", "load vae"}
    assert again.metadata == first.metadata and "seconds" not in str(first.metadata)


def test_the_log_says_what_was_loaded_and_how_long_it_took(caplog, capsys):
    """Under the name s3dit, and nothing is printed."""
    pipe = Pipeline.load(device="cpu")
    request = {"prompt": "a red star", "num_inference_steps": 1, "height": 64, "width": 64, "seed": 1}
    with caplog.at_level("INFO", logger="s3dit"):
        pipe(**request)
    assert [record.name.partition(".")[0] for record in caplog.records] == ["s3dit"] * 4
    loaded = [f"loaded {part} on cpu" for part in ("text_encoder", "transformer", "vae")]
    assert caplog.messages[:3] == loaded and caplog.messages[3].startswith("drew 1 of tiny; seconds: ")
    assert capsys.readouterr() == ("", "")

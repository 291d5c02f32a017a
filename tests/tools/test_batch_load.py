"""The load of a batch on a Ray cluster ends with a fault where what it is about did not happen."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from batch_load import faults_of_events, faults_of_results, write_rows  # noqa: E402

EVENTS = {"node joined at": 3, "worker killed at": 6}
SPANS = {"first": (1, 6), "joined": (4, 9), "replaces": (8, 10)}


@pytest.mark.parametrize(
    ("events", "spans", "word"),
    [
        (EVENTS, SPANS, None),
        ({"worker killed at": 6}, SPANS, "no node joined"),
        ({"node joined at": 3}, SPANS, "no worker killed"),
        (EVENTS, SPANS | {"joined": (7, 7)}, "at once"),
        (EVENTS, {"first": (1, 9), "joined": (4, 10)}, "2 workers drew"),
    ],
)
def test_events_that_did_not_happen(events, spans, word):
    faults = faults_of_events(events, spans)
    assert not faults if word is None else len(faults) == 1 and word in faults[0]


def test_rows_without_their_result(tmp_path):
    reasons = write_rows(tmp_path / "rows.jsonl", 4, 1)
    (name, reason), results = *reasons.items(), [{"id": f"row/{i}", "files": {}} for i in range(4)]
    (wrong,) = (result for result in results if result["id"] == name)
    wrong["error"] = f"it is said that {reason}"
    path = tmp_path / "results.jsonl"

    def faults():
        path.write_text("".join(f"{result}\n".replace("'", '"') for result in results))
        return faults_of_results(tmp_path, results, 4, reasons)

    assert faults() == []
    wrong["error"] = "something else"
    assert len(faults()) == 1
    results[0] = results[1]
    assert "4 rows have 4 results of 3 ids" in faults()[0]

"""`s3dit batch` with the embedded model: one result a row, pictures as drawn alone, workers that die."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from s3dit import Pipeline
from s3dit.batch import processes
from s3dit.batch.results import Results
from s3dit.cli.main import main

SMALL = ("--size", "64x64", "--steps", "1", "--device", "cpu", "--json")
ROWS = [
    {"prompt": "a red star", "id": "star", "seed": 7},
    {"prompt": "a blue ring", "id": "../ring"},
    {"prompt": "a green circle", "id": "wrong", "height": 65},
    {"prompt": "a blue ring", "width": 96, "id": "wide"},
]


@pytest.fixture
def batch(tmp_path, capsys):
    """Run the command on rows -> exit code, the results printed, the output's folder."""

    def run(rows, *options):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        code = main(["batch", str(path), "-o", str(tmp_path / "out"), *SMALL, *options])
        printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return code, printed, tmp_path / "out"

    return run


def check(folder: Path, rows) -> None:
    """Every row has one result, and every picture is that of the pipeline alone."""
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert sorted(result["id"] for result in results) == sorted(row["id"] for row in rows)
    files = {name: sha for result in results for name, sha in result.get("files", {}).items()}
    assert files == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.png")}
    pipe = Pipeline.load(device="cpu")
    for result in results:
        for name in result.get("files", ()):
            with Image.open(folder / name) as picture:
                record = json.loads(picture.text["s3dit"])
                fields = {key: record[key] for key in ("prompt", "seed", "height", "width", "num_inference_steps")}
                assert picture.tobytes() == pipe(**fields).images[0].tobytes(), name


def test_rows_become_files_once(batch):
    code, printed, out = batch(ROWS)
    assert code == 1 and len(printed) == 4
    assert "height is 65" in next(result for result in printed if result["id"] == "wrong")["error"]
    assert {path.name for path in out.glob("*.png")} == {"star.png", "%2E.%2Fring.png", "wide.png"}
    check(out, ROWS)
    # A row that changed, one whose picture is gone, and one that failed are drawn; the others are not.
    (out / "wide.png").unlink()
    rows = [ROWS[0] | {"prompt": "a red ring"}, ROWS[1], ROWS[2] | {"height": 80}, ROWS[3]]
    code, printed, _ = batch(rows)
    assert code == 0 and {result["id"] for result in printed} == {"star", "wrong", "wide"}
    assert batch(rows)[:2] == (0, [])


def test_a_half_written_result_is_drawn_again(batch):
    _, _, out = batch(ROWS[:1])
    with open(out / "results.jsonl", "ab") as file:
        file.write(b'{"id": "../ri')
    (out / ".0123456789abcdef.tmp").write_bytes(b"half")
    code, printed, _ = batch(ROWS[:2])
    assert code == 0 and [result["id"] for result in printed] == ["../ring"]
    assert not (out / ".0123456789abcdef.tmp").exists()


def test_another_model_does_not_draw_into_the_same_place(batch):
    batch(ROWS[:1])
    assert batch(ROWS[:1], "--model", "embedded-base")[:2] == (2, [])


def test_where_results_are_is_said(tmp_path, capsys):
    """A row that fails before a model is needed: a bucket's results are in parts; a place without a name is none."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a red star", "height": 65}')
    words = ["batch", str(tmp_path / "rows.jsonl"), "-o"]
    assert main([*words, str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out == f"{tmp_path}/out/results.jsonl\n"
    assert main([*words, ""]) == 2 and "--output is empty" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "more"), "--ray", "nowhere"]) == 2 and not (tmp_path / "more").exists()
    assert "--ray is 'nowhere'; needed local, auto or HOST:PORT" in capsys.readouterr().err
    pytest.importorskip("pyarrow")
    assert main([*words, f"file://{tmp_path}/bucket"]) == 1
    (part,) = tmp_path.glob("bucket/results-*.jsonl")
    said = capsys.readouterr()
    assert said.out == f"file://{tmp_path}/bucket/results-*.jsonl\n" and "see results-*.jsonl" in said.err
    assert '"error": "height is 65' in part.read_text()


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(batch, monkeypatch):
    """Two processes; one is killed with its first row in hand: no row is lost, none is drawn twice."""
    heard, killed = processes.Pool.heard, []

    def once(pool, worker, message):
        yield from heard(pool, worker, message)
        if worker.rows and not killed:
            killed.append(worker.process.pid)
            os.kill(worker.process.pid, signal.SIGKILL)

    monkeypatch.setattr(processes.Pool, "heard", once)
    rows = [{"prompt": "a red star", "id": str(i)} for i in range(6)]
    code, printed, out = batch(rows, "--workers", "2")
    assert code == 0 and killed and len(printed) == 6
    check(out, rows)


@pytest.mark.slow
def test_a_cluster_of_ray(batch, monkeypatch):
    """The actor of the first result is killed; what Ray says of it is not among the results on standard output."""
    pytest.importorskip("ray")
    add, killed = Results.add, []

    def once(results, result):
        if "files" in result and not killed:
            killed.append(result["worker"])
            os.kill(int(result["worker"].rpartition(":")[2]), signal.SIGKILL)
        return add(results, result)

    monkeypatch.setattr(Results, "add", once)
    rows = [*ROWS, *({"prompt": "a red star", "id": str(i)} for i in range(20))]
    code, printed, out = batch(rows, "--ray", "local", "--workers", "1")
    assert code == 1 and len(printed) == len(rows)
    assert [result["id"] for result in printed if "error" in result] == ["wrong"]
    assert {result["worker"] for result in printed if "files" in result} > {*killed}
    check(out, rows)

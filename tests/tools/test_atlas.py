"""The program that draws the atlases of a model writes tables that can be read, and pictures beside them."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from s3dit.research.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import atlas  # noqa: E402
from tiny_world import fixed_prompts, render  # noqa: E402


def test_the_score_is_the_share_of_right_pictures():
    pairs = fixed_prompts()[:4]
    drawn = [Image.fromarray(render(scene)) for scene, _ in pairs]
    prompts = [prompt for _, prompt in pairs]
    assert atlas.right(drawn, prompts) == 1
    assert atlas.right([drawn[1], drawn[0], *drawn[2:]], prompts) == 0.5


@pytest.mark.slow
def test_everything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(atlas, "LIMITS", (0.0, 0.3))
    monkeypatch.setattr(atlas, "CHANGES", ("drop", "int8"))
    monkeypatch.setattr(
        sys,
        "argv",
        ["atlas.py", str(tmp_path), "--count", "2", "--steps", "4", "--modules", "layers.3"],
    )
    atlas.main()
    tables = {path.stem: Table.load(path) for path in tmp_path.glob("*.json")}
    assert {path.stem for path in tmp_path.glob("*.png")} == {*tables, "lens", "x0"}
    assert tables["score"].rows == ("layers.3", "unchanged")
    assert tables["score"].at("unchanged", "drop") == tables["score"].at("layers.3", "int8") == 1
    assert tables["score"].at("layers.3", "drop") == 0 < tables["velocity-drop"].at("layers.3", 4)
    assert tables["velocity"].at("layers.3", "int8") < 0.02 < tables["velocity"].at("layers.3", "drop")
    cache = tables["cache"]
    assert cache.at(0.0, "skipped") == cache.at(0.0, "error") == 0 and cache.at(0.3, "right") == 1
    assert 0.2 < cache.at(0.3, "skipped") < 0.75 and 0.01 < cache.at(0.3, "error") < 0.4
    assert sum(tables["residual-share"].column(4).values()) == pytest.approx(1, abs=1e-4)
    assert "score" in capsys.readouterr().out

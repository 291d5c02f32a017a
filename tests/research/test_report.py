"""A report holds what was observed, on a page that needs nothing else, shows texts as texts, and stays small."""

import base64
import json
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s3dit.errors import RequestError
from s3dit.research import bounded_maps, trace
from s3dit.research.attention import attention_maps
from s3dit.research.bounded_maps import AXES, BESIDE, BoundedMaps, columns, pooled, side
from s3dit.research.concepts import concept_maps
from s3dit.research.observe import observe
from s3dit.research.report import INDEX, PREVIEWS, look, report
from s3dit.research.report_page import DATA, TEMPLATE, TITLE, page
from s3dit.research.table import Table
from s3dit.research.tokens import ItemTokens

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red star above a blue star"
DRAW = {"seed": 7, "num_inference_steps": 3, "height": 96, "width": 128}
ALL = ("step", "layer", "head")


@pytest.fixture(scope="module")
def seen(pipe):
    return look(pipe, PROMPT, **DRAW)


@pytest.fixture(scope="module")
def observed(pipe):
    """The same run, looked at with nothing of a report's."""
    sites = ["layers.*.output", "layers.2.attention.q_rope", "layers.2.attention.k_rope"]
    with attention_maps(pipe, ["red", "star"], keep=ALL) as maps, observe(pipe, sites) as record:
        steps = []
        result = pipe(PROMPT, on_step=steps.append, **DRAW)
    return result, steps, maps, record


def index_of(seen, name):
    return [i for i, column in enumerate(seen.columns) if column.name == name]


def script_data(text):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


def test_the_picture_is_the_one_that_is_drawn_unobserved(seen, observed, pipe):
    result, steps, _, _ = observed
    assert np.array_equal(np.asarray(seen.picture), np.asarray(result.images[0]))
    assert seen.metadata == result.metadata[0] and list(seen.previews) == [1, 2, 3]
    for step in steps:
        (pixels,) = pipe.decode([step.denoised[0]])
        expected = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(seen.previews[step.i]), expected)
    assert np.array_equal(np.asarray(seen.previews[3]), np.asarray(seen.picture))


@pytest.mark.parametrize("name", ["red", "star", "template", "text padding", "image", "text", "entropy"])
def test_maps_and_shares_are_those_of_attention_maps(seen, observed, name):
    """Of a word that stands twice, the two places add up to the word. fp32 against fp64 sums."""
    maps, found = observed[2], index_of(seen, name)
    assert len(found) == (2 if name == "star" else 1)
    given = {key: value[found].double().sum(0) for key, value in seen.tensors.items() if key != "residual.norm"}

    def close(key, at, **choice):
        weights = maps.map(name, **choice)
        assert torch.allclose(given[f"attention{key}"][at], weights, rtol=1e-5, atol=1e-8)
        assert torch.allclose(given[f"share{key}"][at], weights.mean(), rtol=1e-5, atol=1e-8)

    close("", ...)
    for layer in (0, 5):
        for step in (1, 3):
            close(".by_layer_and_step", (layer, step - 1), layer=f"layers.{layer}", step=step)
        for head in (0, 4):
            close(".by_layer_and_head", (layer, head), layer=f"layers.{layer}", head=head)


def test_each_place_of_a_word_is_its_own_column(seen, observed):
    """Against a softmax in float64 of the very token."""
    record = observed[3]
    first, second = index_of(seen, "star")
    assert [PROMPT[c.start : c.stop] for c in seen.columns if c.kind == "word"] == PROMPT.split()
    (token,) = seen.columns[second].tokens
    assert seen.item.text(token) == " star" and seen.columns[first].tokens != (token,)
    expected = 0
    for step in (1, 2, 3):
        q, k = (record.at(f"layers.2.attention.{name}", step).double() for name in ("q_rope", "k_rope"))
        scores = torch.einsum("nd,md->nm", q[seen.item.find("image"), 1], k[:, 1]) * q.shape[-1] ** -0.5
        expected = expected + scores.softmax(-1)[:, token].view(6, 8) / 3
    found = seen.tensors["attention.by_layer_and_head"]
    assert torch.allclose(found[second, 2, 1].double(), expected, atol=1e-6)
    assert not torch.allclose(found[first, 2, 1].double(), expected, atol=1e-3)


def test_tables_and_lengths_are_of_what_was_observed(seen, observed):
    record, image = observed[3], seen.item.find("image")
    streams = {(i, s): record.at(f"layers.{i}.output", s)[image].double() for i in range(6) for s in (1, 2, 3)}
    for (i, s), stream in streams.items():
        assert torch.allclose(seen.tensors["residual.norm"][i, s - 1].double().flatten(), stream.norm(dim=1), rtol=1e-5)
    cosine = torch.nn.functional.cosine_similarity
    # Sketches of so few numbers are the numbers.
    between_steps, between_layers = seen.tables["cosine.between_steps"][4], seen.tables["cosine.between_layers"][1]
    pair = cosine(streams[4, 1].flatten(), streams[4, 3].flatten(), dim=0).item()
    assert between_steps.at(1, 3) == pytest.approx(pair, abs=1e-6)
    pair = cosine(streams[0, 2].flatten(), streams[5, 2].flatten(), dim=0).item()
    assert between_layers.at("layers.0", "layers.5") == pytest.approx(pair, abs=1e-6)
    change = ((streams[3, 2] - streams[3, 1]).norm() / streams[3, 2].norm()).item()
    assert seen.tables["change.by_step"][0].at("layers.3.output", 2) == pytest.approx(change, rel=1e-5)
    shares = seen.tables["residual.share"][0]
    assert sum(shares.column(2).values()) == pytest.approx(1, abs=1e-3)
    assert {name: len(tables) for name, tables in seen.tables.items() if len(tables) > 1} == {
        "cosine.between_steps": 6, "cosine.between_layers": 3, "residual.massive": 3,
    }  # fmt: skip


def test_maps_are_averages_over_squares_that_fit(pipe, seen, monkeypatch):
    values = torch.rand(2, 7, 5, dtype=torch.float64)
    for cells in (1, 2, 3, 7):
        for n in range(2):
            for r in range(-(-7 // cells)):
                for c in range(-(-5 // cells)):
                    part = values[n, r * cells : (r + 1) * cells, c * cells : (c + 1) * cells]
                    assert pooled(values, cells)[n, r, c].item() == pytest.approx(part.mean().item(), abs=1e-12)
    rooms = {"attention": 500, "attention.by_layer_and_step": 7000, "attention.by_layer_and_head": 12_000}
    monkeypatch.setattr(bounded_maps, "AXES", {name: (AXES[name][0], room) for name, room in rooms.items()})
    small = look(pipe, PROMPT, **DRAW)
    for name, room in rooms.items():
        full, coarse = seen.tensors[name], small.tensors[name]
        cells = side((6, 8), math.prod(full.shape[:-2]), room)
        assert cells > 1
        expected = pooled(full.flatten(0, -3), cells).view(coarse.shape)
        assert coarse.numel() + BESIDE * math.prod(coarse.shape[:-2]) <= room
        assert torch.allclose(coarse, expected, rtol=1e-5)


def item_of(grid, words):
    """A map of tokens of one picture of a grid and a prompt of so many words, a token each."""
    image, prompt = grid[0] * grid[1], " ".join(["word"] * words)
    kinds = ("image",) * image + ("template",) * 8 + ("prompt",) * words + ("text padding",) * 7
    places = [None] * len(kinds)
    places[image + 8 : image + 8 + words] = [(5 * i, 5 * i + 4) for i in range(words)]
    return ItemTokens(0, "positive", prompt, grid, kinds, tuple(places), {}, {"joint": tuple(range(len(kinds)))})


@pytest.mark.parametrize(
    ("grid", "words", "steps"), [((64, 64), 12, 8), ((64, 64), 500, 8), ((256, 256), 30, 28), ((128, 128), 500, 100)]
)
def test_what_is_kept_is_bounded_at_full_size(grid, words, steps):
    """30 layers of 30 heads. Without rooms the maps by layer and head of 12 words alone were 44 million numbers."""
    maps = BoundedMaps(item_of(grid, words), layers=30, heads=30, steps=steps)
    assert len(maps.columns) == words + 6
    rooms = sum(room for _, room in AXES.values())
    kept = sum(total.numel() for total in maps._totals.values())
    # Even one number a map, with its share, may be more than the room: 900 maps of 506 columns.
    fewest = sum(2 * math.prod((words + 6, *(30 if axis != "steps" else steps for axis in axes)))
                 for axes, _ in AXES.values())  # fmt: skip
    assert 8 * kept <= 8 * max(rooms, fewest) < 1e8
    for (axes, room), name in zip(AXES.values(), AXES, strict=True):
        count = math.prod((words + 6, *(30 if axis != "steps" else steps for axis in axes)))
        cells = side(grid, count, room)
        sizes = [count * (-(-grid[0] // c) * -(-grid[1] // c) + BESIDE) for c in (cells - 1, cells) if c]
        assert sizes[-1] <= room or cells == max(grid), name
        assert all(size > room for size in sizes[:-1])


@pytest.mark.parametrize("words", [12, 500])
def test_the_page_of_a_full_size_model_is_below_20_mb(seen, words):
    """Of noise, which no image format makes smaller."""
    drawn = torch.Generator().manual_seed(0)
    maps = BoundedMaps(item_of((64, 64), words), layers=30, heads=30, steps=8)
    tensors = {name: torch.rand(total.shape, generator=drawn) for name, total in maps._totals.items()}
    tensors["residual.norm"] = torch.rand(30, 8, 64, 64, generator=drawn)
    noise = Image.fromarray(torch.randint(0, 256, (1024, 1024, 3), dtype=torch.uint8, generator=drawn).numpy())

    def table(rows, columns):
        return Table.of("noise", range(rows), range(columns), torch.rand(rows, columns, generator=drawn).tolist())

    tables = {"residual.share": [table(61, 8)] * 3, "residual.massive": [table(30, 8)] * 8,
              "cosine.between_layers": [table(30, 30)] * 8, "cosine.between_steps": [table(8, 8)] * 30}  # fmt: skip
    index = seen.index() | {"layers": [f"layers.{i}" for i in range(30)], "heads": 30}
    text = page(index, noise, dict.fromkeys(range(8), noise), tensors, tables)
    assert 5e6 < len(text) < 20e6


def test_the_file_holds_the_numbers_behind_the_page(pipe, seen, tmp_path):
    where = seen.save(tmp_path / "new" / "report")
    assert sorted(path.name for path in where.parent.iterdir()) == ["data.safetensors", "index.html", "picture.png"]
    tensors, notes = trace.load(where.parent / "data.safetensors")
    index, data = json.loads(notes[INDEX]), script_data(where.read_text(encoding="utf-8"))
    tables = index.pop("tables")
    assert index == {key: data[key] for key in index} and index["prompt"] == PROMPT
    assert index["request"]["seed"] == 7 and len(index["model"]) == 64 and index["sigmas"][0] == 1
    for name, tensor in seen.tensors.items():
        assert torch.equal(tensors[name], tensor)
        shown = data["shares" if name.startswith("share") else "maps"][name]
        assert shown["shape"] == list(tensor.shape)
        if name in data["maps"]:
            low, high = (torch.frombuffer(bytearray(base64.b64decode(shown[end])), dtype=torch.float32)
                         .view(tensor.shape[:-2])[..., None, None] for end in ("low", "high"))  # fmt: skip
            levels = torch.frombuffer(bytearray(base64.b64decode(shown["bytes"])), dtype=torch.uint8).view(tensor.shape)
            assert ((low + (high - low) * levels / 255 - tensor).abs() <= (high - low) / 509).all()
    assert tensors["table.residual.massive.2"].shape == (8, 6)
    assert tables["residual.massive.2"]["rows"][0].startswith("channel ")
    values = torch.tensor(seen.tables["change.by_step"][0].values, dtype=torch.float64)
    assert torch.equal(values, tensors["table.change.by_step"])
    assert np.array_equal(np.asarray(Image.open(where.parent / "picture.png")), np.asarray(seen.picture))


def test_the_page_asks_for_nothing(seen, tmp_path):
    text = seen.save(tmp_path).read_text(encoding="utf-8")
    markup = re.sub(r'(id="data">).*?(</script>)', r"\1\2", text, flags=re.S)
    assert len(markup) < 40_000 < len(text)
    wanted = r"https?:|//[a-z]|@import|url\(|<link|<iframe|<base|fetch\(|XMLHttp|WebSocket|import\("
    assert not re.search(wanted, markup) and re.search("https?:", text) is None
    assert not re.findall(r"""\b(?:src|href|action|srcset)\s*=\s*["']""", markup)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; img-src data:;")
    images = [script_data(text)["picture"], *script_data(text)["previews"].values()]
    assert all(each.startswith("data:image/png;base64,") for each in images)


def test_no_prompt_becomes_markup(pipe, tmp_path):
    prompt = f'a </script><script>alert("1")</script> & <b onclick=x>star</b> {TITLE} {DATA} <!--'
    text = report(pipe, prompt, tmp_path / "report", **{**DRAW, "num_inference_steps": 1}).read_text(encoding="utf-8")
    template = TEMPLATE.read_text(encoding="utf-8")
    for piece in ("<script", "</script>", "<b ", "<!--", "<title>"):
        # But for the two places that are filled.
        assert text.count(piece) == template.count(piece) - 2 * (piece == "<!--"), piece
    assert script_data(text)["prompt"] == prompt
    assert "<title>a &lt;/script&gt;&lt;script&gt;alert(&quot;1&quot;)" in text


def test_words_of_every_writing():
    """A word is a run of letters; where none are spaced, a character; what was cut off is none."""
    prompt = "Ünï-red 一只 star, лиса 🦊 x"
    marks = [*re.finditer(r"\S", prompt)]
    places = [match.span() for match in marks[:-1]]
    kinds = ("image", *["prompt"] * len(places))
    item = ItemTokens(0, "positive", prompt, (1, 1), kinds, (None, *places), {}, {})
    found = [column for column in columns(item) if column.kind == "word"]
    assert [column.name for column in found] == ["Ünï", "red", "一", "只", "star", "лиса"]
    assert all(prompt[column.start : column.stop] == column.name for column in found)
    assert found[0].tokens == (1, 2, 3) and found[2].tokens == (8,)


def test_guidance_two_calls_a_step_and_a_start_image(pipe, seen):
    other = look(pipe, PROMPT, negative_prompt="a ring", guidance_scale=1.5, solver="heun", image=seen.picture,
                 strength=0.7, seed=7, num_inference_steps=3)  # fmt: skip
    assert not any(tensor.isnan().any() for tensor in other.tensors.values())
    kinds = [i for i, column in enumerate(other.columns) if column.kind == "kind"]
    assert torch.allclose(other.tensors["share.by_layer_and_step"][kinds].sum(0), torch.ones(6, len(other.steps)))
    assert list(other.steps.values()) == [pytest.approx(x, abs=1e-6) for x in other.metadata["engine"]["levels"][:-1]]


@pytest.mark.parametrize(("concepts", "source"), [(["red", "star"], "prompt"), (["star", "green"], "template")])
@pytest.mark.sampled(1)
def test_maps_of_concepts_are_those_of_concept_maps(pipe, seen, concepts, source):
    other = look(pipe, PROMPT, concepts=concepts, **DRAW)
    assert np.array_equal(np.asarray(other.picture), np.asarray(seen.picture))
    with concept_maps(pipe, concepts, source=source, keep=("step", "layer")) as maps:
        pipe(PROMPT, **DRAW)
    found = other.tensors["concept.by_layer_and_step"]
    assert found.shape == (2, 6, 3, 6, 8) and other.index()["concepts"] == concepts
    for i, concept in enumerate(concepts):
        expected = maps.map(concept, contrast="others", layer="layers.4", step=2)
        assert torch.allclose(found[i, 4, 1].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_many_steps_give_few_estimates(pipe):
    many = look(pipe, "a star", seed=1, num_inference_steps=20, height=32, width=32)
    assert len(many.previews) == PREVIEWS and {1, 20} <= {*many.previews} and len(many.steps) == 20


def test_one_step_has_no_changes(pipe):
    assert "change.by_step" not in look(pipe, "a star", seed=1, num_inference_steps=1, height=32, width=32).tables


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_images_per_prompt": 2}, "for 2 pictures; needed 1"),
        ({"upscale": 2.0}, "upscale is 2; needed none"),
        ({"concepts": ["a"] * 17}, "concepts are 17 of them; needed a list of at most 16"),
        ({"concepts": "star"}, "concepts are the text 'star'"),
        ({"output_type": "latent"}, "needed 'pil'"),
    ],
)
def test_what_is_no_report_is_refused(pipe, fields, words, tmp_path):
    with pytest.raises(RequestError, match=words):
        report(pipe, PROMPT, tmp_path / "no", **{**DRAW, **fields})
    assert not (tmp_path / "no").exists()


def test_a_report_that_is_there_is_kept(pipe, tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(RequestError, match=r"holds index.html already"):
        report(pipe, PROMPT, tmp_path, **DRAW)
    assert (tmp_path / "index.html").read_text() == "mine"
    report(pipe, PROMPT, tmp_path, overwrite=True, **{**DRAW, "num_inference_steps": 1})
    assert (tmp_path / "index.html").stat().st_size > 1e5


def test_the_page_is_in_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    others = {path.name for path in (ROOT / "s3dit" / "research").iterdir() if path.suffix not in (".py", ".md")}
    assert others - {"__pycache__"} == {*data["s3dit.research"]} == {TEMPLATE.name}

"""s3dit parity: records of either side, what they are judged by, the command, its page and its exit codes."""

import json
import math
import os
import shutil
import sys

import pytest
import torch

from s3dit import Pipeline
from s3dit.cli.main import main
from s3dit.errors import RequestError
from s3dit.parity.checks import named_checks
from s3dit.parity.judge import Bounds, errors_of, judge, tolerances
from s3dit.parity.ours import ours as stages_of
from s3dit.parity.ours import pixels
from s3dit.parity.packing import by_name
from s3dit.parity.records import Spool, Stored
from s3dit.parity.report import as_json, lines, page
from s3dit.parity.session import Choice, Outcome, run
from s3dit.parity.taps import Inside
from s3dit.research.trace import load

PROMPT = "a red star above a blue ring"
SIZE = ["--height", "80", "--width", "112"]
REQUEST = {"prompt": PROMPT, "seed": 0, "num_inference_steps": 2, "height": 80, "width": 112, "guidance_scale": 0.0}


@pytest.fixture
def command(official_dir, capsys):
    """Run the command -> exit code, and its JSON, or what it said on standard error."""

    def go(*options, model=official_dir):
        capsys.readouterr()
        words = ["parity", PROMPT, "--model", model, *SIZE, "--json", *options]
        code = main([str(word) for word in words])
        done = capsys.readouterr()
        return code, done.err if code == 2 else json.loads(done.out)

    return go


@pytest.fixture(scope="module")
def recorded(official_dir, tmp_path_factory):
    """Records of both sides: this engine's, and the reference's."""
    folder = tmp_path_factory.mktemp("records")
    pipe = Pipeline.load(official_dir, device="cpu", dtype="fp32")
    choice = Choice(record=folder / "ours", record_reference=folder / "theirs")
    assert not run(pipe, pipe.plan(**REQUEST), choice).parts
    return folder


def test_records_there_and_back(command, recorded):
    code, data = command("--against", recorded / "ours")
    assert (code, data["parts"]) == (0, None)
    assert all(stage["error"] == 0.0 for stage in data["stages"])
    code, data = command("--against", recorded / "theirs")
    assert (code, data["sides"]["truth"]["side"]) == (0, "diffusers")
    assert data["sides"]["truth"]["dtype"] == "fp32" and "diffusers" in data["sides"]["truth"]["versions"]
    record, notes = load(recorded / "ours")
    assert "velocity, step 2" in record and json.loads(notes["task"])["num_inference_steps"] == 2


def test_either_side_needs_no_reference(command, recorded, tmp_path, monkeypatch):
    """Recording, and comparing with a record, where diffusers and transformers cannot be imported."""
    for library in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)
    code, data = command("--record", tmp_path / "a")
    assert (code, data["stages"]) == (0, []) and (tmp_path / "a").is_file()
    assert command("--against", recorded / "theirs")[0] == 0
    code, said = command()
    assert code == 2 and "diffusers is not here" in said


def test_a_record_of_another_program_takes_our_place(command, recorded):
    code, data = command("--stages", recorded / "theirs", "--against", recorded / "ours")
    assert (code, data["parts"], data["sides"]["mine"]["side"]) == (0, None, "diffusers")


def test_inside_that_differs_compares_what_both_have(command, recorded, tmp_path):
    assert command("--inside", "layers.1", "--record", tmp_path / "a")[0] == 0
    code, data = command("--inside", "layers.2", "--against", tmp_path / "a")
    names = {stage["name"] for stage in data["stages"]}
    assert code == 0 and "layers.2" in names and "layers.1.attention.q" in data["left_out"]
    assert not {name for name in names if name.startswith(("layers.1.", "layers.2."))}


@pytest.mark.slow
def test_a_record_in_16_bits_is_judged_by_what_fits(official_dir, command, recorded):
    """Two machines' bf16 part at fp32's bound; --margin scales what they are held to."""
    code, data = command("--against", recorded / "ours", "--dtype", "bf16")
    errors = {stage["name"]: stage["error"] for stage in data["stages"]}
    assert code == 0 and max(errors["velocity, step 2"], errors["VAE decode"]) > 1e-3
    assert any("16 bits" in note for note in data["notes"])
    assert command("--against", recorded / "ours", "--dtype", "bf16", "--margin", "0.01")[0] == 1
    assert command("--against", recorded / "ours", "--dtype", "bf16", "--tolerance", "1e-5")[0] == 1


def test_bf16_is_no_farther_from_the_truth(official_dir, tmp_path):
    """And the reference's own errors go with its record, so that a machine without it judges by them, too."""
    pipe = Pipeline.load(official_dir, device="cpu", dtype="bf16")
    plan = pipe.plan(**REQUEST | {"num_inference_steps": 1})
    there = run(pipe, plan, Choice(record_reference=tmp_path / "truth"))
    assert there.verdict.first is None, there.verdict.first
    velocity = next(stage for stage in there.verdict.stages if stage.row.name == "velocity, step 1")
    assert velocity.reference > 1e-4
    here = run(pipe, plan, Choice(against=tmp_path / "truth"))
    assert as_json(here)["stages"] == as_json(there)["stages"]
    assert any("geometric mean" in line for line in lines(here))


def test_a_page_with_pictures(command, recorded, tmp_path):
    code, _ = command("--against", recorded / "ours", "--report", tmp_path / "report")
    text = (tmp_path / "report" / "index.html").read_text()
    assert code == 0 and text.count("data:image/png;base64,") == 3 and "all stages agree" in text
    assert "<script" not in text
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["parts"] is None and data["sides"]["mine"]["dtype"] == "fp32"


def test_nothing_of_a_record_becomes_markup():
    stage = "layers.0 <img src=x>"
    verdict = judge({stage: torch.ones(2)}, {stage: torch.zeros(2)})
    outcome = Outcome(verdict, [], ["<b>"], {}, {}, {"<i>": verdict}, {"mine": {"dtype": "<u>"}})
    body = page(outcome, as_json(outcome)).split("<body>")[1]
    assert not [tag for tag in ("<img src=x>", "<b>", "<i>:", "<u>") if tag in body]


REFUSED = [
    (["--height", "100"], "multiple of 16"),
    (["--inside", "layers.9", "--record", "TMP"], "no module of it is called"),
    (["--official", "/tmp"], "checkout of Tongyi-MAI/Z-Image"),
    (["--against", "none.safetensors"], "none.safetensors"),
    (["--steps", "3", "--against", "OURS"], "recorded with --steps 2"),
    (["--seed", "3", "--against", "OURS"], "recorded with seed"),
    (["--tolerance", "small"], "needed a number such as 1e-5"),
    (["--also", "speed=high"], "needed NAME=VALUE"),
    (["--margin", "0"], "needed more than 0"),
    (["--against", "OURS", "--official", "/tmp"], "takes the place"),
    (["--stages", "OURS", "--record", "TMP"], "takes the place"),
    (["--record", "/nowhere/a"], "cannot be written"),
    (["--solver", "er_sde"], "diffusers has not"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[words for _, words in REFUSED])
@pytest.mark.sampled(2)
def test_what_cannot_be_compared(command, recorded, tmp_path, options, words):
    names = {"OURS": recorded / "ours", "TMP": tmp_path / "x"}
    code, said = command(*(names.get(option, option) for option in options))
    assert code == 2 and words in said


def test_what_is_no_record(tmp_path):
    (tmp_path / "a").write_bytes(b"nothing")
    with pytest.raises(RequestError, match="cannot be read"):
        Stored(tmp_path / "a")


def test_a_spool_gives_back_what_came(tmp_path):
    spool = Spool(tmp_path)
    given = {
        "a": torch.randn(3, 4), "b": torch.randn(2, 2).bfloat16(), "c": torch.arange(5), "d": torch.ones(0, 3),
        "e": torch.randn(4, 4).T, "f": torch.tensor([1, 255], dtype=torch.uint8),
    }  # fmt: skip
    spool.update(given)
    spool["a"] = given["a"] + 1
    spool.save(tmp_path / "record", {"dtype": "fp32"})
    for back in (spool, Stored(tmp_path / "record"), load(tmp_path / "record")[0]):
        assert list(back) == list(given) and torch.equal(back["a"], given["a"] + 1)
        assert all(torch.equal(back[name], given[name]) for name in "bcdef")
    assert Stored(tmp_path / "record").notes == {"dtype": "fp32"} and os.listdir(tmp_path) == ["record"]


def test_the_rules_of_judgment():
    a = {"token ids": torch.tensor([1, 2]), "x": torch.tensor([1.0, 2.0]), "layers.0.fused": torch.ones(1)}
    b = {"token ids": torch.tensor([1, 2]), "x": torch.tensor([1.0, 2.000004]), "layers.0.apart": torch.ones(1)}
    verdict = judge(a, b)
    assert [stage.parts for stage in verdict.stages] == [False, False]
    assert verdict.left_out == ["layers.0.fused", "layers.0.apart"]
    assert judge(a, b, Bounds(1e-7)).first.row.name == "x"
    assert judge(a, b, Bounds(1e-7, by_stage=(("?", 1e-5),))).first is None
    assert judge(a, b, Bounds(by_stage=(("x", 1e-7),))).first.row.name == "x"
    assert judge(a, b | {"layers.1": torch.ones(1)}).first.row.name == "layers.1"
    assert judge(a, b | {"layers.1": torch.ones(1)}, partial=True).first is None
    ids = {"token ids": torch.tensor([10**6, 2])}
    assert judge(ids, {"token ids": torch.tensor([10**6, 3])}).first is not None
    byte = torch.tensor([100], dtype=torch.uint8)
    assert [judge({"pixels": byte + n}, {"pixels": byte}, Bounds(0.0)).first is None for n in (1, 2)] == [True, False]
    assert judge({"x": torch.tensor([math.nan])}, {"x": torch.ones(1)}, Bounds(1.0)).first is not None
    decoded = {"VAE decode": torch.tensor([1.03])}
    errors = {"VAE decode": 0.01}
    assert judge(decoded, {"VAE decode": torch.ones(1)}, Bounds(errors=errors)).first is None
    assert judge(decoded, {"VAE decode": torch.ones(1)}, Bounds(margin=1.25, errors=errors)).first is not None
    wide = Bounds(0.1, coarse=True, guidance=4.0)
    assert (wide.of("layers.0"), wide.of("velocity, step 1")) == (0.1, pytest.approx(0.1 * 41**0.5))
    assert Bounds(0.1, guidance=4.0).of("velocity, step 1") == 0.1
    truth, near, far = ({"x": torch.tensor([value])} for value in (1.0, 1.01, 1.02))
    assert judge(near, truth, Bounds(margin=1.0, errors=errors_of(far, truth))).first is None
    assert judge(far, truth, Bounds(margin=1.25, errors=errors_of(near, truth))).first is not None
    with pytest.raises(RequestError, match="no stage in common"):
        judge({"layers.0.a": torch.ones(1)}, {"layers.0.b": torch.ones(1)})
    assert tolerances(["1e-4", "VAE decode=2e-3"]) == (1e-4, (("VAE decode", 2e-3),))


def test_bytes_of_a_picture():
    picture = torch.tensor([-1.0, 0.0, 1.0, -2.0, 2.0, 0.1]).view(1, 3, 1, 2)
    assert pixels(picture).tolist() == [[[[0, 255, 255], [128, 0, 140]]]]


def test_observed_or_not_the_bits_are_the_same(ours):
    """The instrument changes nothing of what it looks at."""
    plan = ours.plan(**REQUEST)
    plain = [step.x.clone() for step in ours.stream(plan)]
    seen = stages_of(ours, plan, {}, Inside(("layers.1", "text.layers.0")))
    last = ours.decode([seen["latents, step 2"][0]])[0]
    assert torch.equal(seen["latents, step 2"].flatten().sort().values, plain[-1].flatten().sort().values)
    assert torch.equal(seen["VAE decode"][0], last)
    assert by_name({"a#0": 1, "b#0": 2, "a#1": 3}) == {"a": [1, 3], "b": [2]}


@pytest.mark.skipif("S3DIT_OFFICIAL" not in os.environ, reason="S3DIT_OFFICIAL names no checkout of Tongyi-MAI/Z-Image")
def test_the_official_transformer_agrees(command):
    code, data = command("--official", os.environ["S3DIT_OFFICIAL"], "--guidance", 2, "--negative-prompt", "ring " * 40)
    assert (code, data["parts"]) == (0, None)


@pytest.fixture(scope="module")
def sample(ours):
    """A record, and the lengths of its prompts."""
    plan = ours.plan(**REQUEST | {"num_inference_steps": 1})
    stages = stages_of(ours, plan, {})
    return stages, [len(plan.captions[0][0])]


def found(sample, **changed):
    stages, lengths = sample
    mine = stages | {name.replace("__", " ").replace("_sample_", "context_refiner.0.attention."): tensor
                     for name, tensor in changed.items()}  # fmt: skip
    return {check.name: check.why for check in named_checks(mine, stages, lengths) if check.found}


def test_mistakes_by_name(sample):
    """Each of the four, made by hand, is found by its name, and nothing else is."""
    stages, (length,) = sample
    assert found(sample) == {}
    assert found(sample, text__features=stages["text.layers.0"]) == {
        "hidden state": "features are those of layers.0, needed the last layer but one, unnormed"
    }
    ids = stages["token ids"]
    assert "[487] doubled at 0" in found(sample, token__ids=torch.cat([ids[:1], ids]))["template tokens"]
    assert "missing at 0" in found(sample, token__ids=ids[3:])["template tokens"]
    q, rope = stages["context_refiner.0.attention.q"], stages["rope of text"]
    turned = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * torch.view_as_complex(rope).conj()[:, None]
    plain = torch.view_as_real(turned).flatten(-2)
    assert found(sample, _sample_q=plain)["rope pairing"] == "not rotated"
    x, y = plain.chunk(2, -1)
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
    halves = torch.cat([x * cos - y * sin, x * sin + y * cos], -1)
    assert "halves are pairs" in found(sample, _sample_q=halves)["rope pairing"]
    tokens = stages["tokens of text"].clone()
    tokens[length:] = 0
    assert "are zeros" in found(sample, tokens__of__text=tokens)["pad tokens learned"]
    q, k, v = (stages[f"context_refiner.0.attention.{part}"] for part in ("q", "k", "to_v"))
    q, k, v = (x.reshape(len(x), 6, 32).transpose(0, 1) for x in (q, k, v))
    masked = torch.nn.functional.scaled_dot_product_attention(q, k[:, :length], v[:, :length])
    why = found(sample, _sample_mixed=masked.transpose(0, 1).flatten(1))
    assert "do not look at the padding" in why["pad tokens attended"] and len(why) == 1


def test_a_model_without_diffusers_layout_says_what_to_do(official_dir, tmp_path, command):
    """A scheduler that is missing, a folder that is not there: one line, exit code 2."""
    folder = shutil.copytree(official_dir, tmp_path / "model")
    shutil.rmtree(folder / "tokenizer")
    code, said = command(model=folder)
    assert code == 2 and "tokenizer" in said

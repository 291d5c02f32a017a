"""The options themselves: other programs' spellings, --help, examples, and messages that name options."""

import contextlib
import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from s3dit.cli.main import COMMANDS, _parsers, main, parse
from s3dit.cli.option_names import FIELDS, in_options
from s3dit.cli.parser import ANSWERS, SPELLINGS, UNCLEAR, Parser
from s3dit.pipeline import Pipeline
from s3dit.request import Request, Schedule

ROOT = Path(__file__).resolve().parents[2]


def own_options(command):
    """The option strings that a command has without other programs' spellings."""
    parser = Parser()
    COMMANDS[command].add_options(parser)
    return set(parser.options)


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.sampled(5)
def test_a_spelling_is_needed_hidden_and_the_same_as_its_option(spelling, capsys):
    option = SPELLINGS[spelling]
    assert spelling not in own_options("generate") and option in own_options("generate")
    for value in ("64", "euler", "beta", "diffusers"):
        try:
            meant = parse(["generate", "x", option, value])
        except SystemExit:
            continue
        forms = [[spelling, value], [f"{spelling}={value}" if spelling.startswith("--") else spelling + value]]
        assert all(parse(["generate", "x", *form]) == meant for form in forms)
        break
    else:
        pytest.fail(f"no value is taken by {option}")
    capsys.readouterr()
    assert f"{spelling} " not in help_of(capsys, "generate")


def test_no_word_has_two_answers():
    options = set().union(*map(own_options, COMMANDS))
    assert not set(SPELLINGS) & {*UNCLEAR, *ANSWERS} and not {*UNCLEAR} & {*ANSWERS}
    assert not options & {*UNCLEAR, *ANSWERS}


def test_words_behind_two_dashes_are_the_prompt():
    assert parse(["generate", "--", "-H"]).prompt == "-H"
    assert parse(["generate", "--", "--cfg-scale"]).prompt == "--cfg-scale"
    assert parse(["plan", "-H", "64", "--", "-s"]).prompt == "-s"


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("-n2", "-n is not clear; say --count"),
        ("-q=4", "-q is not clear; say --quantize"),
        ("--lora-scales=0.8", "there is no option --lora-scales; write the strength behind the file"),
        ("--vae-tiling", "large pictures are decoded by tiles"),
        ("--lowvram", "--vram 4GiB"),
        ("--kernels", "there is no option --kernels here; s3dit plan has it"),
    ],
)
def test_what_other_programs_do_otherwise_is_answered(word, answer, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "x", word])
    assert caught.value.code == 2 and answer in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["a fox"], "to draw it: s3dit generate 'a fox'"),
        (["generat", "a fox"], "did you mean generate?"),
        (["--prompt", "a fox"], "name a command first"),
        (["inspect", "a", "b"], "unexpected 'b'; see s3dit inspect --help"),
    ],
)
def test_without_a_command(words, answer, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and answer in err and err.count("\n") == 1


def examples():
    return [(name, line) for name, command in COMMANDS.items() for line, _ in command.EXAMPLES]


@pytest.mark.parametrize(("name", "line"), examples())
@pytest.mark.sampled(10)
def test_every_example_is_a_command_of_its_own(name, line, capsys):
    program, *words = shlex.split(line)
    assert program == "s3dit" and words[0] == name and parse(words).command == name
    # argparse breaks no line of an epilog.
    assert f"  {line}" in help_of(capsys, name)


def quick_examples():
    """Of the embedded model; a server runs until somebody stops it, in tests/serve/test_command.py."""
    return [line for name, line in examples() if ("embedded" in line or "64x64" in line) and name != "serve"]


@pytest.mark.parametrize("line", quick_examples())
@pytest.mark.sampled(2)
def test_examples_of_the_embedded_model_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:]) == 0


def test_help_shows_an_example_of_each_command_and_a_metavar_of_each_option(capsys):
    shown = help_of(capsys)
    _, commands = _parsers()
    for name, command in COMMANDS.items():
        assert f"  {command.EXAMPLES[0][0]}" in shown
        for action in commands[name]._actions:
            assert action.nargs == 0 or action.metavar or not action.option_strings, action.option_strings
    shown = help_of(capsys, "generate")
    model, rest = shown.partition("\nmodel:\n")[2].split("\nmemory and speed:\n")
    runtime = rest.partition("\noutput:\n")[0]
    for option in ("--model", "--transformer", "--tokenizer", "--lora", "--quantize", "--quantize-text"):
        assert f"  {option} " in model
    for option in ("--device", "--dtype", "--residency", "--vram", "--ram", "--disable-mmap", "--compile", "--graphs"):
        assert f"  {option} " in runtime
    assert "  --backend NAME" in runtime


# A value that each option reads and its field refuses, and options without which it would not be looked at.
BAD = {
    "prompt": ["-p", "x" * 200_000], "negative_prompt": ["--negative=" + "x" * 200_000], "height": ["--height=100"],
    "width": ["--width=0"], "num_inference_steps": ["--steps=0"], "guidance_scale": ["--guidance=-1"],
    "cfg": ["--cfg=0"], "cfg_normalization": ["--cfg-normalization=-1"], "cfg_truncation": ["--cfg-truncation=nan"],
    "num_images_per_prompt": ["--count=0"], "seed": [f"--seed={2**70}"], "sigmas": ["--sigmas=0.5,0.9"],
    "shift": ["--shift=0"], "max_sequence_length": ["--max-sequence-length=0"], "image": ["--image="],
    "mask_image": ["--mask=", "--image=a.png"], "strength": ["--strength=2", "--image=a.png"],
    "extend": ["--extend=0,0,0,0"], "mask_blur": ["--mask-blur=-1"], "upscale": ["--upscale=9"],
    "upscale_strength": ["--upscale-strength=2"], "control": ["--control=x.safetensors:a.png:9"],
    "reference": ["--reference="], "reference_area": ["--reference-area=1"], "schedule": ["--schedule=none"],
    "solver": ["--solver=none"], "preset": ["--preset=none"], "convention": ["--convention=none"],
    "batch_place": ["--batch-place=4,4"], "mask_mode": ["--mask-mode=none"], "posterior": ["--posterior=none"],
    "reference_positions": ["--reference-positions=none"], "target_timestep": ["--target-timestep=image"],
    "composite": ["--composite=1"],
    "region": ["--region=a.png@0:a"], "base_weight": ["--base-weight=-1"],
    "cache": ["--cache=taylor:1:order=9"],
    "guidance_interval": ["--guidance-interval=0.8-0.1"], "guidance_method": ["--guidance-method=apg:eta=-1"],
    "skip_layers": ["--skip-layers=2,x:1"], "variation": ["--variation=0.1:-3"],
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.sampled(6)
def test_a_message_about_a_field_names_its_option(name, capsys):
    words = BAD[name]
    try:
        code = main(["generate", *(["x"] if name != "prompt" else []), *words])
    except SystemExit as done:
        code = done.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and FIELDS[name] in err.replace("--prompt-file", "")
    assert "_" not in name or name not in err


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("strength is given without a start image; give image too, or leave strength out",
         "--strength is given without a start image; give --image too, or leave --strength out"),
        ("both cfg and guidance_scale are given", "both --cfg and --guidance are given"),
        ("both vram and residency streamed are given", "both --vram and --residency streamed are given"),
        ("output is 'a'; needed a name", "--output is 'a'; needed a name"),
        ("seed of the last picture is 9", "--seed of the last picture is 9"),
        ("3 sigmas but num_inference_steps 2; leave one out", "3 sigmas but --steps 2; leave one out"),
        ("a reference scaled to 9; raise reference_area", "a reference scaled to 9; raise --reference-area"),
        ("dtype fp16 overflows in this model", "--dtype fp16 overflows in this model"),
        ("device cuda:99 does not exist", "--device cuda:99 does not exist"),
        ("graphs need weights that stay", "--graphs need weights that stay"),
        # Words of a sentence, and names of files, are no fields.
        ("image 1.png: not found; needed a picture", "image 1.png: not found; needed a picture"),
        ("prompt/mask_image.png: not found", "prompt/mask_image.png: not found"),
        ("mask_image.png: not found", "mask_image.png: not found"),
        ("the pictures have several sizes; give one shift for all", "the pictures have several sizes; give one shift "
                                                                     "for all"),
        ("my_mask_image_2 is black", "my_mask_image_2 is black"),
    ],
)  # fmt: skip
def test_only_what_is_a_field_becomes_an_option(message, shown):
    assert in_options(message) == shown


def test_the_table_of_bad_values_knows_every_option():
    assert set(BAD) == {field.name for field in fields(Request) if field.metadata["group"]} == set(FIELDS)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--sampler", "euler_a"], "argument --sampler: invalid choice: 'euler_a'; needed one of euler, heun"),
        (["--sampler", "DPM++ 2M"], "did you mean dpmpp_2m?"),
        (["--scheduler", "kerras"], "did you mean karras?"),
        (["--scheduler", "normal"], f"needed one of {', '.join(get_args(Schedule))}; see"),
    ],
)
def test_a_value_of_another_program_is_answered_with_the_one_here(words, answer, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "x", *words])
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--reference", "a.png"], "--reference images are given to a tiny model"),
        (["--upscale", "8", "--size", "2048x2048"], "--upscale 8 makes a side of 16384 pixels"),
        (["--vram", "8GiB", "--residency", "streamed"], "both --vram and --residency streamed are given"),
        (["--ram", "8GiB", "--residency", "streamed"], "both --ram and --residency streamed are given"),
        (["--graphs", "--device", "cpu"], "--graphs need a CUDA device, found cpu; load the model without --graphs"),
        (["--device", "gpu"], "--device is 'gpu'; needed cpu, cuda or mps"),
    ],
)
def test_messages_of_the_plan_and_of_loading_name_options(words, answer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    assert main(["plan", "a red star", *words]) == 2
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["--seed", "-1"], "seed -1 is a seed like any other; leave --seed out"),
        (["--negative-prompt", "blur"], "--negative-prompt has no effect: guidance is off; give --guidance, such as 4"),
        (["--max-sequence-length", "10"], "raise --max-sequence-length above 10"),
        (["--compile"], "compiles the transformer's blocks, which takes a minute"),
    ],
)
@pytest.mark.sampled(1)
def test_what_is_done_in_silence_elsewhere_is_told(words, note, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("s3dit.runtime.graphs.check_compiler", lambda device: None)
    monkeypatch.setattr("s3dit.runtime.components.compile_blocks", lambda module: None)
    assert main(["generate", "a red star", "--steps", "1", *words, "-o", str(tmp_path / "a.png")]) == 0
    assert note in capsys.readouterr().err


def test_kernels_are_part_of_the_plan_as_json(capsys):
    assert main(["plan", "a red star", "--size", "64x64", "--device", "cpu", "--json", "--kernels"]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert kernels["backend"] == "auto" and kernels["device"].startswith("cpu")
    attention = [row for row in kernels["operations"] if row["name"] == "attention"]
    assert attention and all(row["count"] > 0 and row["chosen"] and len(row["shape"]) == 3 for row in attention)
    assert attention[0]["others"]["cudnn (torch, lossless)"] == "needs cuda tensors, found cpu"


def test_a_callback_of_reading_ends_with_its_block():
    pipe, seen = Pipeline.load(device="cpu", dtype="fp32"), []
    with contextlib.suppress(KeyError), pipe.parts.reading(lambda part, count: seen.append((part, count))):
        assert pipe.parts["vae"] is not None
        raise KeyError
    total = sum(count for _, count in seen)
    assert {part for part, _ in seen} == {"vae"} and total == pipe.parts.sizes("vae")[0]
    pipe.parts.free()
    assert pipe.parts["vae"] is not None and total == sum(count for _, count in seen)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["convert", "embedded", "out.gguf"], "a model is written as a folder"),
        (["quantize", "embedded", "out.safetensors", "--to", "int8"], "a model is written as a folder"),
        (["convert", "embedded", "out.safetensors"], "is for an adapter, embedded is a model; name a folder"),
        (["generate", "x", "--model", "Z-Image-Turbo"], "did you mean Tongyi-MAI/Z-Image-Turbo?"),
        (["generate", "x", "--image", "https://a.org/b.png"], "is an address; needed a picture in a file"),
        (["generate", "x", "--lora", ""], "--lora '': not found"),
        (["generate", "x", "-o", "out.tif"], "--output is 'out.tif'; needed a name that ends in .png"),
    ],
)
def test_files_that_other_programs_would_take(words, answer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert answer in err and err.count("\n") == 1 and not [*tmp_path.iterdir()]


MISSING = {
    "image": ["generate", "x", "--image", "no.png"],
    "mask": ["generate", "x", "--image", "a.png", "--mask", "no.png"],
    "control image": ["generate", "x", "--control", "a.png:no.png"],
    "control model": ["generate", "x", "--control", "no.safetensors:a.png"],
    "reference": ["plan", "x", "--reference", "no.png"],
    "picture to look at": ["microscope", "--replay", "no.png"],
    "prompts": ["generate", "--prompt-file", "no.txt"],
    "replay": ["generate", "--replay", "no.png"],
    "adapter": ["generate", "x", "--lora", "no.safetensors:0.8"],
    "adapter in a folder": ["generate", "x", "--lora", "styles/no.safetensors"],
    "part in a folder": ["plan", "x", "--transformer", "styles/no.gguf"],
    "vae": ["plan", "x", "--vae", "./no"],
    "inspect": ["inspect", "no.safetensors"],
    "convert": ["convert", "/no/model", "out"],
    "quantize": ["quantize", "no", "out", "--to", "int8"],
    "format": ["quantize", "a.png", "out", "--to", "q4"],
    "dtype": ["convert", "a.png", "out", "--dtype", "fp16"],
}


def test_what_is_missing_is_said_before_torch_is_imported(tmp_path):
    """All in one process, which ends with the first that imports torch."""
    (tmp_path / "styles").mkdir()
    (tmp_path / "a.png").write_bytes(b"x")
    code = (
        "import json, sys; from s3dit.cli.main import main\n"
        "for name, words in json.loads(sys.argv[1]).items():\n"
        "    sys.exit(f'{name}: torch') if main(words) != 2 or 'torch' in sys.modules else None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(MISSING)], cwd=tmp_path, capture_output=True, text=True
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and len(lines) == len(MISSING), done.stderr
    for (name, words), line in zip(MISSING.items(), lines, strict=True):
        assert "; needed " in line and ("not found" in line or name in ("format", "dtype")), line
        if words[0] in ("generate", "plan") and name != "prompts":
            assert line.startswith(f"s3dit: {words[-2]} "), line

"""The argument parser of every command: one-line errors, other programs' spellings, examples under --help.

Nothing is abbreviated: a word that is no option is answered with the nearest option, or with the way that the same
thing is done here (`ANSWERS`). What diffusers, ComfyUI, stable-diffusion.cpp and mflux call an option (`SPELLINGS`) is
registered beside it as a hidden option, so that `-H64`, `-H 64` and `--cfg-scale=3` are read as any other.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from s3dit.terminal import line

# What other programs call an option of this one.
SPELLINGS = {
    "-H": "--height", "-W": "--width", "-s": "--seed", "-b": "--count", "-i": "--image", "-m": "--model",
    "--cfg-scale": "--cfg", "--num-images": "--count", "--batch-count": "--count", "--batch-size": "--count",
    "--sampler": "--solver", "--sampling-method": "--solver", "--scheduler": "--schedule", "--flow-shift": "--shift",
    "--init-img": "--image", "--init-image": "--image", "--image-path": "--image",
    "--denoise": "--strength", "--negative": "--negative-prompt", "--lora-paths": "--lora",
    "--diffusion-model": "--transformer", "--llm": "--text-encoder", "--control-net": "--control",
    "--ref-image": "--reference", "--out": "--output",
    "--compat": "--preset",
}  # fmt: skip
# Spellings that mean one thing here and another there.
UNCLEAR = {
    "-n": "--count (how many pictures) or --negative-prompt", "-q": "--quantize or --quality",
    "--image-strength": "--strength, how much of the image is redrawn: 1 minus what mflux calls image strength",
}  # fmt: skip
LESS_MEMORY = "give a budget with --vram 4GiB, on a CPU with --ram 4GiB, or --residency streamed"
INTO_CONTROL = "it is part of the control: --control FILE:IMAGE:STRENGTH"
THREADS = (
    "set OMP_NUM_THREADS in the environment; of the workers of s3dit batch and s3dit serve --ray, --worker-threads"
)
# Options of other programs that are none here, and what does the same.
ANSWERS = {
    "--lora-scales": "write the strength behind the file: --lora style.safetensors:0.8",
    "--lora-scale": "write the strength behind the file: --lora style.safetensors:0.8",
    "--lora-strength": "write the strength behind the file: --lora style.safetensors:0.8",
    "--lora-model-dir": "name the file itself: --lora path/to/style.safetensors",
    "--control-image": INTO_CONTROL, "--control-strength": INTO_CONTROL, "--controlnet-image-path": INTO_CONTROL,
    "--controlnet-strength": INTO_CONTROL,
    "--vae-tiling": "large pictures are decoded by tiles by themselves; --vram SIZE makes the tiles smaller",
    "--offload-to-cpu": LESS_MEMORY, "--cpu-offload": LESS_MEMORY, "--low-ram": LESS_MEMORY, "--lowvram": LESS_MEMORY,
    "--medvram": LESS_MEMORY, "--novram": LESS_MEMORY, "--vae-on-cpu": LESS_MEMORY, "--clip-on-cpu": LESS_MEMORY,
    "--highvram": "keep every part in memory with --residency resident",
    "--gpu-only": "keep every part in memory with --residency resident",
    "--fp16": "fp16 overflows in this model; needed --dtype bf16 or --dtype fp32",
    "--bf16": "say --dtype bf16", "--fp32": "say --dtype fp32", "--cpu": "say --device cpu",
    "--type": "say --quantize with fp8, int8, int4, fp8-weights or int8-weights",
    "--threads": THREADS, "-t": THREADS,
    "--config-from-metadata": "draw a picture again with --replay FILE",
    "--metadata": "every picture carries its settings; --no-metadata leaves them out",
    "--clip-skip": "this text encoder has no layers to skip; leave it out",
    "--eta": "say --solver euler_ancestral for noise in each step",
    "--base-model": "say --model",
}  # fmt: skip
# What other programs call a solver, or a schedule, that there is here by another name.
VALUES = {
    "euler_a": "euler_ancestral", "euler a": "euler_ancestral", "k_euler": "euler", "dpm++2m": "dpmpp_2m",
    "dpm++ 2m": "dpmpp_2m", "k_dpmpp_2m": "dpmpp_2m", "flowmatcheulerdiscretescheduler": "euler", "flow_euler": "euler",
    "dpm++2m_sde": "dpmpp_2m_sde", "dpm++ 2m sde": "dpmpp_2m_sde", "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "res multistep": "res_multistep", "er sde": "er_sde", "uni_pc": "unipc", "uni_pc_bh2": "unipc",
    "unipcmultistepscheduler": "unipc", "flowmatchlcmscheduler": "lcm", "sgm uniform": "sgm_uniform",
    "kl optimal": "kl_optimal", "linear quadratic": "linear_quadratic",
}  # fmt: skip
# A command line and what it does.
Examples = Sequence[tuple[str, str]]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line each and end the process with exit code 2."""

    def __init__(self, **options: Any) -> None:
        """Take the options of argparse.ArgumentParser; neither abbreviations nor another layout of the epilog."""
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Print a message on standard error and exit with 2."""
        self.exit(2, line(f"s3dit: {message}; see {self.prog} --help") + "\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise argparse's error of a value that is none of an option's, with the one that was perhaps meant."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        meant = VALUES.get(str(value).lower()) or next(iter(get_close_matches(str(value), choices, 1, 0.6)), None)
        hint = f"; did you mean {meant}?" if meant in choices else ""
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}; needed one of {', '.join(choices)}{hint}")

    @property
    def options(self) -> Mapping[str, argparse.Action]:
        """Every spelling of an option that this parser knows, and what becomes of it."""
        return self._option_string_actions

    def add_spellings(self) -> None:
        """Register SPELLINGS of the options that this parser has, hidden from --help."""
        for spelling, option in SPELLINGS.items():
            if (known := self.options.get(option)) is not None and spelling not in self.options:
                self.add_argument(
                    spelling, action=type(known), dest=known.dest, type=known.type or str, choices=known.choices,
                    default=known.default, metavar=known.metavar, help=argparse.SUPPRESS,
                )  # fmt: skip

    def refuse(self, word: str, others: Mapping[str, "Parser"]) -> NoReturn:
        """Exit with 2 because of a word that is neither an option of this parser nor an expected argument.

        others: the parsers of all commands by name, whose option it may be.
        """
        if not word.startswith("-"):
            hint = "; put a prompt of several words in quotation marks" if "--prompt" in self.options else ""
            self.error(f"unexpected {word!r}{hint}")
        name = word.partition("=")[0]
        for known in (name, name[:2]):
            if known in UNCLEAR:
                self.error(f"{known} is not clear; say {UNCLEAR[known]}")
        if name in ANSWERS:
            self.error(f"there is no option {name}; {ANSWERS[name]}")
        if owners := [command for command, parser in others.items() if name in parser.options]:
            self.error(f"there is no option {name} here; s3dit {owners[0]} has it")
        shown = [option for option, action in self.options.items() if action.help is not argparse.SUPPRESS]
        # --vae-path is --vae before it is --image-path; an option under --help before another program's.
        begun = sorted((option for option in shown if name.startswith(f"{option}-")), key=len, reverse=True)
        nearest = begun or get_close_matches(name, shown, 1, 0.6) or get_close_matches(name, self.options, 1, 0.6)
        self.error(f"there is no option {name}" + (f"; did you mean {nearest[0]}?" if nearest else ""))


def shown_examples(examples: Iterable[tuple[str, str]], title: str = "examples:") -> str:
    """Lay out examples for the end of --help: a command line each, what it does beside it or below a long one."""
    lines = [title]
    for command, text in examples:
        lines += [f"  {command:<60}  {text}".rstrip()] if len(command) <= 60 else [f"  {command}", f"{'':64}{text}"]
    return "\n".join(lines)

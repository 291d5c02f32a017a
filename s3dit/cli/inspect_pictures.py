"""Describe what drew a picture, by metadata of s3dit, AUTOMATIC1111 and its forks, or ComfyUI; and how to repeat it.

Metadata are untrusted data: no file that they name is opened, except images of a replay that have the recorded hash.
The command for a picture of another program is the nearest one: another engine rounds otherwise, and draws other noise
for the same seed unless it is ComfyUI, whose noise and names `--convention comfyui` takes.

Source: the `parameters` of AUTOMATIC1111's `infotext_utils`; ComfyUI's API graph (`prompt`), nodes by number with
inputs that are values or links, a node's number and an output of it.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from s3dit.cli.inspect_report import HOME, Facts, draw
from s3dit.cli.record import PLACE, needed, own_name, read_record
from s3dit.errors import RequestError
from s3dit.files import taken
from s3dit.inputs.image_metadata import read_metadata, read_texts
from s3dit.presets import ABSENT
from s3dit.request import Request, Schedule

# How pictures that carry what made them begin.
PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
# Their samplers and schedules under the names that they have here; of others the nearest is the default.
SOLVERS = {
    "euler": "euler", "euler a": "euler_ancestral", "euler_ancestral": "euler_ancestral", "heun": "heun",
    "dpm++ 2m": "dpmpp_2m", "dpmpp_2m": "dpmpp_2m", "dpm++ 2m sde": "dpmpp_2m_sde", "dpmpp_2m_sde": "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde", "res multistep": "res_multistep", "res_multistep": "res_multistep",
    "res_multistep_ancestral": "res_multistep_ancestral", "res_2s": "res_2s", "er sde": "er_sde", "er_sde": "er_sde",
    "unipc": "unipc", "uni_pc": "unipc", "uni_pc_bh2": "unipc", "lcm": "lcm",
}  # fmt: skip
SCHEDULES = set(get_args(Schedule)) - {"official"}
# One `name: value` of the last line of `parameters`; a value with commas stands in quotation marks.
SETTING = re.compile(r'\s*([\w /-]{1,40}):\s*("(?:\\.|[^\\"]){0,4000}"|[^,]{0,4000})(?:,|$)')
LORA = re.compile(r"<lora:([^:<>]{1,200})(?::(-?[\d.]{1,8}))?[^<>]{0,80}>")
FAMILY = re.compile(r"z.?image", re.IGNORECASE)
COMFYUI = "a picture drawn by ComfyUI"
# Nodes and links of a graph that are looked at.
MOST_NODES = 4096


def is_picture(path: Path) -> bool:
    """Whether a file is there that begins as pictures do which carry what made them."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4).startswith(PICTURES)
    except OSError:
        return False


def picture(path: Path) -> Facts:
    """Describe what drew a picture, with the command that repeats it or the nearest; RequestError without metadata."""
    texts = read_texts(path)
    if "s3dit" not in texts and ("prompt" in texts or "workflow" in texts):
        return _comfyui(path, texts)
    if "s3dit" not in texts and re.search(r"^Steps: \d", texts.get("parameters", ""), re.MULTILINE):
        return _automatic(path, texts["parameters"])
    return _own(path)


def _own(path: Path) -> Facts:
    """A picture of this program: its metadata, and the replay with what only the user can give."""
    facts = read_metadata(path)
    try:
        record = read_record(data := dict(facts))
        request = Request.from_json(data)
        request.check()
        options = [word for pair in needed(record, request, path.parent) for word in pair]
    except RequestError as error:
        return Facts(str(path), "a picture drawn by s3dit", facts, "", (f"cannot be replayed: {error}",))
    names = (Path(f"again{'' if n < 2 else f'-{n}'}.png") for n in range(1, MOST_NODES))
    again = next(name for name in names if not taken(name))
    words = ["--replay", str(path), *options, "-o", str(again)]
    return Facts(str(path), "a picture drawn by s3dit", facts, f"s3dit generate {shlex.join(words)}")


def _automatic(path: Path, text: str) -> Facts:
    """From `parameters`: the prompt, perhaps a negative one, and a last line of settings."""
    head, _, last = text.rpartition("\nSteps: ") if "\nSteps: " in text else ("", "", text.removeprefix("Steps: "))
    prompt, _, negative = head.partition("\nNegative prompt: ")
    if prompt.startswith("Negative prompt: "):
        prompt, negative = "", prompt.removeprefix("Negative prompt: ")
    settings = {name.strip(): value.strip().strip('"') for name, value in SETTING.findall(f"Steps: {last}"[:20000])}
    width, _, height = settings.get("Size", "").partition("x")
    program = settings.get("Version", "")
    facts = {
        "prompt": prompt, "negative_prompt": negative, "seed": settings.get("Seed"), "steps": settings.get("Steps"),
        "sampler": settings.get("Sampler"), "schedule": settings.get("Schedule type"), "cfg": settings.get("CFG scale"),
        "shift": settings.get("Shift"), "width": width, "height": height, "model": settings.get("Model"),
        "adapters": [{"file": name, "strength": scale or "1"} for name, scale in LORA.findall(prompt[:20000])][:16],
        "version": program,
    }  # fmt: skip
    # Adapters stand in the prompt, of which they are no part.
    return _foreign(path, "a picture in the form of AUTOMATIC1111 (Forge, SD.Next, …)", facts, LORA.sub("", prompt))


def _comfyui(path: Path, texts: Mapping[str, str]) -> Facts:
    """From the graph that ComfyUI ran; the one that it shows (`workflow`) has its values without names."""
    try:
        graph = json.loads(texts["prompt"]) if "prompt" in texts else {}
    except (ValueError, RecursionError) as error:
        return Facts(
            str(path), COMFYUI, {}, "", (f"its graph is damaged ({str(error)[:200]}); take the original file",)
        )
    nodes = {str(key): node for key, node in graph.items() if _is_node(node)} if isinstance(graph, dict) else {}
    start = next((key for key, node in nodes.items() if _samples(node["inputs"])), None)
    if start is None or len(nodes) > MOST_NODES:
        why = f"none of its {len(nodes)} nodes is a sampler that is known here" if nodes else "it carries no run graph"
        return Facts(str(path), COMFYUI, {"nodes": len(nodes)}, "", (f"{why}, so no settings are told",))

    def first(*names: str, at: str = start, by: str | None = None, what: Any = (str, int, float)) -> Any:
        """The nearest value of these names above a node; None where there is none."""
        return next(_upstream(nodes, at, names, by, what), None)

    guider = "positive" if "positive" in nodes[start]["inputs"] else "guider"
    words = ("text", "prompt", "string", "value")
    adapters = [
        {"file": name, "strength": node["inputs"].get("strength_model", 1)}
        for node in nodes.values()
        if isinstance(name := node["inputs"].get("lora_name"), str)
    ]
    facts = {
        "prompt": first(*words, by=guider, what=str), "negative_prompt": first(*words, by="negative", what=str),
        "seed": first("seed", "noise_seed", what=int), "steps": first("steps", what=int),
        "sampler": first("sampler_name", what=str), "schedule": first("scheduler", what=str),
        "cfg": first("cfg"), "shift": first("shift"), "width": first("width", what=int),
        "height": first("height", what=int), "model": first("unet_name", "ckpt_name", "model_name", what=str),
        "adapters": adapters[:16], "dtype": first("weight_dtype", what=str),
        "denoise": first("denoise", what=(int, float)),
    }  # fmt: skip
    return _foreign(path, COMFYUI, facts, facts["prompt"] or "")


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("inputs"), dict)


def _samples(inputs: Mapping[str, Any]) -> bool:
    """Whether a node with these inputs is the one that draws."""
    return "latent_image" in inputs and ("positive" in inputs or "guider" in inputs)


def _upstream(nodes: Mapping[str, Any], at: str, names: tuple[str, ...], by: str | None, what: Any) -> Iterator[Any]:
    """Values of these names in a node and, nearest first, in those that it is linked to; `by`: through one input."""
    waiting, seen = [(at, by)], set[str]()
    while waiting:
        key, only = waiting.pop(0)
        if key in seen or key not in nodes:
            continue
        inputs = nodes[key]["inputs"]
        seen.add(key)
        # A negative prompt that is zeroed out is none, though its text is the positive one.
        if nodes[key].get("class_type") == "ConditioningZeroOut":
            continue
        if only is None:
            yield from (
                inputs[name] for name in names if isinstance(inputs.get(name), what) and inputs[name] is not True
            )
        links = [inputs.get(only)] if only else inputs.values()
        waiting += [(str(link[0]), None) for link in links if isinstance(link, list) and len(link) == 2]


def _foreign(path: Path, kind: str, facts: dict[str, Any], prompt: str) -> Facts:
    """The facts of another program's picture, and the command that comes closest."""
    notes = ["another program drew it: the nearest command draws another picture of the same words"]
    options, model, comfyui = ["--model", HOME], str(facts["model"] or ""), kind == COMFYUI
    sampler, schedule = str(facts["sampler"] or "").lower(), str(facts["schedule"] or "").lower().replace(" ", "_")
    wanted = {
        "seed": ("--seed", _number(facts["seed"], int)),
        "num_inference_steps": ("--steps", _number(facts["steps"], int)),
        "cfg": ("--cfg", _number(facts["cfg"], float)), "shift": ("--shift", _number(facts["shift"], float)),
        "height": ("--height", _side(facts["height"])), "width": ("--width", _side(facts["width"])),
        "solver": ("--solver", SOLVERS.get(sampler)),
        "schedule": ("--schedule", schedule if schedule in SCHEDULES else None),
        "convention": ("--convention", "comfyui" if comfyui and SOLVERS.get(sampler) not in ABSENT else None),
        "negative_prompt": ("--negative-prompt", _one_line(facts["negative_prompt"])),
    }  # fmt: skip
    if sampler and sampler not in SOLVERS:
        notes.append(f"the sampler {sampler[:40]} is none of this engine's: euler takes its place")
    for name, (option, value) in wanted.items():
        if value is None or value == "":
            continue
        try:
            Request(prompt="", **{name: value}).check()
        except RequestError as error:
            notes.append(f"left out: {error}")
            continue
        options.append(f"{option}={value}" if str(value).startswith("-") else option)
        options += [] if str(value).startswith("-") else [f"{value:g}" if isinstance(value, float) else str(value)]
    if FAMILY.search(model):
        for adapter in facts["adapters"]:
            strength = _number(adapter["strength"], float) or 1
            options += ["--lora", f"{PLACE}{own_name(str(adapter['file']))}:{strength:g}"]
    elif model:
        notes.append(f"its model is {model[:80]}, which does not sound like Z-Image; none is loaded by that name")
    return Facts(str(path), kind, facts, draw(options, _one_line(prompt)), tuple(notes))


def _one_line(text: Any) -> str:
    return " ".join(text.split()) if isinstance(text, str) else ""


def _number(value: Any, kind: Any) -> Any:
    """A number in text or of JSON, None where there is none."""
    try:
        return None if value is None or value == "" else kind(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _side(value: Any) -> int | None:
    """The nearest side that is a multiple of 16."""
    side = _number(value, int)
    return None if side is None else max(16, round(side / 16) * 16)

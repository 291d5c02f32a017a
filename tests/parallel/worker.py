"""Five processes that draw the same requests on 1, 2, 3, 4 and 5 ranks, one world after another.

    python worker.py FOLDER

FOLDER holds what the test wrote: cases.json, models, and where the worlds meet. Rank 0 writes the results of every case
and world there, and every rank notes what it sent and what it was told.
"""

import json
import os
import signal
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from s3dit import Pipeline
from s3dit.cli.main import main as command
from s3dit.control import Control
from s3dit.errors import RequestError
from s3dit.parallel.passes import Places

SENT = []


def counted(gather):
    """An all-gather that notes how many bytes this rank sends."""

    def run(out, x, group, async_op):
        SENT.append(x.numel() * x.itemsize * (dist.get_world_size(group) - 1))
        return gather(out, x, group=group, async_op=async_op)

    return run


def pipelines(folder, cases, **more):
    """A pipeline for each distinct model of the cases."""
    made = {}
    for case in cases.values():
        key = json.dumps(case["load"])
        if key not in made:
            load = dict(case["load"])
            style = load.pop("lora", None)
            load = {k: str(folder / v) if k == "model" else v for k, v in load.items()}
            made[key] = Pipeline.load(device="cpu", **load, **more)
            if style is not None:
                made[key].lora.attach(folder / style, 0.7)
        case["pipe"] = made[key]
    return made


def drawn(folder, case):
    """Latents and pictures of a case, by name."""
    fields = dict(case["fields"])
    for name in ("image", "reference"):
        if name in fields:
            fields[name] = str(folder / fields[name])
    if "control" in fields:
        file, image, strength = fields["control"]
        fields["control"] = Control(folder / file, image=str(folder / image), strength=strength)
    result = case["pipe"](**fields)
    named = {f"latents {i}": latents for i, latents in enumerate(result.latents)}
    return named | {f"picture {i}": picture for i, picture in enumerate(result.images)}


def sent(case, world, rank):
    """Bytes that were sent by a drawing, those of the formula, and the groups of its calls."""
    pipe = case["pipe"]
    plan, config, ranks = pipe.plan(**case["fields"]), pipe.config.transformer, pipe.parts.ranks
    layout = plan.layout(config, bool(plan.request.guidance_scale), "cpu")
    places = Places.of(ranks.form, layout.image, layout.joint, layout.gather)
    return [sum(SENT), places.sent(config, 4, world)[rank] * plan.calls, places.groups]


def told(folder, pipe, rank):
    """What planning says of a request that is wrong on rank 0 alone, of none without a seed, of some that differ."""
    notes = {}
    for name, ask in (("wrong", lambda: pipe.plan("a star", height=64 if rank else 7)),
                      ("seed", lambda: pipe.plan("a star").request.seed),
                      ("differs", lambda: pipe.plan("a star" if rank else "a ring")),
                      ("limits", lambda: pipe.plan("a star", seed=1, guidance_scale=1, cfg_normalization=bool(rank))),
                      ("noise", lambda: pipe.plan("a star", latents=torch.full((1, 16, 16, 16), float(rank)))),
                      ("adapters", lambda: pipe.plan("a star", seed=1))):  # fmt: skip
        if name == "adapters" and rank:
            pipe.lora.attach(folder / "style.safetensors", 0.7)
        try:
            notes[name] = ask()
        except RequestError as error:
            notes[name] = str(error)
    return notes


def commanded(rank, folder):
    """Draw by the command line as torchrun would start it -> exit code, standard output and errors."""
    port = (folder / "port").read_text()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = ["generate", "a red star", "--size", "64x64", "--steps", "1", "--device", "cpu", "--parallel", "2"]
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = command([*words, "-o", str(folder / "drawn.png")])
    return [code, out.getvalue(), err.getvalue()]


def worlds(folder):
    """Return the numbers of ranks to draw with, one first."""
    cases = json.loads((folder / "cases.json").read_text())
    return sorted({1, *(world for case in cases.values() for world in case["worlds"])})


def main(rank, folder):
    """Draw every case in every world."""
    torch.set_num_threads(1)
    cases = json.loads((folder / "cases.json").read_text())
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    setattr(dist, name, counted(getattr(dist, name)))
    notes = {}
    for world in worlds(folder):
        if rank >= world:
            continue
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
        own = {name: case for name, case in cases.items() if world in (1, *case["worlds"])}
        made = pipelines(folder, own, parallel=world)
        for name, case in own.items():
            SENT.clear()
            result = drawn(folder, case)
            if rank == 0:
                save_file({k: v.contiguous() for k, v in result.items()}, folder / f"{name} {world}.safetensors")
            if case.get("counted") and world > 1:
                notes[f"{name} {world}"] = sent(case, world, rank)
        if world > 1:
            notes[f"told {world}"] = told(folder, next(iter(made.values())), rank)
            for each in made.values():
                each.parts.ranks.close()
            dist.destroy_process_group()
    if rank < 2:
        notes["command"] = commanded(rank, folder)
    (folder / f"notes{rank}.json").write_text(json.dumps(notes))


def forked(run, count):
    """Run a function of a rank in as many processes -> 0 if all of them ended well; the first that fails ends all."""
    children = {}
    for rank in range(count):
        if not (child := os.fork()):
            try:
                run(rank)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        children[child] = rank
    while children:
        child, status = os.wait()
        del children[child]
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    # What is imported is imported once: that is most of the work.
    folder = Path(sys.argv[1])
    sys.exit(forked(lambda rank: main(rank, folder), max(worlds(folder))))

"""Record the stages of a picture drawn by this engine and of the same drawn by diffusers, under the same names.

Both give a trace.Record of the same rungs: token ids, text features, noise levels, noise, rotary tables, the modules of
the transformer in the first step, then time, velocity and latents of every step, the decoded picture and its bytes. The
transformers' modules carry the same official names; what differs is their form, and the reference's is brought into
this engine's: items end to end, image before caption, without the padding of a batch.

The reference is diffusers' own pipeline, its parts loaded one at a time. The official repository's transformer can take
the place of diffusers' in it. `parity.py` compares.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s3dit import Pipeline
from s3dit.errors import RequestError
from s3dit.inputs.images import to_pil
from s3dit.model.layout import Layout, text_to_image
from s3dit.research.trace import Record, trace
from s3dit.sampling.step import split_latents

# What is looked at inside the transformer, in the first step and in the later ones.
RUNGS = ["cap_embedder", "context_refiner.*", "t_embedder", "all_x_embedder.2-1", "noise_refiner.*", "layers.*"]
FINAL = "all_final_layer.2-1"
LATER = ["t_embedder", FINAL]
# The streams, and the blocks that each runs through.
STREAMS = {"text": "context_refiner", "image": "noise_refiner", "whole": "layers"}


@dataclass(frozen=True, slots=True)
class Task:
    """What both sides draw. `inside` names a module whose own modules are looked at too; "" for none."""

    folder: Path
    prompt: str
    negative_prompt: str
    height: int
    width: int
    steps: int
    guidance: float
    seed: int
    inside: str = ""
    device: str | None = None

    @property
    def texts(self) -> dict[str, str]:
        """The prompts that are used, by the prefix of their stages."""
        return {"": self.prompt} | ({"negative ": self.negative_prompt} if self.guidance > 0 else {})

    @property
    def patterns(self) -> list[str]:
        """The modules to look at in the first step."""
        return [*RUNGS, FINAL, *([f"{self.inside}.**"] if self.inside else [])]


def pixels(picture: Tensor) -> Tensor:
    """The bytes of a decoded picture (1, 3, H, W): (H, W, 3) uint8."""
    image = to_pil(picture)[0]
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


@contextmanager
def ropes(model: nn.Module, form: Callable[[str, Any], Tensor]) -> Iterator[Record]:
    """Keep the rotary table of each stream: `form` finds it in the arguments of the stream's first block."""
    record: Record = {}
    with ExitStack() as stack:
        for stream, blocks in STREAMS.items():

            def look(module: nn.Module, args: Any, stream: str = stream, blocks: str = blocks) -> None:
                """A forward pre-hook of the stream's first block: record its rotary table."""
                record[f"rope of {stream}"] = form(blocks, args).cpu()

            stack.callback(model.get_submodule(f"{blocks}.0").register_forward_pre_hook(look).remove)
        yield record


def after(i: int, modules: Record, velocity: Tensor, latents: Tensor) -> Record:
    """The stages of step i, from 1; `modules` is what was seen in it, and is emptied."""
    stages = {name.partition("#")[0] + (f", step {i}" if i > 1 else ""): tensor for name, tensor in modules.items()}
    modules.clear()
    return stages | {f"velocity, step {i}": velocity.cpu().clone(), f"latents, step {i}": latents.cpu().clone()}


def ours(task: Task, dtype: str) -> Record:
    """Run this engine; dtype "fp32" or "bf16" is what the weights are kept in."""
    pipe = Pipeline.load(task.folder, device=task.device, dtype=dtype)
    print(f"s3dit on {pipe.placement}", file=sys.stderr)
    record: Record = {}
    for prefix, text in task.texts.items():
        record[f"{prefix}token ids"] = torch.tensor(pipe.tokenizer.encode(text))
        record[f"{prefix}text features"] = pipe.encode([text])[0].cpu()
    stream = pipe.stream(
        prompt=task.prompt, negative_prompt=task.negative_prompt, height=task.height, width=task.width,
        num_inference_steps=task.steps, guidance_scale=task.guidance, seed=task.seed,
    )  # fmt: skip
    transformer = pipe.parts["transformer"]
    with trace(transformer, task.patterns) as modules, ropes(transformer, lambda blocks, args: args[1]) as tables:
        step = next(stream)
    levels, stages = [step.sigma], {"noise": split_latents(step.start, step.grids)[0].cpu()} | tables
    with trace(transformer, LATER) as later:
        while True:
            velocity = split_latents(step.velocity, step.grids)[0]
            stages |= after(step.i, modules if step.i == 1 else later, velocity, step.latents[0])
            levels.append(step.sigma_next)
            if step.i == step.n:
                break
            step = next(stream)
    picture = pipe.decode([step.latents[0]])[0][None]
    return record | {"sigmas": torch.tensor(levels)} | stages | {"VAE decode": picture, "pixels": pixels(picture)}


def reference(task: Task, dtype: torch.dtype, official: Path | None = None) -> Record:
    """Run diffusers in `dtype`; `official`, a checkout of the official repository, gives the transformer."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    device = torch.device(task.device or "cpu")
    print(f"diffusers {diffusers.__version__} on {device}, {dtype}", file=sys.stderr)
    load = diffusers.ZImagePipeline.from_pretrained
    pipe = load(task.folder, transformer=None, vae=None, dtype=dtype).to(device)
    record, features = encoded(task, pipe)
    scheduler = pipe.scheduler
    del pipe
    folder = task.folder / "transformer"
    if official is None:
        transformer = diffusers.ZImageTransformer2DModel.from_pretrained(folder, dtype=dtype)
    else:
        transformer = Official(official, folder, dtype)
    stages, latents = sampled(task, transformer.to(device).eval(), scheduler, features)
    del transformer
    vae = diffusers.AutoencoderKL.from_pretrained(task.folder / "vae", dtype=dtype).to(device)
    raw = latents.to(dtype) / vae.config.scaling_factor + vae.config.shift_factor
    picture = vae.decode(raw).sample.float().cpu()
    return record | {"sigmas": scheduler.sigmas.cpu()} | stages | {"VAE decode": picture, "pixels": pixels(picture)}


def encoded(task: Task, pipe: Any) -> tuple[Record, list[Tensor]]:
    """Token ids and features of the prompts as stages, and the features again as diffusers wants them."""
    ids: list[Tensor] = []

    def look(module: nn.Module, args: Any, named: dict[str, Tensor]) -> None:
        """A forward pre-hook of the text encoder: record the token ids without padding."""
        ids.append(named["input_ids"][named["attention_mask"].bool()].cpu())

    with ExitStack() as stack:
        stack.callback(pipe.text_encoder.register_forward_pre_hook(look, with_kwargs=True).remove)
        features = [pipe.encode_prompt([text], do_classifier_free_guidance=False)[0][0] for text in task.texts.values()]
    record: Record = {}
    for prefix, one, feature in zip(task.texts, ids, features, strict=True):
        record |= {f"{prefix}token ids": one, f"{prefix}text features": feature.cpu()}
    return record, features


def sampled(task: Task, transformer: Any, scheduler: Any, features: list[Tensor]) -> tuple[Record, Tensor]:
    """Diffusers' loop as stages, and its last latents (1, C, h, w)."""
    import diffusers

    model = getattr(transformer, "inner", transformer)
    grids = [(task.height // 16, task.width // 16)] * len(features)
    layout = text_to_image(grids, [len(one) for one in features])
    stages: Record = {}
    with ExitStack() as looking:
        modules = looking.enter_context(trace(model, task.patterns))
        tables = looking.enter_context(ropes(model, lambda blocks, args: rope_of(blocks, args, layout)))
        take, i = scheduler.step, 0

        def watched(velocity: Tensor, t: Tensor, x: Tensor, **named: Any) -> Any:
            """The scheduler's step, with everything of it recorded as stages."""
            nonlocal modules, stages, i
            i, result = i + 1, take(velocity, t, x, **named)
            seen = {name: packed(name, tensor, layout) for name, tensor in modules.items()}
            stages |= {"noise": x[0].cpu().clone()} | tables if i == 1 else {}
            stages |= after(i, seen, -velocity[0], result[0][0])
            looking.close()
            modules = looking.enter_context(trace(model, LATER))
            return result

        scheduler.step = watched
        pipe = diffusers.ZImagePipeline(scheduler, None, None, None, transformer)
        pipe.set_progress_bar_config(disable=True)
        latents = pipe(
            prompt_embeds=features[:1], negative_prompt_embeds=features[1:], height=task.height, width=task.width,
            num_inference_steps=task.steps, guidance_scale=task.guidance, output_type="latent",
            generator=torch.Generator().manual_seed(task.seed),
        ).images  # fmt: skip
    return stages, latents


def rope_of(blocks: str, args: Any, layout: Layout) -> Tensor:
    """The rotary table among the arguments of a reference block, (B, L, D/2) complex -> (N, D/2, 2)."""
    table = next(value for value in args if isinstance(value, Tensor) and value.is_complex())
    return torch.view_as_real(packed(blocks, table.cpu(), layout))


def packed(name: str, output: Tensor, layout: Layout) -> Tensor:
    """What a reference module gave for a padded batch in this engine's form: items end to end, without padding."""
    top = re.split("[.#]", name)[0]
    if output.ndim == 2:
        real = {"cap_embedder": layout.text.token_index, "all_x_embedder": layout.image.token_index}.get(top)
        # What follows from the time alone is the same for every item.
        return output[:1] if real is None else output[real]
    pack = {"context_refiner": layout.text, "noise_refiner": layout.image}.get(top, layout.joint)
    tokens = torch.cat([item[:length] for item, length in zip(output, pack.spans.lengths, strict=True)])
    return tokens[layout.joint.token_index] if top == "all_final_layer" else tokens


class Official(nn.Module):
    """The official repository's transformer behind the call that diffusers' pipeline makes."""

    def __init__(self, checkout: Path, folder: Path, dtype: torch.dtype) -> None:
        super().__init__()
        source = checkout / "src"
        if not (source / "zimage" / "transformer.py").is_file():
            raise RequestError(f"{checkout}: no src/zimage/transformer.py; needed a checkout of Tongyi-MAI/Z-Image")
        if str(source) not in sys.path:
            sys.path.insert(0, str(source))
        # Its modules greet on standard output, which belongs to the results.
        with redirect_stdout(sys.stderr):
            from utils.loader import load_sharded_safetensors  # type: ignore[import-not-found]
            from zimage.transformer import ZImageTransformer2DModel  # type: ignore[import-not-found]
        known = ZImageTransformer2DModel.__init__.__code__.co_varnames
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.inner = ZImageTransformer2DModel(**{key: value for key, value in config.items() if key in known})
        self.inner.load_state_dict(load_sharded_safetensors(folder, device="cpu"))
        self.inner.to(dtype)
        self.dtype, self.in_channels = dtype, self.inner.in_channels

    @property
    def device(self) -> torch.device:
        """Where the pipeline puts its own tensors."""
        return self.inner.x_pad_token.device

    def forward(self, x: list[Tensor], t: Tensor, text: list[Tensor], **ignored: object) -> Any:
        """Latents (C, 1, H, W), times and caption features, one an item -> (velocities, …)."""
        return self.inner(x, t, text)

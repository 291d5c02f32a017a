"""The stages of a picture drawn by this engine, recorded while it is drawn."""

from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from s3dit.inputs.images import to_pil
from s3dit.kernels.norm import qk_norm_rope
from s3dit.parity.packing import of_ours
from s3dit.parity.taps import (
    FIRST,
    LATER,
    NOWHERE,
    OMNI,
    SAMPLE,
    VAE,
    Calls,
    Inside,
    by_name,
    check_inside,
    tap_attention,
    tap_streams,
)
from s3dit.pipeline import Pipeline
from s3dit.plan import Plan
from s3dit.research.trace import trace
from s3dit.sampling.step import Step, split_latents

Stages = MutableMapping[str, Tensor]


@torch.inference_mode()
def ours(pipe: Pipeline, plan: Plan, out: Stages, inside: Inside = NOWHERE) -> Stages:
    """Draw a plan and put its stages into `out`, as they come; returns it.

    Recorded CUDA graphs call no module: of those only what enters and leaves a step is a stage. Raises RequestError for
    modules that there are not.
    """
    modules = {part: pipe.parts.component(part).module for part in ("transformer", "text_encoder", "vae")}
    names = {part: [name for name, _ in module.named_modules()] for part, module in modules.items()}
    names["text"] = [name.removeprefix("model.") for name in names.pop("text_encoder")]
    check_inside(inside, names | {"": names["transformer"]})
    with ExitStack() as stack:
        first = stack.enter_context(_Taps(pipe, plan, inside, whole=True)) if not pipe.graphs else None
        stream = pipe.stream(plan)
        step = next(stream)
        _texts(pipe, plan, out, first)
        out["sigmas"] = torch.tensor(plan.sigmas)
        if first is not None:
            first.encoded(out)
        out["start" if plan.start_images else "noise"] = _stacked(step.start, step)
        if first is not None:
            for name, tensor in of_ours(first.calls.done[0], any(plan.references)):
                first.hints(out, before=name)
                out[name] = tensor
        _after(step, out)
    with ExitStack() as stack:
        later = None if pipe.graphs or step.i == step.n else stack.enter_context(_Taps(pipe, plan, inside, whole=False))
        while step.i < step.n:
            if later is not None:
                later.calls.done.clear()
            step = next(stream)
            if later is not None:
                named = of_ours(later.calls.done[0], False)
                out.update((f"{name}, step {step.i}", tensor) for name, tensor in named)
            _after(step, out)
    _decoded(pipe, plan, step.latents, out, inside)
    return out


def _stacked(x: Tensor, step: Step) -> Tensor:
    """A flat state as latents (B, 16, H/8, W/8); of several sizes as it is."""
    pieces = split_latents(x, step.grids)
    return (torch.stack(pieces) if len({piece.shape for piece in pieces}) == 1 else x).cpu()


def _after(step: Step, out: Stages) -> None:
    """What leaves a step."""
    out[f"velocity, step {step.i}"] = _stacked(step.velocity, step)
    out[f"latents, step {step.i}"] = _stacked(step.x, step)


class _Taps(ExitStack):
    """What is looked at while a plan is drawn; whole: in its first step, with everything before it."""

    def __init__(self, pipe: Pipeline, plan: Plan, inside: Inside, *, whole: bool) -> None:
        super().__init__()
        component = pipe.parts.component
        transformer = component("transformer").module
        omni = OMNI if any(plan.references) else []
        finer = inside.of("")
        patterns = [*FIRST, *omni, f"{SAMPLE}.attention.to_v", *(f"{name}.**" for name in finer)] if whole else LATER
        self.plan, self.inside = plan, inside
        self.calls = Calls(self, transformer, patterns)
        if not whole:
            return
        tap_streams(self, transformer, self.calls, lambda args: args[1])
        text, vae = component("text_encoder").module, component("vae").module
        finer_text = [f"model.{name}" for name in inside.of("text")]
        self.text = Calls(self, text, ["", "model.layers.*", *(f"{name}.**" for name in finer_text)])
        tap_attention(self, transformer, self.calls, [SAMPLE, *finer], _rotated)
        tap_attention(self, text, self.text, finer_text, _rotated, "o_proj")
        pictures = plan.start_images or plan.controls or any(plan.references)
        finer_vae = [f"{name}.**" for name in inside.of("vae") if name.startswith("encoder")]
        self.vae = self.enter_context(trace(vae, [*VAE["encoder"], *finer_vae])) if pictures else {}
        self.tower: dict[str, Tensor] = {}
        if any(plan.references):
            self.tower = self.enter_context(trace(component("siglip").module, ""))
        self.nets: list[dict[str, Tensor]] = []
        self.refiners = pipe.config.transformer.n_refiner_layers
        for control in plan.controls:
            net = component(control.part).module
            own = ["control_noise_refiner.*"] if control.config.version == "2.1" else []
            self.nets.append(self.enter_context(trace(net, ["control_all_x_embedder.2-1", *own, "control_layers.*"])))

    def encoded(self, out: Stages) -> None:
        """What the vision tower and the encoder of the autoencoder made of pictures, one after the other."""
        for i, features in enumerate(self.tower.values(), 1):
            out[f"vision features, picture {i}"] = features
        for name, calls in by_name(self.vae).items():
            for i, tensor in enumerate(calls, 1):
                out[f"vae.{name}, picture {i}"] = tensor

    def hints(self, out: Stages, before: str) -> None:
        """What ControlNets make of their pictures, before the stream that it is for: patches, and hints · strength."""
        if before not in ("rope of image", "rope of whole"):
            return
        for k, (control, seen) in enumerate(zip(self.plan.controls, self.nets, strict=True), 1):
            strength, refiners = control.control.strength or 0.0, 0
            for name, calls in by_name(seen).items():
                kind, _, i = name.partition(".")
                # A block answers with its stream and its hint; 2.0 runs its layers for the refiner, and then again.
                if before == "rope of whole":
                    if kind == "control_layers":
                        out[f"control {k}: hint of layers.{control.config.places[int(i)]}"] = calls[-1] * strength
                elif "embedder" in kind:
                    out[f"control {k}: embedded"] = calls[-1]
                elif len(calls) > 2 or (kind == "control_noise_refiner" and len(calls) == 2):
                    if refiners < self.refiners:
                        out[f"control {k}: hint of noise_refiner.{refiners}"] = calls[1] * strength
                    refiners += 1


@contextmanager
def _rotated(show: Any) -> Iterator[None]:
    """Show queries and keys as attention multiplies them; the implementation stays what it would be unobserved."""
    with ExitStack() as stack:

        def observe(*args: Any) -> Any:
            """Run the operation outside of its own override."""
            stack.close()
            try:
                q, k = qk_norm_rope(*args)
            finally:
                stack.enter_context(qk_norm_rope.using(observe))
            show(q, k)
            return q, k

        stack.enter_context(qk_norm_rope.using(observe))
        yield


def _texts(pipe: Pipeline, plan: Plan, out: Stages, taps: _Taps | None) -> None:
    """Token ids, layers and features of the prompts, then of the negative ones.

    Each distinct text was encoded once, by itself; here they are laid out as the pictures' prompts read them.
    """
    count = len(plan.owners)
    done = [] if taps is None else [by_name(seen) for seen in taps.text.done]
    for prefix, captions in (("", plan.captions[:count]), ("negative ", plan.captions[count:])):
        texts = [text for caption in captions for text in caption if isinstance(text, tuple)]
        if not texts:
            continue
        out[f"{prefix}token ids"] = torch.tensor([token for text in texts for token in text])
        distinct = list(dict.fromkeys(texts))
        if done:
            # An encoder that is looked at keeps nothing: negative prompts were encoded again if they are prompts, too.
            calls, done = dict(zip(distinct, done[: len(distinct)], strict=True)), done[len(distinct) :]
            for name in calls[texts[0]]:
                # The encoder itself, without a name, answers with the features.
                stage = name.replace("model.", "text.", 1) or "text features"
                out[f"{prefix}{stage}"] = torch.cat([calls[text][name][0] for text in texts])
        else:
            features = pipe.encoders.encode_texts(texts)
            out[f"{prefix}text features"] = torch.cat([each.cpu() for each in features])


def _decoded(pipe: Pipeline, plan: Plan, latents: list[Tensor], out: Stages, inside: Inside) -> None:
    """The blocks of the decoder, the pictures (B, 3, H, W), and their bytes (B, H, W, 3)."""
    vae = pipe.parts.component("vae").module
    finer = [f"{name}.**" for name in inside.of("vae") if name.startswith("decoder")]
    with trace(vae, [*VAE["decoder"], *finer]) as seen:
        pictures = pipe.decode(latents, plan.tile)
    for name, calls in by_name(seen).items():
        # By tiles there are more calls than pictures.
        if len(calls) == len(pictures) and len({call.shape for call in calls}) == 1:
            out[f"vae.{name}"] = torch.cat(calls)
    same = len({picture.shape for picture in pictures}) == 1
    for i, of_size in enumerate([pictures] if same else [[picture] for picture in pictures]):
        suffix = "" if same else f", picture {i + 1}"
        out[f"VAE decode{suffix}"] = torch.stack(of_size)
        out[f"pixels{suffix}"] = pixels(torch.stack(of_size))


def pixels(pictures: Tensor) -> Tensor:
    """The bytes of decoded pictures (B, 3, H, W): (B, H, W, 3) uint8."""
    images = to_pil(pictures)
    size = (len(images), images[0].height, images[0].width, 3)
    return torch.frombuffer(bytearray(b"".join(image.tobytes() for image in images)), dtype=torch.uint8).view(size)

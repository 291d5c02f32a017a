"""The stages of the same picture drawn by diffusers, recorded by hooks on its own pipelines.

Which pipeline draws follows from the plan: text to image, image to image, inpainting, ControlNets with and without
inpainting, Omni. A part is loaded when it is used, and the text encoder goes before the transformer comes. What of a
plan diffusers cannot draw is refused by name (`refusals`); where it needs a hand, in the posterior of start images, the
rule of a ControlNet's refiner or maps of change, a note says so.
"""

import gc
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3dit.errors import BackendError, CheckpointError, RequestError
from s3dit.inputs.noise import sources
from s3dit.parity.official import Official
from s3dit.parity.ours import Stages, pixels
from s3dit.parity.packing import of_reference
from s3dit.parity.parts import ReferenceParts
from s3dit.parity.reference_call import Call, call_of
from s3dit.parity.reference_control import ControlTaps
from s3dit.parity.reference_patches import attended, patched, rotated_text
from s3dit.parity.solvers import scheduler_of
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
    tap_attention,
    tap_streams,
)
from s3dit.pipeline import Pipeline
from s3dit.plan import Plan
from s3dit.research.trace import trace
from s3dit.terminal import say

# Bytes of a part up to which its memory is not looked for.
SMALL = 1 << 28


@torch.no_grad()
def reference(
    pipe: Pipeline,
    plan: Plan,
    out: Stages,
    inside: Inside = NOWHERE,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    streamed: bool = False,
    official: Path | None = None,
    notes: list[str] | None = None,
) -> Stages:
    """Draw a plan of `pipe`'s model with diffusers and put its stages into `out`, as they come; returns it.

    streamed: read blocks of the large parts as they compute · official: a checkout of Tongyi-MAI/Z-Image, whose
    transformer takes the place of diffusers' · notes: gets what is not compared, or was done for the reference.
    Raises RequestError for a plan that diffusers cannot draw, and for what it raises itself.
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    say(f"diffusers {diffusers.__version__} on {device}, {str(dtype).removeprefix('torch.')}")
    call = call_of(plan, pipe.config, notes := [] if notes is None else notes)
    with ReferenceParts(pipe, dtype, device, streamed) as parts:
        drawing = parts.enter_context(_Drawing(parts, plan, call, out, inside))
        try:
            drawing.decode(drawing.run(official))
        except (RequestError, CheckpointError, BackendError, ImportError):
            raise
        except Exception as error:
            # A traceback would end with 1, as if a stage parted.
            said = next(iter(str(error).splitlines()), "")
            raise RequestError(f"diffusers failed on its side: {type(error).__name__}: {said[:300]}") from error
        notes += parts.notes
    return out


class _Late:
    """A model that is loaded when something of it is first used."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load, self._model = load, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded(), name)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._loaded()(*args, **named)

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model


class _Drawing(ExitStack):
    """A pipeline of diffusers that draws a plan, with taps on its parts."""

    def __init__(self, parts: ReferenceParts, plan: Plan, call: Call, out: Stages, inside: Inside) -> None:
        super().__init__()
        self.parts, self.plan, self.call, self.out, self.inside = parts, plan, call, out, inside
        self.omni = parts.pipe.config.transformer.siglip_feat_dim is not None
        self.items: list[int] = []
        self.texts = self.i = 0
        self.first = ExitStack()
        self.control: ControlTaps | None = None

    def run(self, official: Path | None) -> Tensor:
        """Draw -> the last latents (B, 16, H/8, W/8)."""
        import diffusers

        parts, device = self.parts, self.parts.device
        own = [source.generator for source in sources(self.plan.request)]
        self.scheduler = scheduler_of(parts.scheduler_config(), self.plan, own)
        self.vae, self.text_encoder = parts.load("vae"), parts.load("text_encoder")
        late = _Late(lambda: self._transformer(official))
        given: dict[str, Any] = {"transformer": late}
        if self.call.control is not None:
            # Its pipeline joins both models at once.
            given = {"transformer": late._loaded(), "controlnet": parts.controlnet(self.call.control.part)}
            self.control = ControlTaps(self, given["controlnet"], given["transformer"], self.call.control.control)
        if self.omni:
            given |= {"siglip": parts.load("siglip"), "siglip_processor": parts.siglip_processor()}
            self._watch_tower(given["siglip"])
        kind = getattr(diffusers, self.call.pipeline)
        # Not every part is a module that could say where it is.
        kind = type(kind.__name__, (kind,), {"_execution_device": property(lambda _: device)})
        pipe = kind(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=parts.tokenizer(), scheduler=self.scheduler, **given
        )
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self._watch_text(pipe)
        encoder = self.enter_context(trace(self.vae, self._vae("encoder"))) if self.call.encoded else {}
        with patched(self.plan, self.parts, self.omni):
            options = self.call.options(self.vae)
            self.blend = self.call.blend(self.vae, self.scheduler)
            latents: Tensor = pipe(
                **options,
                generator=own[0] if self.call.at_once else own,
                output_type="latent",
                callback_on_step_end=self._after,
            ).images
        for name, calls in by_name(encoder).items():
            pictures = [picture for call in calls for picture in call.split(1)]
            for i, k in enumerate(self.call.encoded, 1):
                self.out[f"vae.{name}, picture {i}"] = self._square(name, pictures[k])
        return latents

    def decode(self, latents: Tensor) -> None:
        """Record the decoder's blocks, the pictures and their bytes; the transformer goes first."""
        del self.pipe
        _collect(self.parts, "transformer")
        vae = self.vae
        raw = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        with trace(vae, self._vae("decoder")) as seen:
            pictures = vae.decode(raw).sample.float().cpu()
        self.out.update((f"vae.{name}", self._square(name, calls[0])) for name, calls in by_name(seen).items())
        self.out.update({"VAE decode": pictures, "pixels": pixels(pictures)})

    def _square(self, name: str, tensor: Tensor) -> Tensor:
        """What the middle's attention norms, which diffusers has with its positions in a row, as a picture."""
        rows = self.plan.grids[0][0] * 2
        return tensor.unflatten(2, (rows, -1)) if name.endswith("group_norm") and tensor.ndim == 3 else tensor

    def _vae(self, part: str) -> list[str]:
        finer = [f"{name}.**" for name in self.inside.of("vae") if name.startswith(part)]
        return [*VAE[part], *finer]

    def _transformer(self, official: Path | None) -> Any:
        """The transformer with its taps; what encodes text has done its part."""
        if self.call.control is None:
            self.pipe.text_encoder = self.text_encoder = None
            _collect(self.parts, "text_encoder")
        if official is None:
            model = self.parts.load("transformer")
        else:
            model = Official(official, self.parts.pipe.folder / "transformer", self.parts.dtype).to(self.parts.device)
        inner = getattr(model, "inner", model)
        finer = self.inside.of("")
        patterns = [*FIRST, *(OMNI if any(self.plan.references) else []), f"{SAMPLE}.attention.to_v"]
        self.calls = Calls(self.first, inner, [*patterns, *(f"{name}.**" for name in finer)], fresh=True)
        tap_streams(self.first, inner, self.calls, _rope)
        tap_attention(self.first, inner, self.calls, [SAMPLE, *finer], partial(attended, official=official is not None))
        look = inner.register_forward_pre_hook(self._entered, with_kwargs=True)
        self.callback(look.remove)
        self.inner = inner
        return model

    def _entered(self, module: Any, args: Any, named: Any) -> None:
        """Count the items of a call of the transformer."""
        self.items.append(len(args[0] if args else named["x"]))

    def _after(self, pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Tensor]:
        """Record a step of the solver, or wait for its second half."""
        latents = values["latents"]
        if not self.scheduler.whole:
            return {}
        self.i += 1
        latents = self.blend(self.i, latents)
        velocity, start = self.scheduler.called
        config, count = self.parts.pipe.config.transformer, self.plan.request.count
        layout = self.plan.layout(config, self.items[0] > count, "cpu")
        suffix = "" if self.i == 1 else f", step {self.i}"
        if self.i == 1:
            levels = self.scheduler.sigmas[-len(self.plan.sigmas) :]
            self.out["sigmas"] = levels.cpu()
            self.out["start" if self.plan.start_images else "noise"] = start.cpu()
            self.out.update(() if self.control is None else self.control.stages(layout))
        self.out.update((f"{name}{suffix}", tensor) for name, tensor in of_reference(self.calls.done[0], layout))
        self.out[f"velocity, step {self.i}"] = velocity.cpu()
        self.out[f"latents, step {self.i}"] = latents.cpu()
        if self.i == 1:
            self.first.close()
            self.calls = Calls(self.enter_context(ExitStack()), self.inner, LATER, fresh=True)
        self.calls.done.clear()
        self.items.clear()
        return {"latents": latents}

    def _watch_text(self, pipe: Any) -> None:
        """Record what each call of the text encoder reads and computes, and the features that the pipeline takes."""
        encoder, encode = self.text_encoder, pipe._encode_prompt
        finer = self.inside.of("text")
        calls = Calls(self, encoder, ["layers.*", *(f"{name}.**" for name in finer)], fresh=True)
        tap_attention(self, encoder, calls, finer, rotated_text, "o_proj")
        last = f"layers.{encoder.config.num_hidden_layers - 1}"

        def called(module: Any, args: Any, named: dict[str, Tensor], output: Any) -> None:
            prefix, mask = "negative " if self.texts else "", named["attention_mask"].bool().cpu()
            self.out[f"{prefix}token ids"] = named["input_ids"].cpu()[mask]
            for name, tensors in by_name(calls.done.pop()).items():
                stage = "beyond" if name == last else name
                if stage == "beyond" or not name.startswith(f"{last}."):
                    self.out[f"{prefix}text.{stage}"] = tensors[0][mask]

        def encoded(*args: Any, **named: Any) -> Any:
            features = encode(*args, **named)
            flat = [one for each in features for one in (each if isinstance(each, list) else [each])]
            self.out[f"{'negative ' if self.texts else ''}text features"] = torch.cat(flat).cpu()
            self.texts += 1
            return features

        self.callback(encoder.register_forward_hook(called, with_kwargs=True).remove)
        pipe._encode_prompt = encoded

    def _watch_tower(self, tower: Any) -> None:
        """Record the vision features of each reference, without their padding."""
        pictures: list[Tensor] = []

        def seen(module: Any, args: Any, named: dict[str, Tensor], output: Any) -> None:
            rows, columns = named["spatial_shapes"][0].tolist()
            pictures.append(output.last_hidden_state[0, : rows * columns].cpu())
            self.out[f"vision features, picture {len(pictures)}"] = pictures[-1]

        self.callback(tower.register_forward_hook(seen, with_kwargs=True).remove)


def _collect(parts: ReferenceParts, part: str) -> None:
    """Let the memory of a part go that nobody holds any more; that of a small one may wait, for looking takes time."""
    if parts.pipe.parts.checkpoints[part].nbytes > SMALL:
        gc.collect()


def _rope(args: Any) -> Tensor:
    """The rotary table among the arguments of a block, (B, L, D/2) complex -> (B, L, D/2, 2)."""
    table = next(value for value in args if isinstance(value, Tensor) and value.is_complex())
    return torch.view_as_real(table)

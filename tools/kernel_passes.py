"""The passes that the kernel report is made of: whole passes of the model, and short ones for their kernels.

The kernels of a report are those that the passes launch, so that a new kernel needs no line here. What no pass launches
by default is launched with another backend, or by hand. `kernel_model` runs them.
"""

from dataclasses import dataclass

CAPTION = 120
FORMATS = ("bf16", "fp8", "int8", "int4", "fp8-weights", "int8-weights", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")
CHOSEN = ("bf16", "fp8", "int8", "int4")


@dataclass(frozen=True)
class Pass:
    """One pass: forward, context, text, decode, or by hand; number format, side in pixels, tokens of the caption.

    layers: main layers of the model, None for all; a pass of fewer is run for its kernels and has no estimate ·
    items: pictures, the second half as large · backend: as the engine knows it.
    """

    part: str
    form: str = "bf16"
    side: int = 1024
    text: int = CAPTION
    layers: int | None = None
    items: int = 1
    backend: str = "auto"

    def __str__(self) -> str:
        size = f"{self.text} tokens" if self.part in ("text", "context") else f"{self.side}²"
        extra = [f"{self.items} items"] * (self.items > 1) + [self.backend] * (self.backend != "auto")
        extra += [f"{self.text} tokens"] * (self.text != CAPTION)
        return " ".join((self.part, self.form, size, *(dict.fromkeys(word for word in extra if word not in size))))


# What no pass launches by default.
OPTIONAL = [
    Pass("forward", layers=1, items=2, backend="triton"), Pass("by hand"),
    Pass("forward", "fp8", layers=1, backend="triton"),
]  # fmt: skip


def passes(capability: int) -> list[list[Pass]]:
    """Return the passes that a GPU of a compute capability is reported for, in parts that may run side by side."""
    if capability != 90:
        return [short_passes()]
    forwards = [[Pass("forward", form), Pass("context", form, layers=1)] for form in FORMATS]
    for some, form in zip(forwards, CHOSEN, strict=False):
        some += [Pass("forward", form, side=side) for side in (512, 2048)]
        some += [Pass("context", form, text=text, layers=1) for text in (96, 512)]
    rest = [Pass("forward", text=512), Pass("text"), Pass("text", text=512), Pass("decode", side=512), Pass("decode")]
    others = [[each for some in part for each in some] for part in (forwards[4:7], forwards[7:])]
    return [*forwards[:4], *others, OPTIONAL, rest]


def short_passes() -> list[Pass]:
    """Return passes of few layers that launch every kernel at 1024², the decoder's at 512²."""
    half = [Pass(part, form, layers=1) for form in FORMATS for part in ("forward", "context")]
    return [*half, *OPTIONAL, Pass("text", layers=2), Pass("decode", side=512, layers=1)]


def quick_passes() -> list[Pass]:
    """Return the passes of the default path: what a forward in bf16 and fp8 launches, with few layers."""
    return [Pass(part, form, layers=1) for form in ("bf16", "fp8") for part in ("forward", "context")]

"""The map of tokens: for every item of a pass, what each token of its joint sequence is.

    for item in tokens(pipe, pipe.plan("a red star above a blue ring")):
        print(item.branch, item.words, item.find("star"), item.find("image"))

It is read off the `Layout` that the model itself runs by, and off the tokenizer, which says which characters a token
stands for; so it holds for every size, batch, guidance and number of references.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s3dit.errors import RequestError
from s3dit.inputs import region_masks
from s3dit.loaded_model import LoadedModel
from s3dit.model.layout import Grid, Layout
from s3dit.plan import Plan
from s3dit.runtime.encoders import PromptEmbeds

# Kinds of tokens. `image`: the patches that are denoised, row by row · `prompt`: what the user wrote · `template`: the
# chat template around it · `embeds`: a prompt given as features · `reference`, `vision`: clean patches of reference
# pictures, and the vision tower's features of them · the padding of each stream.
KINDS = (
    "image", "prompt", "template", "embeds", "reference", "vision", "image padding", "text padding", "vision padding",
)  # fmt: skip
# The streams of a pass: the refiners run in the first three, the main blocks in the last.
STREAMS = ("image", "text", "vision", "joint")


@dataclass(frozen=True, slots=True)
class ItemTokens:
    """The tokens of one item in one branch of guidance.

    item: index of the picture · branch: positive, or negative with the negative prompt; of a picture with regions
    `positive`, `positive 2`, … with the prompts that have a share of it, a centered one's patches rolled · prompt: its
    text · grid: rows and columns of its image tokens · kinds: of each token in joint order, from KINDS · places: of
    each token the characters (start, stop) of the prompt that it stands for, None for tokens that are none of the
    prompt's · starts: where the item begins in each stream · rows: of each stream, the token of this item (an index of
    `kinds`) that each of its rows holds · references: rows and columns of each reference picture's tokens.
    """

    item: int
    branch: str
    prompt: str
    grid: Grid
    kinds: tuple[str, ...]
    places: tuple[tuple[int, int] | None, ...]
    starts: dict[str, int]
    rows: dict[str, tuple[int, ...]]
    references: tuple[Grid, ...] = ()

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the prompt, in order."""
        return tuple(re.findall(r"\w+", self.prompt))

    def find(self, what: str) -> list[int]:
        """Return the tokens of a kind, or of a piece of the prompt: indices in the joint sequence of the item.

        what: one of KINDS; "text" for prompt, template and embeds; "padding" for all padding; "reference 2" for the
        second reference picture; else text of the prompt, a word or several: the tokens of every place where it stands
        (as a whole word if it does somewhere, in any case), so that "word:image" finds the word and not the kind.
        Raises RequestError, naming the nearest words.
        """
        if what in self._references:
            sizes = [rows * columns for rows, columns in self.references]
            start = sum(sizes[: self._references.index(what)])
            return self.find("reference")[start : start + sizes[self._references.index(what)]]
        if (kinds := _kinds_of(what)) is not None:
            return [i for i, kind in enumerate(self.kinds) if kind in kinds]
        if not (spans := self._spans(what)):
            known = [*self.words, *KINDS, *self._references]
            near = difflib.get_close_matches(what.removeprefix("word:"), known, n=3, cutoff=0.0)
            raise RequestError(
                f"{what!r} is neither in the prompt {self.prompt!r} nor a kind of token; needed a word of it or one of "
                f"{', '.join(KINDS)}; the nearest are {', '.join(near)}"
            )
        return [i for i, place in enumerate(self.places) if place and any(_overlap(place, span) for span in spans)]

    def has(self, what: str) -> bool:
        """Return whether `find` takes it: a kind of token, or text that stands in the prompt."""
        return what in self._references or _kinds_of(what) is not None or bool(self._spans(what))

    @property
    def _references(self) -> list[str]:
        return [f"reference {i + 1}" for i in range(len(self.references))]

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where a text stands in the prompt: as whole words if it does somewhere, in any case."""
        text = re.escape(text.removeprefix("word:"))
        found = [re.finditer(pattern, self.prompt, re.IGNORECASE) for pattern in (rf"(?<!\w){text}(?!\w)", text)]
        return next((spans for each in found if (spans := [m.span() for m in each if m.end() > m.start()])), [])

    def text(self, token: int) -> str:
        """Return the characters of the prompt that a token stands for, or its kind in angle brackets."""
        place = self.places[token]
        return f"<{self.kinds[token]}>" if place is None else self.prompt[slice(*place)]


def _kinds_of(what: str) -> tuple[str, ...] | None:
    """The kinds that a word of `find` stands for, None for text of the prompt."""
    kinds = {"text": ("prompt", "template", "embeds"), "padding": KINDS[6:]}.get(what, (what,))
    return kinds if set(kinds) <= set(KINDS) else None


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def tokens(pipe: LoadedModel, plan: Plan, *, guided: bool | None = None) -> list[ItemTokens]:
    """Return the map of a pass of a plan: positive items, then with guidance the negative ones.

    guided: whether guidance acts in the pass; None takes what the request says.
    """
    request = plan.request
    guided = bool(request.guidance_scale) if guided is None else guided
    layout = plan.layout(pipe.config.transformer, guided, "cpu")
    joint, labels, texts = _kinds(layout), _owners(layout), list(_captions(pipe, plan))
    result, begin = [], dict.fromkeys(STREAMS, 0)
    items = [*_branches(plan), *((i, "negative") for i in range(request.count))]
    references = [tuple(each.grid for each in row) for row in plan.references] or [()] * request.count
    # A text token's turn in the order of its pack.
    pending = iter([place for prompt, places in texts[: len(plan.captions)] for place in places])
    for index, length in enumerate(layout.joint.spans.lengths):
        part = slice(begin["joint"], begin["joint"] + length)
        rows = {name: tuple(_rows(labels[name], part.start, part.stop)) for name in labels}
        kinds = list(joint[part])
        places: list[tuple[int, int] | None] = [None] * length
        for i, kind in enumerate(kinds):
            if kind == "text":
                kinds[i], places[i] = next(pending)
        (picture, branch), prompt = items[index], texts[index][0]
        result.append(
            ItemTokens(
                picture, branch, prompt, plan.grids[picture], tuple(kinds), tuple(places),
                dict(begin), {**rows, "joint": tuple(range(length))}, references[picture],
            )
        )  # fmt: skip
        for name in labels:
            begin[name] += len(rows[name])
        begin["joint"] += length
    return result


def _branches(plan: Plan) -> Iterator[tuple[int, str]]:
    """The picture and the branch of every item without guidance."""
    seen = Counter[int]()
    for picture in plan.owners:
        seen[picture] += 1
        yield picture, "positive" if seen[picture] == 1 else f"positive {seen[picture]}"


def _kinds(layout: Layout) -> list[str]:
    """The kind of every joint token; `text` for those of captions."""
    runs = []
    for name, pack, kind in (("image", layout.image, "image"), ("text", layout.text, "text")):
        kinds = [f"{name} padding"] * len(pack.positions)
        for i in pack.token_index.tolist():
            kinds[i] = kind
        runs.append(kinds)
    for i in [] if layout.clean is None else layout.clean.tolist():
        runs[0][i] = "reference"
    if layout.vision is not None:
        kinds = ["vision padding"] * len(layout.vision.positions)
        for i in layout.vision.token_index.tolist():
            kinds[i] = "vision"
        runs.append(kinds)
    flat = [kind for run in runs for kind in run]
    return [flat[i] for i in layout.gather.tolist()]


def _owners(layout: Layout) -> dict[str, Tensor]:
    """Of every stream, the place in joint order (n,) of each of its rows."""
    place = torch.empty_like(layout.gather)
    place[layout.gather] = torch.arange(len(place))
    packs = {"image": layout.image, "text": layout.text, "vision": layout.vision}
    sizes = {name: len(pack.positions) for name, pack in packs.items() if pack is not None}
    return dict(zip(sizes, place.split(list(sizes.values())), strict=True))


def _rows(places: Tensor, start: int, stop: int) -> list[int]:
    """The tokens of one item, which has the joint places from start to stop, in the order of a stream."""
    return [int(place) - start for place in places[(places >= start) & (places < stop)]]


def _captions(pipe: LoadedModel, plan: Plan) -> Iterator[tuple[str, Sequence[tuple[str, tuple[int, int] | None]]]]:
    """Of every item's caption: its prompt, and kind and place in the prompt of its tokens."""
    request = plan.request
    counts = [len(pictures) for pictures in request.references()]
    prompts, negatives = (request.per_image(name) for name in ("prompt", "negative_prompt"))
    items = [
        (i, prompts[i] if share is None or share.prompt is None else share.prompt)
        for i, share in region_masks.items(plan.shares, request.count)
    ]
    for caption, (picture, text) in zip(plan.captions, [*items, *enumerate(negatives)], strict=False):
        if isinstance(caption[0], PromptEmbeds):
            yield "", [("embeds", None)] * len(caption[0])
            continue
        prompt = text or ""
        segments = pipe.tokenizer.places(prompt, counts[picture], request.max_sequence_length)
        yield prompt, [("prompt" if place else "template", place) for segment in segments for place in segment]

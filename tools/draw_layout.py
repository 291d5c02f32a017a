"""Draw where the tokens of two small requests stand, as text: `python tools/draw_layout.py`.

Everything that is drawn is read off the Layout that the transformer is given (`s3dit/model/layout.py`), nothing is
written by hand. The output stands in s3dit/README.md, and a test compares the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from s3dit.model.edit_layout import edit
from s3dit.model.layout import Layout, text_to_image

# Tokens that one character of a bar stands for.
SCALE = 4
MARKS = {
    "image, denoised": "█",
    "image, reference": "▓",
    "caption": "▒",
    "vision features": "░",
    "padding": "·",
}


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the joint sequence: its item, stream, what it holds, position and modulation row."""

    item: int
    stream: str
    kind: str
    position: tuple[int, ...]
    row: int


def tokens(layout: Layout) -> list[Token]:
    """The tokens of a layout in joint order."""
    kinds: list[tuple[str, str]] = []
    for stream, pack in (("image", layout.image), ("text", layout.text), ("vision", layout.vision)):
        if pack is None:
            continue
        held = [(stream, "padding")] * len(pack.positions)
        name = {"image": "image, denoised", "text": "caption", "vision": "vision features"}[stream]
        for place in pack.token_index.tolist():
            held[place] = stream, name
        if stream == "image" and layout.clean is not None:
            for place in layout.clean.tolist():
                held[place] = stream, "image, reference"
        kinds += held
    items = [item for item, length in enumerate(layout.joint.spans.lengths) for _ in range(length)]
    positions, rows = layout.joint.positions.tolist(), layout.joint.modulation_row.tolist()
    return [
        Token(item, kinds[place][0], kinds[place][1], tuple(position), row)
        for item, place, position, row in zip(items, layout.gather.tolist(), positions, rows, strict=True)
    ]


def bars(sequence: list[Token]) -> Iterator[str]:
    """One line for each item: its tokens in joint order, SCALE of them a character."""
    for item, group in groupby(sequence, key=lambda token: token.item):
        marks = [MARKS[token.kind] for token in group]
        yield f"item {item} │{''.join(marks[::SCALE])}│ {len(marks)} tokens"


def table(sequence: list[Token]) -> Iterator[str]:
    """A row for each run of tokens that are of one kind, read one row of the modulation table and have a position."""

    def run_of(token: Token) -> tuple[int, str, str, int, bool]:
        """What tokens of one row of the table have in common."""
        return token.item, token.stream, token.kind, token.row, any(token.position)

    rows = [("item", "tokens", "count", "stream", "holds", "position (t, row, column)", "modulation")]
    start = 0
    for (item, stream, kind, row, _), group in groupby(sequence, key=run_of):
        run = list(group)
        first, last = (", ".join(map(str, token.position)) for token in (run[0], run[-1]))
        where = f"({first})" if first == last else f"({first}) … ({last})"
        end = start + len(run)
        rows.append((str(item), f"{start}–{end - 1}", str(len(run)), stream, kind, where, f"row {row}"))
        start = end
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(left: str, middle: str, right: str) -> str:
        """A ruled line of the table."""
        return left + middle.join("─" * (width + 2) for width in widths) + right

    yield line("┌", "┬", "┐")
    for i, cells in enumerate(rows):
        yield "│" + "│".join(f" {cell:{width}} " for cell, width in zip(cells, widths, strict=True)) + "│"
        if i == 0 or (i + 1 < len(rows) and rows[i + 1][0] != cells[0]):
            yield line("├", "┼", "┤")
    yield line("└", "┴", "┘")


def drawing() -> str:
    """The drawing of both requests: lines of at most 100 characters."""
    requests = (
        (
            "Text to image: two pictures of 64 × 96 pixels (4 × 6 patches), prompts of 20 and 45 tokens.",
            text_to_image([(4, 6), (4, 6)], [20, 45]),
        ),
        (
            "Edit: one picture of 64 × 96 pixels, one reference of the same size, whose vision features are\n"
            "a grid of 5 × 6; caption segments of 5, 20 and 2 tokens.",
            edit([(4, 6)], [[5, 20, 2]], [[((4, 6), (5, 6))]]),
        ),
    )
    lines = ["   ".join(f"{mark} {kind}" for kind, mark in MARKS.items()), f"A character of a bar is {SCALE} tokens."]
    for title, layout in requests:
        sequence = tokens(layout)
        lines += ["", *title.splitlines(), "", *bars(sequence), *table(sequence)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(drawing())

"""The page of a report: one HTML file that needs nothing else, no network and no library.

`report.html` is the page without its data, which stand in it as JSON: texts are only ever set as text, so that no
prompt becomes markup, and a policy in the page's head forbids every request. Maps are a byte a cell, between the least
and the largest value of each; the numbers of tables have four digits.

At 1024 × 1024 with 30 layers, 30 heads and 8 steps it stays below 20 MB whatever the prompt: of maps 13 million bytes
at most, which base64 makes 17.3 MB, and less than 2.5 MB of images and tables.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from s3dit.research.table import Table

TEMPLATE = Path(__file__).with_name("report.html")
# What the template has in the place of its title and its data.
TITLE, DATA = "<!-- title -->", "<!-- data -->"
# Longer side of the picture on the page, and of estimates of it, at most; up to SMALL they are PNG, then JPEG.
PICTURE, PREVIEW, SMALL = 1280, 384, 256


def page(
    index: Mapping[str, Any],
    picture: Image.Image,
    previews: Mapping[int, Image.Image],
    tensors: Mapping[str, Tensor],
    tables: Mapping[str, Sequence[Table]],
) -> str:
    """Return the page. index: `Report.index` · the rest: its fields of these names."""
    data = {
        **index,
        "picture": image(picture, PICTURE, 92),
        "previews": {step: image(estimate, PREVIEW, 85) for step, estimate in previews.items()},
        "maps": {name: maps(each) for name, each in tensors.items() if not name.startswith("share")},
        "shares": {name: floats(each) for name, each in tensors.items() if name.startswith("share")},
        "tables": {name: [_table(table) for table in each] for name, each in tables.items()},
    }
    start, rest = TEMPLATE.read_text(encoding="utf-8").split(TITLE)
    middle, end = rest.split(DATA)
    title = html.escape(str(index["prompt"]) or "a picture").encode("ascii", "xmlcharrefreplace").decode()
    return f"{start}{title}{middle}{_in_script(data)}{end}"


def image(picture: Image.Image, side: int, quality: int) -> str:
    """Return an image, made smaller where a side is longer, as a data URI."""
    picture = Image.Image.copy(picture.convert("RGB"))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    data, form = io.BytesIO(), "PNG" if max(picture.size) <= SMALL else "JPEG"
    options: dict[str, Any] = {"quality": quality} if form == "JPEG" else {"optimize": True}
    # Pillow's own, which writes no metadata.
    Image.Image.save(picture, data, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def maps(tensor: Tensor) -> dict[str, Any]:
    """Return maps (…, rows, columns) as bytes, and the values that 0 and 255 stand for in each."""
    low, high = tensor.amin((-2, -1)), tensor.amax((-2, -1))
    span = (high - low).clamp(min=1e-30)[..., None, None]
    levels = ((tensor - low[..., None, None]) / span * 255).round().nan_to_num().to(torch.uint8)
    shape = list(tensor.shape)
    return {"shape": shape, "bytes": _base64(levels), "low": floats(low)["values"], "high": floats(high)["values"]}


def floats(tensor: Tensor) -> dict[str, Any]:
    """Return a tensor as fp32, little-endian."""
    return {"shape": list(tensor.shape), "values": _base64(tensor.float())}


def _base64(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().numpy()
    return base64.b64encode(data.astype(data.dtype.newbyteorder("<")).tobytes()).decode()


def _table(table: Table) -> dict[str, Any]:
    values = [[None if x is None else float(f"{x:.4g}") for x in row] for row in table.values]
    return {"title": table.title, "rows": table.rows, "columns": table.columns, "values": values, "log": table.log}


def _in_script(data: Mapping[str, Any]) -> str:
    """JSON that ends no script element: ASCII alone, without the characters of markup."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

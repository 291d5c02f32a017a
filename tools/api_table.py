"""Print the fields of a Request as a table: `python tools/api_table.py`, which stands in s3dit/API.md."""

import ast
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from s3dit import values  # noqa: E402
from s3dit.cli.option_names import flag  # noqa: E402
from s3dit.request import Request  # noqa: E402


def kinds() -> dict[str, str]:
    """The types of the fields as they are written, without None and quotation marks."""
    tree = ast.parse((ROOT / "s3dit" / "request.py").read_text(encoding="utf-8"))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Request")
    lines = {
        node.target.id: ast.unparse(node.annotation).strip("'")
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return {name: kind.removesuffix(" | None") for name, kind in lines.items()}


def limits(metadata: Any) -> str:
    """What a field may hold, as its kind checks it."""
    kind, bounds = metadata["kind"], metadata["bounds"]
    if kind.check is values.choice:
        return ", ".join(get_args(bounds[0]))
    if bounds:
        low, high = (f"{bound:g}" if isinstance(bound, float) else f"{bound:,}" for bound in bounds)
        return f"{low} to {high}"
    return "16 to 8192, multiples of 16" if kind is values.SIDE else ""


def table() -> str:
    """The table in Markdown: one row a field."""
    rows = ["| field | type | values | default | option | what it is |", "|---|---|---|---|---|---|"]
    types = kinds()
    for field in fields(Request):
        option = f"`{flag(field)}`" if field.metadata["group"] else ""
        kind, default = f"`{types[field.name]}`", f"`{field.default}`"
        cells = (f"`{field.name}`", kind, limits(field.metadata), default, option, field.metadata["help"])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())

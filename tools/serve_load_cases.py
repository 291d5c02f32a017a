"""What `serve_load.py` asks a server for: pictures, edits with the files that they send, and bodies that are wrong."""

import io
import json
from functools import cache
from typing import Any

SMALL = {"num_inference_steps": 2, "size": "64x64"}
# What clients draw; the picture of a name is the same whoever asks for it.
CASES: dict[str, dict[str, Any]] = {
    "two steps": {"prompt": "a red star", "seed": 1, **SMALL},
    "another size": {"prompt": "a blue ring", "seed": 2, "size": "96x64", "num_inference_steps": 3},
    "its own size": {"prompt": "a green circle left of a pink star", "seed": 3, "num_inference_steps": 4},
    "two pictures": {"prompt": "a pink square", "seed": 4, "n": 2, **SMALL},
    "heun": {"prompt": "a red star", "seed": 5, "size": "64x64", "solver": "heun", "num_inference_steps": 3},
    "multistep": {"prompt": "a red star above a blue ring", "seed": 6, "size": "64x96", "solver": "res_multistep",
                  "schedule": "simple", "num_inference_steps": 5},
    "guidance": {"prompt": "a red star", "seed": 7, "guidance_scale": 2, "negative_prompt": "a blue ring", **SMALL},
    "noise": {"prompt": "a ring", "seed": 8, "solver": "euler_ancestral", "size": "64x64", "num_inference_steps": 4},
}  # fmt: skip
# Edits, and the pictures of `pictures` that they send.
EDITS: dict[str, dict[str, Any]] = {
    "start": {"prompt": "a pink star", "seed": 9, "strength": 0.7, "num_inference_steps": 4, "files": ("image",)},
    "mask": {"prompt": "a blue ring", "seed": 10, "num_inference_steps": 3, "files": ("image", "mask_image")},
    "margins": {"prompt": "a ring", "seed": 11, "extend": [0, 0, 32, 0], "num_inference_steps": 3, "files": ("image",)},
}  # fmt: skip
# Of models that look at references.
REFERENCES: dict[str, dict[str, Any]] = {
    "references": {"prompt": "a star", "seed": 12, **SMALL, "files": ("reference", "reference")},
    "start and reference": {"prompt": "a star", "seed": 13, "strength": 0.6, "num_inference_steps": 4,
                            "files": ("image", "reference")},
}  # fmt: skip
BAD: tuple[tuple[int, bytes], ...] = (
    (400, b"{"), (400, b"[]"), (400, b'{"prompt": 1}'), (400, b'{"prompt": "a", "size": "63x64"}'), (400, b"\xff"),
    (400, b'{"prompt": "a", "foo": 1}'), (400, b'{"prompt": "a", "n": 11}'), (404, b'{"prompt": "a", "model": "b"}'),
    (400, b'{"prompt": "a", "lora": "/etc/passwd"}'), (400, b'{"prompt": "a", "num_inference_steps": 1e9}'),
)  # fmt: skip
DRAW, EDIT = "/v1/images/generations", "/v1/images/edits"


def pictures() -> dict[str, Any]:
    """The pictures that edits send, by the name of their field."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:64, :64]
    image = Image.fromarray(np.stack([4 * x, 4 * y, 255 - 2 * (x + y)], -1).astype(np.uint8))
    mask = Image.fromarray(np.where(x > 31, 255, 0).astype(np.uint8))
    return {"image": image, "mask_image": mask, "reference": image.rotate(90)}


@cache
def files() -> dict[str, bytes]:
    """The same as PNG."""
    found = {}
    for name, picture in pictures().items():
        picture.save(data := io.BytesIO(), "PNG")
        found[name] = data.getvalue()
    return found


def packed(fields: dict[str, Any]) -> tuple[str, bytes, str]:
    """Path, body and content type of a request: JSON, or a form where it has pictures."""
    if "files" not in fields:
        return DRAW, json.dumps(fields).encode(), "application/json"
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    parts = [(f'"{name}"', text.encode()) for name, text in texts.items() if name != "files"]
    parts += [(f'"{name}"; filename="a.png"', files()[name]) for name in fields["files"]]
    head = "Content-Disposition: form-data; name="
    body = b"".join(f"--frontier\r\n{head}{name}\r\n\r\n".encode() + content + b"\r\n" for name, content in parts)
    return EDIT, body + b"--frontier--\r\n", "multipart/form-data; boundary=frontier"

"""The web page: one file that needs nothing beside it, sent with a policy that lets nothing else run."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("page.html")
INLINE = {name: re.compile(rf"<{name}>(.*?)</{name}>", re.DOTALL) for name in ("script", "style")}


@cache
def page() -> tuple[bytes, str]:
    """The page, and its Content-Security-Policy: its own inline scripts and styles by hash, its pictures, this server.

    Raises FileNotFoundError where there is none.
    """
    text = FILE.read_text(encoding="utf-8")
    sources = {name: " ".join(map(_hash, form.findall(text))) or "'none'" for name, form in INLINE.items()}
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; "
        "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode("utf-8"), policy


def _hash(content: str) -> str:
    """How a policy names an inline script or style: by the hash of what stands in it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode('utf-8')).digest()).decode()}'"

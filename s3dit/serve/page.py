"""The web page: the files that a browser asks for, and the policy that binds them.

It is plain HTML, CSS and JavaScript, in page/ beside this file. It loads nothing but these files, and talks to nothing
but the server that they come from, by the same calls as any other client (api.py).
"""

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).with_name("page")
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Scripts, styles and calls from this server and to it alone, none written into the page; pictures also from its memory.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@cache
def files() -> dict[str, tuple[bytes, str]]:
    """The files of the page: path of the URL ("/", "/main.js", ...) -> bytes, media type."""
    # What an editor leaves beside them is none of these.
    paths = [path for path in sorted(FOLDER.iterdir()) if path.suffix in KINDS]
    found = {f"/{path.name}": (path.read_bytes(), KINDS[path.suffix]) for path in paths}
    return {"/": found.pop("/index.html")} | found

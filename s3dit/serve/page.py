"""The web page of `s3dit serve`: the files that a browser asks for, and the headers that bind them.

The page is plain HTML, CSS and JavaScript, in page/ beside this file. It loads nothing but these files, and talks to
nothing but the server that they come from, by the same calls as any other client (api.py).
"""

from pathlib import Path

FOLDER = Path(__file__).with_name("page")
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts, styles and calls only from and to this server, none written into the page; pictures also from its memory.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def files() -> dict[str, tuple[bytes, str]]:
    """Return the files of the page: path of the URL ("/", "/main.js", ...) -> bytes, media type."""
    found = {f"/{path.name}": (path.read_bytes(), KINDS[path.suffix]) for path in sorted(FOLDER.iterdir())}
    return {"/": found.pop("/index.html")} | found

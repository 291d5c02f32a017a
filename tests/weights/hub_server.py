"""A Hub on this machine: the few addresses that huggingface_hub asks for a repository's list and its files.

`Hub` keeps what was asked in `asked`, and answers `fault` (a status) where one is set, `file_fault` for
files of weights only.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Hub:
    """Repositories, each a dict of name to bytes; use as a context manager."""

    def __init__(self):
        self.repositories, self.asked, self.fault, self.file_fault = {}, [], None, None
        self.code = None

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def files(self):
        """Names of the files that were downloaded, in order."""
        return [name for method, kind, name in self.asked if (method, kind) == ("GET", "file")]

    def answer(self, request):
        path = unquote(request.path.partition("?")[0]).strip("/").split("/")
        kind = "api" if path[0] == "api" else "file"
        name = "/".join(path[2:4] if kind == "api" else path[:2])
        inner = "/".join(path[4:])
        self.asked.append((request.command, kind, inner))
        fault = self.fault or (self.file_fault if kind == "file" and inner.endswith(".safetensors") else None)
        if fault or name not in self.repositories:
            return self.send(
                request, fault or 404, b"{}", {"X-Error-Code": self.code or ("" if fault else "RepoNotFound")}
            )
        files = self.repositories[name]
        sha = revision(files)
        if kind == "file":
            data = files.get(inner)
            if data is None:
                return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.send(request, 200, data, {"ETag": etag, "X-Repo-Commit": sha})
        if inner.startswith("tree"):
            told = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
        else:
            told = {"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]}
        return self.send(request, 200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    @staticmethod
    def send(request, status, data, headers):
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)


def revision(files):
    """The commit of a repository's files."""
    return hashlib.sha1("".join(sorted(files)).encode()).hexdigest()

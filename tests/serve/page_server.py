"""A server of a few lines that speaks the contract of s3dit/serve/api.py, so that every answer to the page is known."""

import base64
import io
import json
import threading
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from s3dit.inputs.image_metadata import carried
from s3dit.serve import page
from s3dit.serve.bounds import Limits
from s3dit.serve.fields import Fields

EVIL = "<img src=x onerror=alert(1)><b>style"
OPTIONS = {
    "model": "embedded", "variant": "tiny", "version": "0", "sizes": ["128x128", "64x64", "160x96", "96x160"],
    "defaults": {"size": "128x128", "num_inference_steps": 8, "guidance_scale": 0.0, "solver": "euler", "shift": 3.0},
    "loras": [{"name": EVIL, "scale": 0.5, "on": True}, {"name": "ink", "scale": 1.0}], "references": 2,
    "limits": {"n": 4, "steps": 200, "pixels": 1 << 20, "side": 1024, "multiple": 16, "body": 1 << 25},
    "example": "a red star above a blue ring", "note": "",
    "fields": {door: {name: each.schema for name, each in Fields("embedded", Limits(), (EVIL, "ink")).of(door).items()}
               for door in ("generations", "edits")},
}  # fmt: skip


def picture(fields, color=None):
    """A PNG with metadata as the engine writes them, in a color that the seed chooses."""
    width, height = map(int, fields.get("size", "128x128").split("x"))
    seed = int(fields["seed"])
    image = Image.new("RGB", (width, height), color or (seed * 40 % 256, 90, 160))
    metadata = {"prompt": fields["prompt"], "width": width, "height": height, "seed": seed, "solver": "euler"}
    metadata |= {"num_inference_steps": int(fields.get("num_inference_steps", 8)), "guidance_scale": 0.0}
    loras = {EVIL: 0.5} | {each["name"]: each["scale"] for each in fields.get("lora", ())}
    metadata["adapters"] = [
        {"file": f"{name}.safetensors", "scale": scale} for name, scale in loras.items() if scale
    ]  # fmt: skip
    out = io.BytesIO()
    image.save(out, "PNG", **carried(metadata, image.size, "PNG"))
    return base64.b64encode(out.getvalue()).decode()


class Server(ThreadingHTTPServer):
    """Answers as a prompt asks: "slow" waits for `go` after a step, "refuse" has a field refused, "break" fails."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.go, self.asked, self.hung_up, self.key, self.full = threading.Event(), [], threading.Event(), None, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def reply(self, status, body, kind="application/json", headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refused(self):
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return False
        self.reply(401, {"error": {"message": "the API key is missing or wrong", "param": None}})
        return True

    def do_GET(self):
        if (found := page.files().get(self.path)) is not None:
            return self.reply(200, *found, page.HEADERS)
        return None if self.refused() else self.reply(200, OPTIONS)

    def body(self):
        """The fields, and the files by name, of JSON or of a form."""
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("generations"):
            return json.loads(raw), {}
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        fields, files = {}, {}
        for part in message_from_bytes(head + raw).get_payload():
            name = part.get_param("name", header="content-disposition")
            if part.get_filename():
                files.setdefault(name, []).append(part.get_payload(decode=True))
            else:
                fields[name] = part.get_payload(decode=True).decode()
        return fields, files

    def do_POST(self):
        if self.refused():
            return
        fields, files = self.body()
        if isinstance(fields.get("lora"), str):
            fields["lora"] = json.loads(fields["lora"])
        if self.server.full:
            self.server.full -= 1
            self.reply(429, {"error": {"message": "the queue is full", "param": None}}, headers={"Retry-After": "1"})
            return
        self.server.asked.append((self.path, fields, files))
        if "refuse" in fields["prompt"]:
            wrong = {"message": "num_inference_steps is 300; needed 1 to 200", "param": "num_inference_steps"}
            self.reply(400, {"error": wrong})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.draw(fields)
        except OSError:
            self.server.hung_up.set()

    def event(self, kind, **data):
        self.wfile.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode())
        self.wfile.flush()

    def draw(self, fields):
        slow = "slow" in fields["prompt"]
        self.event("s3dit.queued", position=1)
        self.event("s3dit.started")
        self.event("s3dit.step", step=3, steps=8)
        self.event("image_generation.partial_image", b64_json=picture(fields, "gray"), output_format="png")
        while slow and not self.server.go.wait(0.05):
            self.wfile.write(b": waiting\n\n")
            self.wfile.flush()
        if "break" in fields["prompt"]:
            self.wfile.write(b'event: error\ndata: {"error": {"message": "a step gave NaN"}}\n\n')
            return
        self.event("s3dit.step", step=8, steps=8)
        self.event("image_generation.completed", b64_json=picture(fields), output_format="png", notes=["a note " * 30])

"""A server of the embedded model on a free port, in a thread."""

import http.client
import json
import threading
from contextlib import contextmanager

from s3dit.pipeline import Pipeline
from s3dit.serve.engine import Engine
from s3dit.serve.server import Server, Serving, bound, url_of

SMALL = {"size": "64x64", "num_inference_steps": 2, "seed": 7}


class Running:
    """A server that runs: its `url`, engine and pipeline, and requests by hand."""

    def __init__(self, server):
        self.server, self.engine, self.pipe = server, server.engine, server.api.drawer.pipe
        self.url, self.port = url_of(server.sock), server.sock.getsockname()[1]

    def ask(self, method, path, body=None, **headers):
        """Status, headers and bytes of an answer; a dict is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, dict):
            body, headers = json.dumps(body), {"Content-Type": "application/json"} | headers
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    def draw(self, **fields):
        """The JSON and status of a request that draws."""
        status, _, content = self.ask("POST", "/v1/images/generations", {"prompt": "a red star"} | SMALL | fields)
        return status, json.loads(content)


@contextmanager
def running(serving=None, **options):
    """Serve while inside, with a pipeline of its own; options: of the Engine."""
    pipe = Pipeline.load(device="cpu", residency="resident")
    server = Server(Engine(pipe, **options), serving or Serving(name="tiny"), bound("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        yield Running(server)
    finally:
        server.should_exit = True
        thread.join()

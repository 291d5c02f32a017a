"""Load a server with clients that draw, leave in the middle and send what is no request, and measure it.

`python tools/serve_load.py check` starts `s3dit serve` with the embedded model and asks for hundreds of pictures from
ten clients: sizes, steps, solvers, guidance, counts, edits (a start image, a mask, margins; references where --model
looks at them) and streams with partial pictures are mixed, some clients leave after a while, some bodies are bad. Every
picture is compared with the one drawn alone, every bad body must get its error, and at the end nothing may wait or run.
`rate` compares the requests a second of several clients with those of one, with seconds to the answer and to the first
partial picture; `stop` sends SIGTERM under load; `soak` is `check` with 10,000 requests and the server's memory on the
way. One JSON object a line; ends with 1 where something is lost or wrong.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench_machine import ROOT, machine
from serve_load_cases import BAD, CASES, DRAW, EDITS, REFERENCES, packed, pictures

# Counts of what other counts hold already.
WITHIN = ("of these edits", "of these streams", "partial pictures")
# Largest difference of a channel, of 255 levels, between a picture drawn in company and alone, by rounding: of what is
# computed in bf16, and in fp32.
LEVELS, LEVELS_FP32 = 8, 1


class Client:
    """One connection after another to a server."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.link = http.client.HTTPConnection(*address, timeout=300)

    def send(self, path: str, body: bytes | None = None, kind: str = "application/json") -> http.client.HTTPResponse:
        """Send a request and wait for the head of its answer; a connection that was closed is opened again."""
        method, headers = ("GET", {}) if body is None else ("POST", {"Content-Type": kind})
        try:
            self.link.request(method, path, body, headers)
            return self.link.getresponse()
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, http.client.CannotSendRequest):
            self.link.close()
            self.link.request(method, path, body, headers)
            return self.link.getresponse()

    def draw(self, fields: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON of an answer, waiting where the queue is full; of a stream that of its last events.

        A stream that ends without pictures has the status 0.
        """
        asked = packed(fields)
        while (answer := self.send(*asked)).status == 429:
            answer.read()
            time.sleep(0.2)
        if answer.status != 200 or not fields.get("stream"):
            return answer.status, json.loads(answer.read())
        events = [json.loads(line.removeprefix(b"data: ")) for line in answer if line.startswith(b"data: ")]
        whole, partial = (
            [event for event in events if event.get("type", "").endswith(end)]
            for end in (".completed", ".partial_image")
        )
        return 200 if whole else 0, {"data": whole, "partial": partial}

    def first_partial(self, fields: dict[str, Any]) -> float:
        """Seconds until a stream shows its first partial picture; the rest is read as well."""
        start = time.perf_counter()
        answer = self.send(DRAW, json.dumps(fields | {"stream": True, "partial_images": 1}).encode())
        first = 0.0
        for line in answer:
            if line.startswith(b"event: image_generation.partial_image"):
                first = time.perf_counter() - start
        return first

    def leave(self, fields: dict[str, Any], seconds: float) -> None:
        """Ask for a picture, and go after so many seconds."""
        path, body, kind = packed(fields)
        self.link.request("POST", path, body, {"Content-Type": kind})
        time.sleep(seconds)
        self.link.close()

    def metrics(self) -> dict[str, float]:
        """The server's metrics without labels, and those of how requests ended by these."""
        text = self.send("/metrics").read().decode()
        found = re.findall(r'^s3dit_(\w+?)(?:\{ended="(\w+)"\})? (\S+)$', text, re.MULTILINE)
        return {label or name: float(value) for name, label, value in found}


@contextmanager
def server(
    *options: str, model: str = "embedded"
) -> Iterator[tuple[subprocess.Popen[str], tuple[str, int], list[str]]]:
    """A server in a process of its own: the process, where it listens, and the lines that it says."""
    command = [sys.executable, "-m", "s3dit", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        """Keep what it says; the last line but some is enough of a long run."""
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            del lines[: -1000 if len(lines) > 2000 else 0]
            if " at http://" in line:
                ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        if not ready.wait(120):
            raise SystemExit("".join(lines) or "the server did not start within 120 s")
        host, port = re.findall(r"http://([\d.]+):(\d+)", "".join(lines))[0]
        yield process, (host, int(port)), lines
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def at_once(clients: int, work: Callable[[Client, random.Random], None], address: tuple[str, int]) -> None:
    """Run the work of several clients in threads, and wait for all; the first error of one is raised."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        """Work, and keep what goes wrong."""
        try:
            work(Client(address), random.Random(number))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def alone(case: dict[str, Any], pipe: Any) -> list[Any]:
    """The pictures of a case, drawn with nothing beside them."""
    fields, given = dict(case), pictures()
    count, sent = fields.pop("n", 1), fields.pop("files", ())
    fields |= {name: given[name] for name in sent if name != "reference"}
    if references := [given[name] for name in sent if name == "reference"]:
        fields["reference"] = references
    if size := fields.pop("size", None):
        fields["width"], fields["height"] = map(int, size.split("x"))
    return list(pipe(num_images_per_prompt=count, **fields).images)


def check(requests: int, clients: int, every: int, model: str) -> dict[str, Any]:
    """Mixed traffic: counts of what came of it, differences to pictures drawn alone, memory on the way.

    every: requests between two looks at the memory · model: a folder, a file or a name.
    """
    import torch
    from PIL import Image, ImageChops

    from s3dit.pipeline import Pipeline

    pipe = Pipeline.load(model, residency="resident")
    cases = CASES | EDITS | (REFERENCES if pipe.config.transformer.siglip_feat_dim else {})
    right = {name: alone(case, pipe) for name, case in cases.items()}
    levels = LEVELS_FP32 if pipe.placement.compute == torch.float32 else LEVELS
    counts, lock, left, memory = Counter[str](), threading.Lock(), iter(range(requests)), list[int]()
    worst = 0

    def compare(name: str, answer: Any) -> None:
        """Hold the pictures of an answer to those drawn alone."""
        nonlocal worst
        for drawn, picture in zip(right[name], answer["data"], strict=True):
            with Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))) as image:
                extrema: Any = ImageChops.difference(image, drawn).getextrema()
            worst = max(worst, *(high for _, high in extrema))

    def work(client: Client, chance: random.Random) -> None:
        """Draw, leave or send what is bad, until there is no more to do."""
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            if number % every == 0:
                memory.append(int(client.metrics()["memory_bytes"]))
            name, kind = chance.choice(list(cases)), chance.random()
            if kind < 0.1:
                client.leave(cases[name] | {"stream": chance.random() < 0.5}, chance.random() * 0.3)
                counts["left"] += 1
            elif kind < 0.2:
                status, body = chance.choice(BAD)
                answer = client.send(DRAW, body)
                answer.read()
                counts["refused rightly" if answer.status == status else f"refused wrongly, {answer.status}"] += 1
            else:
                shown = chance.randrange(4) if chance.random() < 0.3 else None
                stream = {} if shown is None else {"stream": True, "partial_images": shown}
                status, answer = client.draw(cases[name] | stream)
                with lock:
                    counts["drawn" if status == 200 else f"failed, {status}"] += 1
                    if status == 200:
                        compare(name, answer)
                        counts["of these edits"] += name not in CASES
                        counts["of these streams"] += shown is not None
                        counts["partial pictures"] += len(answer.get("partial", ()))

    with server(model=model) as (_, address, lines):
        start = time.perf_counter()
        at_once(clients, work, address)
        seconds = time.perf_counter() - start
        client, end = Client(address), time.monotonic() + 30
        while (now := client.metrics())["queued"] + now["running"] and time.monotonic() < end:
            time.sleep(0.1)
        memory.append(int(now["memory_bytes"]))
    failures = [line for line in lines if "Traceback" in line or " 500 " in line]
    counted = sum(count for name, count in counts.items() if name not in WITHIN)
    return {
        "stage": "check", "requests": requests, "clients": clients, "seconds": round(seconds, 1), **counts,
        "largest_difference": worst, "waiting": now["queued"] + now["running"], "batch": round(_batch(now), 2),
        "ended": {name: now.get(name, 0) for name in ("done", "failed", "cancelled", "timed_out")},
        "memory_mb": [round(size / 1e6) for size in memory], "failures": failures[:5],
        "right": counted == requests and worst <= levels and not failures
        and not any("wrongly" in name or "failed" in name for name in counts) and not now["queued"] + now["running"],
    }  # fmt: skip


def _batch(metrics: dict[str, float]) -> float:
    """Requests of a pass, on average."""
    return metrics["batch_size_sum"] / max(1.0, metrics["batch_size_count"])


def rate(requests: int, clients: int) -> Iterator[dict[str, Any]]:
    """Requests a second, of one client and of several, for two sizes, with latencies and times to a first partial."""
    for size in ("64x64", "128x128"):
        fields = {"prompt": "a red star above a blue ring", "size": size, "num_inference_steps": 8}
        with server() as (process, address, _):
            Client(address).draw(fields)
            one, several = (timed(process.pid, address, fields, requests, count) for count in (1, clients))
        ratio = round(several["requests_a_second"] / one["requests_a_second"], 2)
        ratio_cpu = round(one["cpu_s"] / several["cpu_s"], 2)
        yield {"stage": "rate", "size": size, "steps": 8, "requests": requests, "one_by_one": one,
               "together": several, "ratio": ratio, "ratio_cpu": ratio_cpu}  # fmt: skip


def processor(pid: int) -> float:
    """Seconds of the processor that a process has taken."""
    numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def timed(pid: int, address: tuple[str, int], fields: dict[str, Any], requests: int, clients: int) -> dict[str, Any]:
    """What so many clients get, who together ask so often, one picture after another.

    cpu_s: seconds of the processor a request, of the server alone; where the machine is shared, those to believe.
    """
    before, latencies, firsts = Client(address).metrics(), list[float](), list[float]()

    def work(client: Client, chance: random.Random) -> None:
        """Draw one's share."""
        for _ in range(requests // clients):
            begin = time.perf_counter()
            status, _ = client.draw(fields | {"seed": chance.getrandbits(31)})
            assert status == 200, status
            latencies.append(time.perf_counter() - begin)

    start, spent = time.perf_counter(), processor(pid)
    at_once(clients, work, address)
    seconds, spent, now = time.perf_counter() - start, processor(pid) - spent, Client(address).metrics()
    at_once(clients, lambda client, chance: firsts.append(client.first_partial(fields)), address)
    passes = {name: now[name] - before[name] for name in ("batch_size_sum", "batch_size_count")}
    return {
        "clients": clients, "requests_a_second": round(len(latencies) / seconds, 2),
        "p50_s": round(statistics.median(latencies), 3), "p99_s": round(_p99(latencies), 3),
        "cpu_s": round(spent / len(latencies), 4), "batch": round(_batch(passes), 2),
        "first_partial_p50_s": round(statistics.median(firsts), 3),
    }  # fmt: skip


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.99 * len(values)))]


def stop(clients: int) -> dict[str, Any]:
    """SIGTERM while clients draw: every request is answered, or its connection was refused, and the exit code is 0."""
    counts: Counter[str] = Counter()
    with server("--grace", "20") as (process, address, _):
        stopping = threading.Event()

        def work(client: Client, chance: random.Random) -> None:
            """Draw until the server is gone."""
            while True:
                try:
                    status, _ = client.draw(CASES[chance.choice(list(CASES))])
                except ConnectionRefusedError:
                    counts["not let in"] += 1
                    return
                except OSError as error:
                    counts[f"lost, {type(error).__name__}"] += 1
                    return
                counts[f"{status} {'after' if stopping.is_set() else 'before'}"] += 1
                if status == 503:
                    return

        def end() -> None:
            """Ask the server to end, in the midst of it."""
            time.sleep(2)
            stopping.set()
            process.send_signal(signal.SIGTERM)

        threading.Thread(target=end).start()
        start = time.perf_counter()
        at_once(clients, work, address)
        code = process.wait(60)
        seconds = time.perf_counter() - start - 2
    lost = sum(count for name, count in counts.items() if name.startswith(("lost", "5")) and "503" not in name)
    return {"stage": "stop", "clients": clients, **counts, "exit": code, "seconds_to_end": round(seconds, 2),
            "right": code == 0 and not lost}  # fmt: skip


def main() -> int:
    """Run the stages that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=["check", "rate", "stop", "soak"])
    parser.add_argument("--requests", type=int, help="default: 300; of soak 10,000")
    parser.add_argument("--clients", type=int, default=10, help="at a time (default: 10)")
    parser.add_argument("--model", default="embedded", help="what check and soak draw with (default: embedded)")
    args = parser.parse_args()
    code = 0
    for stage in args.stages:
        rows: Any
        count = args.requests or (10_000 if stage == "soak" else 300)
        if stage in ("check", "soak"):
            rows = [check(count, args.clients, max(1, count // 20), args.model) | {"stage": stage}]
        else:
            rows = rate(count, args.clients) if stage == "rate" else [stop(args.clients)]
        for row in rows:
            # Of all that runs on the machine: beside more than its cores no seconds of the wall mean anything.
            print(json.dumps(row | machine() | {"load": round(os.getloadavg()[0], 1)}), flush=True)
            code |= not row.get("right", True)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""`s3dit serve`: draw for others over HTTP, by the contract of OpenAI's images API (`s3dit.serve`)."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from s3dit import files, values
from s3dit.cli.importing import importing
from s3dit.cli.option_names import NAMES, speaking_of_options
from s3dit.cli.options import SIZE, add_model, add_runtime, check_format
from s3dit.cli.prepare import MODELS, load_pipeline
from s3dit.cli.replay import attach
from s3dit.errors import RequestError
from s3dit.runtime import ray_cluster
from s3dit.runtime.embedded import FOLDERS
from s3dit.runtime.embedded import NAMES as EMBEDDED_NAMES
from s3dit.serve.bounds import Limits
from s3dit.serve.door import digest
from s3dit.terminal import say

if TYPE_CHECKING:
    from s3dit.pipeline import Pipeline
    from s3dit.serve.engine import Engine
    from s3dit.serve.server import Serving

SUMMARY = "draw for others over HTTP: OpenAI's images API, and a web page"
EXAMPLES = (
    ("s3dit serve embedded", "then open http://127.0.0.1:8000, or let a client of OpenAI's draw there"),
    ("s3dit serve Tongyi-MAI/Z-Image-Turbo --lora-dir adapters/", "clients choose among the adapters in a folder"),
    (
        "s3dit serve path/to/Z-Image-Turbo --host 0.0.0.0 --api-key-file key.txt",
        "for a network: with a key, and behind a proxy that speaks TLS",
    ),
    (
        "s3dit serve path/to/Z-Image-Turbo --quantize fp8 --warm-up 1024x1024,768x1344 --queue 16",
        "faster, the first picture too; who comes to a full queue is told when to come again",
    ),
    ("s3dit serve path/to/Z-Image-Turbo --ray auto --replicas 2:16", "on a Ray cluster, more of them as more is asked"),
)
# What it needs beside the engine, by import name.
NEEDED = ("starlette", "uvicorn", "prometheus_client")
NEEDED_BY_RAY = (*NEEDED, "ray")
KEY = "S3DIT_API_KEY"
# Bytes of a file that holds a key.
LONGEST_KEY = 4096


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command to its parser."""
    parser.add_argument(
        "served",
        nargs="?",
        metavar="MODEL",
        help="embedded (default), a folder in the official layout, a file, a hub name",
    )
    _add_network(parser)
    _add_work(parser)
    _add_limits(parser)
    _add_ray(parser)
    add_model(parser)
    add_runtime(parser)


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="where to listen (default: 127.0.0.1, this machine alone; 0.0.0.0 is every network)",
    )  # fmt: skip
    group.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE",
        help=f"a file whose one line is the key that clients must have (else that of {KEY} in the environment)",
    )  # fmt: skip
    group.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="another name that clients call this server by; on 127.0.0.1 only its own are answered, and elsewhere "
        "these alone where any is given",
    )  # fmt: skip
    group.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL",
        help="a site whose pages may ask from a browser, such as https://example.org (default: none but its own page)",
    )  # fmt: skip


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work")
    group.add_argument("--name", metavar="NAME", help="what clients call the model (default: the last part of MODEL)")
    group.add_argument(
        "--lora-dir", type=Path, metavar="DIR",
        help="offer the .safetensors adapters in this folder by their names; those of --lora act unless a request says "
        "otherwise, these only where one asks for them",
    )  # fmt: skip
    group.add_argument(
        "--warm-up", type=_sizes, default=(), metavar="WxH,…", help="draw one step of these sizes before listening"
    )
    group.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait; more get 429 (default: 64)"
    )
    group.add_argument(
        "--batch-tokens", type=int, metavar="N",
        help="tokens of all requests that share a pass; a picture of 1024x1024 has 4096 (default: as memory allows)",
    )  # fmt: skip
    group.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="of a request, the queue included (default: 600)",
    )
    group.add_argument(
        "--grace", type=float, default=30.0, metavar="SECONDS",
        help="what is drawn has to finish after SIGTERM or Ctrl-C; what waits is handed back at once (default: 30)",
    )  # fmt: skip
    group.add_argument(
        "--log-prompts", action="store_true", help="lines of the log hold prompts (default: they do not)"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Bounds of one request."""
    group, limits = parser.add_argument_group("limits of one request"), Limits()
    for name, text in (
        ("pictures", "n"), ("steps", "steps of the solver"), ("pixels", "pixels of all its pictures"),
        ("side", "pixels of a side"), ("prompt", "characters of a prompt"), ("body", "bytes of what is sent"),
        ("images", "pictures that are sent"), ("image-pixels", "pixels of these together"),
    ):  # fmt: skip
        default = getattr(limits, name.replace("-", "_"))
        group.add_argument(f"--max-{name}", type=int, metavar="N", help=f"{text} (default: {default:,})")


def _add_ray(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many machines")
    group.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS",
        help="serve by Ray Serve on a cluster: auto or HOST:PORT; without ADDRESS, local: one of this machine alone",
    )  # fmt: skip
    group.add_argument(
        "--replicas",
        type=_range,
        metavar="N|MIN:MAX",
        help="models that draw, each in a process of its own; MIN:MAX as the load wants (default: 1)",
    )
    group.add_argument(
        "--worker-threads", dest="threads", type=int, metavar="N", help="of a replica on a CPU (default: 1)"
    )


def _range(text: str) -> tuple[int, int]:
    """A number, or the least and the most of one."""
    match = re.fullmatch(r"(\d{1,4})(?::(\d{1,4}))?", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1, or MIN:MAX such as 1:4")
    return int(match[1]), int(match[2] or match[1])


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Sizes that commas part: width and height each."""
    found = [SIZE.fullmatch(each.strip()) for each in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 1024x1024,768x1344")
    return tuple((int(match[1]), int(match[2])) for match in found if match)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit code. Raises RequestError, BackendError, CheckpointError."""
    limits, key = _checked(args), _key(args.api_key_file)
    _check_packages(NEEDED if args.ray is None else NEEDED_BY_RAY, "serve" if args.ray is None else "serve,ray")
    folder = _adapters(args.lora_dir)
    with importing():
        from s3dit.serve.server import Server, bound, is_local

    # Before a model is read, which takes long: a port that is taken is said at once.
    sock = bound(args.host, args.port)
    address = sock.getsockname()[0]
    if key is None and not is_local(address):
        say(f"whoever reaches {args.host} may draw here; --api-key-file asks for a key")
    if args.ray is not None:
        sock.close()
        _serve_on_ray(args, partial(opened, args, limits, key, folder), address)
        return 0
    engine, serving = opened(args, limits, key, folder)
    try:
        Server(engine, serving, sock).serve_forever()
    finally:
        engine.stop()
    return 0


def opened(args: argparse.Namespace, limits: Limits, key: bytes | None, folder: list[Path]) -> "tuple[Engine, Serving]":
    """Load the model and its adapters -> an engine that is warm, and how it is served; on Ray in each replica."""
    with importing():
        import torch

        from s3dit.serve.engine import Engine
        from s3dit.serve.server import Serving

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pipe = load_pipeline(args)
    scales = _attach(pipe, args, folder)
    say(f"{pipe.folder.name} on {pipe.placement}" + f"; adapters: {', '.join(pipe.lora.names)}" * bool(pipe.lora.names))
    name = args.name or EMBEDDED_NAMES.get(pipe.folder) or Path(args.model or pipe.folder.name).name
    serving = Serving(
        name=name, limits=limits, key=key, hosts=tuple(args.allow_host), origins=tuple(args.allow_origin),
        scales=scales, grace=args.grace, log_prompts=args.log_prompts,
    )  # fmt: skip
    engine = Engine(pipe, queue_limit=args.queue, max_batch_tokens=args.batch_tokens, timeout=args.timeout)
    try:
        engine.warm_up(args.warm_up)
    except BaseException:
        engine.stop()
        raise
    return engine, serving


def _serve_on_ray(args: argparse.Namespace, opened: "Callable[[], tuple[Engine, Serving]]", address: str) -> None:
    """Serve by replicas until a signal; raises BackendError, and what loading a model raises."""
    # Ray's processes inherit the environment.
    os.environ.pop(KEY, None)
    ray_cluster.prepare()
    try:
        with importing():
            from s3dit.serve.replicas import Application, Fleet
    except ImportError as error:
        raise RequestError(f"--ray cannot import Ray Serve ({error}); pip install 's3dit[serve,ray]'") from None
    least, most = args.replicas or (1, 1)
    Application(
        opened=opened, fleet=Fleet(least=least, most=most, threads=args.threads, device=args.device), cluster=args.ray,
        host=address, port=args.port, queue=args.queue, timeout=args.timeout, grace=args.grace,
    ).serve_forever()  # fmt: skip


def _checked(args: argparse.Namespace) -> Limits:
    """The limits of the options, which are checked as far as they can be without a model; raises RequestError."""
    if args.served is not None and args.model is not None:
        raise RequestError(f"both {args.served} and --model {args.model} are given; needed one model")
    args.model = args.served if args.model is None else args.model
    given = [(NAMES[name], getattr(args, name)) for name in MODELS if getattr(args, name) not in (None, *FOLDERS)]
    files.check_models([*given, *(("--lora", option.file) for option in args.lora)])
    for option, name in (("--quantize", args.quantize), ("--quantize-text", args.quantize_text)):
        check_format(option, name)
    for option, value, low, high in (
        ("--port", args.port, 0, 65535), ("--queue", args.queue, 1, 100_000), ("--timeout", args.timeout, 1, 1e6),
        ("--grace", args.grace, 0, 86_400), ("--batch-tokens", args.batch_tokens, 1, 1 << 30),
        ("--worker-threads", args.threads, 1, 4096),
    ):  # fmt: skip
        if value is not None and not low <= value <= high:
            raise RequestError(f"{option} is {value:g}; needed {low} to {high:g}")
    limits = {name: getattr(args, f"max_{name}", None) for name in Limits.__dataclass_fields__}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise RequestError(f"--max-{name.replace('_', '-')} is {value}; needed 1 or more")
    _check_names(args)
    _check_ray(args)
    if args.residency is None and args.vram is None and args.ram is None:
        # Parts that took turns would be read again for every request.
        args.residency = "resident"
    found = replace(Limits(), **{name: value for name, value in limits.items() if value is not None})
    _check_warm_up(args.warm_up, found)
    return found


def _check_warm_up(sizes: Sequence[tuple[int, int]], limits: Limits) -> None:
    """Raise RequestError for a size that no request could ask for."""
    for width, height in sizes:
        for name, pixels in (("width", width), ("height", height)):
            values.side(f"--warm-up: {name}", pixels)
            values.integer(f"--warm-up: {name}", pixels, 16, limits.side)
        if width * height > limits.pixels:
            raise RequestError(
                f"--warm-up {width}x{height} has {width * height:,} pixels; needed at most {limits.pixels:,}, or a "
                "larger --max-pixels"
            )


def _check_names(args: argparse.Namespace) -> None:
    """Raise RequestError for names that no client could have or ask for."""
    if args.name is not None and not (args.name.strip() and args.name.isprintable()):
        raise RequestError(f"--name is {args.name!r}; needed a name that clients can send, in one line")
    for host in args.allow_host:
        if not _is_host(host):
            raise RequestError(f"--allow-host is {host!r}; needed a name without scheme or port, such as example.org")
    for origin in args.allow_origin:
        # As browsers write it.
        if not re.fullmatch(r"https?://[^\sA-Z/?#@]+", origin):
            raise RequestError(f"--allow-origin is {origin!r}; needed a site such as https://example.org")


def _is_host(name: str) -> bool:
    """Whether it is what a Host header may say, without the port."""
    try:
        return bool(ip_address(name))
    except ValueError:
        return re.fullmatch(r"[\w-]+(\.[\w-]+)*", name, re.ASCII) is not None


def _check_ray(args: argparse.Namespace) -> None:
    """Check and complete what replicas are started with; raises RequestError."""
    if args.ray is None:
        for option, value in (("--replicas", args.replicas), ("--worker-threads", args.threads)):
            if value is not None:
                raise RequestError(f"{option} is given without --ray; needed both, or neither")
        return
    ray_cluster.check_address(args.ray, "; MODEL stands before")
    if args.port == 0:
        raise RequestError("--port is 0 with --ray; needed a port that is free on all machines, such as 8000")
    if ":" in (args.device or ""):
        raise RequestError(f"--device is {args.device} with --ray, which chooses a GPU for each replica; needed cuda")
    args.threads = args.threads or 1
    # Replicas have another current folder.
    for name in MODELS:
        value = getattr(args, name)
        if value not in (None, *FOLDERS) and (path := Path(value).expanduser()).exists():
            setattr(args, name, str(path.absolute()))
    args.lora = [replace(option, file=str(Path(option.file).expanduser().absolute())) for option in args.lora]
    args.lora_dir = args.lora_dir and args.lora_dir.absolute()


def _key(path: Path | None) -> bytes | None:
    """The digest of the key that clients must have: of a file, or of the environment; raises RequestError."""
    if path is None:
        key, where = os.environ.get(KEY), f"{KEY} in the environment"
    else:
        where = f"--api-key-file {path}"
        with files.opened(path, "a file with a key", LONGEST_KEY) as file:
            try:
                key = file.read(LONGEST_KEY).decode("ascii")
            except UnicodeDecodeError:
                raise RequestError(f"{where} holds what is no ASCII; needed one line, the key") from None
    if key is None:
        return None
    # What surrounds it, such as the line's end, no header could hold.
    key = key.strip()
    if not (key.isascii() and key.isprintable() and len(key.split()) == 1):
        raise RequestError(f"{where} holds no key; needed one word, such as openssl rand -hex 24 prints")
    return digest(key)


def _check_packages(needed: Sequence[str], extra: str) -> None:
    """Raise RequestError where a package of an extra is missing."""
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise RequestError(
            f"serving needs {', '.join(needed)}; not installed: {', '.join(missing)}; pip install 's3dit[{extra}]'"
        )


def _adapters(folder: Path | None) -> list[Path]:
    """The files of adapters in a folder, by name; raises RequestError."""
    if folder is None:
        return []
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors" and path.is_file())
    except OSError as error:
        raise RequestError(f"--lora-dir {folder}: {error.strerror}; needed a folder of .safetensors files") from None
    if not found:
        raise RequestError(f"--lora-dir {folder} holds no .safetensors file; needed adapters, or leave it out")
    return found


def _attach(pipe: "Pipeline", args: argparse.Namespace, folder: list[Path]) -> dict[str, float]:
    """Attach the adapters of --lora and those of a folder; returns the scales of the former by name."""
    with speaking_of_options():
        for report in attach(pipe, args, ()):
            say(f"adapter {report}")
        scales = {name: adapter.scale for name, adapter in pipe.parts.adapters.items()}
        for path in folder:
            say(f"adapter {pipe.lora.attach(path, allow_partial=args.lora_allow_partial)}")
    return scales

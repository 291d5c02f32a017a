"""The command line: a command for each of COMMANDS.

A command is a module with SUMMARY, EXAMPLES, add_options(parser) and run(args). An error of the user's ends in a line
on standard error and exit code 2, without a traceback. Ctrl-C ends with 130, SIGTERM with 143, SIGHUP with 129, and no
incomplete file is left. If standard output is lost, the pictures are written all the same, and the exit code is 141 if
its reader closed it, else 2. torch is imported only when there is something to compute, so `--help` is quick.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from s3dit import __version__
from s3dit.cli import (
    batch,
    calibrate_cache,
    compare,
    convert,
    export,
    generate,
    inspect,
    microscope,
    parity,
    plan,
    quantize,
    serve,
)
from s3dit.cli.parser import Parser, shown_examples
from s3dit.terminal import finish, follows, say, stoppable, streams

# Module by the name of its command.
COMMANDS: dict[str, Any] = {
    "generate": generate, "batch": batch, "plan": plan, "microscope": microscope, "inspect": inspect,
    "compare": compare, "convert": convert, "quantize": quantize, "calibrate-cache": calibrate_cache, "export": export,
    "parity": parity, "serve": serve,
}  # fmt: skip
# The names of before, for one release.
RENAMED = {"look": "inspect"}
ENVIRONMENT = """environment:
  S3DIT_BACKEND=auto|reference|torch|triton   which implementations compute where --backend does not say; see
                                              s3dit plan --kernels"""


def main(argv: Sequence[str] | None = None, *, early: Callable[[int, object], None] | None = None) -> int:
    """Run the command line; returns the exit code. early: what a signal does while torch is imported (`stoppable`)."""
    words = sys.argv[1:] if argv is None else list(argv)
    with streams(quiet=follows() and any(word.partition("=")[0] == "--parallel" for word in words)):
        try:
            with stoppable(early):
                code = _command(words)
        except SystemExit as done:
            # argparse has said what there was to say.
            raise SystemExit(finish(int(done.code or 0))) from None
        except KeyboardInterrupt as stopped:
            say("stopped; nothing half-written is left")
            return getattr(stopped, "code", 130)
        except (ValueError, RuntimeError, OSError) as error:
            if not _ours(error):
                raise
            say(error)
            return 2
        return finish(code)


def _command(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.command is None:
        return 0
    code: int = COMMANDS[RENAMED.get(args.command, args.command)].run(args)
    return code


def _ours(error: Exception) -> bool:
    """Whether an error is one of this package, whose message is for the user."""
    return type(error).__module__.startswith("s3dit.")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the words of a command line; exits with 2 where one is wrong, with 0 after --help or --version.

    `command` of the result is None where there are no words; the help was printed then.
    """
    parser, commands = _parsers()
    argv = ["--help"] if list(argv) == ["help"] else argv
    if argv and argv[0] not in commands and argv[0] not in parser.options:
        _refuse_command(parser, argv[0])
    args, rest = parser.parse_known_args(argv)
    if rest:
        commands[args.command].refuse(rest[0], commands)
    if args.command is None:
        parser.print_help()
    return args


def _refuse_command(parser: Parser, word: str) -> None:
    """Exit with 2 because of a first word that is no command: an option of one, or a prompt."""
    if word.startswith("-"):
        parser.error(f"there is no option {word.partition('=')[0]} here; name a command first, as in s3dit generate")
    nearest = get_close_matches(word, COMMANDS, 1, 0.6)
    hint = f"did you mean {nearest[0]}?" if nearest else f"to draw it: s3dit generate {word!r}"
    parser.error(f"invalid choice: {word!r} is no command; needed one of {', '.join(COMMANDS)}; {hint}")


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and those of the commands by name."""
    parser = Parser(
        prog="s3dit",
        description="Draw pictures with Z-Image models (S3-DiT), or look at what drawing would take.",
        epilog="\n".join(
            [
                shown_examples(
                    (command.EXAMPLES[0] for command in COMMANDS.values()),
                    "examples, one of each command (s3dit generate --help shows more):",
                ),
                "",
                ENVIRONMENT,
            ]
        ),
    )
    parser.add_argument("--version", action="version", version=f"s3dit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar=f"{{{','.join(COMMANDS)}}}")
    for name, command in COMMANDS.items():
        aliases = [old for old, new in RENAMED.items() if new == name]
        own = commands.add_parser(
            name, aliases=aliases, help=command.SUMMARY, description=command.SUMMARY,
            epilog=shown_examples(command.EXAMPLES),
        )  # fmt: skip
        command.add_options(own)
        own.add_spellings()
    return parser, dict(commands.choices)

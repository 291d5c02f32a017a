"""The command line: `s3dit generate`, `plan`, `inspect`, `convert`, `quantize`.

Everything the user may get wrong ends in one line on stderr and exit code 2, without a traceback; Ctrl-C ends with
130, SIGTERM with 143, SIGHUP with 129, and nothing half-written is left; where standard output is lost, the pictures
are written all the same, and the exit code is 141 if its reader went away, in silence, else 2. torch is imported only
when there is something to compute, so `--help` is quick.
"""

import sys
from collections.abc import Callable, Sequence

from s3dit.cli import file_commands, generate
from s3dit.cli.options import parse
from s3dit.terminal import finish, say, stoppable, streams


def main(argv: Sequence[str] | None = None, *, early: Callable[[int, object], None] | None = None) -> int:
    """Run the command line; returns the exit code. early: what a signal does while torch is imported (`stoppable`)."""
    with streams():
        try:
            with stoppable(early):
                code = _command(argv)
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


def _command(argv: Sequence[str] | None) -> int:
    args = parse(sys.argv[1:] if argv is None else list(argv))
    if args.command is None:
        return 0
    return file_commands.COMMANDS.get(args.command, generate.run)(args)


def _ours(error: Exception) -> bool:
    """Whether an error is one of the three that speak to the user, told by its home: its module may not import."""
    return type(error).__module__.startswith("s3dit.")

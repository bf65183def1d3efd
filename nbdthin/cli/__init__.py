"""The command `nbdthin`: one table of verbs.

A verb takes its arguments, asks the daemon (those marked `offline` ask none) and returns what `--json` prints; without
`--json` its `show` writes the same for people. Everything that goes wrong is one line on stderr and exit status 1,
wrong usage is 2. What only some verbs need (numpy, uvloop, rich) they import themselves, so that the others start fast.
Each module here has the verbs of one subject and a table of them; a name of two words is a verb of a group. How things
look is display.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from typing import TextIO

from nbdthin import __version__
from nbdthin.cli import completion, devices, images, looking, moving, pools, thin, volumes
from nbdthin.cli.verb import DEFAULT_SOCKET, Verb, path_argument, print_json, wants_json
from nbdthin.control.codec import printable, shortened
from nbdthin.errors import Error

INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE

VERBS: dict[str, Verb] = {
    **pools.VERBS,
    **volumes.VERBS,
    **looking.VERBS,
    **devices.VERBS,
    **images.VERBS,
    **moving.VERBS,
    **thin.VERBS,
    **completion.VERBS,
}
GROUPS: dict[str, str] = {**images.GROUPS}  # the first words of verbs that have two


def make_parser() -> ArgumentParser:
    """Everything the command takes, verbs in the order of the table."""
    # On both levels, so that they may stand before and behind the verb; SUPPRESS keeps one from undoing the other.
    common = ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument(
        "--socket",
        metavar="PATH",
        type=path_argument,
        help=f"which daemon (default: NBDTHIN_SOCKET, else {DEFAULT_SOCKET})",
    )
    parser = ArgumentParser(
        "nbdthin",
        description="Thin volumes and snapshots, served as network block devices. Sizes are written 10G or 64KiB.",
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nbdthin {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    of_group = {"": verbs}
    for name, verb in VERBS.items():
        group, _, last = name.rpartition(" ")
        if group not in of_group:
            own = verbs.add_parser(
                group, help=GROUPS[group], description=GROUPS[group], parents=[common], allow_abbrev=False
            )
            of_group[group] = own.add_subparsers(metavar="VERB", required=True)
        own = of_group[group].add_parser(
            last, help=verb.doc, description=verb.doc, parents=[common], allow_abbrev=False
        )
        own.set_defaults(verb=name)
        verb.arguments(own)
    return parser


def _run(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    try:
        arguments = parser.parse_args(argv)
    finally:
        sys.stdout.flush()  # --help into a pipe that is closed: as for every verb
    verb = VERBS[arguments.verb]
    if verb.offline and hasattr(arguments, "socket"):
        parser.error(f"{arguments.verb} asks no daemon: it takes no --socket")
    result = verb.run(arguments)
    if not wants_json(arguments):
        verb.show(result)
    elif result is not None and not verb.prints_itself:
        print_json(result)
    sys.stdout.flush()
    problem = verb.failed(result)
    return _complain(problem) if problem else 0


class _Output(TextIOWrapper):
    """stdout, whose errors say that they are its own: an OSError alone may be anything's, and argparse drops it."""

    def write(self, text: str, /) -> int:
        with _output_named():
            return super().write(text)

    def flush(self) -> None:
        with _output_named():
            super().flush()


@contextlib.contextmanager
def _output_named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # whoever reads has enough: no complaint
        raise
    except OSError as error:
        raise Error(f"cannot write output: {error.strerror or error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    # numpy is for maps alone; OpenBLAS below it would start a thread a processor, which compute at nothing for a while.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _prepare_output()
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Error as error:
        return _complain(str(error))
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        return _complain(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    finally:
        _flush_or_drop(sys.stdout)


def _prepare_output() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w"))
    # backslashreplace: a label may hold what the terminal cannot show.
    if isinstance(sys.stderr, TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")
    old = sys.stdout
    if type(old) is TextIOWrapper:
        encoding, at_lines, at_once = old.encoding, old.line_buffering, old.write_through
        sys.stdout = _Output(old.detach(), encoding, "backslashreplace", None, at_lines, at_once)


def _complain(problem: str) -> int:
    try:
        print(f"nbdthin: {shortened(printable(problem))}", file=sys.stderr)
    except OSError:
        pass  # nobody can be told
    _flush_or_drop(sys.stderr)
    return 1


def _flush_or_drop(stream: TextIO) -> None:
    """What is left in the buffer has nowhere to go: the interpreter would try again at its exit, and fail."""
    try:
        stream.flush()
    except (OSError, Error):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

"""Verbs that move data: files into the pool and out of it, snapshots from one pool to another. All ask a daemon."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from nbdthin import display
from nbdthin.cli.verb import Verb, connect, path_argument, wants_json
from nbdthin.control.rows import Export
from nbdthin.errors import Error, Invalid


def bar(what: str, arguments: Namespace) -> display.Bar:
    """On stderr: what is on stdout may be data. It goes when it is done."""
    return display.Bar(what, file=sys.stderr, quiet=wants_json(arguments), transient=True)


def _import_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=path_argument, help="- for what comes on stdin, raw")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--size", help="larger than what FILE holds")
    parser.add_argument("--format", help="of FILE (default: as qemu-img finds)")
    parser.add_argument("--chain", action="store_true", help="what FILE stands on becomes snapshots NAME@1, NAME@2 ...")


def _export_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("file", metavar="FILE", type=path_argument, help="- for stdout, raw")
    parser.add_argument("--format", default="raw", help="qcow2 and others that qemu-img makes (default: raw)")
    parser.add_argument("--force", action="store_true", help="replace FILE, or overwrite a device")


def _send_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("snapshot", nargs="?", metavar="SNAPSHOT")
    parser.add_argument("--from", dest="base", metavar="SNAPSHOT", help="send what differs from this one")
    parser.add_argument("--resume", metavar="TOKEN", help="in place of SNAPSHOT: what an interrupted receive has not")
    parser.add_argument("--output", metavar="FILE", type=path_argument, help="instead of stdout")
    parser.add_argument("--level", type=int, default=1, metavar="N", help="of zstd, 1 to 19 (default: %(default)s)")


def _receive_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--input", metavar="FILE", type=path_argument, help="instead of stdin")
    parser.add_argument("--resume-token", action="store_true", help="print what `send --resume` is to go on with")


def _stdin() -> io.BufferedIOBase:
    if sys.stdin is None:
        raise Invalid("stdin is closed: nothing can be read from it")
    if sys.stdin.isatty():
        raise Invalid("stdin is a terminal: name a file, or put a pipe before it")
    return cast(io.BufferedIOBase, sys.stdin.buffer)


@contextlib.contextmanager
def _stdout() -> Iterator[io.BufferedIOBase]:
    """For data. Nobody else inside raises an OSError that has no name in it."""
    if sys.stdout.isatty():
        raise Invalid("stdout is a terminal: name a file, or put a pipe behind it")
    try:
        yield cast(io.BufferedIOBase, sys.stdout.buffer)
    except BrokenPipeError:  # whoever reads has enough, or has said what is wrong
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise Error(f"cannot write output: {error.strerror or error}") from error


def _import(arguments: Namespace) -> Export:
    from nbdthin.moving.importing import import_chain, import_file, import_pipe

    path, name = Path(arguments.file), arguments.name
    if arguments.chain and arguments.size is not None:
        raise Invalid("--size changes what the images of a --chain say: resize the volume afterwards")
    if arguments.file == "-" and (arguments.chain or arguments.format not in (None, "raw")):
        raise Invalid("what comes on stdin is raw (put an image into a file first)")
    with connect(arguments) as pool, bar(f"import {name}", arguments) as progress:
        if arguments.file == "-":
            return import_pipe(pool, _stdin(), name, size=arguments.size, progress=progress)
        if arguments.chain:
            return import_chain(pool, path, name, format=arguments.format, progress=progress)
        return import_file(pool, path, name, size=arguments.size, format=arguments.format, progress=progress)


def _export(arguments: Namespace) -> dict[str, str] | None:
    from nbdthin.moving.exporting import export_file, export_pipe
    from nbdthin.moving.reaching import connected

    path, name = Path(arguments.file), arguments.name
    with connect(arguments) as pool, bar(f"export {name}", arguments) as progress:
        if arguments.file == "-":
            if arguments.format != "raw":
                raise Invalid("what goes to stdout is raw (an image needs a file)")
            with _stdout() as output, connected(pool, name) as disk:
                export_pipe(disk, output, progress=progress)
            return None
        export_file(pool, name, path, format=arguments.format, force=arguments.force, progress=progress)
    return {"exported": arguments.file}


def _send(arguments: Namespace) -> dict[str, int] | None:
    from nbdthin.moving.files import about, replacing
    from nbdthin.moving.sending import Sent, resume, send

    if (arguments.snapshot is None) == (arguments.resume is None):
        raise Invalid("say either which SNAPSHOT to send or what to --resume")
    if arguments.resume is not None and arguments.base is not None:
        raise Invalid("a token to --resume says itself what the stream is the difference to")
    if not 1 <= arguments.level <= 19:
        raise Invalid(f"not a level of zstd: {arguments.level} (1 to 19)")

    def write(output: io.BufferedIOBase) -> Sent:
        if arguments.resume is not None:
            return resume(pool, arguments.resume, output, level=arguments.level, progress=progress)
        return send(pool, arguments.snapshot, output, base=arguments.base, level=arguments.level, progress=progress)

    with connect(arguments) as pool, bar(f"send {arguments.snapshot or ''}", arguments) as progress:
        if arguments.output is None:
            with _stdout() as output:
                write(output)
            return None
        path = Path(arguments.output)
        with replacing(path, force=False) as partial, open(partial, "xb") as file, about(path):
            sent = write(file)
            os.fsync(file.fileno())
    return {"data": sent.data, "stream": sent.stream}


def _receive(arguments: Namespace) -> Export | dict[str, str]:
    from nbdthin.moving.receiving import receive, resume_token

    name = arguments.name
    with connect(arguments) as pool:
        if arguments.resume_token:
            return {"token": resume_token(pool, name)}
        with bar(f"receive {name}", arguments) as progress:
            if arguments.input is None:
                return receive(pool, name, _stdin(), where="stdin", progress=progress)
            with open(arguments.input, "rb") as file:
                return receive(pool, name, file, where=arguments.input, progress=progress)


def _show_received(received: Export | dict[str, str]) -> None:
    if isinstance(received, Export):
        display.show_uri(received)
    else:
        print(received["token"])


VERBS: dict[str, Verb] = {
    "import": Verb("a new volume from a file", _import_arguments, _import, display.show_uri),
    "export": Verb("a file from a volume or snapshot", _export_arguments, _export),
    "send": Verb("a snapshot, or what it differs in from another, as a stream", _send_arguments, _send),
    "receive": Verb("a snapshot from a stream", _receive_arguments, _receive, _show_received),
}

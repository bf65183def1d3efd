"""The command `nbdthin`: one table of verbs.

A verb takes its arguments, asks the daemon (those marked `offline` ask none) and returns what `--json` prints; without
`--json` its `show` writes the same for people. Everything that goes wrong is one line on stderr and exit status 1,
wrong usage is 2. What only some verbs need (numpy, uvloop, rich) they import themselves, so that the others start fast.
How things look is display.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import stat
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from nbdthin import __version__, display
from nbdthin.control.client import Client, connect
from nbdthin.control.codec import plain, printable, shortened
from nbdthin.control.rows import Export, Info, Node
from nbdthin.errors import Corrupt, Error, Invalid, Unreachable
from nbdthin.pool.rows import Extent, Finding, PoolInfo, Scrubbed
from nbdthin.units import format_size

if TYPE_CHECKING:
    from nbdthin.control.commands import Daemon
    from nbdthin.pool.check import Report
    from nbdthin.pool.repair import Repair

DEFAULT_SOCKET = "var/control.sock"
DEFAULT_CONFIG = "exports.toml"
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE


# -- arguments


def _no_arguments(_: ArgumentParser) -> None:
    pass


def _path(text: str) -> str:
    """Where something is. What a script's unset variable leaves is no place, and not the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def _names(*names: str) -> Callable[[ArgumentParser], None]:
    """Positional arguments, in this order."""

    def add(parser: ArgumentParser) -> None:
        for name in names:
            parser.add_argument(name.lower(), metavar=name, type=_path if name in ("POOL", "FILE") else str)

    return add


def _init_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pool", metavar="POOL", type=_path, help="a directory that does not exist or is empty")
    parser.add_argument("--size", help="a limit, not an allocation (default: 100G, or all of a block device)")
    parser.add_argument("--block-size", default="64K", metavar="SIZE", help="16K to 1M, for good (default: 64K)")
    parser.add_argument("--data", metavar="FILE_OR_DEVICE", type=_path, help="where the data goes (default: POOL/data)")
    parser.add_argument("--force", action="store_true", help="use FILE_OR_DEVICE even if it holds something")


def _serve_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", default=DEFAULT_CONFIG, metavar="FILE", type=_path, help=f"default: {DEFAULT_CONFIG}"
    )
    parser.add_argument("--verbose", action="store_true", help="log connections too")


def _clone_arguments(parser: ArgumentParser) -> None:
    _names("SNAPSHOT", "NAME")(parser)
    parser.add_argument("--size", help="larger than the snapshot's")


def _rm_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--force", action="store_true", help="disconnect who uses them")


def _label_arguments(parser: ArgumentParser) -> None:
    _names("NAME")(parser)
    parser.add_argument("labels", nargs="+", metavar="KEY=VALUE", help="an empty VALUE removes KEY")


def _limit_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("size", metavar="SIZE|none")


def _ls_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE", help="only what has it; may be repeated"
    )


def _check_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pool", metavar="POOL", type=_path)
    parser.add_argument(
        "--data", metavar="FILE_OR_DEVICE", type=_path, help="where the data is, if the superblock cannot say"
    )


def _repair_arguments(parser: ArgumentParser) -> None:
    _check_arguments(parser)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")
    instead.add_argument(
        "--release", action="store_true", help="give back what earlier repairs have lost: no dump will be restored"
    )
    parser.add_argument(
        "--write-header", action="store_true", help="the data is this pool's though nothing in it shows that"
    )


def _dump_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pool", metavar="POOL", type=_path)
    parser.add_argument(
        "--output", metavar="FILE", type=_path, help="instead of stdout; takes its name when it is whole"
    )


def _restore_arguments(parser: ArgumentParser) -> None:
    _names("FILE", "POOL")(parser)
    parser.add_argument(
        "--data", metavar="FILE_OR_DEVICE", type=_path, help="where the data is (default: where POOL has it)"
    )
    parser.add_argument("--force", action="store_true", help="even if POOL is sound, or its data's header is not")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise Invalid(f"not a label: {text!r} (write KEY=VALUE)")
    return key, value


# -- verbs


def _connect(arguments: Namespace) -> Client:
    path: str = getattr(arguments, "socket", "") or os.environ.get("NBDTHIN_SOCKET", "") or DEFAULT_SOCKET
    return connect(path)


def _init(arguments: Namespace) -> PoolInfo:
    from nbdthin.pool.files import draft_named
    from nbdthin.pool.pool import Pool

    path = Path(arguments.pool)
    with contextlib.suppress(FileNotFoundError):
        if path.samefile("."):
            raise Invalid(f"{path} is the working directory, which the pool would replace: go elsewhere first")
    with draft_named(path):
        Pool.init(
            path, size=arguments.size, block_size=arguments.block_size, data=arguments.data, force=arguments.force
        )
    with _mendable(path), Pool.open(path) as pool:
        return pool.info()


@contextlib.contextmanager
def _mendable(pool: Path | str) -> Iterator[None]:
    """Damage is told with what to do about it; of what a later version wrote, `repair` would say the same again."""
    from nbdthin.pool.superblock import LaterVersion

    try:
        yield
    except LaterVersion:
        raise
    except Corrupt as error:
        where = shlex.quote(str(pool))
        raise Error(f"{error} (see all of it: `nbdthin check {where}`; then: `nbdthin repair {where}`)") from error


def _look_into(pool: str) -> None:
    """A directory that nobody may look into would seem to be empty, and no pool. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (Path(pool) / "superblock").stat()


def _serve(arguments: Namespace) -> None:
    from nbdthin import config, daemon

    logging.basicConfig(format="nbdthin: %(message)s")
    logging.getLogger("nbdthin").setLevel(logging.INFO)
    logging.getLogger("nbdthin.server").setLevel(logging.INFO if arguments.verbose else logging.WARNING)
    wanted = config.load(arguments.config)

    def ready(running: Daemon) -> None:
        if _wants_json(arguments):
            listen = [str(address) for address in running.listen]
            _print_json({"pool": wanted.pool.path, "listen": listen, "control": running.control})
            sys.stdout.flush()

    with _mendable(wanted.pool.path):
        daemon.serve(wanted, ready)


def _create(arguments: Namespace) -> Export:
    with _connect(arguments) as pool:
        pool.create(arguments.name, arguments.size)
        return pool.show(arguments.name)


def _snapshot(arguments: Namespace) -> Export:
    with _connect(arguments) as pool:
        pool.snapshot(arguments.volume, arguments.name)
        return pool.show(arguments.name)


def _clone(arguments: Namespace) -> Export:
    with _connect(arguments) as pool:
        pool.clone(arguments.snapshot, arguments.name, size=arguments.size)
        return pool.show(arguments.name)


def _rollback(arguments: Namespace) -> Export:
    with _connect(arguments) as pool:
        pool.rollback(arguments.volume, arguments.snapshot)
        return pool.show(arguments.volume)


def _rename(arguments: Namespace) -> Export:
    with _connect(arguments) as pool:
        pool.rename(arguments.old, arguments.new)
        return pool.show(arguments.new)


def _rm(arguments: Namespace) -> dict[str, list[str]]:
    with _connect(arguments) as pool:
        pool.remove(*arguments.names, force=arguments.force)
    return {"removed": arguments.names}


def _resize(arguments: Namespace) -> Export:
    with _connect(arguments) as pool:
        pool.resize(arguments.name, arguments.size)
        return pool.show(arguments.name)


def _label(arguments: Namespace) -> Export:
    changes = {key: value or None for key, value in map(_pair, arguments.labels)}
    with _connect(arguments) as pool:
        pool.label(arguments.name, changes)
        return pool.show(arguments.name)


def _ls(arguments: Namespace) -> list[Export]:
    labels = dict(map(_pair, arguments.label))
    with _connect(arguments) as pool:
        return pool.list(labels=labels)


def _limit(text: str) -> str | None:
    return None if text == "none" else text


def _quota(arguments: Namespace) -> Export:
    with _connect(arguments) as pool:
        pool.quota(arguments.name, _limit(arguments.size))
        return pool.show(arguments.name)


def _reserve(arguments: Namespace) -> Export:
    with _connect(arguments) as pool:
        pool.reserve(arguments.name, _limit(arguments.size))
        return pool.show(arguments.name)


def _extend(arguments: Namespace) -> Info:
    with _connect(arguments) as pool:
        before = pool.info().pool.data_total
        pool.extend(arguments.size)
        info = pool.info()
    if info.pool.data_total == before and not _wants_json(arguments):
        print(f"the pool has room for {format_size(before)} of data already: nothing was changed")
    return info


def _events(arguments: Namespace) -> None:
    with _connect(arguments) as pool:
        for event in pool.events():
            if _wants_json(arguments):
                print(json.dumps(event, default=plain))
            else:
                display.show_event(event)
            sys.stdout.flush()


def _scrub_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="what these show; without any, everything")
    parser.add_argument("--rate", metavar="SIZE", help="bytes a second (default: the daemon's [scrub] rate)")


def _scrub(arguments: Namespace) -> list[Finding]:
    """What was found; it has been printed by then."""
    found: list[Finding] = []
    last: Scrubbed | None = None
    with _connect(arguments) as pool, display.Scrubbing(quiet=_wants_json(arguments)) as shown:
        try:
            for last in pool.scrub(*arguments.names, rate=arguments.rate):
                if last.finding is not None:
                    found.append(last.finding)
                if _wants_json(arguments):
                    print(json.dumps(last, default=plain))
                    sys.stdout.flush()
                else:
                    shown.show(last)
        except Unreachable as error:
            raise Unreachable(f"{error}; {_scrub_came(last, found)}") from error
    return found


def _scrub_came(last: Scrubbed | None, found: list[Finding]) -> str:
    if last is None:
        return "how far the scrub had come is not known"
    damaged = f", and found damage (places: {len(found)})" if found else ""
    return f"the scrub had come to {format_size(last.done)} of {format_size(last.total)}{damaged}"


def _scrub_failed(found: list[Finding]) -> str:
    return f"damaged data was found (places: {len(found)})" if found else ""


def _show(arguments: Namespace) -> Export:
    with _connect(arguments) as pool:
        return pool.show(arguments.name)


def _tree(arguments: Namespace) -> list[Node]:
    with _connect(arguments) as pool:
        return pool.tree()


def _info(arguments: Namespace) -> Info:
    with _connect(arguments) as pool:
        return pool.info()


def _diff(arguments: Namespace) -> list[Extent]:
    with _connect(arguments) as pool:
        return pool.diff(arguments.before, arguments.after)


def _check(arguments: Namespace) -> Report:
    from nbdthin.pool.check import check_path

    _look_into(arguments.pool)
    return check_path(arguments.pool, data=arguments.data)


def _show_report(report: Report) -> None:
    if not report.problems:
        print(f"{report.path} is sound: {report.names} names, {report.layers} layers, {report.blocks} blocks in use")
    for problem in report.problems:
        print(printable(problem))
    for note in report.notes:
        print(f"note: {printable(note)}")


def _report_failed(report: Report) -> str:
    return f"{report.path} does not add up (problems: {len(report.problems)})" if report.problems else ""


def _repair(arguments: Namespace) -> Repair | None:
    from nbdthin.pool.repair import release, repair

    _look_into(arguments.pool)
    if arguments.release:
        if arguments.data is not None or arguments.write_header or arguments.dry_run:
            raise Invalid("--release goes alone: it repairs nothing")
        release(arguments.pool)
        return None
    return repair(arguments.pool, data=arguments.data, write_header=arguments.write_header, dry_run=arguments.dry_run)


def _show_repair(done: Repair | None) -> None:
    if done is None:
        return
    if not done.damage:
        print(f"{printable(str(done.path))} is not damaged: nothing was changed")
    for damage in done.damage:
        print(f"damaged: {printable(damage)}")
    for loss in done.lost:
        print(f"lost: {printable(str(loss))}")
    if done.damage and not done.lost:
        print("lost: nothing")
    for note in done.notes:
        print(f"note: {printable(note)}")
    for path in done.kept:
        print(f"kept: {printable(str(path))}")
    if done.lost:
        print("note: blocks that nothing names any more are free now, and taken by what is written next: if there is a")
        print(
            "note: dump, restore it before serving the pool; if not, `nbdthin repair --release` gives their space back"
        )


def _dump(arguments: Namespace) -> dict[str, str] | None:
    from nbdthin.pool.dump import dump
    from nbdthin.pool.files import FILES, write_file

    _look_into(arguments.pool)
    lines = dump(arguments.pool)
    if arguments.output is None:
        with _mendable(arguments.pool):
            sys.stdout.writelines(lines)
        return None
    output = Path(arguments.output)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(output.stat().st_mode):  # it would take the name of whatever is there: a device's, too
            raise Invalid(f"{output} is there and no file (without --output the dump goes to stdout)")
    if output.resolve().is_relative_to(Path(arguments.pool).resolve()):
        raise Invalid(f"{output} is inside the pool: a dump goes elsewhere")
    with _mendable(arguments.pool):
        write_file(FILES, output, (line.encode() for line in lines))
    return {"output": arguments.output}


def _restore(arguments: Namespace) -> dict[str, str | None]:
    from nbdthin.pool.dump import restore

    kept = restore(arguments.file, arguments.pool, data=arguments.data, force=arguments.force)
    return {"restored": arguments.pool, "kept": None if kept is None else str(kept)}


def _show_restored(result: dict[str, str | None]) -> None:
    if result["kept"] is not None:
        print(f"kept: {printable(result['kept'])}")


def _delta(arguments: Namespace) -> list[Extent]:
    from nbdthin.pool.pool import Pool

    with _mendable(arguments.pool), Pool.open(arguments.pool, inspect=True) as pool:
        return pool.delta(arguments.before, arguments.after)


# -- the table


@dataclass(frozen=True, slots=True)
class Verb:
    doc: str
    arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], object]
    show: Callable[..., None] = lambda _: None  # success is quiet
    failed: Callable[..., str] = lambda _: ""  # what is wrong although the verb itself went well
    offline: bool = False  # asks no daemon
    prints_itself: bool = False  # line by line, also as JSON


VERBS: dict[str, Verb] = {
    "init": Verb("make a pool", _init_arguments, _init, display.show_new_pool, offline=True),
    "serve": Verb("serve a pool until SIGTERM or Ctrl-C", _serve_arguments, _serve, offline=True),
    "create": Verb("a new volume that reads as zeroes", _names("NAME", "SIZE"), _create, display.show_uri),
    "snapshot": Verb("keep what a volume holds now", _names("VOLUME", "NAME"), _snapshot, display.show_uri),
    "clone": Verb("a new volume that starts as a snapshot", _clone_arguments, _clone, display.show_uri),
    "rollback": Verb("make a volume what a snapshot is", _names("VOLUME", "SNAPSHOT"), _rollback),
    "rename": Verb("give a volume or snapshot another name", _names("OLD", "NEW"), _rename),
    "rm": Verb("remove volumes and snapshots, all or none", _rm_arguments, _rm),
    "resize": Verb("give a volume another size", _names("NAME", "SIZE"), _resize),
    "label": Verb("set and remove labels", _label_arguments, _label),
    "quota": Verb("what a volume may take of the pool", _limit_arguments, _quota),
    "reserve": Verb("keep space for a volume", _limit_arguments, _reserve),
    "extend": Verb("make the pool larger", _names("SIZE"), _extend),
    "ls": Verb("every volume and snapshot", _ls_arguments, _ls, display.show_exports),
    "show": Verb("one volume or snapshot", _names("NAME"), _show, display.show_export),
    "tree": Verb("what stands on what", _no_arguments, _tree, display.show_tree),
    "info": Verb("the pool, the daemon, the disk", _no_arguments, _info, display.show_info),
    "events": Verb("what happens to the pool, from now on", _no_arguments, _events),
    "scrub": Verb(
        "compare data with its checksums", _scrub_arguments, _scrub, failed=_scrub_failed, prints_itself=True
    ),
    "diff": Verb("where two snapshots differ", _names("BEFORE", "AFTER"), _diff, display.show_extents),
    "check": Verb(
        "does a pool add up? Offline, writes nothing",
        _check_arguments,
        _check,
        _show_report,
        _report_failed,
        offline=True,
    ),
    "repair": Verb("salvage a damaged pool, say what is gone", _repair_arguments, _repair, _show_repair, offline=True),
    "dump": Verb("a pool's metadata as lines of JSON", _dump_arguments, _dump, offline=True),
    "restore": Verb("a pool's metadata from a dump", _restore_arguments, _restore, _show_restored, offline=True),
    "delta": Verb(
        "where two volumes or snapshots differ; offline",
        _names("POOL", "BEFORE", "AFTER"),
        _delta,
        display.show_extents,
        offline=True,
    ),
}


def _parser() -> ArgumentParser:
    # On both levels, so that they may stand before and behind the verb; SUPPRESS keeps one from undoing the other.
    common = ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument(
        "--socket", metavar="PATH", type=_path, help=f"which daemon (default: NBDTHIN_SOCKET, else {DEFAULT_SOCKET})"
    )
    parser = ArgumentParser(
        "nbdthin",
        description="Thin volumes and snapshots, served as network block devices. Sizes are written 10G or 64KiB.",
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nbdthin {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        own = verbs.add_parser(name, help=verb.doc, description=verb.doc, parents=[common], allow_abbrev=False)
        verb.arguments(own)
    return parser


def _wants_json(arguments: Namespace) -> bool:
    return getattr(arguments, "json", False)


def _print_json(value: object) -> None:
    print(json.dumps(value, default=plain, indent=2))


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    finally:
        sys.stdout.flush()  # --help into a pipe that is closed: as for every verb
    verb = VERBS[arguments.verb]
    if verb.offline and hasattr(arguments, "socket"):
        parser.error(f"{arguments.verb} asks no daemon: it takes no --socket")
    result = verb.run(arguments)
    if not _wants_json(arguments):
        verb.show(result)
    elif result is not None and not verb.prints_itself:
        _print_json(result)
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

"""Verbs for those who run a pool: to make and to serve it, and what works on one that nobody serves."""

from __future__ import annotations

import contextlib
import logging
import shlex
import stat
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nbdthin import display
from nbdthin.cli.verb import Verb, names, offset, path_argument, print_json, wants_json
from nbdthin.control.codec import printable
from nbdthin.errors import Corrupt, Error, Invalid
from nbdthin.pool.rows import Extent, PoolInfo
from nbdthin.pool.views import Place
from nbdthin.units import format_size

if TYPE_CHECKING:
    from nbdthin.control.commands import Daemon
    from nbdthin.pool.check import Report
    from nbdthin.pool.repair import Repair

DEFAULT_CONFIG = "exports.toml"


def _init_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pool", metavar="POOL", type=path_argument, help="a directory that does not exist or is empty")
    parser.add_argument("--size", help="a limit, not an allocation (default: 100G, or all of a block device)")
    parser.add_argument("--block-size", default="64K", metavar="SIZE", help="16K to 1M, for good (default: 64K)")
    parser.add_argument(
        "--data", metavar="FILE_OR_DEVICE", type=path_argument, help="where the data goes (default: POOL/data)"
    )
    parser.add_argument("--force", action="store_true", help="use FILE_OR_DEVICE even if it holds something")


def _serve_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", default=DEFAULT_CONFIG, metavar="FILE", type=path_argument, help=f"default: {DEFAULT_CONFIG}"
    )
    parser.add_argument("--verbose", action="store_true", help="log connections too")


def _check_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pool", metavar="POOL", type=path_argument)
    parser.add_argument(
        "--data", metavar="FILE_OR_DEVICE", type=path_argument, help="where the data is, if the superblock cannot say"
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
    parser.add_argument("pool", metavar="POOL", type=path_argument)
    parser.add_argument(
        "--output", metavar="FILE", type=path_argument, help="instead of stdout; takes its name when it is whole"
    )


def _restore_arguments(parser: ArgumentParser) -> None:
    names("FILE", "POOL")(parser)
    parser.add_argument(
        "--data", metavar="FILE_OR_DEVICE", type=path_argument, help="where the data is (default: where POOL has it)"
    )
    parser.add_argument("--force", action="store_true", help="even if POOL is sound, or its data's header is not")


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
        if wants_json(arguments):
            listen = [str(address) for address in running.listen]
            print_json({"pool": wanted.pool.path, "listen": listen, "control": running.control})
            sys.stdout.flush()

    with _mendable(wanted.pool.path):
        daemon.serve(wanted, ready)


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


def _whose_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pool", metavar="POOL", type=path_argument)
    parser.add_argument("position", metavar="POSITION", help="bytes, 2M, or 0x44f: in the data file or device")
    parser.add_argument("--length", default="1", metavar="SIZE", help="of the place (default: a byte)")


def _whose(arguments: Namespace) -> list[Place]:
    from nbdthin.pool.pool import Pool

    with _mendable(arguments.pool), Pool.open(arguments.pool, inspect=True) as pool:
        return pool.owners(offset(arguments.position), arguments.length)


def _show_places(places: list[Place]) -> None:
    for place in places:
        shown = ", ".join(map(printable, place.shown_by)) or "nobody"
        print(
            f"{place.position}: {format_size(place.data)} of {printable(place.owner or 'a layer without a name')}"
            f" ({place.layer}) at {place.offset}, shown by {shown}"
        )
    if not places:
        print("nobody's")


VERBS: dict[str, Verb] = {
    "init": Verb("make a pool", _init_arguments, _init, display.show_new_pool, offline=True),
    "serve": Verb("serve a pool until SIGTERM or Ctrl-C", _serve_arguments, _serve, offline=True),
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
        names("POOL", "BEFORE", "AFTER"),
        _delta,
        display.show_extents,
        offline=True,
    ),
    "whose": Verb(
        "who has something at a place in the data; offline", _whose_arguments, _whose, _show_places, offline=True
    ),
}

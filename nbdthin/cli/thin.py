"""The verb that brings a dm-thin pool over."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdthin.cli.moving import bar
from nbdthin.cli.verb import Verb, connect, path_argument
from nbdthin.errors import Invalid
from nbdthin.units import format_size, parse_size

if TYPE_CHECKING:
    from nbdthin.moving.thin import Totals, Volume


@dataclass(frozen=True, slots=True)
class _Result:
    volumes: Sequence[Volume]
    totals: Totals
    dry_run: bool


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--metadata", required=True, metavar="XML", type=path_argument, help="what thin_dump wrote; -: stdin"
    )
    parser.add_argument(
        "--data", required=True, metavar="DEVICE", type=path_argument, help="the pool's data device, or a copy of it"
    )
    parser.add_argument(
        "--name", action="append", default=[], metavar="ID=NAME", help="what a device is to be called; may be repeated"
    )
    parser.add_argument(
        "--size", action="append", default=[], metavar="ID=SIZE", help="how large a device is; may be repeated"
    )
    parser.add_argument(
        "--docker", metavar="DIR", type=path_argument, help="names and sizes from Docker's devicemapper/metadata"
    )
    parser.add_argument("--prefix", default="thin/", help="of all names but those from --name (default: thin/)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done; asks no daemon")


def _by_device(option: str, texts: Sequence[str]) -> Mapping[int, str]:
    result = {}
    for text in texts:
        number, equals, value = text.partition("=")
        if not (number.isascii() and number.isdigit() and len(number) <= 8 and equals and value):
            raise Invalid(f"not a device and what is said of it: {option} {text!r} (write {option} 3=WHAT)")
        if int(number) in result:
            raise Invalid(f"{option} is there twice for device {int(number)}")
        result[int(number)] = value
    return result


def _import_thin(arguments: Namespace) -> _Result:
    from nbdthin.moving import thin

    names = _by_device("--name", arguments.name)
    sizes = {number: parse_size(text) for number, text in _by_device("--size", arguments.size).items()}
    with thin.survey(
        arguments.metadata,
        arguments.data,
        names=names,
        sizes=sizes,
        prefix=arguments.prefix,
        docker=arguments.docker,
    ) as found:
        if found.volumes and not arguments.dry_run:
            with connect(arguments) as pool, bar("import", arguments) as progress:
                found.bring(pool, progress)
        return _Result(found.volumes, found.totals, arguments.dry_run)


def _show(result: _Result) -> None:
    for volume in result.volumes:
        size, mapped = format_size(volume.size), format_size(volume.mapped)
        print(f"{volume.name}: device {volume.device}, {size}, {mapped} of it mapped")
    totals = result.totals
    mapped, distinct, stored = format_size(totals.mapped), format_size(totals.distinct), format_size(totals.stored)
    verb = "to write" if result.dry_run else "written"
    again = f", {format_size(totals.unshared)} of it more than once" if totals.unshared else ""
    print(f"{len(result.volumes)} devices map {mapped}, which is {distinct} of data; {verb}: {stored}{again}")


VERBS: dict[str, Verb] = {
    "import-thin": Verb("bring over all devices of a dm-thin pool", _arguments, _import_thin, _show)
}

"""Verbs for a closer look: the way of one byte, where a volume's data lies, what removing names would free."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from nbdthin import display
from nbdthin.cli.verb import Verb, connect, names, offset, path_argument, wants_json
from nbdthin.pool.views import MOST_CELLS, DiskUse, Explanation, Map


def _explain_arguments(parser: ArgumentParser) -> None:
    names("NAME", "OFFSET")(parser)
    parser.add_argument("--length", metavar="SIZE", help="of the write (default: the whole subblock)")


def _map_arguments(parser: ArgumentParser) -> None:
    names("NAME")(parser)
    parser.add_argument("--svg", metavar="FILE", type=path_argument, help="write the picture there")


def _du_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="without any, everything")


def _explain(arguments: Namespace) -> Explanation:
    with connect(arguments) as pool:
        return pool.explain(arguments.name, offset(arguments.offset), arguments.length)


def _map(arguments: Namespace) -> Map:
    from nbdthin import drawing

    whole = wants_json(arguments) or arguments.svg is not None
    with connect(arguments) as pool:
        shown = pool.map(arguments.name, MOST_CELLS if whole else drawing.map_cells())
    if arguments.svg is not None:
        Path(arguments.svg).write_text(drawing.svg(shown), encoding="utf-8")
    return shown


def _du(arguments: Namespace) -> DiskUse:
    with connect(arguments) as pool:
        return pool.du(*arguments.names)


def _show_explanation(seen: Explanation) -> None:
    from nbdthin import drawing

    drawing.show_explanation(seen)


def _show_map(shown: Map) -> None:
    from nbdthin import drawing

    drawing.show_map(shown)


VERBS: dict[str, Verb] = {
    "explain": Verb("the way of one read or write", _explain_arguments, _explain, _show_explanation),
    "map": Verb("where a volume's data comes from", _map_arguments, _map, _show_map),
    "du": Verb("what names take, and what removing them frees", _du_arguments, _du, display.show_disk_use),
}

"""Verbs for volumes and snapshots: to make, to change and to look at them. All ask a daemon."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields

from nbdthin import display
from nbdthin.cli.verb import Verb, connect, names, no_arguments, wants_json
from nbdthin.control.codec import plain
from nbdthin.control.rows import Detail, Export, Info, Node
from nbdthin.errors import Invalid, Unreachable
from nbdthin.pool.rows import Extent, Finding, Scrubbed
from nbdthin.units import format_size


def _clone_arguments(parser: ArgumentParser) -> None:
    names("SNAPSHOT", "NAME")(parser)
    parser.add_argument("--size", help="larger than the snapshot's")


def _rm_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME")
    users = parser.add_mutually_exclusive_group()
    users.add_argument("--force", action="store_true", help="disconnect who uses them")
    users.add_argument("--deferred", action="store_true", help="what is in use is gone now, and freed later")
    parser.add_argument("--if-exists", action="store_true", help="what is not there is no error")


def _label_arguments(parser: ArgumentParser) -> None:
    names("NAME")(parser)
    parser.add_argument("labels", nargs="+", metavar="KEY=VALUE", help="an empty VALUE removes KEY")


def _limit_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("size", metavar="SIZE|none")


def _ls_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE", help="only what has it; may be repeated"
    )
    parser.add_argument("--deferred", action="store_true", help="instead, what was removed and is still in use")


def _scrub_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="what these show; without any, everything")
    parser.add_argument("--rate", metavar="SIZE", help="bytes a second (default: the daemon's [scrub] rate)")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise Invalid(f"not a label: {text!r} (write KEY=VALUE)")
    return key, value


def _create(arguments: Namespace) -> Export:
    with connect(arguments) as pool:
        pool.create(arguments.name, arguments.size)
        return pool.show(arguments.name)


def _snapshot(arguments: Namespace) -> Export:
    with connect(arguments) as pool:
        pool.snapshot(arguments.volume, arguments.name)
        return pool.show(arguments.name)


def _clone(arguments: Namespace) -> Export:
    with connect(arguments) as pool:
        pool.clone(arguments.snapshot, arguments.name, size=arguments.size)
        return pool.show(arguments.name)


def _rollback(arguments: Namespace) -> Export:
    with connect(arguments) as pool:
        pool.rollback(arguments.volume, arguments.snapshot)
        return pool.show(arguments.volume)


def _rename(arguments: Namespace) -> Export:
    with connect(arguments) as pool:
        pool.rename(arguments.old, arguments.new)
        return pool.show(arguments.new)


def _rm(arguments: Namespace) -> dict[str, list[str]]:
    with connect(arguments) as pool:
        pool.remove(*arguments.names, force=arguments.force, deferred=arguments.deferred, if_exists=arguments.if_exists)
    return {"removed": arguments.names}


def _resize(arguments: Namespace) -> Export:
    with connect(arguments) as pool:
        pool.resize(arguments.name, arguments.size)
        resized = pool.show(arguments.name)
    if resized.uri is not None and os.geteuid() == 0:
        from nbdthin import devices

        devices.grow(resized.uri)
    return resized


def _label(arguments: Namespace) -> Export:
    changes = {key: value or None for key, value in map(_pair, arguments.labels)}
    with connect(arguments) as pool:
        pool.label(arguments.name, changes)
        return pool.show(arguments.name)


def _ls(arguments: Namespace) -> list[Export]:
    labels = dict(map(_pair, arguments.label))
    with connect(arguments) as pool:
        return pool.list(labels=labels, deferred=arguments.deferred)


def _limit(text: str) -> str | None:
    return None if text == "none" else text


def _quota(arguments: Namespace) -> Export:
    with connect(arguments) as pool:
        pool.quota(arguments.name, _limit(arguments.size))
        return pool.show(arguments.name)


def _reserve(arguments: Namespace) -> Export:
    with connect(arguments) as pool:
        pool.reserve(arguments.name, _limit(arguments.size))
        return pool.show(arguments.name)


def _extend(arguments: Namespace) -> Info:
    with connect(arguments) as pool:
        before = pool.info().pool.data_total
        pool.extend(arguments.size)
        info = pool.info()
    if info.pool.data_total == before and not wants_json(arguments):
        print(f"the pool has room for {format_size(before)} of data already: nothing was changed")
    return info


def _events(arguments: Namespace) -> None:
    with connect(arguments) as pool:
        for event in pool.events():
            if wants_json(arguments):
                print(json.dumps(event, default=plain))
            else:
                display.show_event(event)
            sys.stdout.flush()


def _scrub(arguments: Namespace) -> list[Finding]:
    """What was found; it has been printed by then."""
    found: list[Finding] = []
    last: Scrubbed | None = None
    with connect(arguments) as pool, display.Scrubbing(quiet=wants_json(arguments)) as shown:
        try:
            for last in pool.scrub(*arguments.names, rate=arguments.rate):
                if last.finding is not None:
                    found.append(last.finding)
                if wants_json(arguments):
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


def _show(arguments: Namespace) -> Detail:
    with connect(arguments) as pool:
        export, shown = pool.show(arguments.name), pool.map(arguments.name, 1)
    known = {field.name: getattr(export, field.name) for field in fields(export)}
    return Detail(**known, mapped=shown.data, highest=shown.highest, runs=shown.runs)


def _tree(arguments: Namespace) -> list[Node]:
    with connect(arguments) as pool:
        return pool.tree()


def _info(arguments: Namespace) -> Info:
    with connect(arguments) as pool:
        return pool.info()


def _diff(arguments: Namespace) -> list[Extent]:
    with connect(arguments) as pool:
        return pool.diff(arguments.before, arguments.after)


VERBS: dict[str, Verb] = {
    "create": Verb("a new volume that reads as zeroes", names("NAME", "SIZE"), _create, display.show_uri),
    "snapshot": Verb("keep what a volume holds now", names("VOLUME", "NAME"), _snapshot, display.show_uri),
    "clone": Verb("a new volume that starts as a snapshot", _clone_arguments, _clone, display.show_uri),
    "rollback": Verb("make a volume what a snapshot is", names("VOLUME", "SNAPSHOT"), _rollback),
    "rename": Verb("give a volume or snapshot another name", names("OLD", "NEW"), _rename),
    "rm": Verb("remove volumes and snapshots, all or none", _rm_arguments, _rm),
    "resize": Verb("give a volume another size", names("NAME", "SIZE"), _resize),
    "label": Verb("set and remove labels", _label_arguments, _label),
    "quota": Verb("what a volume may take of the pool", _limit_arguments, _quota),
    "reserve": Verb("keep space for a volume", _limit_arguments, _reserve),
    "extend": Verb("make the pool larger", names("SIZE"), _extend),
    "ls": Verb("every volume and snapshot", _ls_arguments, _ls, display.show_exports),
    "show": Verb("one volume or snapshot", names("NAME"), _show, display.show_detail),
    "tree": Verb("what stands on what", no_arguments, _tree, display.show_tree),
    "info": Verb("the pool, the daemon, the disk", no_arguments, _info, display.show_info),
    "events": Verb("what happens to the pool, from now on", no_arguments, _events),
    "scrub": Verb(
        "compare data with its checksums", _scrub_arguments, _scrub, failed=_scrub_failed, prints_itself=True
    ),
    "diff": Verb("where two snapshots differ", names("BEFORE", "AFTER"), _diff, display.show_extents),
}

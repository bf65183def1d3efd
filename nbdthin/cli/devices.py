"""Verbs that make volumes block devices of this machine, and mount them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nbdthin import display
from nbdthin.cli.verb import Verb, connect, mount_options, names, no_arguments, path_argument
from nbdthin.control.codec import printable
from nbdthin.errors import Invalid, Unreachable

if TYPE_CHECKING:
    from nbdthin.devices import Device
    from nbdthin.devices.doctor import Diagnosis


def _attach_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME_OR_URI", nargs="?")
    parser.add_argument("--read-only", action="store_true", help="it cannot be written")
    parser.add_argument("--connections", type=int, metavar="N", help="to the server")
    parser.add_argument("--cleanup", action="store_true", help="undo what tools that died have left")


def _mount_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME_OR_URI")
    parser.add_argument("directory", metavar="DIR", type=path_argument)
    parser.add_argument("--read-only", action="store_true", help="it cannot be written")
    mount_options(parser)


def _attach(arguments: Namespace) -> Device | dict[str, list[str]]:
    from nbdthin import devices

    if arguments.cleanup:
        if arguments.name is not None:
            raise Invalid("attach --cleanup takes no name: it looks at everything")
        return {"undone": devices.cleanup()}
    if arguments.name is None:
        raise Invalid("attach what? (nbdthin attach NAME; nbdthin attach --cleanup)")
    if "://" in arguments.name:
        return devices.attach_uri(arguments.name, read_only=arguments.read_only, connections=arguments.connections)
    with connect(arguments) as pool:
        return devices.attach(pool, arguments.name, read_only=arguments.read_only, connections=arguments.connections)


def _show_attached(result: Device | dict[str, list[str]]) -> None:
    if isinstance(result, dict):
        for name in result["undone"]:
            print(f"undone: {printable(name)}")
    else:
        print(result.path)


def _detach(arguments: Namespace) -> dict[str, str]:
    from nbdthin import devices

    devices.detach(arguments.name_or_path)
    return {"detached": arguments.name_or_path}


def _mount(arguments: Namespace) -> Device:
    from nbdthin import devices

    directory = Path(arguments.directory)
    options = [option for text in arguments.options for option in text.split(",") if option]
    if "://" in arguments.name:
        return devices.mount_uri(arguments.name, directory, read_only=arguments.read_only, options=options)
    with connect(arguments) as pool:
        return devices.mount(pool, arguments.name, directory, read_only=arguments.read_only, options=options)


def _umount(arguments: Namespace) -> dict[str, str]:
    from nbdthin import devices

    devices.unmount(arguments.dir_or_name)
    return {"unmounted": arguments.dir_or_name}


def _devices(_: Namespace) -> list[Device]:
    from nbdthin import devices

    return devices.attached()


def _doctor(arguments: Namespace) -> Diagnosis:
    from nbdthin.devices import doctor

    try:
        with connect(arguments) as pool:
            data = pool.info().pool.data_path
    except Unreachable:
        data = None
    return doctor.diagnose(data)


def _show_diagnosis(diagnosis: Diagnosis) -> None:
    for fact in diagnosis.facts:
        advice = f" -> {fact.advice}" if fact.advice else ""
        print(f"{'ok' if fact.good else 'NO':3} {fact.subject + ':':15} {printable(fact.found)}{advice}")
    if diagnosis.way is not None:
        print(f"attach uses {WAYS[diagnosis.way]}")


def _diagnosis_failed(diagnosis: Diagnosis) -> str:
    return "" if diagnosis.way else "nothing can be attached here: what says NO above is in the way"


def _show_devices(found: Sequence[Device]) -> None:
    rows = [
        (
            printable(device.name),
            str(device.path),
            device.way,
            "read only" if device.read_only else "read, write",
            printable(str(device.directory or "-")),
        )
        for device in found
    ]
    display.show_table(("NAME", "PATH", "WAY", "ACCESS", "MOUNTED ON"), rows)


WAYS = {"nbd": "the kernel's nbd driver", "loop": "nbdfuse and a loop device"}

VERBS: dict[str, Verb] = {
    "attach": Verb("make a volume or snapshot a block device here", _attach_arguments, _attach, _show_attached),
    "detach": Verb("undo attach", names("NAME_OR_PATH"), _detach, offline=True),
    "mount": Verb("attach and mount the file system in it", _mount_arguments, _mount),
    "umount": Verb("undo mount", names("DIR_OR_NAME"), _umount, offline=True),
    "devices": Verb("what is attached here", no_arguments, _devices, _show_devices, offline=True),
    "doctor": Verb("how attach works here, what is lacking", no_arguments, _doctor, _show_diagnosis, _diagnosis_failed),
}

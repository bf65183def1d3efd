"""Volumes and snapshots as block devices of this machine, and mounted.

    with nbdthin.connect("var/control.sock") as pool:
        device = devices.attach(pool, "web")              # device.path is /dev/nbd0, or /dev/loop0
        devices.detach("web")
        with devices.mounted(pool, "web@before", read_only=True) as directory: ...

There are two ways: the kernel's own nbd driver, told over netlink (kernel.py), and where the kernel has none, nbdfuse
and a loop device (fuse.py, loop.py). What is attached outlives this process. Whatever is half made because a tool died,
and whatever stands on a process that died, `cleanup` undoes; state.py says how it is found. All of it needs root.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlsplit

from nbdthin.devices import fuse, kernel, loop, mounts, state, watch
from nbdthin.devices.state import Attachment, Phase, Way
from nbdthin.errors import Error, InUse, Invalid, NotFound

if TYPE_CHECKING:
    from nbdthin.control.client import Client

__all__ = [
    "Device",
    "attach",
    "attach_uri",
    "attached",
    "cleanup",
    "detach",
    "grow",
    "mount",
    "mount_uri",
    "mounted",
    "unmount",
]

MOST_CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class Device:
    name: str  # of the volume or snapshot
    path: Path
    way: Way
    read_only: bool
    uri: str = ""  # where its data comes from
    directory: Path | None = None  # where `mount` mounted it


def attach(client: Client, name: str, *, read_only: bool = False, connections: int | None = None) -> Device:
    """Make volume or snapshot `name` a block device. Raises NotFound, InUse where it is one already, or Error.

    `connections` to the server: None is what is good; one where the server allows no more.
    """
    uri, lasting, fixed = _where(client, name)
    with _attaching(uri, name, read_only or fixed, connections, lasting) as attachment:
        return _device(attachment.save(phase=Phase.ATTACHED))


def attach_uri(uri: str, *, read_only: bool = False, connections: int | None = None) -> Device:
    """As `attach`, of what any NBD server has at `uri`."""
    with _attaching(_absolute(uri), _name_in(uri), read_only, connections) as attachment:
        return _device(attachment.save(phase=Phase.ATTACHED))


def detach(name_or_path: str | Path) -> None:
    """Undo `attach`. What was written has reached the server when this returns, durably. Raises NotFound or InUse."""
    with _held(str(name_or_path), "attached") as attachment:
        _detach(attachment)


def attached() -> list[Device]:
    """What is attached on this machine, by name."""
    return [_device(each) for each in state.load_all() if each.phase.stays]


def mount(
    client: Client, name: str, directory: Path, *, read_only: bool = False, options: Sequence[str] = ()
) -> Device:
    """Attach `name` and mount its file system; a snapshot's can only be read. Raises as `attach`, Invalid or Error.

    xfs gets `nouuid`; where nothing can be written, no journal is replayed (ext4 `noload`, xfs `norecovery`).
    """
    uri, lasting, fixed = _where(client, name)
    with _attaching(uri, name, read_only or fixed, None, lasting) as attachment:
        return _device(_mount(attachment, directory.resolve(), options).save(phase=Phase.MOUNTED))


def mount_uri(uri: str, directory: Path, *, read_only: bool = False, options: Sequence[str] = ()) -> Device:
    """As `mount`, of what any NBD server has at `uri`; a snapshot must be said to be `read_only`."""
    with _attaching(_absolute(uri), _name_in(uri), read_only, None) as attachment:
        return _device(_mount(attachment, directory.resolve(), options).save(phase=Phase.MOUNTED))


def grow(uri: str) -> None:
    """Have the devices of an export be as large as it is now, where they can: the kernel's, not loop devices.

    The watcher sees to it too, within seconds.
    """
    for attachment in state.load_all():
        if attachment.uri == uri and attachment.way == "nbd" and attachment.phase.stays:
            with contextlib.suppress(Error, OSError):  # the watcher will try again
                kernel.grow(attachment)


def unmount(directory_or_name: str | Path) -> None:
    """Undo `mount`. What was written has reached the server when this returns, durably. Raises NotFound or InUse."""
    with _held(str(directory_or_name), "mounted") as attachment:
        _unmount(attachment)


@contextlib.contextmanager
def mounted(client: Client, name: str, *, read_only: bool = False, options: Sequence[str] = ()) -> Iterator[Path]:
    """`mount` on a directory of its own, undone at the end of the block; InUse then if something is left in it.

    Not listed by `attached`, and `cleanup`'s to undo when this process dies.
    """
    uri, lasting, fixed = _where(client, name)
    with _attaching(uri, name, read_only or fixed, None, lasting) as attachment:
        attachment.root.mkdir()
        attachment = _mount(attachment, attachment.root, options)
        try:
            yield attachment.root
        finally:
            _unmount(attachment)


def cleanup() -> list[str]:
    """Undo what tools that died have left, and devices whose server is gone for good. Returns the names.

    Raises Error, when all others are done, for one that cannot be undone.
    """
    names, problems = [], []
    for found in state.load_all():
        with state.held(found.id, wait=False) as attachment:
            if attachment is not None and not (attachment.phase.stays and _alive(attachment)):
                try:
                    _undo(attachment, dead=attachment.phase.stays)
                    names.append(attachment.name)
                except Error as error:
                    problems.append(str(error))
    if state.run_directory().exists():
        state.forget_empty()
    if watch.watched():
        watch.ensure()
    if problems:
        raise Error("; ".join(problems))
    return names


# -- looking things up


def _where(client: Client, name: str) -> tuple[str, str, bool]:
    """The URI of `name`, the lasting one, and whether it can only be read."""
    export = client.show(name)
    if export.uri is None:
        raise Error(f"the daemon listens nowhere: {name!r} cannot be attached (see [server] listen in exports.toml)")
    return export.uri, export.lasting_uri or "", export.read_only


def _name_in(uri: str) -> str:
    """The export's name; of a server's nameless one, all of the URI."""
    return unquote(urlsplit(uri).path.removeprefix("/")) or uri


def _absolute(uri: str) -> str:
    """It is used by processes that work elsewhere."""
    path, *_ = parse_qs(urlsplit(uri).query).get("socket", ["/"])
    return uri if path.startswith("/") else f"{uri.partition('?')[0]}?socket={quote(os.path.abspath(path))}"


@contextlib.contextmanager
def _held(wanted: str, what: str) -> Iterator[Attachment]:
    """The attachment that `wanted` names: by its name, its device, or the directory it is mounted on."""
    place = str(Path(wanted).resolve())
    everything = [each for each in state.load_all() if each.phase.stays]
    found = [each for each in everything if place in (each.device, each.directory)]
    found = found or [each for each in everything if each.name == wanted]
    if len(found) > 1:
        places = ", ".join(each.directory or each.device for each in found)
        raise Invalid(f"{wanted!r} is {what} more than once, say which: {places}")
    if found:
        with state.held(found[0].id) as attachment:
            if attachment is not None:
                yield attachment
                return
    raise NotFound(f"{wanted!r} is not {what} (`nbdthin devices` lists what is)")


def _device(attachment: Attachment) -> Device:
    return Device(
        attachment.name,
        Path(attachment.device),
        attachment.way,
        attachment.read_only,
        attachment.uri,
        Path(attachment.directory) if attachment.directory else None,
    )


# -- doing and undoing


@contextlib.contextmanager
def _attaching(
    uri: str, name: str, read_only: bool, connections: int | None, lasting_uri: str = ""
) -> Iterator[Attachment]:
    """With a device; undone if the block raises."""
    _need_root()
    if connections is not None and not 1 <= connections <= MOST_CONNECTIONS:
        raise Invalid(f"a device has 1 to {MOST_CONNECTIONS} connections, not {connections}")
    way: Way = "nbd" if kernel.available() else "loop"
    with state.begun(name, uri, way, read_only, connections, lasting_uri) as attachment:
        try:
            attachment = _make_device(attachment)
            if way == "nbd":
                watch.ensure()
            yield attachment
        except BaseException:
            if (left := state.load(attachment.id)) is not None:
                _undo(left)
            raise


def _make_device(attachment: Attachment) -> Attachment:
    if attachment.way == "nbd":
        return kernel.attach(attachment)
    fuse.start(attachment)
    return attachment.save(device=str(loop.attach(attachment.disk, read_only=attachment.read_only)))


def _need_root() -> None:
    if os.geteuid() != 0:
        raise Error("only root can attach devices and mount; without it: nbdfuse FILE URI, or qemu's nbd client")


def _mount(attachment: Attachment, directory: Path, options: Sequence[str]) -> Attachment:
    attachment = attachment.save(phase=Phase.MOUNTING, directory=str(directory))
    mounts.mount(Path(attachment.device), directory, read_only=attachment.read_only, options=options)
    return attachment


def _unmount(attachment: Attachment) -> None:
    directory = Path(attachment.directory)
    for device in _find_devices(attachment):
        if directory in mounts.mounted_at(device):
            mounts.unmount(directory)
    _detach(attachment)


def _detach(attachment: Attachment) -> None:
    lost = _flush(attachment) if _find_devices(attachment) else None
    _undo(attachment)
    if lost is not None:
        what = f"{attachment.name!r} is detached, but what was written to it last is lost"
        raise Error(f"{what}: the server did not take it ({lost.strerror})") from lost


def _flush(attachment: Attachment) -> OSError | None:
    """Have everything that was written in the server, durably, while nobody has it mounted, in another mount namespace
    neither: opened exclusively, a device tells. Returns why the server has not got it. Raises InUse.
    """
    try:
        device = os.open(attachment.device, os.O_RDONLY | os.O_EXCL)
    except OSError as error:
        if error.errno != errno.EBUSY:  # it has died
            return error
        places = ", ".join(map(str, mounts.mounted_at(Path(attachment.device))))
        why = f"is mounted on {places} (umount it first)" if places else "is in use, maybe in another mount namespace"
        raise InUse(f"{attachment.name!r}, {attachment.device}, {why}") from error
    try:
        os.fsync(device)
    except OSError as error:
        return error
    finally:
        os.close(device)
    return None


def _alive(attachment: Attachment) -> bool:
    """Its device answers, and is what it was attached for."""
    found = _find_devices(attachment)
    if attachment.phase is Phase.MOUNTED and not any(map(mounts.mounted_at, found)):
        return False
    if attachment.way == "nbd" or not found:
        return bool(found)
    # nbdfuse learns that its server is gone when it asks for something.
    return any(fuse.find(attachment.disk)) and all(map(loop.answers, found))


def _find_devices(attachment: Attachment) -> list[Path]:
    """What the kernel has of it, whatever its state says."""
    return list(kernel.find(attachment.id) if attachment.way == "nbd" else loop.find(attachment.disk))


def _undo(attachment: Attachment, *, dead: bool = False) -> None:
    """Take away whatever there is of it, from any point of its making or undoing on; its server may be `dead`.

    Raises InUse.
    """
    attachment = attachment.save(phase=Phase.DETACHING)
    dead = attachment.way == "loop" and (dead or not any(fuse.find(attachment.disk)))
    for device in _find_devices(attachment):
        for directory in mounts.mounted_at(device):
            mounts.unmount(directory, lazily=dead)
        (kernel if attachment.way == "nbd" else loop).detach(device)
    if attachment.way == "loop":
        fuse.stop(attachment.disk)
    state.forget(attachment)

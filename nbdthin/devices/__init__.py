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
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from nbdthin.devices import fuse, loop, mounts, state
from nbdthin.devices.state import Attachment, Phase, Way
from nbdthin.errors import Error, InUse, Invalid, NotFound

if TYPE_CHECKING:
    from nbdthin.control.client import Client

__all__ = ["Device", "attach", "attach_uri", "attached", "cleanup", "detach", "mount", "mounted", "name_in", "unmount"]


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

    `connections` to the server are at most as many as there are processors that use them; None: what is good.
    """
    uri, fixed = _where(client, name)
    return attach_uri(uri, name, read_only=read_only or fixed, connections=connections)


def attach_uri(uri: str, name: str, *, read_only: bool = False, connections: int | None = None) -> Device:
    """As `attach`, of what any NBD server has at `uri`; `name` is what it will be called here."""
    with _attaching(uri, name, read_only, connections) as attachment:
        return _device(attachment.save(phase=Phase.ATTACHED))


def name_in(uri: str) -> str:
    """The export's name in a URI of the NBD project."""
    return unquote(urlsplit(uri).path.removeprefix("/"))


def detach(name_or_path: str | Path) -> None:
    """Undo `attach`. What was written has reached the server when this returns, durably. Raises NotFound or InUse."""
    with _held(str(name_or_path), "attached") as attachment:
        if attachment.phase.stays:
            _refuse_used(attachment)
        _undo(attachment)


def attached() -> list[Device]:
    """What is attached on this machine, by name."""
    return [_device(each) for each in state.load_all() if each.phase.stays]


def mount(
    client: Client, name: str, directory: Path, *, read_only: bool = False, options: Sequence[str] = ()
) -> Device:
    """Attach `name` and mount its file system; a snapshot's can only be read. Raises as `attach`, Invalid or Error.

    xfs gets `nouuid`; where nothing can be written, no journal is replayed (ext4 `noload`, xfs `norecovery`).
    """
    uri, fixed = _where(client, name)
    with _attaching(uri, name, read_only or fixed, None) as attachment:
        return _device(_mount(attachment, directory.resolve(), options).save(phase=Phase.MOUNTED))


def unmount(directory_or_name: str | Path) -> None:
    """Undo `mount`. What was written has reached the server when this returns, durably. Raises NotFound or InUse."""
    with _held(str(directory_or_name), "mounted") as attachment:
        _unmount(attachment)


@contextlib.contextmanager
def mounted(client: Client, name: str, *, read_only: bool = False, options: Sequence[str] = ()) -> Iterator[Path]:
    """`mount` on a directory of its own, undone at the end of the block; InUse then if something is left in it.

    Not listed by `attached`, and `cleanup`'s to undo when this process dies.
    """
    uri, fixed = _where(client, name)
    with _attaching(uri, name, read_only or fixed, None) as attachment:
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
                    _undo(attachment)
                    names.append(attachment.name)
                except Error as error:
                    problems.append(str(error))
    if state.run_directory().exists():
        state.forget_empty()
    if problems:
        raise Error("; ".join(problems))
    return names


# -- looking things up


def _where(client: Client, name: str) -> tuple[str, bool]:
    """The URI of `name`, and whether it can only be read."""
    export = client.show(name)
    if export.uri is None:
        raise Error(f"the daemon listens nowhere: {name!r} cannot be attached (see [server] listen in exports.toml)")
    return export.uri, export.read_only


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
def _attaching(uri: str, name: str, read_only: bool, connections: int | None) -> Iterator[Attachment]:
    """With a device; undone if the block raises."""
    _need_root()
    with state.begun(name, uri, "loop", read_only, connections) as attachment:
        try:
            fuse.start(uri, attachment.disk, attachment.home / "log", read_only=read_only, connections=connections)
            device = loop.attach(attachment.disk, read_only=read_only)
            yield attachment.save(device=str(device))
        except BaseException:
            if (left := state.load(attachment.id)) is not None:
                _undo(left)
            raise


def _need_root() -> None:
    if os.geteuid() != 0:
        raise Error("only root can attach devices and mount; without it: nbdfuse FILE URI, or qemu's nbd client")


def _mount(attachment: Attachment, directory: Path, options: Sequence[str]) -> Attachment:
    attachment = attachment.save(phase=Phase.MOUNTING, directory=str(directory))
    mounts.mount(Path(attachment.device), directory, read_only=attachment.read_only, options=options)
    return attachment


def _unmount(attachment: Attachment) -> None:
    if attachment.directory and Path(attachment.directory) in mounts.mounted_at(Path(attachment.device)):
        mounts.unmount(Path(attachment.directory))
    _refuse_used(attachment)
    _undo(attachment)


def _refuse_used(attachment: Attachment) -> None:
    """Nobody may have it mounted, in another mount namespace neither: opened exclusively, the device tells. Then all
    that was written to it goes to the server, durably.
    """
    try:
        device = os.open(attachment.device, os.O_RDONLY | os.O_EXCL)
    except OSError as error:
        places = ", ".join(map(str, mounts.mounted_at(Path(attachment.device))))
        why = f"is mounted on {places} (umount it first)" if places else f"is in use: {error.strerror}"
        raise InUse(f"{attachment.name!r}, {attachment.device}, {why}") from error
    try:
        os.fsync(device)
    finally:
        os.close(device)


def _alive(attachment: Attachment) -> bool:
    """Its device answers, and is what it was attached for."""
    if attachment.phase is Phase.MOUNTED and not mounts.mounted_at(Path(attachment.device)):
        return False
    return any(fuse.find(attachment.disk)) and Path(attachment.device) in loop.find(attachment.disk)


def _undo(attachment: Attachment) -> None:
    """Take away whatever there is of it, from any point of its making or undoing on."""
    attachment = attachment.save(phase=Phase.DETACHING)
    for device in loop.find(attachment.disk):
        for directory in mounts.mounted_at(device):
            mounts.unmount(directory, lazily=not any(fuse.find(attachment.disk)))
        loop.detach(device)
    fuse.stop(attachment.disk)
    state.forget(attachment)

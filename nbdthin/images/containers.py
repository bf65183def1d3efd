"""Containers: volumes that are clones of an image, and their file systems mounted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from nbdthin import devices
from nbdthin.control.client import Client
from nbdthin.control.rows import Export
from nbdthin.devices import state
from nbdthin.errors import Error, InUse, NotFound
from nbdthin.images import store, writeback
from nbdthin.images.changes import Change, changes
from nbdthin.images.programs import run
from nbdthin.images.store import Catalogue, FileSystem, Image
from nbdthin.units import parse_size

_VOLUME = "container/"

_FIFREEZE = 0xC0045877  # linux/fs.h
_FITHAW = 0xC0045878


@dataclass(frozen=True, slots=True)
class Container:
    """Sizes are bytes; `size` is the volume's, `exclusive` what it has of its own."""

    name: str
    image: str  # a tag of it, or the beginning of its id
    image_id: str
    root: Path | None  # where it is mounted on this machine
    connections: tuple[str, ...]  # who else, or how
    size: int
    exclusive: int
    created: float
    state: str  # started, in use or stopped


def create(pool: Client, reference: str, *names: str, size: int | str | None = None) -> list[str]:
    """Containers of an image: all or none, one commit. Returns the names of their volumes.

    Their file systems grow to a larger `size` when they are started. Raises NotFound, Invalid, Exists.
    """
    image = Catalogue(pool.list(labels={store.KIND: "image"})).find(reference)
    labels = {store.KIND: "container", store.IMAGE: image.id, **image.file_system.labels()}
    wanted = None if size is None else parse_size(size)
    volumes = [_VOLUME + name for name in names]
    with pool.batch():
        for volume in volumes:
            pool.clone(image.name, volume, size=wanted, labels=labels)
    return volumes


def containers(pool: Client) -> list[Container]:
    """By name."""
    catalogue = Catalogue.of(pool)
    images = {(image.id, image.file_system.uuid): image for image in catalogue.images}
    roots = _roots()
    return [
        _container(export, images.get((export.labels[store.IMAGE], export.labels[store.UUID])), roots)
        for export in catalogue.containers
    ]


def _container(export: Export, image: Image | None, roots: dict[str | None, Path]) -> Container:
    identity = export.labels[store.IMAGE]
    root = roots.get(export.uri)
    return Container(
        name=export.name.removeprefix(_VOLUME),
        image=store.short(identity) if image is None else image.shown,
        image_id=identity,
        root=root,
        connections=export.connections,
        size=export.size,
        exclusive=export.exclusive,
        created=export.created,
        state="started" if root is not None else "in use" if export.connections else "stopped",
    )


def _roots() -> dict[str | None, Path]:
    """{URI: where it is mounted}"""
    return {device.uri: device.directory for device in devices.attached() if device.directory is not None}


def find(pool: Client, name: str) -> Export:
    """The volume of a container. Raises NotFound."""
    with contextlib.suppress(NotFound):
        export = pool.show(_VOLUME + name.removeprefix(_VOLUME))
        if export.labels.get(store.KIND) == "container":
            return export
    raise NotFound(f"no container {name!r} (`nbdthin container ls` lists what there is)")


def start(pool: Client, name: str, root: Path | None = None, *, options: Sequence[str] = ()) -> Path:
    """Mount a container, on a directory of its own without `root`. Returns where it is, if it was before, too.

    `options` are mount(8)'s, as `context=` of SELinux; they count where it was not mounted before.
    Raises NotFound, Invalid, InUse, Error.
    """
    export = find(pool, name)
    if (mounted := _roots().get(export.uri)) is not None:
        return mounted
    directory = _own_directory(pool, export) if root is None else root.resolve()
    grows = export.size > FileSystem.of(export).size
    try:
        if grows and FileSystem.of(export).kind == "ext4":
            _grow_ext4(pool, export)
        devices.mount(pool, export.name, directory, options=options)
        if grows:
            _grown(pool, export, directory)
    except BaseException:
        if root is None:
            with contextlib.suppress(OSError):  # another start was faster
                directory.rmdir()
        raise
    return directory


def _own_directory(pool: Client, export: Export) -> Path:
    home = _home(pool)
    home.mkdir(mode=0o711, parents=True, exist_ok=True)
    directory = home / quote(export.name.removeprefix(_VOLUME), safe="")
    directory.mkdir(exist_ok=True)
    return directory


def _home(pool: Client) -> Path:
    return Path(f"{state.run_directory()}.containers", pool.info().pool.uuid)


def _grow_ext4(pool: Client, export: Export) -> None:
    """Make the file system as large as its volume, before it is mounted.

    Mounted it would need CAP_SYS_RESOURCE, which root in a container has not. What a power cut in the middle leaves,
    the check before the next attempt mends.
    """
    device = devices.attach(pool, export.name)
    try:
        run("e2fsck", "-f", "-p", device.path, fine=(0, 1))  # 1: it has mended something
        run("resize2fs", device.path)
    finally:
        devices.detach(device.path)


def _grown(pool: Client, export: Export, directory: Path) -> None:
    try:
        if FileSystem.of(export).kind == "xfs":  # grows only mounted, in transactions
            run("xfs_growfs", directory)
        pool.label(export.name, {store.FS_SIZE: str(export.size)})
    except BaseException:
        devices.unmount(directory)
        raise


def stop(pool: Client, *names: str) -> None:
    """Unmount containers; those that are not mounted stay so. Raises NotFound, or InUse where a process is in one."""
    for export in [find(pool, name) for name in names]:
        if (root := _roots().get(export.uri)) is not None:
            devices.unmount(root)
            if root.parent == _home(pool):
                with contextlib.suppress(OSError):  # it is started again already
                    root.rmdir()


def diff(pool: Client, name: str) -> list[Change]:
    """What differs from its image, as `docker diff` says it. Raises NotFound, InUse, Error."""
    export = find(pool, name)
    image = image_of(Catalogue.of(pool), export)
    with devices.mounted(pool, image.name, read_only=True) as before, _readable(pool, export) as after:
        return changes(before, after)


@contextlib.contextmanager
def _readable(pool: Client, export: Export) -> Iterator[Path]:
    if (root := _roots().get(export.uri)) is not None:
        yield root
    else:
        with devices.mounted(pool, export.name, options=("ro",)) as directory:  # writable: a journal is replayed
            yield directory


def image_of(catalogue: Catalogue, export: Export) -> Image:
    """Raises NotFound where it was removed by other means than `remove`."""
    image = catalogue.image(export.labels[store.IMAGE], export.labels[store.UUID])
    if image is None:
        raise NotFound(f"the image of {export.name!r} is gone: {export.labels[store.IMAGE]}")
    return image


def remove(pool: Client, *names: str, force: bool = False) -> None:
    """All or none; `force` stops and disconnects them first. Raises NotFound, or InUse with who holds them."""
    exports = [find(pool, name) for name in names]
    roots = _roots()
    started = [export.name.removeprefix(_VOLUME) for export in exports if export.uri in roots]
    if force:
        stop(pool, *started)
    elif started:
        raise InUse(f"started: {store.listed(started)} (nbdthin container stop, or rm --force)")
    pool.remove(*(export.name for export in exports), force=force)


# -- a container's file system, kept as it is


@contextlib.contextmanager
def at_rest(pool: Client, export: Export, lock: int) -> Iterator[None]:
    """While the block runs its volume holds a whole file system, with all that was written to it.

    A mount of this machine is made to wait. `lock` is that of `store.locked`. Raises InUse where others write to it.
    """
    root = _roots().get(export.uri)
    if root is not None:
        with frozen(root, lock):
            yield
    elif export.connections:
        holders = store.listed(export.connections)
        raise InUse(f"{export.name!r} is in use, and could be caught in the middle: {holders}", export.connections)
    else:
        if os.geteuid() == 0:  # who may have crashed while it was mounted
            with _readable(pool, export):
                pass
        yield


@contextlib.contextmanager
def frozen(root: Path, lock: int) -> Iterator[None]:
    """Everything in the file system is on its device, with nothing left for its journal to do; writers wait.

    A file system that nobody thaws hangs all who write to it, and its device can never be freed. So a process of its
    own does it, also when this one is killed; it keeps `lock`, so that nobody takes away before what is left.
    Raises Error, also where something that was written before did not reach the device.
    """
    # Below `root`, so that it cannot be unmounted while it is frozen. The trap: a Ctrl-C is for all of a terminal.
    command = ["sh", "-c", "trap '' INT TERM HUP; echo; read _; exec fsfreeze --unfreeze ."]
    thawing = subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[lock]
    )
    assert thawing.stdin is not None and thawing.stdout is not None
    try:
        thawing.stdout.read(1)
        with writeback.open_directory(root) as directory:
            try:
                fcntl.ioctl(directory, _FIFREEZE)
            except OSError as error:
                thawing.kill()  # if it is frozen, then by somebody else
                raise Error(f"cannot freeze the file system at {root}: {error.strerror}") from error
            try:
                writeback.sync(directory, root)  # freezing does not tell what the kernel failed to write
                yield
            finally:
                thawing.stdin.close()
                if thawing.wait():
                    fcntl.ioctl(directory, _FITHAW)
    finally:  # not Popen's own context: after a Ctrl-C that waits for a moment only
        thawing.stdin.close()
        thawing.stdout.close()
        thawing.wait()

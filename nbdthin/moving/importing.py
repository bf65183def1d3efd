"""Files become volumes: raw ones and devices directly, other formats through QEMU.

What is made is called `importing/NAME` until it is whole (building.py); then all of it gets its name in one commit.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbdthin import nbd
from nbdthin.control.client import Client
from nbdthin.control.rows import Export
from nbdthin.errors import Invalid
from nbdthin.moving import images
from nbdthin.moving.building import HIDDEN, building, check_free
from nbdthin.moving.copying import Progress, Source, copy, unseen, within, write_data
from nbdthin.moving.files import RawSource, read_pipe
from nbdthin.moving.images import Image
from nbdthin.moving.reaching import connected
from nbdthin.pool.commands import SECTOR
from nbdthin.units import parse_size

UNKNOWN_SIZE = 1 << 50  # bytes of a volume that is made smaller when the pipe has ended


def import_file(
    pool: Client,
    path: Path,
    name: str,
    *,
    size: int | str | None = None,
    format: str | None = None,
    progress: Progress = unseen,
) -> Export:
    """A new volume with what a file holds, `size` bytes if that is more, durable at the end.

    Without `format`, qemu-img says what the file is. What an image stands on is copied with it. Raises Error.
    """
    image = _identified(path, format)
    check_free(pool, name)
    with building(pool, name) as hidden:
        with _disk_of(image) as source:
            with _new_volume(pool, hidden, _volume_size(path, source.size, size)) as disk:
                copy(source, disk, source.extents(), progress=progress)
        _show(pool, [(hidden, name)])
    return pool.show(name)


def import_pipe(
    pool: Client,
    pipe: io.BufferedIOBase,
    name: str,
    *,
    size: int | str | None = None,
    progress: Progress = unseen,
) -> Export:
    """The same with all that comes through a pipe, which is raw."""
    most = UNKNOWN_SIZE if size is None else parse_size(size)
    came = 0
    check_free(pool, name)
    with building(pool, name) as hidden:
        with _new_volume(pool, hidden, most) as disk:
            with disk.pipelined():
                for offset, data in read_pipe(pipe):
                    came = offset + len(data)
                    if came > most:
                        raise Invalid(f"more than {most} bytes came through the pipe")
                    write_data(disk, offset, data)
                    progress(came, 0)
            disk.flush()
        if size is None:
            pool.resize(hidden, _volume_size(Path("-"), came, None))
        _show(pool, [(hidden, name)])
    return pool.show(name)


def import_chain(
    pool: Client, path: Path, name: str, *, format: str | None = None, progress: Progress = unseen
) -> Export:
    """An image as volume `name`, and what it stands on as snapshots below: `NAME@1` is the undermost. Raises Error."""
    layers = images.chain(path, format)
    names = [f"{name}@{number}" for number in range(1, len(layers))]
    for each in (name, *names):
        check_free(pool, each)
    with building(pool, name) as hidden:
        for number, image in enumerate(layers, 1):
            _add_layer(pool, hidden, image, first=number == 1, progress=progress)
            if number < len(layers):
                pool.snapshot(hidden, f"{hidden}@{number}")
        _show(pool, [(f"{HIDDEN}{each}", each) for each in (*names, name)])
    return pool.show(name)


def _add_layer(pool: Client, hidden: str, image: Image, *, first: bool, progress: Progress) -> None:
    size = _volume_size(image.path, image.size, None)
    extents = images.own_extents(image)
    with _disk_of(image) as source:
        if first:
            target = _new_volume(pool, hidden, size)
        else:
            if pool.show(hidden).size != size:
                pool.resize(hidden, size)
            target = connected(pool, hidden)
        with target as disk:
            copy(source, disk, within(extents, 0, image.size), fresh=first, progress=progress)


def _identified(path: Path, format: str | None) -> Image:
    if format == "raw":
        return Image(path, "raw", 0)
    return images.identify(path, format)


@contextlib.contextmanager
def _disk_of(image: Image) -> Iterator[Source]:
    if image.format == "raw":
        with RawSource(image.path) as source:
            yield source
    else:
        with images.opened(image) as disk:
            yield disk


def _volume_size(path: Path, size: int, wanted: int | str | None) -> int:
    """Whole sectors. Raises Invalid."""
    if not size:
        raise Invalid(f"{path} is empty: a volume has at least {SECTOR} bytes")
    whole = -(-size // SECTOR) * SECTOR
    if wanted is None:
        return whole
    if (given := parse_size(wanted)) < whole:
        raise Invalid(f"{path} holds {size} bytes, more than a volume of {given} can take")
    return given


def _new_volume(pool: Client, hidden: str, size: int) -> nbd.Disk:
    pool.create(hidden, size)
    return connected(pool, hidden)


def _show(pool: Client, renames: Sequence[tuple[str, str]]) -> None:
    with pool.batch():
        for hidden, name in renames:
            pool.rename(hidden, name)

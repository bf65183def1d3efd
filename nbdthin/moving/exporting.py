"""Volumes and snapshots become files: raw ones and devices directly, images of other formats through QEMU.

A file gets its name when it is whole and durable. What reads as zeroes stays a hole.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nbdthin import nbd
from nbdthin.control.client import Client
from nbdthin.errors import Exists, Invalid
from nbdthin.moving import images
from nbdthin.moving.copying import Progress, Target, copy, unseen
from nbdthin.moving.files import Output, about, device, new_file, replacing, write_pipe
from nbdthin.moving.reaching import connected
from nbdthin.units import MiB


def export_file(
    pool: Client, name: str, path: Path, *, format: str = "raw", force: bool = False, progress: Progress = unseen
) -> None:
    """What `name` shows as a file of a format that qemu-img can make. A block device or a pipe at `path` is written,
    and only raw; a file there is replaced, or overwritten in the case of a device, only with `force`.

    A volume that changes meanwhile is no good copy: snapshot it. Raises Error, OSError.
    """
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(pool.info().pool.path)):
        raise Invalid(f"{path} is inside the pool: an export goes elsewhere")
    with connected(pool, name) as disk:
        kind = stat.S_IFMT(path.stat().st_mode) if path.exists() else stat.S_IFREG
        if kind not in (stat.S_IFREG, stat.S_IFDIR) and format != "raw":
            raise Invalid(f"{path} is no file: only raw data can be written there")
        if kind in (stat.S_IFIFO, stat.S_IFCHR):
            with open(path, "wb", buffering=0) as pipe, about(path):
                export_pipe(disk, pipe, progress=progress)
        elif kind == stat.S_IFBLK:
            if not force:
                raise Exists(f"{path} is a device that may hold something (--force overwrites it)")
            with device(path, disk.size) as target:
                copy(disk, target, disk.extents(), fresh=False, progress=progress)
        else:
            with replacing(path, force=force) as partial, _made(partial, path, format, disk.size) as file:
                copy(disk, file, disk.extents(), progress=progress)


@contextlib.contextmanager
def _made(path: Path, final: Path, format: str, size: int) -> Iterator[Target]:
    if format == "raw":
        with new_file(path, size) as file:
            yield file
    else:
        with images.opened(images.create(path, format, size), writable=True, name=str(final)) as disk:
            yield disk


def export_pipe(disk: nbd.Disk, pipe: Output, *, progress: Progress = unseen) -> None:
    """All bytes in order, zeroes too."""
    zeroes = memoryview(bytes(MiB))
    position = 0
    data = ((extent.offset, extent.length) for extent in disk.extents() if extent.data)
    for offset, piece in disk.read_many(data):
        _fill(pipe, zeroes, offset - position)
        write_pipe(pipe, piece)
        position = offset + len(piece)
        progress(position, disk.size)
    _fill(pipe, zeroes, disk.size - position)
    pipe.flush()


def _fill(pipe: Output, zeroes: memoryview, length: int) -> None:
    while length:
        part = zeroes[: min(length, len(zeroes))]
        write_pipe(pipe, part)
        length -= len(part)

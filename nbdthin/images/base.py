"""Bases: empty file systems, that all images on them begin with.

mkfs writes into a sparse file, and what is not zero in it is copied into the pool: nobody has to be root, and neither
the journal nor the inode tables take space. The kernel knows that they are zero, too, because mkfs could punch them
out; of a device that was formatted with lazy_itable_init it would write them, 160 MiB for an ext4 of 10 GiB, after the
first mount of each container.
"""

from __future__ import annotations

import contextlib
import shlex
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbdthin.control.client import Client
from nbdthin.errors import Exists, Invalid, NotFound
from nbdthin.images import store
from nbdthin.images.programs import run
from nbdthin.images.store import Base, Catalogue, FileSystem
from nbdthin.units import GiB, format_size, parse_size

KINDS = ("ext4", "xfs")
DEFAULT = "default"  # the base that `image load` makes when it is told none
DEFAULT_SIZE = 10 * GiB


def create(
    pool: Client, name: str = DEFAULT, kind: str = "ext4", size: int | str = DEFAULT_SIZE, *, options: str = ""
) -> Base:
    """A base with an empty file system of `size`; `options` are mkfs's own. Raises Invalid, Exists, NoSpace, Error."""
    if kind not in KINDS:
        raise Invalid(f"not a file system for a base: {kind!r} (one of {', '.join(KINDS)})")
    with store.locked(pool):
        if f"base/{name}" in Catalogue.of(pool).exports:
            raise Exists(f"there is a base {name!r} already (`nbdthin base ls`)")
        _make(pool, name, FileSystem(kind, str(uuid.uuid4()), parse_size(size)), options)
    return find(pool, name)


def grow(pool: Client, name: str, size: int | str) -> Base:
    """Make a base larger for the images that will be loaded; those that are there keep what they stand on.

    Being empty, the file system is made anew, with the options that it was made with. Raises NotFound, Invalid, Error.
    """
    with store.locked(pool):
        old = find(pool, name)
        wanted = parse_size(size)
        if wanted <= old.file_system.size:
            raise Invalid(f"base {name!r} has {format_size(old.file_system.size)} already, and a base never shrinks")
        file_system = FileSystem(old.file_system.kind, str(uuid.uuid4()), wanted)
        _make(pool, name, file_system, old.options, replaces=f"base/{name}")
    return find(pool, name)


def remove(pool: Client, name: str) -> None:
    """Images on it stay. Raises NotFound."""
    with store.locked(pool):
        pool.remove(f"base/{find(pool, name).name}")


def find(pool: Client, name: str) -> Base:
    """Raises NotFound."""
    for base in Catalogue.of(pool).bases:
        if base.name == name:
            return base
    raise NotFound(f"no base {name!r} (`nbdthin base ls` lists what there is)")


def find_or_make(pool: Client, name: str | None) -> Base:
    """The base `name`; without a name the default one, made as it is by default. Under `store.locked`."""
    if name is None and f"base/{DEFAULT}" not in Catalogue.of(pool).exports:
        _make(pool, DEFAULT, FileSystem("ext4", str(uuid.uuid4()), DEFAULT_SIZE), "")
    return find(pool, name or DEFAULT)


def _make(pool: Client, name: str, file_system: FileSystem, options: str, *, replaces: str | None = None) -> None:
    labels = {store.KIND: "base", store.MKFS: options, **file_system.labels()}
    with temporary_file(file_system.size) as file:
        make_file_system(file, file_system, shlex.split(options))
        with filled(pool, file) as volume, pool.batch():
            if replaces is not None:
                pool.remove(replaces)
            store.seal(pool, volume, f"base/{name}", labels)


@contextlib.contextmanager
def temporary_file(size: int) -> Iterator[Path]:
    """A sparse file."""
    with tempfile.TemporaryDirectory(prefix="nbdthin.") as directory:
        file = Path(directory, "disk")
        with file.open("xb") as opened:
            opened.truncate(size)
        yield file


def make_file_system(file: Path, file_system: FileSystem, options: Sequence[str]) -> None:
    """mkfs in a sparse file. Raises Error with what it says."""
    if file_system.kind == "xfs":
        run("mkfs.xfs", "-q", "-f", "-m", f"uuid={file_system.uuid}", *options, file)
    else:
        run("mke2fs", "-q", "-F", "-t", file_system.kind, "-U", file_system.uuid, *options, file)
        # No image has it, and it would be in the root of each container. One that has something in it stays.
        run("debugfs", "-w", "-R", "rmdir lost+found", file)


@contextlib.contextmanager
def filled(pool: Client, file: Path) -> Iterator[str]:
    """A volume that holds what a sparse file holds; whoever does not use it up in time leaves none."""
    from nbdthin.moving.copying import copy  # numpy: most that is done with images needs none
    from nbdthin.moving.files import RawSource
    from nbdthin.moving.reaching import connected

    volume = store.new_building()
    pool.create(volume, file.stat().st_size, labels={store.BUILDING: "1"})
    try:
        with RawSource(file) as source, connected(pool, volume) as disk:
            copy(source, disk, source.extents())
        yield volume
    except BaseException:
        store.give_up(pool)
        raise

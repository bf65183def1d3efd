"""What differs between two directory trees, and that difference as a layer.

The trees are meant to be mounts of a snapshot and of a clone of it. Then a file that nobody touched has the same inode
number and ctime on both sides, and that is enough: nothing can change a file, its attributes or its owner without
changing its ctime. Where these differ all of the metadata is compared, and the content where size and time are equal:
so trees of any origin can be compared, only slower.

Neither tree may change meanwhile. Sockets are left out: a layer cannot have them.
"""

from __future__ import annotations

import enum
import errno
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from nbdthin.errors import Error, Invalid
from nbdthin.images.tape import shown
from nbdthin.images.unpack import NOT_OURS, PATH_LIMIT, WHITEOUT, XATTR
from nbdthin.units import GiB, MiB

_CHUNK = 1 * MiB
_SPARSE = 1 * MiB  # bytes of holes for which a file is written as sparse: not every tool reads that
_TABLE = 1 * MiB  # bytes of the list of a sparse file's parts: with more, it is written whole
_USTAR_SIZE = 8 * GiB  # a size from here on needs a record of its own, with which tarfile reads no sparse file


class Kind(enum.StrEnum):
    ADDED = "A"
    CHANGED = "C"
    DELETED = "D"


class Change(NamedTuple):
    """One line of `docker diff`: of a deleted directory just itself, of a new one all that is in it."""

    kind: Kind
    path: bytes  # relative to the root, which itself is empty


def changes(old: str | os.PathLike[str] | None, new: str | os.PathLike[str]) -> list[Change]:
    """What turns the tree `old` (None: an empty one) into `new`, a directory before what is in it.

    A directory that has a change in it counts as changed, as it does in `docker diff`; with the root, which that does
    not show. Raises Invalid for a path that no layer can have, and OSError.
    """
    trees = _Trees(None if old is None else os.fsencode(old), os.fsencode(new))
    trees.walk()
    trees.keep_links()
    found = trees.found
    for path in list(found):
        while path:
            path = path.rpartition(b"/")[0]
            if path in found:
                break
            found[path] = Kind.CHANGED
    return [Change(found[path], path) for path in sorted(found, key=lambda path: path.replace(b"/", b"\0"))]


class _Trees:
    """Two trees that are being compared; `found` has the kind of change by path."""

    def __init__(self, old: bytes | None, new: bytes) -> None:
        self.found: dict[bytes, Kind] = {}
        self._old = old
        self._new = new
        self._links: dict[int, list[bytes]] = {}  # by inode in the new tree: paths of files with several
        self._were: dict[bytes, int] = {}  # by path: the inode that such a file had in the old tree

    def walk(self) -> None:
        if self._old is None:
            self.found[b""] = Kind.ADDED
        elif self._differs(b"", os.lstat(self._old), os.lstat(self._new)):
            self.found[b""] = Kind.CHANGED
        waiting = [(b"", self._old is not None)]  # directories, and whether the old tree has them
        while waiting:
            path, both = waiting.pop()
            before = _entries(self._old, path) if both and self._old is not None else {}
            after = _entries(self._new, path)
            for name in before.keys() - after.keys():
                self.found[path + b"/" + name if path else name] = Kind.DELETED
            for name, status in after.items():
                below = path + b"/" + name if path else name
                was = before.get(name)
                if was is None:
                    self.found[below] = Kind.ADDED
                elif self._differs(below, was, status):
                    self.found[below] = Kind.CHANGED
                if stat.S_ISDIR(status.st_mode):
                    waiting.append((below, was is not None and stat.S_ISDIR(was.st_mode)))
                elif status.st_nlink > 1 or (was is not None and was.st_nlink > 1):
                    self._links.setdefault(status.st_ino, []).append(below)
                    if was is not None:
                        self._were[below] = was.st_ino

    def keep_links(self) -> None:
        """Count a file as changed where only which names it has did: a layer can say that with its content alone."""
        inodes = {path: inode for inode, paths in self._links.items() for path in paths}
        apart: dict[int, set[int]] = {}  # by inode in the old tree: those that its unchanged names have now
        for path, was in self._were.items():
            if path not in self.found:
                apart.setdefault(was, set()).add(inodes[path])
        for path, was in self._were.items():
            if len(apart.get(was, ())) > 1:
                self.found.setdefault(path, Kind.CHANGED)
        for paths in self._links.values():
            if len({self._were.get(path) for path in paths}) > 1 or any(path in self.found for path in paths):
                for path in paths:
                    self.found.setdefault(path, Kind.CHANGED)

    def _differs(self, path: bytes, was: os.stat_result, now: os.stat_result) -> bool:
        if (
            was.st_mode != now.st_mode
            or was.st_uid != now.st_uid
            or was.st_gid != now.st_gid
            or was.st_mtime_ns != now.st_mtime_ns
        ):
            return True
        kind = stat.S_IFMT(now.st_mode)
        if kind != stat.S_IFDIR and was.st_size != now.st_size:
            return True
        # A ctime of whole seconds may be of a file system with nothing finer, and much can happen within one.
        if was.st_ino == now.st_ino and was.st_ctime_ns == now.st_ctime_ns and now.st_ctime_ns % 10**9:
            return False
        assert self._old is not None
        one, two = os.path.join(self._old, path), os.path.join(self._new, path)
        if xattrs(one) != xattrs(two):
            return True
        if kind == stat.S_IFREG:
            return not _same_content(one, two)
        if kind == stat.S_IFLNK:
            return os.readlink(one) != os.readlink(two)
        return kind in (stat.S_IFCHR, stat.S_IFBLK) and was.st_rdev != now.st_rdev


def _entries(root: bytes | None, path: bytes) -> dict[bytes, os.stat_result]:
    """What is in the directory `path`, without sockets."""
    assert root is not None
    if len(path) > PATH_LIMIT:
        raise Invalid(f"{shown(path)}: a path of more than {PATH_LIMIT} bytes cannot be in a layer")
    with os.scandir(os.path.join(root, path)) as entries:
        found = {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
    return {name: status for name, status in found.items() if not stat.S_ISSOCK(status.st_mode)}


def xattrs(path: bytes) -> dict[str, bytes]:
    """The extended attributes of a file that belong to the image, by name."""
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names if not name.startswith(NOT_OURS)}


def _same_content(one: bytes, two: bytes) -> bool:
    with open(one, "rb", buffering=0) as first, open(two, "rb", buffering=0) as second:
        while True:
            data = first.read(_CHUNK)
            if data != second.read(_CHUNK):
                return False
            if not data:
                return True


# -- as a layer


def write_layer(
    changed: list[Change], new: str | os.PathLike[str], write: Callable[[bytes | memoryview], object]
) -> None:
    """The layer that makes these changes, as an uncompressed tar given to `write`: the same tree, the same bytes.

    Raises Error and Invalid with the name of what cannot be in a layer, and OSError.
    """
    root = os.fsencode(new)
    written: dict[int, bytes] = {}  # by inode: the name by which a file with several is in the layer
    for kind, path in changed:
        name = path.rpartition(b"/")[2]
        if name.startswith(WHITEOUT):
            raise Invalid(f"{shown(path)}: a name that begins with .wh. means a deletion in a layer: rename it")
        if kind is Kind.DELETED:
            whiteout = tarfile.TarInfo(_text(path[: len(path) - len(name)] + WHITEOUT + name))
            whiteout.mode = 0o600
            write(_header(whiteout, path))
        else:
            _write_member(root, path, written, write)
    write(bytes(2 * tarfile.BLOCKSIZE))


def _write_member(
    root: bytes, path: bytes, written: dict[int, bytes], write: Callable[[bytes | memoryview], object]
) -> None:
    where = os.path.join(root, path)
    status = os.lstat(where)
    kind = stat.S_IFMT(status.st_mode)
    member = tarfile.TarInfo(_text(path) if path else ".")
    member.mode = stat.S_IMODE(status.st_mode)
    member.uid, member.gid = status.st_uid, status.st_gid
    member.mtime, fraction = divmod(status.st_mtime_ns, 10**9)
    records: dict[str, str] = {}
    member.pax_headers = records
    if fraction:
        size = abs(status.st_mtime_ns)
        sign = "-" if status.st_mtime_ns < 0 else ""
        records["mtime"] = f"{sign}{size // 10**9}.{size % 10**9:09}"
    if kind != stat.S_IFDIR and status.st_nlink > 1:
        if status.st_ino in written:
            member.type, member.linkname = tarfile.LNKTYPE, _text(written[status.st_ino])
            write(_header(member, path))
            return
        written[status.st_ino] = path
    for name, value in xattrs(where).items():
        if "=" in name or not name.isprintable():
            raise Invalid(f"{shown(path)}: its attribute {name!a} has a name that cannot be in a layer")
        records[XATTR + name] = value.decode("utf-8", "surrogateescape")
    if kind == stat.S_IFREG:
        _write_file(where, path, status, member, write)
        return
    if kind == stat.S_IFLNK:
        member.type, member.linkname = tarfile.SYMTYPE, _text(os.readlink(where))
    elif kind == stat.S_IFDIR:
        member.type = tarfile.DIRTYPE
    elif kind == stat.S_IFIFO:
        member.type = tarfile.FIFOTYPE
    else:
        member.type = tarfile.CHRTYPE if kind == stat.S_IFCHR else tarfile.BLKTYPE
        member.devmajor, member.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    write(_header(member, path))


def _write_file(
    where: bytes,
    path: bytes,
    status: os.stat_result,
    member: tarfile.TarInfo,
    write: Callable[[bytes | memoryview], object],
) -> None:
    """A regular file: header and content, with its holes as such where they are worth it (GNU's format 1.0)."""
    size = status.st_size
    fd = os.open(where, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        runs, table = [(0, size)], b""
        data_runs: list[tuple[int, int]] = []
        if size - status.st_blocks * 512 >= _SPARSE:
            data_runs = list(_data_runs(fd, size))
            lines = [len(data_runs) + 1, *(number for run in data_runs for number in run), size, 0]
            table = _padded("".join(f"{number}\n" for number in lines).encode())
        if 0 < len(table) <= _TABLE and len(table) + sum(length for _, length in data_runs) < _USTAR_SIZE:
            runs = data_runs
            member.pax_headers = {
                **member.pax_headers,
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": member.name,
                "GNU.sparse.realsize": str(size),
            }
            member.name = "GNUSparseFile.0/file"  # what a tool that knows nothing of it makes
        else:
            table = b""
        stored = sum(length for _, length in runs)
        member.size = len(table) + stored
        write(_header(member, path) + table)
        for position, length in runs:
            end = position + length
            while position < end:
                data = os.pread(fd, min(_CHUNK, end - position), position)
                if not data:
                    raise Error(f"{shown(path)}: it got shorter while it was read")
                write(data)
                position += len(data)
        write(bytes(-stored % tarfile.BLOCKSIZE))
    finally:
        os.close(fd)


def _data_runs(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file has data: (position, length)."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        position = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, position - start


def _header(member: tarfile.TarInfo, path: bytes) -> bytes:
    try:
        return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    except ValueError as error:
        raise Invalid(f"{shown(path)}: cannot be in a layer: {error}") from None


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)

"""What the engine asks of the file system: every call that changes what a disk holds, in one place.

`Files` is the real thing, and nothing else is ever used outside of tests: what wraps it there can note each call, or
have one fail (tools/simulatelib). Reads, locks and looks at sizes are not here: they change nothing.

Every call may be made from any thread. A write may be short, as pwrite(2) says.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from nbdthin.errors import Corrupt

_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class Files:
    """The operating system's own calls. OSError from each."""

    # (fd, data, position) -> bytes written: on the data path, so there is not even a frame in between.
    write = staticmethod(os.pwrite)

    def open(self, path: Path, flags: int) -> int:
        """A file for reading and writing; with O_CREAT it may be new, with O_EXCL alone it is a block device.

        Raises Corrupt for what is neither.
        """
        return open_file(path, flags | os.O_RDWR, device=flags & (os.O_EXCL | os.O_CREAT) == os.O_EXCL)

    def close(self, fd: int) -> None:
        os.close(fd)

    def sync(self, fd: int) -> None:
        """The file's bytes, and the size that reading them takes, are durable afterwards."""
        os.fdatasync(fd)

    def begin_sync(self, fd: int) -> None:
        """Have the disk begin with what was written; a busy one lets even this call wait. What fails, `sync` tells."""
        _libc.sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def punch(self, fd: int, position: int, length: int) -> None:
        """Give the space of a range back; it reads as zeroes afterwards, or as it did."""
        if _libc.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, position, length) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def exchange(self, one: Path, two: Path) -> None:
        """Each of two names gets what the other had, at one moment. OSError where the file system cannot."""
        if _libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(two))

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def boot_id(self) -> str:
        """Which boot of which machine this is: as long as it stays the same, the page cache has everything."""
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def drop_cache(self, fd: int) -> None:
        """Forget what the page cache has of a file and the disk may not: the next read asks the disk."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def mkdir(self, path: Path, mode: int = 0o700) -> None:
        """A new directory. Raises FileExistsError."""
        os.mkdir(path, mode)

    def sync_directory(self, path: Path) -> None:
        """Names made, changed and removed in `path` are so durably."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


FILES = Files()


def open_file(path: Path, flags: int = os.O_RDONLY, *, device: bool = False) -> int:
    """A descriptor of a regular file, or a block device with `device`. Raises Corrupt for anything else, and OSError.

    Opening a FIFO to read it would wait for somebody to write to it, for ever; to do both, it does not.
    """
    waits = 0 if flags & os.O_RDWR else os.O_NONBLOCK
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | waits, 0o600)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENXIO) and (what := not_a_file(path, device=device)):
            raise Corrupt(path, None, what) from error
        raise
    if what := _wrong_kind(os.fstat(fd).st_mode, device):
        os.close(fd)
        raise Corrupt(path, None, what)
    return fd


def read_file(path: Path) -> bytes:
    """All of a regular file. Raises as `open_file`."""
    with open(open_file(path), "rb") as file:
        return file.read()


def not_a_file(path: Path, *, device: bool = False) -> str:
    """What is at `path` in place of a regular file; empty where that is one, or nothing."""
    return _wrong_kind(path.stat().st_mode, device) if path.exists() else ""


def _wrong_kind(mode: int, device: bool) -> str:
    if stat.S_ISREG(mode) or (device and stat.S_ISBLK(mode)):
        return ""
    wanted = "a regular file or a block device" if device else "a regular file"
    return f"this is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not {wanted}"


def write_all(files: Files, fd: int, data: bytes | memoryview, position: int) -> None:
    """Write all of `data` at `position`. A write that gets nowhere is an error: it would be tried for ever."""
    done = 0
    while done < len(data):
        written = files.write(fd, memoryview(data)[done:] if done else data, position + done)
        if not written:
            raise OSError(errno.EIO, "a write of nothing")
        done += written


def write_file(files: Files, path: Path, parts: Iterable[bytes]) -> int:
    """A new file that is whole and synced before it has its name, or does not exist. Returns its size.

    The name itself is durable when the directory is synced, which is the caller's.
    """
    partial = path.with_name(path.name + ".new")
    size = 0
    ours = True  # what is being done, and what an error is of: not where the parts come from
    try:
        fd = files.open(partial, os.O_CREAT | os.O_TRUNC)
        try:
            ours = False
            for part in parts:
                ours = True
                write_all(files, fd, part, size)
                size += len(part)
                ours = False
            ours = True
            files.sync(fd)
        finally:
            files.close(fd)
        files.rename(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what stays is removed at the next open
            files.unlink(partial)
        if ours and isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # the name that its reader knows
        raise
    return size


@contextlib.contextmanager
def draft_named(path: Path) -> Iterator[None]:
    """A pool is made as `.NAME-XXXXXXXX` and then renamed: an OSError about that speaks of `path` instead."""
    try:
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # of links that lead in a circle, pathlib says something else later
        yield
    except OSError as error:
        name = Path(os.path.realpath(path)).name if path.is_symlink() else path.name
        if error.filename is not None:
            draft = rf"(^|/)\.{re.escape(name)}-[0-9a-f]{{8}}(?=/|$)"
            error.filename = re.sub(draft, lambda found: found[1] + name, os.fsdecode(error.filename))
        raise

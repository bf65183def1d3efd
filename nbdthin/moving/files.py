"""Raw files, block devices and pipes, as disks to copy from and to. OSErrors say which file they are about."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import secrets
import stat
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from nbdthin.errors import Error, Exists, Invalid
from nbdthin.pool.files import FILES, write_all
from nbdthin.pool.rows import Extent
from nbdthin.units import MiB

STEP = MiB  # bytes read at a time
BEHIND = 32 * MiB  # bytes that are written before the disk begins with them
Output = io.RawIOBase | io.BufferedIOBase
_BLKZEROOUT = 0x127F  # linux/fs.h


@contextlib.contextmanager
def about(path: Path | str) -> Iterator[None]:
    """Errors of calls that take a descriptor do not know whose it is."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


class RawSource:
    """A regular file or a block device, to read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Without a wait: opening a FIFO would take for ever where nobody writes.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode = os.fstat(self._fd).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
                raise Invalid(f"{path} is neither a file nor a block device (what comes through a pipe is read from -)")
            with about(path):
                self.size = os.lseek(self._fd, 0, os.SEEK_END)
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                if stat.S_ISBLK(mode):  # device-mapper writes past the cache: what is in there may be older
                    os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def extents(self) -> Iterator[Extent]:
        """What the file system knows: data and holes. A device is all data."""
        position = 0
        while position < self.size:
            data, hole = self._data_from(position)
            if data > position:
                yield Extent(position, data - position, False)
            if hole > data:
                yield Extent(data, hole - data, True)
            position = hole

    def _data_from(self, position: int) -> tuple[int, int]:
        """Where the next data begins and ends; both at the end of the file where there is none."""
        try:
            data = os.lseek(self._fd, position, os.SEEK_DATA)
            return min(data, self.size), min(os.lseek(self._fd, data, os.SEEK_HOLE), self.size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.size, self.size
            if error.errno == errno.EINVAL:  # a device, or a file system that does not know
                return position, self.size
            error.filename = str(self._path)
            raise

    def read_many(self, extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, memoryview]]:
        """As `nbd.Disk.read_many`: the data is good until the next is asked for."""
        buffer = memoryview(bytearray(STEP))
        for offset, length in extents:
            for start in range(offset, offset + length, STEP):
                view = buffer[: min(STEP, offset + length - start)]
                with about(self._path):
                    count = os.preadv(self._fd, (view,), start)
                if count != len(view):
                    raise Error(f"{self._path} has become shorter while it was read")
                yield start, view


class RawTarget:
    """A regular file or a block device, to write: see `new_file` and `device`."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._written = 0  # bytes since the disk was last told to begin
        self._beginning: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1)

    def close(self) -> None:
        self._thread.shutdown()
        os.close(self._fd)

    def pipelined(self) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def write(self, offset: int, data: memoryview) -> None:
        with about(self._path):
            write_all(FILES, self._fd, data, offset)
        self._written += len(data)
        # What lies on the disk by the end has not to be waited for then. A disk that is busy lets even the call wait.
        if self._written >= BEHIND and (self._beginning is None or self._beginning.done()):
            self._beginning = self._thread.submit(FILES.begin_sync, self._fd)
            self._written = 0

    def zero(self, offset: int, length: int) -> None:
        """Of a block device; where the device can, it keeps a hole."""
        with about(self._path):
            fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", offset, length))

    def flush(self) -> None:
        with about(self._path):
            os.fsync(self._fd)


@contextlib.contextmanager
def replacing(path: Path, *, force: bool) -> Iterator[Path]:
    """Where to make the file that is to be `path`: it gets this name at the end, or is removed. Raises Exists."""
    final = Path(os.path.realpath(path))  # through a link, not in its place
    if final.is_dir():
        raise Invalid(f"{path} is a directory")
    if final.exists() and not force:
        raise Exists(f"{path} exists already (--force replaces it)")
    if not final.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    partial = final.with_name(f".nbdthin-{secrets.token_hex(8)}")
    try:
        yield partial
        os.rename(partial, final)
        FILES.sync_directory(final.parent)
    except OSError as error:
        if error.filename == str(partial):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_file(path: Path, size: int) -> Iterator[RawTarget]:
    """A new file, all hole."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with contextlib.closing(RawTarget(fd, path)) as target:
        with about(path):
            os.ftruncate(fd, size)
        yield target


@contextlib.contextmanager
def device(path: Path, size: int) -> Iterator[RawTarget]:
    """A block device that nobody uses, of at least `size` bytes. Raises Invalid."""
    fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    with contextlib.closing(RawTarget(fd, path)) as target:
        room = os.lseek(fd, 0, os.SEEK_END)
        if room < size:
            raise Invalid(f"{path} is too small: it has {room} bytes, not {size}")
        yield target


def read_pipe(pipe: io.BufferedIOBase) -> Iterator[tuple[int, memoryview]]:
    """All that comes, in steps: offset and data, good until the next."""
    buffer = memoryview(bytearray(STEP))
    offset = 0
    while True:
        filled = 0
        while filled < STEP and (count := pipe.readinto(buffer[filled:])):
            filled += count
        if filled:
            yield offset, buffer[:filled]
            offset += filled
        if filled < STEP:
            return


def write_pipe(pipe: Output, data: memoryview) -> None:
    """All of it: a raw stream may take less at a time."""
    while data:
        data = data[pipe.write(data) or 0 :]

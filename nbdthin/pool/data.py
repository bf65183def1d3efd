"""The data file or block device: bytes at positions, sync, and giving space back.

Knows nothing of blocks in use. Every call may be made from any thread. A short read or write is never healed: it is
an I/O error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from nbdthin.errors import Invalid, Locked, NotFound
from nbdthin.pool.files import FILES, Files, write_all
from nbdthin.units import KiB

NOWAIT: Final = os.RWF_NOWAIT
BLKGETSIZE64 = 0x80081272

# Bytes of a system call that writes. The page cache keeps what was written at once in one large folio, up to 2 MiB, and
# ext4 looks at every 4 KiB of it again for each write into it: 4 KiB onto what 1 MiB writes have left take 8.5 us, onto
# this 3.2 us (kernel 6.18), for 16 calls instead of one where 1 MiB is written.
FOLIO: Final = 64 * KiB

_LOOK: Final = 128 * KiB  # what the kernel reads ahead at once
_COLD: Final = 1.0  # seconds after something was not cached in which a look here and there is not believed
_BYTE: Final = bytearray(1)
_PAGE: Final = mmap.PAGESIZE
_MOST_PAGES: Final = 8192  # asked for at once: 32 MiB

_mincore = ctypes.CDLL(None).mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

# What file systems and devices without hole punching answer.
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


def device_size(path: Path) -> int:
    """Bytes of the block device at `path`."""
    fd = os.open(path, os.O_RDONLY)
    try:
        buffer = bytearray(8)
        fcntl.ioctl(fd, BLKGETSIZE64, buffer)
        return int.from_bytes(buffer, "little")
    finally:
        os.close(fd)


def is_device(path: Path) -> bool:
    return stat.S_ISBLK(path.stat().st_mode)


class DataFile:
    """An open data file.

    `dirty` says, in about so many bytes, that writes have ended which no sync covers yet. It grows when a write ends,
    in whatever thread, and is cleared by the pool just before a sync begins: so a write that ends during a sync stays
    for the next one.
    """

    def __init__(self, path: Path, size: int, files: Files = FILES) -> None:
        """Opens and locks. Raises NotFound, Locked, or Invalid when it holds less than `size` bytes."""
        self.path = path
        self._files = files
        self.pwrite = files.write
        self.dirty = 0
        self.punches = True  # unless that is not wanted, and until the file system refuses
        self.maps = True  # until memory is refused, or a sync failed
        self._map: mmap.mmap | None = None
        self._map_at = 0  # its address
        self._pages = bytearray(_MOST_PAGES)  # what mincore says of them
        self._pages_at = np.frombuffer(self._pages, np.uint8).ctypes.data
        self._cold_until = 0.0  # by time.monotonic
        try:
            device = is_device(path)
            # O_EXCL on a device without O_CREAT: EBUSY while it is mounted or otherwise claimed (open(2)).
            self.fd = files.open(path, os.O_EXCL if device else 0)
        except FileNotFoundError as error:
            raise NotFound(f"the pool's data is missing: {path}") from error
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Locked(f"{path} is in use (mounted, or part of something that is)") from error
            raise
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.nowait = self._knows_nowait()
            self.is_device = device
            self.check_size(size)
        except BlockingIOError as error:
            os.close(self.fd)
            raise Locked(f"{path} is the data of a pool that is open already") from error
        except BaseException:
            os.close(self.fd)
            raise

    @property
    def size(self) -> int:
        """Bytes that the file or device has now."""
        return device_size(self.path) if self.is_device else os.fstat(self.fd).st_size

    @property
    def allocated(self) -> int:
        """Bytes of the file that have space on disk: a file's, not a device's."""
        return os.fstat(self.fd).st_blocks * 512

    def check_size(self, size: int) -> None:
        """Raises Invalid where there are less than `size` bytes."""
        if (actual := self.size) < size:
            raise Invalid(f"{self.path} has {actual} bytes, the pool needs {size}: it was truncated")

    def grow(self, size: int) -> None:
        """Have at least `size` bytes, durably with the next sync. Raises Invalid for a smaller device, or OSError."""
        if self.size >= size:
            return
        if self.is_device:
            raise Invalid(f"{self.path} has {self.size} bytes, less than {size}: make the device larger first")
        self._files.truncate(self.fd, size)
        self.dirty += 1

    def _knows_nowait(self) -> bool:
        """Whether reads can be asked to fail rather than wait for the disk (not on tmpfs, FUSE, NFS)."""
        try:
            os.preadv(self.fd, (bytearray(1),), 0, NOWAIT)
        except OSError as error:
            return error.errno == errno.EAGAIN
        return True

    def read_into(self, view: memoryview, position: int, flags: int = 0) -> None:
        """Fill `view`. With NOWAIT, raises BlockingIOError when the bytes are not all cached."""
        count = os.preadv(self.fd, (view,), position, flags)
        if count != len(view):
            if flags:
                raise BlockingIOError(errno.EAGAIN, "partly cached")
            raise OSError(errno.EIO, f"short read: {count} of {len(view)} bytes at {position} of {self.path}")

    def read_segments(self, segments: Sequence[tuple[int, int]], view: memoryview, flags: int = 0) -> None:
        """Fill `view` from several places, (position, length) each; where the position is below 0, with zeroes."""
        done = 0
        for position, length in segments:
            if position < 0:
                view[done : done + length] = bytes(length)
            else:
                self.read_into(view[done : done + length], position, flags)
            done += length

    @property
    def knows_cached(self) -> bool:
        """`is_cached` can tell what is from what is not."""
        return self.nowait and self.maps

    def is_cached(self, position: int, length: int) -> bool:
        """`mapped` can be read without waiting for the disk: by a look here and there, which takes 1 us for 64 KiB and
        17 for 1 MiB; where something was not cached lately, by one at every page, 6 and 28 us.
        """
        if not self.knows_cached:
            return False
        if time.monotonic() < self._cold_until:
            return self._is_resident(position, length)
        last = position + length - 1
        try:
            for each in (*range(position, last, _LOOK), last) if length > FOLIO else (last,):
                if os.preadv(self.fd, (_BYTE,), each, NOWAIT) != 1:
                    return False
        except OSError:
            self._cold_until = time.monotonic() + _COLD  # what else is not cached, a look at some of it does not tell
            return False
        return True

    def _is_resident(self, position: int, length: int) -> bool:
        """By mincore(2), which touches no page."""
        start = position & -_PAGE
        count = -(-(position + length - start) // _PAGE)
        if count > _MOST_PAGES or self.mapped(position, length) is None:
            return False
        if _mincore(self._map_at + start, count * _PAGE, self._pages_at):
            return False  # unmapped just now
        return self._pages.count(1, 0, count) == count

    def mapped(self, position: int, length: int) -> memoryview | None:
        """These bytes for the kernel to copy from, in the same turn of the loop; None: they cannot be had this way.

        Python itself must not look at them: where the file is shorter than it should be, or the disk fails, a system
        call gets EFAULT, and a program SIGBUS.
        """
        end = position + length
        view = self._map
        try:
            if (view is None or end > len(view)) and self.maps:
                view = self._map = mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ)
                self._map_at = np.frombuffer(view, np.uint8).ctypes.data
                if not self.maps:  # a sync failed just now
                    view = self._map = None
            return None if view is None or end > len(view) else memoryview(view)[position:end]
        except OSError:  # no memory, or not of this file
            self.maps = False
        except ValueError:  # unmapped just now
            pass
        return None

    def _unmap(self) -> None:
        self.maps = False
        view, self._map = self._map, None
        while view is not None:
            try:
                view.close()
                return
            except BufferError:  # a part of it is being sent, in another thread
                time.sleep(0.0001)

    def write(self, payload: memoryview, position: int) -> None:
        """Write `payload`, in pieces that end at multiples of FOLIO."""
        length = len(payload)
        done = 0
        while done < length:
            piece = payload if length <= FOLIO else payload[done : done + FOLIO - (position + done) % FOLIO]
            count = self.pwrite(self.fd, piece, position + done)
            if count != len(piece):
                self.write_rest(piece[count:], position + done + count)
            done += len(piece)
        self.dirty += length  # several threads at once may lose some of it, and never all

    def write_rest(self, rest: memoryview, position: int) -> None:
        """After a short write, which is how a full disk shows first: ask for what is missing, to learn the reason."""
        write_all(self._files, self.fd, rest, position)

    def prefetch(self, segments: Sequence[tuple[int, int]]) -> None:
        """Ask the disk for several places; where the position is below 0 there is nothing to ask for."""
        for position, length in segments:
            if position >= 0:
                os.posix_fadvise(self.fd, position, length, os.POSIX_FADV_WILLNEED)

    def begin_sync(self) -> None:
        """Have the disk begin with what `sync` will wait for."""
        self._files.begin_sync(self.fd)

    def sync(self) -> None:
        """Make durable what was written. After a failure nobody knows what is: never try again."""
        self._files.sync(self.fd)

    def drop_cache(self) -> None:
        """A sync failed: what is read from now on is what the disk has. What is mapped would stay in the cache."""
        self._unmap()
        self._files.drop_cache(self.fd)

    def punch(self, position: int, length: int) -> None:
        """Give the space back to the file system or device; what it holds afterwards does not matter."""
        if not self.punches:
            return
        try:
            self._files.punch(self.fd, position, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self.punches = False

    def next_data(self, position: int) -> tuple[int, int] | None:
        """Start and end of the next part of the file, from `position` on, that takes space."""
        try:
            start = os.lseek(self.fd, position, os.SEEK_DATA)
            return start, os.lseek(self.fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # there is none
                return None
            raise

    def close(self) -> None:
        if self._map is not None:
            with contextlib.suppress(BufferError):  # it goes with whoever still looks at it
                self._map.close()  # it has a descriptor of its own, on which the lock stays
        self._files.close(self.fd)

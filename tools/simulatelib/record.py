"""The engine's `Files` that performs every call on real files and notes it in a log.

The log is one list for all threads. A call that takes effect at once (a write into the page cache, a rename) is made
and noted under one lock, so the log has the order in which they happened. A sync has two events, as others may happen
while it is under way: only what came before the first is durable at the second.

Files and directories go by a number, as an inode does: a name may change hands. `root` is the file system; what lies
outside of it is refused.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nbdthin.pool.files import Files

_boots = itertools.count(1)
ROOT = 0  # the number of the root directory


@dataclass(frozen=True, slots=True)
class Create:
    """A new, empty file, or a directory."""

    parent: int
    name: str
    node: int
    directory: bool = False


@dataclass(frozen=True, slots=True)
class Write:
    node: int
    position: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    node: int
    size: int


@dataclass(frozen=True, slots=True)
class Punch:
    node: int
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class Rename:
    old_parent: int
    old: str
    parent: int
    name: str
    node: int


@dataclass(frozen=True, slots=True)
class Unlink:
    parent: int
    name: str


@dataclass(frozen=True, slots=True)
class SyncBegins:
    node: int  # a file or a directory
    number: int  # of the sync


@dataclass(frozen=True, slots=True)
class SyncEnds:
    node: int
    number: int


@dataclass(frozen=True, slots=True)
class SyncFails:
    node: int
    number: int


@dataclass(frozen=True, slots=True)
class Note:
    """Not the disk's business: something was decided or answered."""

    text: str


Event = Create | Write | Truncate | Punch | Rename | Unlink | SyncBegins | SyncEnds | SyncFails | Note


class Recorder(Files):
    """Real files below `root`, which may hold some already."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._boot = f"boot {next(_boots)}"  # of the machine, until the power is cut
        self.log: list[Event] = []
        self.before: Callable[[], None] | None = (
            None  # called before each call is made: more work, as by another thread
        )
        self.slow: Callable[[], None] | None = (
            None  # called within each sync and each thread's write: a disk that takes its time
        )
        self.syncs_left: int | None = None  # of file syncs that succeed; then one fails
        self._lock = threading.RLock()
        self._nodes: dict[tuple[int, str], int] = {}  # what each name in each directory is now
        self._open: dict[int, int] = {}  # descriptor -> node
        self._quiet: set[int] = set()  # descriptors written by the event loop itself: nobody else's turn comes before
        self._next = ROOT + 1
        self._syncs = 0
        self._adopt(root, ROOT)
        self.adopted = len(self.log)  # events that stand for what was there already

    def note(self, text: str) -> int:
        """Put `text` into the log; the position behind it."""
        with self._lock:
            self.log.append(Note(text))
            return len(self.log)

    def _adopt(self, directory: Path, node: int) -> None:
        for path in sorted(directory.iterdir()):
            child = self._enter(node, path.name, directory=path.is_dir())
            if path.is_dir():
                self._adopt(path, child)
            else:
                data = path.read_bytes()
                self.log.append(Truncate(child, len(data)))
                self.log.append(Write(child, 0, data))
                self._note_sync(child)
        self._note_sync(node)

    def _note_sync(self, node: int) -> None:
        self._syncs += 1
        self.log += [SyncBegins(node, self._syncs), SyncEnds(node, self._syncs)]

    def _enter(self, parent: int, name: str, directory: bool = False) -> int:
        node = self._next
        self._next += 1
        self._nodes[parent, name] = node
        self.log.append(Create(parent, name, node, directory))
        return node

    def _directory(self, path: Path) -> int:
        node = ROOT
        for part in path.relative_to(self.root).parts:
            node = self._nodes[node, part]
        return node

    def _interrupt(self) -> None:
        if self.before is not None:
            self.before()

    # -- Files

    def boot_id(self) -> str:
        return self._boot

    def open(self, path: Path, flags: int) -> int:
        self._interrupt()
        with self._lock:
            fd = super().open(path, flags)
            parent = self._directory(path.parent)
            node = self._nodes.get((parent, path.name))
            if node is None:
                node = self._enter(parent, path.name)
            elif flags & os.O_TRUNC:
                self.log.append(Truncate(node, 0))
            self._open[fd] = node
            if path.name.startswith("unsynced."):
                self._quiet.add(fd)
            return fd

    def close(self, fd: int) -> None:
        with self._lock:
            del self._open[fd]
            self._quiet.discard(fd)
            super().close(fd)

    def write(self, fd: int, data: bytes | bytearray | memoryview, position: int) -> int:  # type: ignore[override]
        if fd not in self._quiet:
            self._interrupt()
        if self.slow is not None and threading.current_thread() is not threading.main_thread():
            self.slow()
        with self._lock:
            data = bytes(data)  # the caller's may change
            count = os.pwrite(fd, data, position)
            self.log.append(Write(self._open[fd], position, data[:count]))
            return count

    def sync(self, fd: int) -> None:
        self._sync(lambda: self._open[fd], lambda: super(Recorder, self).sync(fd))

    def sync_directory(self, path: Path) -> None:
        self._sync(lambda: self._directory(path), lambda: super(Recorder, self).sync_directory(path))

    def _sync(self, node_of: Callable[[], int], work: Callable[[], None]) -> None:
        self._interrupt()
        with self._lock:
            node = node_of()
            self._syncs += 1
            number = self._syncs
            self.log.append(SyncBegins(node, number))
        work()
        if self.slow is not None:
            self.slow()
        self._interrupt()
        with self._lock:
            if self._fails():
                self.log.append(SyncFails(node, number))
                raise OSError(errno.EIO, "the disk refused a sync")
            self.log.append(SyncEnds(node, number))

    def _fails(self) -> bool:
        if self.syncs_left is None:
            return False
        self.syncs_left -= 1
        if self.syncs_left >= 0:
            return False
        self.syncs_left = None  # the next one "succeeds", as on Linux
        return True

    def truncate(self, fd: int, size: int) -> None:
        if fd not in self._quiet:
            self._interrupt()
        with self._lock:
            super().truncate(fd, size)
            self.log.append(Truncate(self._open[fd], size))

    def punch(self, fd: int, position: int, length: int) -> None:
        self._interrupt()
        with self._lock:
            super().punch(fd, position, length)
            self.log.append(Punch(self._open[fd], position, length))

    def rename(self, old: Path, new: Path) -> None:
        self._interrupt()
        with self._lock:
            super().rename(old, new)
            source, target = self._directory(old.parent), self._directory(new.parent)
            node = self._nodes.pop((source, old.name))
            self._nodes[target, new.name] = node
            self.log.append(Rename(source, old.name, target, new.name, node))

    def unlink(self, path: Path) -> None:
        self._interrupt()
        with self._lock:
            super().unlink(path)
            parent = self._directory(path.parent)
            del self._nodes[parent, path.name]
            self.log.append(Unlink(parent, path.name))

    def mkdir(self, path: Path, mode: int = 0o700) -> None:
        self._interrupt()
        with self._lock:
            super().mkdir(path, mode)
            self._enter(self._directory(path.parent), path.name, directory=True)

"""What was answered and is not durable yet, kept where the end of the process cannot reach it.

A write is answered when its bytes are in the page cache; the entry that says where they are is only in memory, until
the next commit. A process that is killed would take it along although the machine goes on, and a client that connects
again would never learn of it: it sent its write, it got its answer, it will flush and be told that all is well. So
before replies leave, the records behind them are appended here, without a sync: the page cache outlives the process.

    POOL/journal/unsynced.0, .1    groups: frames as in the journal, numbered as the journal's frame that will make
                                   them durable; even numbers in one file, odd ones in the other

Rules:
- nothing here is worth anything to another boot of the machine than the one that a group names: then the page cache is
  gone, and a group may be on the disk while the data that it points to is not;
- a group takes effect as a whole: whoever calls `publish` does so between operations, not within one;
- groups of the journal's next frame count, and those of the one behind it; a batch that could not be kept whole (too
  large, no space) is not kept at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgpack

from nbdthin.errors import Corrupt
from nbdthin.pool.files import Files, not_a_file, write_all
from nbdthin.pool.journal import HEADER, MAGIC, frame, parse_frame
from nbdthin.pool.records import TAGS, Entries, Record, Uuid, decode, plain
from nbdthin.units import MiB

ENOUGH = 8 * MiB  # bytes of one batch from which on a commit is due
MOST = 32 * MiB  # bytes of one batch that are kept
_BOOT: Final = 36  # bytes that name a boot
_ENTRIES: Final = TAGS[Entries]

log = logging.getLogger("nbdthin.pool")


def count(recovered: list[list[Record]]) -> int:
    """Changes: blocks of volumes and other records."""
    records = [record for each in recovered for record in each if not isinstance(record, Uuid)]
    return sum(len(record.blocks) // 8 if isinstance(record, Entries) else 1 for record in records)


class Unsynced:
    """The two files of an open pool. Not thread-safe; no call waits for a disk."""

    def __init__(self, directory: Path, uuid: str, files: Files) -> None:
        self._paths = (directory / "unsynced.0", directory / "unsynced.1")
        self._uuid = uuid  # of the pool: the first group of a batch says it
        self._files = files
        self._fds: list[int] = []
        self._boot = files.boot_id().encode().ljust(_BOOT, b"\0")[:_BOOT]
        self._sequence = 0  # of the journal's frame that will make durable what is noted from now on
        self._position = 0  # behind the last group of that number
        self._whole = True  # everything of that number is kept
        self._warned = False  # that it is not, since the last time that it was
        self._pack = msgpack.Packer().pack  # one for all: making one takes longer than packing
        self._records: list[Record] = []  # noted, and in no group yet
        self._layer = -1  # whose entries are being collected
        self._blocks = array("Q")
        self._entries = array("Q")

    # -- after a start

    @property
    def left(self) -> bool:
        """The process that had the pool before did not close it."""
        return any(path.exists() for path in self._paths)

    def recover(self, sequence: int) -> list[list[Record]]:
        """What a process of this boot had answered beyond frame `sequence` of the journal: a list a frame to be.

        Each is to become the frame that it was noted for: then it counts no more, whenever the next kill comes.
        Raises BadRecord, or Corrupt for what is no file.
        """
        for path in self._paths:
            if what := not_a_file(path):
                raise Corrupt(path, None, what)
        found = []
        for number in (sequence + 1, sequence + 2):
            groups = self._read(self._paths[number & 1], number)
            if not groups:
                break
            records = [record for group in groups for record in decode(group)]
            if any(isinstance(record, Uuid) and record.uuid != self._uuid for record in records):
                log.warning("%s is of another pool: it is passed over", self._paths[number & 1])
                break
            found.append(records)
        return found

    def _read(self, path: Path, number: int) -> list[bytes]:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return []
        groups = []
        offset = 0
        while (parsed := parse_frame(data, offset)) is not None and self._counts(parsed, number):
            groups.append(parsed[1][_BOOT:])
            offset += HEADER.size + len(parsed[1])
        later = data.find(MAGIC, offset + 1)
        while later >= 0:
            parsed = parse_frame(data, later)
            if parsed is not None and self._counts(parsed, number):
                log.error("%s is damaged at byte %d: unflushed writes are lost", path, offset)
                return []
            later = data.find(MAGIC, later + 1)
        return groups

    def _counts(self, parsed: tuple[int, bytes], number: int) -> bool:
        sequence, payload = parsed
        return sequence == number and payload.startswith(self._boot)

    def start(self, sequence: int) -> None:
        """Keep from now on what frame `sequence` and later ones will make durable; what was kept before goes.

        Without it nothing is kept, and noting costs next to nothing: a pool without clients owes nobody an answer.
        """
        self._sequence = sequence
        try:
            for path in self._paths:
                self._fds.append(self._files.open(path, os.O_CREAT))
                self._files.truncate(self._fds[-1], 0)
        except OSError as error:
            log.warning("a kill will lose unflushed writes: %s", error)
            self._whole = False

    # -- noting

    def put(self, layer: int, block: int, entry: int) -> None:
        """An own entry has changed."""
        if layer != self._layer:
            self._end_entries()
            self._layer = layer
        self._blocks.append(block)
        self._entries.append(entry)

    def add(self, record: Record) -> None:
        """Something else has changed."""
        self._end_entries()
        self._records.append(record)

    def _end_entries(self) -> None:
        if self._blocks:
            self._records.append(Entries(*self._take_entries()))

    def _take_entries(self) -> tuple[int, bytes, bytes]:
        taken = self._layer, self._blocks.tobytes(), self._entries.tobytes()
        self._layer = -1
        del self._blocks[:], self._entries[:]
        return taken

    def publish(self) -> bool:
        """Put what was noted out of the reach of a kill. True when a commit is due: much is waiting, or it failed."""
        if not self._records and self._layer >= 0 and self._position and self._whole:
            # One write's entries, as most of the time: without the steps between, in half the time.
            return self._append([(_ENTRIES, *self._take_entries())])
        if self._layer >= 0:
            self._end_entries()
        if not self._records:
            return False
        records, self._records = self._records, []
        if not self._position:
            records.insert(0, Uuid(self._uuid))
        if not self._whole or len(self._fds) < len(self._paths):
            return False
        return self._append(plain(records))

    def _append(self, items: Sequence[tuple[object, ...]]) -> bool:
        """One more group. Returns as `publish` does."""
        group = frame(self._sequence, self._boot + self._pack(items))
        before, end = self._position, self._position + len(group)
        try:
            if end > MOST:
                raise OSError("too much for one batch")
            write_all(self._files, self._fds[self._sequence & 1], group, before)
        except OSError as error:
            if not self._warned:  # on a full disk it would be so for every batch
                log.warning("until the next commit, a kill would lose unflushed writes: %s", error)
            self._warned = True
            self._drop()
            return True
        self._warned = False
        self._position = end
        return before < ENOUGH <= end

    def _drop(self) -> None:
        """A part of a batch would be worse than nothing of it: what comes later counts on what is missing."""
        self._whole = False
        with contextlib.suppress(OSError):
            self._files.truncate(self._fds[self._sequence & 1], 0)

    def next_batch(self) -> None:
        """What was noted so far has been packed as one frame."""
        self.publish()
        self._sequence += 1
        self._position = 0
        self._whole = True

    # -- the end

    def clear(self) -> None:
        """A sync failed: what the page cache holds may never reach the disk, and nothing may be built on it."""
        self._whole = False
        self.forget()

    def forget(self) -> None:
        """What is there is durable, or must not be believed. That the pool was not closed can still be seen."""
        for path in self._paths:
            with contextlib.suppress(OSError):
                fd = self._files.open(path, 0)
                try:
                    self._files.truncate(fd, 0)
                finally:
                    self._files.close(fd)

    def close(self, *, clean: bool) -> None:
        """With `clean`, everything is durable: there is nothing to be found here."""
        for fd in self._fds:
            self._files.close(fd)
        self._fds = []
        if clean:
            for path in self._paths:
                with contextlib.suppress(OSError):  # what stays says nothing that the journal does not
                    self._files.unlink(path)

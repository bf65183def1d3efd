"""Bugs that real systems had, put into the real engine one by one: the simulator must find each.

A mutation replaces a method of the engine; the work, the cuts and the oracle are those of test_simulate.py. What is not
found here is a hole in the simulator.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from simulatelib.directed import run_directed
from simulatelib.livework import run_live
from simulatelib.oracle import Lost
from simulatelib.record import Recorder
from simulatelib.run import Counts, Failure, run_seed

from nbdthin.connection import Connection
from nbdthin.errors import Invalid
from nbdthin.pool import commands, journal, layers, merge, records, superblock, volume
from nbdthin.pool import pool as pool_module
from nbdthin.pool.files import Files, write_all
from nbdthin.pool.journal import Journal
from nbdthin.pool.live import LivePool
from nbdthin.pool.livevolume import LiveVolume
from nbdthin.pool.pool import Batch, Pool
from nbdthin.wire import transmission

from .served import ServedWork
from .test_simulate import STEPS

Patch = pytest.MonkeyPatch


def metadata_before_data(patch: Patch) -> None:
    def sync(self: Batch) -> None:
        sync_data, self._sync_data = self._sync_data, False
        real(self)
        if sync_data:
            self._pool.data.sync()

    real = Batch.sync
    patch.setattr(Batch, "sync", sync)


def data_not_synced(patch: Patch) -> None:
    def sync(self: Batch) -> None:
        self._sync_data &= self._payload is None
        real(self)

    real = Batch.sync
    patch.setattr(Batch, "sync", sync)


def overwrites_answered_before_the_sync(patch: Patch) -> None:
    """A flush with nothing but overwrites is answered at once."""
    patch.setattr(Pool, "has_changes", property(lambda self: bool(self._records or self._changed)))


def data_marked_clean_after_its_sync(patch: Patch) -> None:
    """What is written while the sync runs is taken for synced."""

    def sync(self: Batch) -> None:
        real(self)
        self._pool.data.dirty = False

    real = Batch.sync
    patch.setattr(Batch, "sync", sync)


def live_commit_answered_before_it_is_made(patch: Patch) -> None:
    def durable(self: LivePool) -> None:
        real(self)

    real = LivePool.durable
    patch.setattr(LivePool, "durable", durable)


def live_commit_shares_the_batch_under_way(patch: Patch) -> None:
    """A flush that comes while a commit is under way is answered by it, though its data came too late."""

    def durable(self: LivePool) -> asyncio.Future[None] | None:
        return real(self) if self._served is None or self._served.done() else self._served

    real = LivePool.durable
    patch.setattr(LivePool, "durable", durable)


def fua_answered_before_its_commit(patch: Patch) -> None:
    """FUA of a write, a zeroing or a trim is taken for done when the write is."""

    async def succeed(self: Connection, flags: int, cookie: int) -> None:
        await real_succeed(self, 0, cookie)

    def written(self: Connection, flags: int, cookie: int) -> None:
        real_written(self, 0, cookie)

    real_succeed, real_written = Connection._succeed, Connection._written
    patch.setattr(Connection, "_succeed", succeed)
    patch.setattr(Connection, "_written", written)


def flush_answered_at_once(patch: Patch) -> None:
    def flush(self: Connection, cookie: int, last: bool) -> None:
        self._put(transmission.simple_reply(0, cookie))

    patch.setattr(Connection, "_flush_volume", flush)


def freed_blocks_reused_at_once(patch: Patch) -> None:
    def one(self: Pool, physical: int) -> None:
        self.give_back([physical])

    def many(self: Pool, physical: layers.Words) -> None:
        self.give_back(physical.tolist())

    patch.setattr(Pool, "discard_block", one)
    patch.setattr(Pool, "discard_blocks", many)


def freed_blocks_released_when_the_batch_begins(patch: Patch) -> None:
    def begin(self: Pool) -> Batch:
        batch = real(self)
        for blocks in batch.freed:
            self.allocator.release(blocks)
        batch.freed = []
        return batch

    real = Pool.begin
    patch.setattr(Pool, "begin", begin)


def freed_blocks_reused_while_read(patch: Patch) -> None:
    patch.setattr(Pool, "can_reclaim", property(lambda self: bool(self._limbo)))


def failed_sync_retried(patch: Patch) -> None:
    def sync(self: Batch) -> None:
        try:
            if self._sync_data:
                self._pool.data.sync()
        except OSError:
            self._pool.data.sync()
        self._sync_data = False
        real(self)

    real = Batch.sync
    patch.setattr(Batch, "sync", sync)


def failed_journal_sync_retried(patch: Patch) -> None:
    def append(self: Journal, payload: bytes) -> None:
        position = self._position
        try:
            real(self, payload)
        except OSError:
            if self._fd >= 0 and position == self._position:
                self._files.sync(self._fd)
                data = journal.frame(self.sequence + 1, payload)
                self._position += len(data)
                self._limit = max(self._limit, self._position)
                self.sequence += 1

    real = Journal.append
    patch.setattr(Journal, "append", append)


def failed_sync_forgotten(patch: Patch) -> None:
    """The pool goes on as if nothing had been."""
    patch.setattr(Pool, "fail", lambda self, error: None)


def snapshot_beside_writes(patch: Patch) -> None:
    """A snapshot does not wait for the writes under way."""

    @asynccontextmanager
    async def gated(self: LiveVolume) -> AsyncIterator[None]:
        yield

    patch.setattr(LiveVolume, "gated", gated)


def refused_batch_done_in_part(patch: Patch) -> None:
    def execute(self: Pool, wanted: Iterable[commands.Command]) -> None:
        for command in wanted:
            real(self, [command])

    real = Pool.execute
    patch.setattr(Pool, "execute", execute)


def merge_copies_not_flushed(patch: Patch) -> None:
    def copy(self: merge.Step) -> None:
        dirty = self._pool.data.dirty
        real(self)
        self._pool.data.dirty = dirty

    real = merge.Step.copy
    patch.setattr(merge.Step, "copy", copy)


def merged_before_settled(patch: Patch) -> None:
    patch.setattr(Pool, "is_settled", lambda self, layer: True)


def _written_file(*steps: str) -> Callable[..., int]:
    """write_file with its steps in another order, or without one."""

    def write_file(files: Files, path: Path, parts: Iterable[bytes]) -> int:
        partial = path.with_name(path.name + ".new")
        fd = files.open(partial, os.O_CREAT | os.O_TRUNC)
        size = 0
        for part in parts:
            write_all(files, fd, part, size)
            size += len(part)
        for step in steps:
            if step == "sync":
                files.sync(fd)
            else:
                files.rename(partial, path)
        files.close(fd)
        return size

    return write_file


def files_renamed_before_their_sync(patch: Patch) -> None:
    patch.setattr(journal, "write_file", _written_file("rename", "sync"))


def files_not_synced(patch: Patch) -> None:
    patch.setattr(journal, "write_file", _written_file("rename"))


def superblock_not_synced(patch: Patch) -> None:
    patch.setattr(superblock, "write_file", _written_file("rename"))


def _without_directory_sync(patch: Patch, function: str) -> None:
    def sync_directory(self: Recorder, path: Path) -> None:
        if sys._getframe(1).f_code.co_name != function:
            real(self, path)

    real = Recorder.sync_directory
    patch.setattr(Recorder, "sync_directory", sync_directory)


def directory_not_synced_after_a_rotation(patch: Patch) -> None:
    _without_directory_sync(patch, "_rotate")


def directory_not_synced_after_a_checkpoint(patch: Patch) -> None:
    _without_directory_sync(patch, "write_checkpoint")


def directories_not_synced_by_init(patch: Patch) -> None:
    _without_directory_sync(patch, "init")


def data_directory_not_synced_by_init(patch: Patch) -> None:
    _without_directory_sync(patch, "write_header")


def journal_removed_before_the_checkpoint(patch: Patch) -> None:
    def write_checkpoint(self: Journal, number: int, payloads: Iterable[bytes]) -> None:
        if number > 1:
            self._remove_before(number)
        real(self, number, payloads)

    real = Journal.write_checkpoint
    patch.setattr(Journal, "write_checkpoint", write_checkpoint)


def checkpoint_of_a_later_moment(patch: Patch) -> None:
    """Heads are not copied: the checkpoint has what came after it, under the older number."""

    def init(self: pool_module.Capture, state: layers.State) -> None:
        real(self, state)
        self.release()

    real = pool_module.Capture.__init__
    patch.setattr(pool_module.Capture, "__init__", init)


def checkpoint_without_what_is_deferred(patch: Patch) -> None:
    """What is removed and still in use is not worth writing down again."""

    def snapshot_records(self: layers.State) -> list[records.Record]:
        return [each for each in real(self) if not isinstance(each, records.Name) or each.name not in self.deferred]

    real = layers.State.snapshot_records
    patch.setattr(layers.State, "snapshot_records", snapshot_records)


def payload_crc_not_checked(patch: Patch) -> None:
    def parse_frame(data: bytes, offset: int) -> tuple[int, bytes] | None:
        header = journal.parse_header(data, offset)
        if header is None or header.kind != journal.FRAME:
            return None
        start = offset + journal.HEADER.size
        payload = bytes(data[start : start + header.length])
        return (header.sequence, payload) if len(payload) == header.length else None

    patch.setattr(journal, "parse_frame", parse_frame)


def torn_tail_not_cut(patch: Patch) -> None:
    def open_segment(self: Journal, path: Path, position: int) -> None:
        self._fd = self._files.open(path, 0)
        self._position, self._limit = position, os.fstat(self._fd).st_size

    patch.setattr(Journal, "_open_segment", open_segment)


def torn_mark_taken_for_damage(patch: Patch) -> None:
    patch.setattr(journal, "_is_torn_mark", lambda data, offset, sequence: False)


def last_mark_before_the_next_segment(patch: Patch) -> None:
    def rotate(self: Journal) -> None:
        self._mark(journal.LAST_MARK)
        real(self)

    real = Journal._rotate
    patch.setattr(Journal, "_rotate", rotate)


def smaller_end_cut_in_place(patch: Patch) -> None:
    """Zeroes are written behind a new end before the resize is durable."""

    def prepare_end(self: volume.Volume, size: int) -> volume.Shrink:
        if size & self._sub_mask:
            end = min(-(-size // self._subblock) * self._subblock, self.size)
            self.write(size, bytes(end - size))
        return volume.Shrink(self, size, None)

    patch.setattr(volume.Volume, "prepare_end", prepare_end)


Run = Callable[[], Counts]


def _directed(*names: str) -> list[Run]:
    return [lambda name=name: run_directed(name) for name in names]  # type: ignore[misc]


def _seeds(*seeds: int) -> list[Run]:
    return [lambda seed=seed: run_seed(seed, STEPS) for seed in seeds]  # type: ignore[misc]


def _live(*seeds: int) -> list[Run]:
    return [lambda seed=seed: run_live(seed, 60) for seed in seeds]  # type: ignore[misc]


def _served(*seeds: int) -> list[Run]:
    return [lambda seed=seed: run_live(seed, 60, ServedWork) for seed in seeds]  # type: ignore[misc]


RANDOM = _seeds(1, 2, 3)  # those of test_simulate.py
MUTATIONS: dict[Callable[[Patch], None], list[Run]] = {
    metadata_before_data: _directed("snapshot", "clone"),
    data_not_synced: _directed("snapshot", "clone"),
    overwrites_answered_before_the_sync: RANDOM,
    data_marked_clean_after_its_sync: RANDOM,
    live_commit_answered_before_it_is_made: _live(1, 2),
    live_commit_shares_the_batch_under_way: _live(1, 2),
    fua_answered_before_its_commit: _served(1, 2),
    flush_answered_at_once: _served(1, 2),
    freed_blocks_reused_at_once: _directed("full_pool"),
    freed_blocks_released_when_the_batch_begins: _directed("full_pool"),
    freed_blocks_reused_while_read: RANDOM,
    failed_sync_retried: _directed("failed_sync"),
    failed_journal_sync_retried: _directed("failed_sync"),
    failed_sync_forgotten: _directed("failed_sync"),
    snapshot_beside_writes: _live(1, 2),
    refused_batch_done_in_part: RANDOM,
    merge_copies_not_flushed: _directed("merge_and_nothing_else"),
    merged_before_settled: _directed("merge_with_copies"),
    files_renamed_before_their_sync: _directed("checkpoint"),
    files_not_synced: _directed("checkpoint"),
    superblock_not_synced: _directed("init"),
    directory_not_synced_after_a_rotation: _directed("rotation", "checkpoint"),
    directory_not_synced_after_a_checkpoint: _directed("checkpoint"),
    directories_not_synced_by_init: _directed("init"),
    data_directory_not_synced_by_init: _directed("init"),
    journal_removed_before_the_checkpoint: _directed("checkpoint"),
    checkpoint_of_a_later_moment: _directed("checkpoint_beside_writes"),
    checkpoint_without_what_is_deferred: RANDOM,
    payload_crc_not_checked: _directed("rotation"),
    torn_tail_not_cut: _directed("rotation", "large_frames"),
    torn_mark_taken_for_damage: _directed("marks_in_two_sectors"),
    last_mark_before_the_next_segment: _directed("rotation", "checkpoint"),
    smaller_end_cut_in_place: _directed("resize"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_bug_put_into_the_engine_is_found(mutation: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutation(monkeypatch)
    for run in MUTATIONS[mutation]:
        try:
            run()
        except Failure as failure:
            print(failure)
            assert isinstance(failure.error, Lost | AssertionError | Invalid), "the mutant is broken in another way"
            return
    pytest.fail("nothing was lost, or nobody saw it")

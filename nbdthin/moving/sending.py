"""Snapshots leave a pool as streams: whole, or what they differ in from another."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from nbdthin.control.client import Client
from nbdthin.control.rows import Export
from nbdthin.errors import Invalid, NotFound
from nbdthin.moving import identity, stream
from nbdthin.moving.copying import Progress, unseen, within
from nbdthin.moving.files import Output, write_pipe
from nbdthin.moving.identity import Token
from nbdthin.moving.reaching import connected
from nbdthin.moving.stream import Batch
from nbdthin.nbd import Disk
from nbdthin.pool.rows import Extent

THREADS = 2  # that compress: without the GIL, beside the reading
AHEAD = 4  # frames that may wait for them


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes: of data before it was compressed, and of the whole stream."""

    data: int
    stream: int


def send(
    pool: Client,
    snapshot: str,
    output: Output,
    *,
    base: str | None = None,
    level: int = stream.LEVEL,
    progress: Progress = unseen,
) -> Sent:
    """Write a snapshot to `output`: what it differs in from snapshot `base`, or all of it. Raises Error, OSError."""
    with _held(pool, snapshot) as (sent, disk), contextlib.ExitStack() as stack:
        before = None
        if base is not None:
            before, _ = stack.enter_context(_held(pool, base))
            if identity.LABEL not in before.labels:
                raise Invalid(f"{base!r} was never sent or received, so nobody has it to begin with: send it first")
        return _send(pool, sent, disk, before, 0, output, level, progress)


def resume(
    pool: Client,
    token: str,
    output: Output,
    *,
    level: int = stream.LEVEL,
    progress: Progress = unseen,
) -> Sent:
    """Write what is missing to the receiver that gave `token`. Raises Error, OSError."""
    wanted = Token.parse(token)
    with contextlib.ExitStack() as stack:
        snapshot, disk = stack.enter_context(_held_as(pool, wanted.identity))
        base = stack.enter_context(_held_as(pool, wanted.base))[0] if wanted.base else None
        if wanted.offset > snapshot.size:
            raise Invalid(f"not a token of {snapshot.name!r}: it goes beyond its end")
        return _send(pool, snapshot, disk, base, wanted.offset, output, level, progress)


@contextlib.contextmanager
def _held(pool: Client, name: str) -> Iterator[tuple[Export, Disk]]:
    """A snapshot, connected to, so that the name stays its own. Raises NotFound, and Invalid for a volume."""
    with connected(pool, name) as disk:
        yield identity.snapshot(pool, name), disk


@contextlib.contextmanager
def _held_as(pool: Client, wanted: str) -> Iterator[tuple[Export, Disk]]:
    """The snapshot of an identity. Raises NotFound."""
    found = identity.find(pool, wanted)
    if found is not None:
        with _held(pool, found.name) as (export, disk):
            if export.labels.get(identity.LABEL) == wanted:
                yield export, disk
                return
    raise NotFound("this pool has not the snapshots that the token speaks of (any more)")


def _send(
    pool: Client,
    snapshot: Export,
    disk: Disk,
    base: Export | None,
    offset: int,
    output: Output,
    level: int,
    progress: Progress,
) -> Sent:
    header = stream.Header(
        version=stream.VERSION,
        name=snapshot.name,
        identity=identity.of(pool, snapshot),
        size=snapshot.size,
        labels={key: value for key, value in snapshot.labels.items() if key != identity.LABEL},
        base=None if base is None else identity.of(pool, base),
        base_name=None if base is None else base.name,
        offset=offset,
    )
    writer = stream.Writer()
    if base is None:
        ranges = [extent for extent in disk.extents(offset) if extent.data]
    else:
        # Where a snapshot is smaller than the one before, they differ beyond its end, too.
        ranges = list(within(pool.diff(base.name, snapshot.name), offset, snapshot.size))
    total = sum(extent.length for extent in ranges if extent.data)
    written = _write(output, writer.header(header))
    done = 0
    for packed, data in _packed(disk, ranges, level):
        written += _write(output, writer.frame(packed))
        done += data
        progress(done, total)
    written += _write(output, writer.end())
    output.flush()
    return Sent(done, written)


def _packed(disk: Disk, ranges: list[Extent], level: int) -> Iterator[tuple[bytes, int]]:
    """The payload of each frame, in order, and how much data is in it."""
    waiting: deque[tuple[Future[bytes], Batch]] = deque()
    spare = [Batch() for _ in range(AHEAD)]
    with ThreadPoolExecutor(THREADS) as threads:
        batches = _batches(disk, ranges, spare)
        while True:
            if spare and (batch := next(batches, None)) is not None:
                waiting.append((threads.submit(batch.packed, level), batch))
            elif waiting:
                future, batch = waiting.popleft()
                yield future.result(), batch.data
                spare.append(batch)
            else:
                return


def _batches(disk: Disk, ranges: list[Extent], spare: list[Batch]) -> Iterator[Batch]:
    """Records and their data, as much as goes into one frame each; made of `spare`, which has one when this goes on."""
    pieces = disk.read_many((extent.offset, extent.length) for extent in ranges if extent.data)
    batch: Batch | None = None
    for extent in ranges:
        start, end = extent.offset, extent.offset + extent.length
        while start < end:
            if batch is None:
                batch = spare.pop()
                batch.clear()
            if extent.data:
                _, piece = next(pieces)
                batch.add(start, piece)
                start += len(piece)
            else:
                batch.add_zeroes(start, end - start)
                start = end
            if batch.full:
                yield batch
                batch = None
    if batch is not None:
        yield batch


def _write(output: Output, parts: tuple[bytes, ...]) -> int:
    for part in parts:
        write_pipe(output, memoryview(part))
    return sum(map(len, parts))

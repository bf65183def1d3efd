"""Streams become snapshots.

What comes is written to a volume `receiving/NAME` once its frame was verified, and NAME is there when the whole was.
Until then labels of that volume say which snapshot it is to be and how far it has come for good, so that an interrupted
stream can be gone on with: `resume_token` is for `nbdthin send --resume`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from nbdthin.control.client import Client
from nbdthin.control.rows import Export
from nbdthin.errors import Corrupt, Error, Invalid, NotFound
from nbdthin.moving import identity
from nbdthin.moving.building import check_free
from nbdthin.moving.copying import Progress, unseen
from nbdthin.moving.identity import Token
from nbdthin.moving.reaching import connected
from nbdthin.moving.stream import Header, Input, Reader, Record
from nbdthin.nbd import Disk

UNFINISHED = "receiving/"
TOKEN = "nbdthin.receiving"  # label: a Token
SAVED_EVERY = 5  # seconds


def receive(
    pool: Client, name: str, source: Input, *, where: str = "the stream", progress: Progress = unseen
) -> Export:
    """Read a stream to its end and keep it as snapshot `name`. `where` is what errors call `source`. Raises Error.

    One that begins at its beginning replaces what an earlier one left under this name.
    """
    check_free(pool, name)
    reader = Reader(source, where)
    header = reader.header()
    volume = f"{UNFINISHED}{name}"
    if header.offset:
        _go_on(pool, volume, header)
    else:
        _begin(pool, volume, header)
    with _kept(pool, name):
        with connected(pool, volume) as disk:
            _Arrival(pool, volume, header, disk).take(reader, progress)
        with pool.batch():
            pool.snapshot(volume, name, labels={**header.labels, identity.LABEL: header.identity})
            pool.remove(volume)
    return pool.show(name)


def resume_token(pool: Client, name: str) -> str:
    """Raises NotFound where nothing is left of an earlier attempt to receive `name`."""
    try:
        return pool.show(f"{UNFINISHED}{name}").labels[TOKEN]
    except (NotFound, KeyError):
        raise NotFound(f"nothing is left of an attempt to receive {name!r}: send it from the beginning") from None


def _begin(pool: Client, volume: str, header: Header) -> None:
    pool.remove(volume, if_exists=True)
    labels = {TOKEN: str(Token(header.identity, header.base, 0))}
    if header.base is None:
        pool.create(volume, header.size, labels=labels)
        return
    base = identity.find(pool, header.base)
    if base is None:
        raise _no_base(header)
    with connected(pool, base.name):  # from here on the name is its own
        base = pool.show(base.name)
        if base.labels.get(identity.LABEL) != header.base:
            raise _no_base(header)
        pool.clone(base.name, volume, size=max(base.size, header.size), labels=labels)
    if header.size < base.size:
        pool.resize(volume, header.size)


def _no_base(header: Header) -> NotFound:
    return NotFound(
        f"the stream is what {header.name!r} differs in from {header.base_name!r}, which is not in this pool: "
        "receive that first"
    )


def _go_on(pool: Client, volume: str, header: Header) -> None:
    name = volume.removeprefix(UNFINISHED)
    has = Token.parse(resume_token(pool, name))
    if (has.identity, has.base) != (header.identity, header.base):
        raise Invalid(f"the stream is of another snapshot than the one of which {volume!r} has the beginning")
    if has.offset != header.offset:
        raise Invalid(
            f"the stream goes on at byte {header.offset}, but {volume!r} ends at {has.offset} "
            f"(nbdthin receive --resume-token {name})"
        )


@contextlib.contextmanager
def _kept(pool: Client, name: str) -> Iterator[None]:
    """After a failure: remove what has no beginning yet, and say of the rest how to go on."""
    try:
        yield
    except Error as error:
        hint = ""
        with contextlib.suppress(Error):
            if Token.parse(resume_token(pool, name)).offset:
                hint = f"what came is kept (nbdthin receive --resume-token {name})"
            else:
                pool.remove(f"{UNFINISHED}{name}", force=True)
        if not hint:
            raise
        if isinstance(error, Corrupt):
            raise Corrupt(error.path, error.offset, f"{error.what}; {hint}") from error
        raise type(error)(f"{error}; {hint}") from error


class _Arrival:
    """A stream on its way into a volume."""

    def __init__(self, pool: Client, volume: str, header: Header, disk: Disk) -> None:
        self._pool = pool
        self._volume = volume
        self._header = header
        self._disk = disk
        self._reached = header.offset  # before this, everything was written
        self._saved = header.offset  # and is durable

    def take(self, reader: Reader, progress: Progress) -> None:
        """Everything to the end of the stream. What came before it broke off is kept."""
        frames = reader.records(self._header.size)
        due = time.monotonic() + SAVED_EVERY
        with self._disk.pipelined():
            while (frame := self._next(frames)) is not None:
                records, self._reached = frame
                for record in records:
                    if record.data is None:
                        self._disk.zero(record.offset, record.length)
                    else:
                        self._disk.write(record.offset, record.data)
                progress(self._reached, self._header.size)
                if time.monotonic() >= due:
                    self._save()
                    due = time.monotonic() + SAVED_EVERY
        self._save()

    def _next(self, frames: Iterator[tuple[list[Record], int]]) -> tuple[list[Record], int] | None:
        try:
            return next(frames, None)
        except BaseException:
            with contextlib.suppress(Error):  # of a write that failed, too: then it has not come as far
                self._save()
            raise

    def _save(self) -> None:
        """Make durable what has come, and then say so. Raises what a write has failed with."""
        self._disk.flush()
        if self._reached > self._saved:
            token = Token(self._header.identity, self._header.base, self._reached)
            self._pool.label(self._volume, {TOKEN: str(token)})
            self._saved = self._reached

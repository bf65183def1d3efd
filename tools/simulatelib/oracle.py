"""What was asked, what was answered, and so what a pool may be after a power cut.

The oracle knows nothing of blocks, layers, entries or journal bytes. It keeps each volume as bytes, and writes down the
whole state at two kinds of moments: when a commit packs its batch (the journal's frame has a number), and when someone
asks for a flush. A recovered pool says which frame it came to. Rules:

- that frame is not before the last one whose commit was answered, and not after the last one that was begun;
- names, kinds, sizes and labels are those of the frame's moment; if a flush was answered later, they were still so;
- a snapshot is the bytes that it always was;
- each byte of a volume is what it was at that moment (or at the last answered flush, where that is later), or what was
  written there afterwards, as long as no snapshot, rollback or removal came between: such a write may be in place.

Payloads are random bytes, so a byte from elsewhere is not taken for right, and its writer can be found.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nbdthin.pool import commands
from nbdthin.pool.commands import Command

NEVER = 1 << 62  # a position in the log


class Lost(Exception):
    """What must not be; str() says what was found."""


@dataclass(slots=True, eq=False)
class Change:
    """Bytes that a volume's user changed. `begun` and `ended` are positions in the log."""

    offset: int
    data: bytes
    begun: int
    mapped: bool  # only entries change (a trim, a zeroed subblock): it is there with its commit, or not at all
    start: int  # where `bytes` begin
    bytes: bytes  # what may be written in place: `data`, and what surrounds it in its subblocks
    ended: int = NEVER


@dataclass(eq=False)
class Head:
    """The time in which a volume is written without a snapshot or rollback between."""

    content: bytearray
    changes: list[Change] = field(default_factory=list)
    failed: list[Change] = field(default_factory=list)  # that the disk refused
    sealed_by: Head | None = None  # what the volume is written as since a snapshot was taken
    _version: bytes | None = None

    def version(self) -> bytes:
        if self._version is None:
            self._version = bytes(self.content)
        return self._version

    def set(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data[: max(len(self.content) - offset, 0)]
        self._version = None

    def resize(self, size: int) -> None:
        del self.content[size:]
        self.content += bytes(size - len(self.content))
        self._version = None


@dataclass(eq=False)
class Frozen:
    """What a snapshot holds. Where writes were under way when it was taken, `settle` says which of them it has."""

    content: bytes
    under_way: list[Change] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One volume or snapshot at a moment."""

    size: int
    labels: Mapping[str, str]
    kept: Head | Frozen
    content: bytes  # of a volume; a snapshot's is in `kept`

    @property
    def facts(self) -> tuple[bool, int, Mapping[str, str]]:
        return isinstance(self.kept, Frozen), self.size, self.labels


class Moment(NamedTuple):
    """The whole state, at a position in the log."""

    position: int
    frame: int  # the last one that holds nothing newer
    rows: dict[str, Row]


@dataclass
class Image:
    """A volume or snapshot now."""

    size: int
    labels: dict[str, str]
    kept: Head | Frozen

    def content(self) -> bytes:
        return self.kept.version() if isinstance(self.kept, Head) else self.kept.content


class Found(NamedTuple):
    """A volume or snapshot of a recovered pool."""

    snapshot: bool
    size: int
    labels: Mapping[str, str]
    content: bytes


class Bounds(NamedTuple):
    """What a cut leaves possible."""

    position: int
    lowest: int  # frame
    highest: int
    flushed: Moment | None  # the newest state that someone was told is durable


class Oracle:
    def __init__(self, note: Callable[[str], int], subblock: int, frame: int, exact: bool = True) -> None:
        """`note` puts a line in the log and returns the position behind it; `frame` is the journal's last.

        `exact`: changes are told of in the order in which the engine makes them (one thread). Then what a trim makes
        zero cannot be seen before its commit, but where a later write to the same subblock wrote the zeroes out.
        """
        self.exact = exact
        self._note = note
        self._subblock = subblock
        self.images: dict[str, Image] = {}
        self.moments: list[Moment] = []  # of commits, in order
        self._answers: list[tuple[int, Moment]] = []  # (position, what was durable then); states only grow newer
        self._commits: list[tuple[int, int]] = []  # (position, frame) answered
        self._writes: list[tuple[str, Change]] = []  # all of them, to name a foreign byte
        self._active: dict[int, tuple[Head, Change]] = {}  # changes under way
        self._first = frame

    def recovered(self) -> None:
        """`images` is what the pool holds as it was opened, all of it durable."""
        moment = Moment(0, self._first, self._rows())
        self.moments.append(moment)
        self._commits.append((0, self._first))

    # -- what happens to volumes

    def begin_change(self, name: str, offset: int, data: bytes, *, mapped: bool = False) -> Change:
        """A write, or a trim or zeroing of whole subblocks, begins."""
        image = self.images[name]
        assert isinstance(image.kept, Head)
        begun = self._note(f"{'zero' if mapped else 'write'} {name} {offset}+{len(data)}")
        start, after = offset // self._subblock * self._subblock, offset + len(data)
        stop = min(-(-after // self._subblock) * self._subblock, image.size)
        whole = bytes(image.kept.content[start:offset]) + data + bytes(image.kept.content[after:stop])
        change = Change(offset, data, begun, mapped, start, whole)
        image.kept.changes.append(change)
        self._active[id(change)] = (image.kept, change)
        if not mapped:
            self._writes.append((name, change))
        return change

    def end_change(self, name: str, change: Change) -> None:
        """It is done; `name` is what the volume goes by now."""
        head, _ = self._active.pop(id(change))
        change.ended = self._note(f"done {name} {change.offset}+{len(change.data)}")
        head.set(change.offset, change.data)

    def fail_change(self, change: Change) -> None:
        """The disk refused it: bytes that it overwrote may be the old ones or the new, from now on."""
        head, _ = self._active.pop(id(change))
        head.failed.append(change)

    def active(self) -> Iterator[tuple[Head, Change]]:
        """The changes under way, and those that were never finished, and what they belong to."""
        yield from self._active.values()
        heads = [image.kept for image in self.images.values() if isinstance(image.kept, Head)]
        yield from ((head, change) for head in heads for change in head.failed)

    def drop_change(self, change: Change) -> None:
        """It was refused: nothing of it was written."""
        head, _ = self._active.pop(id(change))
        head.changes.remove(change)

    def whole(self, name: str, offset: int, length: int) -> tuple[int, int]:
        """Start and end of the whole subblocks in a range; the volume's end counts as the end of one."""
        sub, end = self._subblock, offset + length
        start = -(-offset // sub) * sub
        stop = end if end == self.images[name].size else end // sub * sub
        return start, max(start, stop)

    def execute(self, wanted: Sequence[Command], hidden: Sequence[str] = ()) -> None:
        """Commands were carried out, though they are not durable yet. `hidden`: what those that they removed and did
        not free are called now, in order."""
        names = iter(hidden)
        for command in wanted:
            self._note(str(command))
            self._command(command, names)
        self._executed = self.ask_flush()

    def answered(self) -> None:
        """Who asked for the last commands was told that they are done, which means durable."""
        self.flushed(self._executed)

    def _command(self, command: Command, hidden: Iterator[str]) -> None:
        images = self.images
        match command:
            case commands.Create(name, size, labels):
                images[name] = Image(size, dict(labels), Head(bytearray(size)))
            case commands.Snapshot(volume, name, labels):
                image = images[volume]
                assert isinstance(image.kept, Head)
                under_way = [change for head, change in self.active() if head is image.kept]
                images[name] = Image(image.size, dict(labels), Frozen(image.content(), under_way))
                old = image.kept
                old.sealed_by = self._new_head(image, image.content(), image.size)
            case commands.Clone(snapshot, name, size, labels):
                source = images[snapshot]
                self._settled(source)
                head = Head(bytearray(source.content()))
                head.resize(size or source.size)
                images[name] = Image(size or source.size, dict(labels), head)
            case commands.Rollback(volume, snapshot):
                self._settled(images[snapshot])
                self._new_head(images[volume], images[snapshot].content(), images[snapshot].size)
            case commands.Rename(old, new):
                images[new] = images.pop(old)
            case commands.Remove(name, deferred=True):
                images[next(hidden)] = images.pop(name)
            case commands.Remove(name):
                del images[name]
            case commands.Resize(name, size):
                images[name].size = size
                kept = images[name].kept
                assert isinstance(kept, Head)
                kept.resize(size)
            case commands.Label(name, changes):
                labels = images[name].labels
                images[name].labels = {key: value for key, value in {**labels, **changes}.items() if value is not None}

    @staticmethod
    def _settled(image: Image) -> None:
        assert isinstance(image.kept, Frozen) and not image.kept.under_way, "settle it first"

    def _new_head(self, image: Image, content: bytes, size: int) -> Head:
        """Writes under way may come before or after the change of heads: they belong to both."""
        old = image.kept
        new = Head(bytearray(content))
        image.kept, image.size = new, size
        if isinstance(old, Head):
            new.failed = list(old.failed)
            new.changes += old.failed
        for key, (head, change) in list(self._active.items()):
            if head is old:
                new.changes.append(change)
                self._active[key] = (new, change)
        return new

    def settle(self, name: str, found: bytes) -> None:
        """A snapshot was read for the first time: of the writes that were under way it has these, for ever."""
        kept = self.images[name].kept
        assert isinstance(kept, Frozen)
        self._compare(name, found, kept.content, kept.under_way)
        kept.content, kept.under_way = found, []

    # -- while it runs

    def check_read(self, name: str, found: bytes, wanted: bytes, head: Head | None, begun: int, end: int) -> None:
        """A read that was under way from `begun` to `end`, when the content was `wanted` at its beginning."""
        changes: list[Change] = []
        while head is not None:  # what was written meanwhile may be seen, also on top of a snapshot taken meanwhile
            changes += self._since(head, begun, end)
            head = head.sealed_by
        self._compare(f"a read of {name}", found, wanted, changes)

    def check_now(self, name: str, found: bytes, under_way: list[Change]) -> None:
        """A read at one moment; the writes under way may be seen or not."""
        self._compare(f"{name} as it is now", found, self.images[name].content(), under_way)

    # -- what becomes durable

    def begin_commit(self, frame: int) -> None:
        """A batch was packed; `frame` is its number, or that of the last frame when it has no metadata."""
        position = self._note(f"commit begins, frame {frame}")
        self.moments.append(Moment(position, frame, self._rows()))

    def end_commit(self) -> None:
        """The batch that began last was made durable."""
        moment = self.moments[-1]
        position = self._note(f"frame {moment.frame} is durable")
        self._commits.append((position, moment.frame))
        self._answer(position, moment)

    def ask_flush(self) -> Moment:
        """Someone wants to know that everything so far is durable."""
        return Moment(self._note("flush is asked for"), -1, self._rows())

    def ask_fua(self, name: str, change: Change) -> Moment:
        """The same, with a change to `name` that has just begun."""
        moment = self.ask_flush()
        row = moment.rows[name]
        content = bytearray(row.content)
        content[change.offset : change.offset + len(change.data)] = change.data
        moment.rows[name] = replace(row, content=bytes(content))
        return moment

    def flushed(self, moment: Moment) -> None:
        """And was told so."""
        self._answer(self._note("flush is answered"), moment)

    def _answer(self, position: int, moment: Moment) -> None:
        if not self._answers or self._answers[-1][1].position < moment.position:
            self._answers.append((position, moment))

    def _rows(self) -> dict[str, Row]:
        return {
            name: Row(image.size, image.labels, image.kept, image.content() if isinstance(image.kept, Head) else b"")
            for name, image in self.images.items()
        }

    # -- after a cut

    def bounds(self, position: int) -> Bounds:
        """What may be found by who cuts the power after `position` events."""
        lowest = max(frame for at, frame in self._commits if at <= position)
        highest = max(moment.frame for moment in self.moments if moment.position <= position)
        index = bisect_right(self._answers, position, key=lambda item: item[0])
        return Bounds(position, lowest, highest, self._answers[index - 1][1] if index else None)

    def judge(self, bounds: Bounds, frame: int, found: Mapping[str, Found]) -> None:
        """Raises Lost unless a pool recovered to `frame` may hold `found`."""
        if not bounds.lowest <= frame <= bounds.highest:
            raise Lost(f"recovered to frame {frame}; {bounds.lowest} was answered, {bounds.highest} is the last begun")
        moment = self.at_frame(frame, bounds.position)
        self._same_names(found, moment)
        if bounds.flushed is not None and bounds.flushed.position > moment.position:
            moment = bounds.flushed
            self._same_names(found, moment)
        for name, row in moment.rows.items():
            if isinstance(row.kept, Frozen):
                self._compare(name, found[name].content, row.kept.content, row.kept.under_way)
            else:
                since = self._since(row.kept, moment.position, bounds.position)
                self._compare(name, found[name].content, row.content, since)

    def at_frame(self, frame: int, position: int = NEVER) -> Moment:
        """The moment of the batch that wrote `frame`: the first one with that number."""
        return next(moment for moment in self.moments if moment.frame == frame and moment.position <= position)

    def _since(self, head: Head, begun: int, cut: int) -> Iterator[Change]:
        """Changes that a volume which was read at `begun` may show too, when the power is cut at `cut`."""
        for change in head.changes:
            if (
                change.ended > begun
                and change.begun < cut
                and not (self.exact and change.mapped and change.begun > begun)
            ):
                yield change

    @staticmethod
    def _same_names(found: Mapping[str, Found], moment: Moment) -> None:
        there = {name: each[:3] for name, each in found.items()}
        wanted = {name: row.facts for name, row in moment.rows.items()}
        for name in sorted(there.keys() | wanted.keys()):
            if there.get(name) != wanted.get(name):
                raise Lost(f"{name!r} is {there.get(name, 'missing')}, was {wanted.get(name, 'not there')}")

    def _compare(self, name: str, found: bytes, wanted: bytes, others: Iterable[Change]) -> None:
        if found == wanted:
            return
        if len(found) != len(wanted):
            raise Lost(f"{name!r} has {len(found)} bytes, not {len(wanted)}")
        there, right = _array(found), _array(wanted)
        wrong = there != right
        for change in others:
            part = slice(change.start, change.start + len(change.bytes))
            data = _array(change.bytes)[: max(len(found) - change.start, 0)]
            wrong[part] &= there[part] != data
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            count = int(np.count_nonzero(wrong))
            raise Lost(f"{name!r}: {count} bytes from {first} on cannot be: they are {self._whose(found, first)}")

    def _whose(self, found: bytes, offset: int) -> str:
        """Where the bytes at `offset` come from."""
        piece = found[offset : offset + 16]
        if not any(piece):
            return "zero"
        for name, change in self._writes:
            at = change.data.find(piece)
            if at >= 0:
                return f"what was written to {name!r} at {change.offset + at} (position {change.begun} of the log)"
        return f"{piece.hex()}, which nobody wrote"


def _array(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)


def payload(chance: random.Random, length: int) -> bytes:
    """Bytes that are not written twice."""
    return chance.randbytes(length)

"""What a volume may hold after its daemon was killed, known exactly: who wrote what, and what was answered.

A volume is looked at in sectors of 512 bytes, in `ISLANDS` places of it that lie far apart. Every write has a number, a
greater one than all before it, of whatever volume; a sector that was written is full of the number of that write and
its own place, so that a byte of another write, another place or another volume shows. Per sector the oracle knows

    durable     the last write that a FLUSH or a FUA answered for: it, or a later one, must be there whatever happens
    answered    the last write that was answered: it, or a later one, must be there when only the process was killed,
                and in a snapshot that is asked for now
    issued      the last write that was sent: nothing later can be there

A volume is written by many clients at once, but a sector by one at a time (`claim`).
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nbdthin.units import GiB, KiB, MiB

SECTOR = 512
ISLAND = 64 * KiB
ISLANDS = 32
APART = 32 * MiB  # a leaf of the mapping each
SIZE = GiB
PER_ISLAND = ISLAND // SECTOR
SECTORS = ISLANDS * PER_ISLAND

Numbers = npt.NDArray[np.int64]

_numbers = itertools.count(1)
_PLACE_BITS = 16
assert SECTORS < 1 << _PLACE_BITS and ISLANDS * APART <= SIZE


def offset_of(sector: int) -> int:
    island, within = divmod(sector, PER_ISLAND)
    return island * APART + within * SECTOR


# A number with its lowest bit set is that of a write of zeroes; 0, what was never written, reads as zeroes as well.


def _is_zero(numbers: Numbers) -> npt.NDArray[np.bool_]:
    result: npt.NDArray[np.bool_] = (numbers == 0) | (numbers & 1 == 1)
    return result


def payload(number: int, first: int, count: int) -> bytes:
    """What write `number` puts into `count` sectors from `first` on."""
    places = np.arange(first, first + count, dtype=np.uint64)
    stamps = np.uint64(number << _PLACE_BITS) | places
    return np.repeat(stamps, SECTOR // 8).tobytes()


def take_apart(data: bytes) -> Numbers:
    """The number in each sector, 0 for zeroes. AssertionError for one that no single write has left."""
    words = np.frombuffer(data, dtype=np.uint64).reshape(-1, SECTOR // 8)
    stamps = words[:, 0]
    torn = (words != stamps[:, None]).any(axis=1)
    assert not torn.any(), f"sector {torn.argmax()} is of several writes"
    places = stamps & np.uint64((1 << _PLACE_BITS) - 1)
    wrong = (stamps != 0) & (places != np.arange(len(stamps), dtype=np.uint64))
    assert not wrong.any(), f"sector {wrong.argmax()} has what belongs to sector {places[wrong.argmax()]}"
    return (stamps >> np.uint64(_PLACE_BITS)).astype(np.int64)


@dataclass(frozen=True)
class Allowed:
    """Bounds for the content of a name."""

    least: Numbers
    issued: Numbers
    zeroed: Numbers  # the last write of zeroes that was sent
    writes: set[int]  # all writes of data to this volume, perhaps also later ones

    def check(self, data: bytes) -> Numbers:
        """The number of the write in each sector of `data`, for zeroes the least that it may be."""
        found = take_apart(data)
        zero = found == 0
        good_zero = zero & (_is_zero(self.least) | (self.zeroed > self.least))
        good = ~zero & (found == self.least)
        good |= ~zero & (found > self.least) & (found <= self.issued) & np.isin(found, list(self.writes))
        bad = ~(good | good_zero)
        at = int(bad.argmax())
        assert not bad.any(), (
            f"{int(bad.sum())} sectors, the first {at}: write {found[at]}, where {self.least[at]} was promised "
            f"and {self.issued[at]} (zeroes: {self.zeroed[at]}) is the last"
        )
        return np.where(zero, np.where(_is_zero(self.least), self.least, self.zeroed), found)


class Volume:
    def __init__(self, start: Numbers | None = None) -> None:
        """A new volume, or the clone of a snapshot that holds `start`."""
        self._lock = threading.Lock()
        self.settle(np.zeros(SECTORS, dtype=np.int64) if start is None else start)

    def settle(self, found: Numbers) -> None:
        """This is what the volume holds, and nobody writes."""
        self.durable = found.copy()
        self.answered = found.copy()
        self._issued = found.copy()
        self._zeroed = np.zeros(SECTORS, dtype=np.int64)
        self._busy = np.zeros(SECTORS, dtype=np.bool_)
        self._writes: set[int] = set()

    def claim(self, first: int, count: int, zeroes: bool) -> int | None:
        """The number of a new write of these sectors; None while another write of one of them is under way."""
        part = slice(first, first + count)
        with self._lock:
            if self._busy[part].any():
                return None
            number = next(_numbers) << 1 | zeroes
            self._busy[part] = True
            self._issued[part] = number
            if zeroes:
                self._zeroed[part] = number
            else:
                self._writes.add(number)
            return number

    def done(self, first: int, count: int, number: int, durable: bool) -> None:
        """A write was answered, with FUA if `durable`."""
        part = slice(first, first + count)
        with self._lock:
            self._busy[part] = False
            self.answered[part] = number
            if durable:
                self.durable[part] = number

    def answers(self) -> Numbers:
        """What has been answered so far: what a FLUSH that is sent next makes durable, what a snapshot must hold."""
        with self._lock:
            return self.answered.copy()

    def flushed(self, answers: Numbers) -> None:
        """The FLUSH was answered before which `answers` were given."""
        with self._lock:
            np.maximum(self.durable, answers, out=self.durable)

    def allowed(self, least: Numbers) -> Allowed:
        """What the volume may hold now where `least` is promised, or its snapshot, asked for when that was answered."""
        with self._lock:
            return Allowed(least, self._issued.copy(), self._zeroed.copy(), self._writes)

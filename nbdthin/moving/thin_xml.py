"""The metadata of a dm-thin pool, from the XML that thin_dump writes.

Read as a stream: 16 bytes a number are kept of each mapping's 70 bytes of text. What thin_dump would not write is
refused with its place: other elements, numbers that are none, mappings that overlap or are out of order, a device that
is there twice, any DOCTYPE (and with it every entity). Parts that devices share come as `def` and `ref` from
thin_dump 1.0 on, and are shared here too; as a device's mappings ascend, it can have each of them once.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO
from xml.parsers import expat

import numpy as np

from nbdthin.errors import Corrupt
from nbdthin.moving.thin_plan import Runs
from nbdthin.pool.commands import MAX_VOLUME, SECTOR
from nbdthin.units import GiB, KiB, MiB

VERSIONS = ("1", "2")  # of the superblock; they differ in nothing that is in the XML
BLOCK_SECTORS = range(64 * KiB // SECTOR, GiB // SECTOR + 1, 64 * KiB // SECTOR)
MAX_DEVICE = (1 << 24) - 1
MAX_RUNS = 1 << 27  # of all devices together, what is shared counted for each
READ = MiB  # bytes at a time
MAX_TOKEN = MiB  # bytes; a mapping takes 80

Attributes = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ThinDevice:
    number: int  # dm-thin's id of it
    runs: Runs


@dataclass(frozen=True, slots=True)
class ThinMetadata:
    block_size: int  # bytes
    devices: Sequence[ThinDevice]


def read(file: BinaryIO, name: str) -> ThinMetadata:
    """`name` is what to call the file in errors. Raises Corrupt, or OSError."""
    return _Reader(name).read(file)


class _Refused(Exception):
    """What is wrong; the place is the parser's."""


class _Reader:
    def __init__(self, name: str) -> None:
        self._name = name
        self._parser = expat.ParserCreate("utf-8")  # whatever the file says
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._open: list[str] = []
        self._block_size = 0
        self._devices: dict[int, Runs] = {}
        self._shared: dict[str, Runs] = {}  # what `def` elements define
        self._finished: Callable[[Runs], None] = lambda runs: None  # what to do with the device or def that is open
        self._numbers = array("q")  # of its latest mappings: logical, physical, blocks, time of each
        self._parts: list[Runs] = []  # of it: what came before those
        self._runs = 0

    def read(self, file: BinaryIO) -> ThinMetadata:
        given = 0
        try:
            while data := file.read(READ):
                self._parser.Parse(data, False)
                given += len(data)
                if given - self._parser.CurrentByteIndex > MAX_TOKEN + READ:
                    raise _Refused("no end of a tag")
            self._parser.Parse(b"", True)
        except expat.ExpatError as error:
            what = expat.errors.messages[error.code]
            cut = ", so the file is cut short" if what in _CUT else ""
            raise Corrupt(
                self._name, max(self._parser.ErrorByteIndex, 0), f"no XML of thin_dump ({what}{cut})"
            ) from error
        except _Refused as error:
            raise Corrupt(self._name, self._parser.CurrentByteIndex, str(error)) from error
        return ThinMetadata(self._block_size, [ThinDevice(*item) for item in self._devices.items()])

    def _doctype(self, *_: object) -> None:
        raise _Refused("a DOCTYPE, which thin_dump does not write")

    def _start(self, element: str, attributes: Attributes) -> None:
        inside = self._open[-1] if self._open else ""
        known = _ELEMENTS.get(element)
        if known is None or inside not in known[0]:
            raise _Refused(
                f"<{element[:40]}> inside of <{inside}>" if inside else f"<{element[:40]}>, not <superblock>"
            )
        self._open.append(element)
        known[1](self, attributes)

    def _end(self, element: str) -> None:
        if element in ("device", "def"):
            self._gather()
            parts, self._parts = self._parts, []
            runs = Runs(*(np.concatenate(column) for column in zip(*parts, strict=True))) if parts else _NONE
            self._finished(runs)
        self._open.pop()

    def _superblock(self, attributes: Attributes) -> None:
        version = attributes.get("version", "2")
        if version not in VERSIONS:
            raise _Refused(f"a superblock of version {version[:40]} (known: {' and '.join(VERSIONS)})")
        sectors = _number(attributes, "data_block_size")
        if sectors not in BLOCK_SECTORS:
            raise _Refused(f"data blocks of {sectors} sectors (64 KiB to 1 GiB, a multiple of 64 KiB)")
        self._block_size = sectors * SECTOR

    def _device(self, attributes: Attributes) -> None:
        number = _number(attributes, "dev_id")
        if number > MAX_DEVICE:
            raise _Refused(f"device {number} (dm-thin has up to {MAX_DEVICE})")
        if number in self._devices:
            raise _Refused(f"device {number} is there twice")
        self._devices[number] = _NONE
        self._finished = lambda runs: self._devices.update({number: runs})

    def _def(self, attributes: Attributes) -> None:
        name = _text(attributes, "name")
        if name in self._shared:
            raise _Refused(f"<def> {name[:40]!r} is there twice")
        self._finished = lambda runs: self._shared.update({name: runs})

    def _ref(self, attributes: Attributes) -> None:
        name = _text(attributes, "name")
        if name not in self._shared:
            raise _Refused(f"<ref> to {name[:40]!r}, which is not defined before")
        self._gather()
        self._append(self._shared[name])

    def _single(self, attributes: Attributes) -> None:
        logical, physical = _number(attributes, "origin_block"), _number(attributes, "data_block")
        self._numbers.extend((logical, physical, 1, _number(attributes, "time")))
        if len(self._numbers) >= _PART:
            self._gather()

    def _range(self, attributes: Attributes) -> None:
        logical, physical = _number(attributes, "origin_begin"), _number(attributes, "data_begin")
        self._numbers.extend((logical, physical, _number(attributes, "length"), _number(attributes, "time")))
        if len(self._numbers) >= _PART:
            self._gather()

    def _gather(self) -> None:
        if self._numbers:
            numbers, self._numbers = self._numbers, array("q")
            self._append(Runs(*np.array(numbers).reshape(-1, 4).T.copy()))

    def _append(self, runs: Runs) -> None:
        """Found wanting here, at most a part late: the place in the file is then that of its end."""
        if not len(runs.logical):
            return
        end = runs.logical + runs.blocks
        before = self._parts[-1].logical[-1] + self._parts[-1].blocks[-1] if self._parts else 0
        if not runs.blocks.all():
            raise _Refused("a mapping of no blocks")
        if int(end.max()) > MAX_VOLUME // self._block_size:
            raise _Refused("a mapping behind the end of the largest volume, 4 EiB")
        if runs.logical[0] < before or (runs.logical[1:] < end[:-1]).any():
            where = f"device {next(reversed(self._devices))}" if self._open[1] == "device" else "a <def>"
            raise _Refused(f"mappings of {where} overlap, or are out of order")
        self._runs += len(runs.logical)
        if self._runs > MAX_RUNS:
            raise _Refused(f"more than {MAX_RUNS} runs of blocks")
        self._parts.append(runs)


_PART = 4 << 16  # numbers that are gathered at a time
_NONE = Runs(*np.empty((4, 0), dtype=np.int64))
_CUT = ("no element found", "unclosed token")

# What each element may stand in, and what begins with it.
_ELEMENTS: dict[str, tuple[tuple[str, ...], Callable[[_Reader, Attributes], None]]] = {
    "superblock": (("",), _Reader._superblock),
    "def": (("superblock",), _Reader._def),
    "device": (("superblock",), _Reader._device),
    "single_mapping": (("device", "def"), _Reader._single),
    "range_mapping": (("device", "def"), _Reader._range),
    "ref": (("device", "def"), _Reader._ref),
}


def _text(attributes: Attributes, name: str) -> str:
    text = attributes.get(name)
    if text is None:
        raise _Refused(f"no {name}")
    return text


def _number(attributes: Attributes, name: str) -> int:
    text = _text(attributes, name)
    if not (text.isdigit() and text.isascii() and len(text) <= 18):
        raise _Refused(f"{name} is no number: {text[:40]!r}")
    return int(text)

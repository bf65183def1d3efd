"""What a journal frame says: a list of records, each the state that one thing has from now on.

Records set state, they do not describe actions, so applying one twice is the same as once, a checkpoint is written in
the same records as the journal, and one function (`layers.State.apply`) serves live work and recovery. A layer that no
name and no other layer refers to any more is gone: removal needs no record of its own.

FORMAT.md has every byte. To add a record: a class with the next tag, a row in `_TYPES`, a branch in `State.apply`,
a golden byte string in the tests.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import msgpack

LEAF_BLOCKS: Final = 512  # entries in a leaf
LEAF_BYTES: Final = 8 * LEAF_BLOCKS
_DEFERRED = "~"  # not a letter of a name that anybody can give


class Layer(NamedTuple):
    """Layer `layer` exists and stands on `parent` (0: on nothing)."""

    layer: int
    parent: int


class Name(NamedTuple):
    """`name` is a snapshot or volume of `size` bytes whose content is `layer`. A volume's layer is its head.

    `quota` and `reservation` are bytes of blocks, 0 for none; what counts against them is what the layers above
    `origin` own (limits.py).
    """

    name: str
    snapshot: bool
    layer: int
    size: int
    created: float
    labels: Mapping[str, str]
    quota: int = 0
    reservation: int = 0
    origin: int = 0


class Unname(NamedTuple):
    name: str


class Entries(NamedTuple):
    """Entries of `layer`: two arrays of little-endian u64 of one length, the block numbers and their entries."""

    layer: int
    blocks: bytes
    entries: bytes


class Leaf(NamedTuple):
    """Leaf `leaf` of `layer`, whole: 512 little-endian u64, or empty for a leaf without entries."""

    layer: int
    leaf: int
    entries: bytes


class Counter(NamedTuple):
    """Layer numbers below `next_layer` have been used: numbers are never given out twice."""

    next_layer: int


class End(NamedTuple):
    """The last record of a checkpoint: without it the file was not written to its end."""

    records: int


class Size(NamedTuple):
    """The pool has grown to `size` bytes of data file or device, the header's block included."""

    size: int


class Uuid(NamedTuple):
    """All of this is of the pool `uuid`: in the journal of another, everything that it says is wrong."""

    uuid: str


Record = Layer | Name | Unname | Entries | Leaf | Counter | End | Size | Uuid

_TYPES: dict[int, type[Record]] = {
    1: Layer,
    2: Name,
    3: Unname,
    4: Entries,
    5: Leaf,
    6: Counter,
    7: End,
    8: Size,
    9: Uuid,
}
_FIELDS: dict[type[Record], tuple[type, ...]] = {
    Layer: (int, int),
    Name: (str, bool, int, int, float, dict, int, int, int),
    Unname: (str,),
    Entries: (int, bytes, bytes),
    Leaf: (int, int, bytes),
    Counter: (int,),
    End: (int,),
    Size: (int,),
    Uuid: (str,),
}
TAGS: Mapping[type[Record], int] = {kind: tag for tag, kind in _TYPES.items()}


class BadRecord(ValueError):
    """Bytes with a valid checksum that are no record this version knows."""


def plain(records: Iterable[Record]) -> list[tuple[object, ...]]:
    """What is packed for them."""
    return [(TAGS[type(record)], *record) for record in records]


def encode(records: Iterable[Record]) -> bytes:
    return msgpack.packb(plain(records))  # type: ignore[no-any-return]


def decode(payload: bytes) -> list[Record]:
    try:
        items = msgpack.unpackb(payload, strict_map_key=True, max_bin_len=len(payload))
        return [_typed(_TYPES[tag], fields) for tag, *fields in items]
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise BadRecord(f"not a list of records: {error!r}") from error


def _typed(kind: type[Record], fields: list[object]) -> Record:
    types = _FIELDS[kind]
    if len(fields) != len(types) or not all(type(field) is wanted for field, wanted in zip(fields, types, strict=True)):
        raise BadRecord(f"not the fields of a {kind.__name__}: {[type(field).__name__ for field in fields]}")
    if any(isinstance(field, int) and field < 0 for field in fields):
        raise BadRecord(f"a {kind.__name__} with a number below 0")
    return kind(*fields)  # type: ignore[arg-type]


def kinds() -> Mapping[int, type[Record]]:
    """Every kind of record by its tag."""
    return _TYPES


def make(kind: type[Record], fields: list[object]) -> Record:
    """A record of `kind`, its fields in order. Raises BadRecord for what is not of their types."""
    return _typed(kind, fields)


def deferred_name(name: str, layer: int) -> str:
    """What `name`, removed while it was in use, is called until it is freed: unlike any name before or after."""
    return f"{name}{_DEFERRED}{layer}"


def is_deferred(name: str) -> bool:
    """It is the name of something that was removed while it was in use."""
    return _DEFERRED in name


def former_name(name: str) -> str:
    """What `name` was called before it was removed; itself, where it was not."""
    return name.partition(_DEFERRED)[0]


def lasting_name(name: str, created: float) -> str:
    """A name by which clients find what they had, and nothing else, whatever becomes of `name` (but for a rename)."""
    return f"{former_name(name)}{_DEFERRED}{created!r}"


def u64(values: Iterable[int]) -> bytes:
    return array("Q", values).tobytes()

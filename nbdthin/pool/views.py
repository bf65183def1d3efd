"""What a closer look at a volume or snapshot shows: one byte's way, where its data lies, what removing would free.

All sizes, offsets and positions are bytes. Light: the clients load it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbdthin.pool.rows import Row

KINDS = ("volume", "snapshot")
DATA = "data"
ZERO = "zero"  # trimmed, or zeroed, over what the layers below hold
NOTHING = "nothing"  # of a layer: it leaves the subblock to its parent
UNWRITTEN = "unwritten"  # no layer has anything there: it reads as zero

MOST_CELLS = 4096  # of a map


@dataclass(frozen=True, slots=True)
class Place:
    """A block of the data file that is somebody's."""

    position: int  # of its first byte in the data file
    length: int
    layer: int  # the number of the one that owns it
    owner: str | None  # the volume or snapshot whose content that layer is; None: it has no name any more
    offset: int  # of the volume: what the block holds begins there
    data: int  # bytes that the layer has there; the rest holds nothing
    shown_by: tuple[str, ...]  # every volume and snapshot that shows any of it


@dataclass(frozen=True, slots=True)
class Look:
    """What one layer says of a subblock."""

    layer: int  # its number
    name: str | None  # the volume or snapshot whose content it is
    says: str  # DATA, ZERO or NOTHING


@dataclass(frozen=True, slots=True)
class WritePlan:
    """What a write would do. Counts are of subblocks, but for `blocks`."""

    offset: int
    length: int
    action: str  # "overwrite", "fill" (a block that is there), "allocate" or "refused"
    overwritten: int  # in place: no metadata
    filled: int  # into blocks that the volume has already
    allocated: int  # into new blocks
    blocks: int  # new ones
    read: int  # bytes that are read first, of subblocks that the write covers in part
    why: str | None  # it is refused


@dataclass(frozen=True, slots=True)
class Explanation:
    """The way of a read of one byte, and what a write there would do."""

    name: str
    kind: str  # "volume" or "snapshot"
    offset: int
    block: int  # of the volume
    subblock: int  # of the block
    state: str  # DATA, ZERO or UNWRITTEN
    layer: int | None  # whose data or zero it is; None for what nobody wrote
    owner: str | None  # the name of that layer, if it has one
    depth: int  # layers above the one that says so, 0 for the volume's own; where none does, all but the lowest
    chain: int  # layers from the volume's own to the lowest
    lookup: str  # "own leaf", "shared leaf" (composed once) or "walk" (once: subblocks of several layers)
    layers: tuple[Look, ...]  # from the volume's own down to the one that knows
    physical: int | None  # block of the data file; None for what reads as zero
    position: int | None  # of the byte in the data file
    data_path: Path
    checksum: bool  # known for this subblock
    write: WritePlan


@dataclass(frozen=True, slots=True)
class Owner:
    """A layer that a volume shows data of."""

    layer: int
    name: str | None
    data: int
    runs: int  # pieces that lie in one place of the data file each


@dataclass(frozen=True, slots=True)
class Cell:
    """One part of a map's picture."""

    owner: int | None  # the one with most data in it: a place in `Map.owners`; None where there is no data
    data: int


@dataclass(frozen=True, slots=True)
class Map:
    """Which layers a volume's data comes from, and how scattered it is."""

    name: str
    kind: str
    size: int
    data: int  # what it shows that is not zero by itself
    highest: int  # where the last data ends
    runs: int  # pieces that lie in one place of the data file each, in the volume's order
    owners: tuple[Owner, ...]  # from the volume's own layer down; those with data to show
    cell: int  # bytes that a cell stands for
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class DiskUse:
    """What names take, and what removing them all at once would give back."""

    rows: tuple[Row, ...]  # by name
    freed: int  # when the merges that follow have run
    used: int  # by the whole pool

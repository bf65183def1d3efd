"""Facts about a pool, as its users see them. All sizes are bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Row:
    """One volume or snapshot.

    `referenced` counts the pool blocks that it reads from or owns, `exclusive` those that removing it would give back,
    `shared` the rest of what it refers to. `parent` is the nearest snapshot below it.
    `created` is in seconds since 1970.
    """

    name: str
    kind: str  # "volume" or "snapshot"
    size: int
    referenced: int
    exclusive: int
    shared: int
    parent: str | None
    created: float
    labels: Mapping[str, str]
    quota: int | None  # of a volume: what it may be charged with
    reservation: int | None  # what it can be charged with whatever others do
    charged: int  # what its head and its snapshots since it was made, cloned or rolled back own; 0 for snapshots


class Usage(NamedTuple):
    """How full a pool is."""

    used: int
    free: int  # what it can still take: its own size's, or the file system's below it

    @property
    def total(self) -> int:
        return self.used + self.free

    @property
    def fraction(self) -> float:
        """In use, of 1."""
        return self.used / self.total if self.total else 1.0


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """The pool as a whole. `oversubscription` is promised / existing space: volume sizes over `data_total`."""

    path: Path
    uuid: str
    block_size: int
    data_path: Path
    data_total: int
    data_used: int
    data_available: int  # what the pool has left, or the file system under it where that is less
    data_reserved: int  # of what is available: kept for volumes with a reservation
    min_free: int  # with less than this available, no volumes or clones are made
    metadata_used: int  # bytes of the journal directory
    metadata_total: int  # used and what the file system under it has left
    metadata_available: int
    memory_mapping: int  # bytes of memory that the mapping takes
    volumes: int
    snapshots: int
    layers: int
    merging: int  # of these, without a name and to be merged or pruned, which gives space back
    virtual_size: int
    oversubscription: float
    journal: int  # bytes written to the journal since the last checkpoint
    checkpoint: int  # bytes of the last checkpoint
    sequence: int  # number of the last durable frame
    failed: str | None  # why the pool turned read-only


@dataclass(frozen=True, slots=True)
class Finding:
    """Data that is not what was written, or cannot be read."""

    name: str  # a volume or snapshot that shows it; empty where none does
    offset: int  # in there
    length: int
    position: int  # in the data file or device
    unreadable: bool  # the disk refuses to read it; otherwise its checksum differs
    affected: tuple[str, ...]  # every volume and snapshot that shows it


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """How far a scrub has come, and what it has just found."""

    done: int  # of what it reads: the blocks of sealed layers
    total: int
    unsummed: int  # of what is done, data that has no checksum yet: it was read, and nothing more
    finding: Finding | None


@dataclass(frozen=True, slots=True)
class Extent:
    """A range in which two snapshots differ. `data`: the second holds data there; otherwise it reads as zero."""

    offset: int
    length: int
    data: bool

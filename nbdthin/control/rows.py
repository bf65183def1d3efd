"""What a daemon tells about itself: the pool's rows with what only a server knows, and facts for `info`.

Sizes are bytes, times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdthin.pool.rows import PoolInfo, Row


@dataclass(frozen=True, slots=True)
class Export(Row):
    """A volume or snapshot as it is served: the fields of `Row`, and these."""

    read_only: bool  # a snapshot, or a rule in exports.toml says so
    connections: tuple[str, ...]  # who holds it, for people
    open_count: int  # connections to it
    uri: str | None  # for qemu-img, nbdinfo, nbdcopy ...; None where nothing listens, and where it is removed
    lasting_uri: str | None  # for who comes back by itself: leads to this, though it is removed, and to nothing else


@dataclass(frozen=True, slots=True)
class Detail(Export):
    """What `nbdthin show` shows: the fields of `Export`, and these."""

    mapped: int  # bytes of data that it has
    highest: int  # where the last of them ends
    runs: int  # pieces of the data file that they lie in


@dataclass(frozen=True, slots=True)
class Node:
    """An export in the lineage: `depth` 0 stands on nothing that has a name, others on the node before them that is
    one less deep."""

    depth: int
    export: Export


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    pid: int
    started: float
    memory: int  # bytes that are its own (host.own_memory)
    threads: int
    files: int  # open file descriptors
    files_limit: int
    cpu: float  # seconds of user and system time since the start
    compiled: bool  # the data path is, by mypyc; otherwise it runs interpreted


@dataclass(frozen=True, slots=True)
class LoopFacts:
    """How late the event loop was, in the last minute (lag.py); seconds."""

    lag_p99: float
    lag_max: float
    samples: int


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """The file system or device that a path is on."""

    device: str
    mount: Path | None  # None: a block device of its own
    type: str
    total: int
    used: int
    available: int


@dataclass(frozen=True, slots=True)
class Info:
    """Everything `nbdthin info` shows."""

    version: str
    pool: PoolInfo
    listen: tuple[str, ...]  # addresses, as in exports.toml
    connections: int
    process: ProcessFacts
    loop: LoopFacts
    disk: DiskFacts  # below the data


def lineage(exports: Sequence[Export]) -> list[Node]:
    """All of `exports`, each behind its parent, siblings by name. Flat: a chain may be thousands deep."""
    names = {export.name for export in exports}
    children: dict[str | None, list[Export]] = {}
    for export in sorted(exports, key=lambda export: export.name, reverse=True):
        children.setdefault(export.parent if export.parent in names else None, []).append(export)
    nodes = []
    waiting = [Node(0, export) for export in children.get(None, ())]
    while waiting:
        node = waiting.pop()
        nodes.append(node)
        waiting.extend(Node(node.depth + 1, child) for child in children.get(node.export.name, ()))
    return nodes

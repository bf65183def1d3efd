"""What a pool does when space runs short: chosen by whoever opens it, and no part of what is on disk.

exports.toml says it for a daemon (its `[pool]` table is these fields and where the pool is); `Pool.open` takes it.
Fractions are of 1; config.py reads them as percentages.
"""

from __future__ import annotations

from dataclasses import dataclass

QUEUE, ERROR = "queue", "error"


@dataclass(frozen=True, slots=True)
class Policy:
    # The kernel's client makes an I/O error of whatever a server answers, ENOSPC too, and a file system takes that for
    # a broken disk: it turns read-only, or drops what it had cached. Waiting gives people, hooks and growth a minute.
    # Without a daemon nobody could free anything meanwhile, so there it is always an error.
    no_space: str = QUEUE  # or ERROR: what becomes of a write that finds no space; an [[export]] may say otherwise
    no_space_timeout: float = 60.0  # seconds until a write that waits is refused after all: dm-thin's, and its reasons
    min_free: float = 0.10  # fraction: below it there are no new volumes and clones, so that those there are can go on
    auto_extend: bool = True  # a data file grows; a block device does not by itself
    auto_extend_threshold: float = 0.80  # fraction of the pool in use from which on it grows
    auto_extend_step: float = 0.20  # by this fraction of its size
    max_size: int | None = None  # bytes that it grows to by itself; None: as far as the file system below can hold it
    low_water: tuple[float, ...] = (0.80, 0.90, 0.95)  # fractions in use at which an event says so; ascending
    verify: bool = False  # compare what clients read with its checksums; whole subblocks are read then
    punch: bool = True  # give the space of blocks that came free back to the file system, or the device
    hook: tuple[str, ...] = ()  # a command, and its arguments, that is told of every event

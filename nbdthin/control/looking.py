"""What a closer look at a daemon's pool answers. What takes longer goes in steps, between which clients are served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, cast

from nbdthin.errors import Invalid
from nbdthin.pool import du, space, volumemap
from nbdthin.pool import explain as pool_explain
from nbdthin.pool.views import KINDS, MOST_CELLS, DiskUse, Explanation, Map

if TYPE_CHECKING:
    from nbdthin.control.commands import Daemon

TURN = 0.0005  # seconds that a query may take of a turn of the loop before it lets others have theirs

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ExplainArguments:
    name: str
    offset: int
    length: int | None = None  # of a write; that of a subblock


@dataclass(frozen=True, slots=True)
class MapArguments:
    name: str
    cells: int = MOST_CELLS  # of the picture, at most


@dataclass(frozen=True, slots=True)
class DuArguments:
    names: tuple[str, ...] = ()  # all without any


@dataclass(frozen=True, slots=True)
class NamesArguments:
    prefix: str = ""
    kind: str | None = None  # KINDS; both


async def explain(daemon: Daemon, arguments: ExplainArguments) -> Explanation:
    live = daemon.live
    seen = pool_explain.explain(live.pool, arguments.name, arguments.offset, arguments.length)
    known = await live.in_thread(pool_explain.has_checksum, live.pool, seen)
    export = daemon.exports.describe(arguments.name)
    write = seen.write
    if write.why is None and export is not None and export.read_only:
        write = replace(write, action="refused", why="a rule in exports.toml makes it read-only")
    return replace(seen, checksum=known, write=write)


async def volume_map(daemon: Daemon, arguments: MapArguments) -> Map:
    return await _in_turns(volumemap.survey(daemon.live.pool, arguments.name, arguments.cells))


async def disk_use(daemon: Daemon, arguments: DuArguments) -> DiskUse:
    return await _in_turns(du.disk_use(daemon.live.pool, arguments.names))


async def prepare(daemon: Daemon) -> None:
    """Have at hand what figures of all names need, so that they take little time at once."""
    state = daemon.live.pool.state
    await _in_turns(space.prepare([state.layers[row.layer] for row in state.names.values()]))


def names(daemon: Daemon, arguments: NamesArguments) -> list[str]:
    """Without any figures: for who completes a name while it is typed."""
    if arguments.kind not in (None, *KINDS):
        raise Invalid(f"a kind is one of {', '.join(KINDS)}, not {arguments.kind!r}")
    state = daemon.live.pool.state
    return sorted(
        row.name
        for row in state.names.values()
        if row.name not in state.deferred
        and row.name.startswith(arguments.prefix)
        and arguments.kind in (None, KINDS[row.snapshot])
    )


async def _in_turns(steps: Generator[None, None, T]) -> T:
    begun = time.monotonic()
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(T, end.value)
        if time.monotonic() - begun > TURN:
            await asyncio.sleep(0)
            begun = time.monotonic()

"""The daemon, with upkeep that goes on all the time: `python -m benchlib.upkeep CONFIG checkpoint|merge LOG`.

It is nbdthin's own daemon, and its own code writes the checkpoints and merges; only the occasion is made here: as if
the journal had grown, or someone took a snapshot, wrote, and removed it. LOG gets a line for each: the moments when
the making of the occasion began, when the work itself began, and when it ended, as time.monotonic tells them, which is
one clock for all processes. Then comes a pause of the same length, so that a client finds as much time without it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TextIO

from nbdthin import config as configuration
from nbdthin.control import commands as control
from nbdthin.daemon import serve
from nbdthin.pool import commands
from nbdthin.pool.layers import SUBBLOCKS
from nbdthin.pool.live import LivePool
from nbdthin.pool.records import LEAF_BLOCKS

_OVERWRITTEN = 16  # of the 512 blocks of each leaf, a subblock each: what a merge has to copy the rest of
_GROWN = 1 << 60  # bytes of journal
_LEAST_PAUSE = 0.02  # seconds

Span = tuple[float, float, float]  # prepared, begun, ended


async def _checkpoint(live: LivePool) -> Span:
    journal = live.pool.journal
    journal.bytes_since_checkpoint = _GROWN
    begin = time.monotonic()
    await live.execute([commands.Label("v1", {"checkpoint": str(begin)})])
    while journal.bytes_since_checkpoint >= _GROWN:  # noqa: ASYNC110 - it ends in a thread, which knows of no event
        await asyncio.sleep(0.005)
    return begin, begin, time.monotonic()


async def _merge(live: LivePool) -> Span:
    """Of all that `v1` holds, into a head that has written some of it again."""
    prepared = time.monotonic()
    if "s1" not in live.pool.state.names:
        await live.execute([commands.Snapshot("v1", "s1", {})])
    volume = live.open("v1")
    block_size = live.pool.block_size
    for block in range(0, volume.volume.size // block_size, LEAF_BLOCKS // _OVERWRITTEN):
        await volume.write(block * block_size, memoryview(bytes(block_size // SUBBLOCKS)))
    await live.commit()
    await asyncio.sleep(_LEAST_PAUSE)
    begin = time.monotonic()
    await live.execute([commands.Remove("s1")])
    while live.merging is not None:
        await asyncio.wait([live.merging])
    return prepared, begin, time.monotonic()


async def _go_on(live: LivePool, once: Callable[[LivePool], Awaitable[Span]], log: TextIO) -> None:
    while True:
        prepared, begin, end = await once(live)
        print(prepared, begin, end, file=log, flush=True)
        await asyncio.sleep(max(end - begin, _LEAST_PAUSE))


def main(config: Path, kind: str, log: Path) -> None:
    once = {"checkpoint": _checkpoint, "merge": _merge}[kind]
    tasks = []

    def ready(daemon: control.Daemon) -> None:
        tasks.append(asyncio.get_running_loop().create_task(_go_on(daemon.live, once, log.open("w"))))

    serve(configuration.load(config), ready)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))

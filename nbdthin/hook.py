"""The hook command: told of every event of the pool, one run an event, one at a time.

It gets the event as JSON on stdin and in its environment: NBDTHIN_EVENT has the kind, NBDTHIN_MESSAGE the line for
people, NBDTHIN_POOL the pool's directory, and each fact stands under its own name, as NBDTHIN_FREE. No shell is
involved. What it prints goes where the daemon's log goes; a run that fails, or takes too long, is a line there. Events
that come faster than it works wait, up to a limit (events.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from nbdthin.pool.events import Event, Events

WAITING = 64  # events that it may be behind
TIMEOUT = 60.0  # seconds until a run is killed: the next event may be the one that matters
_OURS = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")  # systemd's words to the daemon

log = logging.getLogger("nbdthin.hook")


async def run_hook(command: Sequence[str], pool: Path, events: Events) -> None:
    """Run `command` for each event, until there are no more; what runs when this is cancelled is killed."""
    async for event in events.listen(WAITING):
        await _run(command, pool, event)


async def _run(command: Sequence[str], pool: Path, event: Event) -> None:
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, env=_environment(pool, event))
    )
    try:
        process = await asyncio.shield(starting)
    except OSError as error:
        log.warning("the hook %s cannot be run: %s", command[0], error.strerror)
        return
    except asyncio.CancelledError:  # half started, it would be nobody's
        with contextlib.suppress(OSError):
            await _kill(await starting)
        raise
    try:
        async with asyncio.timeout(TIMEOUT):
            try:
                await process.communicate(json.dumps(_plain(event)).encode())
            except RuntimeError:  # uvloop's word for a hook that has closed its stdin
                await process.wait()
        if process.returncode:
            log.warning("the hook %s ended with status %d for %s", command[0], process.returncode, event.kind)
    except TimeoutError:
        log.warning("the hook %s took more than %d s for %s and is killed", command[0], TIMEOUT, event.kind)
    finally:
        await _kill(process)


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Nothing where it has ended."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _plain(event: Event) -> dict[str, object]:
    return {"kind": event.kind, "message": event.message, "time": event.time, "facts": dict(event.facts)}


def _environment(pool: Path, event: Event) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _OURS}
    environment |= {f"NBDTHIN_{name.upper()}": str(value) for name, value in event.facts.items()}
    return environment | {
        "NBDTHIN_EVENT": event.kind,
        "NBDTHIN_MESSAGE": event.message,
        "NBDTHIN_POOL": str(pool.absolute()),
    }

"""The hook command: told of every event of the pool, one run an event, one at a time.

It gets the event as JSON on stdin and in its environment: NBDTHIN_EVENT has the kind, NBDTHIN_MESSAGE the line for
people, NBDTHIN_POOL the pool's directory, and each fact stands under its own name, as NBDTHIN_FREE. No shell is
involved. What it prints goes where the daemon's log goes; a run that fails, or takes too long, is a line there. Events
that come faster than it works wait, up to a limit (events.py).

A run is a process group of its own, in a session of its own: a shell's children would outlive the shell that is killed.
Who takes too long is ended with all of them, and so is who runs when the daemon stops. What a hook leaves running when
it ends by itself is its own: nobody can tell whether that group's number still means it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from nbdthin.pool.events import Event, Events

WAITING = 64  # events that it may be behind
TIMEOUT = 60.0  # seconds until a run is ended: the next event may be the one that matters
GRACE = 1.0  # seconds from SIGTERM to SIGKILL: the daemon has ten to stop in, and most of them are for its clients
_LOOK = 0.02  # seconds between two looks at whether a group has ended
_OURS = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")  # systemd's words to the daemon

log = logging.getLogger("nbdthin.hook")


async def run_hook(command: Sequence[str], pool: Path, events: Events) -> None:
    """Run `command` for each event, until there are no more; what runs when this is cancelled is ended."""
    async for event in events.listen(WAITING):
        await _run(command, pool, event)


async def _run(command: Sequence[str], pool: Path, event: Event) -> None:
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, env=_environment(pool, event), start_new_session=True
        )
    )
    try:
        process = await asyncio.shield(starting)
    except OSError as error:
        log.warning("the hook %s cannot be run: %s", command[0], error.strerror)
        return
    except asyncio.CancelledError:  # half started, it would be nobody's
        with contextlib.suppress(OSError):
            await _end(await starting)
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
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a run and what it has started. Nothing where it has ended by itself."""
    if process.returncode is not None:
        return
    _signal_group(process.pid, signal.SIGTERM)
    if not await _has_ended(process.pid):
        _signal_group(process.pid, signal.SIGKILL)
    await process.wait()


async def _has_ended(group: int) -> bool:
    """Whether nobody of `group` is left within GRACE."""
    # No asyncio.timeout: in a task that is being cancelled, Python 3.11's raises CancelledError instead.
    deadline = time.monotonic() + GRACE
    while alive := _signal_group(group, 0):
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(_LOOK)
    return not alive


def _signal_group(group: int, number: int) -> bool:
    """Whether there was somebody to hear it. The group keeps its number for as long as anybody is in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # all that are left have become somebody else
        return number == 0
    return True


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

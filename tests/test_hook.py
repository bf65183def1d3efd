"""The hook: one run an event, one at a time, and nothing that it does reaches the pool."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import uvloop

from nbdthin import hook as hook_module
from nbdthin.hook import run_hook
from nbdthin.pool.events import Events


def test_a_hook_that_hangs_is_killed_and_the_next_event_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hook_module, "TIMEOUT", 3.0)  # enough for a shell on a busy machine
    script = f'echo $$ >>{tmp_path}/pids; test "$NBDTHIN_EVENT" = failed && exec sleep 1000; echo >{tmp_path}/second'

    async def main() -> None:
        events = Events()
        running = asyncio.create_task(run_hook(["/bin/sh", "-c", script], tmp_path, events))
        await asyncio.sleep(0)
        events.notify("failed", "first")
        events.notify("space", "second")
        events.close()
        await running

    uvloop.run(main())
    assert (tmp_path / "second").exists()
    assert "is killed" in caplog.text
    for pid in (tmp_path / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_hook_under_way_is_killed_at_the_end(tmp_path: Path) -> None:
    async def main() -> None:
        events = Events()
        script = f"echo $$ >{tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 1000"
        running = asyncio.create_task(run_hook(["/bin/sh", "-c", script], tmp_path, events))
        await asyncio.sleep(0)
        events.notify("failed", "first")
        while not (tmp_path / "pid").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    uvloop.run(main())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)

"""The hook: one run an event, one at a time, and nothing that it does reaches the pool."""

from __future__ import annotations

import asyncio
import os
import time
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


PATIENCE = 5.0  # seconds until a test gives up on what should have happened at once


def write_by_rename(path: Path, what: str) -> str:
    """Shell code: `path` is there only when it is whole."""
    return f"echo {what} >{path}.new; mv {path}.new {path}"


def ended(pid: int) -> bool:
    """Gone, or dead and not yet collected by whoever inherited it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def pid_in(path: Path) -> int:
    while not path.exists():
        time.sleep(0.01)
    return int(path.read_text())


HEARS = "sleep 1000 & "
IGNORES = "(trap '' TERM; exec sleep 1000) & "  # and its parent does not
BOTH_IGNORE = "trap '' TERM; sleep 1000 & "


@pytest.mark.parametrize("child", [HEARS, IGNORES, BOTH_IGNORE])
@pytest.mark.parametrize("stopped", [True, False])
def test_what_a_hook_has_started_ends_with_it_at_the_timeout_and_at_the_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: str, stopped: bool
) -> None:
    monkeypatch.setattr(hook_module, "TIMEOUT", 600.0 if stopped else 2.0)
    monkeypatch.setattr(hook_module, "GRACE", 0.3)
    script = f"{child}{write_by_rename(tmp_path / 'pid', '$!')}; wait"
    children = []

    async def main() -> None:
        events = Events()
        running = asyncio.create_task(run_hook(["/bin/sh", "-c", script], tmp_path, events))
        await asyncio.sleep(0)
        events.notify("failed", "first")
        events.close()
        children.append(await asyncio.to_thread(pid_in, tmp_path / "pid"))
        assert not ended(children[0])
        if stopped:
            running.cancel()
        await asyncio.wait([running])

    uvloop.run(main())
    deadline = time.monotonic() + PATIENCE
    while not ended(children[0]):
        assert time.monotonic() < deadline, "the child of the hook goes on"
        time.sleep(0.01)


def test_what_a_hook_leaves_running_when_it_ends_by_itself_is_its_own(tmp_path: Path) -> None:
    script = f"sleep 1000 & {write_by_rename(tmp_path / 'pid', '$!')}"

    async def main() -> None:
        events = Events()
        running = asyncio.create_task(run_hook(["/bin/sh", "-c", script], tmp_path, events))
        await asyncio.sleep(0)
        events.notify("failed", "first")
        events.close()
        await running

    uvloop.run(main())
    left = int((tmp_path / "pid").read_text())
    assert not ended(left)
    os.kill(left, 9)

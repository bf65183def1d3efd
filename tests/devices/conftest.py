"""A daemon for the module, volumes with a file system in them, and a look at the machine behind every test."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import nbdthin
from nbdthin import devices
from nbdthin.devices import kernel, state
from nbdthin.units import MiB
from tests.clients.daemon import Daemon
from tests.conftest import need, need_root

SIZE = 320 * MiB  # the least that mkfs.xfs takes is 300


@pytest.fixture
def pool(served: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[nbdthin.Client]:
    """Of a daemon whose pool is empty. After the test nothing may be left on the machine."""
    need_root()
    need("nbdfuse")
    monkeypatch.setattr(kernel, "available", lambda: False)  # these are tests of the other way, on any machine
    with served.connect() as pool:
        yield pool
    left = what_is_left()
    for device in devices.attached():
        devices.unmount(device.path)
    with served.connect() as pool:  # the test may have restarted the daemon
        pool.remove(*(row.name for row in pool.list()), force=True)
    assert not left


def what_is_left() -> list[str]:
    """Of all attachments ever made here: directories, mounts, loop devices, processes."""
    run = state.run_directory()
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # another's, which has just been detached
            lines.append(f"{backing}: {backing.read_text()}")
    lines += map(str, run.glob("*/*"))
    return [*(line for line in lines if str(run) in line), *(f"process {pid}" for pid in nbdfuse_processes())]


def nbdfuse_processes() -> list[int]:
    run = str(state.run_directory())
    return [each.pid for each in psutil.process_iter(["cmdline"]) if run in " ".join(each.info["cmdline"] or [])]


def make_file_system(pool: nbdthin.Client, name: str, kind: str = "ext4") -> None:
    """A new volume with one."""
    pool.create(name, SIZE)
    device = devices.attach(pool, name)
    subprocess.run([need(f"mkfs.{kind}"), "-q", device.path], check=True)
    devices.detach(device.path)

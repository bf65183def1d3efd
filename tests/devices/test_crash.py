"""A tool that dies, at any moment, leaves nothing that `nbdthin attach --cleanup` does not mend."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import nbdthin
from nbdthin import devices
from nbdthin.errors import InUse
from tests.clients.daemon import Daemon
from tests.devices.conftest import make_file_system, what_is_left

DIED = 9
# What Python tells its audit hooks of before it is done: all that a tool changes outside of itself goes through these.
EVENTS = {
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.posix_spawn", "subprocess.Popen"),
    *("fcntl.ioctl", "fcntl.flock", "ctypes.call", "signal.pidfd_send_signal"),
}


def die_at(step: int) -> Callable[[str, tuple[object, ...]], None]:
    """An audit hook that ends the process before its `step`th event."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if event in EVENTS or writes:
            count += 1
            if count == step:
                os._exit(DIED)

    return hook


def in_a_child(action: Callable[[], None]) -> int:
    """Its process id."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(f"{error!r}", file=sys.stderr)
            os._exit(1)
    return child


def use(pool: nbdthin.Client, directory: Path) -> None:
    with devices.mounted(pool, "v") as root:
        (root / "file").touch()
    devices.mount(pool, "v", directory)
    devices.unmount(directory)


def mend() -> None:
    """Clean up; what had been finished before the tool died is left, works, and is undone as ever."""
    devices.cleanup()
    for device in devices.attached():
        with device.path.open("rb") as disk:
            assert disk.read(512)
        devices.unmount("v")
    assert what_is_left() == []


@pytest.mark.slow
def test_a_death_before_any_step_is_mended(pool: nbdthin.Client, served: Daemon, tmp_path: Path) -> None:
    make_file_system(pool, "v")
    status, step = DIED, 0
    while status == DIED:
        step += 1

        def action(step: int = step) -> None:
            with served.connect() as own:
                sys.addaudithook(die_at(step))
                use(own, tmp_path)

        status = os.waitstatus_to_exitcode(os.waitpid(in_a_child(action), 0)[1])
        mend()
    assert status == 0 and step > 40


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_at_any_moment_is_mended(seed: int, pool: nbdthin.Client, served: Daemon, tmp_path: Path) -> None:
    make_file_system(pool, "v")
    chance = random.Random(seed)

    def action() -> None:
        with served.connect() as own:
            while True:
                use(own, tmp_path)

    for _ in range(8):
        child = in_a_child(action)
        time.sleep(chance.uniform(0.005, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        mend()


def test_a_dead_tools_attachment_is_in_the_way_until_it_is_mended(pool: nbdthin.Client, served: Daemon) -> None:
    pool.create("v", 512)

    def action() -> None:
        with served.connect() as own:
            sys.addaudithook(lambda event, _: os._exit(DIED) if event == "fcntl.ioctl" else None)
            devices.attach(own, "v")

    os.waitpid(in_a_child(action), 0)
    with pytest.raises(InUse, match="nbdthin attach --cleanup"):
        devices.attach(pool, "v")
    assert devices.attached() == []
    assert devices.cleanup() == ["v"]
    devices.attach(pool, "v")
    devices.detach("v")

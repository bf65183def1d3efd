"""The kernel's own nbd driver: it speaks NBD itself, over connections that this process opens and hands to it.

A device survives a restart of its server: while it has no connection, requests wait for DEAD_TIMEOUT, and those that
were on their way are sent again after REQUEST_TIMEOUT. Who opens the new connections is watch.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from nbdthin import nbd
from nbdthin.devices.nodes import BLOCK, node, wait_free
from nbdthin.devices.state import Attachment
from nbdthin.errors import Error
from nbdthin.wire.proto import TransmissionFlag

MODULE = Path("/sys/module/nbd")
OLDEST = (5, 14)  # shows what a device was connected with: without it, a crash would leave devices nobody knows
BLOCK_SIZE = 512  # bytes: with larger ones a file system made with 512 could not be mounted
CONNECTIONS = 4  # more carry nothing: four keep the server's loop busy
REQUEST_TIMEOUT = 10  # seconds; a flush that takes longer is sent again over a new connection
DEAD_TIMEOUT = 300  # seconds in which a server can be restarted


def release() -> tuple[int, int]:
    """Of the kernel: (6, 1)."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(re.match(r"\d*", minor)[0] or 0)  # type: ignore[index]


def available() -> bool:
    """Is the driver there, and what it is told by? Loads the module where that is all that is missing."""
    if importlib.util.find_spec("pyroute2") is None or release() < OLDEST:
        return False
    if not MODULE.exists() and Path("/proc/modules").exists():
        with contextlib.suppress(OSError):
            subprocess.run(["modprobe", "-q", "nbd"], stderr=subprocess.DEVNULL)
    return MODULE.exists() and answers()


def answers() -> bool:
    """It does so in the machine's first network namespace only."""
    from nbdthin.devices import netlink

    try:
        with netlink.driver():
            return True
    except OSError:
        return False


def attach(attachment: Attachment) -> Attachment:
    """With a free device. Raises Error."""
    from nbdthin.devices import netlink

    with contextlib.ExitStack() as stack:
        first, facts = nbd.negotiate(attachment.uri)
        sockets = [stack.enter_context(first)]
        flags = facts.flags | (TransmissionFlag.READ_ONLY if attachment.read_only else 0)
        if flags & TransmissionFlag.CAN_MULTI_CONN:
            for _ in range((attachment.connections or min(CONNECTIONS, os.cpu_count() or 1)) - 1):
                sockets.append(stack.enter_context(nbd.negotiate(attachment.uri)[0]))
        try:
            with netlink.driver() as driver:
                index = driver.connect(
                    sockets,
                    identity=attachment.id,
                    size=facts.size,
                    block_size=max(BLOCK_SIZE, facts.minimum_block),
                    flags=flags,
                    timeout=REQUEST_TIMEOUT,
                    dead_timeout=DEAD_TIMEOUT,
                )
        except OSError as error:
            raise Error(f"the kernel's nbd driver refuses: {error.strerror} (nbdthin doctor says more)") from error
    return attachment.save(device=str(node(f"nbd{index}")), connections=len(sockets))


def find(identity: str) -> Iterator[Path]:
    """The devices that were made for an attachment."""
    for backend in BLOCK.glob("nbd*/backend"):
        with contextlib.suppress(OSError):  # it has just been disconnected
            if backend.read_text().strip() == identity:
                yield node(backend.parent.name)


def detach(device: Path) -> None:
    """Free `device`, which nobody has mounted. Raises InUse where another process keeps it open."""
    from nbdthin.devices import netlink

    with netlink.driver() as driver:
        driver.disconnect(_index(device))
    wait_free(device, "pid")


def reconnect(attachment: Attachment) -> None:
    """Hand the device a connection in the place of one that died, if one did. Raises Error or OSError."""
    from nbdthin.devices import netlink

    connected, facts = nbd.negotiate(attachment.uri)
    with connected, netlink.driver() as driver:
        size = max(facts.size, _size(attachment))
        index = _index(Path(attachment.device))
        driver.reconfigure(index, identity=attachment.id, size=size, sockets=[connected])


def grow(attachment: Attachment) -> None:
    """Have the device be as large as what it shows, if that has grown. Raises Error or OSError."""
    from nbdthin.devices import netlink

    size = nbd.describe(attachment.uri).size
    if size > _size(attachment):
        with netlink.driver() as driver:
            driver.reconfigure(_index(Path(attachment.device)), identity=attachment.id, size=size)


def _size(attachment: Attachment) -> int:
    return int((BLOCK / Path(attachment.device).name / "size").read_text()) * 512


def _index(device: Path) -> int:
    return int(device.name.removeprefix("nbd"))

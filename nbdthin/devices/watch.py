"""One process that keeps the kernel's nbd devices connected, and as large as their volumes.

The kernel tells when a connection has died; a new one is then opened, as soon as there is a server again, and handed
over. The first attachment starts it, it ends with the last one. `ensure` starts it again after a crash; every device is
then offered as many connections as it has, because nobody knows what died meanwhile: the kernel takes what it needs.
Sizes are asked for every few seconds, so that it does not matter who has grown a volume, and where.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from nbdthin.devices import kernel, state
from nbdthin.devices.processes import spawn
from nbdthin.devices.state import Attachment, Phase
from nbdthin.errors import Error

PERIOD = 5.0  # seconds between two looks at sizes
AGAIN = 0.1  # seconds between two tries to connect
THREADS = 16  # a server that does not even refuse holds one for a while


def ensure() -> None:
    """Have a watcher run. What it is to watch has been saved."""
    with state.exclusively():
        lock = _lock()
        if lock is not None:
            os.close(lock)
            spawn([sys.executable, "-c", "from nbdthin.devices import watch; watch.main()"], _path())


def main() -> None:
    """Watch until nothing is attached."""
    lock = _lock()
    if lock is None:
        return  # another one was faster
    os.chdir("/")
    watcher = Watcher()
    while True:
        watcher.run(PERIOD)
        with state.exclusively():
            if not watched():
                os.close(lock)  # inside: whoever attaches now sees that none runs
                return


def watched() -> list[Attachment]:
    every = (each for each in state.load_all() if each.way == "nbd" and each.device)
    return [each for each in every if each.phase is not Phase.DETACHING]


class Watcher:
    def __init__(self) -> None:
        from nbdthin.devices.netlink import DeadLinks

        self._dead = DeadLinks()  # before the first look: what dies from now on is heard of
        self._poll = select.poll()
        self._poll.register(self._dead, select.POLLIN)
        self._threads = ThreadPoolExecutor(THREADS)
        self._missing: Counter[str] = Counter()  # connections that died, by attachment
        self._jobs: dict[str, Future[int]] = {}  # what is being done for an attachment
        self._said: dict[str, str] = {}  # last, of an attachment
        self._miss_all()

    def run(self, seconds: float) -> None:
        """Replace what dies for so long, then look at the sizes."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._poll.poll(1000 * (min(left, AGAIN) if self._missing or self._jobs else left)):
                self._listen()
            self._work()
        for attachment in watched():
            if not attachment.read_only and attachment.id not in self._jobs:
                self._jobs[attachment.id] = self._threads.submit(self._try, attachment, 0)

    def _miss_all(self) -> None:
        for attachment in watched():
            self._missing[attachment.id] = attachment.connections or 1

    def _listen(self) -> None:
        try:
            index = self._dead.receive()
        except OSError:  # ENOBUFS: more died at once than the kernel could tell
            self._miss_all()
            return
        for attachment in watched():
            if attachment.device == f"/dev/nbd{index}":
                self._missing[attachment.id] += 1

    def _work(self) -> None:
        for identity, job in list(self._jobs.items()):
            if job.done():
                del self._jobs[identity]
                self._missing[identity] -= job.result()
        known = {each.id: each for each in watched()} if self._missing else {}
        self._missing = Counter({each: count for each, count in self._missing.items() if count > 0 and each in known})
        for identity, count in self._missing.items():
            if identity not in self._jobs:
                self._jobs[identity] = self._threads.submit(self._try, known[identity], count)

    def _try(self, attachment: Attachment, missing: int) -> int:
        """Replace `missing` connections, and see how large the volume is; how many were replaced."""
        done = 0
        try:
            while done < missing:
                kernel.reconnect(attachment)
                done += 1
            kernel.grow(attachment)
            said = f"{done} connections were offered" if done else ""
        except (Error, OSError) as error:  # there is no server now, or no such device any more
            said = str(error)
        if said and self._said.get(attachment.id) != said:
            print(f"{attachment.device} ({attachment.name}): {said}", flush=True)
        self._said[attachment.id] = said
        return done


def _lock() -> int | None:
    """Held by the watcher; None: there is one."""
    return state.flocked(_path(), os.O_RDWR | os.O_CREAT, wait=False)


def _path() -> Path:
    return state.run_directory() / "watcher"

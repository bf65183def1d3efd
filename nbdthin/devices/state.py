"""What is attached on this machine: a directory for each attachment, that says in `state.json` what there is to undo.

    RUN/lock               held for as long as an attachment is looked up and a new one begun
    RUN/ID/                flock'ed by the tool that works on it; what is not, and is in no state to stay in, is a
                           crash's
    RUN/ID/state.json      an `Attachment`, replaced atomically before the step it speaks of
    RUN/ID/disk            where nbdfuse shows the export
    RUN/ID/root            where `mounted` mounts
    RUN/watcher            flock'ed by the process that watches the kernel's devices (watch.py); what it says

ID is random and never used again, and everything that is made for an attachment carries it: nbdfuse has RUN/ID/disk
among its arguments, the loop device as its backing file, a kernel's nbd device has ID as its backend. So what a crash
leaves is found by asking the kernel, and never taken for another's. RUN is in memory and gone after a boot, as the
devices are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from nbdthin.errors import Error, InUse

Way = Literal["nbd", "loop"]

LAST_GASP = 5.0  # seconds


class Phase(StrEnum):
    ATTACHING = "attaching"
    ATTACHED = "attached"
    MOUNTING = "mounting"
    MOUNTED = "mounted"
    DETACHING = "detaching"

    @property
    def stays(self) -> bool:
        """No tool needs to be at work on it."""
        return self in (Phase.ATTACHED, Phase.MOUNTED)


@dataclass(frozen=True, slots=True)
class Attachment:
    id: str
    name: str
    uri: str
    way: Way
    read_only: bool
    connections: int | None  # None: as many as the way thinks good
    tool: str  # who works, or worked last, on it: a process and when it began
    phase: Phase = Phase.ATTACHING
    device: str = ""  # its path, once there is one
    directory: str = ""  # where it is mounted, or was to be
    lasting_uri: str = ""  # leads to this export whatever its name has come to stand for; not every server has one

    @property
    def source(self) -> str:
        """What to connect to by who connects again: a device must not be given another volume's data."""
        return self.lasting_uri or self.uri

    @property
    def home(self) -> Path:
        return run_directory() / self.id

    @property
    def disk(self) -> Path:
        return self.home / "disk"

    @property
    def root(self) -> Path:
        return self.home / "root"

    def save(self, **changes: object) -> Attachment:
        """Write it with `changes`, before what they announce is done."""
        changed = dataclasses.replace(self, tool=_process(os.getpid()), **changes)  # type: ignore[arg-type]
        new = self.home / "state.new"
        new.write_text(json.dumps(dataclasses.asdict(changed)))
        new.replace(self.home / "state.json")
        return changed


def run_directory() -> Path:
    """NBDTHIN_RUN; without it /run/nbdthin for root, else $XDG_RUNTIME_DIR/nbdthin. As the kernel writes it."""
    if chosen := os.environ.get("NBDTHIN_RUN"):
        return Path(chosen).resolve()
    if os.geteuid() == 0:
        return Path("/run/nbdthin")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}") / "nbdthin"


def load_all() -> list[Attachment]:
    """Those that stay and those that do not, by name."""
    with contextlib.suppress(FileNotFoundError):
        found = [load(home.name) for home in run_directory().iterdir() if home.is_dir()]
        return sorted((each for each in found if each is not None), key=lambda each: (each.name, each.device))
    return []


def load(identity: str) -> Attachment | None:
    """None where it is gone, or so new that it has made nothing."""
    path = run_directory() / identity / "state.json"
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        facts = json.loads(text)
        return Attachment(**{**facts, "phase": Phase(facts["phase"])})
    except (TypeError, KeyError, ValueError) as error:
        raise Error(f"{path} is not of this version of nbdthin ({error}): detach with the one that wrote it") from error


@contextlib.contextmanager
def begun(
    name: str, uri: str, way: Way, read_only: bool, connections: int | None, lasting_uri: str = ""
) -> Iterator[Attachment]:
    """A new attachment, locked. Raises InUse where the export is attached already and one of the two can write."""
    with exclusively():
        for other in load_all():
            removed = other.lasting_uri and lasting_uri and other.lasting_uri != lasting_uri  # and its name used again
            if other.uri == uri and not removed and not (other.read_only and read_only):
                where = other.device or "by a tool that is at it, or was (nbdthin attach --cleanup)"
                raise InUse(f"{name!r} is attached already: {where} (two can share only what both only read)")
        attachment = Attachment(
            secrets.token_hex(8), name, uri, way, read_only, connections, "", lasting_uri=lasting_uri
        )
        attachment.home.mkdir(mode=0o700)
        lock = _lock(attachment.home, wait=False)
        assert lock is not None  # nobody knows it yet
    try:
        yield attachment.save()
    finally:
        os.close(lock)


@contextlib.contextmanager
def held(identity: str, *, wait: bool = True) -> Iterator[Attachment | None]:
    """An attachment, locked, as it is now; None where it is gone or, without `wait`, another tool is at work on it."""
    try:
        lock = _lock(run_directory() / identity, wait)
        deadline = time.monotonic() + LAST_GASP
        while lock is None and _is_dead_tools(identity) and time.monotonic() < deadline:
            time.sleep(0.005)
            lock = _lock(run_directory() / identity, wait)
    except FileNotFoundError:
        lock = None
    if lock is None:
        yield None
        return
    try:
        yield load(identity)
    finally:
        os.close(lock)


def _is_dead_tools(identity: str) -> bool:
    """Its lock is then held by a process that the tool had just forked, and which lets go of it as it begins."""
    attachment = load(identity)
    return attachment is not None and _process(int(attachment.tool.split()[0])) != attachment.tool


def _process(pid: int) -> str:
    """Itself and no later one of that number; empty where it has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] not in "ZX":
            return f"{pid} {fields[19]}"  # its start, in ticks since the boot
    return ""


def forget(attachment: Attachment) -> None:
    """There is nothing left to undo. The state goes last: a directory without one stands for nothing else."""
    for path in (attachment.disk, attachment.home / "log", attachment.home / "pid", attachment.home / "state.new"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        attachment.root.rmdir()
    (attachment.home / "state.json").unlink(missing_ok=True)
    attachment.home.rmdir()


def forget_empty() -> None:
    """Remove directories that a crash left before their state was written, or behind it."""
    with exclusively():
        for home in run_directory().iterdir():
            if home.is_dir() and not (home / "state.json").exists() and (lock := _lock(home, wait=False)) is not None:
                (home / "state.new").unlink(missing_ok=True)
                home.rmdir()
                os.close(lock)


@contextlib.contextmanager
def exclusively() -> Iterator[None]:
    """Nobody else begins an attachment, or removes what one left, inside."""
    run_directory().mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(run_directory() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def flocked(path: Path, flags: int, *, wait: bool) -> int | None:
    """`path`, opened with `flags` and held until it is closed; None where another has it and nobody is to `wait`."""
    fd = os.open(path, flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _lock(home: Path, wait: bool) -> int | None:
    return flocked(home, os.O_RDONLY | os.O_DIRECTORY, wait=wait)

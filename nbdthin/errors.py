"""Every error that nbdthin raises on purpose.

    Error                      one line: what is wrong and what to do
    ├── Invalid                a name, size, label or argument that can never be right
    ├── NotFound               no volume or snapshot, pool or file of that name
    ├── Exists                 the name is taken
    ├── InUse                  connections hold it; `holders` says which
    ├── NoSpace                the pool, or the file system under it, is full
    │   └── OverQuota          a volume is at its quota: waiting for space does not help
    ├── ReadOnly               a write to what cannot be written
    ├── Locked                 another process has the pool open
    ├── Corrupt                metadata that does not add up; names file and offset
    ├── PoolFailed             a sync failed: nothing more can be promised, reads go on
    ├── ConfigError            exports.toml; names file and line
    └── Unreachable            no daemon answers at the control socket, or it went away, or says that it stops

One class for each way a catcher acts differently. `code` names the class on the control socket, where it
crosses as text and is raised again on the other side. This module imports nothing of ours.
"""

from __future__ import annotations

from pathlib import Path


class Error(Exception):
    """Base of all: str() is the one line shown to a user."""

    code = "error"


class Invalid(Error):
    """The request itself is wrong; the same request will always be refused."""

    code = "invalid"


class NotFound(Error):
    code = "not_found"


class Exists(Error):
    code = "exists"


class InUse(Error):
    """Connections hold the name. Disconnect them, or force."""

    code = "in_use"

    def __init__(self, message: str, holders: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.holders = holders


class NoSpace(Error):
    """Nothing was written. Remove snapshots or volumes, trim, or grow the pool."""

    code = "no_space"


class OverQuota(NoSpace):
    """Nothing was written. Only the volume itself can change that, or a larger quota."""


class ReadOnly(Error):
    code = "read_only"


class Locked(Error):
    """Another process has the pool: talk to its daemon, or wait until it closes."""

    code = "locked"


class Corrupt(Error):
    """Metadata that fails its checks. Nothing was changed; `path` and `offset` say where."""

    code = "corrupt"

    def __init__(self, path: Path | str, offset: int | None, what: str) -> None:
        where = f"{path}" if offset is None else f"{path} at byte {offset}"
        super().__init__(f"{where}: {what}")
        self.path = Path(path)
        self.offset = offset
        self.what = what


class PoolFailed(Error):
    """The disk refused a sync, so what it holds is unknown. Restart the daemon once the disk is sound."""

    code = "failed"


class ConfigError(Error):
    code = "config"


class Unreachable(Error):
    code = "unreachable"


BY_CODE: dict[str, type[Error]] = {
    kind.code: kind
    for kind in (Invalid, NotFound, Exists, InUse, NoSpace, ReadOnly, Locked, PoolFailed, ConfigError, Unreachable)
}


def from_code(code: str, message: str) -> Error:
    """The error that `code` names (the base class for one this version does not know)."""
    return BY_CODE.get(code, Error)(message)

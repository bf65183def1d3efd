"""A directory tree as something that can be compared, with all that a layer can say of a file."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    mode: int  # with the type
    owner: tuple[int, int]
    mtime: int  # ns
    content: str  # sha256 of a file, target of a link, numbers of a device
    links: tuple[str, ...]  # all names of a file that has several
    xattrs: tuple[tuple[str, bytes], ...]


def tree(root: Path) -> dict[str, Entry]:
    """Everything below `root`, and itself as ".", by its path."""
    found: dict[str, Entry] = {}
    names: dict[int, list[str]] = {}
    waiting = [root]
    paths = [root]
    while waiting:
        for path in waiting.pop().iterdir():
            paths.append(path)
            if path.is_dir() and not path.is_symlink():
                waiting.append(path)
    for path in paths:
        status = path.lstat()
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            names.setdefault(status.st_ino, []).append(str(path.relative_to(root)))
    for path in paths:
        status = path.lstat()
        found[str(path.relative_to(root))] = Entry(
            status.st_mode,
            (status.st_uid, status.st_gid),
            status.st_mtime_ns,
            _content(path, status),
            tuple(sorted(names.get(status.st_ino, ()))) if not stat.S_ISDIR(status.st_mode) else (),
            _xattrs(path),
        )
    return found


def _content(path: Path, status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path)
    if stat.S_ISREG(status.st_mode):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _xattrs(path: Path) -> tuple[tuple[str, bytes], ...]:
    return tuple(
        (name, os.getxattr(path, name, follow_symlinks=False))
        for name in sorted(os.listxattr(path, follow_symlinks=False))
    )

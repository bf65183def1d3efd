"""What the tests of images share: trees seen with all their metadata, and tars made member by member."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from pathlib import Path
from typing import NamedTuple

SECOND = 10**9


class Entry(NamedTuple):
    """All that a layer carries of a file."""

    mode: int
    owner: tuple[int, int]
    size: int  # 0 for a directory, whose size is the file system's affair
    mtime: int  # ns
    content: str  # sha256 of a file, target of a link, number of a device
    xattrs: tuple[tuple[str, bytes], ...]
    same_as: str  # the first name of the same file


def tree(root: Path) -> dict[str, Entry]:
    """Everything below `root` and itself, by its path."""
    entries = {}
    names: dict[int, str] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        name = str(path.relative_to(root))
        size, content = 0, ""
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            size = status.st_size
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            content = str(status.st_rdev)
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
        }
        first = name if stat.S_ISDIR(status.st_mode) else names.setdefault(status.st_ino, name)
        entries[name] = Entry(
            status.st_mode,
            (status.st_uid, status.st_gid),
            size,
            status.st_mtime_ns,
            content,
            tuple(sorted(xattrs.items())),
            first,
        )
    return entries


class Member(NamedTuple):
    """One member of a tar that a test makes: the rest of its fields are those of root's own file."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    link: str = ""
    mode: int = 0o644
    owner: tuple[int, int] = (0, 0)
    mtime: int = 1_000_000_000
    device: tuple[int, int] = (0, 0)
    pax: tuple[tuple[str, str], ...] = ()


def directory(
    name: str,
    mode: int = 0o755,
    owner: tuple[int, int] = (0, 0),
    mtime: int = 1_000_000_000,
    pax: tuple[tuple[str, str], ...] = (),
) -> Member:
    return Member(name, type=tarfile.DIRTYPE, mode=mode, owner=owner, mtime=mtime, pax=pax)


def symlink(name: str, target: str) -> Member:
    return Member(name, type=tarfile.SYMTYPE, link=target, mode=0o777)


def hardlink(name: str, target: str) -> Member:
    return Member(name, type=tarfile.LNKTYPE, link=target)


def make_tar(*members: Member) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.size, info.type, info.linkname, info.mode = len(member.data), member.type, member.link, member.mode
            info.uid, info.gid = member.owner
            info.mtime = member.mtime
            info.devmajor, info.devminor = member.device
            info.pax_headers = dict(member.pax)
            tar.addfile(info, io.BytesIO(member.data))
    return buffer.getvalue()

"""Programs of others that images need: mkfs, and what makes a file system larger."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

from nbdthin.errors import Error

_PACKAGES = {
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "xfs_growfs": "xfsprogs",
    "fakeroot": "fakeroot",
}


def find(program: str) -> str:
    """Its path; Debian keeps some where a user's PATH does not look. Raises Error."""
    path = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if path is None:
        raise Error(f"{program} is missing (apt-get install {_PACKAGES[program]})")
    return path


def run(program: str, *arguments: str | Path, fine: Collection[int] = (0,)) -> None:
    """Raises Error with what the program says where it fails."""
    done = subprocess.run(
        [find(program), *arguments], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL
    )
    if done.returncode not in fine:
        said = " ".join((done.stderr or done.stdout).split())
        raise Error(f"{program} failed: {said or f'status {done.returncode}'}")

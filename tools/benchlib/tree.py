"""A root file system, written through a server: copied as an image, in and out, and unpacked onto a mounted ext4.

It is Debian's, by debootstrap, or for short runs the library of this Python. Either is made once in a bench. What a
server gives back is compared with it: image with image, file with file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

from nbdthin.units import KiB, MiB

from . import images
from .errors import BenchError
from .servers import Export

_SUITE = "bookworm"
_PATIENCE = 20.0  # seconds for a mount to come and to go
_MOUNT_PROGRAMS = {"nbdfuse": "libnbd-bin", "fusermount3": "fuse3", "mkfs.ext4": "e2fsprogs", "mount": "mount"}
_TOOL_ENDS = 300.0  # seconds; debootstrap takes 30, the rest 2 at most
_STEP = 1 * MiB

Go = Iterator[Callable[[], float]]  # yields what is timed; that returns the MiB that it moved


def mount_missing() -> str | None:
    """Why exports cannot be mounted here; None when they can."""
    if os.geteuid() != 0:
        return "only root can mount"
    missing = sorted({package for program, package in _MOUNT_PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        return f"needs {', '.join(missing)} (apt-get install {' '.join(missing)})"
    return None if Path("/dev/fuse").exists() and Path("/dev/loop-control").exists() else "needs FUSE and loop devices"


class Tree:
    """`size` is that of the images, in bytes; all of the tree's files lie in `directory`."""

    def __init__(self, directory: Path, debian: bool) -> None:
        self._directory = directory
        self._debian = debian
        self.size = (512 if debian else 128) * MiB

    @cached_property
    def _root(self) -> Path:
        if not self._debian:
            return _smaller(self._directory / "root")
        root = self._directory / "root"
        run_tool("debootstrap", "--variant=minbase", _SUITE, root, _mirror())
        return root

    @cached_property
    def _image(self) -> Path:
        path = self._directory / "root.img"
        images.make_sparse(path, self.size)
        run_tool("mke2fs", "-q", "-t", "ext4", "-d", self._root, path)
        return path

    @cached_property
    def archive(self) -> Path:
        path = self._directory / "root.tar"
        run_tool("tar", "-C", self._root, "--numeric-owner", "-cf", path, ".")
        return path

    def put_in(self, export: Export) -> None:
        _nbdcopy(self._image, export.uri)

    @contextmanager
    def copy_in(self, export: Export) -> Go:
        """What counts is what the image holds. Its holes are sent as zeroes, to which the parent's data gives way."""
        image = self._image

        def go() -> float:
            _nbdcopy(image, export.uri)
            return _allocated(image)

        yield go
        with export.client() as client, image.open("rb") as file:
            client.flush()
            for offset in range(0, self.size, _STEP):
                if client.read(offset, _STEP) != file.read(_STEP):
                    raise BenchError(f"nbdcopy in: not what was copied, at byte {offset} or behind it")

    @contextmanager
    def copy_out(self, export: Export) -> Go:
        image, copy = self._image, self._directory / "copy.img"

        def go() -> float:
            _nbdcopy(export.uri, copy)
            return _allocated(image)

        try:
            yield go
            run_tool("cmp", image, copy)
        finally:
            copy.unlink(missing_ok=True)

    @contextmanager
    def unpack(self, export: Export) -> Go:
        """The time ends when the file system is unmounted: all that tar wrote has been sent."""
        archive = self.archive
        directory = self._directory / "mounted"
        directory.mkdir(exist_ok=True)
        with _as_file(export.uri, self._directory) as disk, ExitStack() as undo:
            run_tool("mkfs.ext4", "-q", "-F", disk)
            undo.enter_context(mounted(disk, directory, "rw"))

            def go() -> float:
                run_tool("tar", "-C", directory, "--numeric-owner", "-xpf", archive)
                undo.close()
                return archive.stat().st_size / MiB

            yield go
            with mounted(disk, directory, "ro"):
                run_tool("tar", "-C", directory, "--numeric-owner", "--compare", "-f", archive)


def _smaller(path: Path) -> Path:
    """The library of this Python, without what a distribution adds to it."""
    apart = shutil.ignore_patterns("site-packages", "dist-packages", "__pycache__", "test", "config-*")
    shutil.copytree(sysconfig.get_path("stdlib"), path, symlinks=True, ignore=apart)
    return path


def _allocated(path: Path) -> float:
    return path.stat().st_blocks / (2 * KiB)


def _mirror() -> str:
    """Where this machine's own apt finds Debian."""
    told = run_tool("apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian")
    found = [url for url in told.split() if re.search("/debian/?$", url)]
    return found[0] if found else "http://deb.debian.org/debian"


@contextmanager
def _as_file(uri: str, directory: Path) -> Iterator[Path]:
    """The export as a file, by nbdfuse."""
    file = directory / "disk"
    file.touch()
    process = subprocess.Popen(["nbdfuse", file, uri], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_until(lambda: file.stat().st_dev != directory.stat().st_dev or process.poll() is not None)
        if process.poll() is not None:
            raise BenchError(f"nbdfuse ended with status {process.returncode}")
        yield file
    finally:
        if process.poll() is None:
            subprocess.run(["fusermount3", "-u", "-z", file], stderr=subprocess.DEVNULL)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def mounted(disk: Path, directory: Path, how: str) -> Iterator[None]:
    run_tool("mount", "-o", f"loop,{how}", disk, directory)
    try:
        yield
    finally:
        run_tool("umount", directory)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"nothing was mounted in {_PATIENCE:.0f} s")
        time.sleep(0.01)


def _nbdcopy(source: str | Path, destination: str | Path) -> None:
    """Over one connection, which on two cores is no slower than the four that it would take by itself.

    With several, nbdcopy 1.14 sends nbdkit's cow every third time or so what that takes for a bad message, and either
    says "external event 1 is invalid in state READY" or waits for ever.
    """
    run_tool("nbdcopy", "--connections=1", source, destination)


def run_tool(*argv: str | Path) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_TOOL_ENDS)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{argv[0]} did not end within {_TOOL_ENDS:.0f} s") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BenchError(f"{argv[0]}: {said[-1] if said else f'status {done.returncode}'}")
    return done.stdout

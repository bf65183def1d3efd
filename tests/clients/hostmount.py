"""Exports as file systems on this machine's own kernel: nbdfuse makes one a file, a loop device makes that a disk.

Everything is a context that undoes itself, so that a failing test leaves no mount, no device and no process.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.clients.daemon import PATIENCE, run
from tests.conftest import need, need_root

LOOP_MAJOR = 7


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"in {PATIENCE} s: not {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def nbdfuse(uri: str, *, read_only: bool = False) -> Iterator[Path]:
    """The export as a file."""
    need("fusermount3")
    with tempfile.TemporaryDirectory(prefix="nbdfuse.") as directory:
        file = Path(directory, "disk")
        file.touch()
        process = subprocess.Popen([need("nbdfuse"), *(["-r"] if read_only else []), file, uri])
        try:
            wait_until(lambda: is_mounted(file) or process.poll() is not None, "an nbdfuse mount")
            assert process.poll() is None, "nbdfuse ended"
            yield file
        finally:
            if is_mounted(file):
                run("fusermount3", "-u", "-z", file)
            else:
                process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def storage_daemon(path: Path, name: str) -> Iterator[Path]:
    """Export `name` of the server at the unix socket `path`, as a file.

    By QEMU's client, which comes back to a server that went away; nbdfuse would give up.
    """
    need("fusermount3")
    with tempfile.TemporaryDirectory(prefix="storage.") as directory:
        file = Path(directory, "disk")
        file.touch()
        node = f"driver=nbd,node-name=disk,server.type=unix,server.path={path},export={name}"
        export = f"type=fuse,id=fuse,node-name=disk,mountpoint={file},writable=on,allow-other=off"
        command = [need("qemu-storage-daemon"), "--blockdev", f"{node},reconnect-delay={PATIENCE},discard=unmap"]
        process = subprocess.Popen([*command, "--export", export])
        try:
            wait_until(lambda: is_mounted(file) or process.poll() is not None, "a mount of qemu-storage-daemon")
            assert process.poll() is None, "qemu-storage-daemon ended"
            yield file
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if is_mounted(file):
                run("fusermount3", "-u", "-z", file)


def is_mounted(path: Path) -> bool:
    """Asks the table: a mount whose process has died cannot be looked at."""
    return f" {path} " in Path("/proc/self/mounts").read_text()


@contextlib.contextmanager
def loop(file: Path, *options: str) -> Iterator[Path]:
    """A loop device on `file`."""
    need_root()
    need("losetup")
    make_loop_node()
    device = Path(run("losetup", "--show", "-f", *options, file).strip())
    backing = Path("/sys/block", device.name, "loop/backing_file")
    try:
        yield device
    finally:
        run("losetup", "-d", device)
        wait_until(lambda: not backing.exists(), f"{device} free")


def make_loop_node() -> None:
    """In a container the kernel's next free device may have no node."""
    device = Path(run("losetup", "-f").strip())
    if not device.exists():
        os.mknod(device, stat.S_IFBLK | 0o660, os.makedev(LOOP_MAJOR, int(device.name.removeprefix("loop"))))


@contextlib.contextmanager
def attached(uri: str, *, read_only: bool = False) -> Iterator[Path]:
    """The export as a block device."""
    need_root()
    with nbdfuse(uri, read_only=read_only) as file, loop(file, *(["-r"] if read_only else [])) as device:
        yield device


@contextlib.contextmanager
def mounted(device: Path, *options: str) -> Iterator[Path]:
    need("mount")
    with tempfile.TemporaryDirectory(prefix="mounted.") as directory:
        arguments = ["-o", ",".join(options)] if options else []
        run("mount", *arguments, device, directory)
        try:
            yield Path(directory)
        finally:
            run("umount", directory)


@contextlib.contextmanager
def mounted_export(uri: str, *options: str, read_only: bool = False) -> Iterator[Path]:
    """The file system in an export. All that was written has reached the daemon when this ends."""
    with attached(uri, read_only=read_only) as device, mounted(device, *options) as directory:
        yield directory


def make_file_system(uri: str, kind: str) -> None:
    program = need(f"mkfs.{kind}")
    with attached(uri) as device:
        run(program, "-q", "-F" if kind == "ext4" else "-f", device)


def check_file_system(uri: str, kind: str) -> None:
    """e2fsck or xfs_repair must find nothing, and may change nothing. An old journal must have been replayed before."""
    with attached(uri, read_only=True) as device:
        run(*(("e2fsck", "-fn") if kind == "ext4" else ("xfs_repair", "-n")), device)


def sums(directory: Path) -> dict[str, str]:
    """{relative path: sha256} of all files below."""
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    if not files:
        return {}
    lines = subprocess.run(
        ["xargs", "-0", "sha256sum", "--zero", "--"],
        cwd=directory,
        input="\0".join(files),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {line[66:]: line[:64] for line in lines.split("\0") if line}

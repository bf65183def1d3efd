"""Disk images of any format that QEMU knows: what a file is, and its content as a disk, by qemu-img and qemu-nbd.

An image names other files: its backing file, and some formats the files that hold the data. QEMU opens what it says.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from nbdthin import nbd
from nbdthin.addresses import UnixAddress
from nbdthin.control.codec import printable, shortened
from nbdthin.errors import Error, Unreachable
from nbdthin.pool.rows import Extent

PATIENCE = 60  # seconds that qemu-nbd may take to finish an image that was written
PAUSE = 0.005  # seconds between two looks whether it listens


@dataclass(frozen=True, slots=True)
class Image:
    """A file and what qemu-img says of it."""

    path: Path
    format: str  # "raw", "qcow2", "vmdk" ...
    size: int  # bytes of the disk that it holds


def identify(path: Path, format: str | None = None) -> Image:
    """What the file is; `format` where that is known. Raises Error."""
    return _images(path, format, ())[0]


def chain(path: Path, format: str | None = None) -> list[Image]:
    """The file, and what it stands on: the undermost first. Raises Error."""
    return _images(path, format, ("--backing-chain",))[::-1]


def _images(path: Path, format: str | None, options: tuple[str, ...]) -> list[Image]:
    known = () if format is None else ("-f", format)
    said = json.loads(_run("qemu-img", "info", "--output=json", *options, *known, str(path.absolute())))
    facts = cast(list[dict[str, object]], said if isinstance(said, list) else [said])
    paths = (path, *(Path(str(fact["filename"])) for fact in facts[1:]))
    return [
        Image(each, str(fact["format"]), cast(int, fact["virtual-size"]))
        for each, fact in zip(paths, facts, strict=True)
    ]


def own_extents(image: Image) -> list[Extent]:
    """Where an image of a chain says itself what is there, ascending: the rest is the business of those below."""
    said = _run("qemu-img", "map", "--output=json", "-f", image.format, str(image.path.absolute()))
    return [Extent(row["start"], row["length"], not row["zero"]) for row in json.loads(said) if row["depth"] == 0]


def create(path: Path, format: str, size: int) -> Image:
    """A new image, all hole. Raises Error."""
    _run("qemu-img", "create", "-q", "-f", format, str(path.absolute()), str(size))
    return Image(path, format, size)


@contextlib.contextmanager
def opened(image: Image, *, writable: bool = False, name: str = "") -> Iterator[nbd.Disk]:
    """The image as a disk. What was written to it is in the file at the end. Errors call it `name`. Raises Error."""
    name = shortened(printable(name or str(image.path)))
    mode = ("--discard=unmap",) if writable else ("--read-only",)
    with tempfile.TemporaryDirectory(prefix="nbdthin-") as directory, tempfile.TemporaryFile() as said:
        path = f"{directory}/sock"
        command = ("qemu-nbd", *mode, "--format", image.format, "--export-name", name, "--socket", path)
        with _found("qemu-nbd"):
            process = subprocess.Popen(
                (*command, str(image.path.absolute())), stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
        try:
            with _connected(process, UnixAddress(Path(path)).uri(name)) as disk:
                yield disk
            _check_end(process, said, name)  # it ends with its last client
        except Unreachable:
            _check_end(process, said, name)  # or is not what was lost
            raise
        finally:
            process.kill()
            process.wait()


def _check_end(process: subprocess.Popen[bytes], said: IO[bytes], name: str) -> None:
    """Raises Error where qemu-nbd fails, with what it says of it."""
    try:
        status = process.wait(PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise Error(f"{name}: qemu-nbd has not finished it after {PATIENCE} s") from error
    if status:
        said.seek(0)
        raise Error(f"{name}: {_last_line(said.read()) or f'qemu-nbd ended with status {status}'}")


def _connected(process: subprocess.Popen[bytes], uri: str) -> nbd.Disk:
    """Raises Unreachable once the server has ended."""
    while True:
        try:
            return nbd.connect(uri)
        except Unreachable:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PAUSE)
                raise


def _run(*command: str) -> str:
    with _found(command[0]):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise Error(_last_line(done.stderr) or f"{command[0]} ended with status {done.returncode}")
    return done.stdout.decode(errors="surrogateescape")  # a file's name may be any bytes


def _last_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("qemu-img: ").removeprefix("qemu-nbd: ") if lines else ""


@contextlib.contextmanager
def _found(program: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise Error(f"{program} is missing (apt-get install qemu-utils; of raw data say --format raw)") from error

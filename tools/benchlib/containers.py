"""Images and containers on this machine's own kernel: loaded, started alone and a hundred at once, and written to.

Beside what `tar -x` takes onto an ext4 of its own, and what an overlay of `qemu-img` takes to be made. A container that
is started is a clone of the image, a block device, and its file system mounted.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import nbdthin
from nbdthin.images import base, containers, layout, loading, store
from nbdthin.images.config import Config, json_bytes
from nbdthin.units import MiB

from . import images
from .errors import BenchError
from .process import Daemon
from .rounds import Plan
from .tree import Tree, mounted, run_tool

ALONE = 16  # containers that are started one after the other
AT_ONCE = 100
WRITTEN = 10 * MiB  # by each of them, at once
_TAG = "bench:1"


def run(place: Path, plan: Plan) -> dict[str, float]:
    """Milliseconds, seconds, MiB/s and ratios, by name."""
    at_once = AT_ONCE if plan.debian else ALONE
    config = place / "exports.toml"
    config.write_text('[pool]\npath = "pool"\n[server]\nlisten = ["unix:s"]\n[control]\nsocket = "control"\n')
    os.environ["NBDTHIN_RUN"] = str(place / "run")
    tree = Tree(place, plan.debian)
    argv = [sys.executable, "-m", "nbdthin", "serve", "--config", str(config)]
    with ExitStack() as undo:
        undo.callback(Daemon(argv, place / "s").stop)
        pool = undo.enter_context(nbdthin.connect(place / "control"))
        undo.callback(_stop_all, pool)
        figures = _load(pool, tree, place, plan)
        figures |= _start(pool, place, at_once)
        figures |= _write(pool, at_once)
    return figures


def _stop_all(pool: nbdthin.Client) -> None:
    started = [each.name for each in containers.containers(pool) if each.root is not None]
    if started:
        containers.stop(pool, *started)


def _load(pool: nbdthin.Client, tree: Tree, place: Path, plan: Plan) -> dict[str, float]:
    archive = _image(tree.archive, place / "image.tar")
    size = tree.archive.stat().st_size / MiB
    base.create(pool, "bench", "ext4", tree.size * 2)
    loads, unpacks = [], []
    for number in range(plan.rounds):
        if number:
            store.remove(pool, _TAG)
        loads.append(_timed(lambda: loading.load(pool, archive, on="bench")))
        unpacks.append(_unpack(tree, place / f"ext4.{number}"))
    load, unpack = statistics.median(loads), statistics.median(unpacks)
    return {"load_MiB_s": size / load, "tar_MiB_s": size / unpack, "load_over_tar": load / unpack}


def _image(archive: Path, path: Path) -> Path:
    """An OCI layout of one layer, uncompressed as the tar beside it is."""
    with layout.new_layout(path) as written:
        with written.layer(None) as layer, archive.open("rb") as file:
            while data := file.read(MiB):
                layer.write(data)
        rootfs = {"type": "layers", "diff_ids": [layer.written.diff_id]}
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        fields = {"os": "linux", "architecture": machine, "rootfs": rootfs, "config": {}, "history": []}
        written.image(Config.parse(json_bytes(fields), "the bench's image"), [layer.written], [_TAG])
    return path


def _unpack(tree: Tree, disk: Path) -> float:
    """Seconds until all that tar wrote onto a fresh ext4 is in its file, as all of a loaded image is in the pool."""
    directory = disk.with_name(f"{disk.name}.mounted")
    directory.mkdir()
    images.make_sparse(disk, tree.size * 2)
    run_tool("mkfs.ext4", "-q", "-F", disk)
    with ExitStack() as undo:
        undo.enter_context(mounted(disk, directory, "rw"))

        def unpack() -> None:
            run_tool("tar", "-C", directory, "--numeric-owner", "-xpf", tree.archive)
            undo.close()

        took = _timed(unpack)
    disk.unlink()
    return took


def _start(pool: nbdthin.Client, place: Path, at_once: int) -> dict[str, float]:
    alone = []
    for number in range(ALONE):
        name = f"alone{number}"
        alone.append(_timed(lambda name=name: _make_and_start(pool, name)))  # type: ignore[misc]
        containers.stop(pool, name)
    overlays = [_timed(lambda number=number: _overlay(place, number)) for number in range(ALONE)]  # type: ignore[misc]

    def one(number: int) -> float:
        with nbdthin.connect(place / "control") as own:
            _make_and_start(own, f"web{number}")
        return time.monotonic() - begun

    begun = time.monotonic()
    with ThreadPoolExecutor(at_once) as threads:
        ended = list(threads.map(one, range(at_once)))
    return {
        "start_ms": 1e3 * statistics.median(alone),
        "overlay_ms": 1e3 * statistics.median(overlays),
        "at_once": at_once,
        "at_once_p50_ms": 1e3 * statistics.median(ended),
        "at_once_seconds": max(ended),
    }


def _make_and_start(pool: nbdthin.Client, name: str) -> None:
    containers.create(pool, _TAG, name)
    containers.start(pool, name)


def _overlay(place: Path, number: int) -> None:
    """Of the file that the pool's data are: any file does."""
    backing = ["-b", str(place / "pool/data"), "-F", "raw"]
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", *backing, str(place / f"overlay.{number}"))


def _write(pool: nbdthin.Client, at_once: int) -> dict[str, float]:
    """Each container writes a file of its own and has it synced; all of them are read back."""
    roots = [each.root for each in containers.containers(pool) if each.root is not None]
    if len(roots) != at_once:
        raise BenchError(f"{len(roots)} containers are started, not {at_once}")
    data = os.urandom(WRITTEN)

    def one(root: Path) -> None:
        with open(root / "written", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def all_of_them() -> None:
        with ThreadPoolExecutor(at_once) as threads:
            list(threads.map(one, roots))

    took = _timed(all_of_them)
    if any((root / "written").read_bytes() != data for root in roots):
        raise BenchError("a container does not have what was written to it")
    return {"write_MiB_s": at_once * WRITTEN / MiB / took}


def _timed(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun

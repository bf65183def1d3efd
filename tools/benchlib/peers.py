"""The peers of nbdthin, with their settings.

The settings are the best that were found for these works, not the defaults, and each has its reason beside it. The
command lines and configurations are made of these tables, so they cannot say anything else than what runs.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from . import images
from .client import Address, Client
from .process import Daemon, free_port, output_of
from .servers import Export, Ground, Server, Setting, State, write_some


class _Peer:
    """What the peers share: each export is a process of its own, in a directory of its own."""

    name: str
    programs: tuple[str, ...]

    def is_raw(self, state: State) -> bool:
        return False

    def keeps(self, state: State) -> bool:
        return True

    def check_parents(self, ground: Ground) -> None:
        images.check_file(ground.base, ground.size)


def _arguments(settings: Iterable[Setting], state: State | None = None) -> list[str]:
    return [argument for s in settings if s.state in (None, state) for argument in s.arguments]


def _export(
    daemon: Daemon, place: Path, name: str, state: State, ground: Ground, address: Address | None = None
) -> Export:
    def close() -> None:
        daemon.stop()
        shutil.rmtree(place)

    nothing = state in (State.EMPTY, State.MAPPED)
    generations = images.empty(ground.size) if nothing else images.blank(ground.size)
    return Export(address or place / "s", name, daemon.pid, generations, close)


def _raw(path: Path, state: State, ground: Ground) -> Path:
    images.make_sparse(path, ground.size)
    if state is State.MAPPED:
        images.allocate(path, ground.size)
    return path


def _prepared(export: Export, state: State, ground: Ground) -> Export:
    """The same export. A full one is written through it: no file is made in a way that suits it better or worse."""
    if state.is_full:
        with export.client() as client:
            images.fill(client, ground.size)
    return export


def _address(state: State, place: Path) -> tuple[Address, list[str]]:
    """Where nbdkit listens, and its arguments that say so."""
    if state is State.TCP:
        port = free_port()
        return ("127.0.0.1", port), ["-i", "127.0.0.1", "-p", str(port)]
    return place / "s", ["-U", str(place / "s")]


class NbdkitFile(_Peer):
    name = "nbdkit file"
    programs = ("nbdkit",)
    settings = (Setting(("--threads=16",), "the default; 1 and 2 threads are no faster, beyond the noise"),)

    def is_raw(self, state: State) -> bool:
        return True

    def open(self, state: State, ground: Ground) -> Export:
        place = ground.place(self.name)
        image = _raw(place / "image", state, ground)
        address, where = _address(state, place)
        argv = ["nbdkit", "-f", *_arguments(self.settings), *where, "file", str(image)]
        daemon = Daemon(argv, place / "s", env=ground.environment(state), address=address)
        return _prepared(_export(daemon, place, "", state, ground, address), state, ground)


class NbdkitMemory(_Peer):
    """No peer, as what is written is gone with the process: what a C server makes of a request that costs no file."""

    name = "nbdkit memory"
    programs = ("nbdkit",)
    settings = (Setting((), "the default: an array, and nothing to sync"),)

    def is_raw(self, state: State) -> bool:
        return True

    def open(self, state: State, ground: Ground) -> Export:
        place = ground.place(self.name)
        address, where = _address(state, place)
        daemon = Daemon(["nbdkit", "-f", *where, "memory", str(ground.size)], place / "s", address=address)
        return _prepared(_export(daemon, place, "", state, ground, address), state, ground)


class NbdkitCow(_Peer):
    """The overlay is a temporary file of the server's: it ends with the process, and TMPDIR says where it is."""

    programs = ("nbdkit",)

    def __init__(self, block: str, reason: str) -> None:
        self.name = f"nbdkit cow {block}"
        self.settings = (Setting((f"cow-block-size={block}",), reason),)

    def open(self, state: State, ground: Ground) -> Export:
        place = ground.place(self.name)
        below = ground.base
        if state is State.EMPTY:
            below = place / "hole"
            images.make_sparse(below, ground.size)
        argv = ["nbdkit", "-f", "-U", str(place / "s"), "--filter=cow", "file", str(below)]
        daemon = Daemon([*argv, *_arguments(self.settings)], place / "s", env={"TMPDIR": str(place)})
        return _prepared(_export(daemon, place, "", state, ground), state, ground)


class QemuNbd(_Peer):
    """qcow2 over the raw base. FULL is an overlay whose every cluster has been written: it never looks below.

    A raw image is no faster there, beyond the noise, but for overwrites of 4 KiB at depth 1, where nbdkit is far ahead.
    """

    programs = ("qemu-nbd", "qemu-img", "qemu-io")

    def __init__(self, name: str, form: Setting) -> None:
        self.name = name
        self._form = form
        self._aio: tuple[Setting, ...] = ()  # known after a trial

    @property
    def settings(self) -> tuple[Setting, ...]:
        return (self._form, *_QEMU_NBD, *self._aio)

    def open(self, state: State, ground: Ground) -> Export:
        place = ground.place("qemu")
        top = place / "0.qcow2"
        if state in (State.EMPTY, State.MAPPED):
            self._create(top, ground, "-o", f"preallocation={'off' if state is State.EMPTY else 'falloc'}")
        else:
            self._create(top, ground, "-u", "-b", str(ground.base), "-F", "raw")
        generations = images.blank(ground.size)
        random = np.random.default_rng(state.depth)
        for depth in range(1, state.depth + 1):
            daemon = self._serve(top, place, ground)
            try:
                with Client(place / "s", "") as client:
                    write_some(client, generations, depth, random)
            finally:
                daemon.stop()
            below, top = top, place / f"{depth}.qcow2"
            self._create(top, ground, "-u", "-b", str(below), "-F", "qcow2")
        export = _export(self._serve(top, place, ground), place, "", state, ground)
        return _prepared(replace(export, generations=generations) if state.depth else export, state, ground)

    def _create(self, path: Path, ground: Ground, *options: str) -> None:
        create = ["qemu-img", "create", "-q", "-f", "qcow2", *self._form.arguments]
        output_of([*create, *options, str(path), str(ground.size)])

    def _serve(self, image: Path, place: Path, ground: Ground) -> Daemon:
        (place / "s").unlink(missing_ok=True)  # qemu-nbd leaves its socket behind
        if not self._aio:
            self._aio = (_best_aio(image),)
        argv = ["qemu-nbd", "-f", "qcow2", *_arguments((*_QEMU_NBD, *self._aio)), "-k", str(place / "s"), str(image)]
        return Daemon(argv, place / "s")


_QEMU_NBD = (
    Setting(("--cache=writeback",), "the page cache, which all others here use too"),
    Setting(("--discard=unmap",), "a trim reaches the file, as in nbdkit and nbdthin"),
    Setting(("--shared=8",), "several connections, and with them the multi-conn flag"),
    Setting(("--persistent",), "stays when a client goes"),
)


def _best_aio(image: Path) -> Setting:
    """io_uring, where the kernel lets us have it (containers often do not)."""
    trial = ["qemu-io", "-r", "-f", "qcow2", "--aio=io_uring", "-c", "read 0 4k", str(image)]
    if subprocess.run(trial, capture_output=True).returncode == 0:
        return Setting(("--aio=io_uring",), "4 KiB reads at depth 32: 75-88 thousand a second, with threads 36-47")
    return Setting(("--aio=threads",), "io_uring would be better; this kernel refuses it")


class NbdServer(_Peer):
    """Configured by the file of nbd-server(5); goes into the background, and forks for each connection."""

    name = "nbd-server"
    programs = ("nbd-server",)
    settings = (
        Setting(("splice=false",), "the default; splice halves the rate of 4 KiB requests"),
        Setting(("trim=true",), "a trim reaches the file, as in the others"),
        Setting(("flush=true", "fua=true"), "durable when asked to be, not at each write (sync=false)"),
        Setting(("max_threads=1",), "with more, copyonwrite gives back other blocks' data (3.24)", State.CLONE),
        Setting(("copyonwrite=true",), "a diff file, dropped when its connection ends", State.CLONE),
        Setting(("sparse_cow=false",), "sparse ones give back other blocks' data (3.24)", State.CLONE),
    )

    def is_raw(self, state: State) -> bool:
        return state is not State.CLONE

    def keeps(self, state: State) -> bool:
        return state is not State.CLONE

    def open(self, state: State, ground: Ground) -> Export:
        place = ground.place(self.name)
        image = ground.base if state is State.CLONE else _raw(place / "image", state, ground)
        options = _arguments(self.settings, state)
        common = [option for option in options if option.startswith("max_threads")]
        own = [option for option in options if option not in common]
        lines = ["[generic]", f"unixsock={place / 's'}", *common, "[x]", f"exportname={image}", f"cowdir={place}", *own]
        (place / "config").write_text("\n".join([*lines, ""]))
        argv = ["nbd-server", "-C", str(place / "config"), "-p", str(place / "pid")]
        daemon = Daemon(argv, place / "s", pidfile=place / "pid")
        return _prepared(_export(daemon, place, "x", state, ground), state, ground)


PEERS: tuple[Server, ...] = (
    NbdkitFile(),
    NbdkitCow("64K", "the default"),
    NbdkitCow("4K", "no copying for a first write of 4 KiB: three times the rate; a bitmap 16 times the size"),
    QemuNbd("qemu-nbd qcow2", Setting(("-o", "cluster_size=64k"), "the default; lazy_refcounts gains nothing")),
    QemuNbd(
        "qemu-nbd ext_l2",
        Setting(("-o", "cluster_size=64k,extended_l2=on"), "subclusters of 2 KiB; 128k clusters are slower"),
    ),
    NbdServer(),
    NbdkitMemory(),
)

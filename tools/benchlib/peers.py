"""The peers of nbdthin, with their settings.

The settings are the best that were found for these works, not the defaults, and each has its reason beside it. The
command lines and configurations are made of these tables, so they cannot say anything else than what runs.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from . import images, slowdisk
from .client import Client
from .errors import BenchError
from .process import Daemon
from .servers import Export, Ground, Server, Setting, State, write_some

_ONE_IS_ENOUGH = "the raw file is the measure"


class _Peer:
    """What the peers share: each export is a process of its own, in a directory of its own."""

    name: str
    programs: tuple[str, ...]

    def keeps(self, state: State) -> bool:
        return True

    def check_parents(self, ground: Ground) -> None:
        images.check_file(ground.base, ground.size)


def _arguments(settings: Iterable[Setting], state: State | None = None) -> list[str]:
    return [argument for s in settings if s.state in (None, state) for argument in s.arguments]


def _export(daemon: Daemon, place: Path, name: str, generations: images.Words) -> Export:
    def close() -> None:
        daemon.stop()
        shutil.rmtree(place)

    return Export(place / "s", name, daemon.pid, generations, close)


def _sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def _filled(export: Export, ground: Ground) -> Export:
    """The same export with every block written through it: no file is made in a way that suits it better or worse."""
    with export.client() as client:
        images.fill(client, ground.size)
    return export


class NbdkitFile(_Peer):
    name = "nbdkit file"
    programs = ("nbdkit",)
    settings = (Setting(("--threads=16",), "the default; 1 and 2 threads are no faster, beyond the noise"),)

    def lacks(self, state: State) -> str | None:
        if state is State.SLOW:
            return slowdisk.missing()
        return None if state is State.FULL else "a raw file: no parent, no snapshots"

    def open(self, state: State, ground: Ground) -> Export:
        place = ground.place(self.name)
        image = _sparse(place / "image", ground.size)
        argv = ["nbdkit", "-f", *_arguments(self.settings), "-U", str(place / "s"), "file", str(image)]
        daemon = Daemon(argv, place / "s", env=ground.environment(state))
        return _filled(_export(daemon, place, "", images.blank(ground.size)), ground)


class NbdkitCow(_Peer):
    """The overlay is a temporary file of the server's: it ends with the process, and TMPDIR says where it is."""

    programs = ("nbdkit",)

    def __init__(self, block: str, reason: str) -> None:
        self.name = f"nbdkit cow {block}"
        self.settings = (Setting((f"cow-block-size={block}",), reason),)

    def lacks(self, state: State) -> str | None:
        if state is State.SLOW:
            return _ONE_IS_ENOUGH
        return "one overlay, no chain" if state.depth else None

    def open(self, state: State, ground: Ground) -> Export:
        place = ground.place(self.name)
        argv = ["nbdkit", "-f", "-U", str(place / "s"), "--filter=cow", "file", str(ground.base)]
        daemon = Daemon([*argv, *_arguments(self.settings)], place / "s", env={"TMPDIR": str(place)})
        export = _export(daemon, place, "", images.blank(ground.size))
        return _filled(export, ground) if state is State.FULL else export


class QemuNbd(_Peer):
    """qcow2 over the raw base. FULL is an overlay whose every cluster has been written: it never looks below."""

    programs = ("qemu-nbd", "qemu-img", "qemu-io")

    def __init__(self, name: str, form: Setting) -> None:
        self.name = name
        self._form = form
        self._aio: tuple[Setting, ...] = ()  # known after a trial

    @property
    def settings(self) -> tuple[Setting, ...]:
        return (self._form, *_QEMU_NBD, *self._aio)

    def lacks(self, state: State) -> str | None:
        return _ONE_IS_ENOUGH if state is State.SLOW else None

    def open(self, state: State, ground: Ground) -> Export:
        place = ground.place("qemu")
        top = self._overlay(place / "0.qcow2", ground.base, "raw", ground)
        generations = images.blank(ground.size)
        random = np.random.default_rng(state.depth)
        for depth in range(1, state.depth + 1):
            daemon = self._serve(top, place, ground)
            try:
                with Client(place / "s", "") as client:
                    write_some(client, generations, depth, random)
            finally:
                daemon.stop()
            top = self._overlay(place / f"{depth}.qcow2", top, "qcow2", ground)
        export = _export(self._serve(top, place, ground), place, "", generations)
        return _filled(export, ground) if state is State.FULL else export

    def _overlay(self, path: Path, backing: Path, form: str, ground: Ground) -> Path:
        create = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", *self._form.arguments]
        _run_tool([*create, "-b", str(backing), "-F", form, str(path), str(ground.size)])
        return path

    def _serve(self, image: Path, place: Path, ground: Ground) -> Daemon:
        (place / "s").unlink(missing_ok=True)  # qemu-nbd leaves its socket behind
        if not self._aio:
            self._aio = (_best_aio(ground),)
        argv = ["qemu-nbd", "-f", "qcow2", *_arguments((*_QEMU_NBD, *self._aio)), "-k", str(place / "s"), str(image)]
        return Daemon(argv, place / "s")


_QEMU_NBD = (
    Setting(("--cache=writeback",), "the page cache, which all others here use too"),
    Setting(("--discard=unmap",), "a trim reaches the file, as in nbdkit and nbdthin"),
    Setting(("--shared=8",), "several connections, and with them the multi-conn flag"),
    Setting(("--persistent",), "stays when a client goes"),
)


def _best_aio(ground: Ground) -> Setting:
    """io_uring, where the kernel lets us have it (containers often do not)."""
    trial = ["qemu-io", "-r", "-f", "raw", "--aio=io_uring", "-c", "read 0 4k", str(ground.base)]
    if subprocess.run(trial, capture_output=True).returncode == 0:
        return Setting(("--aio=io_uring",), "4 KiB reads at depth 32: 75-88 thousand a second, with threads 36-47")
    return Setting(("--aio=threads",), "io_uring would be better; this kernel refuses it")


class NbdServer(_Peer):
    """Configured by the file of nbd-server(5); goes into the background, and forks for each connection."""

    name = "nbd-server"
    programs = ("nbd-server",)
    settings = (
        Setting(("max_threads=4",), "the default", State.FULL),
        Setting(("splice=false",), "the default; splice halves the rate of 4 KiB requests", State.FULL),
        Setting(("trim=true",), "a trim reaches the file, as in the others", State.FULL),
        Setting(("max_threads=1",), "with more, copyonwrite gives back other blocks' data (3.24)", State.CLONE),
        Setting(("copyonwrite=true",), "a diff file, dropped when its connection ends", State.CLONE),
        Setting(("sparse_cow=false",), "sparse ones give back other blocks' data (3.24)", State.CLONE),
        Setting(("flush=true", "fua=true"), "durable when asked to be, not at each write (sync=false)"),
    )

    def lacks(self, state: State) -> str | None:
        if state is State.SLOW:
            return _ONE_IS_ENOUGH
        return "copy-on-write for one connection, no snapshots" if state.depth else None

    def keeps(self, state: State) -> bool:
        return state is State.FULL

    def open(self, state: State, ground: Ground) -> Export:
        place = ground.place(self.name)
        image = ground.base if state is State.CLONE else _sparse(place / "image", ground.size)
        options = _arguments(self.settings, state)
        common = [option for option in options if option.startswith("max_threads")]
        own = [option for option in options if option not in common]
        lines = ["[generic]", f"unixsock={place / 's'}", *common, "[x]", f"exportname={image}", f"cowdir={place}", *own]
        (place / "config").write_text("\n".join([*lines, ""]))
        argv = ["nbd-server", "-C", str(place / "config"), "-p", str(place / "pid")]
        daemon = Daemon(argv, place / "s", pidfile=place / "pid")
        export = _export(daemon, place, "x", images.blank(ground.size))
        return _filled(export, ground) if state is State.FULL else export


def _run_tool(argv: list[str]) -> None:
    """A helper program that says nothing when all is well."""
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{argv[0]}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


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
)

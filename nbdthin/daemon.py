"""The daemon: read me first. What it is made of, in which order it starts, and in which it ends.

    sockets ─> Pool (lock, journal) ─> LivePool ─> Server         NBD: wire/ says what is legal
                                           └─────> ControlServer  the verbs: control/commands.py

Sockets come first, so that a busy address leaves no new pool behind; clients that connect before the pool is open wait
in the queue. SIGTERM and SIGINT end it: what was received is answered, everything is committed, and then it is gone,
its sockets too. Nothing here knows what a request or a command means.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

from nbdthin import addresses, host, systemd
from nbdthin.addresses import Address, TcpAddress, UnixAddress
from nbdthin.config import Config
from nbdthin.control import commands
from nbdthin.control.server import ControlServer
from nbdthin.errors import ConfigError
from nbdthin.hook import run_hook
from nbdthin.lag import Lag
from nbdthin.pool.files import draft_named
from nbdthin.pool.live import LivePool
from nbdthin.pool.pool import Pool
from nbdthin.server import Server

STOP_SECONDS = 8.0  # for requests and commands under way; a commit and the close fit into what is left of ten
FILES = 16384  # file descriptors: two for each of the connections that the server takes, and as many again
THREAD_TURN = 1e-4  # seconds for which a thread that computes may keep the loop from going on; Python's own are 5 ms
CONTROL_FD = "control"  # the name by which a .socket unit hands over the control socket

log = logging.getLogger("nbdthin.daemon")


def serve(config: Config, ready: Callable[[commands.Daemon], None] = lambda _: None) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is called once clients are served. Raises Error, one line."""
    _on_stop_signals(lambda *_: sys.exit(0))  # before there is a loop: as if the start had failed, but on purpose
    _raise_file_limit()
    with contextlib.ExitStack() as undo:
        _make_directory(config.pool.path.parent, undo)
        sockets = _open_sockets(config, undo)
        pool = _open_pool(config)
        sys.setswitchinterval(THREAD_TURN)
        host.spare_memory()
        uvloop.run(_serve(config, pool, sockets, ready))


def _on_stop_signals(handler: Callable[..., object] | signal.Handlers) -> None:
    """What SIGTERM and SIGINT do from now on.

    Not the loop's add_signal_handler: it would give the default back while the process still has an end to come to.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _raise_file_limit() -> None:
    """Two descriptors a connection: the usual soft limit of 1024 exists for select(), which nothing here uses."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


@dataclass(frozen=True, slots=True)
class _Sockets:
    control: socket.socket
    exports: list[socket.socket]

    @property
    def listen(self) -> tuple[Address, ...]:
        return tuple(addresses.address_of(each) for each in self.exports)

    @property
    def control_path(self) -> Path:
        """Where it is, which is not always what the config says."""
        address = addresses.address_of(self.control)
        assert isinstance(address, UnixAddress)
        return address.path


def _make_directory(path: Path, undo: contextlib.ExitStack) -> None:
    """Make `path` and what is missing above it; what is still empty at the end is removed again."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir()
        undo.callback(_remove_empty, each)


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def _open_sockets(config: Config, undo: contextlib.ExitStack) -> _Sockets:
    """Those that systemd handed over, and those that are missing."""
    handed = systemd.inherited_sockets()
    exports = [each for name, each in handed if name != CONTROL_FD]
    control = [each for name, each in handed if name == CONTROL_FD]
    for _, each in handed:
        undo.callback(each.close)
    if not exports:
        exports = [each for address in config.server.listen for each in _bind(address, undo)]
    if not exports:
        raise ConfigError("no address to listen at: [server] listen is empty, and systemd handed over no socket")
    if not control:
        control = _bind(UnixAddress(config.control.socket), undo, private=True)
    if len(control) > 1 or control[0].family != socket.AF_UNIX:  # who may change a pool is a matter of file modes
        raise ConfigError(f"systemd handed over {len(control)} sockets named {CONTROL_FD!r}: one is wanted, a path")
    return _Sockets(control[0], exports)


def _bind(address: Address, undo: contextlib.ExitStack, *, private: bool = False) -> list[socket.socket]:
    bound = addresses.bind(address, private=private)
    undo.callback(addresses.unlink, address)
    for each in bound:
        undo.callback(each.close)
    if isinstance(address, TcpAddress) and not address.loopback:
        log.warning("%s is open to the network: whoever reaches it can read and write every volume", address)
    return bound


def _open_pool(config: Config) -> Pool:
    wanted = config.pool
    if not (wanted.path / "superblock").exists():
        with draft_named(wanted.path):
            Pool.init(wanted.path, size=wanted.size, block_size=wanted.block_size, data=wanted.data)
        log.info("made the pool %s", wanted.path)
    pool = Pool.open(wanted.path, autocommit=False, policy=wanted)
    if wanted.data is not None and pool.data.path != wanted.data:
        log.warning("the data of this pool is %s, whatever the config says: %s", pool.data.path, wanted.data)
    return pool


async def _serve(config: Config, pool: Pool, sockets: _Sockets, ready: Callable[[commands.Daemon], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    _on_stop_signals(lambda *_: loop.call_soon_threadsafe(stop.set))
    live = LivePool(pool, config.scrub.rate)
    lag = Lag()
    hook = None
    if config.pool.hook:
        hook = loop.create_task(run_hook(config.pool.hook, pool.path, live.events))
    try:
        listen = sockets.listen
        server = Server(live, config.exports, polling=config.server.polling)
        daemon = commands.Daemon(live, server, listen, sockets.control_path, lag)
        control = ControlServer(daemon)
        await server.listen(sockets.exports)
        await control.listen(sockets.control)
        log.info("serving %s at %s; control at %s", pool.path, ", ".join(map(str, listen)), daemon.control)
        ready(daemon)
        systemd.notify("READY=1")
        await stop.wait()
        systemd.notify("STOPPING=1")
        log.info("stopping: %d connections", server.connections)
        await asyncio.gather(server.shutdown(STOP_SECONDS), control.close(STOP_SECONDS))
    finally:
        if hook is not None:
            hook.cancel()
            await asyncio.wait([hook])
        await live.close()
        lag.stop()
        _on_stop_signals(signal.SIG_IGN)  # a second one changes nothing any more
    log.info("stopped")

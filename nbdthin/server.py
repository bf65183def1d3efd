"""NBD over sockets: who listens, who is connected to what, and how all of it ends.

A connection (connection.py) is a receiver that hands its buffers to the event loop, a handshake, and then an export.
What is legal is decided in wire/, what happens to data in pool/.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Protocol

from nbdthin import addresses
from nbdthin.connection import Connection, new_buffer
from nbdthin.outbox import ARENA
from nbdthin.polling import Poller
from nbdthin.pool.live import LivePool
from nbdthin.pool.livevolume import LiveVolume
from nbdthin.pool.records import former_name, is_deferred, lasting_name
from nbdthin.pool.volume import Volume
from nbdthin.wire.handshake import ExportInfo

KEEPALIVE = 60  # seconds of silence after which TCP asks whether the other machine still lives

log = logging.getLogger("nbdthin.server")


class Rule(Protocol):
    """How volumes whose name matches are exported."""

    @property
    def name(self) -> str: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def description(self) -> str: ...
    @property
    def no_space(self) -> str | None: ...
    @property
    def trim(self) -> bool: ...


class Server:
    """Every volume and snapshot of a pool under its own name, on any number of sockets."""

    def __init__(
        self, live: LivePool, rules: Sequence[Rule] = (), max_connections: int = 4096, polling: bool = True
    ) -> None:
        self._live = live
        self._rules = rules
        self._max_connections = max_connections
        self._listeners: list[asyncio.AbstractServer] = []
        self._connections: dict[Connection, None] = {}
        # By the volume's identity: a name may change hands while it is in use (a removal that is deferred).
        self._users: dict[Volume, dict[Connection, None]] = {}
        self.arena = new_buffer(ARENA)  # in which all connections lay out small replies
        self.stopping = False
        self.poller = Poller(enabled=polling)
        self.speaker: Connection | None = None  # who sent last
        self.turns_alone = 0  # that it has had since someone else sent
        self.flushes_alone = 0  # that it has asked for since
        self.handled = 0  # requests in the last turn, large ones counted as more
        self.share = 0  # of these that the speaker may have in a turn, until it is found to be alone
        live.users = self.holders
        live.no_space = self._no_space

    # -- exports (wire.handshake.Exports)

    def names(self) -> Iterable[tuple[str, str]]:
        state = self._live.pool.state
        for name in state.names:
            if name not in state.deferred:
                rule = self._rule(name)
                yield name, rule.description if rule is not None else ""

    def find(self, name: str) -> ExportInfo | None:
        """What a client that asks for `name` gets; a lasting name leads to what is removed, too."""
        state = self._live.pool.state
        found: str | None = name
        if is_deferred(name):
            known = (former_name(name), *state.deferred)
            rows = (row for each in known if (row := state.names.get(each)) is not None)
            found = next((row.name for row in rows if lasting_name(row.name, row.created) == name), None)
        elif name not in state.names:
            found = self._live.awaited(name)
        export = None if found is None else self.describe(found)
        return export if export is None or found == name else replace(export, lasting=True)

    def describe(self, name: str) -> ExportInfo | None:
        """`name` as it is served, whether or not one can connect to it."""
        row = self._live.pool.state.names.get(name)
        if row is None:
            return None
        if (rule := self._rule(name)) is None:
            return ExportInfo(name, row.size, row.snapshot)
        return ExportInfo(name, row.size, row.snapshot or rule.read_only, rule.description, rule.trim)

    def _no_space(self, name: str) -> str | None:
        rule = self._rule(name)
        return None if rule is None else rule.no_space

    def _rule(self, name: str) -> Rule | None:
        name = former_name(name)
        return next((rule for rule in self._rules if fnmatchcase(name, rule.name)), None)

    # -- connections

    async def listen(self, sockets: Iterable[socket.socket]) -> None:
        """Accept on `sockets`, which are bound and, from now on, the server's to close."""
        loop = asyncio.get_running_loop()
        for each in sockets:
            if each.family == socket.AF_UNIX:
                listener: asyncio.AbstractServer = await loop.create_unix_server(
                    lambda: Connection(self),
                    sock=each,
                    **addresses.KEEP_FILE,  # type: ignore[arg-type]  # keywords
                )
            else:
                # Inherited by what is accepted: a volume must not stay in use because its client's machine died.
                each.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE)
                listener = await loop.create_server(lambda: Connection(self), sock=each)
            self._listeners.append(listener)

    @property
    def connections(self) -> int:
        return len(self._connections)

    def holders(self, name: str) -> tuple[str, ...]:
        """Who is connected to `name`, for people: `unix:pid 4711 (nbdcopy) x4` has four connections."""
        peers = Counter(connection.peer for connection in self._connected(name))
        return tuple(f"{peer} x{count}" if count > 1 else peer for peer, count in peers.items())

    def open_count(self, name: str) -> int:
        """Connections to `name`."""
        return len(self._connected(name))

    def _connected(self, name: str) -> Collection[Connection]:
        volume = self._live.pool.opened(name)
        return () if volume is None else self._users.get(volume, ())

    async def disconnect(self, name: str) -> None:
        """Close the connections to `name` and wait until their last request has ended."""
        connections = list(self._connected(name))
        for connection in connections:
            connection.abort()
        await asyncio.gather(*(connection.closed for connection in connections))

    def add(self, connection: Connection) -> bool:
        if len(self._connections) >= self._max_connections:
            log.warning("refused a connection: there are %d already", len(self._connections))
            return False
        self._connections[connection] = None
        return True

    def use(self, connection: Connection, name: str) -> LiveVolume:
        device = self._live.open(name)
        self._users.setdefault(device.volume, {})[connection] = None
        return device

    def remove(self, connection: Connection, volume: Volume | None, *, may_return: bool = False) -> None:
        """`connection` has ended; `volume` is what it used, and its client may come back to that."""
        self._connections.pop(connection, None)
        if self.speaker is connection:
            self.speaker = None
        if volume is not None:
            users = self._users[volume]
            del users[connection]
            if not users:
                del self._users[volume]
            self._live.let_go(volume.name, may_return or self.stopping)

    @property
    def live(self) -> LivePool:
        return self._live

    async def shutdown(self, timeout: float) -> None:  # noqa: ASYNC109 - it does more than give up
        """Stop accepting, answer what was received, close. After `timeout` seconds what is left is cut off."""
        self.stopping = True
        self._live.stop()
        for listener in self._listeners:
            listener.close()
        await asyncio.sleep(0)  # uvloop announces a connection a turn after it has accepted it
        connections = list(self._connections)
        for connection in connections:
            connection.stop()
        if connections:
            _, left = await asyncio.wait([connection.closed for connection in connections], timeout=timeout)
            for connection in connections:
                if connection.closed in left:
                    connection.abort()
            if left:
                await asyncio.wait(left, timeout=1.0)

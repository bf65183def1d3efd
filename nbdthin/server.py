"""NBD over sockets: who listens, who is connected to what, and how all of it ends.

A connection (connection.py) is a receiver that hands its buffers to the event loop, a handshake, and then an export.
What is legal is decided in wire/, what happens to data in pool/.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

from nbdthin import addresses
from nbdthin.connection import Connection, new_buffer
from nbdthin.outbox import ARENA
from nbdthin.polling import Poller
from nbdthin.pool.live import LivePool, LiveVolume
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
        self._users: dict[str, dict[Connection, None]] = {}
        self.arena = new_buffer(ARENA)  # in which all connections lay out small replies
        self.stopping = False
        self.poller = Poller(enabled=polling)
        self.speaker: Connection | None = None  # who sent last
        self.turns_alone = 0  # how often it has sent since someone else did
        self.flushes_alone = 0  # that it has asked for since
        live.users = self.holders
        live.no_space = self._no_space

    # -- exports (wire.handshake.Exports)

    def names(self) -> Iterable[tuple[str, str]]:
        for name in self._live.pool.state.names:
            rule = self._rule(name)
            yield name, rule.description if rule is not None else ""

    def find(self, name: str) -> ExportInfo | None:
        row = self._live.pool.state.names.get(name)
        if row is None:
            return None
        rule = self._rule(name)
        read_only = row.snapshot or (rule is not None and rule.read_only)
        return ExportInfo(name, row.size, read_only, rule.description if rule is not None else "")

    def _no_space(self, name: str) -> str | None:
        rule = self._rule(name)
        return None if rule is None else rule.no_space

    def _rule(self, name: str) -> Rule | None:
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
        peers = Counter(connection.peer for connection in self._users.get(name, ()))
        return tuple(f"{peer} x{count}" if count > 1 else peer for peer, count in peers.items())

    async def disconnect(self, name: str) -> None:
        """Close the connections to `name` and wait until their last request has ended."""
        connections = list(self._users.get(name, ()))
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
        self._users.setdefault(name, {})[connection] = None
        return self._live.open(name)

    def remove(self, connection: Connection, name: str | None) -> None:
        self._connections.pop(connection, None)
        if self.speaker is connection:
            self.speaker = None
        if name is not None:
            users = self._users[name]
            del users[connection]
            if not users:
                del self._users[name]

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

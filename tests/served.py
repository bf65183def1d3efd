"""simulatelib's live work with the real Server in between: what clients were answered over NBD must be there."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from simulatelib.livework import REGION, SUB, VOLUMES, WRITERS, LiveWork

from nbdthin.server import Server

from .rawclient import ENOSPC, FLUSH, FUA, TRIM, WRITE_ZEROES, Client


class ServedWork(LiveWork):
    """Each writer is a connection of its own, which asks and waits in a thread of its own."""

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        server = Server(self._live)
        path = self._recorder.root.with_name("sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        await server.listen([listener])
        self._clients = {}
        for name in VOLUMES:
            for index in range(WRITERS):
                self._clients[name, index * REGION] = await asyncio.to_thread(Client, path, name)
        try:
            yield
        finally:
            for client in self._clients.values():
                client.close()
            await server.shutdown(5)
            path.unlink()

    async def _request(self, name: str, base: int, chance: random.Random) -> None:
        client = self._clients[name, base]
        start = chance.randrange(REGION)
        offset, length = base + start, min(chance.choice((1, 512, SUB, 3 * SUB, 5000, 9 * SUB)), REGION - start)
        kind = chance.choice(("write", "write", "write", "zero", "trim", "read", "flush"))
        if kind == "flush":
            moment = self._oracle.ask_flush()
            assert await asyncio.to_thread(client.call, FLUSH, 0, 0) == 0
            self._oracle.flushed(moment)
        elif kind == "read":
            image = self._oracle.images[name]
            whole = bytearray(image.content())
            whole[offset : offset + length] = await asyncio.to_thread(client.read, offset, length)
            kept, now = image.kept, image.content()
            whole[:base], whole[base + REGION :] = now[:base], now[base + REGION :]
            self._oracle.check_now(name, bytes(whole), [each for head, each in self._oracle.active() if head is kept])
        else:
            await self._write_over(client, kind, name, offset, length, chance)

    async def _write_over(
        self, client: Client, kind: str, name: str, offset: int, length: int, chance: random.Random
    ) -> None:
        """A write, a zeroing or a trim, with FUA now and then."""
        if kind == "trim":  # of whole subblocks: what it does to parts of one is the server's to choose
            offset, length = -(-offset // SUB) * SUB, length // SUB * SUB
            if not length or offset + length > (offset // REGION + 1) * REGION:
                return
        data = chance.randbytes(length) if kind == "write" else bytes(length)
        change = self._oracle.begin_change(name, offset, data)
        fua = chance.random() < 0.3
        moment = self._oracle.ask_fua(name, change) if fua else None
        flags = FUA if fua else 0
        if kind == "write":
            error = await asyncio.to_thread(client.write, offset, data, flags)
        else:
            error = await asyncio.to_thread(
                client.call, WRITE_ZEROES if kind == "zero" else TRIM, offset, length, b"", flags
            )
        if error == ENOSPC:
            self._oracle.fail_change(change)
            return
        assert error == 0
        self._oracle.end_change(name, change)
        if moment is not None:
            self._oracle.flushed(moment)

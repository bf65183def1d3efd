"""A client that sends what it is told to, byte by byte, legal or not, and the server under test in a thread.

It shares no code with the server: numbers and layouts are written out again, from the protocol document.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import pytest
import uvloop

from nbdthin.pool.check import check
from nbdthin.pool.files import FILES, Files
from nbdthin.pool.live import LivePool
from nbdthin.pool.policy import ERROR, Policy
from nbdthin.pool.pool import Pool
from nbdthin.server import Rule, Server

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
EPERM, EIO, EINVAL, ENOSPC = 1, 5, 22, 28

# A pool that can be filled, stays as it is, and lets nobody wait.
REFUSING = Policy(no_space=ERROR, min_free=0, auto_extend=False)

T = TypeVar("T")


def until(holds: Callable[[], bool]) -> None:
    """Look again and again, for a minute."""
    for _ in range(12000):
        if holds():
            return
        time.sleep(0.005)
    raise AssertionError("it never came true")


def calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of a method from now on, which is done as before."""
    seen = []
    method = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        seen.append(arguments)
        return method(*arguments)

    monkeypatch.setattr(owner, name, call)
    return seen


class Chunk(NamedTuple):
    """One reply, or one chunk of a structured one. `kind` -1: a simple reply."""

    cookie: int
    kind: int
    done: bool
    error: int
    payload: bytes


class Client:
    """One connection. Without `structured` the caller says how much data a READ's reply brings (`lengths`)."""

    def __init__(self, path: Path, name: str = "", *, structured: bool = False, contexts: tuple[str, ...] = ()) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.lengths: dict[int, int] = {}
        self._cookie = 0
        try:
            self.sock.connect(str(path))
            if name:
                self.handshake(name, structured, contexts)
        except BaseException:
            self.sock.close()
            raise

    def handshake(self, name: str, structured: bool, contexts: tuple[str, ...]) -> None:
        assert self.receive(18)[:16] == b"NBDMAGICIHAVEOPT"
        self.sock.sendall(struct.pack(">I", 3))
        if structured:
            assert self.option(8, b"") == [(1, b"")]
        if contexts:
            queries = b"".join(struct.pack(">I", len(each)) + each.encode() for each in contexts)
            data = struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", len(contexts)) + queries
            self.contexts = {
                payload[4:].decode(): struct.unpack(">I", payload[:4])[0]
                for kind, payload in self.option(10, data)
                if kind == 4
            }
        replies = self.option(7, struct.pack(">I", len(name)) + name.encode() + bytes(2))
        assert replies[-1][0] == 1, replies
        self.size, self.flags = struct.unpack(">QH", next(data[2:] for kind, data in replies if data[:2] == bytes(2)))
        self.structured = structured

    def option(self, number: int, data: bytes) -> list[tuple[int, bytes]]:
        self.sock.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        return self.option_replies(number)

    def option_replies(self, number: int) -> list[tuple[int, bytes]]:
        replies: list[tuple[int, bytes]] = []
        while not replies or (replies[-1][0] not in (1,) and not replies[-1][0] >> 31):
            magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, option) == (0x3E889045565A9, number)
            replies.append((kind, self.receive(length)))
        return replies

    def receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            part = self.sock.recv(min(length - len(data), 1 << 20))
            if not part:
                raise EOFError(f"closed after {len(data)} of {length} bytes")
            data += part
        return bytes(data)

    def request(
        self, command: int, offset: int, length: int, payload: bytes = b"", flags: int = 0
    ) -> tuple[int, bytes]:
        """A new cookie and the bytes of a request."""
        self._cookie += 1
        if command == READ:
            self.lengths[self._cookie] = length
        header = struct.pack(">IHHQQI", 0x25609513, flags, command, self._cookie, offset, length)
        return self._cookie, header + payload

    def send(self, command: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> int:
        cookie, data = self.request(command, offset, length, payload, flags)
        self.sock.sendall(data)
        return cookie

    def reply(self) -> Chunk:
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            data = self.receive(self.lengths.get(cookie, 0)) if not error else b""
            return Chunk(cookie, -1, True, error, data)
        assert magic == 0x668E33EF, hex(magic)
        flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        payload = self.receive(length)
        error = struct.unpack(">I", payload[:4])[0] if kind >> 15 else 0
        return Chunk(cookie, kind, bool(flags & 1), error, payload)

    def call(self, command: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> int:
        """The error of one request, sent alone."""
        cookie = self.send(command, offset, length, payload, flags)
        while True:
            chunk = self.reply()
            assert chunk.cookie == cookie
            if chunk.done:
                return chunk.error

    def write(self, offset: int, payload: bytes, flags: int = 0) -> int:
        return self.call(WRITE, offset, len(payload), payload, flags)

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """The bytes of a range, put together from whatever chunks they come in."""
        cookie = self.send(READ, offset, length, flags=flags)
        result = bytearray(length)
        while True:
            chunk = self.reply()
            assert (chunk.cookie, chunk.error) == (cookie, 0)
            if chunk.kind == -1:
                return chunk.payload
            if chunk.kind in (1, 2):
                (start,) = struct.unpack(">Q", chunk.payload[:8])
                data = chunk.payload[8:] if chunk.kind == 1 else bytes(struct.unpack(">I", chunk.payload[8:])[0])
                result[start - offset : start - offset + len(data)] = data
            if chunk.done:
                return bytes(result)

    def status(self, offset: int, length: int, flags: int = 0) -> dict[int, list[tuple[int, int]]]:
        """By context id: (length, flags) of each extent."""
        cookie = self.send(BLOCK_STATUS, offset, length, flags=flags)
        result = {}
        while True:
            chunk = self.reply()
            assert (chunk.cookie, chunk.error, chunk.kind) == (cookie, 0, 5)
            words = struct.unpack(f">{len(chunk.payload) // 4}I", chunk.payload)
            result[words[0]] = list(zip(words[1::2], words[2::2], strict=True))
            if chunk.done:
                return result

    def closed(self) -> bool:
        """The server has closed the connection (waits for it)."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()


class Serving:
    """A pool, served on a unix socket from a thread of this process."""

    def __init__(
        self,
        path: Path,
        socket_path: Path,
        rules: tuple[Rule, ...] = (),
        policy: Policy = REFUSING,
        live: type[LivePool] = LivePool,
        *,
        files: Files = FILES,
    ) -> None:
        self._live_type = live
        self.path = path
        self._files = files
        self.socket = socket_path
        self._rules = rules
        self._policy = policy
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self.live = self._live_type(Pool.open(self.path, autocommit=False, policy=self._policy, files=self._files))
        self.server = Server(self.live, self._rules)
        self.socket.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.socket))
        self.listener.listen(64)
        await self.server.listen([self.listener.dup()])
        self._ready.set()
        await self._end.wait()
        await self.server.shutdown(5)
        if self.live.pool.failed is None:
            await self.live.commit()
        self.problems = check(self.live.pool)
        await self.live.close()
        self.listener.close()

    def run(self, work: Coroutine[object, object, T]) -> T:
        """Run `work` in the server's loop and return what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def stop(self) -> None:
        """Shut down as the daemon does; the pool must be sound."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._end.set)
            self._thread.join()
            assert self.problems == []

"""The pool of a daemon, from Python: `connect` blocks, `connect_async` is for asyncio.

What a verb asks and what its answer becomes is defined once, without I/O: the changes in `Changes`, the queries as
`_Call`s. The two clients below add a socket and nothing else. One connection carries one request at a time; an
interrupted request leaves the connection unusable, and so closed.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

from nbdthin.control import codec
from nbdthin.control.codec import LENGTH, BadFrame
from nbdthin.control.rows import Export, Info, Node, lineage
from nbdthin.errors import Error, Invalid, Unreachable
from nbdthin.pool.events import Event
from nbdthin.pool.rows import Extent, Scrubbed
from nbdthin.pool.views import MOST_CELLS, DiskUse, Explanation, Map
from nbdthin.units import parse_size

T = TypeVar("T")
Done = TypeVar("Done", covariant=True)

Labels = Mapping[str, str]
SocketPath = str | PathLike[str]


@dataclass(frozen=True, slots=True)
class _Call(Generic[T]):
    """A request, and how its answer is read."""

    command: str
    arguments: Mapping[str, object]
    read: Callable[[object], T]

    def request(self) -> bytes:
        """The frame to send. Raises Invalid."""
        return codec.pack({"version": codec.VERSION, "command": self.command, "arguments": self.arguments})

    def exchange(self) -> Generator[bytes, bytes, T]:
        """Yields what to send, is sent the payload of each reply, returns the answer. Raises Error or BadFrame."""
        payload = yield self.request()
        items: list[object] = []
        while (part := _part(payload)) is not None:
            items.extend(part)
            payload = yield b""
        result = codec.unpack(payload)["result"]
        return self._read([*items, *result] if isinstance(result, list) else result)

    def items(self, payload: bytes) -> T | None:
        """Of a stream: the items of one reply; None at its end. Raises Error or BadFrame."""
        part = _part(payload)
        return None if part is None else self._read(part)

    def _read(self, answer: object) -> T:
        try:
            return self.read(answer)
        except Invalid as error:
            raise BadFrame(f"something else than was asked for: {error}") from error


def _part(payload: bytes) -> list[object] | None:
    """What one reply brings of a longer answer; None where it is the end. Raises Error or BadFrame."""
    reply = codec.unpack(payload)
    if "error" in reply:
        raise codec.unpack_error(reply["error"])
    if "result" in reply:
        return None
    part = reply.get("part")
    if not isinstance(part, list):
        raise BadFrame("neither a part, a result nor an error")
    return part


def _nothing(answer: object) -> None:
    """What a change answers."""


def _rows(kind: type[T]) -> Callable[[object], list[T]]:
    return lambda answer: [codec.load(kind, item) for item in cast(list[object], answer)]


def _row(kind: type[T]) -> Callable[[object], T]:
    return lambda answer: codec.load(kind, answer)


def _list_call(labels: Labels | None, deferred: bool) -> _Call[list[Export]]:
    return _Call("list", {"labels": dict(labels or {}), "deferred": deferred}, _rows(Export))


def _show_call(name: str) -> _Call[Export]:
    return _Call("show", {"name": name}, _row(Export))


def _diff_call(before: str, after: str) -> _Call[list[Extent]]:
    return _Call("diff", {"before": before, "after": after}, _rows(Extent))


def _explain_call(name: str, offset: int | str, length: int | str | None) -> _Call[Explanation]:
    arguments = {"name": name, "offset": parse_size(offset), "length": _limit(length)}
    return _Call("explain", arguments, _row(Explanation))


def _map_call(name: str, cells: int) -> _Call[Map]:
    return _Call("map", {"name": name, "cells": cells}, _row(Map))


def _du_call(names: tuple[str, ...]) -> _Call[DiskUse]:
    return _Call("du", {"names": names}, _row(DiskUse))


def _names_call(prefix: str, kind: str | None) -> _Call[list[str]]:
    return _Call("names", {"prefix": prefix, "kind": kind}, _rows(str))


def _info_call() -> _Call[Info]:
    return _Call("info", {}, _row(Info))


def _events_call() -> _Call[list[Event]]:
    return _Call("events", {}, _rows(Event))


def _scrub_call(names: tuple[str, ...], rate: int | str | None) -> _Call[list[Scrubbed]]:
    return _Call("scrub", {"names": names, "rate": None if rate is None else parse_size(rate)}, _rows(Scrubbed))


def _batch_call(collected: list[_Call[None]]) -> _Call[None]:
    commands = [{"command": call.command, "arguments": call.arguments} for call in collected]
    return _Call("batch", {"commands": commands}, _nothing)


class Changes(Generic[Done]):
    """The verbs that change a pool. Sizes are bytes, or text such as "10 GiB"; labels are text to text.

    Each is durable when it returns (when its awaitable does, in an `AsyncClient`; when the batch ends, in a batch). A
    verb that raises has changed nothing. Beside the errors named with each: PoolFailed when the disk refused a sync,
    Unreachable when the daemon is gone.
    """

    def _change(self, call: _Call[None]) -> Done:
        raise NotImplementedError

    def create(self, name: str, size: int | str, *, labels: Labels | None = None) -> Done:
        """A new volume of `size`, a multiple of 512 bytes, that reads as zeroes. Raises Invalid or Exists."""
        arguments = {"name": name, "size": parse_size(size), "labels": dict(labels or {})}
        return self._change(_Call("create", arguments, _nothing))

    def snapshot(self, volume: str, name: str, *, labels: Labels | None = None) -> Done:
        """Keep what `volume` holds now as snapshot `name`; `volume` may be in use. Raises NotFound, Invalid, Exists."""
        arguments = {"volume": volume, "name": name, "labels": dict(labels or {})}
        return self._change(_Call("snapshot", arguments, _nothing))

    def clone(self, snapshot: str, name: str, *, size: int | str | None = None, labels: Labels | None = None) -> Done:
        """A new volume that starts as `snapshot`, of its size or larger. Raises NotFound, Invalid or Exists."""
        wanted = None if size is None else parse_size(size)
        arguments = {"snapshot": snapshot, "name": name, "size": wanted, "labels": dict(labels or {})}
        return self._change(_Call("clone", arguments, _nothing))

    def rollback(self, volume: str, snapshot: str) -> Done:
        """Make `volume` what `snapshot` is, its size too; what it held is gone. Raises NotFound, Invalid or InUse."""
        return self._change(_Call("rollback", {"volume": volume, "snapshot": snapshot}, _nothing))

    def rename(self, old: str, new: str) -> Done:
        """Raises NotFound, Invalid, Exists, or InUse while a client is connected to `old`."""
        return self._change(_Call("rename", {"old": old, "new": new}, _nothing))

    def remove(self, *names: str, force: bool = False, deferred: bool = False, if_exists: bool = False) -> Done:
        """Remove volumes and snapshots, all or none; clones of a snapshot stay what they are.

        Raises NotFound (not with `if_exists`), or InUse, whose `holders` says who is connected. `force` disconnects
        them first; it cannot be part of a batch. `deferred` lets them be: what they use is gone for everyone else at
        once, its name is free, and it is freed when the last of them has gone.
        """
        arguments = {"names": list(names), "force": force, "deferred": deferred, "if_exists": if_exists}
        return self._change(_Call("remove", arguments, _nothing))

    def resize(self, name: str, size: int | str) -> Done:
        """Give a volume another size; what lies behind a smaller end is gone.

        It may grow under its clients. Raises NotFound, Invalid, or InUse where it would shrink under them.
        """
        return self._change(_Call("resize", {"name": name, "size": parse_size(size)}, _nothing))

    def label(self, name: str, changes: Mapping[str, str | None]) -> Done:
        """Set labels, remove those whose value is None; others stay. Raises NotFound or Invalid."""
        return self._change(_Call("label", {"name": name, "changes": dict(changes)}, _nothing))

    def quota(self, name: str, size: int | str | None) -> Done:
        """What volume `name` may be charged with: what it and its snapshots take. Raises NotFound or Invalid."""
        return self._change(_Call("quota", {"name": name, "size": _limit(size)}, _nothing))

    def reserve(self, name: str, size: int | str | None) -> Done:
        """Keep space so that volume `name` can be charged with `size`. Raises NotFound, Invalid or NoSpace."""
        return self._change(_Call("reserve", {"name": name, "size": _limit(size)}, _nothing))

    def extend(self, size: int | str) -> Done:
        """Make the pool larger: `size` of data file or device. Raises Invalid, also where it would shrink."""
        return self._change(_Call("extend", {"size": parse_size(size)}, _nothing))


def _limit(size: int | str | None) -> int | None:
    return None if size is None else parse_size(size)


class Batch(Changes[None]):
    """Collects changes; nothing is sent before the end of its `with` block."""

    def __init__(self) -> None:
        self.collected: list[_Call[None]] = []

    def _change(self, call: _Call[None]) -> None:
        if call.arguments.get("force"):
            raise Invalid("a disconnection cannot be undone: remove by force outside of the batch")
        self.collected.append(call)


class Client(Changes[None]):
    """A daemon's pool. Made by `connect`; a context manager. Not to be shared between threads."""

    def __init__(self, connected: socket.socket, path: str) -> None:
        self._socket = connected
        self.path = path  # of the control socket
        self._batch: Batch | None = None  # while `batch` is open

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def list(self, *, labels: Labels | None = None, deferred: bool = False) -> builtins.list[Export]:
        """Every volume and snapshot by name, or those that have all of `labels`; or, `deferred`, what was removed while
        it was in use."""
        return self._call(_list_call(labels, deferred))

    def show(self, name: str) -> Export:
        """One volume or snapshot. Raises NotFound."""
        return self._call(_show_call(name))

    def tree(self) -> builtins.list[Node]:
        """The lineage: all exports, each behind its parent, with its depth."""
        return lineage(self.list())

    def diff(self, before: str, after: str) -> builtins.list[Extent]:
        """Where snapshot `after` may differ from `before`, ascending. Raises NotFound, or Invalid for a volume."""
        return self._call(_diff_call(before, after))

    def explain(self, name: str, offset: int | str, length: int | str | None = None) -> Explanation:
        """The way of a read of the byte at `offset`, and of a write of `length` there: by default of its subblock.

        Raises NotFound, or Invalid outside of the volume.
        """
        return self._call(_explain_call(name, offset, length))

    def map(self, name: str, cells: int = MOST_CELLS) -> Map:
        """Which layers a volume's data comes from, in up to `cells` parts, and how scattered it is. Raises NotFound."""
        return self._call(_map_call(name, cells))

    def du(self, *names: str) -> DiskUse:
        """What `names` take, and what removing them all at once frees; of everything without any. Raises NotFound."""
        return self._call(_du_call(names))

    def names(self, prefix: str = "", kind: str | None = None) -> builtins.list[str]:
        """The names that begin so, of "volume"s, "snapshot"s or both, ascending: quick, as nothing is worked out."""
        return self._call(_names_call(prefix, kind))

    def info(self) -> Info:
        """The pool, the daemon's process, the disk below the data."""
        return self._call(_info_call())

    def events(self) -> Iterator[Event]:
        """What happens to the pool from now on, as it happens; the connection is its own until the daemon stops."""
        return self._stream(_events_call())

    def scrub(self, *names: str, rate: int | str | None = None) -> Iterator[Scrubbed]:
        """Compare what `names` show, or everything, with its checksums: how far it is, and what it finds.

        `rate` is bytes a second, the daemon's by default. The connection is its own until it ends. Raises NotFound.
        """
        return self._stream(_scrub_call(names, rate))

    @contextlib.contextmanager
    def batch(self) -> Iterator[Self]:
        """Collect the changes called inside: all or nothing, one commit when the block ends."""
        if self._batch is not None:
            raise Invalid("a batch is open already")
        batch = self._batch = Batch()
        try:
            yield self
        finally:
            self._batch = None
        self._call(_batch_call(batch.collected))

    def _change(self, call: _Call[None]) -> None:
        if self._batch is not None:
            self._batch._change(call)
        else:
            self._call(call)

    def _call(self, call: _Call[T]) -> T:
        exchange = call.exchange()
        frame = next(exchange)
        with self._guarded(call):
            try:
                while True:
                    self._socket.sendall(frame)
                    frame = exchange.send(self._receive_payload())
            except StopIteration as end:
                return cast(T, end.value)

    def _stream(self, call: _Call[builtins.list[T]]) -> Iterator[T]:
        """Item by item as they come. Whoever stops before the end closes the connection."""
        frame = call.request()
        with self._guarded(call):
            self._socket.sendall(frame)
            while (items := call.items(self._receive_payload())) is not None:
                yield from items

    @contextlib.contextmanager
    def _guarded(self, call: _Call[T]) -> Iterator[None]:
        """After anything but an answer the connection is of no use any more."""
        try:
            yield
        except Error:
            raise
        except (OSError, EOFError, BadFrame) as error:
            self.close()
            raise _lost(self.path, call, error) from error
        except BaseException:
            self.close()
            raise

    def _receive_payload(self) -> bytes:
        return self._receive(codec.frame_length(self._receive(LENGTH.size)))

    def _receive(self, count: int) -> bytes:
        buffer = bytearray(count)
        view = memoryview(buffer)
        while view:
            received = self._socket.recv_into(view)
            if not received:
                raise EOFError("the connection ended")
            view = view[received:]
        return bytes(buffer)


class AsyncClient(Changes[Coroutine[object, object, None]]):
    """A daemon's pool, for asyncio: the verbs are awaited. Made by `connect_async`; tasks may share it.

    A request that is cancelled closes the connection, and may have been carried out.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str) -> None:
        self._reader = reader
        self._writer = writer
        self._path = path
        self._turn = asyncio.Lock()  # held by the request that is under way

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def list(self, *, labels: Labels | None = None, deferred: bool = False) -> builtins.list[Export]:
        """As `Client.list`."""
        return await self._call(_list_call(labels, deferred))

    async def show(self, name: str) -> Export:
        """As `Client.show`."""
        return await self._call(_show_call(name))

    async def tree(self) -> builtins.list[Node]:
        """As `Client.tree`."""
        return lineage(await self.list())

    async def diff(self, before: str, after: str) -> builtins.list[Extent]:
        """As `Client.diff`."""
        return await self._call(_diff_call(before, after))

    async def explain(self, name: str, offset: int | str, length: int | str | None = None) -> Explanation:
        """As `Client.explain`."""
        return await self._call(_explain_call(name, offset, length))

    async def map(self, name: str, cells: int = MOST_CELLS) -> Map:
        """As `Client.map`."""
        return await self._call(_map_call(name, cells))

    async def du(self, *names: str) -> DiskUse:
        """As `Client.du`."""
        return await self._call(_du_call(names))

    async def names(self, prefix: str = "", kind: str | None = None) -> builtins.list[str]:
        """As `Client.names`."""
        return await self._call(_names_call(prefix, kind))

    async def info(self) -> Info:
        """As `Client.info`."""
        return await self._call(_info_call())

    def events(self) -> AsyncIterator[Event]:
        """As `Client.events`."""
        return self._stream(_events_call())

    def scrub(self, *names: str, rate: int | str | None = None) -> AsyncIterator[Scrubbed]:
        """As `Client.scrub`."""
        return self._stream(_scrub_call(names, rate))

    @contextlib.asynccontextmanager
    async def batch(self) -> AsyncIterator[Batch]:
        """`async with pool.batch() as batch:` collects what is called on `batch`, without `await`; all or nothing, one
        commit when the block ends. Other tasks' requests are no part of it."""
        batch = Batch()
        yield batch
        await self._call(_batch_call(batch.collected))

    def _change(self, call: _Call[None]) -> Coroutine[object, object, None]:
        return self._call(call)

    async def _call(self, call: _Call[T]) -> T:
        async with self._turn:
            exchange = call.exchange()
            frame = next(exchange)
            with self._guarded(call):
                try:
                    while True:
                        self._writer.write(frame)
                        await self._writer.drain()
                        frame = exchange.send(await self._receive_payload())
                except StopIteration as end:
                    return cast(T, end.value)

    async def _stream(self, call: _Call[builtins.list[T]]) -> AsyncIterator[T]:
        """As `Client._stream`; the connection is this stream's until it ends."""
        async with self._turn:
            frame = call.request()
            with self._guarded(call):
                self._writer.write(frame)
                await self._writer.drain()
                while (items := call.items(await self._receive_payload())) is not None:
                    for item in items:
                        yield item

    @contextlib.contextmanager
    def _guarded(self, call: _Call[T]) -> Iterator[None]:
        """As `Client._guarded`."""
        try:
            yield
        except Error:
            raise
        except (OSError, EOFError, BadFrame) as error:
            self._writer.close()
            raise _lost(self._path, call, error) from error
        except BaseException:
            self._writer.close()
            raise

    async def _receive_payload(self) -> bytes:
        header = await self._reader.readexactly(LENGTH.size)
        return await self._reader.readexactly(codec.frame_length(header))


def connect(path: SocketPath) -> Client:
    """The pool of the daemon whose control socket is at `path`. Raises Unreachable."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.connect(fspath(path))
    except OSError as error:
        connected.close()
        raise _unreachable(fspath(path), error) from error
    return Client(connected, fspath(path))


async def connect_async(path: SocketPath) -> AsyncClient:
    """As `connect`: `async with await connect_async(path) as pool`."""
    try:
        reader, writer = await asyncio.open_unix_connection(fspath(path))
    except OSError as error:
        raise _unreachable(fspath(path), error) from error
    return AsyncClient(reader, writer, fspath(path))


def _unreachable(path: str, error: OSError) -> Unreachable:
    match error:
        case FileNotFoundError() | NotADirectoryError() | ConnectionRefusedError():
            return Unreachable(
                f"no daemon at {path} (start one: `nbdthin serve`; or say where it is: --socket PATH, NBDTHIN_SOCKET)"
            )
        case PermissionError():
            return Unreachable(f"{path} may be used by its owner only (be that user, or root)")
        case _:
            return Unreachable(f"cannot connect to {path}: {error.strerror or error}")


def _lost(path: str, call: _Call[T], error: Exception) -> Unreachable:
    if isinstance(error, BadFrame):
        return Unreachable(f"what answers at {path} is no daemon of this version: {error}")
    if call.read is not _nothing:  # it only looked
        return Unreachable(f"the daemon at {path} has ended")
    return Unreachable(
        f"the daemon at {path} has ended; whether it carried out {call.command!r} is not known "
        "(start it and look: nbdthin ls)"
    )

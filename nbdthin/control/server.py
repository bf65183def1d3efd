"""The control socket: frames in, commands run, replies out. One request at a time for each connection.

A command that is refused is answered; bytes that are no frame close that connection and nothing else. A list of any
length leaves in parts, so that neither memory nor the frame's limit bounds it; so does a stream, whose end may never
come: it is given up when the client goes away or the daemon stops. Whoever waits for an answer then is told that it
stops: an end of the connection alone would look like a crash. asyncio's streams are fast enough here: this is no data
path.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from enum import Enum

from nbdthin.addresses import KEEP_FILE
from nbdthin.control import codec, commands
from nbdthin.control.codec import BadFrame
from nbdthin.control.commands import Daemon
from nbdthin.errors import Error, Unreachable

log = logging.getLogger("nbdthin.control")


class _Owed(Enum):
    """What a connection has been asked and not yet answered."""

    NOTHING = "nothing"
    ANSWER = "answer"  # worth waiting for at the end
    STREAM = "stream"  # may never end by itself


class ControlServer:
    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._listeners: list[asyncio.AbstractServer] = []
        self._connections: dict[asyncio.Task[None], _Owed] = {}
        self._closing = False

    async def listen(self, listening: socket.socket) -> None:
        """Accept on a bound socket, which is the server's to close from now on."""
        listener = await asyncio.start_unix_server(self._serve, sock=listening, **KEEP_FILE)  # type: ignore[arg-type]
        self._listeners.append(listener)

    async def close(self, timeout: float) -> None:  # noqa: ASYNC109 - it does more than give up
        """Accept nothing more; commands under way are finished and answered, for `timeout` seconds at most."""
        self._closing = True
        for listener in self._listeners:
            listener.close()
        for task, owed in self._connections.items():
            if owed is not _Owed.ANSWER:
                task.cancel()
        if self._connections:
            _, late = await asyncio.wait(self._connections, timeout=timeout)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = _Owed.NOTHING
        ahead = b""  # of the next request, what came before the stream had ended
        try:
            while not self._closing:
                payload = await _receive(reader, ahead)
                ahead = b""
                if payload is None:
                    break
                self._connections[task] = _Owed.ANSWER
                stream = await self._answer(writer, payload)
                if stream is not None:
                    self._connections[task] = _Owed.STREAM
                    ahead = await self._answer_stream(reader, writer, stream)
                self._connections[task] = _Owed.NOTHING
        except BadFrame as error:
            log.warning("a control connection sent %s", error)
        except ConnectionError:
            pass  # it went away
        except asyncio.CancelledError:  # the daemon stops
            self._say_that_it_stops(writer, self._connections[task])
        finally:
            del self._connections[task]
            writer.close()

    def _say_that_it_stops(self, writer: asyncio.StreamWriter, owed: _Owed) -> None:
        """Behind whole frames: what was being written when this was cancelled is in the writer's buffer."""
        if owed is _Owed.STREAM:
            writer.write(codec.pack_error(Unreachable(commands.STOPS)))
        elif owed is _Owed.ANSWER:
            what = f"{commands.STOPS}; whether this was carried out is not known (start it and look: nbdthin ls)"
            writer.write(codec.pack_error(Unreachable(what)))

    async def _answer(self, writer: asyncio.StreamWriter, payload: bytes) -> AsyncIterator[object] | None:
        """Carry out a request and answer it; a stream is the caller's to answer."""
        message = codec.unpack(payload)
        try:
            result = await commands.run(self._daemon, message)
        except Exception as error:
            writer.write(_error_frame(error, str(message.get("command"))))
        else:
            if isinstance(result, AsyncIterator):
                return result
            if isinstance(result, list):
                for frame in codec.pack_parts(result):
                    writer.write(frame)
                    await writer.drain()
                    await asyncio.sleep(0)  # clients of volumes wait for the same loop
            else:
                writer.write(codec.pack({"result": result}))
        await writer.drain()
        return None

    async def _answer_stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stream: AsyncIterator[object]
    ) -> bytes:
        """Send what comes until it ends, or until the client closes its side. Returns what it has sent meanwhile.

        The end of a stream is there before its sending task is seen to be done, and the next request may be, too.
        """
        incoming = asyncio.ensure_future(reader.read(1))
        sending = asyncio.ensure_future(self._send_items(writer, stream))
        try:
            await asyncio.wait((incoming, sending), return_when=asyncio.FIRST_COMPLETED)
            if not sending.done() and not incoming.result():
                raise ConnectionAbortedError
            await sending
        finally:
            for task in (incoming, sending):
                task.cancel()
            await asyncio.gather(incoming, sending, return_exceptions=True)
        return b"" if incoming.cancelled() else incoming.result()

    async def _send_items(self, writer: asyncio.StreamWriter, stream: AsyncIterator[object]) -> None:
        try:
            async for item in stream:
                writer.write(codec.pack({"part": [item]}))
                await writer.drain()
        except ConnectionError:
            raise
        except Exception as error:
            writer.write(_error_frame(error, "a stream"))
        else:
            writer.write(codec.pack({"result": []}))
        await writer.drain()


def _error_frame(error: Exception, command: str) -> bytes:
    if isinstance(error, Error):
        return codec.pack_error(error)
    log.error("a command failed: %s", codec.printable(command), exc_info=error)
    return codec.pack_error(Error(f"the daemon met {error!r}; its log has more"))


async def _receive(reader: asyncio.StreamReader, ahead: bytes) -> bytes | None:
    """One payload, `ahead` its first bytes; None where the connection ends between two frames. Raises BadFrame."""
    try:
        header = ahead + await reader.readexactly(codec.LENGTH.size - len(ahead))
        return await reader.readexactly(codec.frame_length(header))
    except asyncio.IncompleteReadError as error:
        if error.partial or ahead:
            raise BadFrame("half a frame") from error
        return None

"""Our NBD client, against our own server and others', and against one that says what no server may."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdthin import nbd
from nbdthin.errors import Error, Invalid, NotFound, ReadOnly, Unreachable
from nbdthin.nbd import Disk
from nbdthin.pool.rows import Extent
from nbdthin.units import GiB, KiB, MiB, TiB
from nbdthin.wire import proto
from nbdthin.wire.proto import Allocation, Chunk, Command, Errno, Info, Option, Reply, TransmissionFlag

from .clients.daemon import Daemon, running
from .conftest import need

SIZE = 16 * MiB


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("daemon")) as daemon:
        yield daemon


@contextlib.contextmanager
def _process(path: Path, *command: str | Path) -> Iterator[str]:
    """A server that listens at the unix socket `path`: the URI of its only export."""
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None
            with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
                probe.connect(str(path))
                break
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def nbdthin_server(directory: Path, daemon: Daemon) -> Iterator[str]:
    name = f"of/{directory.name}"
    yield daemon.create(name, SIZE)


@contextlib.contextmanager
def nbdkit_server(directory: Path, daemon: Daemon) -> Iterator[str]:
    path = directory / "nbdkit.sock"
    with _process(path, need("nbdkit"), "-f", "-U", path, "memory", str(SIZE)) as uri:
        yield uri


@contextlib.contextmanager
def qemu_server(directory: Path, daemon: Daemon) -> Iterator[str]:
    path, image = directory / "qemu.sock", directory / "image.qcow2"
    subprocess.run([need("qemu-img"), "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    program = need("qemu-nbd")
    with _process(path, program, "--persistent", "--discard=unmap", "-f", "qcow2", "-k", path, "-x", "", image) as uri:
        yield uri


SERVERS = {"nbdthin": nbdthin_server, "nbdkit": nbdkit_server, "qemu-nbd": qemu_server}


@pytest.fixture(params=SERVERS)
def uri(request: pytest.FixtureRequest, tmp_path: Path, daemon: Daemon) -> Iterator[str]:
    """An empty export of SIZE bytes of each server."""
    with SERVERS[request.param](tmp_path, daemon) as uri:
        yield uri


def test_what_was_written_is_read(uri: str) -> None:
    chance = random.Random(1)
    expected = bytearray(SIZE)
    with nbd.connect(uri) as disk:
        assert disk.size == SIZE and not disk.facts.read_only
        for length in (1, 512, 4096, 70_000, 3 * MiB + 17):
            offset = chance.randrange(SIZE - length)
            expected[offset : offset + length] = chance.randbytes(length)
            disk.write(offset, expected[offset : offset + length])
        disk.zero(5 * MiB, MiB)
        expected[5 * MiB : 6 * MiB] = bytes(MiB)
        disk.flush()
        assert disk.read(0, SIZE) == expected
        assert disk.read(MiB - 7, 4099) == expected[MiB - 7 : MiB + 4092]


def test_a_pipeline_writes_everything(uri: str) -> None:
    chance = random.Random(2)
    expected = bytearray(chance.randbytes(SIZE))
    with nbd.connect(uri) as disk:
        with disk.pipelined():
            for offset in range(0, SIZE, 8 * KiB):
                disk.write(offset, memoryview(expected)[offset : offset + 8 * KiB])
        with disk.pipelined():
            disk.zero(3 * MiB, 2 * MiB)
            disk.write(8 * MiB, bytes(range(256)))
            disk.trim(10 * MiB, 64 * KiB)
        expected[3 * MiB : 5 * MiB] = bytes(2 * MiB)
        expected[8 * MiB : 8 * MiB + 256] = bytes(range(256))
        got = disk.read(0, SIZE)
        got[10 * MiB : 10 * MiB + 64 * KiB] = expected[10 * MiB : 10 * MiB + 64 * KiB]  # the server's to choose
        assert got == expected


def test_many_reads_come_in_the_order_in_which_they_were_asked(uri: str) -> None:
    chance = random.Random(3)
    content = chance.randbytes(SIZE)
    asked = []
    for _ in range(500):
        length = chance.choice((1, 512, 4096, 100_000))
        asked.append((chance.randrange(SIZE - length), length))
    asked.insert(100, (123, 9 * MiB))
    with nbd.connect(uri) as disk:
        disk.write(0, content)
        pieces = [(offset, bytes(data)) for offset, data in disk.read_many(asked)]
    flat = b"".join(data for _, data in pieces)
    assert flat == b"".join(content[offset : offset + length] for offset, length in asked)
    assert all(content[offset : offset + len(data)] == data for offset, data in pieces)


def test_holes_are_seen(uri: str) -> None:
    with nbd.connect(uri) as disk:
        assert list(disk.extents()) == [Extent(0, SIZE, False)]
        disk.write(64 * KiB, b"\1" * 64 * KiB)
        disk.write(8 * MiB, b"\1" * MiB)
        assert list(disk.extents()) == [
            Extent(0, 64 * KiB, False),
            Extent(64 * KiB, 64 * KiB, True),
            Extent(128 * KiB, 8 * MiB - 128 * KiB, False),
            Extent(8 * MiB, MiB, True),
            Extent(9 * MiB, 7 * MiB, False),
        ]
        assert list(disk.extents(96 * KiB, MiB)) == [
            Extent(96 * KiB, 32 * KiB, True),
            Extent(128 * KiB, MiB - 32 * KiB, False),
        ]
        assert list(disk.extents(SIZE, 0)) == []


def test_what_is_found_on_the_way_may_be_asked_for_at_once(uri: str) -> None:
    """`read_many` takes its ranges from `extents` of the same connection, and what is read may be written to it."""
    with nbd.connect(uri) as disk:
        with disk.pipelined():
            for block in range(0, 100, 2):
                disk.write(block * 64 * KiB, bytes([block]) * 64 * KiB)
        data = ((extent.offset, extent.length) for extent in disk.extents() if extent.data)
        with disk.pipelined():
            for offset, read in disk.read_many(data):
                disk.write(offset + 64 * KiB, read)
        for block in range(0, 100, 2):
            assert disk.read(block * 64 * KiB, 128 * KiB) == bytes([block]) * 128 * KiB


def test_a_refused_request_is_an_error_and_the_connection_goes_on(uri: str) -> None:
    with nbd.connect(uri) as disk:
        with pytest.raises(Error, match="read of 4096 bytes at 16777216"):
            disk.read(SIZE, 4096)
        with pytest.raises(Error):
            disk.write(SIZE - 512, bytes(1024))
        with pytest.raises(Error), disk.pipelined():
            for block in range(200):
                disk.write(block * 128 * KiB, bytes(128 * KiB))
        disk.write(0, b"still here")
        assert disk.read(0, 10) == b"still here"


def test_a_sparse_tebibyte_costs_nothing(daemon: Daemon) -> None:
    with nbd.connect(daemon.create("tebibyte", TiB)) as disk:
        disk.write(TiB - 4096, b"\1" * 4096)
        assert list(disk.extents()) == [Extent(0, TiB - 4096, False), Extent(TiB - 4096, 4096, True)]
        disk.zero(0, TiB)
        assert list(disk.extents()) == [Extent(0, TiB, False)]


def test_a_server_on_tcp_is_found(daemon: Daemon) -> None:
    daemon.create("a/name:of@many", MiB)
    with nbd.connect(f"nbd://127.0.0.1:{daemon.port}/a/name%3Aof@many") as disk:
        assert disk.size == MiB


def test_a_snapshot_cannot_be_written(daemon: Daemon) -> None:
    daemon.create("volume", MiB)
    with nbd.connect(daemon.snapshot("volume", "volume@1")) as disk:
        assert disk.facts.read_only
        with pytest.raises(ReadOnly, match="'volume@1' cannot be written: it is read-only"):
            disk.write(0, b"x")


def test_the_kernels_client_gets_a_socket_that_speaks_simple_replies(daemon: Daemon) -> None:
    connected, facts = nbd.negotiate(daemon.create("simple", MiB))
    with connected:
        assert facts.size == MiB and not facts.structured and facts.flags & TransmissionFlag.CAN_MULTI_CONN
        assert connected.gettimeout() is None
        connected.sendall(proto.REQUEST.pack(proto.REQUEST_MAGIC, 0, Command.READ, 7, 4096, 512))
        reply = connected.recv(528, socket.MSG_WAITALL)
        assert reply == proto.SIMPLE_REPLY.pack(proto.SIMPLE_REPLY_MAGIC, 0, 7) + bytes(512)


def test_simple_replies_are_enough(daemon: Daemon) -> None:
    with Disk(*nbd.negotiate(daemon.create("plain", MiB))) as disk:
        disk.write(5, b"hello")
        disk.zero(0, 7)
        assert disk.read(0, 12) == b"\0" * 7 + b"llo\0\0"
        assert list(disk.extents()) == [Extent(0, MiB, True)]
        with pytest.raises(Invalid):
            disk.read(MiB, 1)


@pytest.mark.parametrize(
    ("uri", "kind", "said"),
    [
        ("http://localhost/", Invalid, "not a URI of NBD"),
        ("nbd+unix:///name", Invalid, "not a URI of NBD"),
        ("nbd://localhost:99999/", Invalid, "not a URI"),
        ("nbd+unix:///?socket=/nowhere/at/all", Unreachable, "No such file or directory"),
        (f"nbd+unix:///?socket={'x' * 200}", Unreachable, "too long"),
        ("nbds://localhost/", Invalid, "not a URI of NBD"),
    ],
)
def test_what_cannot_be_connected_is_one_line(uri: str, kind: type[Error], said: str) -> None:
    with pytest.raises(kind, match=said) as caught:
        nbd.connect(uri)
    assert "\n" not in str(caught.value)


def test_an_unknown_export_is_not_found(daemon: Daemon) -> None:
    with pytest.raises(NotFound, match="no export 'nobody'"):
        nbd.connect(f"nbd://127.0.0.1:{daemon.port}/nobody")


def test_a_server_that_dies_is_unreachable(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        disk = nbd.connect(daemon.create("lost", GiB))
        disk.write(0, b"x")
        daemon.kill()
        with pytest.raises(Unreachable, match="was lost"):
            disk.read(0, 1)
        with pytest.raises(Unreachable):
            disk.write(0, b"x")
        disk.close()


# A server that is told what to send ------------------------------------------------------------------------


@contextlib.contextmanager
def saying(answer: Callable[[int], bytes], *, structured: bool = True) -> Iterator[Disk]:
    """A Disk whose server answers every request with what `answer` makes of its cookie, and closes on nothing."""
    ours, theirs = socket.socketpair()
    facts = nbd.ExportFacts("nbd://test/", "", SIZE, TransmissionFlag(1), 1, 4096, 32 * MiB, structured, 1)

    def serve() -> None:
        while len(request := theirs.recv(proto.REQUEST.size, socket.MSG_WAITALL)) == proto.REQUEST.size:
            _, _, command, cookie, _, _ = proto.REQUEST.unpack(request)
            reply = b"" if command == Command.DISC else answer(cookie)
            if not reply:
                break
            theirs.sendall(reply)
        theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with Disk(ours, facts) as disk:
            yield disk
    finally:
        ours.close()
        thread.join()


def chunk(cookie: int, kind: int, payload: bytes, *, done: bool = True) -> bytes:
    return proto.CHUNK.pack(proto.STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(payload)) + payload


def _at(offset: int) -> bytes:
    return offset.to_bytes(8, "big")


@pytest.mark.parametrize(
    "answer",
    [
        lambda cookie: b"HTTP/1.1 200 OK\r\n\r\n",
        lambda cookie: proto.SIMPLE_REPLY.pack(proto.SIMPLE_REPLY_MAGIC, 0, cookie + 1),
        lambda cookie: chunk(cookie + 1, Chunk.OFFSET_DATA, _at(0) + bytes(8)),
        lambda cookie: chunk(cookie, Chunk.OFFSET_DATA, _at(0) + bytes(7)),
        lambda cookie: chunk(cookie, Chunk.OFFSET_DATA, _at(1) + bytes(8)),
        lambda cookie: chunk(cookie, Chunk.OFFSET_DATA, _at(1 << 63) + bytes(8)),
        lambda cookie: chunk(cookie, Chunk.OFFSET_HOLE, _at(0) + (1 << 31).to_bytes(4, "big")),
        lambda cookie: chunk(cookie, Chunk.OFFSET_HOLE, _at(0)),
        lambda cookie: chunk(cookie, Chunk.NONE, b""),
        lambda cookie: chunk(cookie, Chunk.BLOCK_STATUS, bytes(3)),
        lambda cookie: chunk(cookie, 77, bytes(3)),
        lambda cookie: chunk(cookie, Chunk.ERROR, b"\0"),
    ],
)
def test_a_reply_that_is_none_is_never_taken_for_data(answer: Callable[[int], bytes]) -> None:
    with saying(answer) as disk:
        with pytest.raises(Error, match="which the protocol does not allow"):
            disk.read(0, 8)
        with pytest.raises(Unreachable):
            disk.read(0, 8)


def test_half_a_reply_is_a_lost_connection() -> None:
    with saying(lambda cookie: b"") as disk, pytest.raises(Unreachable, match="was lost"):
        disk.read(0, 8)


def test_a_reply_in_parts_in_any_order_is_put_together() -> None:
    def answer(cookie: int) -> bytes:
        return (
            chunk(cookie, Chunk.OFFSET_DATA, _at(104) + b"efgh", done=False)
            + chunk(cookie, Chunk.OFFSET_HOLE, _at(108) + (4).to_bytes(4, "big"), done=False)
            + chunk(cookie, Chunk.OFFSET_DATA, _at(100) + b"abcd", done=False)
            + chunk(cookie, Chunk.NONE, b"")
        )

    with saying(answer) as disk:
        assert disk.read(100, 12) == b"abcdefgh\0\0\0\0"


def test_an_error_in_the_middle_of_a_reply_fails_the_read() -> None:
    def answer(cookie: int) -> bytes:
        text = b"the disk is on fire"
        error = Errno.EIO.to_bytes(4, "big") + len(text).to_bytes(2, "big") + text
        return chunk(cookie, Chunk.OFFSET_DATA, _at(0) + b"abcd", done=False) + chunk(cookie, Chunk.ERROR, error)

    with saying(answer) as disk, pytest.raises(Error, match=r"read of 8 bytes at 0 .*the disk is on fire"):
        disk.read(0, 8)


def test_a_hole_that_may_hold_anything_is_data() -> None:
    def answer(cookie: int) -> bytes:
        pairs = [(4096, Allocation.HOLE), (4096, Allocation.ZERO), (8192, Allocation.HOLE | Allocation.ZERO)]
        packed = b"".join(length.to_bytes(4, "big") + flags.to_bytes(4, "big") for length, flags in pairs)
        return chunk(cookie, Chunk.BLOCK_STATUS, (1).to_bytes(4, "big") + packed)

    with saying(answer) as disk:
        assert list(disk.extents(0, 10000)) == [Extent(0, 4096, True), Extent(4096, 5904, False)]


def test_a_block_status_that_says_nothing_is_refused() -> None:
    with saying(lambda cookie: chunk(cookie, Chunk.NONE, b"")) as disk, pytest.raises(Error, match="without extents"):
        list(disk.extents())


@contextlib.contextmanager
def greeting(path: Path, *said: bytes) -> Iterator[str]:
    """A server that answers whatever it gets with the next of `said`, and then closes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                for each in said[:-1]:
                    client.sendall(each)
                    client.recv(4096)
                client.sendall(said[-1])
                client.shutdown(socket.SHUT_WR)
                while client.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"nbd+unix:///x?socket={path}"
        thread.join()


def _option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    return proto.OPTION_REPLY.pack(proto.OPTION_REPLY_MAGIC, option, reply, len(data)) + data


HELLO = proto.GREETING.pack(proto.NBDMAGIC, proto.IHAVEOPT, 3)
INFO = proto.INFO_EXPORT.pack(Info.EXPORT, MiB, 1)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ([b"SSH-2.0-OpenSSH_9.2\r\n"], Error),
        ([b""], Unreachable),
        ([HELLO[:9]], Unreachable),
        ([proto.GREETING.pack(proto.NBDMAGIC, 0x00420281861253, 3)], Error),
        ([HELLO], Unreachable),
        ([HELLO, b"x" * 100], Error),
        ([HELLO, _option_reply(Option.GO, Reply.ACK)], Error),
        ([HELLO, _option_reply(Option.GO, Reply.INFO, INFO[:5]) + _option_reply(Option.GO, Reply.ACK)], Error),
        ([HELLO, proto.OPTION_REPLY.pack(proto.OPTION_REPLY_MAGIC, Option.GO, Reply.INFO, 1 << 31)], Error),
        ([HELLO, _option_reply(Option.GO, 1 << 31 | 5, b"TLS is needed\n")], Error),
    ],
)
def test_what_is_no_nbd_server_is_one_line(tmp_path: Path, said: list[bytes], kind: type[Error]) -> None:
    with greeting(tmp_path / "sock", *said) as uri, pytest.raises(Error) as caught:
        nbd.negotiate(uri)
    assert type(caught.value) is kind and "\n" not in str(caught.value)


def test_describing_an_export_does_not_use_it(daemon: Daemon) -> None:
    facts = nbd.describe(daemon.create("described", 3 * MiB))
    assert (facts.name, facts.size, facts.read_only) == ("described", 3 * MiB, False)
    with daemon.connect() as pool:
        pool.resize("described", MiB)  # refused to whoever is in use
    with pytest.raises(NotFound):
        nbd.describe(facts.uri.replace("described", "unknown"))
